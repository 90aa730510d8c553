"""silu(first half of a linear's row) · second half  →  fused_linear(…, swiglu)"""

from __future__ import annotations

import math

from gdnfuse.errors import Refused
from gdnfuse.passes.fuse.linears import LinearCall, bind, is_linear, linear_call, linear_match
from gdnfuse.rewrite.graph import op_name, peel, real_users, same, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Rule, require_one_reader


class FuseSwiGLULinear(Rule[LinearCall]):
    name, stage, equation = "swiglu_linear", "fuse", "silu(x·W₀ᵀ) · (x·W₁ᵀ) = fused_linear(x, [W₀, W₁], swiglu)"

    def anchors(self, graph):
        """SiLU of a part of a linear's row."""
        return [n for n in graph.nodes if op_name(n) == "silu" and _row(n.args[0]) is not None]

    def match(self, anchor):
        row = _row(anchor.args[0])
        root = next((u for u in real_users(anchor) if op_name(u) == "mul"), None)
        if root is None:
            raise Mismatch(anchor, "a product with the other half", "none")
        other = next((x for x in root.all_input_nodes if peel(x) is not anchor), root)
        halves = [peel(anchor.args[0]), peel(other)]
        if _row(other) is not row:
            raise Mismatch(other, f"the other part of {row}", op_name(peel(other)))
        width = value(row).shape[-1] // 2
        found = [n.args[1:] for n in halves]
        if found != [(-1, 0, width), (-1, width, width)]:
            raise Mismatch(row, f"halves of {width} columns", str(found))
        for node, reader in ((anchor, root), (halves[0], anchor), (halves[1], root)):
            require_one_reader(node, reader)
        others = [u for u in row.users if u not in halves]
        if others:
            raise Refused(f"{row.name} must be read by its halves alone, found that {others[0].name} reads it too.", at=others[0])
        shape = (*value(row).shape[:-1], width)
        if not same(value(root).numel(), math.prod(shape)) or value(root).dtype != value(row).dtype:
            expected = f"{list(shape)} of {value(row).dtype}"
            raise Mismatch(root, expected, f"{list(value(root).shape)} of {value(root).dtype}")
        bound = bind(row)
        if bound["residual"] is not None or bound["swiglu"]:
            raise Refused("The row must be the plain result of a linear, found something fused after it.", at=row)
        back = None if value(root).ndim == value(row).ndim else tuple(value(root).shape)
        return linear_match(root, bound | {"swiglu": True}, back)

    def rewrite(self, m, t):
        return linear_call(m, t)


def _row(node):
    """The linear whose row this is a part of, or None."""
    piece = peel(node)
    row = piece.args[0] if op_name(piece) == "narrow" else None
    return row if is_linear(row) else None


RULE = FuseSwiGLULinear()
