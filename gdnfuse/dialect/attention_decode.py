"""attention_decode: all of a full-attention layer between qkv and o_proj, for 1 to 8 tokens on a static cache, in one op."""

from __future__ import annotations

import torch

from gdnfuse.dialect.attention_few_queries import reference as attention
from gdnfuse.dialect.op import register
from gdnfuse.dialect.rms_norm import reference as rms_norm


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of the first R of D columns (Su et al., arXiv:2104.09864), in two halves, as in transformers.

    Args:
        x: [B, H, T, D].
        cos, sin: [B or 1, 1, T, R].

    Returns:
        [B, H, T, D] in x's dtype.
    """
    R = cos.shape[-1]
    rotated, rest = x[..., :R], x[..., R:]
    turned = torch.cat([-rotated[..., R // 2 :], rotated[..., : R // 2]], -1)
    return torch.cat([rotated * cos + turned * sin, rest], -1).to(x.dtype)


def normed_and_turned(
    q: torch.Tensor,
    k: torch.Tensor,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    norm_eps: float,
    norm_offset: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rope(norm(q)) and rope(norm(k)).

    Args:
        q: [B, T, H, D].
        k: [B, T, HKV, D].
        q_norm_weight, k_norm_weight, norm_eps, norm_offset, cos, sin: as in `reference`.

    Returns:
        [B, H, T, D] and [B, HKV, T, D], in q's and k's dtype.
    """
    if q_norm_weight is not None:
        q, k = rms_norm(q, q_norm_weight, norm_eps, norm_offset), rms_norm(k, k_norm_weight, norm_eps, norm_offset)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return rope(q.transpose(1, 2), cos, sin), rope(k.transpose(1, 2), cos, sin)


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
    position: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """RMSNorm and rotary embedding of q and k, k and v into the cache, attention, and its output times σ(gate).

    Args:
        q: [B, T, H, D].
        k, v: [B, T, HKV, D].
        gate: [B, T, H, D], before the sigmoid, or None.
        q_norm_weight, k_norm_weight: [D], or both None for no norm.
        norm_eps, norm_offset: as for rms_norm.
        cos, sin: [B or 1, T, R], R ≤ D.
        keys, values: [B, HKV, L, D], written in place.
        position: [T] of int64, where in the cache each token goes.
        mask: [B or 1, 1, T, L] of bool, what may be attended to, or None for all.
        scale: factor on the scores.

    Returns:
        [B, T, H·D] in q's dtype.
    """
    q, k = normed_and_turned(q, k, q_norm_weight, k_norm_weight, norm_eps, norm_offset, cos, sin)
    keys.index_copy_(2, position, k.to(keys.dtype))
    values.index_copy_(2, position, v.transpose(1, 2).to(values.dtype))
    return attention(q, keys.to(q.dtype), values.to(q.dtype), gate, mask, scale)


def fake(
    q, k, v, gate, q_norm_weight, k_norm_weight, norm_eps, norm_offset, cos, sin, keys, values, position, mask, scale
):  # fmt: skip
    B, T, H, D = q.shape
    return torch.empty((B, T, H * D), dtype=q.dtype, device=q.device)


def example_call(
    B, H, HKV, D, L, dtype=torch.float32, *, T=1, R=None, gate=True, norm=True, filled=None, mask=True, padded=0, wrap=lambda x: x
):  # fmt: skip
    """A call with random inputs: `filled` positions hold tokens, these included, of which the first `padded` are hidden.

    `wrap` lays q, k, v and the gate out in memory.
    """
    filled = L if filled is None else filled
    angles = torch.rand(1, T, R or D) * 6
    at, last = torch.arange(L), torch.arange(filled - T, filled)[:, None]
    seen = ((at <= last) & (at >= padded)).expand(B, 1, T, L).clone()
    draw = lambda *shape: wrap(torch.randn(shape).to(dtype))  # noqa: E731
    return (
        draw(B, T, H, D),
        draw(B, T, HKV, D),
        draw(B, T, HKV, D),
        draw(B, T, H, D) if gate else None,
        torch.randn(D).to(dtype) if norm else None,
        torch.randn(D).to(dtype) if norm else None,
        1e-6,
        1.0,
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        torch.randn(B, HKV, L, D).to(dtype),
        torch.randn(B, HKV, L, D).to(dtype),
        last.flatten(),
        seen if mask else None,
        D**-0.5,
    ), {}


def examples():
    return [
        example_call(2, 4, 2, 8, 5, R=4, filled=3, padded=1),
        example_call(1, 2, 2, 8, 3, gate=False, norm=False, mask=False),
        example_call(2, 4, 2, 8, 9, T=3, R=6, filled=7, padded=1),
    ]


op = register(
    "attention_decode",
    reference,
    fake,
    examples,
    equation="attention(rope(norm(q)), keys ← rope(norm(k)), values ← v, mask) · σ(gate)",
    mutates=("keys", "values"),
)
