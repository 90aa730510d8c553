"""w · (o · rsqrt(mean(o²) + eps)) · silu(z)  →  gdnfuse.gated_rms_norm(o, z, w, eps)"""

from __future__ import annotations

from gdnfuse.dialect import gated_rms_norm
from gdnfuse.rewrite.driver import call
from gdnfuse.rewrite.graph import op_name, peel, real_users, value
from gdnfuse.rewrite.pattern import Alt, Const, Mismatch, Op, Var
from gdnfuse.rewrite.rule import Match, Rule, bring

o, w = Var("o"), Var("weight")
normed = Op("mul", o, Op("rsqrt", Op("add", Op("mean", Op("mul", o, o)), Const("eps"))))
gate = Op("silu", Var("z"))
PATTERN = Alt(Op("mul", Op("mul", w, normed), gate), Op("mul", Op("mul", normed, gate), w))


class LiftGatedRMSNorm(Rule):
    name, stage, equation = "gated_rms_norm", "lift", gated_rms_norm.op.equation

    def anchors(self, graph):
        """An activation that multiplies something normalised: silu, or what stands in its place, beside an rsqrt."""
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
        operands = {
            "o": bring(env["o"], shape, "o"),
            "z": bring(env["z"], shape, "z"),
            "weight": bring(env["weight"], shape[-1:], "weight"),
        }
        return Match(
            {k: x.node for k, x in operands.items()},
            [root],
            data={"how": operands, "eps": env["eps"], "dtype": value(root).dtype},
        )

    def rewrite(self, m, t):
        how = m.data["how"]
        y = call(gated_rms_norm.op.overload, *(how[k].how(getattr(t, k)) for k in ("o", "z", "weight")), m.data["eps"])
        return y.to(m.data["dtype"])


def _normalised(node) -> bool:
    """A product, one or two factors deep, with an rsqrt in it."""
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
