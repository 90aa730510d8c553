"""mixer_decode(linear(x))  →  packed_decode(in_proj_conv(x)), with the gated norm, for few rows

The linear streams its weight anyway, and has an owner for every channel of the conv: what is left of the mixer is one kernel.
"""

from __future__ import annotations

import torch

from gdnfuse.dialect import in_proj_conv, mixer_decode, packed_decode
from gdnfuse.passes.fuse.linears import alone, arguments_match, arguments_of, bind, fused_call, is_linear
from gdnfuse.passes.rows import few_rows
from gdnfuse.report import Refused
from gdnfuse.rewrite.driver import call
from gdnfuse.rewrite.graph import op_name, peel, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Rule, bring

RULE_ARGUMENTS = ("A_log", "dt_bias", "recurrent_state", "scale", "l2norm_eps", "norm_weight", "norm_eps")


class FuseInProjConv(Rule):
    name, stage = "in_proj_conv", "fuse"
    equation = "mixer_decode(in_proj(x)) = packed_decode(in_proj_conv(x), z)"

    def anchors(self, graph):
        """A mixer of few rows."""
        return [n for n in graph.nodes if op_name(n) == "gdnfuse.mixer_decode" and few_rows(n)]

    def match(self, anchor):
        mixer = mixer_decode.op.bind(anchor.args, anchor.kwargs)
        linear = peel(mixer["row"])
        if not is_linear(linear):
            raise Mismatch(linear, "a linear without bias as the mixer's row", op_name(linear))
        alone(linear, anchor)
        bound = bind(linear)
        if bound["swiglu"] or bound["residual"] is not None:
            raise Refused("in_proj must have nothing fused behind it, found that it has.", at=linear)
        dtype, weight = value(anchor).dtype, mixer["norm_weight"]
        if torch.promote_types(value(weight).dtype, dtype) != value(weight).dtype:
            raise Refused(f"The norm's weight must hold its output, {dtype}, found {value(weight).dtype}.", at=weight)
        B, HV, _, V = value(mixer["recurrent_state"]).shape
        D = value(mixer["conv_state"]).shape[1]
        projection = {k: bound[k] for k in ("weights", "norm_weight", "norm_eps", "norm_offset")} | {
            "x": bring(bound["x"], (B, 1, value(bound["x"]).shape[-1]), "x"),
            "conv_state": mixer["conv_state"],
            "conv_weight": mixer["conv_weight"],
            "conv_bias": mixer["conv_bias"],
            "conv_offset": mixer["qkv_offset"],
            "activation": mixer["activation"],
        }
        m = arguments_match(
            [anchor],
            {"row": (in_proj_conv.op, projection), "rule": (packed_decode.op, {k: mixer[k] for k in RULE_ARGUMENTS})},
            writes={"row_conv_state_0": anchor, "rule_recurrent_state_0": anchor},
        )
        m.data["parts"] = {"mixed_qkv": (mixer["qkv_offset"], D), "z": (mixer["z_offset"], HV * V)}
        m.data["parts"] |= {k: (mixer[f"{k}_offset"], HV) for k in ("a", "b")}
        m.data["dtype"] = None if value(weight).dtype == dtype else dtype
        return m

    def rewrite(self, m, t):
        row = fused_call(m, t, "row")
        parts = {k: row.narrow(-1, *where) for k, where in m.data["parts"].items()}
        y = call(packed_decode.op.overload, **parts, **arguments_of(m, t, "rule")).flatten(-2)
        return y if m.data["dtype"] is None else y.to(m.data["dtype"])


RULE = FuseInProjConv()
