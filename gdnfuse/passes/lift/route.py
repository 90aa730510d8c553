"""top-k of softmax(x·Wᵀ) in float32, with weights divided by their sum or not  →  gdnfuse.route

Softmax of the logits of the top-k is the same: dividing by the sum removes the other terms of softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from gdnfuse.dialect import route
from gdnfuse.dialect.op import acc_dtype
from gdnfuse.errors import Refused
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.evaluate import hint
from gdnfuse.rewrite.graph import chain, is_cast, is_tensor, op_name, peel, real_users, same_shape, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Match, Operand, Rule

WIDE = (torch.float32, torch.float64)
ROWS, COLUMNS = 3, 8  # sizes in proofs, because the maths of a router does not depend on them


@dataclass(frozen=True)
class Facts:
    top_k: int
    normalize: bool
    wide_logits: bool
    wide_weights: bool


class LiftRoute(Rule[Facts]):
    name, stage, equation = "route", "lift", route.op.equation

    def anchors(self, graph: Graph) -> Iterator[Node]:
        """A top-k of softmax of a linear, softmax of the top-k of a linear, and any other top-k that chooses experts."""
        for node in graph.nodes:
            if op_name(node) == "topk" and (_is_router(node) or _chooses_experts(node)):
                yield node

    def match(self, anchor):
        scores = _given(anchor)["input"]
        before = peel(scores)
        after = _softmax_behind(anchor)
        if op_name(before) == "softmax":
            softmax, linear, order = before, peel(before.args[0]), ((before.args[0], before), (scores, anchor))
            weights, normalize = _divided(_result(anchor, 0))
        elif after is not None:
            softmax, linear, order = after, before, ((scores, anchor),)
            weights, normalize = after, True
        else:
            raise Mismatch(before, "softmax", op_name(before))
        if op_name(linear) != "linear":
            raise Mismatch(linear, "a linear", op_name(linear))
        top_k = _arguments(anchor)
        x, weight, *bias = (*linear.args, *linear.kwargs.values())
        if any(b is not None for b in bias):
            raise Refused("A router must have no bias, found one.", at=linear)
        if value(scores).ndim != 2 or value(x).ndim not in (2, 3):
            raise Refused(f"A router must score rows, [N, E], found {list(value(scores).shape)}.", at=anchor)
        _require_wide(softmax, order)
        narrow = [_uncast(n) for n in (x, weight)]
        wide = not value(narrow[0]).dtype == value(narrow[1]).dtype == value(linear).dtype
        x, weight = narrow if wide else (x, weight)
        weights = _cast(weights, value(x).dtype)
        facts = Facts(top_k, normalize, wide, value(weights).dtype != value(x).dtype)
        if facts.wide_weights and value(weights).dtype != acc_dtype(value(x), value(weight)):
            raise Refused(f"Routing weights must be {value(x).dtype} as the rows are, found {value(weights).dtype}.", at=weights)
        indices = [n for n in anchor.users if n.args[1] == 1]
        lead = (min(hint(value(x).shape[0]), ROWS), *[min(hint(s), ROWS) for s in value(x).shape[1:-1]])
        return Match(
            {"x": Operand(x, lambda t: t.flatten(0, -2)) if value(x).ndim > 2 else x, "weight": weight},
            [weights, *indices],
            facts,
            shapes={"x": (*lead, COLUMNS), "weight": (value(weight).shape[0], COLUMNS)},
        )

    def check(self, m):
        x, weight = (value(m.inputs[name]) for name in ("x", "weight"))
        if x.device != weight.device:
            raise Refused(f"A router must be on its rows' device, {x.device}, found {weight.device}.", at=m.inputs["weight"])

    def rewrite(self, m, t):
        made = call(route.op.overload, t.x, t.weight, *vars(m.facts).values())
        return tuple(made[i] for i in range(len(m.outputs)))


def _is_router(topk: Node) -> bool:
    scores = peel(_given(topk)["input"])
    softmax = scores if op_name(scores) == "softmax" else _softmax_behind(topk)
    linear = peel(scores.args[0]) if softmax is scores else scores
    return softmax is not None and op_name(linear) == "linear"


def _chooses_experts(topk: Node) -> bool:
    readers = [u for n in topk.users if n.args[1] == 1 for u in real_users(n)]
    return any(op_name(u) == "gdnfuse.experts" for u in readers)


def _given(topk: Node) -> dict:
    return dict(zip(("input", "k", "dim", "largest", "sorted"), topk.args, strict=False)) | topk.kwargs


def _arguments(topk: Node) -> int:
    """k of a top-k. Raises Mismatch unless it takes the largest along the last axis, in order."""
    given = {"dim": -1, "largest": True, "sorted": True} | _given(topk)
    k, last = given["k"], (-1, value(given["input"]).ndim - 1)
    if not isinstance(k, int) or given["dim"] not in last or not given["largest"] or not given["sorted"]:
        found = ", ".join(f"{name}={given[name]}" for name in ("k", "dim", "largest", "sorted"))
        raise Mismatch(topk, "the k largest along the last axis, in order", found)
    return k


def _result(topk: Node, i: int) -> Node:
    found = next((n for n in topk.users if n.args[1] == i), None)
    if found is None:
        raise Mismatch(topk, f"a reader of its result {i}", "none")
    return found


def _softmax_behind(topk: Node) -> Node | None:
    """Softmax of the values of a top-k, if nothing else reads them."""
    readers = [u for n in topk.users if n.args[1] == 0 for u in real_users(n)]
    return readers[0] if [op_name(u) for u in readers] == ["softmax"] else None


def _require_wide(softmax: Node, order: tuple[tuple[Node, Node], ...]) -> None:
    """Check that nothing is rounded between the linear and the choice, and that nobody else reads what is between them."""
    if value(softmax).dtype not in WIDE:
        raise Refused(f"A router's softmax must be computed in float32, found {value(softmax).dtype}.", at=softmax)
    for operand, reader in order:
        nodes = chain(operand)
        made = value(nodes[-1]).dtype
        for n in nodes:
            if torch.promote_types(value(n).dtype, made) != value(n).dtype:
                raise Refused(f"A router's scores must not be rounded before the choice, found {value(n).dtype} of {made}.", at=n)
        others = [u for u in real_users(nodes[-1]) if u is not reader]
        if others:
            found = f"that {others[0].name} reads it too"
            raise Refused(f"{nodes[-1].name} must be read by {reader.name} alone, found {found}.", at=others[0])


def _uncast(node: Node) -> Node:
    """The tensor before a cast to a wider dtype."""
    while is_cast(node) and is_tensor(x := node.args[0]) and same_shape(value(x).shape, value(node).shape):
        if torch.promote_types(value(x).dtype, value(node).dtype) != value(node).dtype:
            break
        node = x
    return node


def _divided(top: Node) -> tuple[Node, bool]:
    """The weights divided by their sum, if nothing else reads the weights; else the weights. And whether they are divided."""
    readers = list(real_users(top))
    sums = [u for u in readers if op_name(u) == "sum"]
    divided = [u for u in readers if op_name(u) == "div" and peel(u.args[0]) is top]
    if len(sums) == len(divided) == 1 and len(readers) == 2:
        below = peel(divided[0].args[1])
        if below is sums[0] or op_name(below) in ("add", "clamp") and peel(below.args[0]) is sums[0]:
            return divided[0], True
    return top, False


def _cast(weights: Node, dtype: torch.dtype) -> Node:
    """The weights in the dtype of the rows, if nothing reads them in another dtype."""
    users = list(weights.users)
    return users[0] if len(users) == 1 and is_cast(users[0]) and value(users[0]).dtype == dtype else weights


RULE = LiftRoute()
