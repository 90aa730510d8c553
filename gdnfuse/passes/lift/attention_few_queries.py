"""attention with few queries on keys and values of any length, and its output gate  →  gdnfuse.attention_few_queries

These are up to 8 queries, or up to 64 on a cache of fixed length, of which most is not filled or was known before.

The keys of a growing cache are longer at each token. A library that plans for their length, such as cuDNN, makes a new plan each
time. In a cache of fixed length, new keys and values are written before attention, as in the original graph.
"""

from __future__ import annotations

from gdnfuse.dialect import attention_few_queries
from gdnfuse.passes.lift.attention_decode import PROVED, different_positions, write_into
from gdnfuse.passes.sdpa import (
    SEEN_EVERY,
    SMALL,
    OneQuery,
    back_to,
    few_queries,
    gated,
    mask_of,
    on_a_cache,
    queries_on_a_cache,
    random_mask,
    require_dtype_of_q,
    require_heads,
    require_plain,
    require_provable,
    scale_of,
    without_copies,
)
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import is_tensor, peel, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Match, Rule, bring


class LiftAttentionFewQueries(Rule[OneQuery]):
    name, stage, equation = "attention_few_queries", "lift", attention_few_queries.op.equation

    def anchors(self, graph):
        """Attention with few queries, for all inputs."""
        yield from few_queries(graph)
        yield from queries_on_a_cache(graph)

    def match(self, anchor):
        B, H, T, D = value(anchor.args[0]).shape
        keys, values = (without_copies(node) for node in anchor.args[1:3])
        L = value(keys).shape[-2]
        out, gate = gated(anchor)
        mask = mask_of(anchor)
        operands = {
            "q": anchor.args[0],
            "keys": keys,
            "values": values,
            "gate": None if gate is None else bring(gate, (B, T, H, D), "gate"),
            "mask": mask if is_tensor(mask) else None,
        }
        # Of the proof, where all new keys have room that no mask hides.
        length = L if isinstance(L, int) else max(SMALL, SEEN_EVERY * T) if isinstance(T, int) else SMALL
        m = Match(
            {**operands, **(new := _written(keys, values) if on_a_cache(anchor) else {})},
            [out],
            OneQuery(anchor, scale_of(anchor), back_to(out, T, H, D)),
            samplers={"mask": random_mask},
            small=None if isinstance(L, int) else length,
            equal_sizes=[(L, value(n).shape[axis]) for n, axis in ((values, -2), (mask, -1)) if is_tensor(n)],
        )
        if new:
            m.writes |= {name: write_into(cache, name) for name, cache in (("keys", keys), ("values", values))}
            m.samplers["position"] = different_positions(length)
        return m

    def check(self, m):
        anchor = m.facts.anchor
        require_plain(anchor, m)
        require_heads(anchor, m)
        require_provable(anchor, m, PROVED if m.writes else None)
        require_dtype_of_q(m, "keys", "values", "gate")

    def rewrite(self, m, t):
        given = dict(vars(t))
        if m.writes:
            position = given.pop("position")
            for name in ("keys", "values"):
                given[name].index_copy_(2, position, given.pop(f"new_{name}"))
        return m.facts.back(call(attention_few_queries.op.overload, **given, scale=m.facts.scale))


def _written(keys, values):
    """What is written into keys and values of a cache of fixed length, and where."""
    wrote_k, wrote_v = (write_into(x, name) for x, name in ((keys, "keys"), (values, "values")))
    if peel(wrote_v.args[2]) is not peel(wrote_k.args[2]):
        raise Mismatch(wrote_v, f"values written at {wrote_k.args[2]}, as keys are", str(wrote_v.args[2]))
    return {"new_keys": wrote_k.args[3], "new_values": wrote_v.args[3], "position": wrote_k.args[2]}


RULE = LiftAttentionFewQueries()
