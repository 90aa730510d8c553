"""The torch.compile entry point: a graph and options in, a compiled callable out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from gdnfuse import breaks, cache_keys, capture, compat, dialect, kernels, versions
from gdnfuse.errors import GdnfuseError, Refused, one_line
from gdnfuse.kernels.launch.inductor import announce
from gdnfuse.options import DISABLE, MEASURED, Options, disabled, parse
from gdnfuse.packing import PackedWeights, taking
from gdnfuse.passes import collectives, devices, verify
from gdnfuse.passes.growing_keys import mark
from gdnfuse.pipeline import Compilation, original, rewrite
from gdnfuse.report.records import Comparison, GraphReport, Status, new_report, publish
from gdnfuse.rewrite.graph import is_tensor, module_stack, value
from gdnfuse.runs import RANKS, RUNS

log = logging.getLogger(__name__)

# Here, because the backend is loaded when it is named, before anything is traced for it.
capture.install()
for sentence in versions.too_old():
    log.warning("%s Matches are proved all the same, but more may stay unfused.", sentence)

WHOLE = "gdnfuse_whole"  # in a graph's meta: why it does not come apart
MODE_CHANGES = ("_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_jvp_increment_nesting")


def gdnfuse(
    gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Backend for `torch.compile(model, backend="gdnfuse", mode=…, options=…)`.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs; Parameters among them are the model's own.
        mode: handed to Inductor.
        options: see `gdnfuse.options.Options`.

    Returns:
        The compiled callable, with the arguments of `gm`.

    Raises:
        GdnfuseError: bad options; or `strict` and a GDN layer left unfused that should not be.
    """
    opts = parse(options)
    if opts.one_shot_bytes == MEASURED:
        raise GdnfuseError("one_shot_bytes='measured' needs gdnfuse.compile, which measures, found torch.compile: give bytes.")
    patches = _inductor_patches(mode, opts)
    if any(isinstance(x, torch.Tensor) and x.is_cuda for x in example_inputs):
        kernels.read_triton()
    broken = _broken(gm)
    if pieces := pieces_of(gm, example_inputs):
        return devices.joined(gm, pieces, example_inputs, lambda gm, inputs, on: _compiled(gm, inputs, opts, patches, broken, on))
    return _compiled(gm, example_inputs, opts, patches, broken)


def pieces_of(gm: GraphModule, example_inputs: Sequence[Any]) -> list[devices.Piece]:
    """What a graph comes apart into whose parameters are on several devices; nothing if it has to stay whole, which is said."""
    if len(devices.devices_of(example_inputs)) < 2 or _why_untouched(gm, example_inputs):
        return []
    try:
        return devices.cut(gm)
    except Refused as e:
        gm.meta[WHOLE] = e.reason
        return []


def _compiled(
    gm: GraphModule, example_inputs: Sequence[Any], opts: Options, patches: dict[str, Any], broken: str, device: str = ""
) -> Callable[..., Any]:
    """A graph of one device, which is named if it is a piece, or one that has to stay as it came."""
    report = new_report()
    report.device, report.graph_break = device, broken
    report.inner = opts.inner
    report.phase = "draft" if RUNS.drafting else report.phase
    done = rewritten_copy(gm, example_inputs, opts, report)
    if opts.verify and report.rewritten and report.all_records:
        _verify(gm, done.gm, example_inputs, opts, report)
    publish(report)
    log.info(report.summary())
    _to_trace(report)
    if opts.strict:
        _demand_fused(report, opts)
    if not report.rewritten or not report.all_records and not report.layers:
        return _inner(gm, example_inputs, opts, patches)
    return _finish(done, example_inputs, patches, noting(gm, report))


def _broken(gm: GraphModule) -> str:
    """The sentences of a report on the graph break that ended the graph."""
    if (reason := compat.graph_break(gm)) is None:
        return ""
    where, cause, fix = breaks.describe(reason.reason, reason.user_stack)
    return f"A graph must go on to the end of its function, found a graph break at {where}. {cause} {fix}".rstrip()


def noting(gm: GraphModule, report: GraphReport) -> Callable[[Sequence[Any]], None]:
    """What a graph has to call with its inputs whenever it runs, so that it can be told which layers ran fused (`gdnfuse.runs`).

    Args:
        gm: as it came. Dynamo may run one graph for several layers of a class, so layers are known by what is handed in.
        report: of it.
    """
    fused = {layer.path for layer in report.layers if layer.fused}
    unfused = {layer.path: layer.why_not for layer in report.layers if not layer.fused}
    placeholders = gm.graph.find_nodes(op="placeholder") if fused else []
    read = [i for i, n in enumerate(placeholders) if any(not fused.isdisjoint(module_stack(user)) for user in n.users)]
    times, layers, bounded = len(fused), len(report.layers), sum(map(_is_bounded, gm.graph.nodes))

    def note(args: Sequence[Any]) -> None:
        if layers:
            RUNS.fused += times
            RUNS.bounded += bounded
            RUNS.unfused = unfused
            if RUNS.watched is not None:
                RUNS.watched += [args[i] for i in read]

    return note


