"""A rule of repeat_interleave(q, HV/H), repeat_interleave(k, HV/H)  →  the rule of q, k with H key heads"""

from __future__ import annotations

from gdnfuse.dialect import op_of
from gdnfuse.errors import Refused
from gdnfuse.passes.fuse.l2norm_delta_rule import RULES
from gdnfuse.passes.fuse.rules import RuleCall, rule_call, rule_match
from gdnfuse.rewrite.graph import op_name, peel, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Rule, bring


class FuseRepeatDeltaRule(Rule[RuleCall]):
    name, stage, equation = "repeat_delta_rule", "fuse", "rule(repeat(q), repeat(k), …) = rule(q, k, …) with grouped heads"

    def anchors(self, graph):
        """Rules whose q or k is a repeat of fewer heads."""
        rules = [n for n in graph.nodes if op_name(n) in RULES]
        return [n for n in rules if any(op_name(peel(x)) == "repeat_interleave" for x in n.args[:2])]

    def match(self, anchor):
        op = op_of(anchor.target)
        bound = op.bind(anchor.args, anchor.kwargs)
        B, T, HV, K = value(bound["q"]).shape
        operands = {}
        for name in ("q", "k"):
            repeat = peel(bound[name])
            if op_name(repeat) != "repeat_interleave":
                raise Mismatch(repeat, f"repeat_interleave of {name}", op_name(repeat))
            groups = repeat.args[1]
            if not isinstance(groups, int) or HV % groups:
                raise Refused(f"{name} must be repeated a fixed number of times that divides {HV}, found {groups}.", at=repeat)
            operands[name] = bring(repeat.args[0], (B, T, HV // groups, K), name)
        return rule_match(anchor, op, operands)

    def rewrite(self, m, t):
        return rule_call(m, t)


RULE = FuseRepeatDeltaRule()
