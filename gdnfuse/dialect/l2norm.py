"""l2norm: x · rsqrt(Σx² + eps) over the last axis (as in flash-linear-attention and transformers)."""

from __future__ import annotations

import torch

from gdnfuse.dialect.op import acc_dtype, register


def reference(x: torch.Tensor, eps: float) -> torch.Tensor:
    """L2-normalise the last axis.

    Args:
        x: [..., K], any floating dtype.
        eps: added to the sum of squares.

    Returns:
        [..., K] in float32 (float64 for float64 input).
    """
    x = x.to(acc_dtype(x), copy=True, memory_format=torch.contiguous_format)
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def fake(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty(x.shape, dtype=acc_dtype(x), device=x.device)


def examples():
    return [((torch.randn(2, 3, 8),), {"eps": 1e-6}), ((torch.randn(5, 16).bfloat16(), 1e-5), {})]


op = register("l2norm", reference, fake, examples, equation="x · rsqrt(Σx² + eps)")
