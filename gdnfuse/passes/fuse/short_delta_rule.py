"""fused_gating_chunk_delta_rule over 2 to 8 tokens, state.copy_(its last state)  →  fused_gating_delta_rule(…, state!)

This is a short turn, or the last piece of a prompt. Chunks have 64 tokens, so the recurrent form is faster.
"""

from __future__ import annotations

from gdnfuse.dialect import fused_gating_chunk_delta_rule, fused_gating_delta_rule
from gdnfuse.passes.fuse.rules import LIMITS, Step, smaller
from gdnfuse.passes.fuse.verify_delta_rule import over_few_tokens
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import op_name, real_users
from gdnfuse.rewrite.rule import Match, Rule

OPERANDS = ("q", "k", "v", "a", "b", "A_log", "dt_bias")


class FuseShortDeltaRule(Rule[Step]):
    name, stage, equation = "short_delta_rule", "fuse", fused_gating_delta_rule.op.equation

    def anchors(self, graph):
        """Rules over a few tokens whose output is read and whose new state is copied back to where the state came from."""
        for node, bound, taken in over_few_tokens(graph):
            if set(taken) == {0, 1} and (written := list(real_users(taken[1]))):
                if len(written) == 1 and op_name(written[0]) == "copy_" and written[0].args[0] is bound["state"]:
                    yield node

    def match(self, anchor):
        bound = fused_gating_chunk_delta_rule.op.bind(anchor.args, anchor.kwargs)
        taken = {u.args[1]: u for u in anchor.users}
        (copy,) = real_users(taken[1])
        operands = {name: bound[name] for name in OPERANDS} | {"recurrent_state": bound["state"]}
        facts = Step(bound["scale"], bound["l2norm_eps"], bound["beta_scale"])
        m = Match(operands, [taken[0]], facts, writes={"recurrent_state": copy})
        m.shapes |= smaller(m.inputs, {**LIMITS, "recurrent_state": LIMITS["state"]})
        return m

    def rewrite(self, m, t):
        tensors = (*(getattr(t, name) for name in OPERANDS), t.recurrent_state)
        return call(fused_gating_delta_rule.op.overload, *tensors, m.facts.scale, m.facts.l2norm_eps, m.facts.beta_scale)


RULE = FuseShortDeltaRule()
