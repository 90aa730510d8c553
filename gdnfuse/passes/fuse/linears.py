"""What fusions around the linears of a decode step share: any linear of few rows as a call of fused_linear."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch.fx import Node

from gdnfuse.dialect import fused_linear, packed_linear
from gdnfuse.passes.rows import few_rows
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import op_name, value
from gdnfuse.rewrite.rule import Match, tensors_and_numbers

LINEARS = ("linear", "gdnfuse.packed_linear", "gdnfuse.fused_linear")
# Numbers of columns in proofs, because the maths of a fusion does not depend on them.
NARROW, COLUMNS = ("x", "norm_weight", "weights", "lora_A"), 8
LORA = ("lora_A", "lora_B", "lora_parts", "lora_scaling")


def is_linear(node: Any) -> bool:
    """Whether a node is a linear of few rows without bias, with or without fused operations."""
    if op_name(node) not in LINEARS or not few_rows(node):
        return False
    return op_name(node) != "linear" or not any(b is not None for b in (*node.args[2:], *node.kwargs.values()))


def bind(node: Node) -> dict[str, Any]:
    """The arguments of fused_linear that are equivalent to a linear."""
    if op_name(node) == "gdnfuse.fused_linear":
        return fused_linear.op.bind(node.args, node.kwargs)
    if op_name(node) == "gdnfuse.packed_linear":
        bound = packed_linear.op.bind(node.args, node.kwargs)
        return fused_linear.op.bind((bound["x"], bound["weights"]), {})
    return fused_linear.op.bind((node.args[0], [node.args[1]]), {})


@dataclass(frozen=True)
class LinearCall:
    """The fused_linear that replaces a region.

    Attributes:
        numbers: its arguments that are not operands.
        shape: the shape of the result, if it is not that of the linear.
    """

    numbers: dict[str, Any]
    shape: tuple[Any, ...] | None


def linear_match(output: Node, arguments: dict[str, Any], shape: tuple[Any, ...] | None = None) -> Match[LinearCall]:
    """A match that replaces the region of `output` by a fused_linear.

    Args:
        output: as in Match.
        arguments: of fused_linear, by name: nodes, Operands, lists of nodes, numbers, or None.
        shape: the shape to give the result, if it is not that of the linear.
    """
    operands, numbers = tensors_and_numbers(arguments)
    return narrow(Match(operands, [output], LinearCall(numbers, shape)))


def linear_call(m: Match[LinearCall], t: SimpleNamespace) -> Any:
    """The call of fused_linear."""
    y = call(fused_linear.op.overload, **vars(t), **m.facts.numbers)
    return y if m.facts.shape is None else y.reshape(m.facts.shape)


def narrow(m: Match) -> Match:
    """A match with few columns in its linear, for the proof.

    A tensor keeps its size, with everything that it is multiplied with, if x is normalised head by head or if the tensor is also
    another operand.
    """
    roles: dict[Node, set[bool]] = {}
    for name, x in m.operands.items():
        for operand in x if isinstance(x, list) else [x] if x is not None else []:
            roles.setdefault(operand.node, set()).add(name in NARROW)
    if m.operands.get("gate") is None and all(len(kinds) == 1 for kinds in roles.values()):
        m.shapes |= {name: (*value(n).shape[:-1], COLUMNS) for name, n in m.inputs.items() if roles[n] == {True}}
    return m


def few_outputs(m: Match[LinearCall]) -> Match[LinearCall]:
    """A match with few columns in its output, for the proof.

    Only if the whole row of a linear is the output, and no adapter has a part of it.
    """
    if m.operands["lora_A"] is not None:
        return m
    weights = {f"weights_{i}": w.node for i, w in enumerate(m.operands["weights"])}
    known = weights.keys() <= m.shapes.keys() or m.operands["gate"] is not None
    if known and len({*weights.values()}) == len(weights) and m.facts.shape is None:
        m.shapes |= {name: (COLUMNS, *m.shapes.get(name, value(w).shape)[1:]) for name, w in weights.items()}
        if m.operands["residual"] is not None:
            columns = COLUMNS * len(weights) // (2 if m.facts.numbers["swiglu"] else 1)
            m.shapes["residual"] = (*value(m.inputs["residual"]).shape[:-1], columns)
    return m
