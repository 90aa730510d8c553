"""How many rows a linear of a decode step may have for what stands around it to be fused into it."""

from __future__ import annotations

from typing import Any

from gdnfuse.rewrite.graph import is_tensor, value

# A decode step has one row per sequence; the kernels around linears take this many.
FEW_ROWS = 1


def few_rows(node: Any) -> bool:
    """Whether a tensor has at most FEW_ROWS rows of its last axis, whatever the inputs."""
    if not is_tensor(node) or value(node).ndim == 0:
        return False
    rows = 1
    for size in value(node).shape[:-1]:
        rows = rows * size if isinstance(size, int) else FEW_ROWS + 1
    return 0 < rows <= FEW_ROWS
