"""attention(q, k, v, a causal mask that also hides columns)  →  prompt_attention, of keys and values before heads are repeated

transformers makes this mask for a left-padded batch, and for any prompt on a static cache that was filled before. Then a tensor
says where the prompt begins, and the keys are as many as the cache has room for. The mask is key ≤ position, and what is known of
the columns. It is taken apart here, so that a kernel skips what it hides. With any other part it stays: a window, packed
sequences, a mask of the caller's.

The first prompt on a new static cache has positions 0, 1, … without padding, and is causal_attention of its own keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from gdnfuse.dialect import causal_attention, prompt_attention
from gdnfuse.errors import Refused
from gdnfuse.passes.lift.attention_decode import PROVED, different_positions, write_into
from gdnfuse.passes.lift.causal_attention import PROVED as SMALL
from gdnfuse.passes.sdpa import (
    mask_of,
    random_mask,
    require_dtype_of_q,
    require_heads,
    require_options,
    require_provable,
    scale_of,
    without_copies,
)
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.evaluate import hint
from gdnfuse.rewrite.graph import chain, is_tensor, op_name, peel, same, value
from gdnfuse.rewrite.rule import Match, Operand, Rule, Sampler, shown

# Whether attention that needs the kernel of prompt_attention is rewritten. Only the interpreter has run that kernel, no GPU.
KERNEL = False
FEW = 5  # queries of a proof, if their number is symbolic and that of keys is not: those and the mask are proved as they are
SCORES = 2**32  # the most multiplications of queries and keys in a proof: B·H·T·L·D
WANTED = "A mask must be key ≤ position and may hide columns for all queries"


@dataclass(frozen=True)
class Facts:
    """What is known about the match.

    Attributes:
        anchor: torch's attention.
        scale: factor on its scores.
        first: whether queries have positions 0, 1, … and no columns are hidden.
        tokens: then the number of queries, or None if it is an operand.
    """

    anchor: Node
    scale: float
    first: bool
    tokens: int | None


class LiftPromptAttention(Rule[Facts]):
    name, stage, equation = "prompt_attention", "lift", prompt_attention.op.equation

    def anchors(self, graph):
        """Attention of several queries under a mask, which no other rule has taken."""
        for node in graph.nodes:
            if op_name(node) == "scaled_dot_product_attention" and len(node.args) >= 3 and is_tensor(mask_of(node)):
                if len(value(node.args[0]).shape) == 4 and not same(value(node.args[0]).shape[-2], 1):
                    yield node

    def match(self, anchor):
        q = anchor.args[0]
        keys, values = (without_copies(node) for node in anchor.args[1:3])
        T, L = value(q).shape[-2], value(keys).shape[-2]
        positions, columns = _parts(mask_of(anchor), T, value(anchor.args[1]).shape[-2])
        count = _end(positions.node) if columns is None else None
        operands: dict[str, Operand | Node | None] = {"q": q, "keys": keys, "values": values}
        if count is None:
            operands |= {"positions": positions, "mask": columns}
        elif isinstance(count, Node):
            operands["tokens"] = count
        facts = Facts(anchor, scale_of(anchor), count is not None, count if isinstance(count, int) else None)
        fixed = isinstance(L, int)
        m = Match(
            operands,
            [anchor],
            facts,
            samplers={"mask": random_mask, "positions": _places(L if fixed else SMALL)},
            small=None if isinstance(T, int) and fixed else min(FEW, L) if fixed else SMALL,
            equal_sizes=[(L, value(values).shape[-2]), (L, value(mask_of(anchor)).shape[-1])],
        )
        if written := [cache for cache in (keys, values) if any(op_name(u) == "index_copy_" for u in cache.users)]:
            if len(written) < 2 or keys is values:
                raise Refused("Keys and values must both be written, or neither, found one.", at=anchor)
            writes = {name: write_into(cache, name) for name, cache in (("keys", keys), ("values", values))}
            new = {f"new_{name}": write.args[3] for name, write in writes.items()}
            places = {write.args[2] for write in writes.values()}
            if len(places) > 1:
                raise Refused("Values must be written where keys are, found another place.", at=anchor)
            sampler = {"position": different_positions(L)} if fixed else {}
            more = {**operands, **new, "position": (place := places.pop())}
            # As many places as new keys and values. With torch 2.11 they may have symbols of their own.
            equal = m.equal_sizes + [(value(place).shape[0], value(node).shape[2]) for node in new.values()]
            m = Match(more, m.outputs, facts, writes, m.samplers | sampler, small=m.small, equal_sizes=equal)
        return m

    def check(self, m):
        anchor = m.facts.anchor
        require_options(anchor)
        require_heads(anchor, m)
        require_dtype_of_q(m, "keys", "values")
        if not m.facts.first and not KERNEL:
            found = "padding" if "mask" in m.inputs else "a cache that may be filled"
            how = "set KERNEL in gdnfuse/passes/lift/prompt_attention.py to try it"
            raise Refused(f"A prompt must see its own keys alone until a kernel for others is measured, found {found}; {how}.")
        if m.writes and not isinstance(value(m.inputs["keys"]).shape[2], int):
            found = shown(value(m.inputs["keys"]).shape)
            raise Refused(f"A cache that is written must have a known length, found {found}.", at=anchor)
        require_provable(anchor, m, PROVED)
        (B, H, T, D), L = value(anchor.args[0]).shape, value(m.inputs["keys"]).shape[2]
        T, L = (hint(n) if isinstance(n, int) or m.small is None else m.small for n in (T, L))
        if (size := hint(B) * hint(H) * T * L * hint(D)) > SCORES:
            raise Refused(f"Scores must take at most {SCORES} multiplications to be proved, found {size}.", at=anchor)

    def rewrite(self, m, t):
        if m.writes:
            t.keys.index_copy_(2, t.position, t.new_keys)
            t.values.index_copy_(2, t.position, t.new_values)
        if m.facts.first:
            own = slice(None, t.tokens if m.facts.tokens is None else m.facts.tokens)
            keys, values = (x[:, :, own] for x in (t.keys, t.values))
            return call(causal_attention.op.overload, t.q, keys, values, m.facts.scale)
        return call(prompt_attention.op.overload, t.q, t.keys, t.values, t.positions, t.mask, m.facts.scale)


def _parts(mask: Node, T: Any, L: Any) -> tuple[Operand, Operand | None]:
    """Positions [T] and what is known of columns [B or 1, L] of the mask that attention of T queries and L keys has.

    Raises:
        Refused: the mask is not key ≤ position, and columns that are hidden for all queries.
    """
    if value(mask).dtype != torch.bool:
        raise Refused(f"A mask must be of bool, found {value(mask).dtype}.", at=mask)
    causal: list[Operand] = []
    columns: list[Node] = []
    todo = [mask]
    while todo:
        node = todo.pop()
        name, shape = op_name(node).strip("_").removeprefix("bitwise_").removeprefix("logical_"), value(node).shape
        if name in ("expand", "contiguous", "clone") and value(node).dtype == value(node.args[0]).dtype:
            todo.append(node.args[0])
        elif name == "and" and len(node.args) == 2 and all(is_tensor(a) and value(a).dtype == torch.bool for a in node.args):
            todo.extend(node.args)
        elif name in ("ones", "new_ones") and value(node).numel() == 1:
            continue
        elif (positions := _positions(node, name, T, L)) is not None:
            causal.append(positions)
        elif len(shape) == 4 and same(shape[-1], L) and all(same(n, 1) for n in shape[1:3]):
            columns.append(node)
        else:
            raise Refused(f"{WANTED}, found {name} at {node.name} of {shown(shape)} too.", at=node)
    if len(causal) != 1 or len(columns) > 1:
        raise Refused(f"{WANTED}, found {len(causal)} such comparisons and {len(columns)} masks of columns.", at=mask)
    return causal[0], Operand(columns[0], lambda x: x.flatten(0, 2)) if columns else None


def _positions(node: Node, name: str, T: Any, L: Any) -> Operand | None:
    """The positions [T] in key ≤ position or position ≥ key, where keys are 0, 1, … L − 1; None if a node is not that."""
    sides = {"le": (0, 1), "ge": (1, 0)}.get(name)
    if sides is None or len(node.args) != 2 or not all(is_tensor(a) for a in node.args):
        return None
    key, position = (node.args[i] for i in sides)
    shape = value(position).shape
    integers = all(value(n).dtype == torch.int64 for n in (key, position))
    if not integers or len(shape) < 2 or not same(shape[-2], T) or not same(value(position).numel(), T):
        return None
    if not same(value(key).shape[-1], L) or not same(value(key).numel(), L) or not same(value(_end(key)), L):
        return None
    row = next((n for n in reversed(chain(position)) if value(n).ndim == 1), None)
    return Operand(position, lambda x: x.flatten()) if row is None else Operand(row)


def _end(node: Node) -> Node | int | None:
    """The end of the numbers 0, 1, … below views and additions of zero; None if it is something else."""
    node = peel(node)
    while op_name(node) == "add" and len(node.args) == 2 and isinstance(node.args[1], int) and node.args[1] == 0:
        node = peel(node.args[0])
    plain = op_name(node) == "arange" and len(node.args) == 1 and not node.kwargs.keys() - {"device"}
    return node.args[0] if plain and value(node).dtype == torch.int64 else None


def _places(length: int) -> Sampler:
    """Samples positions of queries in so many keys, the first and the last among them."""

    def sample(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        found = torch.randint(0, length, shape, generator=generator)
        found[0], found[-1] = 0, length - 1
        return found

    return sample


RULE = LiftPromptAttention()
