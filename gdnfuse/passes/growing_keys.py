"""Which of a prompt's results are the keys and values of a cache that grows: the length of those the next step finds changed.

Dynamo compiles a step for the length that it meets first, and once more, for all lengths, when it meets the second; and for the
strides that it meets. Told of the axis before the first step, and with keys and values laid out as every step lays them out, it
compiles one graph, not two or three.
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
    """The places, among what a graph returns that nothing is fused in yet, of keys and values [B, HKV, L, D] of its attention."""
    (results,) = graph.find_nodes(op="output")[0].args
    found: set[Node] = set()
    for node in graph.nodes:
        if op_name(node) == "scaled_dot_product_attention":
            for given in node.args[1:3]:
                held = without_copies(given)
                found.update(n for n in chain(held) if value(n).ndim == 4 and same_shape(value(n).shape, value(held).shape))
    # A cache of a fixed size may be made by its first prompt, which then writes into it; what came in is the caller's.
    written = {s for node in graph.nodes for s in writes(node)}
    written |= {storage(n) for n in graph.find_nodes(op="placeholder")}
    return [i for i, n in enumerate(results) if n in found and storage(n) not in written]


def lay_out(gm: GraphModule, places: Sequence[int]) -> None:
    """Have the results at these places contiguous, as a step leaves them, but those whose memory somebody else has too."""
    graph = gm.graph
    output = graph.output_node()
    results = list(output.args[0])
    held = Counter(storage(n) for n in [*graph.find_nodes(op="placeholder"), *(n for n in results if isinstance(n, Node))])
    for i in places:
        if held[storage(results[i])] == 1:
            with graph.inserting_before(output), quiet_shapes(gm):
                # Also where they seem to be: Inductor lays out what follows empty keys as it came.
                copied = graph.call_method("clone", (results[i],), {"memory_format": torch.contiguous_format})
                copied.meta |= kept_meta(results[i]) | {"example_value": infer(copied)}
            results[i] = copied
    output.args = (type(output.args[0])(results),)


def mark(results: Sequence[Any], places: Sequence[int]) -> None:
    """Tell Dynamo that the length of these results may change; it takes that for a hint, and specialises where it has to."""
    for i in places:
        compat.mark_any_length(results[i], LENGTH)
