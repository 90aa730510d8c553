"""packed_linear: several linears without bias on one input as one. Their outputs are concatenated in one row."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gdnfuse.dialect.op import register


def reference(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """[x·W₀ᵀ | x·W₁ᵀ | …].

    Args:
        x: [..., N].
        weights: each [Mᵢ, N], of x's dtype.

    Returns:
        [..., ΣMᵢ] in x's dtype.
    """
    return torch.cat([F.linear(x, w) for w in weights], -1)


def fake(x, weights):
    return torch.empty((*x.shape[:-1], sum(w.shape[0] for w in weights)), dtype=x.dtype, device=x.device)


def examples():
    return [((torch.randn(2, 1, 8), [torch.randn(5, 8), torch.randn(3, 8)]), {})]


op = register("packed_linear", reference, fake, examples, equation="[x·W₀ᵀ | x·W₁ᵀ | …]")
