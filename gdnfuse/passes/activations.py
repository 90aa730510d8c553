"""activations: linears on e4m3 weights become products of e4m3 (W8A8), if the option `activations` asks for it.

Only linears of many rows do. One with few rows takes as long as its weight takes to be read, so it would gain nothing.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from gdnfuse import kernels
from gdnfuse.dialect import fp8_linear, op_of, packed_linear, quantize_rows
from gdnfuse.errors import Refused
from gdnfuse.passes import quantized
from gdnfuse.passes.rows import FEW_ROWS, few_rows
from gdnfuse.report.records import Record, Status
from gdnfuse.rewrite.edit import infer, recorded
from gdnfuse.rewrite.graph import is_tensor, kept_meta, op_name, value

COLUMNS = {"fp8_block128": 128, "fp8_channel": 0, "fp8_tensor": 0}  # of x that share a scale, by format; 0 for a whole row
MULTIPLE = 128  # of columns
RULE, EQUATION = "activations", "x·Wᵀ = (x₈ · s)·(W₈ · scale)ᵀ"
QUANTISED, LEFT = "e4m3", "the model's dtype"  # what a record says of activations


def to_e4m3(gm: GraphModule, step: bool, target: str | None) -> list[Record]:
    """Quantise the input of every linear of many rows on an e4m3 weight, once for all linears that read it.

    Args:
        gm: rewritten in place, after `pack_weights`.
        step: whether the graph is a step, which stays as it is.
        target: as of `lower`.

    Returns:
        One record for each linear on a quantised weight, which says whether its activations are quantised, and if not why.
        One for all if the graph is a step, or there is no such linear.
    """
    if step:
        return [_about_all("A step of few rows is as fast as its weights are read, so its activations are not quantised.")]
    records: list[Record] = []
    rows: dict[tuple[Node, int], tuple[Node, Node]] = {}
    for node in list(gm.graph.nodes):
        if not any(map(quantized.is_quantized, node.all_input_nodes)) or quantized.is_quantized(node):
            continue
        record = recorded(RULE, "lower", node, EQUATION)
        record.chosen = QUANTISED
        records.append(record)
        try:
            x, weights, bias = _linear(node)
            whole = [_why_not(x, w, target) if quantized.is_quantized(w) else "plain" for w in weights]
            if reason := next((why for why in whole if why and why != "plain"), ""):
                raise Refused(reason)
        except Refused as e:
            record.chosen, record.reason = LEFT, e.reason
            continue
        with gm.graph.inserting_before(node):
            parts = [_product(node, x, w, rows) if quantized.is_quantized(w) else _plain(node, x, w) for w in weights]
            if bias is not None:
                parts = [_made(node, operator.add, part, bias) for part in parts]
        _replace(node, parts)
    return records or [_about_all("Activations are quantised for linears whose weights are e4m3, found none in this graph.")]


def _about_all(reason: str) -> Record:
    return Record(RULE, "lower", Status.FIRED, "", EQUATION, chosen=LEFT, reason=reason)


def _linear(node: Node) -> tuple[Node, list[Node], Any]:
    """Input, weights and bias of a linear or of a packed one.

    Raises:
        Refused: the node is something else.
    """
    if op_name(node) == "linear":
        found = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        if is_tensor(found["input"]) and quantized.is_quantized(found["weight"]):
            return found["input"], [found["weight"]], found.get("bias")
    elif op_of(node.target) is packed_linear.op:
        call = packed_linear.op.bind(node.args, node.kwargs)
        return call["x"], list(call["weights"]), None
    raise Refused(f"Activations are quantised for linears, found {op_name(node).removeprefix('gdnfuse.')}.")


def _why_not(x: Node, weight: Node, target: str | None) -> str:
    """Why the input of a linear is not quantised; empty if it is."""
    bound, v = quantized.bind(weight), value(x)
    if bound["format"] not in COLUMNS:
        return f"Activations are quantised for weights of {', '.join(COLUMNS)}, found {bound['format']}."
    if few_rows(x):
        return f"Activations are quantised for more than {FEW_ROWS} rows, found {v.shape[:-1].numel()}."
    if not isinstance(v.shape[-1], int) or v.shape[-1] % MULTIPLE:
        return f"Activations are quantised in rows of a multiple of {MULTIPLE} columns, found {v.shape[-1]}."
    if (target or v.device.type) != "cuda":
        return ""  # the reference
    data, scale = value(bound["data"]), value(bound["scale"])
    with getattr(v, "fake_mode", None) or contextlib.nullcontext():
        made = quantize_rows.fake(v, _columns(bound, v))
    try:
        kernels.implementations()["fp8_linear"].supports(*made, data, scale, bound["format"], bound["dtype"])
    except Refused as e:
        return e.reason
    return ""


def _columns(bound: dict[str, Any], x: torch.Tensor) -> int:
    return COLUMNS[bound["format"]] or x.shape[-1]


def _product(node: Node, x: Node, weight: Node, rows: dict[tuple[Node, int], tuple[Node, Node]]) -> Node:
    """The product with a quantised weight. `rows` has the inputs that are quantised already."""
    bound = quantized.bind(weight)
    key = x, _columns(bound, value(x))
    if key not in rows:
        both = _made(node, quantize_rows.op.overload, *key)
        rows[key] = _made(node, operator.getitem, both, 0), _made(node, operator.getitem, both, 1)
    return _made(node, fp8_linear.op.overload, *rows[key], bound["data"], bound["scale"], bound["format"], bound["dtype"])


def _plain(node: Node, x: Node, weight: Node) -> Node:
    return _made(node, torch.nn.functional.linear, x, weight)


def _made(node: Node, target: Any, *args: Any) -> Node:
    """A new node at the graph's place, in the part of the model that `node` is in."""
    made = node.graph.call_function(target, args)
    made.meta |= kept_meta(node)
    made.meta["example_value"] = infer(made)
    return made


def _replace(node: Node, parts: list[Node]) -> None:
    """Let the readers of a linear read its parts. Where each reads a piece of one part, nothing is copied to one row."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + value(part).shape[-1])
    pieces = {user: _piece(user, node, starts) for user in node.users} if len(parts) > 1 else {}
    if None not in pieces.values():
        for user, (of, start, width) in pieces.items():
            user.args = (parts[of], -1, start, width)
    if node.users:
        with node.graph.inserting_before(node):
            row = parts[0] if len(parts) == 1 else _made(node, torch.cat, parts, -1)
        node.replace_all_uses_with(row)
    node.graph.erase_node(node)


def _piece(user: Node, node: Node, starts: list[int]) -> tuple[int, int, int] | None:
    """The part of a row that a reader takes with `narrow`, where it starts in that part, and its width; None if it does not."""
    if op_name(user) != "narrow" or user.args[0] is not node or len(user.args) != 4 or user.args[1] != -1:
        return None
    _, _, start, width = user.args
    of = max(i for i, first in enumerate(starts[:-1]) if first <= start)
    return (of, start - starts[of], width) if start + width <= starts[of + 1] else None
