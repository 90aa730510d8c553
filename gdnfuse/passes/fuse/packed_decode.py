"""fused_gating_delta_rule(q, k, v = slices of one row, …) at T = 1  →  packed_decode(mixed_qkv, …)"""

from __future__ import annotations

import torch

from gdnfuse.dialect import fused_gating_delta_rule, packed_decode
from gdnfuse.errors import Refused
from gdnfuse.passes.fuse.rules import two_sequences
from gdnfuse.rewrite.columns import Columns
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import op_name, same, value
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
        B, T, H, K = value(bound["q"]).shape
        HV, V = value(bound["v"]).shape[2:]
        if not same(T, 1):
            raise Refused(f"One token must be processed (T = 1), found T = {T}.", at=anchor)
        columns, D = Columns(), 2 * H * K + HV * V
        found = torch.cat([columns.of(bound[name], B) for name in ("q", "k", "v")])
        row, *others = columns.rows
        if others or columns.rows[row] != D or not torch.equal(found, torch.arange(D)):
            raise Mismatch(anchor, f"q, k and v one behind the other as all {D} columns of one row", "others")
        operand = bring(row, (B, 1, D), "mixed_qkv")
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


RULE = FusePackedDecode()
