"""Records of what the compiler did. This module imports nothing of gdnfuse.

These data are the report. text.py and page.py render them, and tests check them.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

STAGES = ("capture", "lift", "fuse", "lower")  # of records
NOT_MEASURED, TUNE = "not measured on this card", "run gdnfuse tune MODEL"


class Status(enum.StrEnum):
    """The outcome of a rule at one anchor.

    Attributes:
        FIRED: the pattern matched, was proved, and the graph was rewritten.
        REFUSED: the pattern matched, but may not be rewritten.
        UNMATCHED: the anchor is there, but not the rest of the pattern.
        SHADOWED: another rule has already taken the same nodes.
    """

    FIRED = "fired"
    REFUSED = "refused"
    UNMATCHED = "unmatched"
    SHADOWED = "shadowed"


@dataclass(frozen=True)
class Source:
    """A line of the model's code: the file as Python names it, the line number, the function around it, and the text."""

    file: str
    line: int
    function: str
    code: str

    @property
    def place(self) -> str:
        """File and line. The file is without the folder that it was imported from."""
        roots = [p for p in sys.path if p and self.file.startswith(p.rstrip("/") + "/")]
        name = self.file[len(max(roots, key=len).rstrip("/")) + 1 :] if roots else self.file.rsplit("/", 1)[-1]
        return f"{name}:{self.line}"


@dataclass
class Record:
    """What one rule did at one anchor.

    Attributes:
        rule: name of the rule.
        stage: "capture", "lift", "fuse" or "lower".
        status: see Status.
        anchor: name of the graph node that the rule started from.
        equation: what the rule looks for, or what the operation computes.
        layer: path of the GDN layer that the anchor belongs to, or None.
        block: path of the block that the anchor belongs to, as in a BlockReport; empty outside all layers.
        source: the line of the model's code from which `at`, or else the anchor, was traced; None if it is not known.
        modules: paths of the modules in which the anchor was traced, outermost first.
        reason: a sentence, unless the rule fired. For a lowering: why other implementations were not chosen.
        at: for UNMATCHED and REFUSED, the deepest node that was reached.
        expected, got: for UNMATCHED, what the pattern expected there and what it found.
        proof_error: worst relative error of the float64 proof, if the rule fired or the proof failed.
        proof_cached: whether the proof was made for another region of equal structure.
        chosen: for a lowering, the implementation.
        launches: one line per Triton kernel that a lowered op launches, with how it divides the work. Empty if that is known only
            at run time.
        measured: where these configurations were compared: by a benchmark on an H200, by gdnfuse tune on this card, or not on
            this card. Empty if they were not compared anywhere.
        failed: whether the rule, or the choice of an implementation, raised an error, which is a bug in gdnfuse. `reason` has the
            error, and the graph is unchanged there.
    """

    rule: str
    stage: str
    status: Status
    anchor: str
    equation: str = ""
    layer: str | None = None
    block: str = ""
    source: Source | None = None
    modules: list[str] = field(default_factory=list)
    reason: str = ""
    at: str | None = None
    expected: str | None = None
    got: str | None = None
    proof_error: float | None = None
    proof_cached: bool = False
    chosen: str | None = None
    launches: list[str] = field(default_factory=list)
    measured: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Comparison:
    """The errors of one output, or of one input that is written.

    Attributes:
        name: "output 3", or the name of the input in the graph.
        error, eager_error: relative errors, by norm, of the rewritten and of the original graph, against a run in higher
            precision.
        passed: whether the rewritten graph is accurate enough.
    """

    name: str
    error: float
    eager_error: float
    passed: bool


@dataclass
class Refusal:
    """One reason why one rule did not fire, with all places where it did not.

    Attributes:
        rule, stage, equation: the rule, its stage, and what it looks for.
        status: REFUSED (the pattern matched, but may not be rewritten) or UNMATCHED (the rest of the pattern is not there).
        sentence: what was required and what was found, at the first place.
        at: the node at that place that it is about. For UNMATCHED, the deepest one that was reached.
        expected, got: as in a Record.
        source: as in a Record.
        count: how often.
        blocks: paths of the blocks.
    """

    rule: str
    stage: str
    status: Status
    equation: str
    sentence: str
    at: str
    expected: str | None = None
    got: str | None = None
    source: Source | None = None
    count: int = 0
    blocks: list[str] = field(default_factory=list)


