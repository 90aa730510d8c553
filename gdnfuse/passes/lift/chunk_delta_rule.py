"""The gated delta rule in chunks, inlined for a fixed number of tokens  →  gdnfuse.chunk_delta_rule

Only the boundary is matched: the five operands, the state before the first chunk, the outputs, and the state after the last
chunk. Everything between, such as how the triangular system is solved or where the mask is applied, is checked by the proof.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node

from gdnfuse.dialect import chunk_delta_rule
from gdnfuse.errors import Refused
from gdnfuse.passes.lift.delta_rule import unit
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.evaluate import hint
from gdnfuse.rewrite.graph import is_tensor, op_name, peel, real_users, same, same_shape, source, value
from gdnfuse.rewrite.pattern import Mismatch, Op, Var
from gdnfuse.rewrite.rule import Match, Operand, Rule, shown

# The corrections of a chunk: u and w solve the triangular system for v and k.
CORRECTION = Op("sub", Var("u"), Op("matmul", Var("w"), Var("state")))

SOLVERS = ("linalg_solve_triangular", "solve_triangular", "matmul")
MASKS = ("masked_fill", "masked_fill_", "tril")
# Ops that may be between the pairwise decay and the corrections. Any other op, such as a linear, ends the search.
WITHIN = {
    *MASKS, *SOLVERS, "mul", "add", "sub", "neg", "sum", "where", "clone", "getitem", "select", "unsqueeze", "squeeze", "reshape",
    "transpose", "contiguous", "to", "expand", "unbind",
}  # fmt: skip
# The most decays between two tokens in a proof. With everything else it takes some gigabytes and a minute of one core.
LARGEST = 2**24


# Decays near 1 and keys of about unit length. With others a chunk forgets its first state or grows without bound. The proof would
# then not notice an error in what one chunk passes to the next.
def mild(shape, generator):
    """Log decays whose product over a chunk is about e⁻¹."""
    return -torch.randn(shape, dtype=torch.float64, generator=generator).abs() / 64


def sparse(shape, generator):
    """Log decays near 0. One in 16 is so large that every threshold has an effect."""
    g = mild(shape, generator)
    return g * torch.where(torch.rand(shape, dtype=torch.float64, generator=generator) < 1 / 16, 400.0, 0.01)


def short(shape, generator):
    """Keys of about unit length."""
    return torch.randn(shape, dtype=torch.float64, generator=generator) / shape[-1] ** 0.5


def uneven(shape, generator):
    """Keys of very different lengths. A few are long."""
    row = torch.rand(shape[:-1], dtype=torch.float64, generator=generator)[..., None]
    return short(shape, generator) * torch.where(row < 1 / 2, 1e-3, torch.where(row < 15 / 16, 1.0, 6.0))


def double(shape, generator):
    """β in (0, 2)."""
    return 2 * unit(shape, generator)


@dataclass(frozen=True)
class Laid:
    """A boundary node with the layout [B, T, HV, …] (time_first) or [B, HV, T, …]."""

    node: Node
    time_first: bool

    @property
    def operand(self) -> Operand:
        return Operand(self.node, self.turned)

    def turned(self, x: Any) -> Any:
        """A tensor of this layout as [B, T, HV, …], or back."""
        return x if self.time_first else x.transpose(1, 2)

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape as [B, T, HV, …]."""
        B, x, y, *rest = value(self.node).shape
        return (B, x, y, *rest) if self.time_first else (B, y, x, *rest)


@dataclass(frozen=True)
class Facts:
    """What is known about the match.

    Attributes:
        laid: q, k, v, g and beta by name.
        out: all outputs.
        scale: factor on q.
        o_dtype: dtype of the outputs.
        state_dtype: dtype of the state after the last chunk; None if it is not used.
        decays: number of decays between two tokens.
    """

    laid: dict[str, Laid]
    out: Laid
    scale: float
    o_dtype: torch.dtype
    state_dtype: torch.dtype | None
    decays: int


