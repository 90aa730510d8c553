"""survey: to which block of the model each call of a graph belongs, how many kernels it needs, and how many bytes they move.

It is only for the report. It decides nothing, and leaves only a mark on each call.

The bytes follow one model before and after: each operation that needs a kernel reads each of its tensors once and writes its
results once, as if nothing stayed in a cache. Views are free. An expanded tensor counts the memory that it holds, and a lookup
the rows that it takes. As many experts count as rows are expected to need if they choose independently. What the kernels of one
operation pass to each other is not counted, nor what Inductor will merge. Symbolic sizes have the values of the first call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from gdnfuse import compat
from gdnfuse.dialect import OPS
from gdnfuse.passes import bitsandbytes
from gdnfuse.passes.quantized import PARTS, bind, is_quantized, stored
from gdnfuse.report.records import OUTSIDE, OWN_LIBRARY, BlockReport, GraphReport, Operation, Projection, marks
from gdnfuse.rewrite.graph import (
    calls,
    clean_path,
    computes,
    foreign,
    is_tensor,
    module_stack,
    op_name,
    origin,
    storage,
    tensors_of,
    value,
    writes,
)

CHOSEN = "gdnfuse_chosen"  # key in the meta of a node: the implementation that the lowering chose
LOOKUPS = ("embedding", "index_select", "gather", "getitem")  # they read as much of their largest tensor as they return
PRODUCTS = (
    "scaled_mm",
    "_scaled_mm",
    "_scaled_mm_v2",
    "mm",
    "matmul",
    "addmm",
    "bmm",
)  # ops that a linear may call instead of linear
# What to load instead, by a part of the name of the module's class.
INSTEAD = {
    "gptqmodel": "load a checkpoint of compressed-tensors (W4A16)",
    "nvfp4": "load a checkpoint in FP8",
}
GROUPED = ("_grouped_mm", "grouped_mm")
WRITTEN = {"copy_": 1, "index_copy_": 3, "setitem": 2}  # they write as many bytes as this argument has
SHORT = {
    "bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64", "int64": "i64", "int32": "i32",
    "float8_e4m3fn": "e4m3",
}  # fmt: skip


def op_label(node: Node) -> str:
    """What a call computes, in a word. A dialect op has the same name whether the op, its kernel or its reference is called."""
    if getattr(node.target, "__module__", "").startswith("gdnfuse.dialect."):
        return node.target.__module__.rsplit(".", 1)[1]
    return op_name(node).removeprefix("gdnfuse_triton.").removeprefix("gdnfuse.")


def launches(node: Node) -> int:
    """Kernels that a call needs: those that its Triton kernel launches, or 1 for another op that computes.

    A quantised weight needs none, until the lowering finds that no kernel reads it.
    """
    return 0 if is_quantized(node) else node.meta.get("gdnfuse_launches", int(computes(node)))


@dataclass
class Call:
    """A call at the time of the survey. Inputs are names of calls, or words."""

    operation: Operation
    block: str
    modules: list[str]


@dataclass
class Survey:
    """Every call of a graph, the bytes of its inputs that it needs, and its linears with what their weights are stored in."""

    calls: list[Call]
    limit_bytes: int
    projections: list[tuple[Projection, list[Node]]]

    @property
    def launches(self) -> int:
        return sum(c.operation.kernels for c in self.calls)

    @property
    def bytes(self) -> int:
        return sum(c.operation.bytes for c in self.calls)


def mark_blocks(gm: GraphModule) -> None:
    """Note the path of its block on every call, also for nodes that replace it later. Empty outside all layers.

    A layer is an element of the outermost list of modules. Its blocks are its children with linears in them. What comes before a
    block (a norm), or is computed by the layer after a block (the residual sum), belongs to that block.
    """
    nodes = calls(gm)
    place = {n: _place(module_stack(n)) for n in nodes}
    blocks = {place[n][1] for n in nodes if op_name(n) == "linear"}
    layers: dict[str, list[Node]] = {}
    for n in nodes:
        n.meta["gdnfuse_block"] = ""
        layers.setdefault(place[n][0], []).append(n)
    layers.pop("", None)
    for layer, members in layers.items():
        last, waiting = "", []
        for n in members:
            child = place[n][1]
            if child and child in blocks:
                last = child
            elif child or not last:
                waiting.append(n)
                continue
            for other in (*waiting, n):
                other.meta["gdnfuse_block"] = last
            waiting = []
        for n in waiting:
            n.meta["gdnfuse_block"] = last or layer


def _place(stack: list[str]) -> tuple[str, str]:
    """The paths of the layer and of its child in which a call was traced; empty if there is none."""
    for i, path in enumerate(stack):
        if path.rpartition(".")[2].isdecimal():
            return path, stack[i + 1] if i + 1 < len(stack) else ""
    return "", ""


def take(gm: GraphModule) -> Survey:
    """All calls of a graph after `mark_blocks`, in their current state."""
    reads: dict[Node, int] = {}
    stored: dict[Node, int] = {}
    found = []
    for node in calls(gm):
        if is_quantized(node):
            continue
        kernels = launches(node)
        moved = 0
        if kernels:
            got = {n: _read(node, n) for n in _tensors_of_call(node)}
            put = _written(node)
            moved = sum(got.values()) + sum(put.values())
            for needed, edges in ((reads, got), (stored, put)):
                for n, count in edges.items():
                    base = _base(n)
                    needed[base] = max(needed.get(base, 0), min(count, _nbytes(base)))
        inputs = [n.name if n.op.startswith("call") else f"{_label(n)} {_shape(value(n))}" for n in _tensors(node)]
        operation = Operation(node.name, op_label(node), inputs, _shape(value(node)), kernels, moved, origin(node))
        found.append(Call(operation, node.meta.get("gdnfuse_block", ""), module_stack(node)))
    limit = sum(count for needed in (reads, stored) for n, count in needed.items() if n.op in ("placeholder", "get_attr"))
    return Survey(found, limit, _projections(gm))


def _projections(gm: GraphModule) -> list[tuple[Projection, list[Node]]]:
    """Every linear of the original graph: torch's, and modules of linears that call something else."""
    found: dict[str, tuple[Projection, list[Node]]] = {}
    others: dict[str, tuple[type, list[Node]]] = {}
    for node in calls(gm):
        path = module_stack(node)[-1]
        if op_name(node) == "linear":
            weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
            found.setdefault(f"{path} {weight}", (_projection(path, weight), stored(weight)))
        elif op_name(node) == "gdnfuse.experts":
            call = OPS["experts"].bind(node.args, node.kwargs)
            for name in ("gate_up", "down"):
                found[f"{path} {name}"] = _projection(f"{path}.{name}", call[name]), stored(call[name])
        elif (cls := _module(node)) is not None and _computes_projections(cls):
            others.setdefault(path, (cls, []))[1].append(node)
    known = {projection.paths[0] for projection, _ in found.values()}
    for path, (cls, nodes) in others.items():
        called = next((op_name(n) for n in nodes if foreign(n) or op_name(n) in PRODUCTS), "")
        if path in known or f"{path} gate_up" in found or not called:
            continue
        inputs = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n.op in ("placeholder", "get_attr")))
        weights = [n for n in inputs if is_tensor(n) and compat.of_the_model(n)]
        instead = next((text for name, text in INSTEAD.items() if name in f"{cls.__module__}.{cls.__name__}".lower()), "")
        reason = bitsandbytes.why(called) or (
            f"A projection must be torch's linear on a weight of a known format, found {cls.__name__}, which calls {called}: "
            f"{instead or 'load the model in such a format, or dequantised'}."
        )
        size = sum(map(_nbytes, {storage(n): n for n in weights}.values()))  # one may appear twice
        projection = Projection(path.rpartition(".")[2], cls.__name__, 0, 0, size, OWN_LIBRARY, reason, [path])
        found[path] = projection, []
    return list(found.values())


