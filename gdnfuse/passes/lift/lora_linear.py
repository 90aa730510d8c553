"""x·Wᵀ + s·(x·Aᵀ)·Bᵀ, a projection with active low-rank adapters  →  fused_linear(x, W, lora_A, lora_B), for few rows

Siblings become one linear, as without adapters, and everything around linears is fused as without them. The A's of adapters
become another linear. So the weights of the base are packed alone, whichever adapters are active.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch.fx import Node

from gdnfuse import packing
from gdnfuse.dialect import fused_linear, packed_linear
from gdnfuse.errors import Refused
from gdnfuse.passes.adapters import biased, input_of, is_scaled, loose, why
from gdnfuse.passes.quantized import is_quantized, is_weight
from gdnfuse.passes.rows import few_rows
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.evaluate import hint
from gdnfuse.rewrite.graph import is_cast, is_tensor, op_name, peel, value
from gdnfuse.rewrite.rule import Match, Rule

OTHER = "gdnfuse_other_adapter"  # key in the meta of a node: why an adapter is not fused


@dataclass(frozen=True)
class Adapter:
    """One adapter of a projection: the nodes of A, B and A·x, and its scaling."""

    A: Node
    B: Node
    low: Node
    scaling: float


@dataclass
class Projection:
    """Columns of a row of linears on one input.

    Attributes:
        weight: the weight of the projection.
        row: the columns as the linears give them.
        result: the columns with what adapters add.
        adapters: the adapters, in order.
    """

    weight: Node
    row: Node
    result: Node
    adapters: list[Adapter] = field(default_factory=list)


@dataclass(frozen=True)
class Facts:
    """What is known about the match.

    Attributes:
        widths: widths of the projections, in order.
        parts, scaling: of the adapters, as arguments of fused_linear.
    """

    widths: list[int]
    parts: list[int]
    scaling: list[float]


class LiftLoRALinear(Rule[Facts]):
    name, stage, equation = "lora_linear", "lift", "x·Wᵀ + s·(x·Aᵀ)·Bᵀ = fused_linear(x, W, A, B, s)"

    def anchors(self, graph):
        """Linears of few rows with LoRA adapters, and B·A·x of each adapter of another kind."""
        taken = set()
        for node in [n for n in graph.nodes if _is_base(n)]:
            if lows := {a.low for p in _projections(node) for a in p.adapters}:
                taken |= lows
                yield node
        for adapter in loose(graph, taken):
            adapter.up.meta[OTHER] = why(adapter)
            yield adapter.up

    def match(self, anchor):
        if OTHER in anchor.meta:
            raise anchor.meta[OTHER]
        x, found = input_of(anchor), _projections(anchor)
        lows = {a.low for p in found for a in p.adapters}
        base = [p for p in found if p.row not in lows]
        for p in base:
            if p.adapters:
                _check(p, value(anchor))
        # A's are in the order in which they are packed for several rows. B's are those of the first adapter of each projection,
        # then of the second, and so on. So if an adapter is added, the others are already packed.
        adapters = [(p, i, a) for p in base for i, a in enumerate(p.adapters)]
        starts = dict(zip((a.low for *_, a in adapters), accumulate(value(a.A).shape[0] for *_, a in adapters), strict=True))
        adapters.sort(key=lambda found: found[1])
        columns = dict(zip((p.row for p in base), accumulate((value(p.weight).shape[0] for p in base), initial=0), strict=False))
        parts = []
        for i, (p, _, a) in enumerate(adapters):
            parts += [columns[p.row], value(p.weight).shape[0], starts[a.low] - value(a.A).shape[0], i, 0]
        operands = {"x": x, "weights": [p.weight for p in base]}
        operands |= {"lora_A": [a.A for p in base for a in p.adapters], "lora_B": [a.B for *_, a in adapters]}
        _require_different_weights(operands, anchor)
        m = Match(
            operands,
            [p.result for p in base],
            Facts([value(p.weight).shape[0] for p in base], parts, [a.scaling for *_, a in adapters]),
        )
        # The maths does not depend on the width of the input, so the proof uses a few columns.
        m.shapes |= {
            name: (*(hint(s) for s in value(n).shape[:-1]), 8) for name, n in m.inputs.items() if not name.startswith("lora_B")
        }
        return m

    def rewrite(self, m, t):
        row = call(fused_linear.op.overload, **vars(t), lora_parts=m.facts.parts, lora_scaling=m.facts.scaling)
        if len(m.facts.widths) == 1:
            return row
        starts = accumulate(m.facts.widths, initial=0)
        return tuple(row.narrow(-1, start, width) for start, width in zip(starts, m.facts.widths, strict=False))


def _is_base(node: Any) -> bool:
    """Whether a node is a linear of few rows, or several packed ones."""
    return (op_name(node) == "gdnfuse.packed_linear" or _is_plain(node)) and few_rows(node)


def _is_plain(node: Any) -> bool:
    """Whether a node is a linear without bias on an input weight."""
    return op_name(node) == "linear" and len(node.args) > 1 and not biased(node) and is_weight(node.args[1])


def _pieces(base: Node) -> list[tuple[Node, Node]]:
    """The weights of a base's linears and the columns of each."""
    if op_name(base) != "gdnfuse.packed_linear":
        return [(base.args[1], base)]
    weights, start, found = packed_linear.op.bind(base.args, base.kwargs)["weights"], 0, []
    pieces = {n.args[2:]: n for n in base.users if op_name(n) == "narrow" and n.args[1] == -1}
    for weight in weights:
        width = value(weight).shape[0]
        if (piece := pieces.get((start, width))) is not None:
            found.append((weight, piece))
        start += width
    return found if len(found) == len(weights) == len(base.users) else []


