"""The linears of a decode step with what stands around them, for one row or a few: which kernel takes which.

One row goes to `skinny_linear`, which fuses on both sides of the product; two to 32 go to `few_rows_linear`, on tensor cores.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from gdnfuse.errors import Refused
from gdnfuse.kernels import devices, few_rows_linear, skinny_linear
from gdnfuse.kernels.causal_conv_update import ACTIVATIONS
from gdnfuse.kernels.gated_rms_norm import require_gate
from gdnfuse.kernels.launch.implementation import register, require_dtypes, require_static
from gdnfuse.kernels.linear_configs import MAX_ROWS, few_rows_config


def launch(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    gate: torch.Tensor | None = None,
    swiglu: bool = False,
    residual: torch.Tensor | None = None,
    gate_activation: str = "silu",
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The dialect's fused_linear for at most 32 rows and one weight.

    Args:
        x, weights, norm_weight, norm_eps, norm_offset, gate, swiglu, residual, gate_activation: as there.
        overlap: whether weights may be read while kernels before this one run: what came before the step must have ended.

    Returns:
        [..., M], or half of it with `swiglu`, in the weight's dtype, contiguous.
    """
    (weight,) = weights
    if _rows(x) > 1:
        return few_rows_linear.launch(x, weight, swiglu, overlap=overlap)
    chosen = skinny_linear.config(skinny_linear.kind(norm_weight, gate, swiglu), weight.shape[1], weight.dtype)
    return skinny_linear.launch_with(
        chosen, x, weight, norm_weight, norm_eps, norm_offset, gate, swiglu, residual, gate_activation, overlap=overlap
    )


def launch_in_proj_conv(
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
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The dialect's in_proj_conv for one row and one weight.

    Args:
        x, weights, norm_weight, norm_eps, norm_offset: as there.
        conv_state: [1, D, S], any strides; written in place.
        conv_weight: [D, 1, W], any strides.
        conv_bias, conv_offset, activation, parts, heads: as there.
        overlap: as for `launch`.

    Returns:
        [1, 1, M], or the columns of the parts, in float32, contiguous.
    """
    (weight,) = weights
    conv = (conv_state, conv_weight, conv_bias, conv_offset, activation)
    chosen = skinny_linear.config("conv", weight.shape[1], weight.dtype)
    if parts is not None:
        offsets, strides, widths = parts[::3], parts[1::3], parts[2::3]
        first = accumulate((heads * width for width in widths), initial=0)
        parts = tuple(zip(first, widths, offsets, strides, strict=False))
    return skinny_linear.launch_with(
        chosen, x, weight, norm_weight, norm_eps, norm_offset, conv=conv, parts=parts, heads=heads, overlap=overlap
    )


def launch_split(x: torch.Tensor, weights: list[torch.Tensor], parts: int, *, overlap: bool = False) -> torch.Tensor:
    """The dialect's split_linear for 2 to 32 rows and one weight.

    Args:
        x, weights, parts: as there.
        overlap: as for `launch`.

    Returns:
        [parts, ..., M] in float32, contiguous.
    """
    (weight,) = weights
    return few_rows_linear.launch(x, weight, parts=parts, overlap=overlap)


def _rows(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1]


def supports(
    x, weights, norm_weight=None, norm_eps=0.0, norm_offset=0.0, gate=None, swiglu=False, residual=None, gate_activation="silu",
    parts=1,
) -> None:  # fmt: skip
    """Raises Refused unless there are at most 32 rows, sizes are static, dtypes are float32, bfloat16 or float16, rows are
    contiguous and there is one weight, of x's dtype but behind a gated norm.

    One row must be at most MAX_N wide and heads under a gate fill the steps over columns; several rows must fill the steps over
    columns and have neither norm before nor residual behind, and a device with shared memory for a step.
    """
    if len(weights) != 1:
        raise Refused(f"There must be one weight, packed if there are several, got {len(weights)}.")
    (weight,) = weights
    require_dtypes(x=x, weight=weight, norm_weight=norm_weight, gate=gate, residual=residual)
    if gate is None and x.dtype != weight.dtype:
        both = " and ".join(str(t.dtype).removeprefix("torch.") for t in (x, weight))
        raise Refused(f"x and weight must have one dtype, got {both}.")
    if x.dim() < 1 or weight.dim() != 2:
        raise Refused(f"x must have at least one dimension and weight two, got {x.dim()} and {weight.dim()}.")
    M, N = weight.shape
    require_static(M=M, N=N)
    require_static(**{"x's last size": x.shape[-1]})
    if x.shape[-1] != N:
        raise Refused(f"x and weight must agree on N, got {x.shape[-1]} and {N}.")
    if weight.numel() == 0:
        raise Refused(f"weight must not be empty, got the sizes {list(weight.shape)}.")
    if not all(isinstance(size, int) for size in x.shape) or not 0 < _rows(x) <= MAX_ROWS:
        raise Refused(f"x must have at most {MAX_ROWS} rows, got the sizes {list(x.shape)}.")
    for name, t in (("x", x), ("weight", weight), ("gate", gate), ("residual", residual)):
        if t is not None and t.shape[-1] > 1 and (not isinstance(t.stride(-1), int) or t.stride(-1) != 1):
            raise Refused(f"{name} must have contiguous rows, got the strides {list(t.stride())}.")
    if _rows(x) > 1:
        around = {"norm or gate before": norm_weight, "residual behind": residual}
        if given := [name for name, t in around.items() if t is not None]:
            raise Refused(f"Several rows take SwiGLU behind their linear and nothing else, got a {given[0]} it.")
        few_rows_config(N, _rows(x), swiglu, parts, weight.dtype, devices.of(x.device))
    elif N > skinny_linear.MAX_N:
        raise Refused(f"One row must be at most {skinny_linear.MAX_N} wide, got {N}.")
    if gate is not None:
        require_gate(gate_activation)
        V, step = norm_weight.shape[0], skinny_linear.config("gate", N)[1]
        if N % step or step % V:
            raise Refused(f"Heads must fill steps of {step} columns, and these the row, got {N} columns in heads of {V}.")


def supports_in_proj_conv(
    x, weights, norm_weight, norm_eps, norm_offset, conv_state, conv_weight, conv_bias, conv_offset, activation,
    parts=None, heads=1,
) -> None:  # fmt: skip
    """Raises Refused where `supports` does, and unless x is one row, conv sizes are static and the activation is known."""
    supports(x, weights, norm_weight, norm_eps, norm_offset)
    if _rows(x) > 1:
        raise Refused(f"x must be one row, got the sizes {list(x.shape)}.")
    require_dtypes(conv_state=conv_state, conv_weight=conv_weight, conv_bias=conv_bias)
    require_static(D=conv_state.shape[1], S=conv_state.shape[2], W=conv_weight.shape[2])
    if activation not in ACTIVATIONS:
        raise Refused(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation}.")


def supports_split(x, weights, parts) -> None:
    """Raises Refused where `supports` does, and unless there are at least two rows and two parts."""
    supports(x, weights, parts=parts)
    if _rows(x) < 2 or parts < 2:
        raise Refused(f"Parts of a linear need at least two rows and two parts, got {_rows(x)} and {parts}.")


GEMM = "benchmarks/gemm.py"
fused_linear = register("fused_linear", launch, supports, early=("weights", "norm_weight"), measured=GEMM)
in_proj_conv = register(
    "in_proj_conv", launch_in_proj_conv, supports_in_proj_conv, early=("weights", "norm_weight"), measured=GEMM
)
split_linear = register("split_linear", launch_split, supports_split, early=("weights",), measured=GEMM)
