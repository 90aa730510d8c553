"""residual + linear(x)  →  fused_linear(x, residual)"""

from __future__ import annotations

from gdnfuse.passes.fuse.linears import LinearCall, bind, few_outputs, is_linear, linear_call, linear_match
from gdnfuse.passes.rows import one_row
from gdnfuse.rewrite.graph import is_tensor, op_name, peel, same_shape, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Operand, Rule, require_one_reader


class FuseResidualLinear(Rule[LinearCall]):
    name, stage, equation = "residual_linear", "fuse", "residual + linear(x, W) = fused_linear(x, W, residual)"

    def anchors(self, graph):
        """A sum with a linear of one row."""
        return [n for n in graph.nodes if op_name(n) == "add" and len(n.args) == 2 and not n.kwargs and _linear(n) is not None]

    def match(self, anchor):
        linear = _linear(anchor)
        require_one_reader(linear, anchor)
        residual = next((a for a in anchor.args if not is_tensor(a) or peel(a) is not linear), None)
        shape = value(linear).shape
        if not is_tensor(residual) or value(residual).numel() != value(linear).numel():
            raise Mismatch(anchor, f"a residual of the linear's shape, {list(shape)}", str(residual))
        if value(residual).dtype != value(linear).dtype or value(anchor).dtype != value(linear).dtype:
            raise Mismatch(anchor, f"a residual of {value(linear).dtype}", str(value(residual).dtype))
        # The operand with its casts, because its dtype is that of the sum.
        there = same_shape(value(residual).shape, shape)
        operand = residual if there else Operand(residual, lambda x: x.reshape(shape))
        back = None if same_shape(value(anchor).shape, shape) else tuple(value(anchor).shape)
        return few_outputs(linear_match(anchor, bind(linear) | {"residual": operand}, back))

    def rewrite(self, m, t):
        return linear_call(m, t)


def _linear(node):
    """The operand that is a linear without residual. If both are, it is the later one, which can read the result of the other."""
    found = [peel(a) for a in node.args if is_tensor(a)]
    found = [n for n in found if is_linear(n) and one_row(n) and bind(n)["residual"] is None]
    return max(found, default=None)


RULE = FuseResidualLinear()
