"""rms_norm: x · rsqrt(mean(x²) + eps) · (offset + w) (Zhang and Sennrich, arXiv:1910.07467)."""

from __future__ import annotations

import torch

from gdnfuse.dialect.op import acc_dtype, register


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """RMSNorm in float32 with one rounding at the end.

    Args:
        x: [..., N].
        weight: [N].
        eps: added to the mean square.
        offset: added to the weight: 1 where weights are around zero, as in Qwen3.5, else 0.

    Returns:
        [..., N] in x's dtype.
    """
    acc = acc_dtype(x, weight)
    y = x.to(acc)
    y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + eps)
    return (y * (offset + weight.to(acc))).to(x.dtype)


def fake(x, weight, eps, offset):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def examples():
    return [
        ((torch.randn(3, 8), torch.randn(8), 1e-6, 1.0), {}),
        ((torch.randn(2, 1, 16).bfloat16(), torch.randn(16).bfloat16(), 1e-5, 0.0), {}),
    ]


op = register("rms_norm", reference, fake, examples, equation="x · rsqrt(mean(x²) + eps) · (offset + w)")
