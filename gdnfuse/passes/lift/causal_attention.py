"""attention(q, k, v, a causal mask made in the graph)  →  causal_attention, of keys and values before their heads are repeated

transformers makes a mask [B, 1, T, L] as a tensor for a second prompt on a filled cache, and version 5.17 for any compiled
prompt. With such a mask no attention kernel skips masked positions. transformers also repeats heads, because kernels with a mask
cannot share them. If the axes do not fit causal_attention, torch's op stays, with is_causal=True and no mask. That aligns the
first query with the first key, which is right if there are as many queries as keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from gdnfuse.dialect import causal_attention
from gdnfuse.errors import Refused
from gdnfuse.passes.sdpa import mask_of, options_of, require_numbers, without_copies
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import is_tensor, op_name, same, storage, value, writes
from gdnfuse.rewrite.rule import Match, Rule, shown

# The proof compares T × T attention in float64. Symbolic lengths are bound to small numbers. A fixed length must be small.
PROVED, MAX_FIXED = 37, 1024
# A proof with small lengths is enough only if the mask has no window or offset: a window of 4096 has no effect on a mask of 37.
# So with a symbolic length, a mask may only have these ops, which move and compare rows and columns, and numbers whose sum is at
# most that of j < i + 1 or triu(1). Ops that scale are not among them: (i − j) // 16 < 16 has a window of 256 without that
# number.
MOST = 2
MOVES = {
    "arange", "add", "iadd", "sub", "isub", "neg", "le", "lt", "ge", "gt", "eq", "ne", "and", "iand", "or", "ior", "not",
    "invert", "tril", "triu", "full", "where", "masked_fill", "getitem",
}  # fmt: skip
VIEWS = {  # their numbers are sizes and axes
    "expand", "reshape", "unsqueeze", "squeeze", "transpose", "contiguous", "clone", "to", "bool", "ones", "new_ones", "zeros",
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What is known about the match.

    Attributes:
        attention: torch's function.
        options: its other arguments that causal attention does not replace.
        fits: whether causal_attention supports it.
        number: the sum of the numbers that the mask is made with.
        strange: what else the mask is made with.
    """

    attention: Callable[..., Any]
    options: dict[str, Any]
    fits: bool
    number: int
    strange: set[str]


class LiftCausalAttention(Rule[Facts]):
    name, stage, equation = "causal_attention", "lift", "attention(q, k, v, tril) = causal attention(q, k, v)"

    def anchors(self, graph):
        """Attention of several queries under a mask."""
        for node in graph.nodes:
            if op_name(node) == "scaled_dot_product_attention" and len(node.args) >= 3 and is_tensor(mask_of(node)):
                if not (isinstance(T := value(node.args[0]).shape[-2], int) and T == 1):
                    yield node

    def match(self, anchor):
        (q, k, v), mask = anchor.args[:3], mask_of(anchor)
        options = {name: a for name, a in options_of(anchor).items() if name not in ("attn_mask", "is_causal")}
        T, L = value(q).shape[-2], value(k).shape[-2]
        number, strange = _numbers(mask, (T, L, L - T))
        more = options.keys() - {"scale", "dropout_p", "enable_gqa"}
        ways = [(q, without_copies(k), without_copies(v)), (q, k, v)]
        # What a cache writes in place is read as the value that was copied.
        written = {s for n in anchor.graph.nodes for s in writes(n)}
        ways = [way for way in ways if way[1:] == (k, v) or not {*map(storage, way)} & written]
        fitting = [way for way in ways if not more and causal_attention.takes(*map(value, way))]
        q, k, v = (fitting or ways[-1:])[0]
        facts = Facts(anchor.target, options, bool(fitting), number, strange)
        equal_sizes = [(L, value(v).shape[-2]), (L, value(mask).shape[-1])]
        small = None if isinstance(T, int) and isinstance(L, int) else PROVED
        return Match({"q": q, "k": k, "v": v}, [anchor], facts, small=small, equal_sizes=equal_sizes)

    def check(self, m):
        anchor = m.outputs[0]
        require_numbers(anchor)
        q, k, _ = shapes = [value(n).shape for n in m.inputs.values()]
        if not m.facts.fits and not same(q[-2], k[-2]):
            found = ", ".join([*map(shown, shapes), *sorted(m.facts.options)])
            wanted = "four axes, the same sequences, heads and columns, and no more options"
            raise Refused(f"Attention of the last tokens must have {wanted}, found {found}.", at=anchor)
        if m.facts.strange:
            found = ", ".join(sorted(m.facts.strange))
            raise Refused(f"A mask must move and compare rows and columns alone, found that it reads {found}.", at=anchor)
        if m.small is not None and (found := m.facts.number) > MOST:
            raise Refused(f"The numbers in a mask must add up to at most {MOST} to be proved, found {found}.", at=anchor)
        sizes = (*value(mask_of(anchor)).shape[-2:], q[-2], k[-2], k[-2] - q[-2])
        longest = max((n for n in map(_known, sizes) if n is not None), default=0)
        if longest > MAX_FIXED:
            raise Refused(f"A mask of fixed size must have at most {MAX_FIXED} columns to be proved, found {longest}.", at=anchor)

    def rewrite(self, m, t):
        if m.facts.fits:
            return call(causal_attention.op.overload, t.q, t.k, t.v, m.facts.options.get("scale"))
        return call(m.facts.attention, t.q, t.k, t.v, is_causal=True, **m.facts.options)


def _numbers(mask: Node, lengths: tuple[Any, ...]) -> tuple[int, set[str]]:
    """The sum of the sizes of the numbers that a mask is made with, without lengths, and everything else that it is made with."""
    sums: dict[Node, int] = {}
    strange: set[str] = set()
    nodes, todo = set(), [mask]
    while todo:
        node = todo.pop()
        if node not in nodes and node.op != "placeholder":
            nodes.add(node)
            todo.extend(n for n in node.all_input_nodes if is_tensor(n))
    for node in sorted(nodes):
        name = op_name(node).strip("_").removeprefix("bitwise_").removeprefix("logical_")
        if name not in VIEWS | MOVES or "alpha" in node.kwargs:
            strange.add(op_name(node))
        found: list[Any] = []
        map_aggregate((node.args, node.kwargs), found.append)
        sums[node] = sum(sums.get(a, 0) for a in found if is_tensor(a))
        for a in map(value, found) if name not in VIEWS else ():
            if isinstance(a, bool) or not isinstance(a, int | float | torch.SymInt) or any(same(a, n) for n in lengths):
                continue
            if isinstance(a, torch.SymInt):
                strange.add(f"the number {a}")
            elif math.isfinite(a):
                sums[node] += math.ceil(abs(a))
    return sums.get(mask, 0), strange


def _known(size: Any) -> int | None:
    return size if isinstance(size, int) else size.node.maybe_as_int()


RULE = LiftCausalAttention()
