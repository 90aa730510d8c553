"""gdnfuse.explain: what is fused in a real call, where its graph breaks, what compiles it again, and what to do about each.

The call is traced as after `gdnfuse.compile`, and every graph goes through the passes. But the original graph is what runs:
nothing is packed or compiled.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gdnfuse import compat
from gdnfuse.backend import noting, pieces_of, rewritten_copy
from gdnfuse.errors import GdnfuseError, one_line
from gdnfuse.generation import device_map, generate, speculation, stages
from gdnfuse.generation.arguments import parameters_of
from gdnfuse.generation.causes import Finding, left, noted
from gdnfuse.generation.compile import Beside, by_phase, by_tokens, with_own_code
from gdnfuse.generation.coverage import PROMPT, SHORT, STEP, VERIFY, Coverage
from gdnfuse.generation.wrappers import compiled_models, is_compiled
from gdnfuse.options import Options
from gdnfuse.passes import devices
from gdnfuse.passes.growing_keys import mark
from gdnfuse.report.records import NOT_MEASURED, TUNE, GraphReport
from gdnfuse.runs import RUNS

SCHEMA = "gdnfuse.explanation/2"


@dataclass(frozen=True)
class Taken:
    """What a prompt took from a prefix store.

    Attributes:
        tokens: how many tokens of each row were taken; 0 if no prefix of all rows was known.
        prompt: how many tokens a row has, or None if that is not known.
        why_not: why the store was not used; empty if it was used.
        no_end: why the end of the turn cannot be kept; empty if it may be.
    """

    tokens: int
    prompt: int | None
    why_not: str
    no_end: str = ""

    def __str__(self) -> str:
        if self.why_not:
            return f"Nothing was taken from the prefix store: {self.why_not}."
        end = f" Only the prompt of this turn can be kept: {self.no_end}." if self.no_end else ""
        return f"{self.tokens} of the {self.prompt} tokens of the prompt were taken from the prefix store.{end}"


@dataclass
class Explanation:
    """What `explain` found.

    Attributes:
        reports: one for each graph of the call, in the order in which they were traced.
        findings: what kept the call from being one fused graph per phase, with causes and remedies.
        prefixes: for each `generate` of a model with a prefix store, what it took from the store.
        drafts: for each generation with drafts, how many were accepted.
    """

    reports: list[GraphReport]
    findings: list[Finding]
    prefixes: list[Taken] = field(default_factory=list)
    drafts: list[speculation.Acceptance] = field(default_factory=list)

    @property
    def breaks(self) -> list[Finding]:
        """Where the graph of the call breaks."""
        return [f for f in self.findings if f.kind in ("graph break", "frame left eager")]

    @property
    def recompiles(self) -> list[Finding]:
        """What compiled the call again."""
        return [f for f in self.findings if f.kind.startswith("recompilation")]

    def summary(self) -> str:
        """The text that `print` shows.

        Returns:
            A line on the call, one for each graph and each layer that is not fused, and one for each finding with its remedy.
        """
        layers = [layer for report in self.reports for layer in report.layers]
        breaks, again = (sum(f.count for f in found) for found in (self.breaks, self.recompiles))
        lines = [
            f"{_count(len(self.reports), 'graph')}, {sum(layer.fused for layer in layers)}/{len(layers)} GDN layers fused, "
            f"{_count(breaks, 'graph break')}, {_count(again, 'recompilation')}."
        ]
        lines += map(str, [*self.prefixes, *self.drafts])
        for report in self.reports:
            lines.append(report.summary())
            lines += [f"  {layer.path} is not fused. {layer.why_not}" for layer in report.layers if not layer.fused]
        where = {r.measured for report in self.reports for r in report.all_records}
        lines += [f"Choices of some kernels were {NOT_MEASURED}: {TUNE}."] if f"{NOT_MEASURED}: {TUNE}" in where else []
        for f in self.findings:
            times = f" ({f.count} times)" if f.count > 1 else ""
            lines.append(f"{f.kind}{times}, {f.where}: {f.cause}")
            lines += [f"  → {f.fix}"] if f.fix else []
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON.

        Returns:
            The schema with its version, graphs as in `GraphReport.to_dict`, and findings, prefixes and drafts with their
            attributes.
        """
        graphs, findings = [r.to_dict() for r in self.reports], [asdict(f) for f in self.findings]
        more = {"prefixes": [asdict(x) for x in self.prefixes], "drafts": [x.to_dict() for x in self.drafts]}
        return {"schema": SCHEMA, "graphs": graphs, "findings": findings, **more}


