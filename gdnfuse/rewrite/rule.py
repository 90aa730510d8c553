"""What a rule is: where it looks, what it proposes, when it declines. Knows nothing of GDN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import torch
from torch.fx import Graph, Node

from gdnfuse.errors import Refused
from gdnfuse.rewrite.graph import chain, real_users, same, same_shape, value

Sampler = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]
F = TypeVar("F")  # a rule's own dataclass of static facts


def _as_it_is(x: Any) -> Any:
    return x


@dataclass(frozen=True)
class Operand:
    """A boundary node and how to bring its tensor to the layout that the replacement wants."""

    node: Node
    how: Callable[[Any], Any] = _as_it_is


@dataclass
class Match(Generic[F]):
    """A proposal: replace the region between `operands` and `outputs` by what the rule's `rewrite` computes.

    Attributes:
        operands: what the region reads, by name; `rewrite` gets it as `t.name`, brought. A node stands for its tensor as it is, a
            list for a list of tensors, and None for an operand that is not there.
        outputs: nodes replaced, in the order in which `rewrite` returns their values.
        facts: what is static about the match, for `check` and `rewrite`: a dataclass of the rule's.
        writes: for each operand written in place, the node that writes it; these nodes are part of the region.
        samplers: how to draw an operand for the proof; standard normal where not given. Of a list, each has its name and number.
        extremes: how to draw it for the proof's second sample, where `samplers` does not serve.
        local_writes: the region may write in place to memory it makes itself, such as a buffer filled slice by slice.
        shapes: smaller shapes for the proof where the region's maths does not depend on the size.
        small: if given, symbolic sizes are bound to numbers from this one on in the proof, instead of to their hints; what is a
            number of sequences alone to a few.
        alike: pairs of sizes, each a symbol plus a number, without whose equality the region fails, whatever their symbols are:
            with `small` the second's symbol is bound to what makes them equal.
        inputs: the boundary node of each operand by name; "weights_0", "weights_1", … of a list.
    """

    operands: Mapping[str, Operand | Node | list[Operand | Node] | None]
    outputs: list[Node]
    facts: F = None
    writes: dict[str, Node] = field(default_factory=dict)
    samplers: dict[str, Sampler] = field(default_factory=dict)
    extremes: dict[str, Sampler] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    local_writes: bool = False
    small: int | None = None
    alike: list[tuple[Any, Any]] = field(default_factory=list)
    inputs: dict[str, Node] = field(init=False)

    def __post_init__(self) -> None:
        self.operands = {name: _as_operand(x) for name, x in self.operands.items()}
        self.inputs = {}
        for name, x in self.operands.items():
            if isinstance(x, list):
                self.inputs |= {f"{name}_{i}": item.node for i, item in enumerate(x)}
            elif x is not None:
                self.inputs[name] = x.node

    def brought(self, tensors: Mapping[Node, Any]) -> SimpleNamespace:
        """What `rewrite` gets, from the tensors of the boundary nodes."""

        def bring(x: Any) -> Any:
            if isinstance(x, list):
                return [bring(item) for item in x]
            return None if x is None else x.how(tensors[x.node])

        return SimpleNamespace(**{name: bring(x) for name, x in self.operands.items()})


def _as_operand(x: Any) -> Any:
    if isinstance(x, list):
        return [_as_operand(item) for item in x]
    return Operand(x) if isinstance(x, Node) else x


def tensors_and_numbers(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of an op: those that can be a match's operands, None among them, and the others."""

    def tensors(x: Any) -> bool:
        return all(map(tensors, x)) if isinstance(x, list | tuple) else x is None or isinstance(x, Operand | Node)

    operands = {name: list(x) if isinstance(x, tuple) else x for name, x in arguments.items() if tensors(x)}
    return operands, {name: x for name, x in arguments.items() if name not in operands}


class Rule(Generic[F]):
    """One motif. `match` says what is there, `check` whether we may, `rewrite` what to put there.

    `rewrite` is run twice: traced into the graph, and on float64 tensors for the proof. It neither decides nor fails.
    """

    name: str
    stage: str
    equation: str

    def anchors(self, graph: Graph) -> Iterable[Node]:
        """Nodes by whose meaning the motif is recognised; each gives exactly one record."""
        raise NotImplementedError

    def match(self, anchor: Node) -> Match[F]:
        """Raises Mismatch or Refused."""
        raise NotImplementedError

    def check(self, m: Match[F]) -> None:
        """Raises Refused with a sentence."""

    def rewrite(self, m: Match[F], t: SimpleNamespace) -> Any:
        """One tensor per output, from those of the operands, brought."""
        raise NotImplementedError


def bring(node: Node, shape: tuple[Any, ...], what: str, rounded: bool = False) -> Operand:
    """Find, in the chain of views above `node`, the earliest node that has `shape`, or one that reshapes or transposes to it.

    Axis 0 may be symbolic. A reshape is proposed only; whether it keeps the order is for the proof. With `rounded` the chain ends
    at the first cast to fewer bits, so that rules behind still find it.

    Raises:
        Refused: the number of elements differs.
    """
    nodes = chain(node)
    if rounded:
        narrowing = (i for i, (n, of) in enumerate(pairwise(nodes), 1) if value(n).itemsize < value(of).itemsize)
        nodes = nodes[: next(narrowing, len(nodes))]
    for n in reversed(nodes):
        if same_shape(value(n).shape, shape):
            return Operand(n)
    swapped = (shape[0], shape[2], shape[1], *shape[3:]) if len(shape) > 2 else ()
    if len(shape) > 2 and not same(shape[1], 1) and not same(shape[2], 1):
        for n in reversed(nodes):
            if same_shape(value(n).shape, swapped):
                return Operand(n, lambda x: x.transpose(1, 2))
    last, count = nodes[-1], 1
    for s in shape:
        count = count * s
    if not same(value(last).numel(), count):
        raise Refused(f"{what} must have the shape {shown(shape)}, found {shown(value(last).shape)}.", at=node)
    return Operand(last, lambda x: x.reshape(-1, *shape[1:]))


def shown(shape: Iterable[Any]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


def require_one_reader(node: Node, reader: Node) -> None:
    """Raises Refused unless nothing but `reader` reads what `node` computes: what is fused away must not be computed twice."""
    others = [u for u in real_users(node) if u is not reader]
    if others:
        raise Refused(f"{node.name} must be read by {reader.name} alone, found that {others[0].name} reads it too.", at=others[0])