class LiftChunkDeltaRule(Rule[Facts]):
    name, stage, equation = "chunk_delta_rule", "lift", chunk_delta_rule.op.equation

    def anchors(self, graph):
        """The decay between each pair of tokens of a chunk: exp of the differences of a cumulative sum, masked or not."""
        return [n for n in graph.nodes if op_name(n) == "exp" and is_tensor(n) and _cumulative(n) is not None]

    def match(self, anchor):
        c = _cumulative(anchor)
        if value(c).ndim not in (3, 4):
            raise Mismatch(c, "log decays [B, HV, chunks, tokens]", f"the shape {shown(value(c).shape)}")
        chunks = _chunks(anchor)
        first, last = chunks[0], chunks[-1].get("after")
        HV = value(c).shape[1]
        rank = value(c).ndim + 1
        g = _laid(_climb(c.args[0], rank)[0], 3, HV, "g")
        T = g.shape[1]
        v_beta, k_beta = (_right_side(first[x], rank) for x in ("u", "w"))
        v, beta = _without_beta(v_beta, rank)

        def factor(x):
            end = peel(x)
            product = op_name(end) == "mul" and all(is_tensor(y) for y in end.args)
            return all(map(factor, end.args)) if product else _is_decay(x, c) or _end(x, rank) is _end(beta, rank)

        k = _climb(k_beta, rank, factor)[0]
        q, scale = _climb(first["q"], rank, factor, constants=True)
        laid = {n: _laid(x, 4, HV, n) for n, x in (("q", q), ("k", k), ("v", _climb(v, rank)[0]))}
        laid |= {"g": g, "beta": _laid(_climb(beta, rank)[0], 3, HV, "beta")}
        out = _output([x["o"] for x in chunks], HV, T)
        state = _uncast(first["state"])
        given = op_name(peel(state)) not in ("zeros", "zeros_like", "new_zeros")
        copies = [u for u in real_users(last) if op_name(u) == "copy_" and u.args[0] is state] if given and last else []
        o_dtype, state_dtype = value(out.node).dtype, value(last).dtype if last else None
        return Match(
            {**{name: x.operand for name, x in laid.items()}, "state": state if given else None},
            [out.node, last] if last else [out.node],
            Facts(laid, out, scale, o_dtype, state_dtype, hint(value(anchor).numel())),
            writes={"state": copies[0]} if copies else {},
            samplers={"g": mild, "beta": unit, "k": short},
            extremes={"g": sparse, "beta": double, "k": uneven},
            local_writes=True,
        )

    def check(self, m):
        laid, (B, T, HV) = m.facts.laid, m.facts.laid["g"].shape
        K, V = laid["k"].shape[-1], laid["v"].shape[-1]
        wanted = {"q": (B, T, HV, K), "k": (B, T, HV, K), "v": (B, T, HV, V), "beta": (B, T, HV)}
        for name, shape in wanted.items():
            if not same_shape(laid[name].shape, shape):
                raise Refused(f"{name} must be {shown(shape)}, as g tells, found {shown(laid[name].shape)}.", at=laid[name].node)
        if "state" in m.inputs and not same_shape(value(m.inputs["state"]).shape, (B, HV, K, V)):
            found = shown(value(m.inputs["state"]).shape)
            raise Refused(f"The state must be {shown((B, HV, K, V))}, found {found}.", at=m.inputs["state"])
        if m.facts.decays > LARGEST:
            raise Refused(f"A proof takes at most {LARGEST} decays between tokens, found {m.facts.decays}.", at=m.outputs[0])

    def rewrite(self, m, t):
        # The op returns o in the dtype of v. So v is widened if the model has a wider o.
        v = t.v.to(torch.promote_types(value(m.inputs["v"]).dtype, m.facts.o_dtype))
        results = call(chunk_delta_rule.op.overload, t.q, t.k, v, t.g, t.beta, t.state, m.facts.scale)
        o, new = results[0], results[1]
        if m.writes:
            t.state.copy_(new)
        o = m.facts.out.turned(o).to(m.facts.o_dtype)
        return (o, new.to(m.facts.state_dtype)) if m.facts.state_dtype else o


