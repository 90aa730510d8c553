"""w · (o · rsqrt(mean(o²) + eps)) · act(z)  →  gdnfuse.gated_rms_norm(o, z, w, eps, act)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gdnfuse.dialect import gated_rms_norm
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.evaluate import hint
from gdnfuse.rewrite.graph import chain, op_name, peel, real_users, same, same_shape, value
from gdnfuse.rewrite.pattern import Alt, Const, Mismatch, Op, Var
from gdnfuse.rewrite.rule import Match, Rule, bring

o, w = Var("o"), Var("weight")
normed = Op("mul", o, Op("rsqrt", Op("add", Op("mean", Op("mul", o, o)), Const("eps"))))
gate = Op("|".join(gated_rms_norm.GATES), Var("z"), bind="gate")
PATTERN = Alt(Op("mul", Op("mul", w, normed), gate), Op("mul", Op("mul", normed, gate), w))


@dataclass(frozen=True)
class Facts:
    eps: float
    activation: str
    dtype: torch.dtype
    shape: tuple[Any, ...] | None  # shape of the result, if it is not that of o


class LiftGatedRMSNorm(Rule[Facts]):
    name, stage, equation = "gated_rms_norm", "lift", gated_rms_norm.op.equation

    def anchors(self, graph):
        """An activation that is multiplied with something normalised: silu, or another one, with an rsqrt in the product."""
        for node in graph.nodes:
            if op_name(node) in ("silu", "sigmoid", "gelu", "relu", "tanh"):
                for user in real_users(node):
                    if op_name(user) == "mul" and any(_normalised(x) for x in user.all_input_nodes if peel(x) is not node):
                        yield node
                        break

    def match(self, anchor):
        root = next(u for u in real_users(anchor) if op_name(u) == "mul")
        try:
            env = PATTERN.match(root)
        except Mismatch:
            outer = next((u for u in real_users(root) if op_name(u) == "mul"), None)
            if outer is None:
                raise
            root, env = outer, PATTERN.match(outer)
        shape = value(root).shape
        o, z = _before_views(env["o"], env["z"], shape)
        operands = {"o": bring(o, value(o).shape, "o"), "z": bring(z, value(o).shape, "z")}
        root = _rounded(root, value(operands["z"].node).dtype)
        operands["weight"] = bring(env["weight"], shape[-1:], "weight")
        back = None if same_shape(value(o).shape, shape) else shape
        return Match(
            operands,
            [root],
            Facts(env["eps"], op_name(env["gate"]), value(root).dtype, back),
            shapes={name: _few_rows(value(operands[name].node).shape) for name in ("o", "z")},
        )

    def rewrite(self, m, t):
        y = call(gated_rms_norm.op.overload, t.o, t.z, t.weight, m.facts.eps, m.facts.activation)
        if m.facts.shape is not None:
            y = y.reshape(-1, *m.facts.shape[1:])
        return y.to(m.facts.dtype)


def _rounded(root, dtype):
    """The cast to the gate's dtype, if nothing else reads the product. The op itself rounds."""
    users = list(root.users)
    alone = len(users) == 1 and op_name(users[0]) == "to" and value(users[0]).dtype == dtype
    return users[0] if alone else root


def _before_views(o, z, shape):
    """o and z before both are flattened into rows. Flattening a part of a packed row would copy it."""
    if all(isinstance(s, int) for s in shape[1:]):
        for n in reversed(chain(o)):
            for other in reversed(chain(z)):
                if same(value(n).shape[-1], shape[-1]) and same_shape(value(n).shape, value(other).shape):
                    return n, other
    return o, z


def _few_rows(shape):
    """Fewer rows for the proof, because each row is normalised by itself."""
    axes = len(shape) - 1
    return (*(min(hint(s), 64 if axes == 1 else 4) for s in shape[:-1]), hint(shape[-1]))


def _normalised(node) -> bool:
    """Whether a node is a product, at most two factors deep, with an rsqrt in it."""
    return any(_normalised_by(node, weighted) for weighted in (False, True))


def _normalised_by(node, weighted: bool) -> bool:
    node = peel(node)
    if op_name(node) != "mul":
        return False
    factors = [peel(x) for x in node.all_input_nodes]
    if weighted:
        return any(_normalised_by(f, False) for f in factors)
    return any(op_name(f) == "rsqrt" for f in factors)


RULE = LiftGatedRMSNorm()