def _is_bounded(node: Node) -> bool:
    """Whether a node of Dynamo's graph is a chunked rule that is given the bounds of sequences."""
    op = dialect.op_of(node.target) if node.op == "call_function" else None
    return op is dialect.chunk_delta_rule.op and op.bind(node.args, node.kwargs)["cu_seqlens"] is not None


def rewritten_copy(
    gm: GraphModule, example_inputs: Sequence[Any], opts: Options, report: GraphReport, plan: bool = False
) -> Compilation:
    """A copy of `gm` after all stages, or `gm` itself where it has to stay as it came.

    Args:
        gm: left as it is.
        example_inputs: its inputs.
        opts: of the backend.
        report: filled in; `rewritten` and `note` say whether it was rewritten, and if not why.
        plan: as of Compilation.
    """
    on = devices.devices_of(example_inputs)
    report.note = _why_untouched(gm, example_inputs)
    if len(on) > 1 and not report.note:
        report.note = f"A graph must be on one device, found parameters on {' and '.join(on)}. {gm.meta.get(WHOLE, '')}".rstrip()
    report.rewritten = not report.note
    as_it_came = Compilation(gm, opts, report, plan)
    if not report.rewritten:
        return as_it_came
    try:
        done, why = rewrite(original(gm), example_inputs, opts, report, plan), ""
    except GdnfuseError:
        raise
    except Exception as e:
        # A bug of ours must not cost the user the model: it runs as it came, and says so.
        log.exception("gdnfuse failed on this graph, which is compiled by %s as it came", opts.inner)
        done, why = as_it_came, f"A pass failed: {one_line(e)}."
    if RANKS.agree is not None and (sent := collectives.sent(gm)):
        disagreed = RANKS.agree(sent, collectives.sent(done.gm))
        why = why or disagreed
    if not why:
        return done
    report.rewritten, report.layers, report.records, report.note = False, [], [], why
    return as_it_came


def _to_trace(report: GraphReport) -> None:
    """Hand the report to torch's structured trace (TORCH_TRACE), so that tlparse lists it with the compilation it belongs to."""
    artifacts = (("gdnfuse_report", "json", report.to_dict), ("gdnfuse_summary", "string", lambda: _as_text(report)))
    for name, encoding, payload in artifacts:
        compat.add_to_trace(name, encoding, payload)


def _as_text(report: GraphReport) -> str:
    layers = [f"{layer.path}: {'fused' if layer.fused else f'not fused. {layer.why_not}'}" for layer in report.layers]
    return "\n".join([report.summary(), *layers])


def _verify(gm: GraphModule, rewritten: GraphModule, example_inputs: Sequence[Any], opts: Options, report: GraphReport) -> None:
    """Compare both graphs on these inputs; one that is worse is not used, and the report says what came first that made it so."""
    try:
        report.comparisons = _compared(gm, rewritten, example_inputs)
    except Exception as e:  # out of memory, for one: what was asked for was a check, not to lose the model
        report.note = f"Not verified. {e.reason if isinstance(e, Refused) else f'{one_line(e)}.'}"
        log.warning(report.note)
        return
    worst = max((c for c in report.comparisons if not c.passed), key=lambda c: c.error, default=None)
    if worst is None:
        return
    report.rewritten = False
    found = f"errors of {worst.eager_error:.1e} there and {worst.error:.1e} here"
    report.note = (
        f"Not verified: {worst.name} must be about as near to higher precision as in the graph as it came, found {found}. "
        f"{_blame(gm, example_inputs, opts)}"
    )
    for layer in report.layers:
        layer.fused, layer.note = False, report.note
    log.error(report.note)


def _compared(gm: GraphModule, rewritten: GraphModule, example_inputs: Sequence[Any]) -> list[Comparison]:
    more = rewritten.graph.find_nodes(op="placeholder")[len(example_inputs) :]
    rewritten.recompile()
    kernels.wait()
    return verify.verify(gm, rewritten, example_inputs, [n.meta["gdnfuse_real"] for n in more])


def _blame(gm: GraphModule, example_inputs: Sequence[Any], opts: Options) -> str:
    """A sentence on the first rewrite with which the graphs differ, found by halving how many are made."""

    def attempt(fuel: int | None) -> tuple[bool, GraphReport]:
        trial, copy = GraphReport(-1), original(gm)
        rewrite(copy, example_inputs, dataclasses.replace(opts, fuel=fuel), trial)
        return all(c.passed for c in _compared(gm, copy, example_inputs)), trial

    try:
        fired = [r for r in attempt(opts.fuel)[1].all_records if r.stage in ("lift", "fuse") and r.status is Status.FIRED]
        good, bad = -1, len(fired)
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if attempt(middle)[0] else (good, middle)
        if bad == 0:
            return "It does so without any rewrite too: look at the kernels of what was captured, and at packed weights."
        made = {(r.rule, r.anchor) for r in attempt(bad - 1)[1].all_records if r.status is Status.FIRED}
        last = [r for r in attempt(bad)[1].all_records if r.status is Status.FIRED and (r.rule, r.anchor) not in made]
        last = [r for r in last if r.stage in ("lift", "fuse")]
        return f"The first rewrite with which it does so is number {bad}, {last[0].rule} at {last[0].anchor}." if last else ""
    except Exception as e:
        return f"Which rewrite it comes from was not found. {e.reason if isinstance(e, Refused) else f'{one_line(e)}.'}"


