"""Records of what the compiler did. Imports nothing of ours.

The data is the report; text.py and page.py beside this render it. Tests assert on the data.
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


class Status(enum.StrEnum):
    """What came of a rule at one anchor.

    Attributes:
        FIRED: it matched, was proved and rewrote the graph.
        REFUSED: its motif is there, but may not be rewritten.
        UNMATCHED: what its anchor promised is not there.
        SHADOWED: another rule has taken the same nodes.
    """

    FIRED = "fired"
    REFUSED = "refused"
    UNMATCHED = "unmatched"
    SHADOWED = "shadowed"


@dataclass(frozen=True)
class Source:
    """A line of the model's code: the file as Python names it, the line's number, the function around it, and its text."""

    file: str
    line: int
    function: str
    code: str

    @property
    def place(self) -> str:
        """File and line, the file without the folder that it was imported from."""
        roots = [p for p in sys.path if p and self.file.startswith(p.rstrip("/") + "/")]
        name = self.file[len(max(roots, key=len).rstrip("/")) + 1 :] if roots else self.file.rsplit("/", 1)[-1]
        return f"{name}:{self.line}"


@dataclass
class Record:
    """What one rule did at one anchor.

    Attributes:
        rule: the rule's name.
        stage: "capture", "lift", "fuse" or "lower".
        status: see Status.
        anchor: name of the graph node the rule started from.
        equation: the motif that the rule looks for, or what an operation computes.
        layer: path of the GDN layer the anchor belongs to, or None.
        block: path of the block the anchor belongs to, as of a BlockReport; empty outside all layers.
        source: the line of the model's code that `at`, or else the anchor, was traced from; None where it is not known.
        modules: paths of the modules the anchor was traced in, outermost first.
        reason: a sentence for everything but FIRED; for a lowering, why the other implementations were passed over.
        at: the deepest node reached, for UNMATCHED and REFUSED.
        expected, got: what the pattern wanted there and what it saw, for UNMATCHED.
        proof_error: worst relative error of the float64 proof, for FIRED (and for REFUSED by a failed proof).
        proof_cached: the proof was made for another region of equal structure.
        chosen: the implementation, for a lowering.
        launches: one line per Triton kernel that a lowered op launches, with how it shares out the work; empty where that is
            known at run time only.
        measured: the benchmark that compares these configs, or empty.
        failed: the rule, or the choice of an implementation, raised an error, which is a bug of ours; `reason` has it, and the
            graph stays there as it was.
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
    """One output, or one input that is written, of the rewritten graph and of the graph as it came.

    Attributes:
        name: "output 3", or the input's name in the graph.
        error, eager_error: relative, in norm, of ours and of the graph as it came, against a run in higher precision.
        passed: whether ours is near enough.
    """

    name: str
    error: float
    eager_error: float
    passed: bool


@dataclass
class Refusal:
    """What one rule declined for one reason, wherever it did.

    Attributes:
        rule, stage, equation: the rule, when it runs, and the motif that it looks for.
        status: REFUSED (the motif is there, but may not be rewritten) or UNMATCHED (what the anchor promised is not there).
        sentence: what was required and what was found, at the first place.
        at: there, the node it is about: for UNMATCHED the deepest one that was reached.
        expected, got: of a Record.
        source: of a Record.
        count: how many times; blocks: in which.
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
        path: the module path, e.g. "model.layers.0.linear_attn".
        fused: of a decode layer, that it is one packed linear, the fused op and the out_proj linear; of a prefill layer, that its
            conv, its rule and its norm are one op each.
        note: for an unfused layer, a sentence on what a fused one has and this one lacks, or empty.
        records: every rule's records for this layer, in the order they were made.
        nodes_before, nodes_after: call nodes that belong to the layer before normalize and after lower.
        launches_before, launches_after: kernels the layer needs: one per op that computes, or those that its kernel launches.
            Inductor may merge some of what is not ours, on both sides. What a fused layer has in the linears of the decoder
            layer around it is not among them.
        ops_after: names of those that stay, in graph order.
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
        """The sentences that explain an unfused layer; empty for a fused one."""
        if self.fused:
            return ""
        sentences = [f"{r.rule}: {r.reason}" for r in self.records if r.status is not Status.FIRED and r.reason]
        sentences += [self.note] if self.note else []
        return " ".join(dict.fromkeys(sentences)) or "No rule found its motif in this layer."


@dataclass(frozen=True)
class Operation:
    """One call of a graph.

    Attributes:
        name: the node's name, in the first of the blocks that share this structure.
        op: what it computes.
        inputs: for each tensor it takes, which operation of the same block makes it, counted from 0, or in words where it comes
            from: a weight or state with its dtype and shape, or "input 1" for what another block made.
        result: dtype and shape, of each result if there are several.
        kernels: Triton kernels it launches, 1 for another operation that computes, 0 for a view.
        bytes: it moves, as of a BlockReport.
        source: the line of the model's code that it was traced from, or None.
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
    """Linears of one kind: of one name, with weights of one format and shape, computed alike.

    Attributes:
        name: the module's, e.g. "in_proj_qkv".
        format: of its weight: a dtype, the name of a format of quantised weights, or the class of a weight, or of a module, that
            nothing here reads.
        rows, columns: of its weight; 0 where that is not known.
        bytes: that one such weight takes as it is stored.
        computed: "triton" for a kernel of ours, "library" for torch's linear, "reference inlined", or "its own library".
        reason: a sentence where that is its own library.
        paths: of the modules.
    """

    name: str
    format: str
    rows: int
    columns: int
    bytes: int
    computed: str
    reason: str = ""
    paths: list[str] = field(default_factory=list)


OWN_LIBRARY = "its own library"  # computes what a projection of a format that is not read does
OUTSIDE = "outside the layers"


