"""quantized: where the nodes of quantised weights stand, and which weights may share a buffer.

A quantised weight is the value of a `dequantize` of two inputs. While rules run it stands with the inputs, as a plain weight
does, so that linears on one input may become one whatever their weights are made of. Behind the lowering it stands where it is
read, so that no dequantised weight lives longer than it must.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from gdnfuse import formats
from gdnfuse.dialect import dequantize, op_of
from gdnfuse.rewrite.graph import storage, value, writes

INPUTS = ("placeholder", "get_attr")
PARTS = "gdnfuse_parts"  # key of a packed input's meta: the inputs it is packed of
WITH_INPUTS = "gdnfuse_with_inputs"  # key of a node's meta


def is_quantized(node: Any) -> bool:
    """Whether a node is a weight made of quantised data."""
    return isinstance(node, Node) and node.op == "call_function" and op_of(node.target) is dequantize.op


def bind(node: Node) -> dict[str, Any]:
    """data, scale, format and dtype of a quantised weight."""
    return dequantize.op.bind(node.args, node.kwargs)


def stored(node: Node) -> list[Node]:
    """The nodes in which a weight is stored: data, scale and what else its format has of a quantised one, else itself."""
    if not is_quantized(node):
        return [node]
    bound = bind(node)
    return [bound["data"], bound["scale"], *(bound["more"] or ())]


def is_weight(node: Any) -> bool:
    """Whether a node is an input of the graph, or a quantised weight that stands with the inputs it is stored in: whoever reads
    these instead, wherever in the graph, reads the same."""
    return isinstance(node, Node) and (node.op in INPUTS or is_quantized(node) and node.meta.get(WITH_INPUTS, False))


def to_inputs(gm: GraphModule) -> None:
    """Stand every quantised weight of the graph's inputs with them, once, unless something writes them."""
    written = {s for n in gm.graph.nodes for s in writes(n)}
    found: dict[Any, Node] = {}
    for node in [n for n in gm.graph.nodes if is_quantized(n)]:
        given = stored(node)
        if any(n.op not in INPUTS or storage(n) in written for n in given):
            continue
        key = (*given, bind(node)["format"], bind(node)["dtype"])
        if key in found:
            node.replace_all_uses_with(found[key])
            gm.graph.erase_node(node)
            continue
        found[key] = node
        node.meta[WITH_INPUTS] = True
        last = gm.graph.find_nodes(op="placeholder")[-1]
        for n in (node, *(n for n in given if n.op == "get_attr")):
            last.append(n)


def to_readers(gm: GraphModule) -> None:
    """Stand every quantised weight where it is read first; drop those that nobody reads."""
    for node in [n for n in gm.graph.nodes if is_quantized(n)]:
        if node.users:
            min(node.users).prepend(node)
        else:
            gm.graph.erase_node(node)


def may_pack(nodes: list[Node]) -> bool:
    """Whether the data of quantised weights may stand in one buffer, their scales in another and so on: all but the last
    must fill their blocks of rows."""
    facts = {(bind(n)["format"], bind(n)["dtype"], *((value(s).dtype, value(s).shape[1:]) for s in stored(n))) for n in nodes}
    rows = formats.named(bind(nodes[0])["format"]).rows
    return len(facts) == 1 and rows is not None and all(value(bind(n)["data"]).shape[0] % rows == 0 for n in nodes[:-1])
