"""What a rule is: where it looks, what it proposes, and when it declines. Knows nothing of GDN."""

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
F = TypeVar("F")  # the dataclass of static facts of a rule


def _as_it_is(x: Any) -> Any:
    return x


@dataclass(frozen=True)
class Operand:
    """A boundary node, and how to bring its tensor to the layout that the replacement wants."""

    node: Node
    how: Callable[[Any], Any] = _as_it_is


@dataclass
class Match(Generic[F]):
    """A proposal: replace the region between `operands` and `outputs` by what the rule's `rewrite` computes.

    Attributes:
        operands: what the region reads, by name. `rewrite` gets it as `t.name` in the wanted layout. A node stands for its
            tensor, a list for a list of tensors, and None for an operand that is absent.
        outputs: nodes that are replaced, in the order in which `rewrite` returns their values.
        facts: what is static about the match, for `check` and `rewrite`. A dataclass of the rule.
        writes: for each operand that is written in place, the node that writes it. These nodes are part of the region.
        samplers: how to sample an operand for the proof. The default is standard normal. Tensors of a list have the name and a
            number.
        extremes: how to sample it for the second sample of the proof, if `samplers` is not suitable.
        local_writes: whether the region may write to memory that it makes itself, such as a buffer that is filled slice by slice.
        shapes: smaller shapes for the proof, if the maths of the region does not depend on the size.
        small: if given, symbolic sizes are bound to numbers from this one on in the proof, instead of to their hints. A size that
            is only a number of sequences is bound to a small number.
        equal_sizes: pairs of sizes, each a symbol plus a number, that must be equal or the region fails. With `small` the symbol
            of the second is bound so that they are equal.
        inputs: the boundary node of each operand by name; "weights_0", "weights_1", … for a list.
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
    equal_sizes: list[tuple[Any, Any]] = field(default_factory=list)
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
        """The operands as `rewrite` gets them, from the tensors of the boundary nodes."""

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
    """The arguments of an op in two groups: those that can be operands of a match, None included, and the others."""

    def tensors(x: Any) -> bool:
        return all(map(tensors, x)) if isinstance(x, list | tuple) else x is None or isinstance(x, Operand | Node)

    operands = {name: list(x) if isinstance(x, tuple) else x for name, x in arguments.items() if tensors(x)}
    return operands, {name: x for name, x in arguments.items() if name not in operands}


class Rule(Generic[F]):
    """One motif. `match` says what is there, `check` whether it may be replaced, and `rewrite` what replaces it.

    `rewrite` is run twice: traced into the graph, and on float64 tensors for the proof. It neither decides nor fails.
    """

    name: str
    stage: str
    equation: str

    def anchors(self, graph: Graph) -> Iterable[Node]:
        """Nodes whose meaning suggests the motif. Each gives exactly one record."""
        raise NotImplementedError

    def match(self, anchor: Node) -> Match[F]:
        """The match at an anchor. Raises Mismatch or Refused."""
        raise NotImplementedError

    def check(self, m: Match[F]) -> None:
        """Raise Refused with a sentence if the match may not be replaced."""

    def rewrite(self, m: Match[F], t: SimpleNamespace) -> Any:
        """One tensor per output, computed from the operands in their wanted layouts."""
        raise NotImplementedError


def bring(node: Node, shape: tuple[Any, ...], what: str, rounded: bool = False) -> Operand:
    """Find, in the chain of views above `node`, the earliest node that has `shape`, or that can be reshaped or transposed to it.

    Axis 0 may be symbolic. A reshape is only a proposal: the proof decides whether it keeps the order. With `rounded` the chain
    ends at the first cast to fewer bits, so that later rules still find the cast.

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
    """Raise Refused unless only `reader` reads what `node` computes. What is fused away must not be computed twice."""
    others = [u for u in real_users(node) if u is not reader]
    if others:
        raise Refused(f"{node.name} must be read by {reader.name} alone, found that {others[0].name} reads it too.", at=others[0])
