"""subclasses: weights that are tensor subclasses made of plain tensors, as in torchao.

Those of a known format become quantised weights. Dynamo passes the subclass as one input. Its inner tensors become new inputs,
found at each call. So such a weight may be replaced or changed like any other.
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
from gdnfuse.rewrite.graph import is_tensor, kept_meta, op_name, value

# Attributes of torchao's weights that mean more than a weight: activations are quantised or scaled too.
MORE = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")
# What to do about other formats.
INT4 = "each packing of torchao has the order of one of its kernels, so load int4 from a checkpoint of compressed-tensors (W4A16)"
OTHER = "quantise only weights, with a scale per row"
KINDS = {"Int8Tensor": "int8", "Float8Tensor": "fp8"}


def is_subclass(tensor: Any) -> bool:
    """Whether a tensor is made of other tensors."""
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "__tensor_flatten__") and not compat.is_fake(tensor)


def format_of(weight: torch.Tensor) -> str:
    """The format of a weight that is a subclass. Its inner tensors are then `qdata` and `scale`.

    Raises:
        Refused: the format is not known here.
    """
    cls = type(weight)
    if cls.__name__ not in KINDS or not cls.__module__.startswith("torchao."):
        known = " and ".join(KINDS)
        instead = INT4 if cls.__name__.startswith("Int4") else OTHER
        raise Refused(
            f"A weight that is a subclass must be one of torchao's {known}, found {cls.__module__}.{cls.__name__}: {instead}."
        )
    if held := [name for name in MORE if getattr(weight, name, None) is not None]:
        raise Refused(f"A weight of torchao must have no quantised activations, found {cls.__name__} with {held[0]}.")
    kind, block, (M, N) = KINDS[cls.__name__], list(weight.block_size), weight.qdata.shape
    zero = getattr(weight, "zero_point", None)
    if block == [1, N]:
        name = f"{kind}_channel"
    elif block == [M, N] and kind == "fp8":
        name = "fp8_tensor"
    else:
        raise Refused(f"A weight of torchao's {cls.__name__} must have a scale per row, found one per block of {block}.")
    if zero is not None and not zero.is_meta and zero.any():
        raise Refused(f"A weight of torchao's {cls.__name__} must be symmetric, found zero points.")
    formats.named(name).check(weight.qdata, weight.scale)
    return name


def unwrap(gm: GraphModule, real: dict[Node, Any]) -> tuple[list[Inner], list[Record]]:
    """Let linears read weights that are subclasses as data and scale.

    Args:
        gm: Dynamo's graph, rewritten in place.
        real: the real tensor of every placeholder. New ones are added.

    Returns:
        How to find the new inputs at each call, in order, and a record for each linear whose weight is not read.
    """
    found: list[Inner] = []
    refused: list[Record] = []
    for i, (node, tensor) in enumerate(list(real.items())):
        linears = [n for n in node.users if op_name(n) == "linear" and len(n.args) > 1 and n.args[1] is node]
        if not is_subclass(tensor) or not linears:
            continue
        try:
            name = format_of(tensor)
        except Refused as e:
            for n in linears:
                record = recorded(dequantize.op.name, "capture", n, dequantize.op.equation)
                record.status, record.reason, record.at = Status.REFUSED, e.reason, n.name
                refused.append(record)
            continue
        stored = []
        for attribute in ("qdata", "scale"):
            inner = getattr(tensor, attribute)
            with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
                stored.append(new := gm.graph.placeholder(f"{node.name}_{attribute}"))
            fake = getattr(value(node), attribute)
            new.meta.update(example_value=fake, gdnfuse_real=inner, gdnfuse_inner=Inner(i, attribute))
            compat.like_a_parameter(gm, new)
            real[new] = inner
            found.append(new.meta["gdnfuse_inner"])
        for n in linears:
            x = n.args[0]
            dtype = value(x).dtype if is_tensor(x) else tensor.dtype
            with gm.graph.inserting_before(n):
                weight = gm.graph.call_function(dequantize.op.overload, (*stored, name, dtype))
            weight.meta |= kept_meta(n) | {"nn_module_stack": n.meta.get("nn_module_stack", {})}
            weight.meta["example_value"] = infer(weight)
            n.update_arg(1, weight)
    return found, refused
