"""Draws one plot for each JSON file of the benchmarks, of the kinds in PLOTS, with what was measured on below.

    python benchmarks/plot.py --out plots

It takes every decode*.json, prefill*.json, chunk*.json, mixer*.json, attention*.json and prefix*.json in --results, by default
those of this repository, and writes a PNG of the same name for each. It needs matplotlib (the extra `plot`). Files of older runs
do not have the rate of a copy. Their limits are those of an H200.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gdnfuse.bench.plot import COLOURS, caption, grouped_bars, save

RESULTS = Path(__file__).parent / "results"
H200 = 4.3e12  # bytes per second of a copy


def figures(rows: Iterable[dict[str, Any]], name: str) -> dict[str, float | None]:
    return {row["side"]: row.get(name) for row in rows}


def rate(data: dict[str, Any]) -> str:
    """At which the limits of a file's results are reached, in words."""
    measured = next((r["bytes_per_second"] for r in (data, *data["results"]) if "bytes_per_second" in r), None)
    return f"{measured / 1e9:.0f} GB/s, measured with a copy" if measured else f"{H200 / 1e12:g} TB/s"


def decode(axes: Any, data: dict[str, Any]) -> list[str]:
    results = sorted(data["results"], key=lambda r: r.get("weight_bytes", 0))
    rows = [figures(r["sides"], "ms") for r in results]
    grouped_bars(axes, [r["model"] for r in results], rows, [r.get("limit_ms") for r in results], 2)
    batch = data["arguments"]["batch"]
    axes.set(title=f"Decode step, batch {batch}", ylabel="ms per step (lower is better)")
    limit = f"limit: every weight read once at {rate(data)}" if any(r.get("limit_ms") for r in results) else ""
    return [data["arguments"]["dtype"], f"batch {batch}", limit, "median"]


def prefill(axes: Any, data: dict[str, Any]) -> list[str]:
    arguments = data["arguments"]
    groups, rows = [], []
    for result in data["results"]:
        for n in arguments["lengths"]:
            groups.append(f"{result['model']}\n{n} tokens")
            rows.append({row["side"]: row.get("ms", {}).get(str(n)) for row in result["sides"]})
    grouped_bars(axes, groups, rows, [None] * len(rows), 0)
    axes.set(title=f"Prefill, batch {arguments['batch']}", ylabel="ms per prompt (lower is better)")
    return [arguments["dtype"], f"batch {arguments['batch']}", "median"]


def chunk(axes: Any, data: dict[str, Any]) -> list[str]:
    results = data["results"]
    rows = [figures(r["sides"], "us") for r in results]
    groups = [f"{r['batch']} × {r['tokens']}" for r in results]
    grouped_bars(axes, groups, rows, [r["limit_us"] for r in results], 0)
    axes.set(title="Chunked gated delta rule, forward", xlabel="batch × tokens", ylabel="µs per call (lower is better)")
    return ["bfloat16", "16 key and 32 value heads of 128", f"limit: inputs, output and states once at {rate(data)}", "median"]


def mixer(axes: Any, data: dict[str, Any]) -> list[str]:
    results, arguments = data["results"], data["arguments"]
    batches = [r["batch"] for r in results]
    for side in dict.fromkeys(row["side"] for r in results for row in r["sides"]):
        us = [figures(r["sides"], "us").get(side) for r in results]
        measured = [(batch, figure) for batch, figure in zip(batches, us, strict=True) if figure]
        if measured:
            axes.plot(*zip(*measured, strict=True), marker="o", markersize=4, label=side, color=COLOURS.get(side))
    axes.plot(batches, [r["limit_us"] for r in results], color="black", linestyle="--", linewidth=1.2, label="limit")
    marks = [(r["batch"], r["mark_us"]) for r in results if r.get("mark_us")]
    if marks:
        axes.scatter(*zip(*marks, strict=True), marker="_", s=160, color="crimson", label="mark of an H200", zorder=3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(title="Mixer of a GDN layer, one token", xlabel="sequences", ylabel="µs per call (lower is better)")
    conditions = ["bfloat16 rows", f"{arguments.get('state', 'float32')} states, cold", "32 value heads of 128"]
    overlap = "overlapping launches" if arguments.get("overlap") else ""
    return [*conditions, overlap, f"limit: the state read and written once at {rate(data)}", "median"]


def attention(axes: Any, data: dict[str, Any]) -> list[str]:
    results = data["results"]
    rows = [{side: row.get("us") for side, row in r["sides"].items()} for r in results]
    groups = [f"{r['batch']} ×\n{r['tokens']}" for r in results]
    grouped_bars(axes, groups, rows, [r["limit_us"] for r in results], 0)
    axes.set(title="Attention of one token", xlabel="sequences × tokens", ylabel="µs per call (lower is better)")
    limit = f"limit: keys and values of the tokens read once at {rate(data)}"
    return ["bfloat16, static cache, cold", "16 query and 4 key heads of 256", limit, "median"]


def prefix(axes: Any, data: dict[str, Any]) -> list[str]:
    arguments = data["arguments"]
    groups, rows = [], []
    for result in data["results"]:
        groups.append(f"{result['model']}\n{arguments['prefix']} known + 64")
        rows.append({row["side"]: row.get("first_token", {}).get("dynamic", {}).get("ms") for row in result["sides"]})
        for turn in range(arguments["turns"]):
            groups.append(f"turn {turn + 1}\n{arguments['turn'] * (turn + 1)}")
            rows.append({row["side"]: row["chat_ms"][turn] if "chat_ms" in row else None for row in result["sides"]})
    grouped_bars(axes, groups, rows, [None] * len(rows), 0)
    axes.set(title="First token of generate", xlabel="tokens of the prompt", ylabel="ms (lower is better)")
    return [arguments["dtype"], f"batch {arguments['batch']}", "dynamic cache", "median"]


PLOTS: dict[str, Callable[[Any, dict[str, Any]], list[str]]] = {
    "decode": decode,
    "prefill": prefill,
    "chunk": chunk,
    "mixer": mixer,
    "attention": attention,
    "prefix": prefix,
}


def plot(name: str, source: Path, target: Path) -> None:
    from matplotlib.figure import Figure

    data = json.loads(source.read_text())
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    conditions = PLOTS[name](figure.subplots(), data)
    save(figure, caption(data, conditions), target)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", default="plots", help="folder for the plots")
    parser.add_argument("--results", metavar="DIR", default=str(RESULTS), help="folder with the JSON files")
    args = parser.parse_args(argv)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("plot.py needs matplotlib, which is not installed: pip install 'gdnfuse[plot]'", file=sys.stderr)
        return 1
    results, out = Path(args.results), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name in PLOTS:
        sources = [s for s in sorted(results.glob(f"{name}*.json")) if not s.stem.endswith("_sweep")]
        if not sources:
            print(f"{results} has no {name}.json, so there is no plot of it.", file=sys.stderr)
        for source in sources:
            written.append(out / f"{source.stem}.png")
            plot(name, source, written[-1])
            print(written[-1])
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