def _computes_projections(cls: type) -> bool:
    """Whether modules of a class are linears or experts of any library."""
    linear = issubclass(cls, torch.nn.Linear) or cls.__module__.startswith("gptqmodel.") and "Linear" in cls.__name__
    return linear or cls.__name__.endswith("Experts")


def _module(node: Node) -> type | None:
    """The class of the innermost module in which a call was traced."""
    entries = list((node.meta.get("nn_module_stack") or {}).values())
    return entries[-1][1] if entries and isinstance(entries[-1][1], type) else None


def _projection(path: str, weight: Node) -> Projection:
    v, real = value(weight), weight.meta.get("gdnfuse_real")
    fmt, size, reason = str(v.dtype).removeprefix("torch."), sum(map(_nbytes, stored(weight))), ""
    if is_quantized(weight):
        fmt = bind(weight)["format"]
    elif isinstance(real, torch.Tensor) and type(real) not in (torch.Tensor, torch.nn.Parameter) and not compat.is_fake(real):
        fmt, size = type(real).__name__, _stored_bytes(real)
        reason = f"A projection's weight must be plain or of a known format, found a {fmt}: load the model so, or dequantised."
    rows, columns = (int(n) if isinstance(n, int) else 0 for n in v.shape[-2:])
    return Projection(path.rpartition(".")[2], fmt, rows, columns, size, OWN_LIBRARY if reason else "", reason, [path])


