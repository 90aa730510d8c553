"""packed: if the rule keeps packed sequences apart, attention must keep them apart too.

transformers passes the bounds of sequences to the rule. For attention's mask it looks for positions that start again, and only
without a cache and without a padding mask. Otherwise attention mixes the sequences without a warning.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from gdnfuse.dialect import op_of
from gdnfuse.errors import GdnfuseError
from gdnfuse.passes.sdpa import mask_of
from gdnfuse.rewrite.graph import is_tensor, op_name, peel, same, value


def require_separated(gm: GraphModule) -> None:
    """Refuse a graph in which a rule or conv has bounds of sequences, and attention has a mask that does not know of them.

    The bounds of one sequence [2] have nothing to keep apart: they say where it ends.

    Raises:
        GdnfuseError: says what to pass to the model.
    """
    bounds = {b for n in gm.graph.nodes if isinstance(b := _bounds(n), Node) and not same(value(b).shape[0], 2)}
    for node in gm.graph.nodes if bounds else ():
        masks = _masks(node)
        if masks and not any(_may_distinguish(given, bounds) for given in _inputs(masks)):
            raise GdnfuseError(
                "Sequences packed with cu_seq_lens_q must be kept apart by attention too, found a mask that no positions went "
                "into: give position_ids that start again at each, use_cache=False and no attention_mask."
            )


def _bounds(node: Node) -> Any:
    op = op_of(node.target) if node.op == "call_function" else None
    return op.bind(node.args, node.kwargs).get("cu_seqlens") if op is not None else None


def _masks(node: Node) -> list[Any]:
    """The masks of attention.

    That is its argument, or None; for attention written out, what is added [B, 1, T, L] to scores [B, H, T, L].
    """
    if op_name(node) == "scaled_dot_product_attention":
        return [mask_of(node)]
    if op_name(node) != "softmax" or not is_tensor(node) or value(node).ndim != 4:
        return []
    scores = peel(node.args[0])
    if op_name(scores) != "add":
        return [None]
    found = [a for a in scores.args if is_tensor(a) and value(a).ndim == 4 and same(value(a).shape[1], 1)]
    return found if len(found) == 1 else []


def _inputs(masks: list[Any]) -> set[Node]:
    """The inputs of the graph that these read."""
    seen: set[Node] = set()
    todo = [m for m in masks if isinstance(m, Node)]
    while todo:
        if (n := todo.pop()) not in seen:
            seen.add(n)
            todo.extend(n.all_input_nodes)
    return {n for n in seen if n.op == "placeholder" and is_tensor(n)}


def _may_distinguish(given: Node, bounds: set[Node]) -> bool:
    """Whether an input can distinguish sequences: the bounds can, and positions or a mask of rows and columns may."""
    v = value(given)
    return given in bounds or v.ndim > 2 or v.ndim == 2 and not v.is_floating_point() and "attention_mask" not in given.name
