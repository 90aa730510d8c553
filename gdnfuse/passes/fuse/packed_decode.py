"""fused_gating_delta_rule(q, k, v = slices of one row, …) at T = 1  →  packed_decode(mixed_qkv, …)"""

from __future__ import annotations

from gdnfuse.dialect import fused_gating_delta_rule, packed_decode
from gdnfuse.passes.fuse.rules import two_sequences
from gdnfuse.report import Refused
from gdnfuse.rewrite.driver import call
from gdnfuse.rewrite.graph import op_name, peel, same, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Match, Rule, bring

GATES = ("a", "b", "A_log", "dt_bias", "recurrent_state")
SETTINGS = ("scale", "l2norm_eps", "beta_scale")


class FusePackedDecode(Rule):
    name, stage, equation = "packed_decode", "fuse", packed_decode.op.equation

    def anchors(self, graph):
        return [n for n in graph.nodes if op_name(n) == "gdnfuse.fused_gating_delta_rule"]

    def match(self, anchor):
        bound = fused_gating_delta_rule.op.bind(anchor.args, anchor.kwargs)
        rows = {name: _row(bound[name], i, name) for i, name in enumerate(("q", "k", "v"))}
        row = rows["q"]
        for name, other in rows.items():
            if peel(other) is not peel(row):
                raise Mismatch(other, f"{name} sliced from the row {row} that q is sliced from", str(other))
        B, T, H, K = value(bound["q"]).shape
        HV, V = value(bound["v"]).shape[2:]
        if not same(T, 1):
            raise Refused(f"One token must be processed (T = 1), found T = {T}.", at=anchor)
        operand = bring(row, (B, 1, 2 * H * K + HV * V), "mixed_qkv")
        inputs = {"mixed_qkv": operand.node, **{k: bound[k] for k in GATES}}
        return Match(
            inputs,
            [anchor],
            shapes=two_sequences(inputs, "mixed_qkv", "a", "b", "recurrent_state"),
            writes={"recurrent_state": anchor},
            data={"how": operand.how, "settings": [bound[k] for k in SETTINGS]},
        )

    def check(self, m):
        if m.data["settings"][1] is None:
            raise Refused("q and k must be l2-normalised before the rule, found that they are not.", at=m.outputs[0])

    def rewrite(self, m, t):
        gates = [getattr(t, k) for k in GATES]
        return call(packed_decode.op.overload, m.data["how"](t.mixed_qkv), *gates, *m.data["settings"])


def _row(node, part, name):
    """The row that `node` is part number `part` of."""
    piece = peel(node)
    if op_name(piece) == "getitem" and op_name(piece.args[0]) == "split" and piece.args[1] == part:
        return piece.args[0].args[0]
    raise Mismatch(piece, f"part {part} of a split row ({name})", op_name(piece))


RULE = FusePackedDecode()
