"""What fusions around the linears of a decode step share: any linear of few rows as a call of fused_linear."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch.fx import Node

from gdnfuse.dialect import DialectOp, fused_linear, packed_linear
from gdnfuse.errors import Refused
from gdnfuse.passes.rows import few_rows
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import op_name, real_users, value
from gdnfuse.rewrite.rule import Match, Operand

LINEARS = ("linear", "gdnfuse.packed_linear", "gdnfuse.fused_linear")
# In proofs these have so many columns: no constant of a fusion depends on how many there are.
NARROW, COLUMNS = ("x", "norm_weight", "weights"), 8


def is_linear(node: Any) -> bool:
    """A bias-free linear of few rows, with or without what was fused into it."""
    if op_name(node) not in LINEARS or not few_rows(node):
        return False
    return op_name(node) != "linear" or not any(b is not None for b in (*node.args[2:], *node.kwargs.values()))


def bind(node: Node) -> dict[str, Any]:
    """The arguments of fused_linear that mean what a linear does."""
    if op_name(node) == "gdnfuse.fused_linear":
        return fused_linear.op.bind(node.args, node.kwargs)
    if op_name(node) == "gdnfuse.packed_linear":
        bound = packed_linear.op.bind(node.args, node.kwargs)
        return fused_linear.op.bind((bound["x"], bound["weights"]), {})
    return fused_linear.op.bind((node.args[0], [node.args[1]]), {})


def alone(node: Node, reader: Node) -> None:
    """Raises Refused unless nothing but `reader` reads what `node` computes: what is fused away must not be computed twice."""
    others = [u for u in real_users(node) if u is not reader]
    if others:
        raise Refused(f"{node.name} must be read by {reader.name} alone, found that {others[0].name} reads it too.", at=others[0])


def arguments_match(outputs: list[Node], calls: dict[str, tuple[DialectOp, dict[str, Any]]], **options: Any) -> Match:
    """A match whose inputs are all tensors among the arguments of the calls that will take the region's place.

    Args:
        outputs: as of Match.
        calls: by label, ops with their arguments: nodes, Operands, lists of nodes, numbers, or None.
        options: further attributes of Match.
    """
    names: dict[Node, str] = {}
    narrow: dict[Node, set[bool]] = {}
    for label, (_, arguments) in calls.items():
        for name, x in arguments.items():
            for i, item in enumerate(x if isinstance(x, list | tuple) else [x]):
                node = item.node if isinstance(item, Operand) else item
                if isinstance(node, Node):
                    names.setdefault(node, f"{label}_{name}_{i}")
                    heads = arguments.get("gate", None) is not None or "norm_weight" in arguments and "x" not in arguments
                    narrow.setdefault(node, set()).add(name in NARROW and not heads)
    # A tensor in two roles keeps its size, and with it all that it is multiplied with.
    mixed = any(len(roles) > 1 for roles in narrow.values())
    shapes = {names[n]: (*value(n).shape[:-1], COLUMNS) for n, roles in narrow.items() if roles == {True} and not mixed}
    inputs = {name: node for node, name in names.items()}
    return Match(inputs, outputs, data={"calls": calls, "names": names}, shapes=shapes, **options)


def few_outputs(m: Match, bound: dict[str, Any]) -> Match:
    """Where the whole row of a linear is an output, a few columns of it prove as much."""
    names, weights = m.data["names"], bound["weights"]
    residual = bound["residual"].node if isinstance(bound["residual"], Operand) else bound["residual"]
    whole = [n for n in weights if names[n] not in m.shapes]
    if (not whole or bound["gate"] is not None) and len({*weights}) == len(weights) and m.data.get("shape") is None:
        m.shapes |= {names[w]: (COLUMNS, *m.shapes.get(names[w], value(w).shape)[1:]) for w in weights}
        if residual is not None:
            columns = COLUMNS * len(weights) // (2 if bound["swiglu"] else 1)
            m.shapes[names[residual]] = (*value(residual).shape[:-1], columns)
    return m


def arguments_of(m: Match, t: SimpleNamespace, label: str) -> dict[str, Any]:
    """The arguments of one of the calls of `arguments_match`, tensors in their places."""

    def given(item: Any) -> Any:
        if isinstance(item, Operand):
            return item.how(given(item.node))
        return getattr(t, m.data["names"][item]) if isinstance(item, Node) else item

    _, arguments = m.data["calls"][label]
    return {name: [given(y) for y in x] if isinstance(x, list | tuple) else given(x) for name, x in arguments.items()}


def fused_call(m: Match, t: SimpleNamespace, label: str = "y", **more: Any) -> Any:
    """The call itself."""
    op, _ = m.data["calls"][label]
    return call(op.overload, **arguments_of(m, t, label), **more)
