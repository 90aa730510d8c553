"""fused_gating_delta_rule(q, k, v = slices of one row, …) at T = 1  →  packed_decode(mixed_qkv, …)"""

from __future__ import annotations

import torch

from gdnfuse.dialect import fused_gating_delta_rule, packed_decode
from gdnfuse.errors import Refused
from gdnfuse.passes.fuse.rules import Step, two_sequences
from gdnfuse.rewrite.columns import Columns
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import op_name, same, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Match, Rule, bring

GATES = ("a", "b", "A_log", "dt_bias", "recurrent_state")


class FusePackedDecode(Rule[Step]):
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
            raise Mismatch(anchor, f"q, k and v in order as all {D} columns of one row", "others")
        operands = {"mixed_qkv": bring(row, (B, 1, D), "mixed_qkv"), **{name: bound[name] for name in GATES}}
        facts = Step(bound["scale"], bound["l2norm_eps"], bound["beta_scale"])
        m = Match(operands, [anchor], facts, writes={"recurrent_state": anchor})
        return two_sequences(m, "mixed_qkv", "a", "b", "recurrent_state")

    def check(self, m):
        if m.facts.l2norm_eps is None:
            raise Refused("q and k must be l2-normalised before the rule, found that one is not.", at=m.outputs[0])

    def rewrite(self, m, t):
        tensors = (t.mixed_qkv, t.a, t.b, t.A_log, t.dt_bias, t.recurrent_state)
        return call(packed_decode.op.overload, *tensors, m.facts.scale, m.facts.l2norm_eps, m.facts.beta_scale)


RULE = FusePackedDecode()
