"""causal_conv_update → packed_decode → gated_rms_norm on columns of one row or of a few rows  →  mixer_decode"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import Node

from gdnfuse.dialect import causal_conv_update, gated_rms_norm, mixer_decode, packed_decode
from gdnfuse.errors import Refused
from gdnfuse.passes.fuse.rules import two_sequences
from gdnfuse.rewrite.columns import Columns
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import is_tensor, op_name, peel, real_users, same, source, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Match, Rule, bring


@dataclass(frozen=True)
class Facts:
    """What is known about the match.

    Attributes:
        offsets, strides: where q, k, v, z, b and a of each key head are in the row.
        numbers: the other arguments of mixer_decode that are not operands.
        shape: the shape of the result, if it is not [B, 1, HV·V].
        dtype: the dtype of the result.
    """

    offsets: list[int]
    strides: list[int]
    numbers: dict[str, Any]
    shape: tuple[Any, ...] | None
    dtype: torch.dtype


class FuseMixerDecode(Rule[Facts]):
    name, stage, equation = "mixer_decode", "fuse", mixer_decode.op.equation

    def anchors(self, graph):
        return [n for n in graph.nodes if op_name(n) == "gdnfuse.packed_decode"]

    def match(self, anchor):
        rule = packed_decode.op.bind(anchor.args, anchor.kwargs)
        conv_node = peel(rule["mixed_qkv"])
        if op_name(conv_node) != "gdnfuse.causal_conv_update":
            raise Mismatch(conv_node, "causal_conv_update before the rule", op_name(conv_node))
        conv = causal_conv_update.op.bind(conv_node.args, conv_node.kwargs)
        norm_node = _one_reader(anchor)
        norm = gated_rms_norm.op.bind(norm_node.args, norm_node.kwargs)
        # Sizes of parameters are numbers. Those of a cache may be symbols.
        state = SimpleNamespace(shape=(None, *value(rule["A_log"]).shape, *value(rule["recurrent_state"]).shape[2:]))
        heads, widths = mixer_decode.part_sizes(value(conv["weight"]).shape[0], state)
        heads, *widths = (n if isinstance(n, int) else n.node.maybe_as_int() for n in (heads, *widths))
        if None in (heads, *widths):
            raise Refused("The heads of the states must have static sizes, found symbolic ones.", at=anchor)
        B, columns = value(rule["recurrent_state"]).shape[0], Columns()
        found = torch.cat([columns.of(node, B) for node in (conv["x"], norm["z"], rule["b"], rule["a"])])
        found = dict(zip("qkvzba", found.split([heads * width for width in widths]), strict=True))
        where = [_where(norm_node, name, of_part, heads) for name, of_part in found.items()]
        numbers = {name: rule[name] for name in ("scale", "l2norm_eps", "beta_scale")} | {
            "activation": conv["activation"], "norm_eps": norm["eps"], "gate_activation": norm["activation"],
        }  # fmt: skip
        out = _end(norm_node)
        operands = {
            "row": [bring(row, (B, 1, width), "row") for row, width in columns.rows.items()],
            "conv_weight": bring(conv["weight"], value(conv["weight"]).shape, "conv_weight"),
            "conv_state": conv["conv_state"],
            "conv_bias": conv["bias"],
            "A_log": rule["A_log"],
            "dt_bias": rule["dt_bias"],
            "recurrent_state": rule["recurrent_state"],
            "norm_weight": norm["weight"],
        }
        shape = None if value(out).ndim == 3 and same(value(out).shape[1], 1) else tuple(value(out).shape)
        m = Match(
            operands,
            [out],
            Facts(*(list(x) for x in zip(*where, strict=True)), numbers, shape, value(out).dtype),
            writes={"conv_state": conv_node, "recurrent_state": anchor},
        )
        return two_sequences(m, *(name for name in m.inputs if name.startswith("row_")), "conv_state", "recurrent_state")

    def rewrite(self, m, t):
        row = t.row[0] if len(t.row) == 1 else torch.cat(t.row, -1)
        tensors = vars(t) | {"row": row}
        y = call(mixer_decode.op.overload, **tensors, offsets=m.facts.offsets, strides=m.facts.strides, **m.facts.numbers)
        if m.facts.shape is not None:
            y = y.reshape(-1, *m.facts.shape[1:])
        return y.to(m.facts.dtype)


def _one_reader(rule):
    readers = list(real_users(rule))
    if len(readers) != 1 or op_name(readers[0]) != "gdnfuse.gated_rms_norm":
        found = ", ".join(map(op_name, readers)) or "no reader"
        raise Mismatch(rule, "gated_rms_norm as the one reader of the rule's output", found)
    return readers[0]


def _where(node: Node, name: str, columns: torch.Tensor, heads: int) -> tuple[int, int]:
    """Offset and stride of a part whose columns are grouped by key head."""
    of_heads = columns.view(heads, -1)
    offset, width = int(of_heads[0, 0]), of_heads.shape[1]
    stride = int(of_heads[1, 0]) - offset if heads > 1 else width
    if stride < width or not torch.equal(of_heads, offset + stride * torch.arange(heads)[:, None] + torch.arange(width)):
        raise Mismatch(node, f"{width} columns of {name} for each of {heads} key heads, equally far apart", "others")
    return offset, stride


def _end(node):
    """Follow views of the result, as long as each is the only reader of the one before."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if not is_tensor(user) or source(user) is not node:
            return node
        node = user
    return node


RULE = FuseMixerDecode()