def explain(call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Make a real call, and say what is fused in it, where its graph breaks, what compiles it again, and what to do about each.

    The model does not change: no weights are packed and no kernel is compiled. What the call writes to the model's buffers is the
    same as without gdnfuse. The original graphs run, so the call is not fast. Random numbers are drawn from a copy of the
    generators' states. What Dynamo traces for this call is kept apart from your own compilations. One exception: code after a
    graph break is compiled by itself. Its entry stays, and counts towards torch's recompilation limit until
    `torch.compiler.reset()`.

    Args:
        call: a model, its `generate` (`explain(model.generate, ids, max_new_tokens=8)`), or any function. Calls of a model are
            traced as after `gdnfuse.compile(model)`, prompts and decode steps separately, whether the model is compiled or not. A
            function is traced as by `torch.compile`. If `call` is already compiled, the original function is traced.
        args, kwargs: arguments of the call. It gets copies, so your tensors and caches do not change. The copies need as much
            memory again.

    Returns:
        Reports and findings. Nothing is added to `gdnfuse.reports()`.

    Raises:
        GdnfuseError: `call` cannot be called, or its arguments cannot be copied.
        Exception: whatever the call raises.
    """
    call = _uncompiled(call)
    args, kwargs = _copied(args, kwargs)
    reports: list[GraphReport] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if pieces := pieces_of(gm, inputs):
            return devices.joined(gm, pieces, inputs, of_one_device)
        return of_one_device(gm, inputs)

    def of_one_device(gm: torch.fx.GraphModule, inputs: Sequence[Any], device: str = "") -> Callable[..., Any]:
        reports.append(GraphReport(len(reports), "draft" if RUNS.drafting else "other", inner="eager", device=device))
        growing = rewritten_copy(gm, inputs, Options(inner="eager"), reports[-1], plan=True).growing
        note = noting(gm, reports[-1])

        def call(*args: Any) -> Any:
            results = gm.forward(*args)
            mark(results, growing)
            note(args)
            return results

        return call

    model = _model_of(call)
    models = [] if model is None else compiled_models(model)
    uncompiled = not any(map(is_compiled, models))
    borders = [device_map.Borders(m) for m in models]
    coverages = [
        Coverage(stages.inside(m), Options(), lambda: reports, quiet=True, why_not=b.why_not)
        for m, b in zip(models, borders, strict=True)
    ]
    names: dict[str, str] = {}
    runs: list[list[generate.Run]] = []
    with contextlib.ExitStack() as stack:
        for one in borders:
            stack.callback(one.undo)
            one.make()
        found, drafts = stack.enter_context(noted()), stack.enter_context(speculation.noting())
        stack.enter_context(_random_states())
        if model is None:
            name = f"call_{next(_calls)}"
            names[name] = getattr(call, "__name__", "the call")
            torch.compile(with_own_code(call, name), backend=backend)(*args, **kwargs)
        else:
            for one in {id(m): m for m in (model, *models, *map(stages.inside, models))}.values():
                stack.enter_context(_attributes_of(one))
            for whole, coverage in zip(models, coverages, strict=True):
                one = stages.inside(whole)

                def compiled(phase: str, one: Any = one, coverage: Coverage = coverage) -> Callable[..., Any]:
                    names[name := f"{phase}_{next(_calls)}".replace(" ", "_")] = f"{phase}s"
                    return coverage.checked(torch.compile(with_own_code(compat.call_of(one), name), backend=backend), phase)

                few = (by_tokens(lambda T, phase=phase, of=compiled: of(phase)) for phase in (VERIFY, SHORT))
                traced = by_phase(compiled(STEP), compiled(PROMPT), parameters_of(one), *few)
                if (ours := generate.of(whole)) is not None:
                    runs.append(stack.enter_context(ours.noting()))
                    traced = ours.heeding(traced)
                traced.beside = Beside({"backend": backend})
                compat.set_compiled_call(one, traced)
                stages.enter(whole)
            if call is not model:
                # If generate compiled the decode step itself, it would not use this backend.
                kwargs = {"disable_compile": True, **kwargs}
            call(*args, **kwargs)
    unfused = [
        Finding("layers not fused", f"{m.counts} run fused. {m.cause}", f"{phase}s", m.fix)
        for coverage in coverages
        for phase, m in coverage.missing.items()
    ]
    findings = [*unfused, *left(reports), *found.breaks(), *found.recompilations(names)]
    if not reports:
        findings.append(Finding("not compiled", "Dynamo made no graph of this call.", "the call", ""))
    elif model is not None and call is not model and uncompiled:
        cause = "generate calls the model, which is not compiled now; torch.compile(model) does not change that."
        findings.append(Finding("not compiled", cause, "model.generate", "Call gdnfuse.compile(model) first."))
    return Explanation(reports, findings, [taken(run) for noted in runs for run in noted], drafts)


def taken(run: generate.Run) -> Taken:
    """What a run of `generate` took from its model's store."""
    return Taken(run.taken or 0, run.prompt, run.why_not or "", run.no_end)


_calls = itertools.count()


def _uncompiled(call: Any) -> Callable[..., Any]:
    """`call` without the compilation that was put around it."""
    call = compat.uncompiled(call)
    if not callable(call):
        raise GdnfuseError(f"explain needs a model, its generate or a function, found {type(call).__name__}.")
    return call


def _model_of(call: Callable[..., Any]) -> torch.nn.Module | None:
    """The model that is called, or whose `generate` is called. None for any other function."""
    if isinstance(call, torch.nn.Module):
        return call
    owner = getattr(call, "__self__", None)
    return owner if isinstance(owner, torch.nn.Module) and getattr(call, "__name__", "") == "generate" else None


def _copied(args: Any, kwargs: Any) -> Any:
    """Copies of the arguments, because the call may write to them. Modules among them are not copied."""
    known: dict[int, Any] = {}
    for x in compat.tree_leaves((args, kwargs)):
        if isinstance(x, torch.nn.Module):
            known[id(x)] = x
        elif isinstance(x, torch.Tensor) and not x.is_leaf:  # which deepcopy refuses
            known[id(x)] = x.detach().clone().requires_grad_(x.requires_grad)
    try:
        return copy.deepcopy((args, kwargs), known)
    except Exception as e:
        raise GdnfuseError(f"explain needs arguments that can be copied, found {one_line(e)}.") from e


@contextlib.contextmanager
def _attributes_of(model: torch.nn.Module) -> Iterator[None]:
    """Restore the model's attributes afterwards. We set some, and `generate` too: it remembers sizes of caches."""
    before = dict(vars(model))
    try:
        yield
    finally:
        vars(model).clear()
        vars(model).update(before)


@contextlib.contextmanager
def _random_states() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
