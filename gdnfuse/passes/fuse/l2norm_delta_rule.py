"""A rule of l2norm(q), l2norm(k)  →  the rule of q, k with l2norm_eps"""

from __future__ import annotations

from gdnfuse.dialect import l2norm, op_of
from gdnfuse.errors import Refused
from gdnfuse.passes.fuse.rules import RuleCall, rule_call, rule_match
from gdnfuse.rewrite.graph import op_name, peel, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Rule, bring

RULES = ("gdnfuse.fused_gating_delta_rule", "gdnfuse.chunk_delta_rule", "gdnfuse.fused_gating_chunk_delta_rule")


class FuseL2NormDeltaRule(Rule[RuleCall]):
    name, stage, equation = "l2norm_delta_rule", "fuse", "rule(l2norm(q), l2norm(k), …) = rule(q, k, …, l2norm_eps)"

    def anchors(self, graph):
        """Rules that do not normalise q and k themselves. Captured ones mostly do."""
        rules = [n for n in graph.nodes if op_name(n) in RULES]
        return [n for n in rules if op_of(n.target).bind(n.args, n.kwargs)["l2norm_eps"] is None]

    def match(self, anchor):
        op = op_of(anchor.target)
        bound = op.bind(anchor.args, anchor.kwargs)
        operands, eps = {}, {}
        for name in ("q", "k"):
            norm = peel(bound[name])
            if op_name(norm) != "gdnfuse.l2norm":
                raise Mismatch(norm, f"l2norm of {name}", op_name(norm))
            normalised = l2norm.op.bind(norm.args, norm.kwargs)
            eps[name] = normalised["eps"]
            operands[name] = bring(normalised["x"], value(bound[name]).shape, name)
        if eps["q"] != eps["k"]:
            raise Refused(f"q and k must be normalised with one eps, found {eps['q']} and {eps['k']}.", at=anchor)
        return rule_match(anchor, op, {**operands, "l2norm_eps": eps["q"]})

    def rewrite(self, m, t):
        return rule_call(m, t)


RULE = FuseL2NormDeltaRule()
