"""The whole prefill: milliseconds per prompt of eager, eager with flash-linear-attention, Inductor and gdnfuse.

    python benchmarks/prefill.py --models 4b --lengths 4096,16384 --json prefill.json
    python benchmarks/prefill.py --models tiny --lengths 70,300 --dtype float32 --device cpu --sides eager,gdnfuse

Weights are random, of the published shapes. Each side runs in a process of its own (see gdnfuse/bench/workers.py). A prompt goes
through the model into a new dynamic cache, the logits of its last token are kept. Compiled sides are called with two short
prompts first, which gives one graph for a fixed and one for any length; their first calls, Inductor's cache being empty, are the
cold figures. Times are medians over PROMPTS prompts of one length, each waited for, and, as chats have it, over NEW prompts of
lengths that this process has not met, one token apart. No speed is reported for a side whose logits on CHECKED
tokens are off float32's by more than SLACK times eager's (see gdnfuse/bench/measure.py). For that the routing of a mixture of
experts is held fixed (see benchmarks/routing.py); the prompts that are timed have random routers.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import routing
import torch
import transformers
from decode import SHARED, build
from tabulate import tabulate
from torch._inductor.utils import fresh_cache

import gdnfuse
from gdnfuse.bench.measure import compare_logits, difference, machine, seconds, widen
from gdnfuse.bench.workers import answer, fla_version, run_sides, show_fla
from gdnfuse.generation.caches import cache_argument

SIDES = ("eager", "fla", "inductor", "gdnfuse")
CHECKED = 300
PROMPTS, NEW = 7, 3
SHORT = (200, 333)  # the prompts that compile


def prompt(model: torch.nn.Module, call: Callable[..., Any], tokens: torch.Tensor, keep: int = 1) -> torch.Tensor:
    """Logits of the last tokens [B, T] of a prompt, into a new dynamic cache."""
    held = cache_argument(model, transformers.DynamicCache(config=model.config))
    return call(tokens, **held, use_cache=True, logits_to_keep=keep).logits


def worker(side: str, name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The row of a side. For "reference" the machine, and in `folder` the logits that sides are compared with."""
    show_fla(side)
    transformers.utils.logging.set_verbosity_error()
    model = build(name, getattr(torch, args.dtype), args.device, hold_routing=True)
    generator = torch.Generator(args.device).manual_seed(1)
    longest = max(*args.lengths, *SHORT, CHECKED)
    tokens = torch.randint(0, model.config.vocab_size, (args.batch, longest), device=args.device, generator=generator)

    def run(call: Callable[..., Any], length: int, keep: int = 1) -> torch.Tensor:
        return prompt(model, call, tokens[:, :length], keep)

    if side == "reference":
        eager = run(model, CHECKED, CHECKED)
        widen(model)
        exact = run(model, CHECKED, CHECKED)
        torch.save({"exact": exact, "eager_error": difference(eager, exact)}, folder / SHARED)
        return {"machine": machine()}
    call = model if side in ("eager", "fla") else torch.compile(model, backend=side, fullgraph=side == "gdnfuse")
    row: dict[str, Any] = {"side": side}
    if side == "fla":
        row["fla"] = fla_version()
    with fresh_cache():
        row["first_calls_seconds"] = [seconds(lambda n=n: run(call, n), args.device) for n in SHORT]
        saved = torch.load(folder / SHARED)
        found = compare_logits(run(call, CHECKED, CHECKED), saved["exact"], saved["eager_error"])
        row["error"], row["eager_error"] = found["error"], saved["eager_error"]
        row["graphs"] = [report.summary() for report in gdnfuse.reports()]
        routing.put_back(model)
        if found["accurate"]:
            row["ms"], row["ms_new_length"] = {}, {}
            for length in args.lengths:
                new = [1e3 * seconds(lambda n=length - i: run(call, n), args.device) for i in range(1, NEW + 1)]
                row["ms_new_length"][str(length)] = statistics.median(new)
                run(call, length)
                row["ms"][str(length)] = statistics.median(
                    1e3 * seconds(lambda n=length: run(call, n), args.device) for _ in range(PROMPTS)
                )
    if args.device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def table(name: str, rows: Sequence[dict[str, Any]], lengths: Sequence[int]) -> str:
    lines = []
    for row in rows:
        times = (
            [f"{row[of][str(n)]:.1f}" for n in lengths for of in ("ms", "ms_new_length")]
            if "ms" in row
            else [row.get("failed", "logits are wrong")] * 2 * len(lengths)
        )
        cold = " + ".join(f"{s:.1f}" for s in row.get("first_calls_seconds", ()))
        error = f"{row['error']:.1e} / {row['eager_error']:.1e}" if "error" in row else ""
        lines.append([row["side"], *times, cold, f"{row.get('peak_gib', 0):.1f}", error])
    headers = [
        "side",
        *(f"{n} tokens (ms{new})" for n in lengths for new in ("", ", a new length")),
        "first calls (s)",
        "peak GiB",
        "error / eager's",
    ]
    return f"{name}\n{tabulate(lines, headers, disable_numparse=True)}"


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="4b", help="presets, config files or `tiny`, by comma")
    parser.add_argument("--sides", default="eager,fla,inductor,gdnfuse", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--lengths", default="4096,16384", help="tokens per prompt, by comma")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sides, args.lengths = args.sides.split(","), [int(n) for n in args.lengths.split(",")]
    if unknown := set(sides) - set(SIDES):
        parser.error(f"unknown sides {', '.join(sorted(unknown))}; the valid ones are {', '.join(SIDES)}")
    if args.worker:
        side, name, folder = args.worker
        answer(lambda: worker(side, name, args, Path(folder)))
        return 0

    data: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/prefill.py", *argv]),
        "arguments": {name: value for name, value in vars(args).items() if name != "worker"},
        "machine": {},
        "results": [],
    }
    for name in args.models.split(","):
        first, rows = run_sides([__file__], name, sides, argv)
        data["machine"] |= first["machine"]
        data["results"].append({"model": name, "batch": args.batch, "sides": rows})
        print(table(name, rows, args.lengths), end="\n\n", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(data, indent=1))
    return 0 if all("ms" in row for result in data["results"] for row in result["sides"]) else 1


if __name__ == "__main__":
    sys.exit(main())
