"""lower: each dialect op becomes its Triton kernel, or its reference, inlined if a compiler may see it; linears are packed."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

from gdnfuse import kernels
from gdnfuse.dialect import op_of
from gdnfuse.packing import PackedWeight, pack
from gdnfuse.report import Record, Refused, Status
from gdnfuse.rewrite.graph import module_stack, op_name, value


def lower(gm: GraphModule, target: str | None) -> list[Record]:
    """Choose an implementation for every dialect op but packed_linear. One record per op says which, and why not the other.

    Args:
        gm: rewritten in place.
        target: device type to assume; None takes it from each op's tensors.
    """
    records = []
    for node in gm.graph.nodes:
        op = op_of(node.target) if node.op == "call_function" else None
        if op is None or op.name == "packed_linear":
            continue
        record = Record(op.name, "lower", Status.FIRED, node.name, modules=module_stack(node))
        arguments = {k: value(v) for k, v in op.bind(node.args, node.kwargs).items()}
        device = target or next(v.device.type for v in arguments.values() if isinstance(v, torch.Tensor))
        try:
            node.target = _kernel(op.name, device, arguments)
            record.chosen = "triton"
        except Refused as e:
            record.reason = e.reason
            if op.inline:
                node.target, record.chosen = op.reference, "reference inlined"
            else:
                record.chosen = "reference called"
        records.append(record)
    return records


def _kernel(name: str, device: str, arguments: dict[str, Any]) -> Any:
    if device != "cuda":
        raise Refused(f"A Triton kernel needs a GPU, found tensors on {device}.")
    kernel = kernels.implementations().get(name)
    if kernel is None:
        raise Refused(f"There is no Triton kernel for {name} alone.")
    kernel.supports(**arguments)
    return kernel.op


def lower_linears(gm: GraphModule, target: str | None) -> list[Record]:
    """On a GPU, linears of one row become the skinny kernel, which streams their weights faster than cuBLAS does.

    Args:
        gm: rewritten in place, after `pack_weights`.
        target: as in `lower`.
    """
    records = []
    for node in gm.graph.nodes:
        if op_name(node) != "linear" or (target or value(node).device.type) != "cuda":
            continue
        record = Record("linear", "lower", Status.FIRED, node.name, modules=module_stack(node))
        x, weight, *bias = [*node.args, *node.kwargs.values()]
        try:
            if any(b is not None for b in bias):
                raise Refused("The skinny kernel takes no bias, found one.")
            kernel = kernels.implementations()["linear"]
            kernel.supports(value(x), value(weight))
            node.target, node.args, node.kwargs = kernel.op, (x, weight), {}
            record.chosen = "triton"
        except Refused as e:
            record.chosen, record.reason = "library", e.reason
        records.append(record)
    return records


def pack_weights(gm: GraphModule, real: dict[Node, Any]) -> list[PackedWeight]:
    """Replace every packed_linear by one linear on a packed weight, which becomes an input behind all others.

    Args:
        gm: rewritten in place; placeholders that nobody reads any more stay.
        real: the real tensor of every placeholder that is one.

    Returns:
        How to find the packed weights at each call, in the order of the new inputs.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    packed = []
    for node in list(gm.graph.nodes):
        if op_name(node) != "gdnfuse.packed_linear":
            continue
        weights = [real[n] if n.op == "placeholder" else _get(gm, n.target) for n in node.args[1]]
        packed.append(
            PackedWeight(
                tuple(
                    placeholders.index(n) if n.op == "placeholder" else w for n, w in zip(node.args[1], weights, strict=True)
                )
            )
        )
        weight = _input(gm, f"packed_weight_{len(packed) - 1}", pack(weights), value(node))
        with gm.graph.inserting_before(node):
            linear = gm.graph.call_function(torch.nn.functional.linear, (node.args[0], weight))
        linear.meta.update(node.meta)
        node.replace_all_uses_with(linear)
        gm.graph.erase_node(node)
    return packed


def _input(gm: GraphModule, name: str, tensor: torch.Tensor, like: torch.Tensor) -> Node:
    """A new input behind all others, such as Dynamo makes for a parameter."""
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        node = gm.graph.placeholder(name)
    mode = getattr(like, "fake_mode", None)
    fake = tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
    # AOTAutograd asks for the source, for the mark by which CUDA graphs take the address as given, and how to treat the sizes.
    node._dynamo_source = ConstantSource(name)
    if context := TracingContext.try_get():
        static = [DimDynamic.STATIC] * tensor.ndim
        context.tensor_to_context[tensor] = StatefulSymbolicContext(static, tensor_source=node._dynamo_source)
    node.meta.update(example_value=fake, gdnfuse_real=tensor, tensor_dict={"_dynamo_static_input_type": "unguarded"})
    return node


def _get(gm: GraphModule, path: str) -> torch.Tensor:
    for part in path.split("."):
        gm = getattr(gm, part)
    return gm


def check(gm: GraphModule) -> None:
    """The spec on the way out: no dialect op is left that a compiler could look into.

    Raises:
        AssertionError: names the op.
    """
    for node in gm.graph.nodes:
        op = op_of(node.target) if node.op == "call_function" else None
        assert op is None or not op.inline, f"{node} is still the dialect op {op.name}"