@dataclass
class BlockReport:
    """A part of a decoder layer that has linears of its own, with the norm before it and the sum behind it; or all else.

    Attributes:
        path: its module's path, e.g. "model.layers.0.mlp"; empty for what is in no layer.
        layer: path of the layer around it, e.g. "model.layers.0"; empty if there is none.
        index: the layer's number in its list, or None.
        kind: "linear attention", "full attention", "MLP", "MoE", "other" or "outside the layers".
        fused: "fused" where a rule fired and none declined, "partly", or "as it came".
        marks: for each group of rules of COLUMNS, of which one looked at this block: "fired", "declined", or "both".
        launches_before, launches_after: kernels it needs: one per op that computes, or those that its kernel launches.
        bytes_before, bytes_after: read and written by them, where each reads its tensors once and writes its results once.
        before, after: its operations before normalize and after lower, as indices into the graph's structures.
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


# The columns of the table of blocks, and the rules whose outcomes they show. A rule that is in none has a column of its own.
COLUMNS = {
    "quantised": ("dequantize",),
    "packed": ("packed_linear",),
    "adapters": ("lora_linear",),
    "conv": ("causal_conv", "causal_conv_update", "conv_context"),
    "gates": ("gating", "gating_delta_rule", "gating_chunk_delta_rule"),
    "l2norm": ("l2norm", "l2norm_delta_rule"),
    "rule": ("delta_rule", "chunk_delta_rule", "repeat_delta_rule", "packed_decode", "verify_delta_rule", "short_delta_rule"),
    "gated norm": ("gated_rms_norm",),
    "mixer": ("mixer_decode", "mixer_linears"),
    "attention": ("attention_decode", "attention_growing", "attention_few_queries", "causal_attention"),
    "router": ("route", "route_experts"),
    "experts": ("experts", "shared_expert"),
    "norm": ("rms_norm", "norm_linear", "norm_experts", "add_rms_norm"),
    "SwiGLU": ("swiglu_linear",),
    "residual": ("residual_linear", "residual_experts"),
}
_COLUMN = {rule: column for column, rules in COLUMNS.items() for rule in rules}


def marks(records: Iterable[Record]) -> dict[str, str]:
    """What came of each group of rules of COLUMNS: "fired", "declined", or "both"; groups that looked at nothing are left out."""
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
        phase: "decode" (cached states are read and one token is processed), "verify" (a few tokens, and states stay as they are),
            "short" (a few tokens behind others, into the states), "prefill", "draft" (of what drafts for a model) or "other" (no
            GDN layer).
        layers: the GDN layers.
        blocks: the parts of all layers, and what is in none, in the order of the graph.
        structures: lists of operations; blocks that are equal share one.
        projections: the model's linears by kind, whether or not they are in a layer.
        records: records that belong to no GDN layer (siblings of the MLP, say).
        rewritten: False when the graph was handed on as it came; then `note` says why.
        note: a sentence, or empty.
        inner: the backend that compiled the rest.
        device: where the graph runs, if it is one of those that a graph over several devices was cut into; empty otherwise.
        nodes_before, nodes_after: call nodes of the whole graph.
        launches_before, launches_after: as of a layer, for the whole graph.
        bytes_before, bytes_after: as of a block, for the whole graph.
        limit_bytes: of the weights, states and caches that the graph needs, each read once, and written once where it is written.
        proofs: how many were run, without those taken from the cache.
        proof_seconds: of all of them.
        pass_seconds: time of every pass together, proofs included.
        comparisons: with the option verify, how near the rewritten graph is to the graph as it came.
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
        """The records of all layers, then those that belong to none."""
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
        """What was refused or not matched; what differs in nothing but the numbers in its names is one refusal."""
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
            The fields by name, as docs/report.md lists them; a Status is its string.
        """
        data = dataclasses.asdict(self)
        data |= {"summary": self.summary(), "fused_layers": self.fused_layers}
        data["refusals"] = [dataclasses.asdict(r) for r in self.refusals]
        for layer, plain in zip(self.layers, data["layers"], strict=True):
            plain["why_not"] = layer.why_not
        return data

    def rows(self) -> list[dict[str, Any]]:
        """One row per rule and outcome, for tables; with the reason for a lowering, because refusals have theirs elsewhere."""
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
BANDWIDTH = 4.3e12  # bytes a second: the copy rate measured on an H200


def limit_seconds(report: GraphReport, bandwidth: float) -> float | None:
    """Estimate of the least a decode step takes: weights, states and caches once through memory. None for what computes more."""
    return report.limit_bytes / bandwidth if report.phase == "decode" else None


def between_ranks(report: GraphReport) -> dict[str, tuple[int, int]]:
    """The collectives of a graph: for each kind how many there are, and the bytes of their results."""
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
        reports: of graphs.
        about: what was compiled and with what; plain data.
        bandwidth: bytes a second, for the limit.
    """
    graphs = [report.to_dict() | {"limit_seconds": limit_seconds(report, bandwidth)} for report in reports]
    return {"schema": SCHEMA, "about": about, "bandwidth": bandwidth, "graphs": graphs}


_lock = threading.Lock()
_reports: list[GraphReport] = []
_next_id = 0


def new_report() -> GraphReport:
    """A report with the next graph id; not listed until `publish`."""
    global _next_id
    with _lock:
        report = GraphReport(_next_id)
        _next_id += 1
        return report


def publish(report: GraphReport) -> None:
    with _lock:
        _reports.append(report)


def reports() -> list[GraphReport]:
    """Reports of the graphs that were compiled in this process.

    Returns:
        A list of them, oldest first. `clear_reports` empties it.
    """
    with _lock:
        return list(_reports)


def clear_reports() -> None:
    """Forget all reports."""
    with _lock:
        _reports.clear()
