"""fp8_linear: a linear without bias whose input and weight are both e4m3 (W8A8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gdnfuse import formats
from gdnfuse.dialect.op import register
from gdnfuse.dialect.quantize_rows import reference as quantize_rows


def reference(
    x: torch.Tensor, x_scale: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, format: str, dtype: torch.dtype
) -> torch.Tensor:
    """(x · x_scale)·Wᵀ with W = dequantize(data, scale). Products and sums are float32 (float64 if any input is), rounded once.

    Args:
        x: [..., N] in e4m3, as quantize_rows returns it.
        x_scale: [groups, rows], the scales of x.
        data, scale, format: the weight [M, N] as of dequantize.
        dtype: of the result.

    Returns:
        [..., M] in `dtype`.
    """
    groups, acc = x_scale.shape[0], formats.acc_dtype(x_scale.dtype, data.dtype, scale.dtype, dtype)
    wide = x.to(acc).unflatten(-1, (groups, -1)) * x_scale.T.reshape(*x.shape[:-1], groups, 1)
    return F.linear(wide.flatten(-2), formats.named(format).dequantize(data, scale, acc)).to(dtype)


def fake(x, x_scale, data, scale, format, dtype):
    return torch.empty((*x.shape[:-1], data.shape[0]), dtype=dtype, device=x.device)


def example_call(M, N, format="fp8_block128", dtype=torch.bfloat16, lead=(2, 3)):
    """A call with random inputs; groups have 128 columns if the weight's blocks do."""
    x = quantize_rows(torch.randn(*lead, N), 128 if "block" in format else N)
    return (*x, *formats.named(format).quantize(torch.randn(M, N) * N**-0.5), format, dtype), {}


def examples():
    return [
        example_call(130, 256),
        example_call(48, 128, "fp8_channel", lead=(5,)),
        example_call(48, 128, "fp8_tensor", torch.float32),
    ]


op = register("fp8_linear", reference, fake, examples, equation="(x₈ · s)·(W₈ · scale)ᵀ")
