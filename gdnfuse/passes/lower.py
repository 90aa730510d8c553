"""lower: each dialect op becomes its Triton kernel, or its reference, inlined if a compiler may see it; linears are packed."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

from gdnfuse import kernels
from gdnfuse.dialect import op_of, packed_linear
from gdnfuse.packing import PackedWeight, pack
from gdnfuse.report import Record, Refused, Status
from gdnfuse.rewrite.graph import module_stack, op_name, value


def lower(gm: GraphModule, target: str | None, linears: bool = False) -> list[Record]:
    """Choose an implementation for every dialect op. One record per op says which, and why not the other.

    Args:
        gm: rewritten in place, after `pack_weights`.
        target: device type to assume; None takes it from each op's tensors.
        linears: whether the linears that are torch's become a kernel too, on a GPU, where it takes them: those of a decode step,
            whose weights it streams faster than cuBLAS does.
    """
    records = []
    behind: set[Node] = set()  # what depends on a kernel of ours
    launched: dict[str, tuple[Any, dict[str, Any]]] = {}
    for node in gm.graph.nodes:
        if not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
        op = op_of(node.target) if node.op == "call_function" else None
        if op is not None:
            name, call = op.name, op.bind(node.args, node.kwargs)
        elif linears and op_name(node) == "linear":
            name, call = "fused_linear", dict(zip(("x", "weights", "bias"), (*node.args, *node.kwargs.values()), strict=False))
            call["weights"], bias = [call["weights"]], call.pop("bias", None)
        else:
            continue
        record = Record(op.name if op else "linear", "lower", Status.FIRED, node.name, modules=module_stack(node))
        values = {k: [value(x) for x in v] if isinstance(v, list | tuple) else value(v) for k, v in call.items()}
        device = target or next(v.device.type for v in values.values() if isinstance(v, torch.Tensor))
        if op is None and device != "cuda":
            continue
        try:
            if op is None and bias is not None:
                raise Refused("The kernel takes no bias, found one.")
            kernel = _kernel(name, device, values)
            # What came before the graph has ended when its first kernel starts, so the others may start before that one ends.
            early = {"overlap": True} if node in behind and "overlap" in kernel.arg_names else {}
            node.target, node.args, node.kwargs = kernel.op, (), {**call, **early}
            record.chosen = "triton"
            behind.add(node)
            launched.setdefault(
                f"{name} {pytree.tree_map_only(torch.Tensor, _layout, {**values, **early})}", (kernel, values | early)
            )
        except Refused as e:
            record.reason = e.reason
            if op is None:
                record.chosen = "library"
            elif op.inline:
                node.target, record.chosen = op.reference, "reference inlined"
            else:
                record.chosen = "reference called"
        records.append(record)
    kernels.compile_ahead(list(launched.values()))
    return records


def _layout(t: torch.Tensor) -> tuple[Any, ...]:
    return (*t.shape, t.stride(), t.dtype)


def _kernel(name: str, device: str, arguments: dict[str, Any]) -> Any:
    if device != "cuda":
        raise Refused(f"A Triton kernel needs a GPU, found tensors on {device}.")
    kernel = kernels.implementations().get(name)
    if kernel is None:
        raise Refused(f"There is no Triton kernel for {name} alone.")
    kernel.supports(**arguments)
    return kernel


def pack_weights(gm: GraphModule, real: dict[Node, Any]) -> list[PackedWeight]:
    """Give every op on several weights one packed weight, an input behind all others; packed_linear becomes torch's linear.

    Args:
        gm: rewritten in place; placeholders that nobody reads any more stay.
        real: the real tensor of every placeholder that is one.

    Returns:
        How to find the packed weights at each call, in the order of the new inputs.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    packed = []
    for node in list(gm.graph.nodes):
        op = op_of(node.target) if node.op == "call_function" else None
        if op is None or "weights" not in op.arg_names:
            continue
        call = op.bind(node.args, node.kwargs)
        if len(call["weights"]) > 1:
            weights = [real[n] if n.op == "placeholder" else _get(gm, n.target) for n in call["weights"]]
            where = zip(call["weights"], weights, strict=True)
            packed.append(PackedWeight(tuple(placeholders.index(n) if n.op == "placeholder" else w for n, w in where)))
            call["weights"] = [_input(gm, f"packed_weight_{len(packed) - 1}", pack(weights), value(node))]
        if op is packed_linear.op:
            node.target, node.args, node.kwargs = torch.nn.functional.linear, (call["x"], *call["weights"]), {}
        else:
            node.args, node.kwargs = (), call
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
