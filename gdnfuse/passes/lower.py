"""lower: each dialect op becomes its kernel or its reference, inlined if a compiler may see it. Linears are packed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from gdnfuse import compat, formats, kernels
from gdnfuse.dialect import add_rms_norm, causal_attention, dequantize, op_of, packed_linear
from gdnfuse.dialect.fused_linear import weight_dtype
from gdnfuse.errors import Refused
from gdnfuse.kernels import tuned
from gdnfuse.kernels.linear_configs import rings, split
from gdnfuse.packing import Inner, PackedWeight, give_own_memory, pack
from gdnfuse.passes import collectives, quantized
from gdnfuse.passes.sdpa import attention_of
from gdnfuse.passes.survey import CHOSEN
from gdnfuse.report.records import Record
from gdnfuse.rewrite.driver import failed
from gdnfuse.rewrite.edit import infer, inserting, recorded
from gdnfuse.rewrite.graph import held, is_plain, kept_meta, op_name, storage, value, writes

EQUATIONS = {"linear": "x·Wᵀ", "scaled_dot_product_attention": causal_attention.op.equation}  # equations of torch's ops
QUANTIZED = ("scales", "format", "zeros")  # arguments of an op that describe quantised weights
LORA = ("lora_A", "lora_B", "lora_parts", "lora_scaling")  # those that describe adapters
MAX_SUM = 7  # terms; Inductor turns a longer sum into a loop with its own kernel


def lower(gm: GraphModule, target: str | None, linears: bool = False, ahead: bool = True) -> list[Record]:
    """Choose an implementation for every dialect op. One record per op says which, and why no other.

    Args:
        gm: rewritten in place, after `pack_weights`.
        target: the device type to assume; None takes it from the tensors of each op.
        linears: whether torch's linears become a kernel too, on a GPU, if it supports them. This is for decode steps, whose
            weights the kernel streams faster than cuBLAS. Torch's causal attention is lowered in any case.
        ahead: start to compile the chosen kernels.
    """
    records = []
    touched = _Touched(gm.graph)
    behind: set[Node] = set()  # nodes that depend on a kernel of ours
    launched: dict[str, tuple[Any, dict[str, Any], list[str], str]] = {}
    for node in gm.graph.nodes:
        if not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
        op, reason = op_of(node.target) if node.op == "call_function" else None, ""
        if op is dequantize.op:
            continue  # after the nodes that may read data and scale themselves
        if op is packed_linear.op and linears:
            name, call = "fused_linear", op.bind(node.args, node.kwargs)
        elif op is not None:
            name, call = op.name, _experts_as_stored(op.bind(node.args, node.kwargs))
            if call.get("scales") and "gate_up" in call:
                node.args, node.kwargs = (), call
        elif linears and op_name(node) == "linear":
            name, call, reason = _linear(node)
        elif op_name(node) == "scaled_dot_product_attention" and len(node.args) >= 3:
            name, (call, reason) = "causal_attention", attention_of(node)
        else:
            continue
        record = recorded(op.name if op else op_name(node), "lower", node, op.equation if op else EQUATIONS[op_name(node)])
        values = _values(call)
        device = target or next(v.device.type for v in values.values() if isinstance(v, torch.Tensor))
        if op is None and device != "cuda":
            continue
        as_it_was = node.target, node.args, node.kwargs, value(node)
        try:
            if reason:
                raise Refused(reason)
            kernel, call = _chosen(name, device, call)
            given = _values(call)
            # Everything before the graph has ended when its first kernel starts. So the other kernels may start early.
            early = {"overlap": True} if node in behind and touched.may_overlap(node, kernel, call) else {}
            key = f"{kernel.name} {compat.tree_map_only(torch.Tensor, _layout, {**given, **early})}"
            if key not in launched:
                with tuned.noting() as choices:
                    plan = kernel.plan(given | early)
                where = next(v.device for v in compat.tree_leaves(given) if isinstance(v, torch.Tensor))
                launched[key] = kernel, given | early, plan, tuned.standing(kernel.measured, choices, where)
            node.target, node.args, node.kwargs = kernel.op, (), {**call, **early}
            if kernel.name == "split_linear":
                _add_up(node, call["parts"], as_it_was[-1].dtype)
            behind.add(node)
            record.chosen = kernel.by
            record.launches, record.measured = launched[key][2:]
            node.meta["gdnfuse_launches"] = len(record.launches) or 1
        except Exception as e:
            if isinstance(e, Refused):
                record.reason = e.reason
            else:
                failed(record, e)
            node.target, node.args, node.kwargs, node.meta["example_value"] = as_it_was
            if op is None:
                record.chosen = "library"
            elif op.inlines(values):
                node.target, record.chosen = op.reference, "reference inlined"
            else:
                record.chosen = "reference called"
        node.meta[CHOSEN] = record.chosen
        records.append(record)
    records += _dequantize(gm)
    if ahead:
        kernels.compile_ahead([(kernel, arguments) for kernel, arguments, *_ in launched.values()])
    return records


def _values(call: dict[str, Any]) -> dict[str, Any]:
    return {k: [value(x) for x in v] if isinstance(v, list | tuple) else value(v) for k, v in call.items()}


def _chosen(name: str, device: str, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The kernel for a call of an op, and how to call it.

    Only kernels that read data and scale get quantised weights. If there is none, everything is left to a compiler, which need
    not write the weight to memory before it reads it.

    Raises:
        Refused: there is none. The sentence is that of the last kernel that was tried.
    """
    stored = _as_stored(call)
    calls = [(name, stored)]
    if name == "fused_linear" and device == "cuda" and (parts := _parts(stored)) > 1:
        split = {k: v for k, v in stored.items() if k in ("x", "weights", *QUANTIZED, *LORA)} | {"parts": parts}
        calls = [("split_linear", split), *(calls if "scales" in stored else [])]
    for attempt, (kind, arguments) in enumerate(calls, 1):
        try:
            return _kernel(kind, device, _values(arguments)), arguments
        except Refused:
            if attempt == len(calls):
                raise
    raise AssertionError("there is always a call to try")


