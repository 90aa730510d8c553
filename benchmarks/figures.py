"""Writes every table of figures on the pages from the JSON files in results/, and draws the plots of the pages.

    python benchmarks/figures.py            # after a new JSON file was put into results/
    python benchmarks/figures.py --check    # only says which pages differ from their JSON files
    python benchmarks/figures.py --older    # prints the commands of JSON files that are of an older version, or of none

A page asks for a table by a comment. This script writes everything between the comment and the end mark:

    <!-- figures: decode decode_4b.json -->
    <!-- end of figures -->

The first word is one of TABLES. The others are files. If a file does not exist yet, a sentence replaces the table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gdnfuse.bench.plot import VERSIONS
from gdnfuse.bench.speculation import OWN
from gdnfuse.versions import version

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?P<start><!-- figures: (?P<ask>[^>]*?) -->\n)(?P<body>.*?)(?P<end><!-- end of figures -->)", re.DOTALL)
PLOT = re.compile(r"\]\([\w./]*plots/(\w+)\.png\)")
SIDES = {
    "eager": "eager",
    "fla": "eager + flash-linear-attention",
    "inductor": "Inductor",
    "max-autotune": "Inductor, max-autotune",
    "vllm": "vLLM",
    "gdnfuse": "gdnfuse",
    "reference": "torch",
}

FIRST = "0.1.0"  # the version of files that name none

Rows = Iterable[Sequence[str]]


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    return "" if value is None else f"{value:.{digits}f}{unit}"


def by_side(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["side"]: row for row in result["sides"]}


def limit_of_step(result: dict[str, Any]) -> float | None:
    """Milliseconds. Files of decode.py from before it counted states only have the limit of weights."""
    return result.get("limit_with_states_ms", result.get("limit_ms"))


def named(model: str) -> str:
    """The name of a model. Presets have short names, and are written as Qwen writes them."""
    return f"Qwen3.5-{model.upper()}" if model[0].isdigit() else model


def sequences(batch: int) -> str:
    return f"{batch} sequence{'s' if batch > 1 else ''}"


def results(files: dict[str, Any]) -> Rows:
    """One line per step and prompt of a model, with a column per side.

    The figures of an engine are added to the lines of others.
    """
    engines = {k: v for k, v in files.items() if "engines.py" in v["command"]}
    yield ("", *SIDES.values(), "limit")
    for data in (v for k, v in files.items() if k not in engines):
        for result in data["results"]:
            sides, whose = by_side(result), (result["model"], result.get("quantize"))
            lengths = data["arguments"].get("lengths")
            for length in lengths or [None]:
                ms = {side: row["ms"][str(length)] if length else row["ms"] for side, row in sides.items() if "ms" in row}
                key, what = ("tokens", length) if length else ("batch", result["batch"])
                for engine in engines.values():
                    found = [r for r in engine["results"] if (r["model"], r.get("quantize")) == whose]
                    rows = [row for r in found for row in r["prompt" if length else "decode"] if row[key] == what]
                    ms |= {engine["engine"]: rows[0]["ms"]} if rows else {}
                stored = f", {result['quantize']}" if result.get("quantize") else ""
                label = f"a prompt of {length} tokens" if length else f"a step of {sequences(result['batch'])}"
                limit = None if length else limit_of_step(result)
                digits = [1 if length or side in ("eager", "fla") else 2 for side in SIDES]
                cells = [number(ms.get(side), n) for side, n in zip(SIDES, digits, strict=True)]
                yield (f"{label}{stored}, ms", *cells, number(limit))


def decode(files: dict[str, Any]) -> Rows:
    yield ("", "per step", "tokens/s", "kernels per step", "cold first call")
    for data in files.values():
        for result in data["results"]:
            for row in result["sides"]:
                ms, cold = row.get("ms"), row["side"] not in ("eager", "fla")
                yield (
                    f"{named(result['model'])}, {SIDES[row['side']]}",
                    number(ms, 1 if ms and ms > 20 else 2, " ms") or "no speed",
                    number(row.get("tokens_per_second"), 0),
                    number(row.get("kernels_per_step"), 0),
                    number(row.get("first_call_seconds") if cold else None, 1, " s"),
                )
            limit = limit_of_step(result)
            yield (f"{named(result['model'])}, limit", number(limit, 2, " ms"), number(1e3 * result["batch"] / limit, 0), "", "")


def steps(files: dict[str, Any]) -> Rows:
    yield ("model", "sequences", "per step", "each waited for", "limit", "of the limit", "tokens/s", "kernels", "cold first call")
    for data in files.values():
        for result in data["results"]:
            row, limit = by_side(result)["gdnfuse"], limit_of_step(result)
            yield (
                named(result["model"]) + "".join(f", {more}" for more in (result.get("quantize"), _lora(result)) if more),
                str(result["batch"]),
                number(row["ms"], 2, " ms"),
                number(row.get("waited_ms"), 2, " ms"),
                number(limit, 2, " ms"),
                number(100 * limit / row["ms"], 0, " %"),
                number(row["tokens_per_second"], 0),
                str(row["kernels_per_step"]),
                number(row.get("first_call_seconds"), 0, " s"),
            )


def _lora(result: dict[str, Any]) -> str:
    """Active adapters of a result: how many, their rank, and their dtype if it was chosen."""
    if not result.get("lora"):
        return ""
    rank, count, *dtype = result["lora"]
    return " ".join([f"{count} adapter{'s' if count > 1 else ''}", *(f"in {x}" for x in dtype), f"of rank {rank}"])


def step(files: dict[str, Any]) -> Rows:
    """The time of each part of a step, summed over all layers and kernels."""
    parts: dict[tuple[str, str], dict[str, tuple[int, float, float]]] = {}
    heads = []
    for name, data in files.items():
        (result,) = data["results"]
        heads += [sequences(result["batch"]), "limit"]
        for row in by_side(result)["gdnfuse"]["rows"]:
            if row["kind"] not in ("others", "between steps"):
                found = parts.setdefault((row["kind"], row["what"]), {})
                count, us, limit = found.get(name, (0, 0.0, 0.0))
                found[name] = (max(count, row["count"]), us + row["us"], limit + row["limit_us"])
    yield ("part of a step", "times", *heads)
    order = list(dict.fromkeys(kind for kind, _ in parts))
    for (kind, what), found in sorted(parts.items(), key=lambda part: order.index(part[0][0])):
        cells = [number(found[n][i], 0, " µs") if n in found else "" for n in files for i in (1, 2)]
        yield (f"{kind}: `{what}`", str(max(count for count, _, _ in found.values())), *cells)


def experts(files: dict[str, Any]) -> Rows:
    yield ("rows", "experts that they choose", "gdnfuse", "grouped_mm, eager", "limit")
    for data in files.values():
        for r in data["results"]:
            us = [number(r["sides"][side].get("us"), 0, " µs") for side in ("gdnfuse", "grouped_mm")]
            yield (str(r["rows"]), number(r["experts"], 0), *us, number(r["limit_us"], 0, " µs"))


def linears(files: dict[str, Any]) -> Rows:
    yield ("linear", "rows", "cuBLAS, the linear alone", "gdnfuse, with what is fused around it", "limit")
    for data in files.values():
        for r in data["results"]:
            us = [number(r[name], 1, " µs") for name in ("cublas_us", "chosen_us", "limit_us")]
            yield (r["whose"], str(r["rows"]), *us)


def prompts(files: dict[str, Any]) -> Rows:
    yield ("model", "tokens", "side", "a length met before", "a new length", "first calls")
    for data in files.values():
        for result in data["results"]:
            for length in data["arguments"]["lengths"]:
                for row in result["sides"]:
                    ms = [number(row.get(name, {}).get(str(length)), 1, " ms") for name in ("ms", "ms_new_length")]
                    first = ", ".join(number(s, 1) for s in row.get("first_calls_seconds", ()))
                    yield (named(result["model"]), str(length), SIDES[row["side"]], *ms, f"{first} s" if first else "")


def prompt(files: dict[str, Any]) -> Rows:
    yield ("tokens", "FlashAttention-2", "cuDNN", "its first call", "sum and norm, Inductor", "gdnfuse", "limit")
    for data in files.values():
        for a, n in zip(data["results"]["attention"], data["results"]["norm"], strict=True):
            us = [number(a["flash_us"], 0, " µs"), number(a["cudnn_us"], 0, " µs"), number(a["cudnn_first_ms"], 0, " ms")]
            yield (str(a["tokens"]), *us, *(number(n[f"{side}_us"], 1, " µs") for side in ("inductor", "gdnfuse", "limit")))


def chunk(files: dict[str, Any]) -> Rows:
    yield ("batch × tokens", "flash-linear-attention", "gdnfuse", "limit", "peak memory, theirs", "ours")
    for data in files.values():
        for r in data["results"]:
            theirs, ours = by_side(r)["fla"], by_side(r)["gdnfuse"]
            us = [number(v, 0, " µs") for v in (theirs.get("us"), ours.get("us"), r["limit_us"])]
            yield (f"{r['batch']} × {r['tokens']}", *us, *(number(s["peak_bytes"] / 2**20, 0, " MiB") for s in (theirs, ours)))


def mixer(files: dict[str, Any]) -> Rows:
    yield ("states", "batch", "flash-linear-attention", "gdnfuse", "of it rule and norm", "rule alone", "limit")
    for data in files.values():
        for r in data["results"]:
            sides = by_side(r)
            names = ("fla", "mixer_decode", "packed_decode_gated", "packed_decode")
            us = [number(sides.get(side, {}).get("us"), 1, " µs") for side in names]
            yield (data["arguments"]["state"], str(r["batch"]), *us, number(r["limit_us"], 1, " µs"))


def attention(files: dict[str, Any]) -> Rows:
    yield ("batch × tokens", "torch", "gdnfuse", "limit")
    for data in files.values():
        for r in data["results"]:
            us = [number(r["sides"][side].get("us"), 1, " µs") for side in ("reference", "attention_decode")]
            yield (f"{r['batch']} × {r['tokens']}", *us, number(r["limit_us"], 1, " µs"))


def launch(files: dict[str, Any]) -> Rows:
    yield ("op", "kernels", "bare launch", "repeated, as an op", "repeated, from Inductor's code")
    for data in files.values():
        for r in data["results"]:
            us = [number(r[name], 0, " µs") for name in ("launch_us", "op_us", "inductor_us")]
            yield (f"`{r['op']}`", str(r["kernels"]), *us)


def drift(files: dict[str, Any]) -> Rows:
    percent = lambda value: f"{100 * value:.{1 if value >= 0.005 else 2}f} %"  # noqa: E731
    for data in files.values():
        for result in data["results"]:
            yield ("states in", *(f"after {point} steps" for point in result["points"]))
            for side in ("bfloat16", "float16"):
                errors = by_side(result)[side]["errors"]
                yield (side, *(" / ".join(percent(errors[str(p)][k]) for k in ("logits", "states")) for p in result["points"]))


def accuracy(files: dict[str, Any]) -> Rows:
    percent = lambda value: number(None if value is None else 100 * value, 1, " %")  # noqa: E731
    quantised = 'gdnfuse, `activations="fp8"`', "activations in eight bits too, eager"
    yield ("format", "gdnfuse", "weights dequantised, eager", *quantised)
    sides = ("gdnfuse", "dequantised", "gdnfuse_fp8", "w8a8")
    for data in files.values():
        for r in data["results"]:
            yield (f"`{r['format']}`", *(percent(r["errors"].get(side)) for side in sides))


def engines(files: dict[str, Any]) -> Rows:
    yield ("engine", "model", "what", "ms")
    for data in files.values():
        for result in data["results"]:
            for r in result["decode"]:
                yield (SIDES[data["engine"]], named(result["model"]), f"a step of {sequences(r['batch'])}", number(r["ms"]))
            for r in result["prompt"]:
                yield (SIDES[data["engine"]], named(result["model"]), f"the first token of {r['tokens']}", number(r["ms"], 1))


def tokens(files: dict[str, Any]) -> Rows:
    yield ("model", "sequences", "tokens", "gdnfuse, a token", "where each step is waited for")
    for data in files.values():
        for result in data["results"]:
            ms = [number(by_side(result)[side]["ms"], 2, " ms") for side in ("late", "waited")]
            yield (named(result["model"]), str(result["batch"]), "drawn" if result["sample"] else "likeliest", *ms)


def ranks(files: dict[str, Any]) -> Rows:
    """Steps of `gdnfuse bench --tensor-parallel`. A side without ranks runs on one GPU."""
    yield ("", "GPUs", "per step", "limit", "weights that a GPU holds", "sums and gathers", "one sum alone", "cold first call")
    for data in files.values():
        for result in data["results"]:
            for row in result["sides"]:
                name, _, way = row["side"].partition(":")
                found, calls = row.get("decode", {}), row.get("collectives", {})
                layers = data["arguments"]["layers"]
                model = named(data["arguments"]["model"]) + (f" ({layers} layers)" if layers else "")
                yield (
                    ", ".join([model, SIDES[name], *way.replace("_", "-").split(":")]).rstrip(", "),
                    str(row.get("ranks", 1)) if found else "",
                    number(found.get("ms"), 2, " ms") or f"no speed: {row.get('failed') or found['failed']}",
                    number(row.get("limit_ms", result["limit_ms"]), 2, " ms") if found else "",
                    number(row.get("held_bytes", result["weight_bytes"]) / 1e9, 1, " GB") if found else "",
                    str(sum(calls.values())) if calls else "",
                    number(row.get("all_reduce_us"), 1, " µs"),
                    number(found.get("first_call_seconds"), 0, " s"),
                )


def speculation(files: dict[str, Any]) -> Rows:
    """Of each kind of drafts: steps in a row, the replay, and how many times as many tokens a second as plain steps."""
    data = [result for file in files.values() for result in file["results"]]
    shares = list(
        dict.fromkeys(row["acceptance"] for d in data for r in d["results"] for row in r["drafts"] if row["acceptance"] != OWN)
    )
    heads = ("plain step", "step with drafts", "replay", "limit")
    yield ("model", "drafts", *heads, *(f"speed at {s:g}" for s in shares))
    for d in data:
        for r in d["results"]:
            if "step_ms" not in r:  # the run ended before it was timed
                continue
            ms = [number(r[name], 2, " ms") for name in ("step_ms", "verify_ms")]
            us = [number(1e3 * r[name], 0, " µs") for name in ("replay_ms", "replay_limit_ms")]
            speeds = {row["acceptance"]: row["speedup"] for row in r["drafts"]}
            yield (
                named(d["arguments"]["model"]),
                f"`{r['speculate']}`",
                *ms,
                *us,
                *(number(speeds.get(s), 2, " ×") for s in shares),
            )


def prefix(files: dict[str, Any]) -> Rows:
    """The time to the first token behind a known prefix, by kind of cache."""
    yield ("model", "cache", "tails", "tokens known", "first token", "least", "most")
    for file in files.values():
        given = file["arguments"]
        for result in file["results"]:
            for side in result["sides"]:
                for kind, found in side.get("first_token", {}).items():
                    times = [number(found[name], 1, " ms") for name in ("ms", "ms_min", "ms_max")]
                    how = "yes, ahead" if given.get("ahead") else "yes"
                    tails = how if given["tails"] and kind == "static" else "no"
                    yield named(result["model"]), kind, tails, number(found["tokens_taken"], 0), *times


TABLES: dict[str, tuple[Callable[[dict[str, Any]], Rows], str]] = {
    "results": (results, "decode.py, step.py, prefill.py and engines.py"),
    "decode": (decode, "decode.py"),
    "steps": (steps, "step.py"),
    "step": (step, "step.py"),
    "experts": (experts, "experts.py"),
    "linears": (linears, "gemm.py"),
    "prompts": (prompts, "prefill.py"),
    "prompt": (prompt, "prompt.py"),
    "chunk": (chunk, "chunk.py"),
    "mixer": (mixer, "mixer.py"),
    "attention": (attention, "attention.py"),
    "launch": (launch, "launch.py"),
    "drift": (drift, "drift.py"),
    "accuracy": (accuracy, "accuracy.py"),
    "engines": (engines, "engines.py"),
    "tokens": (tokens, "tokens.py"),
    "ranks": (ranks, "gdnfuse bench --tensor-parallel"),
    "speculation": (speculation, "speculation.py"),
    "prefix": (prefix, "prefix.py"),
}


def measured_on(machine: dict[str, Any]) -> str:
    where = machine["gpu"] or f"a CPU with {machine['cpu_threads']} threads"
    names = VERSIONS | {"fla": "flash-linear-attention", "vllm": "vLLM", "gdnfuse": "gdnfuse"}
    return ", ".join([where, *(f"{name} {machine[key]}" for key, name in names.items() if machine.get(key))])


def conditions(files: dict[str, Any], page: Path) -> str:
    """What the files were measured on. Files with equal conditions share a line."""
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for name, data in files.items():
        said = {key: data["machine"].get(key) for key in ("gpu", *VERSIONS, "vllm", "gdnfuse")}
        said = {key: value for key, value in said.items() if value} | {"cpu_threads": data["machine"].get("cpu_threads")}
        if "engine" not in data:
            said.setdefault("gdnfuse", FIRST)
        said.setdefault("gpu", None)
        link = f"[{name}]({os.path.relpath(RESULTS / name, page.parent)})"
        for machine, links in groups:
            if all(machine.get(key, value) == value for key, value in said.items() if key != "cpu_threads"):
                machine |= said
                links.append(link)
                break
        else:
            groups.append((said, [link]))
    return "".join(f"\nMeasured on {measured_on(machine)}: {', '.join(links)}.\n" for machine, links in groups)


def rendered(kind: str, names: Sequence[str], folder: Path, page: Path) -> str:
    """The text between the marks of a page: the table, then what each file was measured on."""
    table, script = TABLES[kind]
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        by = script if script.startswith("gdnfuse") else f"benchmarks/{script}"
        return f"Not measured on this version yet: {', '.join(absent)}, by `{by}`.\n"
    files = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in names}
    head, *rows = table(files)
    filled = [i for i, _ in enumerate(head) if not rows or any(row[i] for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    text = "".join("| " + " | ".join(line[i] for i in filled) + " |\n" for line in lines)
    return text + conditions(files, page)


def filled(page: Path, folder: Path) -> str:
    def block(found: re.Match[str]) -> str:
        kind, *names = found["ask"].split()
        if kind not in TABLES:
            sys.exit(f"A table of figures must be one of {', '.join(TABLES)}. {page.name} asks for {kind}. Correct its comment.")
        return found["start"] + rendered(kind, names, folder, page) + found["end"]

    return BLOCK.sub(block, page.read_text(encoding="utf-8"))


def draw(pages: Sequence[Path], folder: Path) -> None:
    import plot

    for stem in sorted({stem for page in pages for stem in PLOT.findall(page.read_text(encoding="utf-8"))}):
        kind = max((kind for kind in plot.PLOTS if stem.startswith(kind)), key=len)
        plot.plot(kind, folder / f"{stem}.json", folder / "plots" / f"{stem}.png")


def older(folder: Path) -> list[str]:
    """The command of each result that another version of gdnfuse has measured, so that all can be of one."""
    found = []
    for file in sorted(folder.glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        if "engine" not in data and data["machine"].get("gdnfuse", FIRST) != version("gdnfuse"):
            found.append(data.get("command") or f"# {file.name} has no command")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if a page differs")
    parser.add_argument("--no-plots", action="store_true", help="write the tables alone")
    parser.add_argument(
        "--older", action="store_true", help="print how results of other versions were measured, and write nothing"
    )
    args = parser.parse_args(argv)
    if args.older:
        print("\n".join(older(RESULTS)))
        return 0
    stale = [page for page in PAGES if filled(page, RESULTS) != page.read_text(encoding="utf-8")]
    if args.check:
        for page in stale:
            print(f"{page.relative_to(ROOT)} must have the figures of its JSON files, and has others. Run: make figures")
        return bool(stale)
    for page in stale:
        page.write_text(filled(page, RESULTS), encoding="utf-8")
        print(page.relative_to(ROOT))
    if not args.no_plots:
        draw(PAGES, RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
