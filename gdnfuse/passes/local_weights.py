"""local_weights: weights of which a graph reads only this rank's part become inputs that are plain tensors.

transformers splits weights as DTensors. At inference its linears read `weight.to_local()`. Nothing in the graph writes that
tensor, but it is not an input, so it could be neither packed nor streamed. Here the part itself becomes the input. It is the
tensor that the DTensor holds. So packing keeps the DTensor, `state_dict` and eager calls valid.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from gdnfuse import compat
from gdnfuse.packing import Inner
from gdnfuse.rewrite.edit import inserting
from gdnfuse.rewrite.graph import kept_meta, op_name, storage, value, writes


def to_inputs(gm: GraphModule, real: dict[Node, Any]) -> list[Inner]:
    """Give `gm` a new input for every DTensor of which only the local part is read.

    Args:
        gm: rewritten in place. The DTensors stay placeholders without readers.
        real: the example input of every placeholder. New ones are added.

    Returns:
        How to find the new inputs at each call, in order.
    """
    if not any(map(_local, gm.graph.nodes)) or (attribute := compat.local_part()) is None:
        return []
    written = {s for n in gm.graph.nodes for s in writes(n)}
    found = []
    for place, (node, tensor) in enumerate(list(real.items())):
        parts = list(node.users)
        if not parts or not all(map(_local, parts)) or not compat.is_sharded(tensor):
            continue
        # A part with an offset in its memory cannot be packed: torch.compile would still expect it at its old offset.
        if tensor.storage_offset() or any(storage(part) in written for part in parts):
            continue
        with inserting(gm.graph, gm.graph.find_nodes(op="placeholder")[-1]):
            new = gm.graph.placeholder(f"{node.name}_local")
        local, where = getattr(tensor, attribute), Inner(place, attribute)
        new.meta.update(kept_meta(node), example_value=value(parts[0]), gdnfuse_real=local, gdnfuse_inner=where)
        compat.like_a_parameter(gm, new)
        real[new] = local
        for part in parts:
            part.replace_all_uses_with(new)
            gm.graph.erase_node(part)
        found.append(where)
    return found


def _local(node: Node) -> bool:
    return op_name(node) == "to_local" and len(node.args) == 1 and not node.kwargs
