"""How many rows a linear of a decode step may have for what stands around it to be fused into it: one per sequence."""

from __future__ import annotations

from typing import Any

from gdnfuse.rewrite.graph import is_tensor, value

FEW_ROWS = 32


def few_rows(node: Any) -> bool:
    """Whether a tensor has at most FEW_ROWS rows of its last axis, whatever the inputs."""
    return 0 < _rows(node) <= FEW_ROWS


def one_row(node: Any) -> bool:
    """Whether a tensor is one row, whatever the inputs. Only then are norms and residuals worth fusing into a linear: one kernel
    takes all of them, where several rows would be normalised again by every program.
    """
    return _rows(node) == 1


def _rows(node: Any) -> int:
    """0 if it is not known."""
    if not is_tensor(node) or value(node).ndim == 0 or not all(isinstance(size, int) for size in value(node).shape[:-1]):
        return 0
    return value(node).shape[:-1].numel()
