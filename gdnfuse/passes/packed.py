"""packed: where the rule keeps sequences apart that are packed into one row, attention must do so too.

transformers gives the bounds to the rule. For attention's mask it looks where positions begin anew, and only without a cache and
without a mask of padding. Otherwise attention mixes the sequences, and nothing is said.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from gdnfuse.dialect import op_of
from gdnfuse.errors import GdnfuseError
from gdnfuse.passes.sdpa import mask_of
from gdnfuse.rewrite.graph import is_tensor, op_name, peel, same, value


def require_apart(gm: GraphModule) -> None:
    """Refuse a graph in which a rule or conv is given bounds of sequences, and attention a mask that cannot know of them.

    Raises:
        GdnfuseError: says what to give the model.
    """
    bounds = {b for n in gm.graph.nodes if isinstance(b := _bounds(n), Node)}
    for node in gm.graph.nodes if bounds else ():
        masks = _masks(node)
        if masks and not any(_tells(given, bounds) for given in _inputs(masks)):
            raise GdnfuseError(
                "Sequences packed with cu_seq_lens_q must be kept apart by attention too, found a mask that no positions went "
                "into: give position_ids that begin anew at each, use_cache=False and no attention_mask."
            )


def _bounds(node: Node) -> Any:
    op = op_of(node.target) if node.op == "call_function" else None
    return op.bind(node.args, node.kwargs).get("cu_seqlens") if op is not None else None


def _masks(node: Node) -> list[Any]:
    """Of attention its one mask, or None; of attention written out what is added, [B, 1, T, L], to scores [B, H, T, L]."""
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
    """The graph's inputs that these read."""
    seen: set[Node] = set()
    todo = [m for m in masks if isinstance(m, Node)]
    while todo:
        if (n := todo.pop()) not in seen:
            seen.add(n)
            todo.extend(n.all_input_nodes)
    return {n for n in seen if n.op == "placeholder" and is_tensor(n)}


def _tells(given: Node, bounds: set[Node]) -> bool:
    """Whether an input may tell sequences apart: the bounds do, and positions or a mask of rows and columns may."""
    v = value(given)
    return given in bounds or v.ndim > 2 or v.ndim == 2 and not v.is_floating_point() and "attention_mask" not in given.name
