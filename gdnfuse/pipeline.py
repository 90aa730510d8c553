"""The compiler on one screen: normalize → lift → fuse → lower, each with a spec checked on the way out."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch.fx import GraphModule, Node

from gdnfuse import compat
from gdnfuse.dialect import op_of
from gdnfuse.options import Options
from gdnfuse.packing import PackedWeight
from gdnfuse.passes import fuse, last_rows, lift, lower, normalize, survey
from gdnfuse.passes.lift import gating
from gdnfuse.progress import announce
from gdnfuse.report.records import GraphReport, LayerReport, Record, Status
from gdnfuse.rewrite.driver import Outcome, run_rules
from gdnfuse.rewrite.edit import recorded
from gdnfuse.rewrite.graph import calls, is_tensor, module_stack, op_name, same, value

log = logging.getLogger(__name__)


def rewrite(
    gm: GraphModule, real: dict[Node, Any], options: Options, report: GraphReport, plan: bool = False
) -> list[PackedWeight]:
    """Run the passes over `gm` in place and fill `report`.

    Args:
        gm: a torch-level graph of Dynamo's.
        real: the example input of every placeholder.
        options: stop_after and target are read here.
        report: filled in.
        plan: leave the model's weights where they are and compile no kernel: for the report alone, as `gm` cannot run then.

    Returns:
        The packed weights, inputs that stand behind all others in `gm`.
    """
    start = time.perf_counter()
    announce("normalize")
    for node, tensor in real.items():
        node.meta["gdnfuse_real"] = tensor
    outcome, packed = Outcome(options.fuel), []
    report.nodes_before = len(calls(gm))
    before = _survey(gm, mark=True)
    for stage in _stages(gm, real, options, report, outcome, packed, plan):
        log.debug("after %s:\n%s", stage, gm.graph)
        if stage == options.stop_after:
            report.stage_code = str(gm.graph)
            break
    _finish(gm, report, outcome)
    if before is not None and (after := _survey(gm)) is not None:
        survey.fill(report, before, after)
    report.pass_seconds = time.perf_counter() - start
    return packed


def _survey(gm: GraphModule, mark: bool = False) -> survey.Survey | None:
    """What the graph needs; None where it cannot be told, because a report must cost no fusion."""
    try:
        if mark:
            survey.mark_blocks(gm)
        return survey.take(gm)
    except Exception:
        log.exception("gdnfuse could not tell what a graph needs; its report lacks kernels, bytes and blocks")
        return None


def _stages(gm, real, options, report, outcome, packed, plan):
    normalize.normalize(gm)
    normalize.check(gm)
    _find_layers(gm, report)
    outcome.records += _captured(gm)
    yield "normalize"
    if not report.layers and not outcome.records:
        return
    run_rules(gm, lift.RULES, outcome)
    normalize.normalize(gm)
    yield "lift"
    run_rules(gm, fuse.RULES, outcome)
    last_rows.keep_last_rows(gm, outcome)
    normalize.normalize(gm)
    yield "fuse"
    announce("lower")
    packed += lower.pack_weights(gm, real, plan)
    outcome.records += lower.lower(gm, options.target, linears=report.phase == "decode", ahead=not plan)
    lower.check(gm)
    yield "lower"


def _find_layers(gm: GraphModule, report: GraphReport) -> None:
    """Every gate of a gated delta rule is a GDN layer; the module it was traced in gives its path."""
    anchors = list(gating.RULE.anchors(gm.graph))
    found = {path: LayerReport(path) for path in dict.fromkeys(module_stack(anchor)[-1] for anchor in anchors)}
    for n in calls(gm):
        for path in set(module_stack(n)) & found.keys():
            found[path].nodes_before += 1
            found[path].launches_before += survey.launches(n)
    report.layers += found.values()
    if anchors:
        writes = [n for n in gm.graph.nodes if op_name(n) == "copy_" and is_tensor(n.args[0])]
        states = [w.args[0] for w in writes if w.args[0].op == "placeholder" and value(w.args[0]).ndim == 4]
        one = bool(states) and all(_one_token(value(a).shape, value(states[0]).shape[0]) for a in anchors)
        report.phase = "decode" if one else "prefill"


def _one_token(shape: torch.Size, sequences: Any) -> bool:
    """Whether a gate [B, T, HV], or [B, HV] where there is no axis of tokens, is of one token for each sequence."""
    return same(shape[1], 1) if len(shape) > 2 else len(shape) == 2 and same(shape[0], sequences)


def _captured(gm: GraphModule) -> list[Record]:
    """One record for each dialect op that the graph came with."""
    ops = [(n, op_of(n.target)) for n in gm.graph.nodes if n.op == "call_function"]
    return [recorded(op.name, "capture", n, op.equation) for n, op in ops if op is not None]


# A prefill layer is fused when each of these is one op.
PREFILL = {
    "causal conv": {"causal_conv", "causal_conv_update"},
    "chunk rule": {"chunk_delta_rule", "fused_gating_chunk_delta_rule"},
    "gated norm": {"gated_rms_norm"},
}


def _finish(gm: GraphModule, report: GraphReport, outcome: Outcome) -> None:
    """Hand every record to its layer and count what is left of each."""
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
        if report.phase == "decode":
            layer.fused = any(r.rule == "mixer_decode" and r.stage == "fuse" and r.status is Status.FIRED for r in layer.records)
        elif missing := [part for part, ops in PREFILL.items() if not ops & set(layer.ops_after)]:
            layer.note = f"A fused prefill has its conv, rule and norm as one op each, found no {' and no '.join(missing)}."
        else:
            layer.fused = True
    report.nodes_after = len(calls(gm)) if report.layers or outcome.records else report.nodes_before
    report.proofs, report.proof_seconds = outcome.proofs, outcome.proof_seconds


def original(gm: GraphModule) -> GraphModule:
    """A copy of a graph module that shares its parameters: the passes work on one, the other stays as it came."""
    graph, env = torch.fx.Graph(), {}
    output = graph.graph_copy(gm.graph, env)
    graph.output(output)
    copy = compat.graph_module(gm, graph)
    copy.meta = dict(gm.meta)
    compat.keep_sources(env, gm, copy)
    return copy