def _cumulative(exp: Node) -> Node | None:
    """The cumsum c in exp(mask(c_i − c_j)), or None."""
    n = peel(exp.args[0])
    while is_tensor(n) and op_name(n) in MASKS:
        n = peel(n.args[0])
    if op_name(n) == "where":
        n = next((x for x in map(peel, n.args[1:]) if op_name(x) == "sub"), n)
    if op_name(n) != "sub" or not all(is_tensor(x) for x in n.args):
        return None
    left, right = map(peel, n.args)
    return left if left is right and op_name(left) == "cumsum" else None


def _chunks(anchor: Node) -> list[dict[str, Node]]:
    """For every chunk in order: u, w, the state before it, the state after it (if used), q and o."""
    corrections = _corrections(anchor)
    chunks = [_chunk(n, n is corrections[-1]) for n in corrections]
    for before, after in pairwise(chunks):
        if peel(after["state"]) is not peel(before["after"]):
            raise Mismatch(after["state"], f"the state after the chunk before, {before['after']}", op_name(peel(after["state"])))
    return chunks


def _corrections(anchor: Node) -> list[Node]:
    """v_new = u − w·S of every chunk, found from the pairwise decay through the triangular system."""
    found, seen, todo = [], {anchor}, [anchor]
    deepest: Mismatch | None = None
    while todo:
        for user in todo.pop().users:
            if user in seen or op_name(user) not in WITHIN:
                continue
            seen.add(user)
            if op_name(user) == "sub":
                try:
                    CORRECTION.match(user)
                    found.append(user)
                    continue
                except Mismatch as e:
                    deepest = e
            # From here on this is the output and not the system.
            if op_name(user) == "matmul" and op_name(peel(user.args[1])) == "sub":
                continue
            todo.append(user)
    if not found:
        raise deepest or Mismatch(anchor, f"a correction {CORRECTION} made from it", "none")
    return sorted(found)


def _chunk(correction: Node, last: bool) -> dict[str, Node]:
    chunk = CORRECTION.match(correction)
    state = peel(chunk["state"])
    for product in real_users(correction):
        if op_name(product) != "matmul":
            continue
        for total in (u for u in real_users(product) if op_name(u) == "add"):
            for other in map(peel, total.args):
                operands = [peel(x) for x in other.args] if isinstance(other, Node) else []
                if op_name(other) == "mul" and state in operands:
                    chunk["after"] = total
                elif op_name(other) == "matmul" and operands[1] is state:
                    chunk["o"], chunk["q"] = total, other.args[0]
    found = ", ".join(op_name(u) for u in real_users(correction)) or "no reader"
    if "after" not in chunk and not last:
        raise Mismatch(correction, "the next state: the state times its decay plus keys times this", found)
    if "o" not in chunk:
        raise Mismatch(correction, "the outputs: queries times the state plus weights times this", found)
    return chunk


def _climb(node: Node, rank: int, factor=lambda x: False, constants=False) -> tuple[list[Node], float]:
    """Go up through views, casts, padding, the choice of a chunk, and products with a `factor` or a constant.

    Returns:
        The nodes from `node` on, and the product of the constants.
    """
    nodes, scale = [node], 1.0
    while True:
        n, name = nodes[-1], op_name(nodes[-1])
        inner = source(n)
        if inner is None and name in ("pad", "getitem", "select") and is_tensor(n.args[0]):
            chosen = value(n.args[0]).ndim == rank > value(n).ndim
            inner = n.args[0] if name == "pad" or chosen else None
        elif inner is None and name in ("mul", "div") and len(n.args) == 2:
            x, y = n.args
            if constants and isinstance(y, int | float):
                inner, scale = x, scale * y if name == "mul" else scale / y
            elif name == "mul" and isinstance(x, Node) and isinstance(y, Node):
                inner = x if factor(y) else y if factor(x) else None
        if inner is None:
            return nodes, scale
        nodes.append(inner)


def _end(node: Node, rank: int) -> Node:
    return _climb(node, rank)[0][-1]


def _is_decay(node: Node, c: Node) -> bool:
    """Whether a node is exp(c), or a part of it."""

    def whole(n):
        n = peel(n)
        while op_name(n) in ("getitem", "select") and is_tensor(n.args[0]):
            n = peel(n.args[0])
        return n

    n = whole(node)
    return op_name(n) == "exp" and whole(n.args[0]) is c


