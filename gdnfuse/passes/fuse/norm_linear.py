"""linear(rms_norm(x))  →  fused_linear(x, norm)"""

from __future__ import annotations

from gdnfuse.dialect import rms_norm
from gdnfuse.passes.fuse.linears import LinearCall, bind, few_outputs, is_linear, linear_call, linear_match
from gdnfuse.passes.rows import one_row
from gdnfuse.rewrite.graph import op_name, peel, value
from gdnfuse.rewrite.rule import Rule, bring, require_one_reader


class FuseNormLinear(Rule[LinearCall]):
    name, stage, equation = "norm_linear", "fuse", "linear(rms_norm(x), W) = fused_linear(x, W, norm)"

    def anchors(self, graph):
        """A linear of one row after a norm."""
        return [n for n in graph.nodes if is_linear(n) and one_row(n) and op_name(peel(bind(n)["x"])) == "gdnfuse.rms_norm"]

    def match(self, anchor):
        bound = bind(anchor)
        norm = peel(bound["x"])
        require_one_reader(norm, anchor)
        inner = rms_norm.op.bind(norm.args, norm.kwargs)
        x = bring(inner["x"], value(bound["x"]).shape, "x")
        more = {"x": x, "norm_weight": inner["weight"], "norm_eps": inner["eps"], "norm_offset": inner["offset"]}
        return few_outputs(linear_match(anchor, bound | more))

    def rewrite(self, m, t):
        return linear_call(m, t)


RULE = FuseNormLinear()
