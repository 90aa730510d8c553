"""fused_linear: a linear without bias with what is around it in a decode step: norm, adapters, SwiGLU, residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gdnfuse.dialect.dequantize import reference as dequantize
from gdnfuse.dialect.gated_rms_norm import reference as gated_rms_norm
from gdnfuse.dialect.op import register
from gdnfuse.dialect.rms_norm import reference as rms_norm
from gdnfuse.formats import named


def reference(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    gate: torch.Tensor | None = None,
    swiglu: bool = False,
    residual: torch.Tensor | None = None,
    gate_activation: str = "silu",
    scales: list[torch.Tensor] | None = None,
    format: str = "",
    zeros: list[torch.Tensor] | None = None,
    lora_A: list[torch.Tensor] | None = None,
    lora_B: list[torch.Tensor] | None = None,
    lora_parts: list[int] | None = None,
    lora_scaling: list[float] | None = None,
) -> torch.Tensor:
    """y = [norm(x)·W₀ᵀ | norm(x)·W₁ᵀ | …] + adapters, of which silu(first half)·second half if `swiglu`, + residual.

    Args:
        x: [..., N].
        weights: each [Mᵢ, N].
        norm_weight: [N] for an RMSNorm of x, or with a gate [V] for a gated RMSNorm of each V columns. None for no norm.
        norm_eps: added to the mean square.
        norm_offset: added to norm_weight if there is no gate: 1 in Qwen3.5, whose weights are around zero.
        gate: [..., N], z of the gated RMSNorm, or None.
        swiglu: whether the two halves of the row are gate and up.
        residual: [..., ΣMᵢ], or half of it with `swiglu`; or None.
        gate_activation: as of gated_rms_norm.
        scales: of the first weights, which then are data of quantised weights. The other weights are plain.
        format: of those, as of dequantize.
        zeros: their zero points, if the format has them.
        lora_A: [rᵢ, N] each, of low-rank adapters (Hu et al. 2021, arXiv:2106.09685).
        lora_B: [rows, r] each.
        lora_parts: five numbers of each adapter of a projection: first column and columns of the projection in the row, the first
            row of its A among all of lora_A, and which of lora_B its B is in and from which row on. It adds scaling·B·A·norm(x).
        lora_scaling: of each adapter of a projection.

    Returns:
        [..., ΣMᵢ], or half of it with `swiglu`, in the weights' dtype: see `weight_dtype`.
    """
    weights = dequantized(weights, scales, format, weight_dtype(x, weights, scales, residual, norm_weight, gate), zeros)
    if gate is not None:
        heads = (*x.shape[:-1], -1, norm_weight.shape[0])
        x = gated_rms_norm(x.reshape(heads), gate.reshape(heads), norm_weight, norm_eps, gate_activation).reshape(x.shape)
    elif norm_weight is not None:
        x = rms_norm(x, norm_weight, norm_eps, norm_offset)
    y = (
        torch.cat([F.linear(x.to(w.dtype), w) for w in weights], -1)
        if len(weights) > 1
        else F.linear(x.to(weights[0].dtype), weights[0])
    )
    if lora_A:
        y = adapted(y, x, lora_A, lora_B, lora_parts, lora_scaling)
    if swiglu:
        first, second = y.chunk(2, -1)
        y = F.silu(first) * second
    return y if residual is None else residual + y


def adapted(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_A: list[torch.Tensor],
    lora_B: list[torch.Tensor],
    lora_parts: list[int],
    lora_scaling: list[float],
) -> torch.Tensor:
    """A row [..., M] plus what adapters of x add, in the dtype of the row."""
    low = [F.linear(x.to(w.dtype), w) for w in lora_A]
    low = torch.cat(low, -1) if len(low) > 1 else low[0]
    columns: dict[int, torch.Tensor] = {}
    for (first, width, row, of, start), scaling in zip(zip(*[iter(lora_parts)] * 5, strict=True), lora_scaling, strict=True):
        up = lora_B[of].narrow(0, start, width)
        delta = F.linear(low.narrow(-1, row, up.shape[1]), up) * scaling
        columns[first] = columns.get(first, y.narrow(-1, first, width)) + delta
    pieces, end = [], 0
    for first in sorted(columns):
        pieces += [y.narrow(-1, end, first - end), columns[first].to(y.dtype)]
        end = first + columns[first].shape[-1]
    pieces.append(y.narrow(-1, end, y.shape[-1] - end))
    pieces = [p for p in pieces if p.shape[-1]]
    return torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]


def weight_dtype(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor] | None,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> torch.dtype:
    """The dtype of the weights.

    It is that of a weight that is not quantised, else that of the residual. After a gated norm, whose x may be float32, it is
    that of the norm's weight. Else it is that of x.
    """
    plain = weights[len(scales or ()) :]
    like = plain[0] if plain else residual if residual is not None else norm_weight if gate is not None else x
    return like.dtype


def dequantized(
    weights: list[torch.Tensor],
    scales: list[torch.Tensor] | None,
    format: str,
    dtype: torch.dtype,
    zeros: list[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """The weights in a list, with data and scales dequantised."""
    scales = scales or []
    more = [[zero] for zero in zeros] if zeros else [None] * len(scales)
    made = [dequantize(data, scale, format, dtype, m) for data, scale, m in zip(weights, scales, more, strict=False)]
    return made + weights[len(scales) :]


def fake(
    x, weights, norm_weight=None, norm_eps=0.0, norm_offset=0.0, gate=None, swiglu=False, residual=None, gate_activation="silu",
    scales=None, format="", zeros=None, lora_A=None, lora_B=None, lora_parts=None, lora_scaling=None,
):  # fmt: skip
    columns = sum(w.shape[0] for w in weights) // (2 if swiglu else 1)
    dtype = weight_dtype(x, weights, scales, residual, norm_weight, gate)
    return torch.empty((*x.shape[:-1], columns), dtype=dtype, device=x.device)


def example_call(
    M,
    N,
    dtype=torch.float32,
    lead=(1, 1),
    *,
    norm=False,
    head=None,
    swiglu=False,
    residual=False,
    parts=1,
    gate_activation="silu",
    format="",
    plain=0,
    lora=(),
    lora_dtype=None,
):
    """A call with random inputs: `parts` weights of M rows in all, M per half with `swiglu`; `head` is V of a gated norm; with a
    format all but the last `plain` weights are quantised; `lora` are ranks of adapters on each of the weights."""
    rows = 2 * M if swiglu else M
    sizes = [rows // parts] * (parts - 1) + [rows - rows // parts * (parts - 1)]
    options = {
        "norm_weight": torch.randn(head or N).to(dtype) if norm or head else None,
        "norm_eps": 1e-6,
        "norm_offset": 0.0 if head else 1.0,
        "gate": torch.randn(*lead, N).to(dtype) if head else None,
        "swiglu": swiglu,
        "residual": torch.randn(*lead, M).to(dtype) if residual else None,
        "gate_activation": gate_activation,
    }
    x = torch.randn(*lead, N)
    weights = [(torch.randn(m, N) * N**-0.5).to(dtype) for m in sizes]
    if format:
        stored = [named(format).quantize(w) for w in weights[: len(weights) - plain]]
        weights[: len(stored)], scales, *zeros = map(list, zip(*stored, strict=True))
        options |= {"scales": scales, "format": format} | ({"zeros": zeros[0]} if zeros else {})
    options |= example_adapters(sizes, N, lora, lora_dtype or dtype)
    return (x if head else x.to(dtype), weights), options


def example_adapters(sizes, N, ranks, dtype):
    """Adapters of these ranks on projections with these numbers of rows. A and B of each rank are stacked."""
    if not ranks:
        return {}
    parts, scaling, row = [], [], 0
    for of, rank in enumerate(ranks):
        for i, size in enumerate(sizes):
            parts += [sum(sizes[:i]), size, row, of, sum(sizes[:i])]
            scaling.append(0.5 + of + i)
            row += rank
    return {
        "lora_A": [(torch.randn(row, N) * N**-0.5).to(dtype)],
        "lora_B": [(torch.randn(sum(sizes), rank) * rank**-0.5).to(dtype) for rank in ranks],
        "lora_parts": parts,
        "lora_scaling": scaling,
    }


def examples():
    return [
        example_call(7, 8, norm=True, parts=2, lora=(2, 3)),
        example_call(6, 16, torch.bfloat16, head=4, residual=True, lora=(4,), lora_dtype=torch.float32),
        example_call(5, 8, lead=(2, 1), norm=True, parts=2),
        example_call(6, 8, swiglu=True, norm=True, parts=2),
        example_call(6, 16, head=4, residual=True),
        example_call(6, 16, torch.bfloat16, head=4, residual=True, gate_activation="sigmoid"),
        example_call(144, 128, torch.bfloat16, norm=True, residual=True, parts=2, format="fp8_block128", plain=1),
        example_call(64, 130, swiglu=True, norm=True, format="fp8_block128"),
        example_call(6, 16, torch.bfloat16, head=4, residual=True, format="fp8_block128"),
        example_call(17, 32, torch.bfloat16, norm=True, parts=2, format="int4_group32_zero"),
    ]


op = register("fused_linear", reference, fake, examples, equation="[silu(·)·](norm(x)·Wᵀ [+ s·B·A·norm(x)]) [+ residual]")
