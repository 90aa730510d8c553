"""in_proj_conv: the packed in_proj of a decode step with the norm before it and the conv update of its q, k, v behind it.

The projection owns each channel of the conv alone, so that it may update the conv state without a race.
"""

from __future__ import annotations

import torch

from gdnfuse.dialect.causal_conv_update import reference as causal_conv_update
from gdnfuse.dialect.fused_linear import example_call as example_linear
from gdnfuse.dialect.fused_linear import reference as fused_linear
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

    Returns:
        [B, 1, ΣMᵢ] in float32 (float64 for float64 inputs): nothing is rounded between projection and rule.
    """
    row = fused_linear(x, weights, norm_weight, norm_eps, norm_offset)
    D = conv_state.shape[1]
    mixed = row.narrow(-1, conv_offset, D).transpose(1, 2)
    mixed = causal_conv_update(mixed, conv_state, conv_weight, conv_bias, activation).transpose(1, 2)
    before, behind = row.narrow(-1, 0, conv_offset), row.narrow(-1, conv_offset + D, row.shape[-1] - conv_offset - D)
    acc = acc_dtype(row)
    return torch.cat([before.to(acc), mixed.to(acc), behind.to(acc)], -1)


def fake(
    x, weights, norm_weight, norm_eps, norm_offset, conv_state, conv_weight, conv_bias, conv_offset, activation
):  # fmt: skip
    columns = sum(w.shape[0] for w in weights)
    return torch.empty((*x.shape[:-1], columns), dtype=acc_dtype(weights[0]), device=x.device)


def example_call(M, N, D, dtype=torch.float32, *, B=1, S=4, W=4, norm=True, offset=0, bias=False, state_dtype=None, parts=1):
    (x, weights), options = example_linear(M, N, dtype, (B, 1), norm=norm, parts=parts)
    return (
        x, weights, options["norm_weight"], 1e-6, 1.0,
        torch.randn(B, D, S).to(state_dtype or dtype), (torch.randn(D, 1, W) / 2).to(dtype),
        torch.randn(D).to(dtype) if bias else None, offset, "silu",
    ), {}  # fmt: skip


def examples():
    return [example_call(12, 8, 6, B=2, offset=3, bias=True, parts=2), example_call(9, 8, 9, norm=False)]


op = register(
    "in_proj_conv",
    reference,
    fake,
    examples,
    equation="causal_conv_update on the qkv columns of fused_linear(x)",
    mutates=("conv_state",),
)
