"""last_rows: if only the last tokens of a prompt are read, row-wise computations are done for these alone.

`generate` reads the logits of the last token. After the keys, values and states of the last layer nothing mixes tokens: not its
output projection, its MLP, nor the norms. Its attention needs only the last queries. So a slice of rows moves up through all ops
that treat each row separately, as long as nobody else reads their results. That this is right follows from the meaning of each
op. A list says for each op how rows pass through it. It is not proved with numbers.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from gdnfuse.dialect import DialectOp, causal_attention, prompt_attention
from gdnfuse.errors import Refused
from gdnfuse.passes.sdpa import attention_of
from gdnfuse.rewrite.driver import Outcome, deciding
from gdnfuse.rewrite.edit import infer, inserting, quiet_shapes, recorded
from gdnfuse.rewrite.graph import is_tensor, kept_meta, op_name, same, same_shape, storage, value, writes

ELEMENTWISE = {
    "add", "sub", "mul", "div", "neg", "exp", "silu", "gelu", "relu", "tanh", "sigmoid", "to", "float", "contiguous", "clone",
}  # fmt: skip
ROWWISE = {"linear", "gdnfuse.packed_linear", "gdnfuse.rms_norm"}  # ops that are row-wise in their first argument
SUM = "gdnfuse.add_rms_norm"
NAME, EQUATION = "last_rows", "f(x)[:, −k:] = f(x[:, −k:]), rows apart"


def keep_last_rows(gm: GraphModule, outcome: Outcome) -> None:
    """Move each slice of the last rows up as far as possible. `outcome` gets a record for each and counts it as a rewrite."""
    for node in list(gm.graph.nodes):
        if (axis := _sliced(node)) is None:
            continue
        record = recorded(NAME, "fuse", node, EQUATION)
        outcome.records.append(record)
        with deciding(record, outcome), quiet_shapes(gm):
            outcome.need_fuel()
            _Rows(gm.graph, node, axis).move_up()


def _sliced(node: Node) -> int | None:
    """The axis along which a node is the last k of more rows: x[:, -k:], with a number k."""
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
    """One slice, and the nodes above it of which no other rows are needed."""

    def __init__(self, graph: Graph, end: Node, axis: int):
        self.graph, self.end, self.count = graph, end, value(end).shape[axis]
        self.total = value(end.args[0]).shape[axis]
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.writers: dict[int, list[int]] = {}
        for n in graph.nodes:
            for s in writes(n):
                self.writers.setdefault(s, []).append(self.order[n])
        # For each node of which only the last rows are needed, the axis of its rows. Found from its readers.
        self.axes: dict[Node, int] = {end.args[0]: axis}
        self.inside: set[Node] = {end}
        self.whole: set[Node] = set()  # nodes that are read as a whole: weights, keys and values
        self.made: dict[Node, Node] = {}

    def move_up(self) -> None:
        """Move the slice up. Raises Refused if it must stay."""
        first, why = self.end.args[0], ""
        if self.writers.get(storage(self.end)):
            raise Refused("Rows that are read must not be written in place, found a write.", at=self.end)
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
        # If a node has several results, all must be sliced.
        self.inside -= {n for n in self.inside if _result(n) and n.args[0] not in self.inside}
        if first not in self.inside:
            results = first.args[0].users if _result(first) else (first,)
            other = next((u.name for n in results for u in n.users if u not in self.inside), why)
            raise Refused(f"Rows must be computed one by one and be read by {self.end.name} alone, found {other}.", at=self.end)
        # The slice is a view of the input. The caller may rely on that, and nothing would be saved.
        seen = [n for n in self.order if storage(n) == storage(self.end) and n < self.end and n not in self.inside]
        if seen:
            raise Refused(f"Rows must be computed, found that they are a view of {seen[-1].name}.", at=self.end)
        with inserting(self.graph, self.end.prev):
            last = self._last(first)
            # With few rows a copy may become a view, which would see later writes to the memory.
            if storage(last) in {storage(n) for n in self.order}:
                last = self._added(self.graph.call_method("clone", (last,)), first)
        self.end.replace_all_uses_with(last)
        for node in sorted(self.inside, key=self.order.get, reverse=True):
            self.graph.erase_node(node)

    def _needs(self, node: Node, axis: int) -> list[tuple[Node, int]] | None:
        """The arguments from which a node is computed row by row, with their axes. None if a row depends on other rows.

        All arguments with these rows are returned.
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
            bias = len(args) > 2 and is_tensor(args[2]) and value(args[2]).ndim > 1  # a bias that has rows itself
            return [(args[0], axis)] if once and not bias and not node.kwargs else None
        if name == "narrow" and len(args) == 4 and args[1] in (-1, len(shape) - 1) and axis < len(shape) - 1:
            return [(args[0], axis)]
        if name == "reshape" and same_shape(given[: axis + 1], shape[: axis + 1]) and len(_sizes(node)) == len(shape):
            return [(args[0], axis)]
        # With two axes it may be a permute, which has the same number of arguments and another meaning.
        if name == "transpose" and len(args) == 3 and len(shape) > 2 and all(isinstance(a, int) for a in args[1:]):
            a, b = (d % len(shape) for d in args[1:])
            return [(args[0], {a: b, b: a}.get(axis, axis))]
        if axis == 2 and once and _attention(node) is not None:
            return [(args[0], axis)]
        return None

    def _broadcast(self, node: Node, axis: int) -> list[tuple[Node, int]] | None:
        """For an elementwise node: each tensor has these rows, or one row for all, or no such axis."""
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
        """Whether something that a node reads or returns is written between the node and the slice, to which it will move."""
        spans = range(self.order[node], self.order[self.end])
        touched = {storage(n) for n in (node, *node.all_input_nodes)} - {None}
        return any(at in spans for s in touched for at in self.writers.get(s, ()))

    def _last(self, node: Node) -> Node:
        """The last rows of a node: computed from those of its arguments, or a slice of the node."""
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
            op, arguments = attention
            arguments["q"] = self._last(arguments["q"])
            if op is prompt_attention.op:
                positions = arguments["positions"]
                last = self.graph.call_function(operator.getitem, (positions, slice(-self.count, None)))
                arguments["positions"] = self._added(last, positions)
            return self._added(self.graph.call_function(op.overload, (), arguments), node)
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
    """The sizes of a reshape, one by one."""
    return tuple(node.args[1]) if len(node.args) == 2 and isinstance(node.args[1], list | tuple) else node.args[1:]


def _attention(node: Node) -> tuple[DialectOp, dict[str, Any]] | None:
    """The op that computes the last queries of an attention, and its arguments; None if there is none."""
    for op in (causal_attention.op, prompt_attention.op):
        if op_name(node) == f"gdnfuse.{op.name}":
            return op, op.bind(node.args, node.kwargs)
    if op_name(node) != "scaled_dot_product_attention" or len(node.args) < 3:
        return None
    call, reason = attention_of(node)
    number = not isinstance(call["scale"], Node)
    fits = not reason and number and causal_attention.takes(*(value(call[name]) for name in "qkv"))
    return (causal_attention.op, call) if fits else None
