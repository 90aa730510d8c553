"""gdnfuse.explain: what fuses in a real call, where the call leaves its graph, what compiles it again, and what to do about it.

The call is traced as `gdnfuse.compile` would have it traced and every graph goes through the passes, but what runs is the graph
as it came: nothing is packed or compiled. Causes are read where torch keeps them, before and after the call:
`graph_break_reasons`, and the metrics that Dynamo records of each compilation.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._dynamo import utils as dynamo

from gdnfuse.backend import rewritten_copy
from gdnfuse.errors import GdnfuseError
from gdnfuse.generation.compile import apart, by_phase, parameters_of
from gdnfuse.options import Options
from gdnfuse.passes.growing_keys import growing_keys, mark
from gdnfuse.report.records import GraphReport

SCHEMA = "gdnfuse.explanation/1"
METRICS = 4096  # compilations of one call that torch is asked to remember; 64 otherwise

# What is found in torch's words → what to do. The first that matches holds; torch's own hint otherwise.
BREAKS = (
    (r"generic_jump|[Dd]ata-dependent", "Decide it outside the compiled call, or without a branch: torch.where, torch.cond."),
    (
        r"\.item|scalar",
        "Keep the value in a tensor, or read it outside the compiled call; torch._dynamo.config.capture_scalar_outputs keeps it "
        "in the graph.",
    ),
    (r"`print`|[Ll]ogg", "Take the output out of the call, or name it in torch._dynamo.config.reorderable_logging_functions."),
    (r"fla\.|causal_conv1d", "Leave capture on: it takes our op in the place of the library's function."),
    (r"graph_break\(\)", "Remove the call of torch._dynamo.graph_break from the code."),
    (r"[Dd]isable", "Take the function that may not be traced out of the model's call, or lift its torch.compiler.disable."),
)
RECOMPILES = (
    (
        r"(?:keys|values)\S*' size mismatch",
        'Use a cache that does not grow: generate(cache_implementation="static"), or a StaticCache in a loop of your own.',
    ),
    (
        r"size mismatch|\.size\(\)\[|stride mismatch",
        "Sizes that change get a graph for all of them at the second one; dynamic=True makes that one at once.",
    ),
    (r"GLOBAL_STATE|grad_mode|is_grad", "Run every call under the same mode: all of them under torch.no_grad()."),
    (
        r"dispatch key",
        "Run every call under the same mode: tensors made under torch.inference_mode() are others than those of torch.no_grad().",
    ),
    (r"dtype|expected type|device", "Give every call inputs of the same kinds, dtypes and devices."),
    (
        r"has_previous_state|is_initialized|_states|cumulative_length",
        "Let prompts and decode steps be compiled apart, as gdnfuse.compile does: a cache is another one once it is filled.",
    ),
    (r"layer_idx|___check_obj_id|___check_type_id|ID_MATCH", "Compile the model as a whole rather than its layers one by one."),
    (
        r" == \S+",
        "A Python number is a constant of its graph: hand over one that changes as a tensor, or compile with dynamic=True.",
    ),
)
LIMIT = "Remove the causes of the recompilations above; if all are wanted, raise torch._dynamo.config.{}."
NOTES = (
    (r"without gradients", "Call under torch.no_grad() or torch.inference_mode(), or model.requires_grad_(False)."),
    (r"autocast", "Leave autocast out and load the model in the dtype it should run in."),
    (r"one mode from start to end", "Enter autocast or inference mode around the compiled call, not inside it."),
    (r"leave graphs alone", "Unset GDNFUSE_DISABLE."),
)


@dataclass(frozen=True)
class Finding:
    """Something between the call and one fused graph.

    Attributes:
        kind: "graph break", "frame left eager", "recompilation", "recompilation limit", "graph left as it came" or
            "not compiled".
        cause: in torch's words or ours.
        where: "file:line in function", what was compiled again, or the graph.
        fix: a suggestion, or empty where there is none.
        count: how often.
    """

    kind: str
    cause: str
    where: str
    fix: str
    count: int = 1


@dataclass
class Explanation:
    """What `explain` found.

    Attributes:
        reports: one for each graph of the call, in the order they were traced.
        findings: what stood between the call and one fused graph for each phase, with causes.
    """

    reports: list[GraphReport]
    findings: list[Finding]

    @property
    def breaks(self) -> list[Finding]:
        """Where the call left its graph."""
        return [f for f in self.findings if f.kind in ("graph break", "frame left eager")]

    @property
    def recompiles(self) -> list[Finding]:
        """What compiled it again."""
        return [f for f in self.findings if f.kind.startswith("recompilation")]

    def summary(self) -> str:
        """A line on the call, one for each graph, the layers that are not fused, and a line for each finding and its fix."""
        layers = [layer for report in self.reports for layer in report.layers]
        breaks, again = (sum(f.count for f in found) for found in (self.breaks, self.recompiles))
        lines = [
            f"{_count(len(self.reports), 'graph')}, {sum(layer.fused for layer in layers)}/{len(layers)} GDN layers fused, "
            f"{_count(breaks, 'graph break')}, {_count(again, 'recompilation')}."
        ]
        for report in self.reports:
            lines.append(report.summary())
            lines += [f"  {layer.path} is not fused. {layer.why_not}" for layer in report.layers if not layer.fused]
        for f in self.findings:
            times = f" ({f.count} times)" if f.count > 1 else ""
            lines.append(f"{f.kind}{times}, {f.where}: {f.cause}")
            lines += [f"  → {f.fix}"] if f.fix else []
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the schema with its version, graphs as of `GraphReport.to_dict`, findings as their attributes."""
        graphs, findings = [r.to_dict() for r in self.reports], [asdict(f) for f in self.findings]
        return {"schema": SCHEMA, "graphs": graphs, "findings": findings}


