"""causal_attention: a prompt's attention, of all tokens, or of the last T of L, as for a second prompt on a filled cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gdnfuse import compat
from gdnfuse.dialect.op import register


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """softmax(scale·q·Kᵀ)·V, where query i of T sees the keys j ≤ i + L − T.

    Args:
        q: [B, H, T, D].
        k, v: [B, HKV, L, D] in q's dtype, L ≥ T; query head h reads head h // (H // HKV).
        scale: factor on the scores; None for D^−½.

    Returns:
        [B, H, T, D] in q's dtype, in memory as [B, T, H, D].
    """
    T, L = q.shape[2], k.shape[2]
    # Heads are repeated here. Not every kernel of torch supports fewer key heads, and the one that does stores all scores.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) if x.shape[1] != q.shape[1] else x for x in (k, v))
    if compat.known_true(T == L):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        seen = torch.arange(L, device=q.device)[None, :] <= torch.arange(T, device=q.device)[:, None] + (L - T)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return o.transpose(1, 2).contiguous().transpose(1, 2)


def fake(q, k, v, scale=None):
    B, H, T, D = q.shape
    return torch.empty((B, T, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether these are q [B, H, T, D] and k, v [B, HKV, L, D] of one dtype.

    L may be two symbols: attention fails if they differ.
    """
    same = lambda a, b: compat.known_true(a == b)  # noqa: E731
    if not q.ndim == k.ndim == v.ndim == 4 or not all(same(k.shape[i], v.shape[i]) for i in (0, 1, 3)):
        return False
    (B, H, _, D), (sequences, HKV, _, columns) = q.shape, k.shape
    heads = same(H, HKV) or isinstance(H, int) and isinstance(HKV, int) and H % HKV == 0
    return heads and same(B, sequences) and same(D, columns) and q.dtype == k.dtype == v.dtype


def examples():
    return [
        ((torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)), {"scale": 0.3}),
        ((torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)), {}),
    ]


op = register(
    "causal_attention", reference, fake, examples, equation="softmax(scale·q·Kᵀ, keys up to the query's own)·V, the last T of L"
)
