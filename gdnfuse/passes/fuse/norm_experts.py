"""experts(rms_norm(x))  →  experts(x, norm), for one row"""

from __future__ import annotations

from gdnfuse.dialect import rms_norm
from gdnfuse.passes.experts import Facts, as_rows, bind, experts_call, experts_match, op_of_experts
from gdnfuse.passes.rows import one_row
from gdnfuse.rewrite.graph import op_name, peel, value
from gdnfuse.rewrite.rule import Rule, require_one_reader


class FuseNormExperts(Rule[Facts]):
    name, stage, equation = "norm_experts", "fuse", "experts(rms_norm(x)) = experts(x, norm)"

    def anchors(self, graph):
        """Experts of one row after a norm."""
        found = [n for n in graph.nodes if op_of_experts(n) is not None and one_row(n)]
        return [n for n in found if op_name(peel(bind(n)["x"])) == "gdnfuse.rms_norm"]

    def match(self, anchor):
        bound = bind(anchor)
        norm = peel(bound["x"])
        require_one_reader(norm, anchor)
        inner = rms_norm.op.bind(norm.args, norm.kwargs)
        more = {"norm_weight": inner["weight"], "norm_eps": inner["eps"], "norm_offset": inner["offset"]}
        x = as_rows(inner["x"], value(bound["x"]), "What is normalised")
        return experts_match(anchor, op_of_experts(anchor), bound | more | {"x": x})

    def rewrite(self, m, t):
        return experts_call(m, t)


RULE = FuseNormExperts()
