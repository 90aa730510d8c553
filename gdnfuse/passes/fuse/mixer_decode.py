"""packed_linear → causal_conv_update → packed_decode → gated_rms_norm  →  mixer_decode on the packed row"""

from __future__ import annotations

from gdnfuse.dialect import causal_conv_update, gated_rms_norm, mixer_decode, packed_decode
from gdnfuse.passes.fuse.rules import two_sequences
from gdnfuse.rewrite.driver import call
from gdnfuse.rewrite.graph import is_tensor, op_name, peel, real_users, same, source, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Match, Rule, bring

TENSORS = ("row", "conv_state", "conv_weight", "conv_bias", "A_log", "dt_bias", "recurrent_state", "norm_weight")


class FuseMixerDecode(Rule):
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
        offsets, rows = {}, {}
        for name, part in (("qkv", conv["x"]), ("z", norm["z"]), ("b", rule["b"]), ("a", rule["a"])):
            rows[name], offsets[name] = _part(part, name)
        row = rows["qkv"]
        for name, other in rows.items():
            if other is not row:
                raise Mismatch(other, f"{name} as a part of the row {row}", str(other))
        out = _end(norm_node)
        B = value(rule["recurrent_state"]).shape[0]
        weight = value(conv["weight"]).shape
        operands = {
            "row": bring(row, (B, 1, value(row).shape[-1]), "row"),
            "conv_weight": bring(conv["weight"], weight, "conv_weight"),
        }
        inputs = {
            **{k: x.node for k, x in operands.items()},
            "conv_state": conv["conv_state"],
            "conv_bias": conv["bias"],
            "A_log": rule["A_log"],
            "dt_bias": rule["dt_bias"],
            "recurrent_state": rule["recurrent_state"],
            "norm_weight": norm["weight"],
        }
        inputs = {k: n for k, n in inputs.items() if n is not None}
        return Match(
            inputs,
            [out],
            shapes=two_sequences(inputs, "row", "conv_state", "recurrent_state"),
            writes={"conv_state": conv_node, "recurrent_state": anchor},
            data={
                "how": {k: x.how for k, x in operands.items()},
                "offsets": [offsets[p] for p in ("qkv", "z", "b", "a")],
                "settings": [conv["activation"], rule["scale"], rule["l2norm_eps"], norm["eps"]],
                "shape": None if value(out).ndim == 3 and same(value(out).shape[1], 1) else tuple(value(out).shape),
                "dtype": value(out).dtype,
            },
        )

    def rewrite(self, m, t):
        how = m.data["how"]
        tensors = [how[k](getattr(t, k)) if k in how else getattr(t, k, None) for k in TENSORS]
        y = call(mixer_decode.op.overload, *tensors, *m.data["offsets"], *m.data["settings"])
        if m.data["shape"] is not None:
            shape = m.data["shape"]
            y = y.reshape(-1, *shape[1:])
        return y.to(m.data["dtype"])


def _one_reader(rule):
    readers = list(real_users(rule))
    if len(readers) != 1 or op_name(readers[0]) != "gdnfuse.gated_rms_norm":
        found = ", ".join(map(op_name, readers)) or "no reader"
        raise Mismatch(rule, "gated_rms_norm as the one reader of the rule's output", found)
    return readers[0]


def _part(node, name):
    """The packed row a part is cut from, and the column where it starts."""
    piece = peel(node)
    if op_name(piece) == "narrow" and op_name(peel(piece.args[0])) == "gdnfuse.packed_linear":
        return piece.args[0], piece.args[2]
    raise Mismatch(piece, f"{name} as a slice of a packed row", op_name(piece))


def _end(node):
    """Follow views of the result while each is its predecessor's only reader."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if not is_tensor(user) or source(user) is not node:
            return node
        node = user
    return node


RULE = FuseMixerDecode()
