"""growing_keys: finds results of a prompt that are keys and values of a growing cache, whose length changes with the next step.

Dynamo compiles a step for the first length, and again, for all lengths, at the second one. It also compiles again for other
strides. If the axis is marked before the first step, and keys and values have the layout of every later step, it compiles one
graph instead of two or three.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from gdnfuse import compat
from gdnfuse.passes.sdpa import without_copies
from gdnfuse.rewrite.edit import infer, quiet_shapes
from gdnfuse.rewrite.graph import chain, kept_meta, op_name, same_shape, storage, value, writes

LENGTH = 2  # axis of keys and values [B, HKV, L, D]


def growing_keys(graph: Graph) -> list[int]:
    """The indices, among the results of a graph before fusion, of keys and values [B, HKV, L, D] of its attention."""
    (results,) = graph.find_nodes(op="output")[0].args
    found: set[Node] = set()
    for node in graph.nodes:
        if op_name(node) == "scaled_dot_product_attention":
            for given in node.args[1:3]:
                held = without_copies(given)
                found.update(n for n in chain(held) if value(n).ndim == 4 and same_shape(value(n).shape, value(held).shape))
    # The first prompt may make a cache of fixed size and write into it. Inputs of the graph belong to the caller.
    written = {s for node in graph.nodes for s in writes(node)}
    written |= {storage(n) for n in graph.find_nodes(op="placeholder")}
    return [i for i, n in enumerate(results) if n in found and storage(n) not in written]


def lay_out(gm: GraphModule, places: Sequence[int]) -> None:
    """Make the results at these indices contiguous, as a step leaves them, except those whose memory somebody else uses."""
    graph = gm.graph
    output = graph.output_node()
    results = list(output.args[0])
    held = Counter(storage(n) for n in [*graph.find_nodes(op="placeholder"), *(n for n in results if isinstance(n, Node))])
    for i in places:
        if held[storage(results[i])] == 1:
            with graph.inserting_before(output), quiet_shapes(gm):
                # Even if they seem contiguous: Inductor keeps the layout of what is appended to empty keys.
                copied = graph.call_method("clone", (results[i],), {"memory_format": torch.contiguous_format})
                copied.meta |= kept_meta(results[i]) | {"example_value": infer(copied)}
            results[i] = copied
    output.args = (type(output.args[0])(results),)


def mark(results: Sequence[Any], places: Sequence[int]) -> None:
    """Tell Dynamo that the length of these results may change. Dynamo takes this as a hint and specialises if it must."""
    for i in places:
        compat.mark_any_length(results[i], LENGTH)