@dataclass
class LayerReport:
    """One GDN layer of one graph.

    Attributes:
        path: path of the module, e.g. "model.layers.0.linear_attn".
        fused: for a decode layer, whether it is one packed linear, the fused op and the out_proj linear. For a prefill layer,
            whether its conv, its rule and its norm are one op each.
        note: for an unfused layer, a sentence on what it lacks, or empty.
        records: the records of all rules for this layer, in the order in which they were made.
        nodes_before, nodes_after: call nodes of the layer before normalize and after lower.
        launches_before, launches_after: kernels that the layer needs: one per op that computes, or those that a kernel of ours
            launches. Inductor may merge some of the others, on both sides. What was fused into linears of the decoder layer
            around it is not counted.
        ops_after: names of the operations that remain, in the order of the graph.
    """

    path: str
    fused: bool = False
    note: str = ""
    records: list[Record] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    launches_before: int = 0
    launches_after: int = 0
    ops_after: list[str] = field(default_factory=list)

    @property
    def why_not(self) -> str:
        """The sentences that explain why a layer is not fused. Empty for a fused one."""
        if self.fused:
            return ""
        sentences = [f"{r.rule}: {r.reason}" for r in self.records if r.status is not Status.FIRED and r.reason]
        sentences += [self.note] if self.note else []
        return " ".join(dict.fromkeys(sentences)) or "No rule found its motif in this layer."


@dataclass(frozen=True)
class Operation:
    """One call in a graph.

    Attributes:
        name: name of the node, in the first of the blocks that share this structure.
        op: what it computes.
        inputs: for each tensor that it takes, the index of the operation of the same block that makes it, or words: a weight or
            state with its dtype and shape, or "input 1" from another block.
        result: dtype and shape of each result.
        kernels: Triton kernels that it launches, 1 for another operation that computes, 0 for a view.
        bytes: bytes that it moves, as in a BlockReport.
        source: the line of the model's code from which it was traced, or None.
    """

    name: str
    op: str
    inputs: list[int | str]
    result: str
    kernels: int
    bytes: int
    source: Source | None = None


@dataclass
class Projection:
    """Equal linears: they have the same name, and weights of the same format and shape, and are computed in the same way.

    Attributes:
        name: name of the module, e.g. "in_proj_qkv".
        format: format of the weight: a dtype, the name of a format of quantised weights, or the class of a weight or module that
            gdnfuse does not read.
        rows, columns: of the weight; 0 if not known.
        bytes: bytes of one such weight as it is stored.
        computed: "triton" for a kernel of ours, "library" for torch's linear, "reference inlined", or "its own library".
        reason: why it is left to its own library, in a sentence.
        paths: paths of the modules.
    """

    name: str
    format: str
    rows: int
    columns: int
    bytes: int
    computed: str
    reason: str = ""
    paths: list[str] = field(default_factory=list)


OWN_LIBRARY = "its own library"  # what computes a linear of a format that gdnfuse does not read
OUTSIDE = "outside the layers"


@dataclass
class BlockReport:
    """A part of a decoder layer with its own linears, with the norm before it and the sum after it. Or what is in no layer.

    Attributes:
        path: path of its module, e.g. "model.layers.0.mlp"; empty outside the layers.
        layer: path of the layer around it, e.g. "model.layers.0"; empty if there is none.
        index: number of the layer in its list, or None.
        kind: "linear attention", "full attention", "MLP", "MoE", "other" or "outside the layers".
        fused: "fused" if a rule fired and none declined, "partly" if some declined, "unchanged" if none fired.
        marks: for each group of rules in COLUMNS that looked at this block: "fired", "declined", or "both".
        launches_before, launches_after: kernels that it needs: one per op that computes, or those that a kernel of ours launches.
        bytes_before, bytes_after: bytes that these kernels move, if each reads its tensors once and writes its results once.
        before, after: its operations before normalize and after lower, as indices into the structures of the graph.
    """

    path: str
    layer: str = ""
    index: int | None = None
    kind: str = OUTSIDE
    fused: str = "unchanged"
    marks: dict[str, str] = field(default_factory=dict)
    launches_before: int = 0
    launches_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    before: int = 0
    after: int = 0


# The columns of the table of blocks, and the rules that they show. Any other rule has its own column.
COLUMNS = {
    "quantised": ("dequantize",),
    "packed": ("packed_linear",),
    "adapters": ("lora_linear",),
    "conv": ("causal_conv", "causal_conv_update", "conv_context", "record", "record_conv"),
    "gates": ("gating", "gating_delta_rule", "gating_chunk_delta_rule"),
    "l2norm": ("l2norm", "l2norm_delta_rule"),
    "rule": ("delta_rule", "chunk_delta_rule", "repeat_delta_rule", "packed_decode", "verify_delta_rule", "short_delta_rule"),
    "gated norm": ("gated_rms_norm",),
    "mixer": ("mixer_decode", "mixer_linears"),
    "attention": ("attention_decode", "attention_growing", "attention_few_queries", "causal_attention", "prompt_attention"),
    "router": ("route", "route_experts"),
    "experts": ("experts", "shared_expert"),
    "norm": ("rms_norm", "norm_linear", "norm_experts", "add_rms_norm"),
    "SwiGLU": ("swiglu_linear",),
    "residual": ("residual_linear", "residual_experts"),
}
_COLUMN = {rule: column for column, rules in COLUMNS.items() for rule in rules}