def _why_untouched(gm: GraphModule, example_inputs: Sequence[Any]) -> str:
    if disabled():
        return f"The environment must not ask to leave graphs alone, found {DISABLE} set."
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return "Dtypes must be those of the tensors, found autocast enabled."
    if torch.is_grad_enabled():
        for x in example_inputs:
            if isinstance(x, torch.Tensor) and x.requires_grad:
                return (
                    "Inference must run without gradients (torch.no_grad or requires_grad_(False)), "
                    "found grad mode on and an input or parameter that requires it."
                )
    if computed := next((n for n in gm.graph.nodes if is_tensor(n) and value(n).grad_fn is not None), None):
        return f"Inference must run without gradients in the graph too, found that {computed.name} has one to compute."
    for n in gm.graph.nodes:
        if n.op == "call_function" and getattr(n.target, "__name__", "") in MODE_CHANGES:
            return f"The graph must run in one mode from start to end, found {n.target.__name__} in it."
    return ""


def _demand_fused(report: GraphReport, opts: Options) -> None:
    if not report.rewritten:
        raise GdnfuseError(f"strict: the graph was not rewritten. {report.note}")
    if failed := next((r for r in report.all_records if r.failed), None):
        raise GdnfuseError(f"strict: {failed.reason}")
    if opts.verify and report.all_records and not report.comparisons:
        raise GdnfuseError(f"strict: the graph was not verified. {report.note}")
    # Without capture a prompt is traced as one motif per chunk; only a decode step can be expected to be recognised then.
    if report.phase == "decode" or opts.capture:
        for layer in report.layers:
            if not layer.fused:
                raise GdnfuseError(f"strict: the GDN layer {layer.path} is not fused. {layer.why_not}")


def _finish(
    done: Compilation, example_inputs: Sequence[Any], patches: dict[str, Any], note: Callable[[Sequence[Any]], None]
) -> Callable[..., Any]:
    """Drop inputs that only packing read, compile the rest, hand it the packed weights at every call and mark what grows."""
    gm, growing = done.gm, done.growing
    placeholders = gm.graph.find_nodes(op="placeholder")
    keep = [i for i, n in enumerate(placeholders[: len(example_inputs)]) if n.users or devices.SYMBOL in n.meta]
    # What the compiled graph keeps must not keep the weights alive.
    for n in placeholders:
        n.meta.pop("gdnfuse_real")
    # Of packed weights the fake tensors: of real ones, which are not Dynamo's, AOTAutograd would take the sizes for symbolic.
    more = [(n, where) for n, where in zip(placeholders[len(example_inputs) :], done.packed, strict=True) if n.users]
    inputs = [example_inputs[i] for i in keep] + [value(n) for n, _ in more]
    for i, n in enumerate(placeholders):
        if not n.users and i not in keep:
            gm.graph.erase_node(n)
    gm.graph.lint()
    gm.recompile()
    inner, weights = _inner(gm, inputs, done.options, patches), PackedWeights([where for _, where in more])
    checkpoints, kept = done.checkpoints, taking(keep)

    def compiled(*args: Any) -> Any:
        kernels.wait()
        results = inner(*kept(args), *weights.current(args))
        if checkpoints:
            if RUNS.checkpoints is not None:
                RUNS.checkpoints.append(list(results[-checkpoints:]))
            results = results[:-checkpoints]
        mark(results, growing)
        note(args)
        return results

    return compiled


def _inner(gm: GraphModule, inputs: Sequence[Any], opts: Options, patches: dict[str, Any]) -> Callable[..., Any]:
    if any(isinstance(x, torch.Tensor) and x.is_meta for x in inputs):
        return gm.forward
    if opts.inner == "inductor":
        announce(gm)
        # Whether CUDA graphs take the same inputs for static behind a hit of AOTAutograd's cache has not been measured yet.
        if not any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs):
            patches = {**patches, **cache_keys.cacheable(gm, patches)}
    extra = {"config_patches": patches} if patches else {}
    with cache_keys.alike():
        return compat.lookup_backend(opts.inner)(gm, list(inputs), **extra)


def _inductor_patches(mode: str | None, opts: Options) -> dict[str, Any]:
    if opts.inner != "inductor":
        if mode not in (None, "default"):
            raise GdnfuseError(f"mode={mode!r} is Inductor's and needs inner='inductor', found inner={opts.inner!r}.")
        return {}
    patches: dict[str, Any] = {}
    if mode not in (None, "default"):
        modes = compat.modes()
        if mode not in modes:
            raise GdnfuseError(f"Unknown mode {mode!r}; the valid ones are {', '.join(modes)}.")
        patches.update(modes[mode])
    known = compat.inductor_options()
    for key, setting in opts.inductor.items():
        if known is not None and key not in known:
            raise GdnfuseError(f"Unknown Inductor option {key!r} in the option inductor; see torch._inductor.list_options().")
        patches[key] = setting
    return patches
