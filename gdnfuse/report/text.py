"""The report as text for a terminal: a summary, tables, and each refusal with its line of the model's code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from gdnfuse.report.records import BANDWIDTH, COLUMNS, BlockReport, GraphReport, Refusal, Status, between_ranks, limit_seconds

WIDTH = 60  # characters per line of a sentence in a table
MARKS = {"fired": "✓", "declined": "✗", "both": "✓✗", None: "–"}
LEGEND = "✓ done, ✗ refused or not matched, ✓✗ some of each, – nothing to look at"
ASCII = str.maketrans({"✓": "+", "✗": "x", "–": "-", "→": ">", "×": "x", "…": "~", "·": "."} | {"−": "-", "µ": "u"})
COLORS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}


@dataclass(frozen=True)
class Style:
    """How to print: with colours or not, and for which encoding."""

    color: bool = False
    encoding: str = "utf-8"

    def paint(self, text: str, color: str) -> str:
        return f"\x1b[{COLORS[color]}m{text}\x1b[0m" if self.color and text else text

    def encodable(self, text: str) -> str:
        """The text with replacements for what the encoding lacks, one character each, so that tables stay aligned."""
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            return text.translate(ASCII).encode(self.encoding, "replace").decode(self.encoding)
        return text


def render(report: GraphReport, style: Style | None = None, bandwidth: float = BANDWIDTH) -> str:
    """The report of a graph: summary, blocks, linears, refusals, rules, kernels, and the graph if a stage was asked for."""
    style = style or Style()
    parts = [style.paint(report.summary(), "bold")]
    if report.rewritten and report.blocks:
        parts += [_moved(report, bandwidth), f"{_blocks(report, style)}\n{style.paint(LEGEND, 'dim')}"]
    if report.rewritten and report.projections:
        parts.append(table(projection_rows(report)))
    parts += left(report)
    if refusals := report.refusals:
        count = sum(r.count for r in refusals)
        parts.append(style.paint(f"Refused or not matched: {count}, of {len(refusals)} kinds", "bold"))
        parts += [_refusal(report, r, i, style) for i, r in enumerate(refusals, 1)]
    if rows := report.rows():
        parts.append(table([{**row, "proof error": _number(row["proof error"])} for row in rows]))
    if rows := launch_rows(report):
        parts.append(table(rows))
    if report.stage_code:
        parts.append(report.stage_code.strip())
    return style.encodable("\n\n".join(parts))


def table(rows: list[dict[str, Any]]) -> str:
    """A table of rows with equal keys. Columns that are empty in all rows are left out."""
    used = [k for k in rows[0] if any(row[k] != "" for row in rows)]
    widths = [WIDTH if k == "reason" else None for k in used]
    cells = [[row[k] for k in used] for row in rows]
    return tabulate(cells, headers=used, maxcolwidths=widths, disable_numparse=True)


def size(count: float) -> str:
    """A number of bytes with three digits."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}"


