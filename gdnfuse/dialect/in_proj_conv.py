"""in_proj_conv: the packed in_proj of a decode step with the norm before it and the conv update of its q, k, v after it.

One program of the projection owns each channel of the conv, so it can update the conv state without a race.
"""

from __future__ import annotations

import torch

from gdnfuse.dialect.causal_conv_update import reference as causal_conv_update
from gdnfuse.dialect.fused_linear import example_call as example_linear
from gdnfuse.dialect.fused_linear import reference as fused_linear
from gdnfuse.dialect.fused_linear import weight_dtype
from gdnfuse.dialect.mixer_decode import columns
from gdnfuse.dialect.op import acc_dtype, register


def reference(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    norm_offset: float,
    conv_state: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    conv_offset: int,
    activation: str,
    parts: list[int] | None = None,
    heads: int = 1,
    scales: list[torch.Tensor] | None = None,
    format: str = "",
    zeros: list[torch.Tensor] | None = None,
    lora_A: list[torch.Tensor] | None = None,
    lora_B: list[torch.Tensor] | None = None,
    lora_parts: list[int] | None = None,
    lora_scaling: list[float] | None = None,
) -> torch.Tensor:
    """fused_linear(x, weights, norm), its columns [conv_offset, conv_offset + D) through causal_conv_update.

    Args:
        x: [B, 1, N].
        weights: each [Mᵢ, N].
        norm_weight, norm_eps, norm_offset: RMSNorm of x, as for fused_linear.
        conv_state: [B, D, S], written in place.
        conv_weight: [D, 1, W].
        conv_bias: [D] or None.
        conv_offset: column of the first channel.
        activation: of the conv, "silu" or "none".
        parts: offset, stride and width of one part after the other, of which every key head has its own columns in the row, those
            of head h from offset + h·stride: in the result the parts follow each other, each with adjacent heads.
            None where the row has them so.
        heads: how many key heads.
        scales, format, zeros, lora_A, lora_B, lora_parts, lora_scaling: as of fused_linear.

    Returns:
        [B, 1, ΣMᵢ], or the columns of the parts, in float32 (float64 for float64 inputs): nothing is rounded between projection
        and rule.
    """
    lora = {"lora_A": lora_A, "lora_B": lora_B, "lora_parts": lora_parts, "lora_scaling": lora_scaling}
    row = fused_linear(x, weights, norm_weight, norm_eps, norm_offset, scales=scales, format=format, zeros=zeros, **lora)
    if parts is not None:
        row = torch.cat([columns(row, *part, heads).flatten(-2) for part in zip(*[iter(parts)] * 3, strict=True)], -1)
    D = conv_state.shape[1]
    mixed = row.narrow(-1, conv_offset, D).transpose(1, 2)
    mixed = causal_conv_update(mixed, conv_state, conv_weight, conv_bias, activation).transpose(1, 2)
    before, behind = row.narrow(-1, 0, conv_offset), row.narrow(-1, conv_offset + D, row.shape[-1] - conv_offset - D)
    acc = acc_dtype(row)
    return torch.cat([before.to(acc), mixed.to(acc), behind.to(acc)], -1)


def fake(
    x, weights, norm_weight, norm_eps, norm_offset, conv_state, conv_weight, conv_bias, conv_offset, activation,
    parts=None, heads=1, scales=None, format="", zeros=None, lora_A=None, lora_B=None, lora_parts=None, lora_scaling=None,
):  # fmt: skip
    width = sum(w.shape[0] for w in weights) if parts is None else heads * sum(parts[2::3])
    dtype = torch.promote_types(torch.float32, weight_dtype(x, weights, scales))
    return torch.empty((*x.shape[:-1], width), dtype=dtype, device=x.device)


def example_call(
    M,
    N,
    D,
    dtype=torch.float32,
    *,
    B=1,
    S=4,
    W=4,
    norm=True,
    offset=0,
    bias=False,
    state_dtype=None,
    weights=1,
    parts=None,
    heads=1,
    format="",
    plain=0,
    lora=(),
):
    (x, weights), options = example_linear(M, N, dtype, (B, 1), norm=norm, parts=weights, format=format, plain=plain, lora=lora)
    return (
        x, weights, options["norm_weight"], 1e-6, 1.0,
        torch.randn(B, D, S).to(state_dtype or dtype), (torch.randn(D, 1, W) / 2).to(dtype),
        torch.randn(D).to(dtype) if bias else None, offset, "silu", parts, heads,
    ), {name: x for name, x in options.items() if name in ("scales", "format", "zeros") or name.startswith("lora")}  # fmt: skip


def examples():
    return [
        example_call(12, 8, 6, B=2, offset=3, bias=True, weights=2),
        example_call(9, 8, 9, norm=False),
        example_call(13, 8, 6, B=2, parts=[1, 6, 3, 4, 6, 2], heads=2),
        example_call(264, 128, 128, torch.bfloat16, weights=2, format="fp8_block128", plain=1),
        example_call(13, 8, 6, parts=[1, 6, 3, 4, 6, 2], heads=2, weights=2, lora=(2,)),
    ]


op = register(
    "in_proj_conv",
    reference,
    fake,
    examples,
    equation="causal_conv_update on the qkv columns of fused_linear(x)",
    mutates=("conv_state",),
)
