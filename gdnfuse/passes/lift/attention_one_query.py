"""attention with one query on keys and values of any length, and its output gate  →  gdnfuse.attention_one_query

The keys of a cache that grows are longer at each token, and a library that plans for their length, as cuDNN does, plans anew.
"""

from __future__ import annotations

from gdnfuse.dialect import attention_one_query
from gdnfuse.passes.sdpa import (
    SMALL,
    as_is,
    back_to,
    gated,
    mask_of,
    one_query,
    require_dtype_of_q,
    require_heads,
    require_plain,
    require_provable,
    scale_of,
    some,
    without_copies,
)
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import is_tensor, value
from gdnfuse.rewrite.rule import Match, Rule, bring


class LiftAttentionOneQuery(Rule):
    name, stage, equation = "attention_one_query", "lift", attention_one_query.op.equation

    def anchors(self, graph):
        """Attention with one query."""
        yield from one_query(graph)

    def match(self, anchor):
        B, H, _, D = value(anchor.args[0]).shape
        keys, values = (without_copies(node) for node in anchor.args[1:3])
        L = value(keys).shape[-2]
        out, gate = gated(anchor)
        operands = {"q": as_is(anchor.args[0]), "keys": as_is(keys), "values": as_is(values)}
        if gate is not None:
            operands["gate"] = bring(gate, (B, 1, H, D), "gate")
        if is_tensor(mask := mask_of(anchor)):
            operands["mask"] = as_is(mask)
        return Match(
            {name: o.node for name, o in operands.items()},
            [out],
            data={
                "how": {name: o.how for name, o in operands.items()},
                "scale": scale_of(anchor),
                "back": back_to(out, H, D),
                "sdpa": anchor,
            },
            samplers={"mask": some},
            small=None if isinstance(L, int) else SMALL,
            alike=[(L, value(n).shape[axis]) for n, axis in ((values, -2), (mask, -1)) if is_tensor(n)],
        )

    def check(self, m):
        anchor = m.data["sdpa"]
        require_plain(anchor, m)
        require_heads(anchor, m)
        require_provable(anchor, m)
        require_dtype_of_q(m, "keys", "values", "gate")

    def rewrite(self, m, t):
        given = {name: how(getattr(t, name)) for name, how in m.data["how"].items()}
        y = call(attention_one_query.op.overload, **{"gate": None, "mask": None, **given, "scale": m.data["scale"]})
        return m.data["back"](y)


RULE = LiftAttentionOneQuery()
