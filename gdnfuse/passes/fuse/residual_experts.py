"""residual + experts(x)  →  experts(x, residual), for one row

With several rows, the residual is part of the norm after it.
"""

from __future__ import annotations

from gdnfuse.passes.experts import Facts, as_rows, bind, experts_call, experts_match, op_of_experts, sum_of
from gdnfuse.passes.rows import one_row
from gdnfuse.rewrite.graph import value
from gdnfuse.rewrite.rule import Rule, require_one_reader


class FuseResidualExperts(Rule[Facts]):
    name, stage, equation = "residual_experts", "fuse", "residual + experts(x) = experts(x, residual)"

    def anchors(self, graph):
        """Experts of one row that are added to another tensor."""
        found = [n for n in graph.nodes if op_of_experts(n) is not None and one_row(n) and bind(n)["residual"] is None]
        return [n for n in found if sum_of(n) is not None]

    def match(self, anchor):
        root, residual = sum_of(anchor)
        require_one_reader(anchor, root)
        operand = as_rows(residual, value(anchor), "A residual")
        return experts_match(root, op_of_experts(anchor), bind(anchor) | {"residual": operand})

    def rewrite(self, m, t):
        return experts_call(m, t)


RULE = FuseResidualExperts()
