"""attention(q, k, v, a causal mask made in the graph)  →  the same with is_causal=True and no mask, or causal_attention

transformers makes the mask of a second prompt on a filled cache, and 5.17 that of any compiled prompt, as a tensor [B, 1, T, L],
with which no attention kernel skips what is masked. is_causal=True counts queries and keys from their first, which is right where
there are as many; the last T of L tokens are gdnfuse.causal_attention.
"""

from __future__ import annotations

import math

import torch
from torch.fx.node import map_aggregate

from gdnfuse.dialect import causal_attention
from gdnfuse.report import Refused
from gdnfuse.rewrite.driver import call
from gdnfuse.rewrite.graph import is_tensor, op_name, same, value
from gdnfuse.rewrite.rule import Match, Rule, shown

# The proof compares T × T attention in float64: symbolic lengths are bound to a small one, a fixed one must be small. The small
# one is above every number in the mask, because a window of 4096 shows in no mask of 37.
PROVED, MAX_FIXED = 37, 1024
MASK = 3


class FuseCausalAttention(Rule):
    name, stage, equation = "causal_attention", "fuse", "attention(q, k, v, tril) = causal attention(q, k, v)"

    def anchors(self, graph):
        """Attention of several queries under a mask."""
        for node in graph.nodes:
            if op_name(node) == "scaled_dot_product_attention" and is_tensor(_mask(node)):
                if not (isinstance(T := value(node.args[0]).shape[-2], int) and T == 1):
                    yield node

    def match(self, anchor):
        q, k, v = anchor.args[:3]
        kept = {name: a for name, a in anchor.kwargs.items() if name not in ("attn_mask", "is_causal")}
        number, symbols = _numbers(_mask(anchor))
        lengths = [*value(q).shape, *value(k).shape]
        data = {"target": anchor.target, "kept": kept, "number": number, "other": symbols - _symbols(lengths)}
        data["square"] = same(value(q).shape[-2], value(k).shape[-2])
        fixed = not _symbols(lengths)
        L = value(k).shape[-2]
        alike = [(L, value(v).shape[-2]), (L, value(_mask(anchor)).shape[-1])]
        small = None if fixed else max(PROVED, 2 * number + 5)
        return Match({"q": q, "k": k, "v": v}, [anchor], data=data, small=small, alike=alike)

    def check(self, m):
        anchor = m.outputs[0]
        if len(anchor.args) > MASK + 1 or m.data["kept"].get("dropout_p", 0.0) != 0.0:
            raise Refused("Attention must have no dropout and its options by name, found otherwise.", at=anchor)
        shapes = [value(n).shape for n in m.inputs.values()]
        unknown = m.data["kept"].keys() - {"scale", "dropout_p", "enable_gqa"}
        if not m.data["square"] and (unknown or any(len(shape) != 4 for shape in shapes)):
            found = ", ".join([*map(shown, shapes), *sorted(unknown)])
            raise Refused(f"Attention of the last tokens must have four axes and no more options, found {found}.", at=anchor)
        if m.data["other"]:
            found = ", ".join(sorted(map(str, m.data["other"])))
            raise Refused(f"A mask must depend on the sizes of q and k alone, found that it reads the number {found}.", at=anchor)
        if m.small is not None and m.small > MAX_FIXED:
            most, found = (MAX_FIXED - 5) // 2, m.data["number"]
            raise Refused(f"A mask must have no number above {most} in it to be proved, found {found}.", at=anchor)
        longest = max((s for s in value(_mask(anchor)).shape[-2:] if isinstance(s, int)), default=0)
        if longest > MAX_FIXED:
            raise Refused(f"A mask of fixed size must have at most {MAX_FIXED} columns to be proved, found {longest}.", at=anchor)

    def rewrite(self, m, t):
        if m.data["square"]:
            return call(m.data["target"], t.q, t.k, t.v, is_causal=True, **m.data["kept"])
        return call(causal_attention.op.overload, t.q, t.k, t.v, m.data["kept"].get("scale"))


def _numbers(mask):
    """The largest constant, in size, of all that the mask is computed with, and the symbols in it."""
    largest, symbols, todo, seen = 0, set(), [mask], set()

    def look(a):
        nonlocal largest
        if isinstance(a, int | float) and not isinstance(a, bool) and math.isfinite(a):
            largest = max(largest, math.ceil(abs(a)))
        return a

    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            map_aggregate((node.args, node.kwargs), look)
            todo.extend(node.all_input_nodes)
            symbols |= _symbols([value(node)])
    return largest, symbols


def _symbols(sizes):
    return {s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}


def _mask(node):
    return node.args[MASK] if len(node.args) > MASK else node.kwargs.get("attn_mask")


RULE = FuseCausalAttention()
