"""What fusions around a rule share: a match of a rule op, in place or not, and the call that replaces it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import Node

from gdnfuse.dialect import DialectOp, op_of
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.evaluate import hint
from gdnfuse.rewrite.graph import op_name, real_users, value
from gdnfuse.rewrite.rule import Match, tensors_and_numbers

# Sizes for proofs, axis by axis: two sequences, two chunks, narrow heads of K and V columns.
B, T, K, V, ALL = 2, 70, 8, 6, 1 << 30
LIMITS = {"q": (B, T, ALL, K), "k": (B, T, ALL, K), "v": (B, T, ALL, V), "state": (B, ALL, K, V), "a": (B, T)}


def two_sequences(m: Match, *batched: str) -> Match:
    """The match of a step, proved with two sequences. The named inputs have the batch as their first axis."""
    shapes = {}
    for name in batched:
        size = value(m.inputs[name]).shape
        if all(isinstance(n, int) for n in size) and size[0] > B:
            shapes[name] = (B, *size[1:])
    if len(shapes) == len(batched):
        m.shapes |= shapes
    return m


@dataclass(frozen=True)
class Step:
    """The sizes of a step of a rule in a decode graph."""

    scale: float
    l2norm_eps: float | None
    beta_scale: float


@dataclass(frozen=True)
class RuleCall:
    """The call that replaces a rule.

    Attributes:
        op: the op to call.
        numbers: its arguments that are not operands.
        taken: which of its results are used.
    """

    op: DialectOp
    numbers: dict[str, Any]
    taken: tuple[int, ...]


def rule_match(rule: Node, new: DialectOp, operands: dict[str, Any]) -> Match[RuleCall]:
    """A match that replaces a rule by a call of `new`.

    Args:
        rule: a call of a rule op. If it writes its state, it returns only the output. Otherwise it returns output and state.
        new: an op of the same kind. Its arguments are taken from `operands` by name, or else from the call of the rule.
        operands: nodes, Operands and numbers.
    """
    old = op_of(rule.target)
    bound = old.bind(rule.args, rule.kwargs)
    arguments = {name: operands[name] if name in operands else bound[name] for name in new.arg_names}
    tensors, numbers = tensors_and_numbers(arguments)
    if old.mutates:
        return Match(tensors, [rule], RuleCall(new, numbers, (0,)), writes=dict.fromkeys(old.mutates, rule))
    taken = {u.args[1]: u for u in rule.users if op_name(u) == "getitem"}
    writes, state = {}, arguments["state"]
    if isinstance(state, Node) and 1 in taken:
        # A state that is copied back to where it came from. The copy belongs to the motif, and nobody else may write the state.
        readers = list(real_users(taken[1]))
        copies = [u for u in readers if op_name(u) == "copy_" and u.args[0] is state]
        writes = {"state": copies[0]} if copies else {}
        if copies and readers == copies[:1]:
            del taken[1]
    facts = RuleCall(new, numbers, tuple(sorted(taken)))
    m = Match(tensors, [taken[i] for i in facts.taken], facts, writes=writes)
    m.shapes |= smaller(m.inputs)
    if isinstance(arguments.get("cu_seqlens"), Node):
        # Sequences of all tokens: what a rule leaves of others is not defined.
        m.samplers["cu_seqlens"] = functools.partial(_bounds, m.shapes["v"][1])
        if isinstance(state, Node):
            m.shapes["state"] = (hint(value(state).shape[0]), *m.shapes["state"][1:])
    return m


def _bounds(tokens: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Bounds [N + 1] of sequences that are packed into a row of so many tokens."""
    inner = torch.randint(0, tokens + 1, (shape[0] - 2,), generator=generator).sort().values
    return torch.cat([torch.zeros(1, dtype=torch.long), inner, torch.full((1,), tokens)])


def rule_call(m: Match[RuleCall], t: SimpleNamespace) -> Any:
    """The call that replaces the rule, with one result per output of the match."""
    op, given = m.facts.op, vars(t) | m.facts.numbers
    results = call(op.overload, *(given[name] for name in op.arg_names))
    if op.mutates:
        return results
    if "state" in m.writes:
        t.state.copy_(results[1])
    return tuple(results[i] for i in m.facts.taken)


def smaller(inputs: dict[str, Node], limits: dict[str, tuple[int, ...]] = LIMITS) -> dict[str, tuple[int, ...]]:
    """Shapes for the proof. Fusions of rules do not depend on the number of sequences, tokens or columns of heads."""
    shapes = {}
    for name, node in inputs.items():
        if value(node).ndim > 2:
            shape = [hint(s) for s in value(node).shape]
            most = limits.get(name, limits["a"])
            shapes[name] = tuple(map(min, shape, [*most, *shape[len(most) :]]))
    return shapes
