"""norm, rotary embedding, longer keys and values, attention and output gate of one token  →  gdnfuse.attention_growing"""

from __future__ import annotations

from gdnfuse.dialect import attention_growing
from gdnfuse.errors import Refused
from gdnfuse.passes.lift.attention_decode import FewTokens, few_tokens
from gdnfuse.passes.sdpa import (
    SMALL,
    one_query,
    random_mask,
    require_dtype_of_q,
    require_heads,
    require_plain,
    require_provable,
    without_copies,
)
from gdnfuse.rewrite.edit import call, returned
from gdnfuse.rewrite.graph import op_name, peel, same, source, storage, value, writes
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.rule import Match, Rule


class LiftAttentionGrowing(Rule[FewTokens]):
    name, stage, equation = "attention_growing", "lift", attention_growing.op.equation

    def anchors(self, graph):
        """Attention with one query."""
        yield from one_query(graph)

    def match(self, anchor):
        (keys, old_k, new_k), (values, old_v, new_v) = (_longer(anchor.args[i], name) for i, name in ((1, "keys"), (2, "values")))
        operands, out, facts = few_tokens(anchor, new_k, new_v, value(old_k).shape[1])
        L, mask = value(old_k).shape[2], operands["mask"]
        lengths = [(L, value(old_v).shape[2])]
        if mask is not None:
            lengths.append((value(keys).shape[2], value(mask).shape[-1]))
        return Match(
            {**operands, "keys": old_k, "values": old_v},
            [out, keys, values],
            facts,
            samplers={"mask": _mask_of_cache_and_new_token},
            small=None if isinstance(L, int) else SMALL,
            equal_sizes=lengths,
        )

    def check(self, m):
        anchor = m.facts.anchor
        require_plain(anchor, m)
        require_heads(anchor, m)
        require_provable(anchor, m)
        require_dtype_of_q(m, "k", "v", "keys", "values", "gate")
        for name, node in zip(("keys", "values"), m.outputs[1:], strict=True):
            if part := next(_parts(node), None):
                raise Refused(f"The {name} must stay in the cache whole, found that {part.name} takes a part of them.", at=part)

    def rewrite(self, m, t):
        results = call(attention_growing.op.overload, **vars(t), **m.facts.numbers)
        return m.facts.back(results[0]), results[1], results[2]


def _longer(node, name):
    """The cat that makes keys or values one token longer, the old ones, and those of the token."""
    cat = peel(without_copies(node))
    tensors = (cat.args[0] if cat.args else cat.kwargs.get("tensors")) if op_name(cat) == "cat" else None
    if not isinstance(tensors, list | tuple):
        raise Mismatch(cat, f"{name} that are put together", op_name(cat))
    axis = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    shapes = [value(t).shape for t in tensors]
    if len(shapes) != 2 or any(len(shape) != 4 for shape in shapes) or axis not in (2, -2) or not same(shapes[1][2], 1):
        found = f"{' and '.join(str(list(shape)) for shape in shapes)} along {axis}"
        raise Mismatch(cat, f"{name} of all tokens so far, [B, HKV, L, D], followed by those of one", found)
    return cat, *tensors


def _parts(node):
    """Views of parts of a tensor that the graph returns, also through views of the whole tensor."""
    for user in node.users:
        if source(user) is node:
            yield from _parts(user)
        elif storage(user) == storage(node) and returned(user) and not writes(user):
            yield user


def _mask_of_cache_and_new_token(shape, generator):
    """A mask that hides some of the cache and shows the new token, whose scores no other operand would test."""
    mask = random_mask(shape, generator)
    mask[..., -1] = True
    return mask


RULE = LiftAttentionGrowing()