def duration(seconds: float) -> str:
    """Milliseconds, or microseconds, with three digits."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} µs"


def pair(before: float, after: float) -> str:
    """Two numbers of bytes. If the unit is the same, it is written once."""
    old, new = size(before), size(after)
    number, unit = old.split()
    return f"{number} → {new}" if new.endswith(f" {unit}") else f"{old} → {new}"


def _moved(report: GraphReport, bandwidth: float) -> str:
    text = f"Moved: {pair(report.bytes_before, report.bytes_after)}, if each kernel reads and writes its tensors once."
    for kind, (count, moved) in between_ranks(report).items():
        text += f"\nBetween ranks: {count} {kind}, {size(moved)} in all."
    seconds = limit_seconds(report, bandwidth)
    if seconds is None:
        return text
    return (
        f"{text}\nEstimated limit of the step: {duration(seconds)}, for weights, states and caches of "
        f"{size(report.limit_bytes)} once at {bandwidth / 1e12:.3g} TB/s."
    )


def _blocks(report: GraphReport, style: Style) -> str:
    """One row per kind of block. Blocks that differ only in the number of their layer share a row."""
    groups: dict[tuple[Any, ...], list[BlockReport]] = {}
    for b in ordered(report.blocks):
        moved = pair(b.bytes_before, b.bytes_after)
        key = (b.kind, *b.marks.items(), f"{b.launches_before} → {b.launches_after}", moved)
        groups.setdefault(key, []).append(b)
    names = columns(report)
    rows = []
    for key, members in groups.items():
        marks = members[0].marks
        cells = [_mark(marks.get(c), style) for c in names]
        rows.append([label(members), key[0], *cells, key[-2], key[-1]])
    headers = ["layers", "kind", *(c.replace(" ", "\n") for c in names), "kernels", "moved"]
    align = ["left", "left", *["center"] * len(names), "right", "right"]
    widths = [24] + [None] * (len(headers) - 1)
    # Headers are a plain row. tabulate would pad them, and the table would not fit a terminal.
    return tabulate([headers, *rows], tablefmt="plain", colalign=align, maxcolwidths=widths, disable_numparse=True)


def ordered(blocks: Iterable[BlockReport]) -> list[BlockReport]:
    """The blocks, with those outside the layers last."""
    return sorted(blocks, key=lambda b: b.index is None)


def columns(report: GraphReport) -> list[str]:
    """The columns in which a rule looked at a block, then those of rules that COLUMNS does not name."""
    marked = {c for b in report.blocks for c in b.marks}
    return [*(c for c in COLUMNS if c in marked), *sorted(marked - COLUMNS.keys())]


def _mark(outcome: str | None, style: Style) -> str:
    return style.paint(MARKS[outcome], {"fired": "green", "declined": "red", "both": "yellow"}.get(outcome, "dim"))


def label(blocks: Sequence[BlockReport]) -> str:
    """The numbers of their layers as ranges, or paths if there are no numbers."""
    if any(b.index is None for b in blocks):
        return ", ".join(dict.fromkeys(b.path for b in blocks if b.path))
    return ", ".join(ranges(b.index for b in blocks))


def ranges(numbers: Iterable[int]) -> list[str]:
    """0, 1, 2, 5 → "0–2", "5"."""
    found: list[list[int]] = []
    for n in sorted(set(numbers)):
        if found and n == found[-1][-1] + 1:
            found[-1] = [found[-1][0], n]
        else:
            found.append([n])
    return ["–".join(map(str, r)) for r in found]


def blocks_of(refusal: Refusal, report: GraphReport) -> list[BlockReport]:
    return [b for b in report.blocks if b.path in refusal.blocks]


def where(blocks: Iterable[BlockReport]) -> str:
    """Blocks in words: "MLP 0–31"."""
    kinds: dict[str, list[BlockReport]] = {}
    for b in blocks:
        kinds.setdefault(b.kind, []).append(b)
    return "; ".join(f"{kind} {label(members)}".strip() for kind, members in kinds.items())


def left(report: GraphReport) -> list[str]:
    """One line on where the graph breaks, and one for the GDN layers that are not fused, by what they lack."""
    notes: dict[str, list[str]] = {}
    for layer in report.layers:
        if not layer.fused:
            declined = any(r.status in (Status.REFUSED, Status.UNMATCHED) for r in layer.records)
            note = layer.note or ("What is refused or not matched says why." if declined else layer.why_not)
            notes.setdefault(note, []).append(layer.path)
    broken = [report.graph_break] if report.graph_break else []
    return broken + [f"Not fused: {_paths(paths)}. {note}" for note, paths in notes.items()]


def _paths(paths: list[str]) -> str:
    """Paths that differ in one number become one: "model.layers.*.linear_attn (0–2, 5)"."""
    found: dict[str, list[int]] = {}
    for path in paths:
        numbers = re.findall(r"\d+", path)
        found.setdefault(re.sub(r"\d+", "*", path, count=1), []).extend(map(int, numbers[:1]))
    return ", ".join(f"{path} ({', '.join(ranges(n))})" if n else path for path, n in found.items())


def _refusal(report: GraphReport, r: Refusal, number: int, style: Style) -> str:
    times = f", {r.count} times" if r.count > 1 else ""
    head = f"{number}. {style.paint(r.rule, 'bold')} {style.paint(r.status, 'red')}{times} ({where(blocks_of(r, report))})"
    lines = [f"{head}: {r.sentence}"]
    lines.append(f"   node {r.at}, traced from {r.source.place}" if r.source else f"   node {r.at}")
    if r.source and r.source.code:
        lines.append(style.paint(f"   | {r.source.code}", "dim"))
    if r.equation:
        lines.append(f"   looked for {r.equation}")
    return "\n".join(lines)


def projection_rows(report: GraphReport) -> list[dict[str, Any]]:
    """One row per kind of linear."""
    return [
        {
            "linear": p.name,
            "format": p.format,
            "weight": f"{p.rows} × {p.columns}" if p.rows else "",
            "size": size(p.bytes),
            "count": len(p.paths),
            "computed by": p.computed,
            "reason": p.reason,
        }
        for p in report.projections
    ]


def launch_rows(report: GraphReport) -> list[dict[str, Any]]:
    """One row per kernel and per way to divide its work."""
    counts = Counter((r.rule, line, r.measured) for r in report.all_records for line in r.launches)
    return [{"op": rule, "launch": line, "count": n, "measured": by} for (rule, line, by), n in counts.items()]


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"