def _stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, which may be a subclass made of others."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(_stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def _readers(gm: GraphModule) -> dict[Node, list[Node]]:
    """The readers of each node of a lowered graph, also if it is part of a packed weight or read through dequantisation."""
    found: dict[Node, list[Node]] = {}
    for n in gm.graph.nodes:
        readers = [r for u in n.users for r in (u.users if op_label(u) == "dequantize" else (u,))]
        for part in n.meta.get(PARTS, (n,)):
            found.setdefault(part, []).extend(readers)
    return found


def judge(gm: GraphModule, projections: list[tuple[Projection, list[Node]]]) -> list[Projection]:
    """The projections by kind, with what computes them in a lowered graph."""
    readers = _readers(gm)
    kinds: dict[Any, Projection] = {}
    for p, weights in projections:
        if not p.computed:
            products = [r for w in weights[:1] for r in readers.get(w, ()) if CHOSEN in r.meta or op_name(r) == "linear"]
            p.computed = ", ".join(dict.fromkeys(map(_computed_by, products))) or "library"
        key = (p.name, p.format, p.rows, p.columns, p.bytes, p.computed, p.reason)
        kinds.setdefault(key, replace(p, paths=[])).paths += p.paths
    return list(kinds.values())


def _computed_by(product: Node) -> str:
    quantised = " (activations in e4m3)" if op_label(product) == "fp8_linear" else ""
    return product.meta.get(CHOSEN, "library") + quantised


def _tensors_of_call(node: Node) -> list[Node]:
    """The tensors of a call, with stored tensors in place of quantised weights."""
    return [s for n in node.all_input_nodes if is_tensor(n) for s in stored(n)]


def _tensors(node: Node) -> list[Node]:
    return [s for n in node.all_input_nodes if _bytes_of(value(n)) is not None for s in stored(n)]


def _bytes_of(v: Any) -> int | None:
    """Bytes of the elements of one or several tensors. An expanded axis counts once. None for anything else."""
    tensors = tensors_of(v)
    if not tensors:
        return None
    return sum(
        t.element_size() * math.prod(_size(n) for n, stride in zip(t.shape, t.stride(), strict=True) if not _zero(stride))
        for t in tensors
    )


def _zero(stride: Any) -> bool:
    return isinstance(stride, int) and stride == 0


def _size(size: Any) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint  # None for a size that is known only at run time
    return 1 if hint is None else int(hint)


def _nbytes(node: Any) -> int:
    return (_bytes_of(value(node)) or 0) if isinstance(node, Node) else 0


def _read(node: Node, given: Node) -> int:
    """Bytes that a call reads of one of its tensors."""
    name, size = op_name(node), _nbytes(given)
    if name in WRITTEN and given is node.args[0]:
        return 0
    if name in LOOKUPS and size == max(map(_nbytes, node.all_input_nodes)):
        return min(size, _nbytes(node))
    if name in GROUPED and value(given).ndim == 3:
        return round(size * _needed(value(given).shape[0], value(node.args[0]).shape[-2], 1))
    op = OPS.get(op_label(node))
    if op is not None and "gate_up" in op.arg_names:
        call = op.bind(node.args, node.kwargs)
        if given in (*stored(call["gate_up"]), *stored(call["down"]), *(call.get("scales") or ())):
            top_k = call["top_k"] if "top_k" in call else value(call["indices"]).shape[1]
            return round(size * _needed(value(given).shape[0], value(call["x"]).shape[0], top_k))
    return size


def _needed(experts: Any, rows: Any, top_k: Any) -> float:
    """The share of experts that so many rows are expected to need, if each chooses top_k independently."""
    return 1 - (1 - _size(top_k) / max(_size(experts), 1)) ** _size(rows)


def _written(node: Node) -> dict[Node, int]:
    """Bytes that a call writes, by the node that holds them: the call itself, or an input written in place."""
    name, op = op_name(node), OPS.get(op_label(node))
    if name in WRITTEN:
        source = node.args[WRITTEN[name]]
        return {node.args[0]: _nbytes(source) if is_tensor(source) else _nbytes(node.args[0])}
    made = {node: _nbytes(node)}
    if op is None:
        in_place = name.endswith("_") and writes(node)
        targets = node.args[0] if isinstance(node.args[0], list | tuple) else node.args[:1]
        return {target: _nbytes(target) for target in targets} if in_place else made
    call = op.bind(node.args, node.kwargs)
    if op.name == "attention_decode":  # the rows of the tokens in each
        return made | {call["keys"]: _nbytes(call["k"]), call["values"]: _nbytes(call["v"])}
    return made | {call[name]: _nbytes(call[name]) for name in op.mutates if isinstance(call.get(name), Node)}


