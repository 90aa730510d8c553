"""linear(mixer_decode(linear(x)))  →  in_proj_conv, packed_decode, and the gated norm in fused_linear, for few rows

Both linears stream their weights anyway: the first has an owner for every channel of the conv, and with the norm in the second
the rule may be split over as many programs as a device has room for.
"""

from __future__ import annotations

from gdnfuse.dialect import fused_linear, in_proj_conv, mixer_decode, packed_decode
from gdnfuse.errors import Refused
from gdnfuse.passes.fuse.linears import alone, arguments_match, arguments_of, bind, fused_call, is_linear
from gdnfuse.passes.rows import one_row
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import op_name, peel, real_users, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Operand, Rule, bring

RULE_ARGUMENTS = ("A_log", "dt_bias", "recurrent_state", "scale", "l2norm_eps", "beta_scale")


class FuseMixerLinears(Rule):
    name, stage = "mixer_linears", "fuse"
    equation = "out_proj(mixer_decode(in_proj(x))) = fused_linear(packed_decode(in_proj_conv(x)), gated norm)"

    def anchors(self, graph):
        """A mixer of one row."""
        return [n for n in graph.nodes if op_name(n) == "gdnfuse.mixer_decode" and one_row(n)]

    def match(self, anchor):
        mixer = mixer_decode.op.bind(anchor.args, anchor.kwargs)
        first = peel(mixer["row"])
        if not is_linear(first):
            raise Mismatch(first, "a linear without bias as the mixer's row", op_name(first))
        alone(first, anchor)
        readers = list(real_users(anchor))
        if len(readers) != 1 or not is_linear(readers[0]):
            raise Mismatch(anchor, "a linear without bias as the one reader of the mixer", ", ".join(map(op_name, readers)))
        (last,) = readers
        before, behind = bind(first), bind(last)
        if before["swiglu"] or before["residual"] is not None or before["gate"] is not None:
            raise Refused("in_proj must have nothing fused behind it, found that it has.", at=first)
        if behind["norm_weight"] is not None or len(behind["weights"]) != 1:
            raise Refused("out_proj must be one linear without a norm, found otherwise.", at=last)
        B, HV, _, V = value(mixer["recurrent_state"]).shape
        if V & (V - 1):  # which its kernel adds up in registers
            raise Refused(f"Heads must be a power of two wide for out_proj to normalise them, found {V}.", at=anchor)
        projection = {k: before[k] for k in ("weights", "norm_weight", "norm_eps", "norm_offset")} | {
            "x": bring(before["x"], (B, 1, value(before["x"]).shape[-1]), "x"),
            "conv_state": mixer["conv_state"],
            "conv_weight": mixer["conv_weight"],
            "conv_bias": mixer["conv_bias"],
            "activation": mixer["activation"],
        }
        where, layout = _layout(mixer)
        projection |= layout
        rule = {k: mixer[k] for k in RULE_ARGUMENTS}
        out = {k: behind[k] for k in ("weights", "swiglu", "residual")} | {
            "norm_weight": mixer["norm_weight"], "norm_eps": mixer["norm_eps"], "gate_activation": mixer["gate_activation"],
        }  # fmt: skip
        m = arguments_match(
            [last],
            {"row": (in_proj_conv.op, projection), "rule": (packed_decode.op, rule), "y": (fused_linear.op, out)},
            writes={"row_conv_state_0": anchor, "rule_recurrent_state_0": anchor},
        )
        # The columns of out_proj are the heads; of its rows a few prove as much.
        names = m.data["names"]
        for node, shape in ((behind["weights"][0], (8, HV * V)), (behind["residual"], (B, 1, 8))):
            if node is not None:
                m.shapes[names[node.node if isinstance(node, Operand) else node]] = shape
        m.data["parts"] = where
        m.data["shape"] = None if value(last).ndim == 3 else (*value(last).shape[:-1], -1)
        m.data["heads"] = HV * V
        return m

    def rewrite(self, m, t):
        row = fused_call(m, t, "row")
        parts = {k: row.narrow(-1, *where) for k, where in m.data["parts"].items()}
        gate = parts.pop("gate")
        o = call(packed_decode.op.overload, **parts, **arguments_of(m, t, "rule"))
        y = fused_call(m, t, "y", x=o.reshape(-1, 1, m.data["heads"]), gate=gate)
        return y if m.data["shape"] is None else y.reshape(m.data["shape"])


def _layout(mixer):
    """Offset and width of each part in the projection's result, and its arguments that make them so."""
    heads, widths = mixer_decode.part_sizes(value(mixer["conv_state"]).shape[1], value(mixer["recurrent_state"]))
    offsets, strides = mixer["offsets"], mixer["strides"]
    sizes = [heads * width for width in widths]
    layout = {"conv_offset": offsets[0]}
    if not mixer_decode.side_by_side(offsets, strides, widths, heads) or heads > 1 and strides[3:] != widths[3:]:
        parts = zip(offsets, strides, widths, strict=True)
        columns = [first + h * step + i for first, step, width in parts for h in range(heads) for i in range(width)]
        if len({*columns}) < len(columns):
            raise Refused("Parts must share no columns for in_proj to put them one behind the other, found that two do.")
        layout = {
            "conv_offset": 0,
            "parts": [n for part in zip(offsets, strides, widths, strict=True) for n in part],
            "heads": heads,
        }
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    names = ("gate", "b", "a")
    where = dict(zip(names, zip(offsets[3:], sizes[3:], strict=True), strict=True))
    return {"mixed_qkv": (offsets[0], sum(sizes[:3])), **where}, layout


RULE = FuseMixerLinears()