def _projections(base: Node) -> list[Projection]:
    """The projections of a base, each with its adapters. A's that are packed with the base are among them."""
    x, found = peel(input_of(base)), []
    for weight, row in _pieces(base):
        p = Projection(weight, row, row)
        while (added := _added(p.result, x)) is not None:
            p.result = added[0]
            p.adapters.append(added[1])
        back = list(p.result.users)
        if p.adapters and value(p.result).dtype != value(row).dtype and len(back) == 1 and is_cast(back[0]):
            p.result = back[0]
        found.append(p)
    return found


def _added(y: Node, x: Node) -> tuple[Node, Adapter] | None:
    """The sum that adds an adapter of x to columns and is their only reader, and the adapter."""
    readers = list(y.users)
    if len(readers) != 1 or op_name(readers[0]) != "add" or len(readers[0].args) != 2 or readers[0].kwargs:
        return None
    (total,) = readers
    delta = total.args[1] if total.args[0] is y else total.args[0]
    scaling, up = 1.0, delta
    while is_scaled(up):
        scaling, up = scaling * up.args[1], up.args[0]
    if delta is y or not _is_plain(up):
        return None
    low, B = up.args[:2]
    source = low.args[0] if op_name(low) == "narrow" else low
    if len(low.users) > 1 or not _is_base(source) or peel(input_of(source)) is not x:
        return None
    A = next((weight for weight, piece in _pieces(source) if piece is low), None)
    return None if A is None else (total, Adapter(A, B, low, scaling))


def _check(p: Projection, row: torch.Tensor) -> None:
    """Refuse a projection with adapters of another kind, or with adapters that may not be packed."""
    if value(p.result).dtype != row.dtype:
        raise Refused(f"A projection with adapters must be {row.dtype} again, found {value(p.result).dtype}.", at=p.result)
    for a in p.adapters:
        for weight in (a.A, a.B):
            v = value(weight)
            if is_quantized(weight) or not is_tensor(weight) or not all(isinstance(s, int) for s in v.shape):
                raise Refused(f"A and B of an adapter must be plain weights of static shape, found {weight.name}.", at=weight)
            if v.ndim != 2 or not v.is_contiguous() or v.device != row.device:
                raise Refused(f"A and B of an adapter must be contiguous matrices on {row.device}, found others.", at=weight)
            packing.check([weight.meta.get("gdnfuse_real", v)])


def _require_different_weights(operands: dict[str, Any], anchor: Node) -> None:
    """Refuse repeated weights, quantised base weights, and adapters of several dtypes."""
    weights = [*operands["weights"], *operands["lora_A"], *operands["lora_B"]]
    if len({*weights}) < len(weights):
        raise Refused("Each projection and adapter must have weights of its own, found one twice.", at=anchor)
    if quantised := [w for w in operands["weights"] if is_quantized(w)]:
        raise Refused(f"Adapters must be on plain weights to be fused with them, found {quantised[0].name}.", at=anchor)
    dtypes = {value(w).dtype for name in ("lora_A", "lora_B") for w in operands[name]}
    if len(dtypes) > 1:
        found = " and ".join(sorted(str(d) for d in dtypes))
        raise Refused(f"Adapters on one input must be of one dtype, found {found}.", at=anchor)


RULE = LiftLoRALinear()
