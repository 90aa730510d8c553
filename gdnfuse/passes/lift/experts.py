"""experts computed by grouped or batched products, as transformers' grouped_mm and batched_mm are traced  →  gdnfuse.experts

Capture replaces them before they are traced. This rule is for graphs without capture, and for your own code.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.fx import Node

from gdnfuse.dialect import experts
from gdnfuse.errors import Refused
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import chain, is_cast, is_tensor, op_name, peel, same, same_shape, value
from gdnfuse.rewrite.pattern import Alt, Mismatch, Op, Var
from gdnfuse.rewrite.rule import Match, Rule

GROUPED = "_grouped_mm|grouped_mm|transformers.grouped_mm_fallback"
WIDTH, ROWS = 2, 5  # sizes in the proof: columns inside experts, and rows if their number is symbolic
MOST = 512  # the most rows if their number is fixed: the proof computes all of them


def product(x, weight):
    """Rows of x times the weights of their experts. Rows of no expert may have any values."""
    plain = Alt(Op(GROUPED, x, weight), Op("bmm", weight, x))
    return Alt(plain, Op("masked_fill", plain))


half = Op(
    "getitem|narrow", Alt(Op("chunk|split|tensor_split", product(Var("x"), Var("gate_up"))), product(Var("x"), Var("gate_up")))
)
PATTERN = Op("sum", Op("mul", product(Op("mul", Op("silu", half), half), Var("down")), Var("weights")))


@dataclass(frozen=True)
class Facts:
    rows: int | None  # None if it is symbolic
    dtype: torch.dtype


class LiftExperts(Rule[Facts]):
    name, stage, equation = "experts", "lift", experts.op.equation

    def anchors(self, graph):
        """A product of rows with weights of several experts, whose result another such product reads."""
        for node in graph.nodes:
            if _weight(node) is not None and any(op_name(u) == "silu" for u in _behind(node)[0]):
                yield node

    def match(self, anchor):
        _, root = _behind(anchor)
        if root is None:
            raise Mismatch(anchor, "a sum over the choices of a row after it", "none")
        env = PATTERN.match(root)
        x, indices = _rows(env["x"], env["gate_up"])
        gate_up, down = (_stored(env[name]) for name in ("gate_up", "down"))
        N, k = value(x).shape[0], value(indices).shape[-1]
        (E, both, H), D = value(gate_up).shape, value(down).shape
        for name, node, wanted in (("gate_up", gate_up, (E, 2 * D[2], H)), ("down", down, (E, H, both // 2))):
            if not same_shape(value(node).shape, wanted):
                raise Refused(f"{name} must be [experts, out, in], {list(wanted)}, found {list(value(node).shape)}.", at=node)
        weights = next((n for n in chain(env["weights"]) if same_shape(value(n).shape, (N, k))), None)
        if weights is None:
            raise Mismatch(env["weights"], f"a weight for each of {k} choices", str(list(value(env["weights"]).shape)))
        dtype, users = value(x).dtype, list(root.users)
        if value(root).dtype != dtype and len(users) == 1 and is_cast(users[0]):
            root = users[0]
        if value(root).dtype != dtype:
            raise Refused(f"The sum of experts must have the rows' dtype, {dtype}, found {value(root).dtype}.", at=root)
        number = isinstance(N, int)
        return Match(
            {"x": x, "indices": indices, "routing_weights": weights, "gate_up": gate_up, "down": down},
            [root],
            Facts(N if number else None, dtype),
            samplers={"indices": functools.partial(_below, E)},
            shapes={"gate_up": (E, 2 * WIDTH, H), "down": (E, H, WIDTH)},
            local_writes=True,
            small=None if number else ROWS,
        )

    def check(self, m):
        if (m.facts.rows or 0) > MOST:
            raise Refused(f"Experts of at most {MOST} rows are proved where sizes are fixed, found {m.facts.rows}.")

    def rewrite(self, m, t):
        return call(experts.op.overload, t.x, t.indices, t.routing_weights, t.gate_up, t.down)


def _weight(node: Node) -> Node | None:
    """The weights [experts, …] of a product with weights of several experts; None for another node."""
    if op_name(node) in GROUPED.split("|"):
        return _stored(node.args[1])
    if op_name(node) == "bmm" and (taken := _taken(node.args[0])) is not None and value(taken.args[0]).ndim == 3:
        return taken.args[0]
    return None


def _taken(node: Node) -> Node | None:
    """The node that took rows of a tensor by indices, also through views and casts; None if there is none."""
    while op_name(node) in ("unsqueeze", "transpose", "reshape", "masked_fill", "contiguous", "squeeze") or is_cast(node):
        node = node.args[0]
    gather = op_name(node) == "getitem" and is_tensor(node.args[0]) and is_tensor(node.args[1])
    return node if gather else None


def _stored(weight: Node) -> Node:
    """The weights of all experts, of which those that are read are a view or a part."""
    taken = _taken(weight)
    return peel(weight) if taken is None else taken.args[0]


def _behind(first: Node) -> tuple[list[Node], Node | None]:
    """What is computed from a product up to the sum over choices, and the sum. It ends before a block of other experts."""
    found, todo = [], [first]
    while todo and len(found) < 24:
        node = min(todo)
        todo.remove(node)
        for user in node.users:
            if user in found or user in todo:
                continue
            if op_name(user) == "sum":
                return found, user
            todo.append(user)
        found.append(node)
    return found, None


def _rows(x: Node, weight: Node) -> tuple[Node, Node]:
    """The rows [N, H] from which each choice took its own, and the choices [N, k]."""
    node = x
    while op_name(node) in ("unsqueeze", "masked_fill", "reshape", "squeeze") or is_cast(node):
        node = node.args[0]
    if op_name(node) not in ("getitem", "repeat_interleave") or not is_tensor(node.args[0]):
        raise Mismatch(node, "rows taken for each choice", op_name(node))
    rows = node.args[0]
    taken = _taken(weight)
    if taken is not None:
        chosen = taken.args[1]
    else:  # sorted by expert
        place = node.args[1]
        perm = place.args[0] if op_name(place) in ("floordiv", "floor_divide", "div") else place
        order = perm.args[0] if op_name(perm) == "getitem" else perm
        chosen = order.args[0] if op_name(order) in ("sort", "argsort") else None
        if chosen is None:
            raise Mismatch(perm, "the order of the choices by expert", op_name(perm))
    while op_name(chosen) == "clamp":
        chosen = chosen.args[0]
    indices = next((n for n in chain(chosen) if value(n).ndim == 2 and same(value(n).shape[0], value(rows).shape[0])), None)
    if indices is None:
        raise Mismatch(chosen, "the choices of each row, [N, k]", str(list(value(chosen).shape)))
    return rows, indices


def _below(experts: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, experts, shape, generator=generator)


RULE = LiftExperts()
