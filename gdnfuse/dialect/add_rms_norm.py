"""add_rms_norm: the residual sum after a linear and the RMSNorm that reads it, which is the input of the next linears."""

from __future__ import annotations

import torch

from gdnfuse.dialect.op import register
from gdnfuse.dialect.rms_norm import reference as rms_norm


def reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden = residual + x, and rms_norm(hidden).

    Args:
        x: [..., N], or [parts, ..., N] partial sums of it from split_linear.
        residual: [..., N].
        weight: [N].
        eps: added to the mean square.
        offset: added to the weight: 1 in Qwen3.5, whose weights are around zero.

    Returns:
        hidden and its norm, both [..., N] in residual's dtype.
    """
    if x.dim() > residual.dim():
        x = x.sum(0).to(residual.dtype)
    hidden = residual + x
    return hidden, rms_norm(hidden, weight, eps, offset)


def fake(x, residual, weight, eps, offset):
    like = lambda: torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)  # noqa: E731
    return like(), like()


def example_call(N, dtype=torch.float32, lead=(2, 1), parts=1):
    x = torch.randn(*lead, N).to(dtype) if parts == 1 else torch.randn(parts, *lead, N)
    return (x, torch.randn(*lead, N).to(dtype), torch.randn(N).to(dtype), 1e-6, 1.0), {}


def examples():
    return [example_call(8), example_call(12, parts=3), example_call(8, torch.bfloat16, (3, 1))]


op = register("add_rms_norm", reference, fake, examples, equation="h = residual + x; h, h · rsqrt(mean(h²) + eps) · (offset + w)")