def _base(node: Node) -> Node:
    """The node that a node is a view of, through parts, views of parts, and writes."""
    while node.op.startswith("call") and node.all_input_nodes and (op_name(node) in WRITTEN or not computes(node)):
        node = node.all_input_nodes[0]
    return node


def _label(node: Node) -> str:
    """The name of a graph input below its layer ("linear_attn.in_proj_z.weight", "conv_states"), equal in all layers."""
    path = clean_path(compat.source_name(node))
    path = re.sub(r"^.*?\.\d+\.(?=[^\d])", "", path)
    return re.sub(r"([._]\d+)+$", "", path)


def _shape(v: Any) -> str:
    if isinstance(v, torch.Tensor):
        dtype = str(v.dtype).removeprefix("torch.")
        return f"{SHORT.get(dtype, dtype)}[{', '.join(map(str, v.shape))}]"
    return ", ".join(map(_shape, tensors_of(v)))


def fill(report: GraphReport, before: Survey, after: Survey) -> None:
    """Write blocks, structures and sums into a report whose records and layers are complete."""
    report.launches_before, report.launches_after = before.launches, after.launches
    report.bytes_before, report.bytes_after, report.limit_bytes = before.bytes, after.bytes, before.limit_bytes
    gdn = {layer.path: layer for layer in report.layers}
    for record in report.all_records:
        record.block = _home(record.block, record.modules, gdn)
    sides = [_by_block(survey.calls, gdn) for survey in (before, after)]
    known: dict[Any, int] = {}
    for path in dict.fromkeys(path for side in sides for path in side):
        old, new = (side.get(path, []) for side in sides)
        index = re.search(r"(?:^|\.)(\d+)(?=\.|$)", path)
        block = BlockReport(path, path[: index.end()] if index else "", int(index[1]) if index else None)
        block.kind = _kind(path, old, gdn)
        block.marks = marks(r for r in report.all_records if r.block == path)
        outcomes = set(block.marks.values())
        if "fired" in outcomes or "both" in outcomes:
            unfused = any(not layer.fused for p, layer in gdn.items() if _inside(p, path))
            block.fused = "partly" if unfused or outcomes != {"fired"} else "fused"
        block.launches_before, block.launches_after = (sum(c.operation.kernels for c in side) for side in (old, new))
        block.bytes_before, block.bytes_after = (sum(c.operation.bytes for c in side) for side in (old, new))
        block.before, block.after = (_structure(side, known, report.structures) for side in (old, new))
        report.blocks.append(block)


def _by_block(found: list[Call], gdn: Iterable[str]) -> dict[str, list[Call]]:
    blocks: dict[str, list[Call]] = {}
    for c in found:
        blocks.setdefault(_home(c.block, c.modules, gdn), []).append(c)
    return blocks


def _home(block: str, modules: list[str], gdn: Iterable[str]) -> str:
    """The block of a call. A GDN layer is one block, also if it is a layer itself or is in none."""
    inside = next((p for p in modules if p in gdn), None)
    return block if inside is None or (block and _inside(inside, block)) else inside


def _inside(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _kind(path: str, found: list[Call], gdn: Iterable[str]) -> str:
    ops = {c.operation.op for c in found}
    if not path:
        return OUTSIDE
    if any(_inside(p, path) for p in gdn):
        return "linear attention"
    if "topk" in ops:
        return "MoE"
    if ops & {"scaled_dot_product_attention", "softmax"}:
        return "full attention"
    return "MLP" if "linear" in ops else "other"


def _structure(found: list[Call], known: dict[Any, int], structures: list[list[Operation]]) -> int:
    """The index of these operations among the structures. They are added if none is equal except for names and lines."""
    number = {c.operation.name: i for i, c in enumerate(found)}
    outer: dict[str, str] = {}

    def where(given: Any) -> int | str:
        if given in number:
            return number[given]
        return given if " " in given else outer.setdefault(given, f"input {len(outer) + 1}")

    operations = [replace(c.operation, inputs=[where(i) for i in c.operation.inputs]) for c in found]
    key = tuple((o.op, *o.inputs, o.result, o.kernels, o.bytes) for o in operations)
    if key not in known:
        known[key] = len(structures)
        structures.append(operations)
    return known[key]
