"""x · rsqrt(Σx² + eps), or x / sqrt(…)  →  gdnfuse.l2norm(x, eps)"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gdnfuse.dialect import l2norm
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import op_name, peel, real_users, value
from gdnfuse.rewrite.pattern import Alt, Const, Op, Var
from gdnfuse.rewrite.rule import Match, Rule, bring

x = Var("x")
square = Op("add", Op("sum", Op("mul", x, x)), Const("eps"))
PATTERN = Alt(Op("mul", x, Op("rsqrt", square)), Op("div", x, Op("sqrt", square)))


@dataclass(frozen=True)
class Facts:
    eps: float
    dtype: torch.dtype


class LiftL2Norm(Rule[Facts]):
    name, stage, equation = "l2norm", "lift", l2norm.op.equation

    def anchors(self, graph):
        """The inverse square root of a sum of products."""
        for node in graph.nodes:
            if op_name(node) in ("rsqrt", "sqrt") and op_name(add := peel(node.args[0])) == "add":
                if op_name(peel(add.args[0])) == "sum":
                    yield node

    def match(self, anchor):
        root = next((u for u in real_users(anchor) if op_name(u) in ("mul", "div")), anchor)
        env = PATTERN.match(root)
        return Match({"x": bring(env["x"], value(root).shape, "x")}, [root], Facts(env["eps"], value(root).dtype))

    def rewrite(self, m, t):
        return call(l2norm.op.overload, t.x, m.facts.eps).to(m.facts.dtype)


RULE = LiftL2Norm()
