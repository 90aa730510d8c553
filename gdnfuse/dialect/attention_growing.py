"""attention_growing: all of a full-attention layer between qkv and o_proj, for one token on a cache that grows, in one op."""

from __future__ import annotations

import torch

from gdnfuse.dialect import attention_decode
from gdnfuse.dialect.attention_few_queries import reference as attention
from gdnfuse.dialect.op import register


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor | None,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    norm_eps: float,
    norm_offset: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm and rotary embedding of q and k, k and v appended to the cache, attention, and its output times σ(gate).

    Args:
        q, k, v, gate, q_norm_weight, k_norm_weight, norm_eps, norm_offset, cos, sin, scale: as for attention_decode.
        keys, values: [B, HKV, L, D], not written.
        mask: [B or 1, 1, 1, L + 1] of bool, what may be attended to, or None for all.

    Returns:
        o [B, 1, H·D] in q's dtype, and keys and values with those of this token appended: [B, HKV, L + 1, D] in their dtype.
    """
    q, k = attention_decode.normed_and_turned(q, k, q_norm_weight, k_norm_weight, norm_eps, norm_offset, cos, sin)
    # If the heads of keys are innermost in memory, a cat keeps that layout.
    keys = torch.cat([keys, k.to(keys.dtype)], 2).contiguous()
    values = torch.cat([values, v.transpose(1, 2).to(values.dtype)], 2).contiguous()
    return attention(q, keys.to(q.dtype), values.to(q.dtype), gate, mask, scale), keys, values


def fake(q, k, v, gate, q_norm_weight, k_norm_weight, norm_eps, norm_offset, cos, sin, keys, values, mask, scale):
    B, _, H, D = q.shape
    longer = [torch.empty((*t.shape[:2], t.shape[2] + 1, D), dtype=t.dtype, device=t.device) for t in (keys, values)]
    return torch.empty((B, 1, H * D), dtype=q.dtype, device=q.device), *longer


def example_call(
    B, H, HKV, D, L, dtype=torch.float32, *, R=None, gate=True, norm=True, mask=True, shared=False, hidden=0, wrap=lambda x: x
):  # fmt: skip
    """A call with random inputs: the mask, if any, hides the first `hidden` positions of the first sequence, and some of all.

    `shared` makes it one mask for all sequences; `wrap` lays out in memory whatever has sequences.
    """
    seen = (torch.arange(L + 1) % 5 != 2).expand(1 if shared else B, 1, 1, L + 1).clone()
    seen[0, ..., :hidden] = False
    (q, k, v, gates, *others, _, _, _, _, scale), _ = attention_decode.example_call(
        B, H, HKV, D, 0, dtype, R=R, gate=gate, norm=norm
    )
    keys, values = (torch.randn(B, HKV, L, D).to(dtype) for _ in range(2))
    q, k, v, gates, keys, values = (None if t is None else wrap(t) for t in (q, k, v, gates, keys, values))
    return (q, k, v, gates, *others, keys, values, seen if mask else None, scale), {}


def examples():
    return [example_call(2, 4, 2, 8, 5, R=4, hidden=1), example_call(1, 2, 2, 8, 3, gate=False, norm=False, mask=False)]


op = register(
    "attention_growing",
    reference,
    fake,
    examples,
    equation="attention(rope(norm(q)), keys' = [keys | rope(norm(k))], values' = [values | v], mask) · σ(gate), keys', values'",
)
