"""prompt_attention: a prompt's attention where not all keys are its own: on a static cache, or in a left-padded batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gdnfuse.dialect.op import register


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """softmax(scale·q·Kᵀ)·V, where query i sees the keys j ≤ positions[i] that the mask shows. Zero if it sees none.

    Args:
        q: [B, H, T, D].
        k, v: [B, HKV, L, D] in q's dtype; query head h reads head h // (H // HKV).
        positions: [T] of int64, where in the keys each query is.
        mask: [B or 1, L] of bool, what may be seen of each sequence, or None for all.
        scale: factor on the scores.

    Returns:
        [B, H, T, D] in q's dtype, in memory as [B, T, H, D].
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) if x.shape[1] != q.shape[1] else x for x in (k, v))
    seen = torch.arange(k.shape[2], device=q.device)[None, :] <= positions[:, None]  # [T, L]
    seen = seen[None, None] if mask is None else seen & mask[:, None, None, :]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return o.transpose(1, 2).contiguous().transpose(1, 2)


def fake(q, k, v, positions, mask, scale):
    B, H, T, D = q.shape
    return torch.empty((B, T, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)


def example_call(B, H, HKV, T, L, D, dtype=torch.float32, *, start=0, padded=None, holes=False, wrap=lambda x: x):
    """A call with random inputs: queries from `start` on, on L keys, of which the first `padded` of each sequence are hidden.

    `padded` has a number per sequence, None for no mask. With `holes` every fifth key is hidden too. `wrap` lays q, k and v out
    in memory.
    """
    mask = None
    if padded is not None:
        at = torch.arange(L)
        mask = (at >= torch.tensor(padded)[:, None]) & ((at % 5 != 3) if holes else True)
    q = torch.randn(B, T, H, D).to(dtype).transpose(1, 2)
    k, v = (torch.randn(B, HKV, L, D).to(dtype) for _ in range(2))
    return (wrap(q), wrap(k), wrap(v), torch.arange(start, start + T), mask, D**-0.5), {}


def examples():
    return [
        example_call(2, 4, 2, 3, 9, 8, start=2),
        example_call(3, 2, 2, 5, 5, 8, padded=[0, 2, 5]),
        example_call(2, 4, 1, 4, 12, 8, start=3, padded=[1, 3], holes=True),
    ]


op = register(
    "prompt_attention", reference, fake, examples, equation="softmax(scale·q·Kᵀ, keys up to the query's own that mask shows)·V"
)
