"""Which columns of which rows a tensor consists of. Found by running the views, splits and cats above it on column numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from gdnfuse.errors import one_line
from gdnfuse.rewrite.evaluate import evaluate_node, hint
from gdnfuse.rewrite.graph import is_cast, is_tensor, op_name, rearranges, value
from gdnfuse.rewrite.pattern import Mismatch

ROW = "gdnfuse_row"  # key in the meta of a tensor that is a row itself, although its columns come from elsewhere in another order


class Columns:
    """Numbers the columns of tensors [B, …], over all elements of one sequence.

    The columns of the first tensor are numbered from 0, those of the next after them, and so on.

    Attributes:
        rows: the tensors in that order, which are inputs or compute their elements, and how many columns each has.
    """

    def __init__(self) -> None:
        self.rows: dict[Node, int] = {}
        self._numbers: dict[Node, Any] = {}

    def of(self, node: Node, sequences: Any) -> torch.Tensor:
        """The numbers [N] of the columns that a tensor with N elements per sequence has, in order.

        Raises:
            Mismatch: they differ between sequences, or the views cannot be run.
        """
        try:
            numbers = self._of(node).reshape(hint(sequences), -1)
        except (RuntimeError, IndexError, TypeError, AttributeError) as e:
            raise Mismatch(node, "views that can be run on numbers of columns", one_line(e)) from e
        if not torch.equal(numbers, numbers[:1] + _sequences(len(numbers))):
            raise Mismatch(node, "the same columns of every sequence, each in its place", "others")
        return numbers[0]

    def _of(self, node: Any) -> Any:
        if not isinstance(node, Node):
            return node
        if not is_tensor(node) and isinstance(value(node), int | torch.SymInt):
            return hint(value(node))
        if node not in self._numbers:
            if is_cast(node):
                self._numbers[node] = self._of(node.args[0])
            elif _only_rearranges(node) and ROW not in node.meta:
                self._numbers[node] = evaluate_node(node, self._of)
            else:
                self._numbers[node] = self._new(node)
        return self._numbers[node]

    def _new(self, row: Node) -> torch.Tensor:
        shape = [hint(size) for size in value(row).shape]
        start, width = sum(self.rows.values()), math.prod(shape[1:])
        self.rows[row] = width
        return (torch.arange(start, start + width) + _sequences(shape[0])).view(shape)


def _sequences(count: int) -> torch.Tensor:
    """[count, 1], different for each sequence, so that swapped sequences are noticed."""
    return (1 << 40) * torch.arange(count)[:, None]


def _only_rearranges(node: Node) -> bool:
    """Whether a node only rearranges the columns of its argument. Indices must not be tensors, and ops must have one result."""
    if not rearranges(node):
        return False
    if op_name(node) in ("cat", "stack"):
        return True
    first, *others = node.all_input_nodes
    return not any(map(is_tensor, others)) and (is_tensor(first) or rearranges(first))
