"""Bar plots of figures by side, with what they were measured on below. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "eager": "#9e9e9e",
    "fla": "#e08214",
    "inductor": "#4393c3",
    "max-autotune": "#2166ac",
    "gdnfuse": "#1a9850",
    "prefixes": "#762a83",
    "mixer_decode": "#1a9850",
    "packed_decode": "#a6d96a",
    "packed_decode_gated": "#762a83",
    "reference": "#9e9e9e",
    "attention_decode": "#1a9850",
}
WIDTH = 0.8  # total width of the bars of a group
VERSIONS = {"torch": "torch", "cuda": "CUDA", "triton": "Triton", "transformers": "transformers", "fla": "fla"}


def grouped_bars(
    axes: Any, groups: Sequence[str], rows: Sequence[dict[str, float | None]], limits: Sequence[float | None], digits: int
) -> None:
    """A group of bars for each of `rows`, with figures by side, and the limit as a line across them.

    A side without a figure, because its results were wrong or it failed, has a text instead of a bar.
    """
    sides = list(dict.fromkeys(side for row in rows for side in row))
    width = WIDTH / len(sides)
    shown = [figure for row in rows for figure in row.values() if figure] + [limit for limit in limits if limit]
    top = max(shown, default=1.0)
    for i, side in enumerate(sides):
        at = [group + (i - (len(sides) - 1) / 2) * width for group in range(len(rows))]
        axes.bar(at, [row.get(side) or 0 for row in rows], width * 0.92, label=side, color=COLOURS.get(side))
        for x, row, limit in zip(at, rows, limits, strict=True):
            if side in row:
                text, height, turn = (f"{row[side]:.{digits}f}", row[side], 0) if row[side] else ("no speed", limit or 0, 90)
                axes.text(x, height + 0.01 * top, text, ha="center", va="bottom", fontsize=8, rotation=turn)
    for group, limit in enumerate(limits):
        if limit:
            label = "limit" if limit == next(filter(None, limits)) else None
            axes.hlines(limit, group - WIDTH / 2, group + WIDTH / 2, color="black", linestyle="--", linewidth=1.2, label=label)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 1.08 * top)


def caption(data: dict[str, Any], conditions: Sequence[str]) -> str:
    """What was measured, how, and with which versions."""
    machine = data["machine"]
    where = machine.get("gpu") or f"{machine.get('cpu')}, {machine.get('cpu_threads')} threads"
    versions = [f"{name} {machine[key]}" for key, name in VERSIONS.items() if machine.get(key)]
    return "\n".join([*textwrap.wrap("; ".join([where, *filter(None, conditions)]), 140), ", ".join(versions)])


def save(figure: Any, text: str, target: Path) -> None:
    """Write a figure with one legend above and a caption below. The suffix of the file decides the format."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    figure.supxlabel(text, fontsize=7, color="#555555")
    figure.savefig(target, dpi=150)
