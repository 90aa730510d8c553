"""attention_few_queries: attention with few queries per sequence on keys of any length, and the output gate after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gdnfuse.dialect.op import register


def reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    gate: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """softmax(scale·q·Kᵀ)·V over what the mask shows, times σ(gate). Zero if the mask shows nothing.

    Args:
        q: [B, H, T, D].
        keys, values: [B, HKV, L, D] in q's dtype; query head h reads head h // (H // HKV).
        gate: [B, T, H, D], before the sigmoid, or None.
        mask: [B or 1, 1, T, L] of bool, what may be attended to, or None for all.
        scale: factor on the scores.

    Returns:
        [B, T, H·D] in q's dtype.
    """
    B, H, T, D = q.shape
    HKV = keys.shape[1]
    # Queries that share a key head are computed as queries of one attention, so heads are not repeated.
    q = q.reshape(B, HKV, H // HKV * T, D)
    mask = mask if mask is None or T == 1 else mask.repeat(1, 1, H // HKV, 1)
    o = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
    o = o.reshape(B, H, T, D).transpose(1, 2).reshape(B, T, H * D)
    return o if gate is None else o * torch.sigmoid(gate.reshape(B, T, H * D))


def fake(q, keys, values, gate, mask, scale):
    B, H, T, D = q.shape
    return torch.empty((B, T, H * D), dtype=q.dtype, device=q.device)


def example_call(
    B, H, HKV, D, L, dtype=torch.float32, *, T=1, gate=True, mask=True, shared=False, hidden=0, wrap=lambda x: x
):  # fmt: skip
    """A call with random inputs: the mask, if any, hides the first `hidden` positions of the first sequence, and some of all.

    `shared` makes it one mask for all sequences; `wrap` lays q, keys, values and the gate out in memory.
    """
    seen = (torch.arange(L) % 3 != 1).expand(1 if shared else B, 1, T, L).clone()
    seen &= torch.arange(L) <= L - T + torch.arange(T)[:, None]  # the last key that a query sees is its own
    seen[0, ..., :hidden] = False
    draw = lambda *shape: wrap(torch.randn(shape).to(dtype))  # noqa: E731
    q, keys, values = draw(B, H, T, D), draw(B, HKV, L, D), draw(B, HKV, L, D)
    return (q, keys, values, draw(B, T, H, D) if gate else None, seen if mask else None, D**-0.5), {}


def examples():
    return [
        example_call(2, 4, 2, 8, 5, hidden=1),
        example_call(1, 2, 2, 8, 3, gate=False, mask=False),
        example_call(2, 4, 2, 8, 9, T=3, hidden=1),
    ]


op = register(
    "attention_few_queries",
    reference,
    fake,
    examples,
    equation="attention(q, keys, values, mask) · σ(gate), few queries per sequence",
)
