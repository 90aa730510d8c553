"""The compiler in one file: normalize → lift → fuse → lay_out → lower. The result of each stage is checked."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from gdnfuse import compat
from gdnfuse.dialect import chunk_delta_rule, op_of
from gdnfuse.options import Options
from gdnfuse.packing import Inner, PackedWeight
from gdnfuse.passes import (
    activations,
    bitsandbytes,
    checkpoints,
    collectives,
    constants,
    fuse,
    gathers,
    growing_keys,
    last_rows,
    lift,
    local_weights,
    lower,
    normalize,
    packed,
    quantized,
    step_inputs,
    subclasses,
    survey,
)
from gdnfuse.passes.fuse.verify_delta_rule import few_tokens
from gdnfuse.passes.lift import gating
from gdnfuse.progress import announce
from gdnfuse.report.records import GraphReport, LayerReport, Record, Status
from gdnfuse.rewrite.driver import Outcome, run_rules
from gdnfuse.rewrite.edit import recorded
from gdnfuse.rewrite.graph import calls, is_tensor, module_stack, op_name, same, value
from gdnfuse.rewrite.spec import Spec

log = logging.getLogger(__name__)


@dataclass
class Compilation:
    """One graph on its way through the stages, and what the stages hand on.

    Attributes:
        gm: a torch-level graph of Dynamo, rewritten in place.
        options: the stages read stop_after, fuel and target.
        report: the report, which the stages fill in.
        plan: only make the report: weights stay where they are and no kernel is compiled. `gm` cannot run then.
        real: the example input of every placeholder.
        outcome: what the rules did.
        growing: which results of a prompt are keys and values that get longer in the next step.
        checkpoints: how many results after the graph's own are states that a prompt keeps on its way.
        packed: what `gm` takes after all other inputs: tensors inside arguments, and packed weights.
    """

    gm: GraphModule
    options: Options
    report: GraphReport
    plan: bool = False
    real: dict[Node, Any] = field(default_factory=dict)
    outcome: Outcome = field(init=False)
    growing: list[int] = field(default_factory=list)
    checkpoints: int = 0
    packed: list[PackedWeight | Inner] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.outcome = Outcome(self.options.fuel)


def rewrite(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options, report: GraphReport, plan: bool = False
) -> Compilation:
    """Run the stages over `gm` in place and fill `report`. The arguments are those of Compilation.

    Raises:
        AssertionError: the result of a stage failed its check.
        GdnfuseError: attention would mix packed sequences.
    """
    start = time.perf_counter()
    announce("normalize")
    real = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    for node, tensor in real.items():
        node.meta["gdnfuse_real"] = tensor
    c = Compilation(gm, options, report, plan, real)
    c.packed, refused = subclasses.unwrap(gm, real)
    of_bitsandbytes, stay = bitsandbytes.to_linears(gm, real)
    c.packed, refused = c.packed + of_bitsandbytes, refused + stay
    c.packed += local_weights.to_inputs(gm, real)
    c.outcome.records += refused
    report.nodes_before = len(calls(gm))
    before = _survey(gm, mark=True)
    for stage, checks in _stages(c):
        for check in checks:
            check(gm)
        log.debug("after %s:\n%s", stage, gm.graph)
        if stage == options.stop_after:
            report.stage_code = str(gm.graph)
            break
    _finish(gm, report, c.outcome)
    if before is not None and (after := _survey(gm)) is not None:
        survey.fill(report, before, after)
        report.projections = survey.judge(gm, before.projections)
    report.pass_seconds = time.perf_counter() - start
    return c


def _stages(c: Compilation) -> Iterator[tuple[str, list[Callable[[GraphModule], None]]]]:
    """The name of each stage when it is done, and the functions that check its result."""
    gm, outcome, spec = c.gm, c.outcome, Spec(c.gm)
    normalize.normalize(gm)
    quantized.to_inputs(gm)
    _look(c)
    packed.require_separated(gm)
    collectives.join_sums(gm)
    gathers.join(gm)
    yield "normalize", [spec.check, normalize.check]
    if not c.report.layers and not outcome.records and c.report.phase != "draft":
        return
    if constants.make_numbers(gm):
        normalize.normalize(gm)
    run_rules(gm, lift.RULES, outcome)
    normalize.normalize(gm)
    yield "lift", [spec.check]
    run_rules(gm, fuse.RULES, outcome)
    last_rows.keep_last_rows(gm, outcome)
    normalize.normalize(gm)
    yield "fuse", [spec.check]
    with _costing_no_fusion("could not lay out the results of a prompt that grow; its first step may be compiled twice"):
        growing_keys.lay_out(gm, c.growing)
    if c.report.phase in STEPS:
        step_inputs.join(gm)
    yield "lay_out", [spec.check]
    announce("lower")
    # To compare a graph with the original one, both must return the same.
    if c.options.checkpoint_every and c.report.phase == "prefill" and not c.options.verify:
        c.checkpoints, made = checkpoints.hand_back(gm, c.options.checkpoint_every, len(c.report.layers))
        outcome.records += made
    c.packed += lower.pack_weights(gm, c.real, c.plan)
    if c.options.activations:
        outcome.records += activations.to_e4m3(gm, c.report.phase in STEPS, c.options.target)
    collectives.one_shot(gm, c.options.one_shot_bytes)
    outcome.records += lower.lower(gm, c.options.target, linears=c.report.phase in STEPS, ahead=not c.plan)
    if c.report.phase in STEPS:
        step_inputs.keep(gm)
    yield "lower", [lower.check]


@contextlib.contextmanager
def _costing_no_fusion(consequence: str) -> Iterator[None]:
    """Log an error inside the block and go on. The block must only be needed for the report or for a hint, not for a rewrite."""
    try:
        yield
    except Exception:
        log.exception("gdnfuse %s", consequence)


def _survey(gm: GraphModule, mark: bool = False) -> survey.Survey | None:
    """What the graph needs. None if that cannot be told."""
    with _costing_no_fusion("could not tell what a graph needs; its report lacks kernels, bytes and blocks"):
        if mark:
            survey.mark_blocks(gm)
        return survey.take(gm)
    return None


def _look(c: Compilation) -> None:
    """Find GDN layers and their phase, captured ops, and which results of a prompt grow.

    Growing results do not matter if the user has each length compiled separately.
    """
    _find_layers(c.gm, c.report)
    c.outcome.records += _captured(c.gm)
    if c.report.phase in ("prefill", "short") and compat.dynamo_setting("automatic_dynamic_shapes", True):
        with _costing_no_fusion("could not tell which results of a prompt grow; its first step may be compiled twice"):
            c.growing += growing_keys.growing_keys(c.gm.graph)


def _find_layers(gm: GraphModule, report: GraphReport) -> None:
    """Find GDN layers by the gates of gated delta rules. The module in which a gate was traced gives the path."""
    anchors = list(gating.RULE.anchors(gm.graph))
    found = {path: LayerReport(path) for path in dict.fromkeys(module_stack(anchor)[-1] for anchor in anchors)}
    for n in calls(gm):
        for path in set(module_stack(n)) & found.keys():
            found[path].nodes_before += 1
            found[path].launches_before += survey.launches(n)
    for caller, body in _bodies(gm):
        for path in (module_stack(anchor)[-1] for anchor in gating.RULE.anchors(body.graph)):
            note = f"A layer must be in the graph itself, found it in a function that is an argument of {caller}."
            found.setdefault(path, LayerReport(path, note=f"{note} {REMEDIES.get(caller, '')}".strip()))
    report.layers += found.values()
    if anchors:
        writes = [n for n in gm.graph.nodes if op_name(n) == "copy_" and is_tensor(n.args[0])]
        states = [w.args[0] for w in writes if w.args[0].op == "placeholder" and value(w.args[0]).ndim == 4]
        one = bool(states) and all(_one_token(value(a).shape, value(states[0]).shape[0]) for a in anchors)
        few = ("short" if states else "verify") if _few_tokens(gm) else "prefill"
        report.phase = "decode" if one else few


def _few_tokens(gm: GraphModule) -> bool:
    """Whether all captured rules process a few tokens after a given state."""
    found = [chunk_delta_rule.op.bind(n.args, n.kwargs) for n in calls(gm) if op_of(n.target) is chunk_delta_rule.op]
    return bool(found) and all(call["state"] is not None and few_tokens(value(call["v"])) for call in found)


def _bodies(gm: GraphModule) -> Iterator[tuple[str, GraphModule]]:
    """The graphs of functions that are arguments of ops, such as branches, with the name of the op, and those inside them."""
    for node in gm.graph.find_nodes(op="get_attr"):
        if isinstance(body := getattr(gm, node.target, None), GraphModule):
            yield op_name(next(iter(node.users), node)), body
            yield from _bodies(body)


def _one_token(shape: torch.Size, sequences: Any) -> bool:
    """Whether a gate [B, T, HV], or [B, HV] without an axis of tokens, has one token per sequence."""
    return same(shape[1], 1) if len(shape) > 2 else len(shape) == 2 and same(shape[0], sequences)


def _captured(gm: GraphModule) -> list[Record]:
    """One record for each dialect op that was in the original graph."""
    ops = [(n, op_of(n.target)) for n in gm.graph.nodes if n.op == "call_function"]
    return [recorded(op.name, "capture", n, op.equation) for n, op in ops if op is not None]


STEPS = ("decode", "verify", "short", "draft")  # phases with few rows: their time depends on the weights that are read

# What to do if a layer is inside a function that is an argument of an op.
REMEDIES = {"tag_activation_checkpoint": "Checkpointing saves memory in training; call model.eval()."}

# A prefill layer is fused when each of these is one op.
PREFILL = {
    "causal conv": {"causal_conv", "causal_conv_update", "causal_conv_record"},
    "chunk rule": {"chunk_delta_rule", "fused_gating_chunk_delta_rule", "delta_rule_verify", "fused_gating_delta_rule"},
    "gated norm": {"gated_rms_norm"},
}


def _finish(gm: GraphModule, report: GraphReport, outcome: Outcome) -> None:
    """Give every record to its layer, and count what remains of each layer."""
    paths = {layer.path: layer for layer in report.layers}
    for record in outcome.records:
        record.layer = next((p for p in reversed(record.modules) if p in paths), None)
        (paths[record.layer].records if record.layer else report.records).append(record)
    for n in calls(gm):
        for path in set(module_stack(n)) & paths.keys():
            paths[path].ops_after.append(survey.op_label(n))
            paths[path].launches_after += survey.launches(n)
    for layer in report.layers:
        layer.nodes_after = len(layer.ops_after)
        if layer.note:
            continue
        if report.phase == "decode":
            layer.fused = any(r.rule == "mixer_decode" and r.stage == "fuse" and r.status is Status.FIRED for r in layer.records)
        elif missing := [part for part, ops in PREFILL.items() if not ops & set(layer.ops_after)]:
            layer.note = f"A fused prefill has its conv, rule and norm as one op each, found no {' and no '.join(missing)}."
        else:
            layer.fused = True
    report.nodes_after = len(calls(gm)) if report.layers or outcome.records else report.nodes_before
    report.proofs, report.proof_seconds = outcome.proofs, outcome.proof_seconds


def original(gm: GraphModule) -> GraphModule:
    """A copy of a graph module that shares its parameters. The passes work on one of the two, and the other does not change."""
    graph, env = torch.fx.Graph(), {}
    output = graph.graph_copy(gm.graph, env)
    graph.output(output)
    copy = compat.graph_module(gm, graph)
    copy.meta = dict(gm.meta)
    compat.keep_sources(env, gm, copy)
    return copy
