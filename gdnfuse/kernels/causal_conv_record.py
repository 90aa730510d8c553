"""The causal conv of a verify step, which also records what enters it and the gates.

It is the kernel for few tokens of `gdnfuse/kernels/causal_conv.py`, which describes it.
"""

from __future__ import annotations

import torch

from gdnfuse.errors import Refused
from gdnfuse.kernels.causal_conv import FEW_COLUMNS, FEW_TOKENS, few, launch_few
from gdnfuse.kernels.causal_conv import supports as supports_conv
from gdnfuse.kernels.launch.implementation import register, require_dtypes, require_static


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    context: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    windows: torch.Tensor,
    recorded_a: torch.Tensor,
    recorded_b: torch.Tensor,
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The dialect's causal_conv_record.

    Args:
        x: [B, D, T], any strides.
        weight: [D, W].
        bias: [D] or None.
        activation: "silu" or "none".
        context: [B, D, S], any strides.
        a, b: [B, T, HV], any strides.
        windows: [B, at least S + T, D], any strides, written.
        recorded_a, recorded_b: [B, at least T, HV], any strides, written.
        overlap: whether weight, bias and context may be read while kernels before this one run.

    Returns:
        [B, D, T] in x's dtype, D innermost in memory.
    """
    return launch_few(x, weight, bias, activation, context, (a, b, windows, recorded_a, recorded_b), overlap)


def supports(x, weight, bias, activation, context, a, b, windows, recorded_a, recorded_b) -> None:
    """Raise Refused unless T and S are at most 8, HV is static, and for the same reasons as the conv that records nothing."""
    supports_conv(x, weight, bias, activation, context)
    require_dtypes(a=a, b=b, windows=windows, recorded_a=recorded_a, recorded_b=recorded_b)
    require_static(HV=a.shape[-1])
    if not few(x, context):
        sizes = f"T = {x.shape[-1]} and S = {context.shape[-1]}"
        raise Refused(f"T must be at most {FEW_TOKENS} and S at most {FEW_COLUMNS}, found {sizes}.")


implementation = register("causal_conv_record", launch, supports, early=("weight", "bias", "context"))
