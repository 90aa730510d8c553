"""cat([conv_state, x]) → conv1d → act, with conv_state.copy_(last columns)  →  gdnfuse.causal_conv_update"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gdnfuse.dialect import causal_conv_update
from gdnfuse.errors import Refused
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import is_tensor, op_name, peel, real_users, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Match, Rule, bring


@dataclass(frozen=True)
class Facts:
    activation: str
    dtype: torch.dtype
    T: Any  # number of new tokens


class LiftCausalConvUpdate(Rule[Facts]):
    name, stage, equation = "causal_conv_update", "lift", causal_conv_update.op.equation

    def anchors(self, graph):
        """A copy into a rank-3 state that a depthwise convolution reads."""
        for node in graph.nodes:
            if op_name(node) == "copy_" and is_tensor(node.args[0]) and value(node.args[0]).ndim == 3:
                if any(op_name(n) == "conv1d" for n in _reached(node.args[0])):
                    yield node

    def match(self, anchor):
        state, new = anchor.args[0], anchor.args[1]
        window = peel(new)
        if op_name(window) == "getitem":
            window = peel(window.args[0])
        if op_name(window) != "cat" or len(window.args[0]) != 2:
            raise Mismatch(window, "cat of the conv state and the new tokens", op_name(window))
        first, x = window.args[0]
        if peel(first) is not state:
            raise Mismatch(first, f"the conv state {state}", str(peel(first)))
        convs = [u for u in _through_slices(window) if op_name(u) == "conv1d"]
        if len(convs) != 1:
            raise Refused(f"One conv1d must read the window, found {len(convs)}.", at=window)
        conv = convs[0]
        out = _only_slice(conv)
        activation = "none"
        readers = list(real_users(out))
        if len(readers) == 1 and op_name(readers[0]) == "silu":
            out, activation = readers[0], "silu"
        D, T = value(x).shape[1:]
        weight, bias = conv.args[1], conv.args[2] if len(conv.args) > 2 else conv.kwargs.get("bias")
        operands = {
            "x": bring(x, value(x).shape, "x"),
            "conv_state": state,
            "weight": bring(weight, (D, 1, value(weight).shape[-1]), "weight"),
            "bias": None if bias is None else bring(bias, (D,), "bias"),
        }
        return Match(operands, [out], Facts(activation, value(out).dtype, T), writes={"conv_state": anchor})

    def check(self, m):
        if not isinstance(m.facts.T, int):
            raise Refused(f"The number of new tokens must be static, found {m.facts.T}.", at=m.outputs[0])

    def rewrite(self, m, t):
        y = call(causal_conv_update.op.overload, t.x, t.conv_state, t.weight, t.bias, m.facts.activation)
        return y.to(m.facts.dtype)


def _reached(state):
    """Ops that read a window made of the state."""
    for user in real_users(state):
        if op_name(user) == "cat":
            yield from _through_slices(user)


def _through_slices(node):
    for user in real_users(node):
        yield user
        if op_name(user) == "getitem":
            yield from _through_slices(user)


def _only_slice(conv):
    """The slice of the last columns of a conv's output, if the caller takes one."""
    readers = list(real_users(conv))
    return readers[0] if len(readers) == 1 and op_name(readers[0]) == "getitem" else conv


RULE = LiftCausalConvUpdate()
