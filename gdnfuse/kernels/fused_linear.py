"""The linears of a decode step with what is around them, for one row or a few. This file chooses the kernel.

One row uses `skinny_linear`, which fuses on both sides of the product, or `skinny_tensor_cores` for FP8 and four bits, which does
so too. Two to 32 rows use `few_rows_linear`, on tensor cores.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from gdnfuse import compat
from gdnfuse.dialect.fused_linear import weight_dtype
from gdnfuse.errors import Refused
from gdnfuse.kernels import devices, few_rows_linear, quantized, skinny_linear, tuned
from gdnfuse.kernels.causal_conv_update import ACTIVATIONS
from gdnfuse.kernels.gated_rms_norm import require_gate
from gdnfuse.kernels.launch.implementation import register, require_dtypes, require_static
from gdnfuse.kernels.linear_configs import MAX_ROWS, TensorCoresConfig, require_tensor_cores, tensor_cores_config

if compat.gluon() and compat.mma_v2():
    from gdnfuse.kernels import skinny_tensor_cores
else:
    skinny_tensor_cores = None


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
    scales: list[torch.Tensor] | None = None,
    format: str = "",
    zeros: list[torch.Tensor] | None = None,
    lora_A: list[torch.Tensor] | None = None,
    lora_B: list[torch.Tensor] | None = None,
    lora_parts: list[int] | None = None,
    lora_scaling: list[float] | None = None,
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The dialect's fused_linear for at most 32 rows and one weight, or a quantised one and one that is not.

    Args:
        x, weights, norm_weight, norm_eps, norm_offset, gate, swiglu, residual, gate_activation, scales, format, zeros: as
            in the dialect.
        lora_A, lora_B, lora_parts, lora_scaling: as in the dialect, with one A.
        overlap: whether weights may be read while kernels before this one run: what came before the step must have ended.

    Returns:
        [..., M], or half of it with `swiglu`, in the weight's dtype, contiguous.
    """
    dtype = weight_dtype(x, weights, scales, residual, norm_weight, gate)
    weight, stored = weights[0], _stored(weights, scales, format, dtype, zeros)
    if _rows(x) > 1:
        lora = (lora_A, lora_B, lora_parts, lora_scaling)
        return few_rows_linear.launch(x, weight, swiglu, overlap=overlap, lora=lora, **stored)
    around = {"gate": gate, "swiglu": swiglu, "residual": residual, "gate_activation": gate_activation}
    kind = skinny_linear.kind(norm_weight, gate, swiglu)
    before = {"gate": gate, "gate_activation": gate_activation, "overlap": overlap}
    lora = _lora(x, lora_A, lora_B, lora_parts, lora_scaling, norm_weight, norm_eps, norm_offset, **before)
    return _one_row(kind, x, weight, norm_weight, norm_eps, norm_offset, **around, overlap=overlap, **lora, **stored)


