"""norm, rotary embedding, cache write, attention and output gate of 1 to 8 tokens  →  gdnfuse.attention_decode"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from gdnfuse.dialect import attention_decode, rms_norm
from gdnfuse.errors import Refused
from gdnfuse.passes.sdpa import (
    SEEN_EVERY,
    OneQuery,
    back_to,
    few_queries,
    gated,
    mask_of,
    random_mask,
    require_dtype_of_q,
    require_plain,
    scale_of,
    without_copies,
)
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import is_tensor, op_name, peel, value
from gdnfuse.rewrite.pattern import Mismatch, Op, Var
from gdnfuse.rewrite.rule import Match, Operand, Rule, Sampler, bring, shown

TURN = Op("add", Op("mul", Var("x"), Var("cos")), Op("mul", Op("cat"), Var("sin")))


PROVED = 2**24  # the most elements of a cache in a proof


@dataclass(frozen=True)
class FewTokens(OneQuery):
    """What is also known about norms of q and k, if there are any."""

    norm_eps: float
    norm_offset: float

    @property
    def numbers(self) -> dict[str, float]:
        """The arguments of the op that are numbers."""
        return {"scale": self.scale, "norm_eps": self.norm_eps, "norm_offset": self.norm_offset}


class LiftAttentionDecode(Rule[FewTokens]):
    name, stage, equation = "attention_decode", "lift", attention_decode.op.equation

    def anchors(self, graph):
        """Attention with few queries."""
        yield from few_queries(graph)

    def match(self, anchor):
        keys, values = (_cache(anchor.args[i], name) for i, name in ((1, "keys"), (2, "values")))
        wrote_k, wrote_v = (write_into(cache, name) for cache, name in ((keys, "keys"), (values, "values")))
        if wrote_v.args[2] is not wrote_k.args[2]:
            raise Mismatch(wrote_v, f"values written at {wrote_k.args[2]}, as keys are", str(wrote_v.args[2]))
        operands, out, facts = few_tokens(anchor, wrote_k.args[3], wrote_v.args[3], value(keys).shape[1])
        return Match(
            {**operands, "keys": keys, "values": values, "position": wrote_k.args[2]},
            [out],
            facts,
            writes={"keys": wrote_k, "values": wrote_v},
            samplers={"mask": random_mask, "position": different_positions(value(keys).shape[2])},
        )

    def check(self, m):
        anchor = m.facts.anchor
        require_plain(anchor, m)
        T, written = value(anchor.args[0]).shape[2], value(m.inputs["position"]).shape
        if written != (T,):
            raise Refused(f"As many tokens as queries must be written, {T}, found {shown(written)}.", at=anchor)
        if not isinstance(size := value(m.inputs["keys"]).numel(), int):
            found = shown(value(m.inputs["keys"]).shape)
            raise Refused(f"The cache must have a length and a number of sequences that are known, found {found}.", at=anchor)
        if size > PROVED:
            raise Refused(f"The keys must have at most {PROVED} elements to be proved, found {size}.", at=anchor)
        require_dtype_of_q(m, "k", "v", "keys", "values", "gate")

    def rewrite(self, m, t):
        return m.facts.back(call(attention_decode.op.overload, **vars(t), **m.facts.numbers))


def few_tokens(anchor: Node, new_k: Node, new_v: Node, HKV: Any) -> tuple[dict[str, Operand | Node | None], Node, FewTokens]:
    """The parts of attention of few tokens, up to their cache.

    Args:
        anchor: attention with few queries.
        new_k, new_v: what is written to the cache; k with its rotary embedding.
        HKV: number of key heads.

    Returns:
        The operands of attention_decode except keys, values and position; the end of the attention; the facts.

    Raises:
        Mismatch, Refused: q and k do not have equal norms and rotary embeddings.
    """
    B, H, T, D = value(anchor.args[0]).shape
    k, cos, sin = _rope(new_k, "k")
    q, q_cos, q_sin = _rope(anchor.args[0], "q")
    for name, mine, other in (("cos", q_cos, cos), ("sin", q_sin, sin)):
        if peel(mine) is not peel(other):
            raise Mismatch(mine, f"the {name} that k is turned with, {other}", str(mine))
    norms = {}
    for name, x in (("q", q), ("k", k)):
        if op_name(node := peel(x)) == "gdnfuse.rms_norm":
            norms[name] = rms_norm.op.bind(node.args, node.kwargs)
    if len(norms) == 1 or norms and any(norms["q"][key] != norms["k"][key] for key in ("eps", "offset")):
        raise Mismatch(anchor, "the same norm of q and k", str({n: (x["eps"], x["offset"]) for n, x in norms.items()}))
    for name, norm in norms.items():
        if (width := value(norm["weight"]).shape[-1]) != D:
            raise Refused(f"{name} must be normalised head by head, {D} columns each, found a norm of {width}.", at=anchor)
    out, gate = gated(anchor)
    R = value(cos).shape[-1]
    operands = {
        "q": bring(norms["q"]["x"] if norms else q, (B, T, H, D), "q"),
        "k": bring(norms["k"]["x"] if norms else k, (B, T, HKV, D), "k"),
        "v": bring(new_v, (B, T, HKV, D), "v"),
        "cos": bring(cos, (value(cos).shape[0], T, R), "cos"),
        "sin": bring(sin, (value(sin).shape[0], T, R), "sin"),
        "gate": None if gate is None else bring(gate, (B, T, H, D), "gate"),
        "q_norm_weight": norms["q"]["weight"] if norms else None,
        "k_norm_weight": norms["k"]["weight"] if norms else None,
        "mask": mask if is_tensor(mask := mask_of(anchor)) else None,
    }
    eps, offset = (norms["q"]["eps"], norms["q"]["offset"]) if norms else (0.0, 0.0)
    return operands, out, FewTokens(anchor, scale_of(anchor), back_to(out, T, H, D), eps, offset)


def different_positions(length: int) -> Sampler:
    """Samples different positions in a cache. No mask hides them, if there are enough of those."""

    def sample(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        (T,) = shape
        step = SEEN_EVERY if T * SEEN_EVERY <= length + SEEN_EVERY - 1 else 1
        return step * torch.randperm(-(-length // step), generator=generator)[:T]

    return sample


def _cache(node, name):
    """The cache below the copies of its heads for groups of queries."""
    piece = peel(without_copies(node))
    if piece.op != "placeholder" or value(piece).ndim != 4:
        raise Mismatch(piece, f"{name} in a cache of fixed size", op_name(piece))
    return piece


def write_into(cache, name):
    """The only write of new tokens into a cache of fixed length."""
    found = [u for u in cache.users if op_name(u) == "index_copy_"]
    if len(found) != 1 or len(found[0].args) != 4 or found[0].args[1] not in (2, -2):
        raise Mismatch(cache, f"one index_copy_ into the {name} along their tokens", f"{len(found)} such")
    return found[0]


def _rope(node, name):
    """The tensor that the rotary embedding is applied to, and its cosine and sine."""
    piece = peel(node)
    whole = None
    if op_name(piece) == "cat" and op_name(peel(piece.args[0][0])) == "add":
        whole, piece = piece.args[0][-1], peel(piece.args[0][0])
    if op_name(piece) != "add":
        raise Mismatch(piece, f"a rotary embedding of {name}", op_name(piece))
    env = TURN.match(piece)
    x = env["x"]
    if whole is not None:
        if op_name(whole) != "getitem" or op_name(x) != "getitem" or whole.args[0] is not x.args[0]:
            raise Mismatch(whole, f"the rest of what is turned of {name}", op_name(whole))
        x = x.args[0]
    return x, env["cos"], env["sin"]


RULE = LiftAttentionDecode()
