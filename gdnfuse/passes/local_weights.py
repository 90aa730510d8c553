"""local_weights: weights that a graph reads only as this rank's part of them become inputs that are plain tensors.

transformers shards weights as DTensors, and at inference its linears read `weight.to_local()`: a tensor that nothing in the
graph writes, but that is no input, so that it could be neither packed nor streamed. Here the part itself is the input. Its tensor
is the one that the DTensor holds, so packing it keeps the DTensor, and with it `state_dict` and eager calls, as they were.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from gdnfuse import compat
from gdnfuse.packing import Inner
from gdnfuse.rewrite.edit import inserting
from gdnfuse.rewrite.graph import kept_meta, op_name, storage, value, writes


def to_inputs(gm: GraphModule, real: dict[Node, Any]) -> list[Inner]:
    """Give `gm` an input, behind all others, for every DTensor of which only the local part is read.

    Args:
        gm: rewritten in place; the DTensors stay placeholders, which nobody reads any more.
        real: the example input of every placeholder; gets the new ones.

    Returns:
        How to find the new inputs at each call, in their order.
    """
    if not any(map(_local, gm.graph.nodes)) or (attribute := compat.local_part()) is None:
        return []
    written = {s for n in gm.graph.nodes for s in writes(n)}
    found = []
    for place, (node, tensor) in enumerate(list(real.items())):
        parts = list(node.users)
        if not parts or not all(map(_local, parts)) or not compat.is_sharded(tensor):
            continue
        # One that starts behind the start of its memory would be torn from it by packing: to torch.compile it starts there still.
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
