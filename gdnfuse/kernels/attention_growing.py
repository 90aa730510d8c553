"""One token of a full-attention layer on a cache that grows: attention_decode.py's kernels, which copy the cache as they read it.

Keys and values one token longer are new memory, so each step writes all of them. A program that reads a block to attend to it has
it in registers and stores it from there, to the last bit what it was, whether anybody may see it or not; of the programs that
share a key head, the one of its first queries does. Nothing is compiled for a length, as in attention_few_queries.py.
"""

from __future__ import annotations

import torch

from gdnfuse.kernels.attention_decode import GROWS, attend, require_new
from gdnfuse.kernels.launch.implementation import register, require_one_token


def launch(
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
    *,
    overlap: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The dialect's attention_growing.

    Args:
        q, k, v, gate, q_norm_weight, k_norm_weight, norm_eps, norm_offset, cos, sin, mask, scale: as in the dialect.
        keys, values: [B, HKV, L, D], any strides; not written.
        overlap: whether both kernels may start while the kernel before them runs.

    Returns:
        o [B, 1, H·D] in q's dtype, and keys and values [B, HKV, L + 1, D] in theirs, contiguous.

    Raises:
        ValueError: keys and values are not of one length, or the mask is not of one more.
    """
    B, HKV, L, D = keys.shape
    empty = lambda t: torch.empty((B, HKV, L + 1, D), dtype=t.dtype, device=t.device)  # noqa: E731
    longer = empty(keys), empty(values)
    norms = [None if w is None else w.contiguous() for w in (q_norm_weight, k_norm_weight)]
    new = (k, v, *norms, cos, sin, None, norm_eps, norm_offset)
    return attend(q.transpose(1, 2), keys, values, gate, mask, scale, overlap, new, longer), *longer


def supports(
    q, k, v, gate, q_norm_weight, k_norm_weight, norm_eps, norm_offset, cos, sin, keys, values, mask, scale
) -> None:  # fmt: skip
    """Raises Refused unless dtypes are float32, bfloat16 or float16, heads static, H a multiple of HKV, D ≤ 256 and R even."""
    require_one_token(q.shape[1])
    require_new(q, k, v, gate, q_norm_weight, cos, sin, keys, values)


implementation = register("attention_growing", launch, supports, early=("keys", "values"), grows=GROWS)
