"""Proofs: run the matched region and its replacement in float64 on the same random inputs. Knows nothing of GDN.

A generous matcher can be wrong: two swapped axes of equal size, another eps, a flipped operand. Every floating dtype constant of
both sides is replaced by float64. So the proof compares the maths, and not where the model rounds. Outputs and written inputs
must agree to 1e-9 relative. Regions of equal structure are proved once.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from gdnfuse import compat
from gdnfuse.errors import Refused, one_line
from gdnfuse.rewrite.evaluate import evaluate, hint, in_float64, mapped, one_thread
from gdnfuse.rewrite.graph import storage, value, writes
from gdnfuse.rewrite.rule import Match, shown

TOLERANCE = 1e-9
# The second sample: some rows are so small that every eps has an effect, and some so large that every threshold has.
EXTREMES = (1e-3, 6.0)
# A proof with at most so many elements in all inputs runs on one thread.
SMALL = 2**20
SEQUENCES = 3  # value for a symbolic number of sequences, if lengths are small


@dataclass(frozen=True)
class Proof:
    """The result of a proof.

    Attributes:
        error: worst relative error over outputs, written inputs and samples.
        seconds: time; 0 if the result is from the cache.
    """

    error: float
    seconds: float
    cached: bool


def _bound(inputs: list[tuple[str, Node]], m: Match) -> dict[Any, int]:
    """The number for every symbol in the sizes of the inputs: its hint, or a number from `m.small` on.

    Equal sizes get equal numbers. Each number is more than four times the one before. If two were close, their difference might
    be a number in the graph. A size that is only a number of sequences gets a small number.

    Raises:
        Refused: a number depends on a symbol that no size has, or two sizes cannot be equal.
    """
    numbers: dict[Any, int] = {}
    if m.small is None:
        return numbers
    values = [value(node) for _, node in inputs]
    shapes = [v.shape for v in values if isinstance(v, torch.Tensor)]
    for symbol in (s for shape in shapes for size in shape[1:] or shape for s in _symbols(size)):
        numbers.setdefault(symbol, max(m.small, 4 * max(numbers.values(), default=0) + 1))
    for symbol in (s for shape in shapes for size in shape[:1] for s in _symbols(size)):
        numbers.setdefault(symbol, SEQUENCES)
    others = [v for v in values if not isinstance(v, torch.Tensor)]
    if unknown := [s for size in (*others, *sum(m.equal_sizes, ())) for s in _symbols(size) if s not in numbers]:
        raise Refused(f"Numbers must be made of sizes of the operands to be proved, found {unknown[0]}.")
    for one, other in m.equal_sizes:
        for symbol in [s for s in _symbols(other) if s not in _symbols(one)][:1]:
            numbers[symbol] += hint(one, numbers) - hint(other, numbers)
            if numbers[symbol] < 2:
                raise Refused(f"Sizes must be above 1 where {one} is {other} to be proved, found {symbol} = {numbers[symbol]}.")
    return numbers


def _symbols(size: Any) -> list[Any]:
    return [] if isinstance(size, int) else sorted(size.node.expr.free_symbols, key=str)


def prove(region: Graph, replacement: Graph, inputs: list[tuple[str, Node]], m: Match, extremes: bool = True) -> Proof:
    """Check that two graphs over the same placeholders agree.

    Args:
        region: placeholders in the order of `inputs`; outputs are a tuple.
        replacement: likewise.
        inputs: name and main-graph node of every placeholder. SymInt inputs are bound to their hints, or as `m.small` says.
        m: its samplers, shapes and writes are used.
        extremes: also use the second sample. Needed if one side is code that is not ours.

    Raises:
        Refused: a sentence with the worst element.
    """
    key = f"{_structure(region, replacement, inputs, m)} {extremes}"
    if key in _proved:
        outcome = _proved[key]
        if isinstance(outcome, Refused):
            raise outcome
        return Proof(outcome, 0.0, True)
    start = time.perf_counter()
    try:
        sides = in_float64(region), in_float64(replacement)
        try:
            error = _run(*sides, inputs, m, m.shapes, extremes)
            # A view might pair up sequences. With two sequences that would be the identity, so three are tried too.
            if odd := _three_for_two(inputs, m):
                error = max(error, _run(*sides, inputs, m, odd, False))
        except _NotRun:
            # A view in the region may contain the full size.
            if not m.shapes:
                raise
            error = _run(*sides, inputs, m, {}, extremes)
    except Refused as e:
        _proved[key] = e
        raise
    _proved[key] = error
    return Proof(error, time.perf_counter() - start, False)


def _three_for_two(inputs: list[tuple[str, Node]], m: Match) -> dict[str, tuple[int, ...]]:
    """The match's smaller shapes with three sequences instead of two. Empty if no shape has two."""
    more = {n: (3, *m.shapes[n][1:]) for n, node in inputs if m.shapes.get(n, ())[:1] == (2,) and hint(value(node).shape[0]) > 2}
    return {**m.shapes, **more} if more else {}


_proved: dict[str, float | Refused] = {}


def forget() -> None:
    """Drop all cached proofs."""
    _proved.clear()


def _structure(region: Graph, replacement: Graph, inputs: list[tuple[str, Node]], m: Match) -> str:
    bound = _bound(inputs, m)
    parts: list[Any] = [
        (name, _fact(value(n), bound), m.shapes.get(name), str(m.samplers.get(name)), str(m.extremes.get(name)))
        for name, n in inputs
    ]
    parts += [sorted(m.writes), _local_memory(region)]
    for graph in (region, replacement):
        parts += _listing(graph)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _listing(graph: Graph) -> list[Any]:
    """The graph with numbers instead of names for its nodes."""
    number: dict[Node, str] = {}
    lines: list[Any] = []
    for n in graph.nodes:
        number[n] = f"%{len(number)}"
        target = n.target if isinstance(n.target, str) else f"{n.target!s}@{id(n.target)}"
        arguments = mapped((n.args, n.kwargs), lambda a: number[a] if isinstance(a, Node) else a)
        lines.append((n.op, "" if n.op == "placeholder" else target, arguments))
    return lines