def _as_stored(call: dict[str, Any]) -> dict[str, Any]:
    """The call with data and scales in place of quantised weights, or without those arguments if no weight is quantised.

    Raises:
        Refused: the quantised weights are not first, have different formats, or would have another dtype.
    """
    weights = call.get("weights", ())
    found = [quantized.bind(w) for w in weights if quantized.is_quantized(w)]
    if not found:
        return call if call.get("scales") or "weights" not in call else {k: v for k, v in call.items() if k not in QUANTIZED}
    more, about = [b["more"] or () for b in found], formats.named(found[0]["format"])
    if about.more not in ((), ("zero points",)):
        raise Refused(f"Kernels can read data, scales and zero points only, found {about.about}, with {', '.join(about.more)}.")
    if any(map(quantized.is_quantized, weights[len(found) :])) or len({b["format"] for b in found}) > 1:
        raise Refused("The quantised weights of a linear must come before its plain ones and have one format, found others.")
    if not all(map(quantized.is_weight, weights[: len(found)])):
        raise Refused("A quantised weight must be an input that the graph does not write, found another.")
    made = {
        **call,
        "weights": [b["data"] for b in found] + list(weights[len(found) :]),
        "scales": [b["scale"] for b in found],
        "format": found[0]["format"],
        **({"zeros": [zero for (zero,) in more]} if all(more) else {}),
    }
    v = _values(made)
    dtype = weight_dtype(v["x"], v["weights"], v["scales"], v.get("residual"), v.get("norm_weight"), v.get("gate"))
    if wrong := next((b["dtype"] for b in found if b["dtype"] != dtype), None):
        raise Refused(f"A quantised weight must be used in {dtype}, as kernels make it here, found {wrong}.")
    return made


