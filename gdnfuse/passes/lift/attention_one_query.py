"""attention with one query on keys and values of any length, and its output gate  →  gdnfuse.attention_one_query

The keys of a cache that grows are longer at each token, and a library that plans for their length, as cuDNN does, plans anew.
"""

from __future__ import annotations

from gdnfuse.dialect import attention_one_query
from gdnfuse.passes.sdpa import (
    SMALL,
    OneQuery,
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


class LiftAttentionOneQuery(Rule[OneQuery]):
    name, stage, equation = "attention_one_query", "lift", attention_one_query.op.equation

    def anchors(self, graph):
        """Attention with one query."""
        yield from one_query(graph)

    def match(self, anchor):
        B, H, _, D = value(anchor.args[0]).shape
        keys, values = (without_copies(node) for node in anchor.args[1:3])
        L = value(keys).shape[-2]
        out, gate = gated(anchor)
        mask = mask_of(anchor)
        operands = {
            "q": anchor.args[0],
            "keys": keys,
            "values": values,
            "gate": None if gate is None else bring(gate, (B, 1, H, D), "gate"),
            "mask": mask if is_tensor(mask) else None,
        }
        return Match(
            operands,
            [out],
            OneQuery(anchor, scale_of(anchor), back_to(out, H, D)),
            samplers={"mask": some},
            small=None if isinstance(L, int) else SMALL,
            alike=[(L, value(n).shape[axis]) for n, axis in ((values, -2), (mask, -1)) if is_tensor(n)],
        )

    def check(self, m):
        anchor = m.facts.anchor
        require_plain(anchor, m)
        require_heads(anchor, m)
        require_provable(anchor, m)
        require_dtype_of_q(m, "keys", "values", "gate")

    def rewrite(self, m, t):
        return m.facts.back(call(attention_one_query.op.overload, **vars(t), scale=m.facts.scale))


RULE = LiftAttentionOneQuery()
