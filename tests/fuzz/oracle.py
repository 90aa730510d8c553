"""Whether a rewritten graph does what the graph that it was made from does: in float64, in its own dtypes, and to memory."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Graph, GraphModule, Node

from gdnfuse.options import Options
from gdnfuse.packing import PackedWeight
from gdnfuse.pipeline import original, rewrite
from gdnfuse.report.records import GraphReport, Status
from gdnfuse.rewrite.evaluate import evaluate_node, in_float64
from gdnfuse.rewrite.graph import storage

# Regions are proved to 1e-9 each; errors add up, and what an edit makes of a model may be badly conditioned.
MATHS = 1e-7
# In its own dtypes ours may be this many times as far from float64 as the graph as it came: errors of small tensors are a draw.
SLACK = 4.0
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float64: 1e-5}


class NotRun(Exception):
    """The graph as it came raises, or gives what is not finite: there is nothing to compare with."""


class Wrong(AssertionError):
    """The rewritten graph does something else, or says something that is no sentence."""


@dataclass(frozen=True)
class Verdict:
    """fired, declined: how many rewrites each rule made, and how many it did not. layers: those reported fused.
    results: of the graph as it came in float64, to see whether it still means what it did."""

    fired: Counter[str]
    declined: Counter[str]
    layers: int
    results: list[torch.Tensor]


def check(gm: GraphModule, calls: Sequence[Sequence[Any]]) -> Verdict:
    """Rewrite a copy of a graph and demand that it does the same on the arguments of calls and on others drawn.

    Args:
        gm: Dynamo's graph, perhaps edited.
        calls: arguments; the first are those that it was made with. Where others have other sizes, an edit may not take them.

    Raises:
        NotRun: there is nothing to compare.
        Wrong: names what differs.
    """
    gm.recompile()
    args, *others = calls
    samples, exact = [_as_float64(args), _drawn(args)], []
    try:
        exact = [_run64(gm.graph, s) for s in samples]
        theirs = _run(gm, _copies(args))
    except Exception as e:
        raise NotRun(f"{type(e).__name__}: {e}") from e
    for other in map(_as_float64, others):
        with contextlib.suppress(Exception):
            exact.append(_run64(gm.graph, other))
            samples.append(other)
    if not _finite(exact[0]):
        raise NotRun("a result is not finite")

    _rewritten(gm, _copies(args), "cuda")  # which cannot run here, but is made
    given = _copies(args)
    ours, packed, report = _rewritten(gm, given, None)
    ours.recompile()
    records = [r for r in report.all_records if r.stage in ("lift", "fuse")]
    for i, (sample, wanted) in enumerate(zip(samples, exact, strict=True)):
        weights = [torch.cat([sample[w] for w in p.where]) for p in packed]
        if _finite(wanted):
            _compare(
                _run64(ours.graph, sample, weights), wanted, lambda *pair, i=i: _same_maths(f"of sample {i} in float64", *pair)
            )
    found = _run(ours, given, [p.current(given) for p in packed])
    if len(found) != len(theirs):
        raise Wrong(f"{len(theirs)} results became {len(found)}")
    floor = max(FLOOR[a.dtype] for a in args if isinstance(a, torch.Tensor) and a.is_floating_point())
    for i, (f, t, e) in enumerate(zip(found, theirs, exact[0], strict=True)):
        _no_less_accurate(f"result {i}", f, t, e, floor)
    _same_memory(found, theirs, len(theirs) - sum(isinstance(a, torch.Tensor) for a in args))
    return Verdict(
        Counter(r.rule for r in records if r.status is Status.FIRED),
        Counter(r.rule for r in records if r.status is not Status.FIRED),
        report.fused_layers,
        exact[0],
    )


def _rewritten(gm: GraphModule, given: list[Any], target: str | None) -> tuple[GraphModule, list[PackedWeight], GraphReport]:
    ours, report = original(gm), GraphReport(-1)
    packed = rewrite(ours, given, Options(target=target), report).packed
    for r in report.all_records:
        if r.status is not Status.FIRED or r.reason:
            _sentence(r.reason)
    return ours, packed, report


def same_results(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    """Whether two graphs mean the same on one sample."""
    if [x.shape for x in found] != [x.shape for x in wanted]:
        return False
    return all(_difference(f, w) <= MATHS for f, w in zip(found, wanted, strict=True))


def _as_float64(args: Sequence[Any]) -> list[Any]:
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def _drawn(args: Sequence[Any]) -> list[Any]:
    """The same with every floating tensor moved about as far as its elements are large."""
    generator = torch.Generator().manual_seed(0)

    def moved(a: Any) -> Any:
        if not isinstance(a, torch.Tensor) or not a.is_floating_point():
            return a
        return a.double() + torch.randn(a.shape, dtype=torch.float64, generator=generator) * (a.double().abs().mean() + 0.1)

    return [moved(a) for a in args]


def _copies(args: Sequence[Any]) -> list[Any]:
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in args]


def _results(outputs: Any, args: Sequence[Any]) -> list[torch.Tensor]:
    """All outputs that are tensors, and all arguments after the call."""
    return [x for x in (*pytree.tree_leaves(outputs), *args) if isinstance(x, torch.Tensor)]


@torch.no_grad()
def _run(gm: GraphModule, args: list[Any], more: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
    return _results(gm.forward(*args, *more), args)


@torch.no_grad()
def _run64(graph: Graph, args: Sequence[Any], more: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
    """Run in float64, with memory shared as in the graph: where a cast has nothing to do there, it copies nevertheless."""
    args, env = _copies(args), {}
    load = lambda a: env[a] if isinstance(a, Node) else a  # noqa: E731
    given = iter([*args, *more])
    for n in in_float64(graph).nodes:
        if n.op == "placeholder":
            env[n] = next(given)
        elif n.op == "output":
            return _results(pytree.tree_map_only(Node, load, n.args[0]), args)
        else:
            env[n] = y = evaluate_node(n, load)
            for x in n.all_input_nodes:
                if isinstance(y, torch.Tensor) and isinstance(env[x], torch.Tensor) and storage(x) != storage(n):
                    if y.untyped_storage()._cdata == env[x].untyped_storage()._cdata:
                        env[n] = y.clone()
    raise AssertionError("a graph has an output")


def _finite(results: list[torch.Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in results)


def _compare(found: list[torch.Tensor], wanted: list[torch.Tensor], how: Callable[..., None]) -> None:
    if len(found) != len(wanted):
        raise Wrong(f"{len(wanted)} results became {len(found)}")
    for i, (f, w) in enumerate(zip(found, wanted, strict=True)):
        how(i, f, w)


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    if wanted.numel() == 0:
        return 0.0
    difference = (found.double() - wanted.double()).abs().max()
    return float(difference.nan_to_num(float("inf")) / wanted.double().abs().max().clamp_min(1e-12))


def _same_maths(where: str, i: int, found: torch.Tensor, wanted: torch.Tensor) -> None:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise Wrong(f"result {i} {where} was {wanted.dtype} {list(wanted.shape)} and is {found.dtype} {list(found.shape)}")
    if (difference := _difference(found, wanted)) > MATHS:
        raise Wrong(f"result {i} {where} differs by {difference:.1e}")


def _no_less_accurate(name: str, found: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, floor: float) -> None:
    if found.shape != theirs.shape or found.dtype != theirs.dtype:
        raise Wrong(f"{name} was {theirs.dtype} {list(theirs.shape)} and is {found.dtype} {list(found.shape)}")
    if not theirs.is_floating_point():
        if not torch.equal(found, theirs):
            raise Wrong(f"{name} has other numbers")
        return
    measured = theirs.isfinite()
    if not found[measured].isfinite().all():
        raise Wrong(f"{name} is not finite")
    scale = exact[measured].norm().clamp_min(1e-3 * exact.numel() ** 0.5)
    ours, eager = (float((x[measured].double() - exact[measured]).norm() / scale) for x in (found, theirs))
    if ours > SLACK * eager + floor:
        raise Wrong(f"{name} is {ours:.1e} off float64, where it was {eager:.1e}")


def _same_memory(found: list[torch.Tensor], theirs: list[torch.Tensor], outputs: int) -> None:
    """Outputs overlap what they overlapped, and are contiguous where they were."""
    for i, j in combinations(range(len(theirs)), 2):
        if i < outputs and _overlap(found[i], found[j]) != _overlap(theirs[i], theirs[j]):
            raise Wrong(f"results {i} and {j} share memory in one graph and not in the other")
    for i in range(outputs):
        if theirs[i].is_contiguous() and not found[i].is_contiguous():
            raise Wrong(f"output {i} was contiguous and has the strides {found[i].stride()}")


def _overlap(x: torch.Tensor, y: torch.Tensor) -> bool:
    if x.untyped_storage()._cdata != y.untyped_storage()._cdata:
        return False
    places = [
        torch.arange(len(t.untyped_storage()) // t.element_size()).as_strided(t.shape, t.stride(), t.storage_offset())
        for t in (x, y)
    ]
    return bool(torch.isin(*places).any())


def _sentence(text: str) -> None:
    if not text.endswith(".") or len(text.split()) < 5 or "\n" in text:
        raise Wrong(f"no sentence: {text!r}")
