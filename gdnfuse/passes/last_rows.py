"""last_rows: where only the last tokens of a prompt are read, what was computed row by row is computed for those alone.

`generate` reads the logits of the last token. Behind the last layer's keys, values and states nothing mixes tokens any more: not
its output projection, its MLP, nor the norms; its attention needs the last queries alone. A slice of rows therefore moves up
through all that treats each row by itself, as far as nobody else reads it. That follows from the ops' meaning, each listed here
with how rows go through it, and is not left to a proof on numbers.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from gdnfuse.dialect import causal_attention
from gdnfuse.errors import Refused
from gdnfuse.passes.sdpa import attention_of
from gdnfuse.rewrite.driver import Outcome, deciding
from gdnfuse.rewrite.edit import infer, inserting, quiet_shapes, recorded
from gdnfuse.rewrite.graph import is_tensor, kept_meta, op_name, same, same_shape, storage, value, writes

ELEMENTWISE = {
    "add", "sub", "mul", "div", "neg", "exp", "silu", "gelu", "relu", "tanh", "sigmoid", "to", "float", "contiguous", "clone",
}  # fmt: skip
ROWWISE = {"linear", "gdnfuse.packed_linear", "gdnfuse.rms_norm"}  # in their first argument
SUM = "gdnfuse.add_rms_norm"
NAME, EQUATION = "last_rows", "f(x)[:, −k:] = f(x[:, −k:]), rows apart"


def keep_last_rows(gm: GraphModule, outcome: Outcome) -> None:
    """Move each slice of the last rows up as far as it goes; `outcome` gets a record for each, and counts it as a rewrite."""
    for node in list(gm.graph.nodes):
        if (axis := _sliced(node)) is None:
            continue
        record = recorded(NAME, "fuse", node, EQUATION)
        outcome.records.append(record)
        with deciding(record, outcome), quiet_shapes(gm):
            outcome.need_fuel()
            _Rows(gm.graph, node, axis).move_up()


def _sliced(node: Node) -> int | None:
    """The axis along which a node is the last k of more rows: x[:, -k:], k a number."""
    if op_name(node) != "getitem" or not is_tensor(node) or not is_tensor(node.args[0]) or not isinstance(node.args[1], tuple):
        return None
    index, whole = node.args[1], slice(None)
    if any(i is not Ellipsis and not isinstance(i, slice) for i in index) or Ellipsis in index[:-1]:
        return None
    axes = [axis for axis, i in enumerate(index) if i is not Ellipsis and i != whole]
    if len(axes) != 1 or axes[0] == value(node).ndim - 1:
        return None
    part, count = index[axes[0]], value(node).shape[axes[0]]
    if not isinstance(count, int) or part != slice(-count, None) or same(count, value(node.args[0]).shape[axes[0]]):
        return None
    return axes[0]


class _Rows:
    """One slice, and the nodes above it that need no more rows than it has."""

    def __init__(self, graph: Graph, end: Node, axis: int):
        self.graph, self.end, self.count = graph, end, value(end).shape[axis]
        self.total = value(end.args[0]).shape[axis]
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.writers: dict[int, list[int]] = {}
        for n in graph.nodes:
            for s in writes(n):
                self.writers.setdefault(s, []).append(self.order[n])
        # The axis of the rows of each node that may be computed for the last alone; reached from its readers.
        self.axes: dict[Node, int] = {end.args[0]: axis}
        self.inside: set[Node] = {end}
        self.whole: set[Node] = set()  # read by those with all of their rows: weights, keys and values
        self.made: dict[Node, Node] = {}

    def move_up(self) -> None:
        """Raises Refused where the slice stays."""
        first, why = self.end.args[0], ""
        if self.writers.get(storage(self.end)):
            raise Refused("Rows that are read must not be written in place, found that they are.", at=self.end)
        for node in reversed(list(self.graph.nodes)):
            if node not in self.axes or node in self.whole or not self.inside.issuperset(node.users):
                continue
            wanted = self._needs(node, self.axes[node])
            if wanted is None or self._written(node):
                why = why or f"{op_name(node)} at {node.name}"
                continue
            if any(self.axes.get(n, axis) != axis for n, axis in wanted):
                continue
            self.inside.add(node)
            self.axes.update(wanted)
            self.whole.update(set(node.all_input_nodes) - {n for n, _ in wanted})
        # One result of several is computed apart only if the other is.
        self.inside -= {n for n in self.inside if _result(n) and n.args[0] not in self.inside}
        if first not in self.inside:
            results = first.args[0].users if _result(first) else (first,)
            other = next((u.name for n in results for u in n.users if u not in self.inside), why)
            raise Refused(f"Rows must be computed one by one and be read by {self.end.name} alone, found {other}.", at=self.end)
        # Its slice is a view of it too, which who gets both may rely on; and nothing would be saved.
        seen = [n for n in self.order if storage(n) == storage(self.end) and n < self.end and n not in self.inside]
        if seen:
            raise Refused(f"Rows must be computed, found that they are a view of {seen[-1].name}.", at=self.end)
        with inserting(self.graph, self.end.prev):
            last = self._last(first)
            # Of few rows a copy may have become a view, which shows what is written to the memory later.
            if storage(last) in {storage(n) for n in self.order}:
                last = self._added(self.graph.call_method("clone", (last,)), first)
        self.end.replace_all_uses_with(last)
        for node in sorted(self.inside, key=self.order.get, reverse=True):
            self.graph.erase_node(node)

    def _needs(self, node: Node, axis: int) -> list[tuple[Node, int]] | None:
        """The arguments of which a node's rows along an axis are a function, row by row, with their axes; None if it is not one.

        They are all of its arguments that have these rows.
        """
        name, args = op_name(node), node.args
        if _result(node):
            return [(args[0], axis)] if axis < value(node).ndim - 1 else None
        if name == SUM:
            return [(n, axis) for n in args[:2]] if same_shape(*(value(n).shape for n in args[:2])) else None
        if node.op not in ("call_function", "call_method") or not is_tensor(node) or not (args and is_tensor(args[0])):
            return None
        shape, given = value(node).shape, value(args[0]).shape
        if not same(shape[axis], self.total):
            return None
        once = args[0] not in (*args[1:], *node.kwargs.values())
        if name == "contiguous" and (len(args) > 1 or node.kwargs):
            return None
        if name in ELEMENTWISE:
            return self._broadcast(node, axis)
        if name in ROWWISE and axis < len(shape) - 1 and same_shape(given[: axis + 1], shape[: axis + 1]):
            bias = len(args) > 2 and is_tensor(args[2]) and value(args[2]).ndim > 1  # which has rows itself
            return [(args[0], axis)] if once and not bias and not node.kwargs else None
        if name == "narrow" and len(args) == 4 and args[1] in (-1, len(shape) - 1) and axis < len(shape) - 1:
            return [(args[0], axis)]
        if name == "reshape" and same_shape(given[: axis + 1], shape[: axis + 1]) and len(_sizes(node)) == len(shape):
            return [(args[0], axis)]
        # Of two axes it may be a permute, which has as many arguments and another meaning.
        if name == "transpose" and len(args) == 3 and len(shape) > 2 and all(isinstance(a, int) for a in args[1:]):
            a, b = (d % len(shape) for d in args[1:])
            return [(args[0], {a: b, b: a}.get(axis, axis))]
        if axis == 2 and once and _attention(node) is not None:
            return [(args[0], axis)]
        return None

    def _broadcast(self, node: Node, axis: int) -> list[tuple[Node, int]] | None:
        """Of an elementwise node: a tensor has its rows, or one for all, or none."""
        found, behind = [], value(node).ndim - axis
        for n in dict.fromkeys(node.all_input_nodes):
            if not is_tensor(n):
                return None
            at = value(n).ndim - behind
            if at >= 0 and same(value(n).shape[at], self.total):
                found.append((n, at))
            elif at >= 0 and not same(value(n).shape[at], 1):
                return None
        return found

    def _written(self, node: Node) -> bool:
        """Whether what a node reads or gives is written between it and the slice, where it is going to be computed."""
        spans = range(self.order[node], self.order[self.end])
        touched = {storage(n) for n in (node, *node.all_input_nodes)} - {None}
        return any(at in spans for s in touched for at in self.writers.get(s, ()))

    def _last(self, node: Node) -> Node:
        """The last rows of a node: computed from those of its arguments, or a slice of it."""
        if node not in self.made:
            new = self.made[node] = self._computed(node) if node in self.inside else self._slice(node)
            if is_tensor(node):
                sizes = [*value(node).shape]
                sizes[self.axes[node]] = self.count
                pairs = zip(value(new).shape, sizes, strict=True)
                fits = all(found == size for found, size in pairs if isinstance(found, int) and isinstance(size, int))
                assert fits, f"the last rows of {node} are {list(value(new).shape)}, not {sizes}"
        return self.made[node]

    def _slice(self, node: Node) -> Node:
        index = (*[slice(None)] * self.axes[node], slice(-self.count, None))
        return self._added(self.graph.call_function(operator.getitem, (node, index)), node)

    def _computed(self, node: Node) -> Node:
        axis, name = self.axes[node], op_name(node)
        wanted = {n for n, _ in self._needs(node, axis)}
        if (attention := _attention(node)) is not None:
            attention["q"] = self._last(attention["q"])
            return self._added(self.graph.call_function(causal_attention.op.overload, (), attention), node)
        if name == "reshape":
            sizes = [*_sizes(node)]
            sizes[axis] = self.count
            return self._added(self.graph.call_method("reshape", (self._last(node.args[0]), *sizes)), node)
        swap = lambda n: self._last(n) if n in wanted else n  # noqa: E731
        new = self.graph.create_node(node.op, node.target, map_arg(node.args, swap), map_arg(node.kwargs, swap))
        return self._added(new, node)

    def _added(self, new: Node, like: Node) -> Node:
        new.meta |= kept_meta(like) | {"example_value": infer(new)}
        return new


def _result(node: Node) -> bool:
    return op_name(node) == "getitem" and isinstance(node.args[1], int) and op_name(node.args[0]) == SUM


def _sizes(node: Node) -> tuple[Any, ...]:
    """Of a reshape, one by one."""
    return tuple(node.args[1]) if len(node.args) == 2 and isinstance(node.args[1], list | tuple) else node.args[1:]


def _attention(node: Node) -> dict[str, Any] | None:
    """The arguments of causal_attention that an attention is, as the op takes them; None if it is none."""
    if op_name(node) == "gdnfuse.causal_attention":
        return causal_attention.op.bind(node.args, node.kwargs)
    if op_name(node) != "scaled_dot_product_attention" or len(node.args) < 3:
        return None
    call, reason = attention_of(node)
    number = not isinstance(call["scale"], Node)
    return call if not reason and number and causal_attention.takes(*(value(call[name]) for name in "qkv")) else None
