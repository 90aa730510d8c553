"""Finds adapters with something between their parts: B·A·x reaches its projection with another operation in between.

Anything may be between the parts of an adapter, such as a forward hook. So everything that is computed from x is followed, up to
the linears A and B. A sum of a projection of x and B·A·x is an adapter.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from gdnfuse.dialect import packed_linear
from gdnfuse.errors import Refused
from gdnfuse.passes.quantized import INPUTS, is_weight
from gdnfuse.passes.rows import few_rows
from gdnfuse.rewrite.graph import foreign, is_tensor, op_name, peel, same_shape, value

LINEARS = ("linear", "gdnfuse.packed_linear")
MERGE = "Remove that, or merge the adapter."


@dataclass(frozen=True)
class Loose:
    """An adapter: the columns of the projection, A·x and B·A·x from their linears, and the sum of projection and adapter."""

    row: Node
    low: Node
    up: Node
    total: Node


def loose(graph: Graph, taken: Set[Node]) -> Iterator[Loose]:
    """Adapters on few rows, except those whose A·x are in `taken`. Each once."""
    found: set[Node] = set()
    for x in _inputs(graph):
        for adapter in _sums(x):
            if adapter.low not in taken and adapter.up not in found:
                found.add(adapter.up)
                yield adapter


def linear_of(row: Node) -> Node:
    """The linear that computes these columns."""
    return row.args[0] if op_name(row) == "narrow" else row


def input_of(linear: Node) -> Node:
    """The input of a linear, or of several packed ones."""
    if op_name(linear) == "gdnfuse.packed_linear":
        return packed_linear.op.bind(linear.args, linear.kwargs)["x"]
    return linear.args[0]


def why(a: Loose) -> Refused:
    """Why such an adapter is not fused, with what to do."""
    A, base = linear_of(a.low), linear_of(a.row)
    for linear, what in ((base, "A projection with adapters"), (a.up, "B of an adapter")):
        if op_name(linear) == "linear" and biased(linear):
            return Refused(f"{what} must have no bias, found one: such adapters are fused once they are merged.", at=linear)
    if op_name(base) not in LINEARS:
        return Refused(
            f"Adapters must be on a linear to be fused with it, found {op_name(base)}. Merge them if it allows.", at=base
        )
    reads = {"A": peel(input_of(A)), "the projection": peel(input_of(base))}
    if reads["A"] is not reads["the projection"]:
        last = max(reads, key=reads.get)
        between, fix = reads[last], "Call model.eval()." if op_name(reads[last]) == "dropout" else MERGE
        return Refused(
            f"A of an adapter must read what its projection reads, found {op_name(between)} before {last}. {fix}", at=between
        )
    if (between := min(a.low.users)) is not linear_of(a.up):
        return Refused(f"B of an adapter must read A·x directly, found {op_name(between)} in between. {MERGE}", at=between)
    if len(a.low.users) > 1:
        return Refused(f"A·x must be read by its B alone, found that {op_name(max(a.low.users))} reads it too. {MERGE}", at=a.low)
    for linear in (A, linear_of(a.up)):
        if op_name(linear) == "linear" and not is_weight(linear.args[1]):
            found = op_name(linear.args[1])
            return Refused(f"A and B of an adapter must be weights, found the result of {found}. Merge the adapter.", at=linear)
    scaled = a.up
    while len(scaled.users) == 1 and (reader := next(iter(scaled.users))) is not a.total and is_scaled(reader):
        scaled = reader
    if a.total not in scaled.users:
        return Refused(
            "An adapter must add a number times B·A·x to its projection, which nothing else reads, as LoRA does; found that "
            f"{op_name(min(scaled.users))} reads B·A·x. DoRA and others are fused once they are merged.",
            at=a.up,
        )
    first, last = min(a.row.users), max(a.row.users)
    if op_name(first) in ("add", "sub") and first is not last:
        first = last
    return Refused(
        f"A projection must be read by the sum with its adapter alone, found that {op_name(first)} reads it otherwise. {MERGE}",
        at=first,
    )


def is_scaled(node: Node) -> bool:
    """Whether a node is another one times a number."""
    return op_name(node) == "mul" and len(node.args) == 2 and isinstance(node.args[1], int | float)


def _inputs(graph: Graph) -> dict[Node, None]:
    """What linears of few rows read.

    And what that is made from by an operation on one tensor, such as a hook before the linear.
    """
    found: dict[Node, None] = {}
    for node in graph.nodes:
        if op_name(node) in LINEARS and few_rows(node):
            x = peel(input_of(node))
            found[x] = None
            given = [n for n in x.all_input_nodes if is_tensor(n)]
            if len(given) == 1 and same_shape(value(given[0]).shape, value(x).shape):
                found[peel(given[0])] = None
    return found


def _sums(x: Node) -> Iterator[Loose]:
    """The sums of a projection of x and B·A·x, in order."""
    # For each node that is computed from x: the projections in it, and the B·A·x in it with their A·x.
    rows: dict[Node, set[Node]] = {x: set()}
    ups: dict[Node, set[tuple[Node, Node]]] = {x: set()}
    todo = list(x.users)
    heapq.heapify(todo)
    while todo:
        node = heapq.heappop(todo)
        if node in rows or node.op == "output":
            continue
        given = [n for n in node.all_input_nodes if n in rows]
        name, found, made = op_name(node), set().union(*map(rows.get, given)), set().union(*map(ups.get, given))
        # An unknown operation may be a projection with quantised weights, or part of a hook.
        if name in LINEARS or foreign(node) and not found and not made:
            if name in LINEARS and input_of(node) not in rows or made:
                continue
            lows = {row for row in found if op_name(linear_of(row)) in LINEARS}
            found, made = (set(), {(node, low) for low in lows}) if lows else ({node}, made)
        elif name == "narrow" and op_name(node.args[0]) in LINEARS:
            found, made = {node} if found else found, {(node, low) for _, low in made}
        elif name in ("add", "sub"):
            # A sum with something else, such as a residual, is not part of an adapter.
            if any(n not in rows and is_tensor(n) and n.op not in INPUTS for n in node.all_input_nodes):
                continue
            for one, other in itertools.permutations(node.args[:2]):
                for up, low in ups.get(one, ()):
                    for row in rows.get(other, ()):
                        if row is not low and _width(row) == _width(up) == _width(node):
                            yield Loose(row, low, up, node)
        rows[node], ups[node] = found, made
        for user in node.users:
            heapq.heappush(todo, user)


def _width(node: Node) -> Any:
    return value(node).shape[-1] if is_tensor(node) and value(node).ndim else None


def biased(linear: Node) -> bool:
    """Whether a linear of torch has a bias."""
    return any(b is not None for b in (*linear.args[2:], *linear.kwargs.values()))