def _experts_as_stored(call: dict[str, Any]) -> dict[str, Any]:
    """The call of experts with data and scales in place of quantised weights. Any other call is returned unchanged.

    The reference dequantises only the experts that it needs. So this is better than dequantising all, with a kernel or without.
    """
    found: dict[str, dict[str, Any]] = {}
    for names in (("gate_up", "down"), ("shared_gate", "shared_up", "shared_down")):
        weights = {name: call.get(name) for name in names}
        if not all(map(quantized.is_quantized, weights.values())) or not all(map(quantized.is_weight, weights.values())):
            break
        bound = {name: quantized.bind(w) for name, w in weights.items()}
        kinds = {b["format"] for b in (*found.values(), *bound.values())}
        if len(kinds) > 1 or any(b["more"] or b["dtype"] != value(call["x"]).dtype for b in bound.values()):
            break
        found |= bound
    if not found:
        return call
    data = {name: b["data"] for name, b in found.items()}
    return {**call, **data, "scales": [b["scale"] for b in found.values()], "format": found["down"]["format"]}


def _linear(node: Node) -> tuple[str, dict[str, Any], str]:
    """The op that torch's linear may become, its arguments, and why it may not."""
    call = dict(zip(("x", "weights", "bias"), (*node.args, *node.kwargs.values()), strict=False))
    reason = "" if call.pop("bias", None) is None else "The kernel takes no bias, found one."
    return "fused_linear", {**call, "weights": [call["weights"]]}, reason


def _parts(call: dict[str, Any]) -> int:
    """Into how many parts to split the columns of a linear, so that it has enough programs.

    1 if something else than adapters is fused around it.
    """
    beside = ("x", "weights", "gate_activation", *QUANTIZED, *LORA)  # the gate itself is not among them
    if len(call["weights"]) > 1 or any(given for name, given in call.items() if name not in beside):
        return 1
    x, (weight,) = value(call["x"]), map(value, call["weights"])
    if weight.dim() != 2 or not all(isinstance(n, int) for n in (*x.shape, *weight.shape)):
        return 1
    rows, quantised = x.shape[:-1].numel(), bool(call.get("scales"))
    # The ring does not support four bits.
    ring = rings(x if quantised else weight) and not (quantised and weight.dtype in (torch.int32, torch.uint8))
    return split(weight.shape[0], x.shape[-1], rows, ring, quantised)