def marks(records: Iterable[Record]) -> dict[str, str]:
    """The outcome of each group of rules in COLUMNS: "fired", "declined", or "both". Groups that found no anchor are left out."""
    found: dict[str, set[str]] = {}
    for r in records:
        if r.stage != "lower" and r.status is not Status.SHADOWED:
            outcome = "fired" if r.status is Status.FIRED else "declined"
            found.setdefault(_COLUMN.get(r.rule, r.rule), set()).add(outcome)
    order = [*COLUMNS, *found]
    return {c: "both" if len(found[c]) > 1 else found[c].pop() for c in sorted(found, key=order.index)}


@dataclass
class GraphReport:
    """One compiled graph.

    Attributes:
        graph_id: counts the graphs of this process from 0.
        phase: "decode" (one token, with cached states), "verify" (a few tokens, states are not written), "short" (a few tokens on
            a filled cache, states are written), "prefill", "draft" (drafts tokens for a model) or "other" (no GDN layer).
        layers: the GDN layers.
        blocks: the parts of all layers, and what is outside them, in the order of the graph.
        structures: lists of operations. Equal blocks share one.
        projections: the linears of the model, in a layer or not.
        records: records that belong to no GDN layer, such as those of an MLP.
        rewritten: False if the graph was handed on unchanged; `note` then says why.
        note: a sentence, or empty.
        graph_break: sentences on the one that ended the graph before its function was done, or empty: nothing is fused across it.
        inner: the backend that compiled the rest.
        device: where the graph runs, if it is one of those that a graph over several devices was cut into; empty otherwise.
        nodes_before, nodes_after: call nodes of the whole graph.
        launches_before, launches_after: as for a layer, for the whole graph.
        bytes_before, bytes_after: as for a block, for the whole graph.
        limit_bytes: bytes of the weights, states and caches that the graph needs, each read once, and written once if it is
            written.
        proofs: how many proofs were run, without those from the cache.
        proof_seconds: time of all proofs.
        pass_seconds: time of all passes, proofs included.
        comparisons: with the option verify, the errors of both graphs.
        stage_code: the graph after the stage that `stop_after` named, as text.
    """

    graph_id: int
    phase: str = "other"
    layers: list[LayerReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    structures: list[list[Operation]] = field(default_factory=list)
    projections: list[Projection] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    rewritten: bool = True
    note: str = ""
    graph_break: str = ""
    inner: str = ""
    device: str = ""
    nodes_before: int = 0
    nodes_after: int = 0
    launches_before: int = 0
    launches_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    limit_bytes: int = 0
    proofs: int = 0
    proof_seconds: float = 0.0
    pass_seconds: float = 0.0
    comparisons: list[Comparison] = field(default_factory=list)
    stage_code: str = ""

    @property
    def fused_layers(self) -> int:
        """How many of the GDN layers are fused."""
        return sum(layer.fused for layer in self.layers)

    @property
    def all_records(self) -> list[Record]:
        """The records of all layers, then those that belong to no layer."""
        return [r for layer in self.layers for r in layer.records] + self.records

    def summary(self) -> str:
        """The line that is logged for each compiled graph.

        Returns:
            Phase, fused layers, nodes and kernels before and after, proofs and their time.
        """
        name = f"graph {self.graph_id} ({self.phase}{f', {self.device}' if self.device else ''})"
        if not self.rewritten:
            return f"{name}: not rewritten. {self.note}"
        if not self.layers and not any(r.status is Status.FIRED for r in self.records):
            return f"{name}: no GDN layer found; compiled by {self.inner} unchanged."
        fused = f"{self.fused_layers}/{len(self.layers)} GDN layers fused" if self.layers else "no GDN layer found"
        line = (
            f"{name}: {fused}, "
            f"{self.nodes_before} → {self.nodes_after} nodes, {self.launches_before} → {self.launches_after} kernels, "
            f"{self.proofs} proofs in {self.proof_seconds:.2f} s"
        )
        total = sum(len(p.paths) for p in self.projections)
        if own := sum(len(p.paths) for p in self.projections if p.computed == OWN_LIBRARY):
            line += f", {own} of {total} linears left to their own library"
        return f"{line}. {self.note}" if self.note else f"{line}."

    @property
    def refusals(self) -> list[Refusal]:
        """What was refused or not matched. Cases that differ only in the numbers in names are one refusal."""
        found: dict[tuple[Any, ...], Refusal] = {}
        for r in self.all_records:
            if r.status in (Status.REFUSED, Status.UNMATCHED):
                key = (r.rule, r.stage, r.status, re.sub(r"_\d+\b", "", r.reason), r.source)
                at = r.at or r.anchor
                new = Refusal(r.rule, r.stage, r.status, r.equation, r.reason, at, r.expected, r.got, r.source)
                refusal = found.setdefault(key, new)
                refusal.count += 1
                if r.block not in refusal.blocks:
                    refusal.blocks.append(r.block)
        return list(found.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON.

        Returns:
            The fields by name, as docs/report.md lists them. A Status is its string.
        """
        data = dataclasses.asdict(self)
        data |= {"summary": self.summary(), "fused_layers": self.fused_layers}
        data["refusals"] = [dataclasses.asdict(r) for r in self.refusals]
        for layer, plain in zip(self.layers, data["layers"], strict=True):
            plain["why_not"] = layer.why_not
        return data

    def rows(self) -> list[dict[str, Any]]:
        """One row per rule and outcome, for tables. Only lowerings have a reason here: refusals are shown elsewhere."""
        counts: Counter[tuple[str, ...]] = Counter()
        worst: dict[tuple[str, ...], float] = {}
        for r in self.all_records:
            key = (r.stage, r.rule, str(r.status), r.chosen or "", r.reason if r.stage == "lower" else "")
            counts[key] += 1
            if r.proof_error is not None:
                worst[key] = max(worst.get(key, 0.0), r.proof_error)
        return [
            {"stage": k[0], "rule": k[1], "status": k[2], "count": n, "proof error": worst.get(k), "chosen": k[3], "reason": k[4]}
            for k, n in sorted(counts.items(), key=lambda item: STAGES.index(item[0][0]))
        ]


SCHEMA = "gdnfuse.report/2"
BANDWIDTH = 4.3e12  # bytes per second: the rate of a copy, measured on an H200


def limit_seconds(report: GraphReport, bandwidth: float) -> float | None:
    """An estimate of the shortest time of a decode step: weights, states and caches move once. None for other graphs."""
    return report.limit_bytes / bandwidth if report.phase == "decode" else None


def between_ranks(report: GraphReport) -> dict[str, tuple[int, int]]:
    """The collectives of a graph: for each kind, how many there are and the bytes of their results."""
    found: dict[str, tuple[int, int]] = {}
    for block in report.blocks:
        for o in report.structures[block.after]:
            kind = o.op.removeprefix("_c10d_functional.")
            if kind.startswith("one_shot_") or kind != o.op and kind != "wait_tensor":
                count, moved = found.get(kind, (0, 0))
                # What is read and written has that size, but for the weight of a norm, which is one row.
                tensors = {"one_shot_all_reduce": len(o.inputs) + 1, "one_shot_add_rms_norm": 4}.get(kind, 2)
                found[kind] = count + 1, moved + o.bytes // tensors
    return found


def document(reports: Iterable[GraphReport], about: dict[str, Any], bandwidth: float = BANDWIDTH) -> dict[str, Any]:
    """Reports as one JSON document, described in docs/report.md.

    Args:
        reports: reports of graphs.
        about: what was compiled and with what, as plain data.
        bandwidth: bytes per second, for the limit.
    """
    graphs = [report.to_dict() | {"limit_seconds": limit_seconds(report, bandwidth)} for report in reports]
    return {"schema": SCHEMA, "about": about, "bandwidth": bandwidth, "graphs": graphs}


_lock = threading.Lock()
_reports: list[GraphReport] = []
_next_id = 0


def new_report() -> GraphReport:
    """A report with the next graph id. It is not listed until `publish`."""
    global _next_id
    with _lock:
        report = GraphReport(_next_id)
        _next_id += 1
        return report


def publish(report: GraphReport) -> None:
    with _lock:
        _reports.append(report)


def reports() -> list[GraphReport]:
    """The reports of the graphs that were compiled in this process.

    Returns:
        A list, oldest first. `clear_reports` empties it.
    """
    with _lock:
        return list(_reports)


def clear_reports() -> None:
    """Forget all reports."""
    with _lock:
        _reports.clear()
