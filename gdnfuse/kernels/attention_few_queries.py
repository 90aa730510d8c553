"""Attention with 1 to 64 queries per sequence on keys of any length. Queries and keys already have norms and rotary embeddings.

One query has the kernels of attention_decode.py, several those of attention_tile.py, which describe them.

The keys of a growing cache are longer at each token. Nothing here is compiled for one length: there are as many programs per key
head for short keys as for the longest. So no later length needs other machine code.

Layout: q [B, H, T, D], gate [B, T, H, D], keys and values [B, HKV, L, D], mask [B or 1, 1, T, L], all with any strides.
"""

from __future__ import annotations

import torch

from gdnfuse.errors import Refused
from gdnfuse.kernels.attention_decode import GROWS, attend, require_attention
from gdnfuse.kernels.attention_tile import attend_tiles
from gdnfuse.kernels.launch.implementation import register, require_static

MOST_QUERIES = 64


def launch(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    gate: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The dialect's attention_few_queries.

    Args:
        q, gate, mask, scale: as in the dialect, of any strides.
        keys, values: [B, HKV, L, D], any strides.
        overlap: whether both launches may start while the kernel before them runs.

    Returns:
        [B, T, H·D] in q's dtype.

    Raises:
        ValueError: keys, values and mask are not of one length.
    """
    kernels = attend if q.shape[2] == 1 else attend_tiles
    return kernels(q, keys, values, gate, mask, scale, overlap)


def supports(q, keys, values, gate, mask, scale) -> None:
    """Raise Refused unless the kernels support the arguments.

    T must be static and at most 64, dtypes float32, bfloat16 or float16, heads static, H a multiple of HKV and D ≤ 256.
    """
    require_attention(q, keys, values, gate)
    require_static(T=q.shape[2])
    if q.shape[2] > MOST_QUERIES:
        raise Refused(f"T must be at most {MOST_QUERIES}, found {q.shape[2]}.")


implementation = register("attention_few_queries", launch, supports, grows=GROWS)