def _right_side(node: Node, rank: int) -> Node:
    """The right-hand side of the triangular system with this solution."""
    end = _end(node, rank)
    if op_name(end) not in SOLVERS:
        raise Mismatch(end, "a solution of a triangular system", op_name(end))
    return end.args[1]


def _without_beta(node: Node, rank: int) -> tuple[Node, Node]:
    """v and β from v·β."""
    end = _end(node, rank)
    if op_name(end) == "mul" and all(is_tensor(x) for x in end.args):
        for x, y in (end.args, end.args[::-1]):
            if same(value(y).shape[-1], 1):
                return x, y
    raise Mismatch(end, "v times beta", op_name(end))


def _laid(nodes: list[Node], rank: int, HV: int, name: str, downward: bool = False) -> Laid:
    """The farthest of `nodes` that has the layout [B, T, HV, …] or [B, HV, T, …]. The nodes begin with its chunks.

    Transposes are counted, because shapes do not show them if T = HV.
    """
    ranks = [value(n).ndim for n in nodes]
    start = next((i + 1 for i, (a, b) in enumerate(pairwise(ranks)) if a == rank + 1 and b == rank), 0)
    found = None
    for i, n in enumerate(nodes[start:], start):
        shape = value(n).shape
        if len(shape) != rank:
            if found:
                break
            continue
        if found is None:
            time_first = not same(shape[1], HV)
        else:
            view = n if downward else nodes[i - 1]
            time_first = found.time_first != _swaps(view)
        if not same(shape[2 if time_first else 1], HV):
            break
        found = Laid(n, time_first)
    if found is None:
        raise Mismatch(nodes[0], f"chunks of {name} [B, T, {HV}, …]", f"a view of {shown(value(nodes[-1]).shape)}")
    return found


def _swaps(node: Node) -> bool:
    """Whether a node swaps axes 1 and 2."""
    if op_name(node) not in ("transpose", "movedim", "swapaxes"):
        return False
    rank, axes = value(node).ndim, node.args[1:]
    axes = [a % rank for a in (axes[0] if len(axes) == 1 else axes)]
    return sorted(axes) == [1, 2] if len(axes) == 2 else axes[:3] == [0, 2, 1]


def _output(outs: list[Node], HV: int, T: Any) -> Laid:
    """The outputs of all chunks in one tensor, without padding."""
    nodes = [_collected(outs)]
    while True:
        users = [u for u in nodes[-1].users if op_name(u) != "setitem"]
        if len(users) != 1 or not (source(users[0]) is nodes[-1] or op_name(users[0]) in ("getitem", "narrow")):
            break
        nodes.append(users[0])
    B, *_, V = value(nodes[0]).shape
    whole = [same(value(n).numel(), B * T * HV * V) for n in nodes]
    if True not in whole:
        raise Mismatch(nodes[-1], f"the outputs of {T} tokens", shown(value(nodes[-1]).shape))
    # Slices that drop more than the padding belong to the model.
    cut = whole.index(True)
    return _laid([n for i, n in enumerate(nodes) if i <= cut or all(whole[cut : i + 1])], 4, HV, "o", downward=True)


def _collected(outs: list[Node]) -> Node:
    """The tensor into which the outputs of all chunks are written."""
    for user in real_users(outs[0]):
        if op_name(user) in ("stack", "cat") and isinstance(user.args[0], list | tuple):
            if [peel(x) for x in user.args[0]] == outs:
                return user
        elif op_name(user) == "setitem":
            written = [u.args[0] for o in outs for u in real_users(o) if op_name(u) == "setitem"]
            if written == [user.args[0]] * len(outs):
                return user.args[0]
    if len(outs) == 1:
        return outs[0]
    raise Mismatch(outs[0], f"a stack of the outputs of {len(outs)} chunks", ", ".join(op_name(u) for u in outs[0].users))


def _uncast(node: Node) -> Node:
    while op_name(node) == "to" and source(node) is not None:
        node = source(node)
    return node


RULE = LiftChunkDeltaRule()