def _add_up(node: Node, parts: int, dtype: torch.dtype) -> None:
    """Let the readers of a split linear read the sum of its parts, in terms so short that Inductor inlines them."""
    readers, graph, total = list(node.users), node.graph, node
    node.meta["example_value"] = infer(node)
    if [op_of(r.target) for r in readers] == [add_rms_norm.op]:
        call = add_rms_norm.op.bind(readers[0].args, readers[0].kwargs)
        if call["x"] is node and call["residual"] is not node:
            return  # this op adds up the parts itself
    if len(readers) == 1 and collectives.adds_up(readers[0], node):
        return
    with inserting(graph, node):
        steps = [("sum", 0), ("to", dtype)]
        if parts > MAX_SUM:
            steps = [("unflatten", 0, (2, parts // 2)), ("sum", 0), *steps]
        for method, *args in steps:
            total = graph.call_method(method, (total, *args))
            total.meta |= kept_meta(node) | {"example_value": infer(total)}
    for reader in readers:
        reader.replace_input_with(node, total)


class _Touched:
    """Who reads and who writes the memory of a graph's inputs."""

    def __init__(self, graph: Graph):
        self.inputs = Counter(s for n in graph.nodes if n.op in ("placeholder", "get_attr") for s in held(n))
        self.writers: dict[int, set[Node]] = {}
        self.readers: dict[int, set[Node]] = {}
        for node in graph.nodes:
            for s in writes(node):
                self.writers.setdefault(s, set()).add(node)
            for n in node.all_input_nodes:
                for s in held(n) - held(node):
                    self.readers.setdefault(s, set()).add(node)

    def may_overlap(self, node: Node, kernel: Any, call: dict[str, Any]) -> bool:
        """Whether a kernel may start early: what it reads before it waits is an input of the graph, and no other node writes it.

        If the kernel writes it, no other node may read it either, and no other input may share its memory. Otherwise a pass that
        makes writes explicit might give the kernel a copy.
        """
        if "overlap" not in kernel.arg_names:
            return False
        written = writes(node)
        for name in kernel.early:
            for n in compat.tree_leaves(call.get(name)):
                if not isinstance(n, Node):
                    continue
                s = storage(n)
                others = self.writers.get(s, set()) | (self.readers.get(s, set()) if s in written else set())
                if not self.inputs[s] or s in written and self.inputs[s] > 1 or others - {node}:
                    return False
        return True


def _layout(t: torch.Tensor) -> tuple[Any, ...]:
    return (*t.shape, t.stride(), t.dtype)


def _kernel(name: str, device: str, arguments: dict[str, Any]) -> Any:
    if device != "cuda":
        raise Refused(f"A Triton kernel needs a GPU, found tensors on {device}.")
    for x in compat.tree_leaves(arguments):
        if isinstance(x, torch.Tensor) and not is_plain(x):
            raise Refused(f"A Triton kernel needs plain tensors, found a {type(x).__name__}.")
    kernel = kernels.implementations().get(name)
    if kernel is None:
        raise Refused(f"There is no Triton kernel for {name} alone.")
    if any(name in arguments and name not in kernel.arg_names for name in ("scales", "zeros")):
        raise Refused(f"The kernel of {name} must be given plain weights, found {arguments['format']}.")
    kernel.supports(**arguments)
    return kernel


def pack_weights(gm: GraphModule, real: dict[Node, Any], plan: bool = False) -> list[PackedWeight]:
    """Give every op on several weights one packed weight of each kind, as new inputs.

    A packed_linear of one weight becomes torch's linear. Quantised weights of one format become one, with packed data and packed
    scales, if the data fill whole blocks of a scale. Otherwise they stay separate.

    Args:
        gm: rewritten in place. Placeholders without readers stay.
        real: the real tensor of every placeholder that has one.
        plan: do not move weights. Buffers are fake tensors.

    Returns:
        How to find the packed weights at each call, in the order of the new inputs.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    packed: list[PackedWeight] = []

    def packed_input(nodes: list[Node], like: torch.Tensor) -> Node:
        weights = [real[n] if n.op == "placeholder" else _get(gm, n.target) for n in nodes]
        where = zip(nodes, weights, strict=True)
        packed.append(PackedWeight(tuple(_place(n, w, placeholders) for n, w in where)))
        buffer = _planned(weights, like) if plan else pack(weights)
        node = _input(gm, f"packed_weight_{len(packed) - 1}", buffer, like)
        node.meta[quantized.PARTS] = tuple(nodes)
        return node

    for node in list(gm.graph.nodes):
        op = op_of(node.target) if node.op == "call_function" else None
        if op is None or "weights" not in op.arg_names:
            continue
        call = op.bind(node.args, node.kwargs)
        weights: list[Node] = []
        for several, group in itertools.groupby(call["weights"], quantized.is_quantized):
            group = list(group)
            if len(group) == 1 or several and not quantized.may_pack(group):
                weights += group
            elif not several:
                weights.append(packed_input(group, value(node)))
            else:
                bound = [quantized.bind(n) for n in group]
                data, scale, *more = (
                    packed_input(list(parts), value(node)) for parts in zip(*map(quantized.stored, group), strict=True)
                )
                arguments = (data, scale, bound[0]["format"], bound[0]["dtype"], more or None)
                with gm.graph.inserting_before(node):
                    made = gm.graph.call_function(dequantize.op.overload, arguments)
                made.meta |= kept_meta(node) | {"example_value": infer(made), quantized.WITH_INPUTS: True}
                weights.append(made)
        call["weights"] = weights
        if call.get("lora_A"):
            _pack_adapters(call, partial(packed_input, like=value(node)))
        if op is packed_linear.op and len(weights) == 1:
            node.target, node.args, node.kwargs = torch.nn.functional.linear, (call["x"], *weights), {}
        else:
            node.args, node.kwargs = (), call
    if not plan:
        give_own_memory(real.values())
    return packed


def _pack_adapters(call: dict[str, Any], packed_input: Callable[[list[Node]], Node]) -> None:
    """Pack the A's of a linear's adapters into one weight, and consecutive B's of one rank into another."""
    A, B = list(call["lora_A"]), list(call["lora_B"])
    call["lora_A"] = [packed_input(A)] if len(A) > 1 else A
    call["lora_B"], places = [], []
    for _, group in itertools.groupby(B, lambda b: value(b).shape[1]):
        group = list(group)
        starts = itertools.accumulate((value(b).shape[0] for b in group), initial=0)
        places += [(len(call["lora_B"]), start) for _, start in zip(group, starts, strict=False)]
        call["lora_B"].append(packed_input(group) if len(group) > 1 else group[0])
    parts = [list(part) for part in zip(*[iter(call["lora_parts"])] * 5, strict=True)]
    call["lora_parts"] = [n for first, width, row, of, _ in parts for n in (first, width, row, *places[of])]


def _place(node: Node, weight: torch.Tensor, placeholders: list[Node]) -> int | Inner | torch.Tensor:
    """Where a call finds a weight."""
    if node.op != "placeholder":
        return weight
    return node.meta.get("gdnfuse_inner") or placeholders.index(node)


def _planned(weights: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """A fake buffer [ΣMᵢ, N], as weights [Mᵢ, N] would be packed into."""
    first, mode = weights[0], getattr(like, "fake_mode", None)
    with mode or torch.device("meta"):
        return torch.empty(
            (sum(w.shape[0] for w in weights), first.shape[1]), dtype=first.dtype, device=first.device if mode else "meta"
        )


def _input(gm: GraphModule, name: str, tensor: torch.Tensor, like: torch.Tensor) -> Node:
    """A new input after all others, such as Dynamo makes for a parameter."""
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        node = gm.graph.placeholder(name)
    mode = getattr(like, "fake_mode", None)
    fake = tensor if mode is None or compat.is_fake(tensor) else compat.fake(mode, tensor)
    node.meta.update(example_value=fake, gdnfuse_real=tensor)
    compat.like_a_parameter(gm, node)
    return node


def _get(gm: GraphModule, path: str) -> torch.Tensor:
    for part in path.split("."):
        gm = getattr(gm, part)
    return gm


def _dequantize(gm: GraphModule) -> list[Record]:
    """Inline the dequantisation of weights that no kernel reads in their stored form, where they are first read."""
    quantized.to_readers(gm)
    records = []
    for node in gm.graph.find_nodes(op="call_function", target=dequantize.op.overload):
        record = recorded(dequantize.op.name, "lower", node, dequantize.op.equation)
        record.reason = f"No kernel reads this weight of {quantized.bind(node)['format']} as it is stored."
        node.target, record.chosen = dequantize.op.reference, "reference inlined"
        records.append(record)
    return records


def check(gm: GraphModule) -> None:
    """Check the result of the stage: no dialect op is left that a compiler could inline.

    Raises:
        AssertionError: names the op.
    """
    for node in gm.graph.nodes:
        op = op_of(node.target) if node.op == "call_function" else None
        if op is not None:
            arguments = {name: value(x) for name, x in op.bind(node.args, node.kwargs).items()}
            assert not op.inlines(arguments), f"{node} is still the dialect op {op.name}"
