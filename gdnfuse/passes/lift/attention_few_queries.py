"""attention with 1 to 8 queries on keys and values of any length, and its output gate  →  gdnfuse.attention_few_queries

The keys of a growing cache are longer at each token. A library that plans for their length, such as cuDNN, makes a new plan each
time. In a cache of fixed length, new keys and values are written before attention, as in the original graph.
"""

from __future__ import annotations

from gdnfuse.dialect import attention_few_queries
from gdnfuse.passes.lift.attention_decode import PROVED, different_positions, write_into
from gdnfuse.passes.sdpa import (
    SMALL,
    OneQuery,
    back_to,
    few_queries,
    gated,
    mask_of,
    random_mask,
    require_dtype_of_q,
    require_heads,
    require_plain,
    require_provable,
    scale_of,
    without_copies,
)
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import is_tensor, op_name, peel, value
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Match, Rule, bring


class LiftAttentionFewQueries(Rule[OneQuery]):
    name, stage, equation = "attention_few_queries", "lift", attention_few_queries.op.equation

    def anchors(self, graph):
        """Attention with few queries, for all inputs."""
        yield from few_queries(graph)

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
        m = Match(
            {**operands, **(new := _written(keys, values))},
            [out],
            OneQuery(anchor, scale_of(anchor), back_to(out, T, H, D)),
            samplers={"mask": random_mask},
            small=None if isinstance(L, int) else SMALL,
            equal_sizes=[(L, value(n).shape[axis]) for n, axis in ((values, -2), (mask, -1)) if is_tensor(n)],
        )
        if new:
            m.writes |= {name: write_into(cache, name) for name, cache in (("keys", keys), ("values", values))}
            m.samplers["position"] = different_positions(L)
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
    """What is written into keys and values, and where, if they are a cache of fixed length. Empty otherwise."""
    if not all(x.op == "placeholder" and any(op_name(u) == "index_copy_" for u in x.users) for x in (keys, values)):
        return {}
    wrote_k, wrote_v = (write_into(x, name) for x, name in ((keys, "keys"), (values, "values")))
    if peel(wrote_v.args[2]) is not peel(wrote_k.args[2]):
        raise Mismatch(wrote_v, f"values written at {wrote_k.args[2]}, as keys are", str(wrote_v.args[2]))
    return {"new_keys": wrote_k.args[3], "new_values": wrote_v.args[3], "position": wrote_k.args[2]}


RULE = LiftAttentionFewQueries()
