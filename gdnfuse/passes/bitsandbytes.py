"""Linears of bitsandbytes with weights of four bits: its product becomes torch's linear on a quantised weight.

Everything that such a weight stores is already an input of the graph. The table is that of the format, which bitsandbytes'
product uses too. bitsandbytes keeps the weight as a column of bytes. The weight in its own shape becomes a new input, found at
each call.
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
# By the prefix of the name of bitsandbytes' product: why a projection is left to it, and what to do about it.
STAYS = {
    "bitsandbytes.gemm_4bit": (
        "a format that no kernel here reads in bitsandbytes' own layout, so on a GPU bitsandbytes computes it: call "
        "gdnfuse.models.keep_four_bit(model) before the first call"
    ),
    "bitsandbytes.gemv_4bit": (
        "a format that gdnfuse does not read, on a CPU a layout that bitsandbytes made at a call: there set "
        "support_avx512bf16_for_cpu = False on each Linear4bit before the first call"
    ),
    "bitsandbytes.int8": (
        "a format for which bitsandbytes also quantises activations, except outliers: load a checkpoint in int8 of "
        "compressed-tensors"
    ),
    # Ops that convert a weight to that format within the call.
    "bitsandbytes.dequantize_blockwise": (
        "a format that gdnfuse does not read, on a CPU in another layout since the first call: there set "
        "support_avx512bf16_for_cpu = False on each Linear4bit before that"
    ),
}


def why(called: str) -> str:
    """Why a projection that calls an op of bitsandbytes is left to it, as a sentence. Empty for any other op."""
    reason = next((reason for name, reason in STAYS.items() if called.startswith(name)), "")
    return reason and f"A projection is bitsandbytes' {called.removeprefix('bitsandbytes.')}, {reason}."


def to_linears(gm: GraphModule, real: dict[Node, Any]) -> tuple[list[Inner], list[Record]]:
    """Turn linears of bitsandbytes' four bits into linears on quantised weights.

    Args:
        gm: Dynamo's graph, rewritten in place.
        real: the real tensor of every placeholder. New placeholders are added.

    Returns:
        How to find the new inputs at each call, in order, and a record for each linear that is left to bitsandbytes.
    """
    found: list[Inner] = []
    refused: list[Record] = []
    made: dict[tuple[Node, str], Node] = {}  # new inputs; several linears may read one
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
    """The input whose bytes a product reads, all of them in order.

    Raises:
        Refused: there is none, or it is on a GPU.
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
    """What the weight of a product is stored in: nodes, or where to find them.

    Raises:
        Refused: the format does not have it.
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
    """A new input after all others."""
    tensor = what.of(real[weight])
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        new = gm.graph.placeholder(f"{weight.name}_{what.name.replace('.', '_')}")
    mode = getattr(value(weight), "fake_mode", None)
    fake = tensor if mode is None or compat.is_fake(tensor) else compat.fake(mode, tensor)
    new.meta.update(example_value=fake, gdnfuse_real=tensor, gdnfuse_inner=what)
    compat.like_a_parameter(gm, new)
    real[new] = tensor
    return new
