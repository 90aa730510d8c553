"""−exp(A_log) · softplus(a + dt_bias)  →  gdnfuse.gating(a, A_log, dt_bias)"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gdnfuse.dialect import gating
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import is_tensor, op_name, peel, real_users, value
from gdnfuse.rewrite.pattern import Alt, Op, Var
from gdnfuse.rewrite.rule import Match, Rule, bring

decay = Op("exp", Var("A_log"))
softplus = Op("softplus", Op("add", Var("a"), Var("dt_bias")))
PATTERN = Alt(Op("mul", Op("neg", decay), softplus), Op("neg", Op("mul", decay, softplus)), Op("mul", decay, Op("neg", softplus)))


def near_the_threshold(shape, generator):
    """Every other element is where softplus is almost its argument. Only there a threshold below 20 would have an effect."""
    drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
    drawn.view(-1)[::2].mul_(0.1).add_(16.5)
    return drawn


def small(shape, generator):
    return 0.1 * torch.randn(shape, dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class Facts:
    dtype: torch.dtype


class LiftGating(Rule[Facts]):
    name, stage, equation = "gating", "lift", gating.op.equation

    def anchors(self, graph):
        """softplus of a sum or difference with a vector. dt_bias has one number per head."""
        for node in graph.nodes:
            if op_name(node) == "softplus" and op_name(add := peel(node.args[0])) in ("add", "sub"):
                if any(is_tensor(x) and value(peel(x)).ndim == 1 for x in add.all_input_nodes):
                    yield node

    def match(self, anchor):
        root = next(iter(real_users(anchor)), anchor)
        after = next(iter(real_users(root)), root)
        if (op_name(root), op_name(after)) in (("mul", "neg"), ("neg", "mul")):
            root = after
        env = PATTERN.match(root)
        if value(peel(env["a"])).ndim == 1:
            env["a"], env["dt_bias"] = env["dt_bias"], env["a"]
        shape = value(root).shape
        operands = {
            # Float32 adapters on bfloat16 weights are added before this cast, which lora_linear looks for.
            "a": bring(env["a"], shape, "a", rounded=True),
            "A_log": bring(env["A_log"], shape[-1:], "A_log"),
            "dt_bias": bring(env["dt_bias"], shape[-1:], "dt_bias"),
        }
        extremes = {"a": near_the_threshold, "A_log": small, "dt_bias": small}
        return Match(operands, [root], Facts(value(root).dtype), extremes=extremes)

    def rewrite(self, m, t):
        return call(gating.op.overload, t.a, t.A_log, t.dt_bias).to(m.facts.dtype)


RULE = LiftGating()
