"""quantized: where the nodes of quantised weights are placed, and which weights may share a buffer.

A quantised weight is the result of a `dequantize` of inputs. While rules run, it is placed next to the inputs, like a plain
weight. So linears on one input can become one, whatever their weights are made of. After the lowering it is placed where it is
read, so that a dequantised weight is not kept longer than needed.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from gdnfuse import formats
from gdnfuse.dialect import dequantize, op_of
from gdnfuse.rewrite.graph import storage, value, writes

INPUTS = ("placeholder", "get_attr")
PARTS = "gdnfuse_parts"  # key in the meta of a packed input: the inputs that were packed
WITH_INPUTS = "gdnfuse_with_inputs"  # key in the meta of a node


def is_quantized(node: Any) -> bool:
    """Whether a node is a quantised weight."""
    return isinstance(node, Node) and node.op == "call_function" and op_of(node.target) is dequantize.op


def bind(node: Node) -> dict[str, Any]:
    """data, scale, format and dtype of a quantised weight."""
    return dequantize.op.bind(node.args, node.kwargs)


def stored(node: Node) -> list[Node]:
    """The nodes in which a weight is stored: data, scale and what else the format has, or the weight itself if it is plain."""
    if not is_quantized(node):
        return [node]
    bound = bind(node)
    return [bound["data"], bound["scale"], *(bound["more"] or ())]


def is_weight(node: Any) -> bool:
    """Whether a node is an input of the graph, or a quantised weight placed next to its inputs.

    Anything that reads these inputs later, anywhere in the graph, reads the same values.
    """
    return isinstance(node, Node) and (node.op in INPUTS or is_quantized(node) and node.meta.get(WITH_INPUTS, False))


def to_inputs(gm: GraphModule) -> None:
    """Place every quantised weight of the graph next to its inputs, once, unless something writes them."""
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
    """Place every quantised weight where it is first read. Drop those without readers."""
    for node in [n for n in gm.graph.nodes if is_quantized(n)]:
        if node.users:
            min(node.users).prepend(node)
        else:
            gm.graph.erase_node(node)


def may_pack(nodes: list[Node]) -> bool:
    """Whether the data of quantised weights may share a buffer, and their scales another.

    All but the last must fill their blocks of rows.
    """
    facts = {(bind(n)["format"], bind(n)["dtype"], *((value(s).dtype, value(s).shape[1:]) for s in stored(n))) for n in nodes}
    rows = formats.named(bind(nodes[0])["format"]).rows
    return len(facts) == 1 and rows is not None and all(value(bind(n)["data"]).shape[0] % rows == 0 for n in nodes[:-1])
