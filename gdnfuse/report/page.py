"""The report as one HTML page without any other files: style and script are part of it, and it needs no network.

All content is in the text of the page. So it can be read, printed and searched without the script, which only filters and
switches the theme.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

from gdnfuse.report.records import BANDWIDTH, BlockReport, GraphReport, Operation, Refusal, Source, Status, limit_seconds
from gdnfuse.report.text import (
    LEGEND,
    MARKS,
    blocks_of,
    columns,
    duration,
    launch_rows,
    left,
    ordered,
    pair,
    projection_rows,
    ranges,
    size,
    where,
)

ROW, LANE, DOT = 22, 9, 4  # pixels: height of a line, distance of two edges, radius of a node
LETTERS = {"linear attention": "L", "full attention": "A", "MLP": "M", "MoE": "E", "other": "O"}
STATES = ("fused", "partly", "unchanged")
WORDS = {"fired": "done", "declined": "refused or not matched", "both": "some done, some refused", None: "nothing to look at"}


def page(reports: Iterable[GraphReport], about: dict[str, Any], bandwidth: float = BANDWIDTH) -> str:
    """Render the whole page.

    Args:
        reports: reports of graphs.
        about: what was compiled and with what, shown at the top. `model` is the title.
        bandwidth: bytes per second, for the limit.
    """
    facts = "".join(f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>" for k, v in about.items() if k != "model")
    graphs = "".join(_graph(report, bandwidth) for report in reports)
    title = escape(str(about.get("model", "a model")))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>gdnfuse: {title}</title>
<style>
{_asset("report.css")}</style>
</head>
<body>
<header>
<div><p class="kicker">gdnfuse report</p><h1>{title}</h1></div>
<button type="button" id="theme" hidden>Dark</button>
<dl class="facts">{facts}</dl>
</header>
<main>
{graphs}</main>
<footer>
<p>Kernels: one for each operation that computes, or those that a Triton kernel of ours launches. Moved: bytes, if each kernel
reads its tensors and writes its results once, and views are free. Inductor may merge some other operations, before and after.
</p>
</footer>
<script>
{_asset("report.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return (resources.files("gdnfuse.report") / "assets" / name).read_text(encoding="utf-8")


def _graph(report: GraphReport, bandwidth: float) -> str:
    parts = [f'<p class="summary">{escape(line)}</p>' for line in (report.summary(), *left(report))]
    if report.rewritten and report.blocks:
        pairs = _pairs(report)
        parts += [_tiles(report, bandwidth), _filters(report), _map(report, pairs), _table(report, pairs)]
        if report.projections:
            parts.append(_section("Linears", _rows(projection_rows(report))))
        parts.append(_section("Refused or not matched", _refusals(report)))
        parts.append(_section("One layer before and after", "".join(_pair(report, pairs, key) for key in pairs)))
        parts.append(_section("Rules and kernels", _rows(report.rows()) + _rows(launch_rows(report))))
    return f'<article class="graph">{"".join(parts)}</article>\n'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n"


def _tiles(report: GraphReport, bandwidth: float) -> str:
    tiles = [
        ("GDN layers fused", f"{report.fused_layers} of {len(report.layers)}", ""),
        ("Kernels", f"{report.launches_before} → {report.launches_after}", "per call of the graph"),
        ("Moved", pair(report.bytes_before, report.bytes_after), "each kernel its tensors once"),
    ]
    seconds = limit_seconds(report, bandwidth)
    if seconds is not None:
        note = f"estimate: {size(report.limit_bytes)} of weights, states and caches once at {bandwidth / 1e12:.3g} TB/s"
        tiles.append(("Limit of the step", duration(seconds), note))
    found = "".join(f"<div><dt>{a}</dt><dd>{escape(b)}</dd><p>{escape(c)}</p></div>" for a, b, c in tiles)
    return f'<dl class="tiles">{found}</dl>'


def _filters(report: GraphReport) -> str:
    kinds = list(dict.fromkeys(b.kind for b in ordered(report.blocks)))
    states = [s for s in STATES if any(b.fused == s for b in report.blocks)]

    def boxes(name: str, words: Sequence[str]) -> str:
        inputs = (
            f'<label><input type="checkbox" data-filter="{name}" value="{escape(w)}" checked><span>{escape(w)}</span></label>'
            for w in words
        )
        return f"<fieldset><legend>{name}</legend>{''.join(inputs)}</fieldset>"

    return f'<form class="filters" hidden>{boxes("kind", kinds)}{boxes("status", states)}<output></output></form>\n'


def _data(blocks: Sequence[BlockReport]) -> str:
    """The attributes that the filters read."""
    kinds, states = (escape("|".join(dict.fromkeys(found))) for found in ([b.kind for b in blocks], [b.fused for b in blocks]))
    return f'data-kind="{kinds}" data-status="{states}"'


Pairs = dict[tuple[str, str, int, int], list[BlockReport]]


def _pairs(report: GraphReport) -> Pairs:
    """Blocks grouped by kind, outcome, and structure before and after."""
    found: Pairs = {}
    for b in ordered(report.blocks):
        found.setdefault((b.kind, b.fused, b.before, b.after), []).append(b)
    return found


def _anchor(report: GraphReport, pairs: Pairs, b: BlockReport) -> str:
    return f"g{report.graph_id}-{list(pairs).index((b.kind, b.fused, b.before, b.after))}"


def _map(report: GraphReport, pairs: Pairs) -> str:
    layers: dict[str, list[BlockReport]] = {}
    for b in ordered(report.blocks):
        layers.setdefault(b.layer or b.path, []).append(b)
    tiles = []
    for path, blocks in layers.items():
        cells = "".join(
            f'<a href="#{_anchor(report, pairs, b)}" class="{b.fused}" {_data([b])} '
            f'title="{escape(b.path or b.kind)}: {escape(b.fused)}, {b.launches_before} → {b.launches_after} kernels">'
            f"{LETTERS.get(b.kind, '·')}</a>"
            for b in blocks
        )
        name = blocks[0].index if blocks[0].index is not None else path or "rest"
        tiles.append(f"<li><b>{escape(str(name))}</b>{cells}</li>")
    present = {b.kind for b in report.blocks}
    letters = ", ".join(f"{letter} {kind}" for kind, letter in LETTERS.items() if kind in present)
    states = "".join(f'<span class="key {s}">{s}</span>' for s in STATES)
    legend = f'<p class="legend">{escape(letters)}, · outside the layers {states}</p>'
    return _section("Layers", f'{legend}<ol class="map">{"".join(tiles)}</ol>')


def _table(report: GraphReport, pairs: Pairs) -> str:
    names = columns(report)
    rows = []
    for b in ordered(report.blocks):
        marks = "".join(_mark(b.marks.get(c)) for c in names)
        rows.append(
            f'<tr {_data([b])}><th scope="row">{"" if b.index is None else b.index}</th>'
            f'<td><a href="#{_anchor(report, pairs, b)}">{escape(b.kind)}</a></td>{marks}'
            f'<td class="n">{b.launches_before} → {b.launches_after}</td>'
            f'<td class="n">{escape(pair(b.bytes_before, b.bytes_after))}</td></tr>\n'
        )
    heads = "".join(f'<th scope="col">{escape(c)}</th>' for c in ["layer", "kind", *names, "kernels", "moved"])
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return _section("Layers × fusions", f'<p class="legend">{LEGEND}</p>{_scroll("layers and fusions", table, "tall")}')


def _scroll(name: str, content: str, more: str = "") -> str:
    """A box that can also be scrolled by keyboard."""
    return f'<div class="scroll {more}" role="region" aria-label="{name}" tabindex="0">{content}</div>'


def _mark(outcome: str | None) -> str:
    return f'<td class="m {outcome or "none"}" title="{WORDS[outcome]}">{MARKS[outcome]}</td>'


def _refusals(report: GraphReport) -> str:
    if not report.refusals:
        return '<p class="quiet">Every rule that found its motif rewrote it.</p>'
    return f'<ol class="refusals">{"".join(_refusal(report, r) for r in report.refusals)}</ol>'


def _refusal(report: GraphReport, r: Refusal) -> str:
    blocks = blocks_of(r, report)
    times = f" {r.count} times" if r.count > 1 else ""
    facts = {"node": r.at}
    if r.status is Status.UNMATCHED:
        facts |= {"matched down to": r.at, "expected there": r.expected or "", "found": r.got or ""}
        del facts["node"]
    facts |= {"looked for": r.equation, "in": where(blocks)}
    listed = "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v)
    return (
        f'<li {_data(blocks)}><p><b>{escape(r.rule)}</b> <span class="{r.status}">{r.status}{times}</span> '
        f"{escape(r.sentence)}</p>"
        f"{_source(r.source)}<dl>{listed}</dl></li>\n"
    )


def _source(source: Source | None) -> str:
    if source is None:
        return ""
    return f"<figure><figcaption>{escape(source.place)}</figcaption><pre><code>{escape(source.code)}</code></pre></figure>"


def _pair(report: GraphReport, pairs: Pairs, key: tuple[str, str, int, int]) -> str:
    blocks = pairs[key]
    kind, fused, before, after = key
    first = blocks[0]
    captured, chosen = ({r.rule for r in report.all_records if r.stage == stage} for stage in ("capture", "lower"))
    sides = []
    for name, structure, ours, kernels, moved in (
        ("before", before, captured, first.launches_before, first.bytes_before),
        ("after", after, captured | chosen - {"linear"}, first.launches_after, first.bytes_after),
    ):
        content = _drawing(report.structures[structure], ours, first.path.rpartition(".")[2])
        title = f"{name}: {kernels} kernels, {size(moved)}"
        sides.append(f"<div><h4>{escape(title)}</h4>{_scroll(escape(f'{kind}, {name}'), content)}</div>")
    numbers = [b.index for b in blocks if b.index is not None]
    which = f"layers {', '.join(ranges(numbers))}" if numbers else first.path
    opened = " open" if kind == "linear attention" else ""
    return (
        f'<details class="pair" id="{_anchor(report, pairs, first)}" {_data(blocks)}{opened}>'
        f'<summary><b>{escape(kind)}</b> {escape(which)} <i class="{first.fused}">{escape(fused)}</i></summary>'
        f'<div class="sides">{"".join(sides)}</div></details>\n'
    )


def _drawing(operations: Sequence[Operation], ours: set[str], module: str) -> str:
    """Operations from top to bottom, each below those that it reads, with an edge from each to its readers. Views are left out.

    Args:
        operations: of one block, before or after.
        ours: which of them are dialect ops.
        module: the name of the block in its layer. It is left out of the names of weights.
    """
    lines, edges = _lines(operations)
    ends = {i: max(readers) for i, readers in edges.items()}
    lanes: dict[int, int] = {}
    for i in edges:
        if edges[i] != [i + 1]:
            taken = {lane for j, lane in lanes.items() if ends[j] > i}
            lanes[i] = next(lane for lane in range(1, len(lines) + 2) if lane not in taken)
    x = LANE * (max(lanes.values(), default=0) + 1)
    paths = []
    for i, readers in edges.items():
        for j in readers:
            top, bottom, left = i * ROW + ROW // 2, j * ROW + ROW // 2, x - LANE * lanes.get(i, 0)
            paths.append(
                f"M{x} {top}V{bottom}" if i not in lanes else f"M{x} {top}Q{left} {top} {left} {top + LANE}"
                f"V{bottom - LANE}Q{left} {bottom} {x} {bottom}"
            )  # fmt: skip
    dots, texts = [], []
    for i, (op, css, chips, result, moved, hover) in enumerate(lines):
        css = f"{css} ours" if op in ours else css
        dots.append(f'<circle cx="{x}" cy="{i * ROW + ROW // 2}" r="{DOT}" class="{css}"/>')
        words = "".join(f"<span>{escape(c.removeprefix(f'{module}.'))}</span>" for c in chips)
        texts.append(
            f'<li class="{css}" title="{escape(hover)}"><b>{escape(op)}</b><small>{escape(moved)}</small>'
            f"<em>{escape(result)}</em>{words}</li>"
        )
    width, height = x + LANE, len(lines) * ROW
    return (
        f'<div class="drawing"><svg width="{width}" height="{height}" aria-hidden="true">'
        f'<path d="{"".join(paths)}"/>{"".join(dots)}</svg><ol>{"".join(texts)}</ol></div>'
    )


Line = tuple[str, str, list[str], str, str, str]


def _lines(operations: Sequence[Operation]) -> tuple[list[Line], dict[int, list[int]]]:
    """The text of each line (operation, class, weights and states, result, bytes, hint), and who reads what, by lines."""
    outer = list(dict.fromkeys(i for o in operations for i in o.inputs if isinstance(i, str) and i.startswith("input ")))
    row: dict[int | str, int] = {name: i for i, name in enumerate(outer)}
    lines: list[Line] = [(name, "given", [], "", "", "made by another block") for name in outer]
    edges: dict[int, list[int]] = {}
    words: dict[int, list[str]] = {}
    for number, o in enumerate(operations):
        rows = list(dict.fromkeys(row[i] for i in o.inputs if i in row))
        given = [i for i in o.inputs if isinstance(i, str) and i not in row]
        given += [w for i in o.inputs if isinstance(i, int) and i in words for w in words[i]]
        if not o.kernels:  # a view: its readers read what it is a view of
            if rows:
                row[number] = rows[0]
            words[number] = given
            continue
        row[number] = len(lines)
        for r in rows:
            edges.setdefault(r, []).append(len(lines))
        times = f" × {o.kernels}" if o.kernels > 1 else ""
        hint = f"{o.name}{times}\nreads {', '.join(given)}" if given else f"{o.name}{times}"
        if o.source:
            hint += f"\n{o.source.place}\n{o.source.code}"
        lines.append((o.op, "", [g.partition(" ")[0] for g in given], o.result, size(o.bytes), hint))
    return lines, edges


def _rows(rows: Sequence[dict[str, Any]]) -> str:
    """A table of records. Columns that are empty in all rows are left out."""
    used = [k for k in (rows[0] if rows else ()) if any(row[k] not in ("", None) for row in rows)]
    if not used:
        return ""
    heads = "".join(f'<th scope="col">{escape(k)}</th>' for k in used)
    body = "".join(f"<tr>{''.join(f'<td>{escape(_cell(row[k]))}</td>' for k in used)}</tr>\n" for row in rows)
    return _scroll("records", f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>")


def _cell(x: Any) -> str:
    return "" if x is None else f"{x:.1e}" if isinstance(x, float) else str(x)