def _local_memory(region: Graph) -> list[tuple[int, int]]:
    """The nodes in memory that the region makes and writes: their numbers, and the memory of each."""
    given = {storage(n) for n in region.find_nodes(op="placeholder")}
    local = list(dict.fromkeys(s for n in region.nodes for s in sorted(writes(n) - given)))
    return [(i, local.index(s)) for i, n in enumerate(region.nodes) if (s := storage(n)) in local]


def _same_memory(region: Graph, values: dict[Node, Any]) -> None:
    """Check that tensors in memory that the region writes share it as in the model.

    In float64 a cast may not copy, and other strides may turn a copy into a view. A write would then reach other tensors.
    """
    lives = dict(_local_memory(region))
    memory = {i: compat.memory_of(x) for i, x in enumerate(values.values()) if isinstance(x, torch.Tensor)}
    home = {where: memory[i] for i, where in lives.items()}
    for i, cdata in memory.items():
        if {where for where, c in home.items() if c == cdata} != ({lives[i]} if i in lives else set()):
            found = f"{list(values)[i]} shares other memory in the float64 proof"
            raise Refused(f"Memory written inside the motif must be shared as in the model, found that {found}.")


def _fact(v: Any, bound: dict[Any, int]) -> Any:
    if isinstance(v, torch.Tensor):
        return tuple(hint(s, bound) for s in v.shape), str(v.dtype)
    return hint(v, bound)


def _draw(
    name: str,
    node: Node,
    extreme: bool,
    m: Match,
    shapes: dict[str, tuple[int, ...]],
    bound: dict[Any, int],
    generator: torch.Generator,
) -> Any:
    v = value(node)
    if not isinstance(v, torch.Tensor):
        return hint(v, bound)
    shape = tuple(hint(s, bound) for s in shapes.get(name) or v.shape)
    sampler = m.extremes.get(name) if extreme and name in m.extremes else m.samplers.get(name)
    if not v.is_floating_point() and sampler is None:
        raise Refused(f"{name} must be a floating tensor, found {v.dtype}.", at=node)
    if sampler is not None:
        return sampler(shape, generator)
    drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
    if extreme and drawn.numel() > 1:
        rows = drawn.flatten(0, -2) if drawn.ndim > 1 and drawn.shape[-1] < drawn.numel() else drawn.view(-1, 1)
        for i, factor in enumerate(EXTREMES):
            rows[i :: len(EXTREMES)] *= factor
    return drawn


class _NotRun(Refused):
    """One of the two sides raised or gave another shape, so there are no values to compare."""


def _run(
    region: Graph,
    replacement: Graph,
    inputs: list[tuple[str, Node]],
    m: Match,
    shapes: dict[str, tuple[int, ...]],
    extremes: bool,
) -> float:
    worst, bound = 0.0, _bound(inputs, m)
    with torch.no_grad(), torch.device("cpu"):
        for extreme in (False, True) if extremes else (False,):
            generator = torch.Generator().manual_seed(0)
            tensors = [_draw(name, node, extreme, m, shapes, bound, generator) for name, node in inputs]
            copies = [t.clone() if isinstance(t, torch.Tensor) else t for t in tensors]
            small = sum(t.numel() for t in tensors if isinstance(t, torch.Tensor)) < SMALL
            values: dict[Node, Any] | None = {} if _local_memory(region) else None
            try:
                with one_thread() if small else contextlib.nullcontext():
                    wanted = list(evaluate(region, tensors, values))
                    got = list(evaluate(replacement, copies))
            except Refused:
                raise
            except Exception as e:
                raise _NotRun(f"The proof could not be run: {one_line(e)}.") from e
            if values is not None:
                _same_memory(region, values)
            names = [f"output {i}" for i in range(len(wanted))]
            for (name, _), t, c in zip(inputs, tensors, copies, strict=True):
                if isinstance(t, torch.Tensor):
                    names.append(f"{name} after the step" if name in m.writes else f"{name}, which must not be written,")
                    wanted.append(t)
                    got.append(c)
            for name, w, g in zip(names, wanted, got, strict=True):
                worst = max(worst, compare(name, w, g))
    return worst


def compare(name: str, wanted: torch.Tensor, got: torch.Tensor) -> float:
    if wanted.shape != got.shape:
        found = f"{shown(wanted.shape)} in the model, {shown(got.shape)} in the op"
        raise _NotRun(f"The float64 proof failed: {name} must have one shape, found {found}.")
    if not torch.isfinite(wanted).all() or not torch.isfinite(got).all():
        raise Refused(f"The float64 proof failed: {name} is not finite.")
    if wanted.numel() == 0:
        return 0.0
    wanted, got = wanted.double(), got.double()
    difference = (wanted - got).abs().flatten()
    error = float(difference.max() / wanted.abs().max().clamp_min(1e-300))
    if error > TOLERANCE:
        i = int(difference.argmax())
        raise Refused(
            f"The float64 proof failed: {name} differs by {error:.1e} relative, at most {TOLERANCE:.0e} allowed; "
            f"worst element {i}: model {float(wanted.flatten()[i]):.6g}, op {float(got.flatten()[i]):.6g}."
        )
    return error
