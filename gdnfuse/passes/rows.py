"""How many rows a linear of a decode step may have so that what is around it is fused into it. There is one row per sequence."""

from __future__ import annotations

from typing import Any

from gdnfuse.rewrite.graph import is_tensor, value

FEW_ROWS = 32


def few_rows(node: Any) -> bool:
    """Whether a tensor has at most FEW_ROWS rows of its last axis, for all inputs."""
    return 0 < _rows(node) <= FEW_ROWS


def one_row(node: Any) -> bool:
    """Whether a tensor is one row, for all inputs.

    Only then is it worth fusing norms and residuals into a linear: with several rows, every program would normalise them again.
    """
    return _rows(node) == 1


def _rows(node: Any) -> int:
    """The number of rows; 0 if it is not known."""
    if not is_tensor(node) or value(node).ndim == 0 or not all(isinstance(size, int) for size in value(node).shape[:-1]):
        return 0
    return value(node).shape[:-1].numel()
