"""chunk_delta_rule(q, k, v, gating(a, …), [c·]sigmoid(b), state)  →  fused_gating_chunk_delta_rule(q, k, v, a, b, …, state)"""

from __future__ import annotations

from gdnfuse.dialect import chunk_delta_rule, fused_gating_chunk_delta_rule
from gdnfuse.passes.fuse.gating_delta_rule import gate_operands
from gdnfuse.passes.fuse.rules import RuleCall, rule_call, rule_match
from gdnfuse.rewrite.graph import op_name
from gdnfuse.rewrite.rule import Rule


class FuseGatingChunkDeltaRule(Rule[RuleCall]):
    name, stage, equation = "gating_chunk_delta_rule", "fuse", fused_gating_chunk_delta_rule.op.equation

    def anchors(self, graph):
        return [n for n in graph.nodes if op_name(n) == "gdnfuse.chunk_delta_rule"]

    def match(self, anchor):
        bound = chunk_delta_rule.op.bind(anchor.args, anchor.kwargs)
        return rule_match(anchor, fused_gating_chunk_delta_rule.op, gate_operands(bound))

    def rewrite(self, m, t):
        return rule_call(m, t)


RULE = FuseGatingChunkDeltaRule()
