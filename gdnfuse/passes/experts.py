"""What rules about experts share: a match of experts, with or without their router, and the call that replaces them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from gdnfuse.dialect import DialectOp, experts, op_of, routed_experts
from gdnfuse.errors import Refused
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import chain, is_cast, is_tensor, op_name, peel, real_users, same, source, value
from gdnfuse.rewrite.rule import Match, Operand

OPS = (experts.op, routed_experts.op)
# Sizes in proofs: experts, columns inside them, and columns inside the shared one. Those of a model would take gigabytes.
FEW, WIDTH, SHARED = 4, 2, 3


@dataclass(frozen=True)
class Facts:
    """The op to call, its arguments that are not tensors, and the shape of the result if it is not [N, H]."""

    op: DialectOp
    constants: dict[str, Any]
    shape: tuple[Any, ...] | None


def op_of_experts(node: Any) -> DialectOp | None:
    op = op_of(node.target) if isinstance(node, Node) and node.op == "call_function" else None
    return op if op in OPS else None


def bind(node: Node) -> dict[str, Any]:
    return op_of_experts(node).bind(node.args, node.kwargs)


def as_rows(node: Node, like: torch.Tensor, what: str) -> Operand:
    """A tensor [..., H] as rows [N, H].

    Raises:
        Refused: the number of elements or the dtype is different.
    """
    v = value(node)
    if not same(v.numel(), like.numel()) or not same(v.shape[-1], like.shape[-1]) or v.dtype != like.dtype:
        found = f"{list(v.shape)} of {v.dtype}"
        raise Refused(f"{what} must be like the experts' rows, {list(like.shape)} of {like.dtype}, found {found}.", at=node)
    return Operand(node) if v.ndim == 2 else Operand(node, lambda x: x.flatten(0, -2))


def rows_of(node: Node) -> Operand:
    """The rows of experts, as the tensor that they are a view of. Others may read that tensor or another view of it."""
    nodes = list(itertools.takewhile(lambda n: not is_cast(n), chain(node)[:-1]))
    return as_rows(source(nodes[-1]) if nodes else node, value(node), "What experts read")


def experts_match(output: Node, op: DialectOp, arguments: dict[str, Any]) -> Match[Facts]:
    """A match that replaces what `output` computes by a call of `op`. Arguments are nodes, Operands, numbers or None."""
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Node | Operand)}
    constants = {name: x for name, x in arguments.items() if name not in tensors}
    rows, out = value(arguments["gate_up"]).shape[2], value(output)
    E = max(FEW, constants.get("top_k", 0))
    narrow = {
        "router": (E, rows), "gate_up": (E, 2 * WIDTH, rows), "down": (E, rows, WIDTH),
        "shared_gate": (SHARED, rows), "shared_up": (SHARED, rows), "shared_down": (rows, SHARED),
    }  # fmt: skip
    return Match(
        tensors,
        [output],
        Facts(op, constants, None if out.ndim == 2 else tuple(out.shape)),
        samplers={"indices": _indices},
        shapes={name: shape for name, shape in narrow.items() if name in tensors},
    )


def experts_call(m: Match[Facts], t: Any) -> Any:
    """The call of the op."""
    y = call(m.facts.op.overload, **vars(t), **m.facts.constants)
    return y if m.facts.shape is None else y.reshape(m.facts.shape)


def sum_of(experts_node: Node) -> tuple[Node, Node] | None:
    """The sum of experts and another tensor, if it is the first reader of the experts, and that tensor; None if there is none."""
    root = next(iter(real_users(experts_node)), None)
    if op_name(root) != "add" or len(root.args) != 2 or root.kwargs:
        return None
    others = [n for n in root.args if peel(n) is not experts_node]
    return (root, others[0]) if len(others) == 1 and is_tensor(others[0]) else None


def _indices(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, FEW, shape, generator=generator)