def _lora(
    x: torch.Tensor,
    A: list[torch.Tensor] | None,
    B: list[torch.Tensor] | None,
    parts: list[int] | None,
    scaling: list[float] | None,
    norm_weight: torch.Tensor | None,
    *args: Any,
    gate: torch.Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """The arguments for adapters of one row's kernel, with A·x of all of them, which a launch of its own has computed."""
    if not A:
        return {}
    chosen = skinny_linear.lora_config(*A[0].shape, gate is not None)
    low = skinny_linear.launch_with(chosen, x, A[0], norm_weight, *args, gate=gate, dtype=torch.float32, **kwargs)
    return {"lora": (low, B, skinny_linear.lora_table(B, parts, scaling))}


def _one_row(
    kind: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    *args: Any,
    format: str = "",
    **kwargs: Any,
) -> torch.Tensor:
    """skinny_linear, or skinny_tensor_cores instead, with the config for what is around the linear."""
    width, how = quantized.width(weight, format), quantized.stored(format)
    head, plain = norm_weight.shape[0] if kind == "gate" else 1, kwargs.get("plain")
    M = weight.shape[0] // (2 if kind == "swiglu" else 1)
    sizes, of = (M, 0 if plain is None else plain.shape[0], width, 1), tuned.of_weight(weight, format)

    def fits(config: tuple[int, ...]) -> None:
        if isinstance(config, TensorCoresConfig):
            require_tensor_cores(config)
            if not skinny_tensor_cores.supports_here(x, weight, format, head, config.warps, kwargs["dtype"]):
                raise Refused(f"Heads of {head} columns must fill the parts of a row, found {config.warps} warps.")
        else:
            skinny_linear.require_config(config, M, width, how, kind, head)

    if format and skinny_tensor_cores and (chosen := tensor_cores_config(kind, width, how.kind)):
        if skinny_tensor_cores.supports_here(x, weight, format, head, chosen.warps, kwargs["dtype"]):
            chosen = tuned.choose(tuned.Key("skinny_tensor_cores", kind, sizes, of), chosen, fits, x.device)
            return skinny_tensor_cores.launch_with(chosen, x, weight, norm_weight, *args, format=format, **kwargs)
    chosen = skinny_linear.config_of(kind, weight, format)
    if not kwargs.get("lora"):  # adapters were not there when a choice was measured
        known = how is None or how.packed == 1
        chosen = tuned.choose(tuned.Key("skinny_linear", kind, sizes, of), chosen, fits, x.device, on_h200=known)
    return skinny_linear.launch_with(chosen, x, weight, norm_weight, *args, format=format, **kwargs)


def _stored(
    weights: list[torch.Tensor],
    scales: list[torch.Tensor] | None,
    format: str,
    dtype: torch.dtype,
    zeros: list[torch.Tensor] | None = None,
) -> dict[str, Any]:
    """The arguments of kernels for a quantised weight, and for a plain one after it."""
    if not scales:
        return {}
    plain = weights[1] if len(weights) > 1 else None
    return {"scale": scales[0], "format": format, "plain": plain, "dtype": dtype} | ({"zero": zeros[0]} if zeros else {})


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
    scales: list[torch.Tensor] | None = None,
    format: str = "",
    zeros: list[torch.Tensor] | None = None,
    lora_A: list[torch.Tensor] | None = None,
    lora_B: list[torch.Tensor] | None = None,
    lora_parts: list[int] | None = None,
    lora_scaling: list[float] | None = None,
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The dialect's in_proj_conv for one row and one weight, or a quantised one and one that is not.

    Args:
        x, weights, norm_weight, norm_eps, norm_offset: as in the dialect.
        conv_state: [1, D, S], any strides; written in place.
        conv_weight: [D, 1, W], any strides.
        conv_bias, conv_offset, activation, parts, heads, scales, format, zeros: as in the dialect.
        lora_A, lora_B, lora_parts, lora_scaling: as for `launch`.
        overlap: as for `launch`.

    Returns:
        [1, 1, M], or the columns of the parts, in float32, contiguous.
    """
    weight = weights[0]
    conv = (conv_state, conv_weight, conv_bias, conv_offset, activation)
    if parts is not None:
        offsets, strides, widths = parts[::3], parts[1::3], parts[2::3]
        first = accumulate((heads * width for width in widths), initial=0)
        parts = tuple(zip(first, widths, offsets, strides, strict=False))
    norm = (norm_weight, norm_eps, norm_offset)
    lora = _lora(x, lora_A, lora_B, lora_parts, lora_scaling, *norm, overlap=overlap)
    return _one_row(
        "conv", x, weight, *norm, conv=conv, parts=parts, heads=heads, overlap=overlap, **lora,
        **_stored(weights, scales, format, weight_dtype(x, weights, scales), zeros),
    )  # fmt: skip


def launch_split(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    parts: int,
    scales: list[torch.Tensor] | None = None,
    format: str = "",
    zeros: list[torch.Tensor] | None = None,
    lora_A: list[torch.Tensor] | None = None,
    lora_B: list[torch.Tensor] | None = None,
    lora_parts: list[int] | None = None,
    lora_scaling: list[float] | None = None,
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The dialect's split_linear for 2 to 32 rows and one weight.

    Args:
        x, weights, parts, scales, format, zeros: as in the dialect.
        lora_A, lora_B, lora_parts, lora_scaling: as for `launch`.
        overlap: as for `launch`.

    Returns:
        [parts, ..., M] in float32, contiguous.
    """
    (weight,) = weights
    lora, stored = (lora_A, lora_B, lora_parts, lora_scaling), _stored(weights, scales, format, x.dtype, zeros)
    return few_rows_linear.launch(x, weight, parts=parts, overlap=overlap, lora=lora, **stored)


def _rows(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1]


def supports(
    x, weights, norm_weight=None, norm_eps=0.0, norm_offset=0.0, gate=None, swiglu=False, residual=None, gate_activation="silu",
    scales=None, format="", zeros=None, lora_A=None, lora_B=None, lora_parts=None, lora_scaling=None, parts=1,
) -> None:  # fmt: skip
    """Raise Refused unless the kernels support the arguments.

    There must be at most 32 rows. Sizes must be static, dtypes float32, bfloat16 or float16, and rows contiguous. There must be
    one weight, with the dtype of x unless a gated norm comes before it. Or there is a quantised one that kernels can read, maybe
    with a plain one after it; then only a norm or a conv may be around them.

    One row must be at most MAX_N wide, and heads under a gate must fill the steps over columns. Several rows must fill the steps
    over columns, have neither a norm before nor a residual after them, and need a device with shared memory for a step.
    """
    quantised = len(scales or ())
    if quantised > 1 or len(weights) != 1 and (quantised != 1 or len(weights) > 2):
        raise Refused(f"There must be one weight, packed if there are several, found {len(weights)}.")
    weight = weights[0]
    require_dtypes(x=x, **dict(zip(("weight", "the other weight"), weights[quantised:], strict=False)))
    require_dtypes(norm_weight=norm_weight, gate=gate, residual=residual)
    for plain in weights[quantised:]:
        if gate is None and x.dtype != plain.dtype:
            both = " and ".join(str(t.dtype).removeprefix("torch.") for t in (x, plain))
            raise Refused(f"x and weight must have one dtype, found {both}.")
    if x.dim() < 1 or weight.dim() != 2:
        raise Refused(f"x must have at least one dimension and weight two, found {x.dim()} and {weight.dim()}.")
    require_static(M=weight.shape[0], N=weight.shape[1])
    N = quantized.width(weight, format)
    require_static(**{"x's last size": x.shape[-1]})
    if x.shape[-1] != N:
        raise Refused(f"x and weight must agree on N, found {x.shape[-1]} and {N}.")
    if weight.numel() == 0:
        raise Refused(f"weight must not be empty, found the sizes {list(weight.shape)}.")
    if not all(isinstance(size, int) for size in x.shape) or not 0 < _rows(x) <= MAX_ROWS:
        raise Refused(f"x must have at most {MAX_ROWS} rows, found the sizes {list(x.shape)}.")
    if quantised:
        quantized.require(weight, scales[0], format, zeros[0] if zeros else None)
        _require_beside(weights, format, _rows(x), swiglu, gate, residual, parts)
    for name, t in (("x", x), ("weight", weight), ("gate", gate), ("residual", residual)):
        if t is not None and t.shape[-1] > 1 and (not isinstance(t.stride(-1), int) or t.stride(-1) != 1):
            raise Refused(f"{name} must have contiguous rows, found the strides {list(t.stride())}.")
    if lora_A:
        _require_lora(x, weights, scales, lora_A, lora_B)
    if _rows(x) > 1:
        around = {"norm or gate before": norm_weight, "residual after": residual}
        if given := [name for name, t in around.items() if t is not None]:
            raise Refused(f"Several rows can have SwiGLU after their linear and nothing else, found a {given[0]} it.")
        quantized.config_of_rows(weight, format, _rows(x), swiglu, parts, devices.of(x.device))
    elif N > skinny_linear.MAX_N:
        raise Refused(f"One row must be at most {skinny_linear.MAX_N} wide, found {N}.")
    if gate is not None:
        require_gate(gate_activation)
        V, step = norm_weight.shape[0], skinny_linear.config_of("gate", weight, format)[1]
        if N % step or step % V:
            raise Refused(f"Heads must fill steps of {step} columns, and these the row, found {N} columns in heads of {V}.")


def _require_lora(x, weights, scales, A, B) -> None:
    """Refuse adapters that the kernels do not support."""
    if scales or len(weights) > 1:
        found = f"{len(scales or ())} quantised and {len(weights) - len(scales or ())} plain ones"
        raise Refused(f"Adapters must be on one plain weight, found {found}.")
    if len(A) != 1 or not 0 < len(B) <= skinny_linear.MAX_LORA:
        raise Refused(f"Adapters must have one A and 1 to {skinny_linear.MAX_LORA} B, packed, found {len(A)} and {len(B)}.")
    require_dtypes(lora_A=A[0], **{f"lora_B {i}": b for i, b in enumerate(B)})
    for t in (*A, *B):
        require_static(rows=t.shape[0], columns=t.shape[1])
        if not compat.is_contiguous(t):
            raise Refused(f"A and B of adapters must be contiguous, found the strides {list(t.stride())}.")


def _require_beside(weights, format, rows, swiglu, gate, residual, parts) -> None:
    """Refuse a quantised weight that does not fill tiles of rows if other rows follow.

    Also refuse plain rows with other things around them than a norm or a conv.
    """
    kind = "swiglu" if swiglu else "conv" if len(weights) > 1 else "plain"
    tile = skinny_linear.config_of(kind, weights[0], format)[0]
    own = weights[0].shape[0] // (2 if swiglu else 1)
    if kind != "plain" and rows == 1 and own % tile:
        raise Refused(f"Rows of a quantised weight must be a multiple of {tile}, found {own}.")
    if len(weights) < 2:
        return
    if swiglu or gate is not None or residual is not None or parts > 1:
        raise Refused("Rows that are not quantised can have only a norm or a conv around them, found more.")
    plain = weights[1]
    if plain.dim() != 2 or plain.shape[1] != quantized.width(weights[0], format) or plain.stride(-1) != 1:
        raise Refused(
            f"Weights must agree on N and have contiguous rows, found {list(weights[0].shape)} and {list(plain.shape)}."
        )


def _require_channels(weights, D, conv_offset, parts, heads) -> None:
    """Refuse a conv whose channels are among the plain rows after a quantised weight."""
    if parts is None:
        last = conv_offset + D
    else:  # the last row of q, k and v
        columns = [first + (heads - 1) * step + width for first, step, width in zip(*[iter(parts)] * 3, strict=True)]
        widths = accumulate((heads * width for width in parts[2::3]), initial=0)
        last = max(c for c, at in zip(columns, widths, strict=False) if conv_offset <= at < conv_offset + D)
    if last > weights[0].shape[0]:
        raise Refused(
            f"The conv's channels must be quantised rows where others follow them, found {last} of {weights[0].shape[0]}."
        )


def supports_in_proj_conv(
    x, weights, norm_weight, norm_eps, norm_offset, conv_state, conv_weight, conv_bias, conv_offset, activation,
    parts=None, heads=1, scales=None, format="", zeros=None, lora_A=None, lora_B=None, lora_parts=None, lora_scaling=None,
) -> None:  # fmt: skip
    """Raise Refused for the same reasons as `supports`, and for more.

    x must be one row, sizes of the conv static and the activation known.
    """
    lora = {"lora_A": lora_A, "lora_B": lora_B, "lora_parts": lora_parts, "lora_scaling": lora_scaling}
    supports(x, weights, norm_weight, norm_eps, norm_offset, scales=scales, format=format, zeros=zeros, **lora)
    if _rows(x) > 1:
        raise Refused(f"x must be one row, found the sizes {list(x.shape)}.")
    if len(weights) > 1:
        _require_channels(weights, conv_state.shape[1], conv_offset, parts, heads)
    require_dtypes(conv_state=conv_state, conv_weight=conv_weight, conv_bias=conv_bias)
    require_static(D=conv_state.shape[1], S=conv_state.shape[2], W=conv_weight.shape[2])
    if activation not in ACTIVATIONS:
        raise Refused(f"activation must be one of {', '.join(ACTIVATIONS)}, found {activation}.")


def supports_split(
    x, weights, parts, scales=None, format="", zeros=None, lora_A=None, lora_B=None, lora_parts=None, lora_scaling=None
) -> None:
    """Raise Refused for the same reasons as `supports`, and unless there are at least two rows and two parts."""
    supports(x, weights, parts=parts, scales=scales, format=format, zeros=zeros, lora_A=lora_A, lora_B=lora_B)
    if _rows(x) < 2 or parts < 2:
        raise Refused(f"Parts of a linear need at least two rows and two parts, found {_rows(x)} and {parts}.")


GEMM = "benchmarks/gemm.py and benchmarks/chain.py"
EARLY = ("weights", "scales", "zeros", "norm_weight", "lora_A", "lora_B")
fused_linear = register("fused_linear", launch, supports, early=EARLY, measured=GEMM)
in_proj_conv = register("in_proj_conv", launch_in_proj_conv, supports_in_proj_conv, early=EARLY, measured=GEMM)
split_linear = register("split_linear", launch_split, supports_split, early=EARLY, measured=GEMM)
