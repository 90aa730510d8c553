"""fused_gating_delta_rule(l2norm(q), l2norm(k), …)  →  fused_gating_delta_rule(q, k, …, l2norm_eps)"""

from __future__ import annotations

from gdnfuse.dialect import fused_gating_delta_rule, l2norm
from gdnfuse.report import Refused
from gdnfuse.rewrite.driver import call
from gdnfuse.rewrite.graph import op_name, peel, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Match, Rule, bring

TENSORS = ("q", "k", "v", "a", "b", "A_log", "dt_bias", "recurrent_state")


class FuseL2NormDeltaRule(Rule):
    name, stage, equation = "l2norm_delta_rule", "fuse", "rule(l2norm(q), l2norm(k), …) = rule(q, k, …, l2norm_eps)"

    def anchors(self, graph):
        return [n for n in graph.nodes if op_name(n) == "gdnfuse.fused_gating_delta_rule"]

    def match(self, anchor):
        bound = fused_gating_delta_rule.op.bind(anchor.args, anchor.kwargs)
        operands, eps = {}, {}
        for name in ("q", "k"):
            norm = peel(bound[name])
            if op_name(norm) != "gdnfuse.l2norm":
                raise Mismatch(norm, f"l2norm of {name}", op_name(norm))
            normalised = l2norm.op.bind(norm.args, norm.kwargs)
            eps[name] = normalised["eps"]
            operands[name] = bring(normalised["x"], value(bound[name]).shape, name)
        return rule_match(anchor, bound, operands, eps=eps)

    def check(self, m):
        eps = m.data["eps"]
        if eps["q"] != eps["k"]:
            raise Refused(f"q and k must be normalised with one eps, found {eps['q']} and {eps['k']}.", at=m.outputs[0])

    def rewrite(self, m, t):
        return rule_call(m, t, m.data["eps"]["q"])


def rule_match(anchor, bound, operands, **data) -> Match:
    """A match that replaces a rule by itself with some operands taken from further up."""
    inputs = {k: operands[k].node if k in operands else bound[k] for k in TENSORS}
    data |= {"how": operands, "scale": bound["scale"]}
    return Match(inputs, [anchor], writes={"recurrent_state": anchor}, data=data)


def rule_call(m, t, l2norm_eps):
    how = m.data["how"]
    tensors = [how[k].how(getattr(t, k)) if k in how else getattr(t, k) for k in TENSORS]
    return call(fused_gating_delta_rule.op.overload, *tensors, m.data["scale"], l2norm_eps)


RULE = FuseL2NormDeltaRule()
