"""causal_conv(cat([state, x]))[…, −T:], state.copy_(last columns of the cat)  →  causal_conv(x, context=state), the same copy

A verify step does not write the state. There only the conv is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gdnfuse.dialect import causal_conv
from gdnfuse.errors import Refused
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.evaluate import hint
from gdnfuse.rewrite.graph import op_name, peel, real_users, same_shape, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Match, Rule

CHANNELS = 8  # number of channels in proofs


@dataclass(frozen=True)
class Facts:
    activation: str
    width: int  # width of the state


class FuseConvContext(Rule[Facts]):
    name, stage = "conv_context", "fuse"
    equation = "causal_conv([state | x])[−T:] = causal_conv(x, context=state)"

    def anchors(self, graph):
        """Convs of a concatenation of two tensors."""
        for node in graph.nodes:
            if op_name(node) == "gdnfuse.causal_conv" and op_name(window := peel(node.args[0])) == "cat":
                if len(window.args[0]) == 2:
                    yield node

    def match(self, anchor):
        conv = causal_conv.op.bind(anchor.args, anchor.kwargs)
        window = peel(conv["x"])
        if conv["cu_seqlens"] is not None:
            raise Refused("The conv must be of one sequence per row, found bounds of packed ones.", at=anchor)
        if conv["context"] is not None:
            raise Mismatch(anchor, "a conv without a context of its own", "one with it")
        state, x = window.args[0]
        cut = [u for u in anchor.users if op_name(u) == "getitem"]
        if len(cut) != 1 or len(anchor.users) != 1 or not same_shape(value(cut[0]).shape, value(x).shape):
            found = ", ".join(map(op_name, anchor.users))
            raise Mismatch(anchor, "its last columns, as many as new tokens, as the one reader", found)
        kept = [u for u in window.users if op_name(u) == "getitem"]
        copies = [u for k in kept for u in real_users(k) if op_name(u) == "copy_" and u.args[0] is state]
        if kept and len(copies) != 1:
            raise Refused(f"The new window must be copied once into the state, found {len(copies)} copies.", at=window)
        operands = {"x": x, "state": state, "weight": conv["weight"], "bias": conv["bias"]}
        m = Match(operands, cut, Facts(conv["activation"], value(state).shape[-1]))
        m.writes |= {"state": copies[0]} if copies else {}
        m.shapes |= {name: _narrow(n, 1 if name in ("x", "state") else 0) for name, n in m.inputs.items()}
        return m

    def rewrite(self, m, t):
        S = m.facts.width
        out = call(causal_conv.op.overload, t.x, t.weight, t.bias, m.facts.activation, t.state)
        if "state" in m.writes:
            t.state.copy_(torch.cat([t.state, t.x[..., -S:]], -1)[..., -S:])
        return out


def _narrow(node, channels):
    shape = [hint(s) for s in value(node).shape]
    shape[channels] = min(shape[channels], CHANNELS)
    return tuple(shape)


RULE = FuseConvContext()
