"""Attention with one query per sequence on keys of any length: attention_decode.py's kernels on queries and keys that are ready.

The keys of a cache that grows have another length at each token. Nothing here is compiled for one: programs per key head are as
many for short keys as for the longest, so that no later length asks for another machine code.
"""

from __future__ import annotations

import torch

from gdnfuse.kernels.attention_decode import GROWS, attend, require_attention
from gdnfuse.kernels.launch.implementation import register


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
    """The dialect's attention_one_query.

    Args:
        q, gate, mask, scale: as there, of any strides.
        keys, values: [B, HKV, L, D], any strides.
        overlap: whether both launches may start while the kernel before them runs.

    Returns:
        [B, 1, H·D] in q's dtype.

    Raises:
        ValueError: keys, values and mask are not of one length.
    """
    return attend(q, keys, values, gate, mask, scale, overlap)


def supports(q, keys, values, gate, mask, scale) -> None:
    """Raises Refused unless dtypes are float32, bfloat16 or float16, heads static, H a multiple of HKV and D ≤ 256."""
    require_attention(q, keys, values, gate)


implementation = register("attention_one_query", launch, supports, grows=GROWS)
