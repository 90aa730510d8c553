"""Linears of bitsandbytes with weights of four bits: its product with what is stored becomes torch's linear on such a weight.

All that a weight is stored in is an input of the graph already; the table is the format's, for bitsandbytes' product too. The
weight in its own shape becomes an input behind all others, found at each call: bitsandbytes keeps it as a column of bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from gdnfuse import compat, formats
from gdnfuse.dialect import dequantize
from gdnfuse.errors import Refused
from gdnfuse.packing import Inner
from gdnfuse.report.records import Record, Status
from gdnfuse.rewrite.edit import infer, recorded
from gdnfuse.rewrite.graph import kept_meta, op_name, value

PRODUCT = "bitsandbytes.gemm_4bit"
ARGUMENTS = (
    *("A", "B", "shapeB", "absmax", "blocksize", "quant_type"), "bias", "absmax_8bit", "absmax_code", "absmax_offset",
)  # fmt: skip
# Of bitsandbytes' products, by how their names begin: why a projection stays with it, and what to do about it.
STAYS = {
    "bitsandbytes.gemm_4bit": (
        "a format that no kernel here reads where bitsandbytes keeps it, so on a GPU it stays with bitsandbytes' own: for "
        "projections that are fused call gdnfuse.models.keep_four_bit(model) before the first call"
    ),
    "bitsandbytes.gemv_4bit": (
        "a format that nothing here reads, on a CPU a layout that the weight was turned to at a call: there set "
        "support_avx512bf16_for_cpu = False on each Linear4bit before the first call"
    ),
    "bitsandbytes.int8": (
        "a format of which bitsandbytes quantises activations too, but for outliers: load a checkpoint in int8 of "
        "compressed-tensors"
    ),
    # What turns a weight to that format within the call.
    "bitsandbytes.dequantize_blockwise": (
        "a format that nothing here reads, on a CPU turned to another layout at the first call: there set "
        "support_avx512bf16_for_cpu = False on each Linear4bit before that"
    ),
}


def why(called: str) -> str:
    """Why a projection that calls an op of bitsandbytes stays with it, as a sentence; empty for any other op."""
    reason = next((reason for name, reason in STAYS.items() if called.startswith(name)), "")
    return reason and f"A projection is bitsandbytes' {called.removeprefix('bitsandbytes.')}, {reason}."


def to_linears(gm: GraphModule, real: dict[Node, Any]) -> tuple[list[Inner], list[Record]]:
    """Let linears of bitsandbytes' four bits read their weights as quantised ones.

    Args:
        gm: Dynamo's graph, rewritten in place.
        real: the real tensor of every placeholder; that of each new one is added.

    Returns:
        How to find the new inputs at each call, in their order, and a record for each linear that stays bitsandbytes'.
    """
    found: list[Inner] = []
    refused: list[Record] = []
    made: dict[tuple[Node, str], Node] = {}  # new inputs, of weights that several linears read too
    for node in [n for n in gm.graph.nodes if op_name(n) == PRODUCT]:
        given = dict(zip(ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
        try:
            weight = _weight(given["B"], real)
            tensors = _stored(given, weight, real)
        except Refused as e:
            record = recorded(dequantize.op.name, "capture", node, dequantize.op.equation)
            record.status, record.reason, record.at = Status.REFUSED, e.reason, node.name
            refused.append(record)
            continue
        stored = []
        for what in tensors:
            if isinstance(what, Inner):
                if (weight, what.name) not in made:
                    made[weight, what.name] = _input(gm, weight, what, real)
                    found.append(what)
                what = made[weight, what.name]
            stored.append(what)
        data, scale, *more = stored
        x, bias = given["A"], given.get("bias")
        with gm.graph.inserting_before(node):
            arguments = (data, scale, given["quant_type"], value(x).dtype, more)
            as_read = gm.graph.call_function(dequantize.op.overload, arguments)
            linear = gm.graph.call_function(torch.nn.functional.linear, (x, as_read) if bias is None else (x, as_read, bias))
        for new in (as_read, linear):
            new.meta |= kept_meta(node) | {"nn_module_stack": node.meta.get("nn_module_stack", {})}
            new.meta["example_value"] = infer(new)
        node.replace_all_uses_with(linear)
        gm.graph.erase_node(node)
        if isinstance(given["B"], Node) and given["B"] is not weight and not given["B"].users:
            gm.graph.erase_node(given["B"])
    return found, refused


def _weight(b: Any, real: dict[Node, Any]) -> Node:
    """The input whose bytes a product reads, all of them in their order.

    Raises:
        Refused: there is none, or on a GPU.
    """
    weight = b
    while isinstance(weight, Node) and weight.op == "call_method" and weight.target in ("view", "reshape"):
        weight = weight.args[0]
    tensor = real.get(weight)
    if not isinstance(tensor, torch.Tensor) or getattr(tensor, "quant_state", None) is None or not tensor.is_contiguous():
        raise Refused("A weight of bitsandbytes must be a parameter with its state, in its own order, found another.")
    if tensor.device.type != "cpu":
        raise Refused(why(PRODUCT))
    return weight


def _stored(given: dict[str, Any], weight: Node, real: dict[Node, Any]) -> list[Node | Inner]:
    """What the weight of a product is stored in: nodes, or where to find it.

    Raises:
        Refused: it is nothing that its format has.
    """
    M, N = given["shapeB"]
    place = list(real).index(weight)
    if N % 2 or real[weight].nbytes * 2 != M * N:
        raise Refused(f"A weight of bitsandbytes must have whole bytes in each row, found the shape {[M, N]}.")
    if given.get("absmax_8bit") is None:
        scale, nested = given["absmax"], []
    else:
        scale, nested = given["absmax_8bit"], [given["absmax"], given["absmax_code"], given["absmax_offset"]]
    data = Inner(place, "data", (M, N // 2))
    formats.named(given["quant_type"]).check(data.of(real[weight]), *(real.get(n, value(n)) for n in (scale, *nested)))
    return [data, scale, *nested]


def _input(gm: GraphModule, weight: Node, what: Inner, real: dict[Node, Any]) -> Node:
    """A new input behind all others."""
    tensor = what.of(real[weight])
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        new = gm.graph.placeholder(f"{weight.name}_{what.name.replace('.', '_')}")
    mode = getattr(value(weight), "fake_mode", None)
    fake = tensor if mode is None or compat.is_fake(tensor) else compat.fake(mode, tensor)
    new.meta.update(example_value=fake, gdnfuse_real=tensor, gdnfuse_inner=what)
    compat.like_a_parameter(gm, new)
    real[new] = tensor
    return new
