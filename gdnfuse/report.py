"""Records of what the compiler did, and their renderings. Imports nothing of ours.

The data is the report; text and JSON are renderings of it. Tests assert on the data.
"""

from __future__ import annotations

import dataclasses
import enum
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


class Refused(Exception):
    """A rule, a kernel or the packing declines, with a sentence: what was required and what was found.

    Args:
        reason: the sentence.
        at: name of the node it is about, if any.
    """

    def __init__(self, reason: str, at: Any = None):
        super().__init__(reason)
        self.reason = reason
        self.at = None if at is None else str(at)


class GdnfuseError(RuntimeError):
    """An error for the user: bad options, or `strict` and a layer left unfused."""


class Status(enum.StrEnum):
    FIRED = "fired"
    REFUSED = "refused"
    UNMATCHED = "unmatched"
    SHADOWED = "shadowed"


@dataclass
class Record:
    """What one rule did at one anchor.

    Attributes:
        rule: the rule's name.
        stage: "capture", "lift", "fuse" or "lower".
        status: see Status.
        anchor: name of the graph node the rule started from.
        layer: path of the GDN layer the anchor belongs to, or None.
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
    """

    rule: str
    stage: str
    status: Status
    anchor: str
    layer: str | None = None
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


@dataclass
class GraphReport:
    """One compiled graph.

    Attributes:
        graph_id: counts the graphs of this process from 0.
        phase: "decode" (cached states are read and one token is processed), "prefill" or "other" (no GDN layer).
        layers: the GDN layers.
        records: records that belong to no GDN layer (siblings of the MLP, say).
        rewritten: False when the graph was handed on as it came; then `note` says why.
        note: a sentence, or empty.
        inner: the backend that compiled the rest.
        nodes_before, nodes_after: call nodes of the whole graph.
        launches_before, launches_after: as of a layer, for the whole graph.
        proofs: proofs run (not taken from the cache); proof_seconds: their time in all.
        pass_seconds: time of every pass together, proofs included.
        comparisons: with the option verify, how near the rewritten graph is to the graph as it came.
        stage_code: the graph after the stage that `stop_after` named, as text.
    """

    graph_id: int
    phase: str = "other"
    layers: list[LayerReport] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    rewritten: bool = True
    note: str = ""
    inner: str = ""
    nodes_before: int = 0
    nodes_after: int = 0
    launches_before: int = 0
    launches_after: int = 0
    proofs: int = 0
    proof_seconds: float = 0.0
    pass_seconds: float = 0.0
    comparisons: list[Comparison] = field(default_factory=list)
    stage_code: str = ""

    @property
    def fused_layers(self) -> int:
        return sum(layer.fused for layer in self.layers)

    @property
    def all_records(self) -> list[Record]:
        return [r for layer in self.layers for r in layer.records] + self.records

    def summary(self) -> str:
        """The one line logged per compiled graph."""
        if not self.rewritten:
            return f"graph {self.graph_id} ({self.phase}): not rewritten. {self.note}"
        if not self.layers:
            return f"graph {self.graph_id} ({self.phase}): no GDN layer found; compiled by {self.inner} as it came."
        line = (
            f"graph {self.graph_id} ({self.phase}): {self.fused_layers}/{len(self.layers)} GDN layers fused, "
            f"{self.nodes_before} → {self.nodes_after} nodes, {self.launches_before} → {self.launches_after} kernels, "
            f"{self.proofs} proofs in {self.proof_seconds:.2f} s"
        )
        return f"{line}. {self.note}" if self.note else f"{line}."

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; Status becomes its string."""
        data = dataclasses.asdict(self)
        data["fused_layers"] = self.fused_layers
        for layer, plain in zip(self.layers, data["layers"], strict=True):
            plain["why_not"] = layer.why_not
        return data

    def rows(self) -> list[dict[str, Any]]:
        """One row per distinct (layer set, rule, outcome), for tables."""
        counts: Counter[tuple[str, ...]] = Counter()
        worst: dict[tuple[str, ...], float] = {}
        for r in self.all_records:
            key = (r.stage, r.rule, str(r.status), r.chosen or "", r.reason)
            counts[key] += 1
            if r.proof_error is not None:
                worst[key] = max(worst.get(key, 0.0), r.proof_error)
        return [
            {"stage": k[0], "rule": k[1], "status": k[2], "count": n, "proof error": worst.get(k), "chosen": k[3], "reason": k[4]}
            for k, n in counts.items()
        ]


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
    """Reports of every graph compiled in this process, oldest first."""
    with _lock:
        return list(_reports)


def clear_reports() -> None:
    """Forget all reports."""
    with _lock:
        _reports.clear()