def explain(call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Make a real call and say what fuses in it, where it breaks its graph, what compiles it again, and what to do about that.

    Args:
        call: a model, its `generate` (`explain(model.generate, ids, max_new_tokens=8)`), or any function. A model's calls are
            traced as after `gdnfuse.compile(model)`, prompts apart from decode steps, whether it is compiled now or not; a
            function as by `torch.compile`. What is compiled already is taken as it was before.
        args, kwargs: of the call. It gets copies, so that tensors and caches among them stay as they are: that takes their
            memory once more.

    Returns:
        Reports and findings. Nothing is added to `gdnfuse.reports()`.

    The model stays as it is: no weights are packed, no kernel is compiled, and what the call makes it write to its own buffers is
    the same as without us. The graphs run as they came, not as fast as they will. Random numbers are drawn from a copy of the
    generators' states. Dynamo keeps the call's own traces apart from yours, but code behind a graph break is compiled by itself
    and keeps the entry, which counts towards torch's recompilation limit there until `torch.compiler.reset()`.

    Raises:
        GdnfuseError: `call` cannot be called, or its arguments cannot be copied.
        Exception: whatever the call raises.
    """
    call = _as_it_was(call)
    args, kwargs = _copied(args, kwargs)
    reports: list[GraphReport] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        reports.append(GraphReport(len(reports), inner="eager"))
        rewritten_copy(gm, inputs, Options(inner="eager"), reports[-1], plan=True)
        growing = growing_keys(gm.graph) if reports[-1].phase == "prefill" else []

        def call(*args: Any) -> Any:
            results = gm.forward(*args)
            mark(results, growing)
            return results

        return call

    model = _model_of(call)
    names = {f"{phase}_{next(_calls)}": phase for phase in ("decode steps", "prompts")}
    with _metrics() as found, _random_states():
        if model is None:
            name = f"call_{next(_calls)}"
            names[name] = getattr(call, "__name__", "the call")
            torch.compile(apart(call, name), backend=backend)(*args, **kwargs)
        else:
            uncompiled = model._compiled_call_impl is None and "forward" not in vars(model)
            decode, first = (torch.compile(apart(model._call_impl, name), backend=backend) for name in names)
            with _attributes_of(model):
                model._compiled_call_impl = by_phase(decode, first, parameters_of(model))
                if call is not model:
                    # Where generate compiles the decode step for itself, it would not be with this backend.
                    kwargs = {"disable_compile": True, **kwargs}
                call(*args, **kwargs)
    findings = [*_left(reports), *found.breaks(), *found.recompilations(names)]
    if not reports:
        findings.append(Finding("not compiled", "Dynamo made no graph of this call.", "the call", ""))
    elif model is not None and call is not model and uncompiled:
        cause = "generate calls the model, which is not compiled now; torch.compile(model) does not change that."
        findings.append(Finding("not compiled", cause, "model.generate", "Call gdnfuse.compile(model) first."))
    return Explanation(reports, findings)


_calls = itertools.count()


def _as_it_was(call: Any) -> Callable[..., Any]:
    """Without the compilation that somebody put around it."""
    if isinstance(call, torch._dynamo.OptimizedModule):
        return call._orig_mod
    call = getattr(call, "_torchdynamo_orig_callable", call)
    if not callable(call):
        raise GdnfuseError(f"explain needs a model, its generate or a function, found {type(call).__name__}.")
    return call


def _model_of(call: Callable[..., Any]) -> torch.nn.Module | None:
    """The model that is called, or whose generate is."""
    if isinstance(call, torch.nn.Module):
        return call
    owner = getattr(call, "__self__", None)
    return owner if isinstance(owner, torch.nn.Module) and getattr(call, "__name__", "") == "generate" else None


def _copied(args: Any, kwargs: Any) -> Any:
    """Arguments that the call may write; modules among them stay who they are."""
    known: dict[int, Any] = {}
    for x in pytree.tree_leaves((args, kwargs)):
        if isinstance(x, torch.nn.Module):
            known[id(x)] = x
        elif isinstance(x, torch.Tensor) and not x.is_leaf:  # which deepcopy refuses
            known[id(x)] = x.detach().clone().requires_grad_(x.requires_grad)
    try:
        return copy.deepcopy((args, kwargs), known)
    except Exception as e:
        raise GdnfuseError(f"explain needs arguments that can be copied, found {type(e).__name__}: {e}") from e


@contextlib.contextmanager
def _attributes_of(model: torch.nn.Module) -> Iterator[None]:
    """Whatever is set on the model meanwhile, by us or by generate, which remembers sizes of caches, is as before afterwards."""
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


class _Found:
    """What Dynamo noted since this was made."""

    def __init__(self) -> None:
        self._known = [*dynamo.graph_break_reasons, *dynamo.get_compilation_metrics()]
        self.reasons: list[Any] = []
        self.metrics: list[Any] = []

    def read(self) -> None:
        known = {id(x) for x in self._known}
        self.reasons = [r for r in dynamo.graph_break_reasons if id(r) not in known]
        self.metrics = [m for m in dynamo.get_compilation_metrics() if id(m) not in known]

    def breaks(self) -> list[Finding]:
        """Each place once: what is behind a break in an inner function is traced again, and breaks again."""
        found = {}
        for reason in self.reasons:
            frame = reason.user_stack[-1] if reason.user_stack else None
            where = f"{frame.filename}:{frame.lineno} in {_function(frame.name)}" if frame else "unknown"
            cause = "Data-dependent branching." if reason.reason.startswith("generic_jump") else _cause(reason.reason)
            found[where] = Finding("graph break", cause, where, _fix(BREAKS, reason.reason))
        for m in self.metrics:
            if m.fail_reason and not _limit(m):
                at = (m.fail_user_frame_filename, m.fail_user_frame_lineno)
                file, line = at if all(at) else (m.co_filename, m.co_firstlineno)
                where = f"{file}:{line} in {_function(m.co_name)}"
                found[where] = Finding("frame left eager", _cause(m.fail_reason), where, _fix(BREAKS, m.fail_reason))
        return list(found.values())

    def recompilations(self, names: dict[str, str]) -> list[Finding]:
        """Those with the same cause together, and where torch gave up.

        Args:
            names: of the code that we compile, and what it stands for.
        """
        found: dict[Finding, int] = {}
        for m in self.metrics:
            reason = _reason(m.recompile_reason or "")
            # Of code that was compiled before, by somebody else, Dynamo has nothing better to say.
            if not reason or "BACKEND_MATCH" in reason or "Unable to find" in reason:
                continue
            where = names.get(m.co_name) or f"{m.co_filename}:{m.co_firstlineno} in {_function(m.co_name)}"
            if limit := _limit(m):
                one = Finding(
                    "recompilation limit", f"torch left it eager at {limit}. Last cause: {reason}", where, LIMIT.format(limit)
                )
            else:
                one = Finding("recompilation", reason, where, _fix(RECOMPILES, reason))
            found[one] = found.get(one, 0) + 1
        return [Finding(f.kind, f.cause, f.where, f.fix, n) for f, n in found.items()]


@contextlib.contextmanager
def _metrics() -> Iterator[_Found]:
    """What Dynamo notes meanwhile, however much it is."""
    limit = dynamo._compilation_metrics.maxlen
    dynamo.set_compilation_metrics_limit(METRICS)
    found = _Found()
    try:
        yield found
    finally:
        found.read()
        dynamo.set_compilation_metrics_limit(limit)


def _left(reports: Sequence[GraphReport]) -> list[Finding]:
    left = [r for r in reports if not r.rewritten]
    return [Finding("graph left as it came", r.note, f"graph {r.graph_id}", _fix(NOTES, r.note)) for r in left]


def _fix(known: Sequence[tuple[str, str]], text: str) -> str:
    hint = re.search(r"^ *Hint: (.+)", text, re.MULTILINE)
    return next((fix for pattern, fix in known if re.search(pattern, text)), hint[1].strip() if hint else "")


def _cause(text: str) -> str:
    """The first line of torch's message, and its explanation."""
    explanation = re.search(r"^ *Explanation: (.+)", text, re.MULTILINE)
    first = (text.strip().splitlines() or ["unknown"])[0].rstrip(".")
    return f"{first}. {explanation[1].strip()}" if explanation else f"{first}."


def _reason(text: str) -> str:
    """Without the number of the compilation, the line of code that follows a guard, and the stack."""
    first = (text.splitlines() or [""])[0]
    return re.sub(r"^\[?\d+/\d+\S*: |\s{2,}# .*", "", first).strip()


def _limit(m: Any) -> str:
    """The setting that ended recompilation, or empty."""
    found = re.search(r"Limit type: (\w+)", m.fail_reason or "")
    return found[1] if found else ""


def _function(name: str) -> str:
    """What Dynamo calls the rest of a function behind a break is that function."""
    return re.sub(r"^torch_dynamo_resume_in_(.+)_at_\d+$", r"\1", name or "unknown")


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
