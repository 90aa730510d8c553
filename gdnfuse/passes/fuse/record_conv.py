"""causal_conv(x, context=state), record(x, state, a, b, …)  →  causal_conv_record, which reads the rows and the window once"""

from __future__ import annotations

from dataclasses import dataclass

from gdnfuse.dialect import causal_conv, causal_conv_record, record
from gdnfuse.errors import Refused
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.evaluate import hint
from gdnfuse.rewrite.graph import op_name, value
from gdnfuse.rewrite.rule import Match, Rule

CHANNELS = 8  # number of channels in proofs
AXES = {"x": 1, "context": 1, "weight": 0, "bias": 0, "windows": 2}  # where operands have channels


@dataclass(frozen=True)
class Facts:
    activation: str


class FuseRecordConv(Rule[Facts]):
    name, stage, equation = "record_conv", "fuse", causal_conv_record.op.equation

    def anchors(self, graph):
        """Tokens that are recorded."""
        return graph.find_nodes(op="call_function", target=record.op.overload)

    def match(self, anchor):
        recorded = record.op.bind(anchor.args, anchor.kwargs)
        convs = [u for u in recorded["x"].users if op_name(u) == "gdnfuse.causal_conv"]
        if len(convs) != 1:
            raise Refused(f"What is recorded must enter one causal conv, found {len(convs)}.", at=anchor)
        conv = causal_conv.op.bind(convs[0].args, convs[0].kwargs)
        if conv["context"] is not recorded["context"] or conv["x"] is not recorded["x"]:
            raise Refused("The conv must have the recorded window as its context, found another.", at=convs[0])
        if conv.pop("cu_seqlens") is not None:
            raise Refused("The conv must be of one sequence per row, found bounds of packed ones.", at=convs[0])
        facts = Facts(conv.pop("activation"))
        m = Match(conv | recorded, convs, facts, writes=dict.fromkeys(record.op.mutates, anchor))
        for name in AXES.keys() & m.inputs.keys():
            shape = [hint(s) for s in value(m.inputs[name]).shape]
            shape[AXES[name]] = min(shape[AXES[name]], CHANNELS)
            m.shapes[name] = tuple(shape)
        return m

    def rewrite(self, m, t):
        return call(causal_conv_record.op.overload, **vars(t), activation=m.facts.activation)


RULE = FuseRecordConv()
