"""linear(mixer_decode(linear(x)))  →  in_proj_conv, packed_decode, and the gated norm in fused_linear, for few rows

Both linears stream their weights anyway. In the first, one program owns each channel of the conv. With the norm in the second,
the rule can be split over as many programs as a device has room for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gdnfuse.dialect import fused_linear, in_proj_conv, mixer_decode, packed_decode
from gdnfuse.errors import Refused
from gdnfuse.passes.fuse.linears import LORA, bind, is_linear, narrow
from gdnfuse.passes.rows import one_row
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import op_name, peel, real_users, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Match, Rule, bring, require_one_reader


@dataclass(frozen=True)
class Facts:
    """What is known about the match.

    Attributes:
        in_proj, rule, out_proj: arguments of in_proj_conv, packed_decode and fused_linear that are not operands.
        parts: offset and width of each part in the result of in_proj.
        width: columns of the rule's result, HV·V.
        shape: the shape of the result, if it is not that of out_proj.
    """

    in_proj: dict[str, Any]
    rule: dict[str, Any]
    out_proj: dict[str, Any]
    parts: dict[str, tuple[int, int]]
    width: int
    shape: tuple[Any, ...] | None


class FuseMixerLinears(Rule[Facts]):
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
        require_one_reader(first, anchor)
        readers = list(real_users(anchor))
        if len(readers) != 1 or not is_linear(readers[0]):
            raise Mismatch(anchor, "a linear without bias as the one reader of the mixer", ", ".join(map(op_name, readers)))
        (last,) = readers
        before, behind = bind(first), bind(last)
        if before["swiglu"] or before["residual"] is not None or before["gate"] is not None:
            raise Refused("in_proj must have nothing fused after it, found something.", at=first)
        if behind["norm_weight"] is not None or len(behind["weights"]) != 1:
            raise Refused("out_proj must be one linear without a norm, found otherwise.", at=last)
        B, HV, _, V = value(mixer["recurrent_state"]).shape
        if V & (V - 1):  # the kernel adds up V columns in registers, which needs a power of two
            raise Refused(f"Heads must be a power of two wide for out_proj to normalise them, found {V}.", at=anchor)
        parts, layout = _layout(mixer)
        m = Match(
            {
                "x": bring(before["x"], (B, 1, value(before["x"]).shape[-1]), "x"),
                **{name: before[name] for name in ("weights", "norm_weight")},
                **{name: mixer[name] for name in ("conv_state", "conv_weight", "conv_bias")},
                **{name: mixer[name] for name in ("A_log", "dt_bias", "recurrent_state")},
                "gated_norm_weight": mixer["norm_weight"],
                "out_weights": behind["weights"],
                "residual": behind["residual"],
                **{name: before[name] for name in LORA[:2]},
                **{f"out_{name}": behind[name] for name in LORA[:2]},
            },
            [last],
            Facts(
                {name: before[name] for name in ("norm_eps", "norm_offset", *LORA[2:])}
                | {"activation": mixer["activation"]}
                | layout,
                {name: mixer[name] for name in ("scale", "l2norm_eps", "beta_scale")},
                {name: behind[name] for name in ("swiglu", *LORA[2:])}
                | {name: mixer[name] for name in ("norm_eps", "gate_activation")},
                parts,
                HV * V,
                None if value(last).ndim == 3 else (*value(last).shape[:-1], -1),
            ),
            writes={"conv_state": anchor, "recurrent_state": anchor},
        )
        narrow(m)
        # The columns of out_proj are those of the heads. The proof uses a few of its rows.
        if behind["lora_A"] is None:
            m.shapes |= {"out_weights_0": (8, HV * V), "residual": (B, 1, 8)}
        return m

    def rewrite(self, m, t):
        row = call(
            in_proj_conv.op.overload,
            **{name: getattr(t, name) for name in ("x", "weights", "norm_weight", "conv_state", "conv_weight", "conv_bias")},
            **{name: getattr(t, name) for name in LORA[:2]},
            **m.facts.in_proj,
        )
        parts = {name: row.narrow(-1, *where) for name, where in m.facts.parts.items()}
        gate = parts.pop("gate")
        rule = {"A_log": t.A_log, "dt_bias": t.dt_bias, "recurrent_state": t.recurrent_state, **m.facts.rule}
        o = call(packed_decode.op.overload, **parts, **rule)
        y = call(
            fused_linear.op.overload,
            x=o.reshape(-1, 1, m.facts.width),
            weights=t.out_weights,
            norm_weight=t.gated_norm_weight,
            gate=gate,
            residual=t.residual,
            **{name: getattr(t, f"out_{name}") for name in LORA[:2]},
            **m.facts.out_proj,
        )
        return y if m.facts.shape is None else y.reshape(m.facts.shape)


def _layout(mixer):
    """Offset and width of each part in the result of the projection, and the arguments that give it this layout."""
    heads, widths = mixer_decode.part_sizes(value(mixer["conv_state"]).shape[1], value(mixer["recurrent_state"]))
    offsets, strides = mixer["offsets"], mixer["strides"]
    sizes = [heads * width for width in widths]
    layout = {"conv_offset": offsets[0]}
    if not mixer_decode.side_by_side(offsets, strides, widths, heads) or heads > 1 and strides[3:] != widths[3:]:
        parts = zip(offsets, strides, widths, strict=True)
        columns = [first + h * step + i for first, step, width in parts for h in range(heads) for i in range(width)]
        if len({*columns}) < len(columns):
            raise Refused("Parts must share no columns for in_proj to concatenate them, found two that do.")
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
