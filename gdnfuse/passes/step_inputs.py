"""What all attention layers of a step read is made once: tokens' positions, the lengths of caches behind them, masks, rotations.

A cache of fixed length has its own length in each layer. So each layer computes positions from it and writes the new length, in a
small kernel of its own between two large ones. And Inductor computes an elementwise result again for each opaque operation that
reads it, just before that operation. Such kernels also keep the kernel behind them from starting early.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from gdnfuse import compat
from gdnfuse.passes.sdpa import MOST_QUERIES
from gdnfuse.passes.survey import CHOSEN
from gdnfuse.rewrite.edit import infer, returned
from gdnfuse.rewrite.graph import held, is_plain, is_tensor, kept_meta, op_name, storage, value, writes


def join(gm: GraphModule) -> None:
    """Compute the positions of all layers at once, at the start of the graph, and all new lengths at once, at its end.

    Only lengths are joined that are inputs of their own and written once, after which nobody reads them.
    """
    graph = gm.graph
    lengths = _lengths(graph)
    positions: dict[Any, list[tuple[Node, Node]]] = {}
    for node in graph.nodes:
        if op_name(node) == "add" and len(node.args) == 2 and not node.kwargs:
            for count, length in (node.args, node.args[::-1]):
                if length in lengths and (T := _counted(count)):
                    positions.setdefault((T, value(length).device), []).append((node, length))
    for (T, _), group in positions.items():
        if len(group) > 1:
            _join_positions(graph, T, group)
    advanced: dict[Any, list[Node]] = {}
    for length, write in lengths.items():
        if op_name(write) == "add_" and type(write.args[1]) is int and not write.kwargs and not write.users:
            advanced.setdefault((write.args[1], value(length).device), []).append(length)
    add = compat.add_to_all()
    for (n, _), group in advanced.items():
        if len(group) > 1 and add is not None:
            with graph.inserting_before(graph.output_node()):
                node = graph.call_function(add, (group, n))
            node.meta |= kept_meta(lengths[group[0]]) | {"example_value": infer(node)}
            for length in group:
                graph.erase_node(lengths[length])


def _lengths(graph: Graph) -> dict[Node, Node]:
    """Inputs that are one int64, and the only write of each, if nobody else uses its memory behind it."""
    inputs = graph.find_nodes(op="placeholder")
    numbers = {n: storage(n) for n in inputs if is_tensor(n) and value(n).ndim == 0 and value(n).dtype == torch.int64}
    shared = [s for n in inputs for s in held(n)]
    by = {s: n for n, s in numbers.items() if s is not None and shared.count(s) == 1}
    found: dict[Node, Node] = {}
    spoilt: set[Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        for s in {s for i in node.all_input_nodes for s in held(i)} & by.keys():
            if by[s] in found:
                spoilt.add(by[s])  # it is used behind its write, or written again
            elif s in writes(node):
                found[by[s]] = node
    return {length: write for length, write in found.items() if length not in spoilt and write.args[:1] == (length,)}


def _counted(node: Any) -> int | None:
    """T, if a node is 0, 1, …, T − 1 in int64 for a few tokens."""
    if op_name(node) != "arange" or not is_tensor(node) or value(node).dtype != torch.int64 or len(node.args) != 1:
        return None
    (T,) = node.args
    return T if type(T) is int and 0 < T <= MOST_QUERIES and not node.kwargs.keys() & {"start", "end", "step"} else None


def _join_positions(graph: Graph, T: int, group: list[tuple[Node, Node]]) -> None:
    """Replace sums of 0, 1, …, T − 1 and a length, which nobody has written yet, by rows of one tensor."""
    lengths = list(dict.fromkeys(length for _, length in group))
    first = group[0][0]

    def made(kind: str, target: Any, args: tuple[Any, ...]) -> Node:
        node = graph.create_node(kind, target, args, {})
        node.meta |= kept_meta(first) | {"example_value": infer(node)}
        return node

    with graph.inserting_before(graph.find_nodes(op="placeholder")[-1].next):
        stacked = made("call_function", torch.stack, (lengths,))
        column = made("call_method", "unsqueeze", (stacked, 1))
        # Rows of an even number of elements start at a multiple of 16 bytes, for which kernels are compiled.
        count = graph.call_function(torch.arange, (T + T % 2,), {"device": value(first).device})
        count.meta |= kept_meta(first) | {"example_value": value(column).new_empty((T + T % 2,))}
        every = _in_memory(graph, made("call_function", torch.add, (column, count)))
        whole = [made("call_method", "select", (every, 0, i)) for i in range(len(lengths))]
        rows = [made("call_method", "narrow", (row, 0, 0, T)) for row in whole]
    for node, length in group:
        node.replace_all_uses_with(rows[lengths.index(length)])
        (counted,) = (n for n in node.args if n is not length)
        graph.erase_node(node)
        if not counted.users:
            graph.erase_node(counted)


def keep(gm: GraphModule) -> None:
    """Have each elementwise result that several of our kernels read computed once, in a lowered graph."""
    graph = gm.graph
    readers: dict[Node, set[Node]] = {}
    for node in graph.nodes:
        if node.meta.get(CHOSEN) == "triton":
            for given in node.all_input_nodes:
                readers.setdefault(_base(given), set()).add(node)
    written = {s for node in graph.nodes for s in writes(node)}
    for node, several in readers.items():
        if len(several) > 1 and _is_computed(node) and storage(node) not in written and not returned(node):
            with graph.inserting_before(node.next):
                _in_memory(graph, node)


def _base(node: Node) -> Node:
    """What a tensor is a view of."""
    while node.op in ("call_function", "call_method") and is_tensor(node):
        viewed = next((n for n in node.all_input_nodes if storage(n) is not None and storage(n) == storage(node)), None)
        if viewed is None:
            break
        node = viewed
    return node


def _is_computed(node: Node) -> bool:
    """Whether a node is a tensor of known size that a compiler may compute again for each reader."""
    name = op_name(node)
    if node.op not in ("call_function", "call_method") or "." in name or name == "getitem" or not is_tensor(node):
        return False
    x = value(node)
    return is_plain(x) and all(isinstance(n, int) for n in x.shape) and compat.is_contiguous(x)


def _in_memory(graph: Graph, node: Node) -> Node:
    """The same tensor, which has a memory layout. Inductor computes what has one once, for all readers."""
    readers = list(node.users)
    here = graph.call_method("as_strided", (node, tuple(value(node).shape), tuple(value(node).stride())))
    here.meta |= kept_meta(node) | {"example_value": infer(here)}
    for reader in readers:
        reader.replace_input_with(node, here)
    return here
