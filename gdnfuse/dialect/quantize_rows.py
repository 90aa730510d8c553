"""quantize_rows: activations in e4m3, with a scale for each row and group of columns.

This is what transformers' FP8Linear does with its input, with groups of 128 columns (DeepSeek-V3, arXiv 2412.19437, section 3.3).
"""

from __future__ import annotations

import math

import torch

from gdnfuse.dialect.op import acc_dtype, register

LARGEST = torch.finfo(torch.float8_e4m3fn).max
SMALLEST = torch.finfo(torch.float32).tiny  # of a scale: a group of zeros is not divided by zero


def reference(x: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """data = round(x / scale) and scale = max |x| / 448 of each group of columns, computed in float32 (float64 if x is).

    Data are rounded to the nearest number, ties to even. Zeros stay zeros.

    Args:
        x: [..., N].
        columns: of a group, a divisor of N.

    Returns:
        Data [..., N] in e4m3, and scales [N / columns, rows] in the dtype of the computation. Scales of one group of columns are
        adjacent, because cuBLAS reads them so.
    """
    groups = x.to(acc_dtype(x)).unflatten(-1, (-1, columns))
    scale = (groups.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(SMALLEST)
    data = (groups / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return data.flatten(-2).contiguous(), scale.reshape(-1, x.shape[-1] // columns).T.contiguous()


def fake(x, columns):
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return data, torch.empty((x.shape[-1] // columns, math.prod(x.shape[:-1])), dtype=acc_dtype(x), device=x.device)


def examples():
    return [((torch.randn(2, 3, 256).bfloat16(), 128), {}), ((torch.randn(5, 48), 48), {})]


op = register("quantize_rows", reference, fake, examples, equation="s = max|x| / 448, x₈ = e4m3(x / s), by group of columns")
