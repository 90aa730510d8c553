"""Models in formats of quantised weights beside the same model in bfloat16: decode steps, prompts, and memory.

    python benchmarks/quantized.py --models 4b,9b,27b,35b-a3b --json quantized.json
    python benchmarks/quantized.py --models 4b --formats fp8,int4 --batch 32
    python benchmarks/quantized.py --models tiny --dtype float32 --formats bf16,int8 --steps 16 --prompts 70       (any machine)

Formats are those of `gdnfuse bench --quantize`, and bf16 for the model as it is. Steps are built, checked and timed as decode.py
does it, with its cache, modes and limits, which count the bytes that are stored; a side whose logits are wrong has no speed. Then
the side is called with prompts as prefill.py does it, after two short ones that compile: the figure is the median of prompts of
one length. Of FP8 with blocks or one scale Inductor is no side, because transformers' linears need kernels of the hub.

Memory is what the device holds behind all this, caches dropped, beside what the model's weights are.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from decode import BLOCK, DTYPES, SHARED, build, caches, checked, compiled, own_calls, reference, room, timed
from prefill import PROMPTS, SHORT, prompt
from tabulate import tabulate

from gdnfuse.bench.measure import machine, seconds
from gdnfuse.bench.workers import answer, run_sides, show_fla
from gdnfuse.models import OF_TRANSFORMERS, QUANTIZED

SIDES = ("inductor", "gdnfuse")
PLAIN = "bf16"  # the model as it is, in whatever dtype


def sides_of(format: str, sides: Sequence[str]) -> list[str]:
    """Those that run a model of a format."""
    return [side for side in sides if side != "inductor" or QUANTIZED.get(format) not in OF_TRANSFORMERS]


def run_side(side: str, name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The row of a side, without a speed if its logits are wrong."""
    show_fla(side)
    model, cuda = build(name, getattr(torch, args.dtype), args.device, args.quantize), args.device == "cuda"
    stored = sum({p.data_ptr(): p.nbytes for p in model.state_dict().values()}.values())
    row: dict[str, Any] = {"side": side, "stored_bytes": stored}
    shared = torch.load(folder / SHARED, map_location="cpu")
    with caches(None), own_calls(side, model):
        decode, tokens, found = checked(side, model, args, shared, room(args))
        row |= found
        if found["accurate"]:
            row |= timed(decode, args, tokens, args.steps)
            row["prompt_ms"] = prompts(side, model, args)
    del decode
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        row["held_bytes"] = torch.cuda.memory_allocated()
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def prompts(side: str, model: torch.nn.Module, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a prompt, by its length."""
    generator = torch.Generator(args.device).manual_seed(1)
    longest = max(*args.prompts, *SHORT)
    tokens = torch.randint(0, model.config.vocab_size, (args.batch, longest), device=args.device, generator=generator)
    call = compiled(side, model, "default")
    for length in SHORT:
        prompt(model, call, tokens[:, :length])
    found = {}
    for length in args.prompts:
        prompt(model, call, tokens[:, :length])
        times = [seconds(lambda n=length: prompt(model, call, tokens[:, :n]), args.device) for _ in range(PROMPTS)]
        found[str(length)] = 1e3 * statistics.median(times)
    return found


def table(results: Sequence[dict[str, Any]], lengths: Sequence[int]) -> str:
    """The formats of one model."""
    rows = []
    for result in results:
        for row in result["sides"]:
            ms, held = row.get("ms"), row.get("held_bytes")
            rows.append(
                [
                    result["format"],
                    row["side"],
                    f"{ms:.3f}" if ms else row.get("failed", "refused: logits are wrong"),
                    f"{100 * result['limit_ms'] / ms:.0f} %" if ms else "",
                    *(f"{row['prompt_ms'][str(n)]:.1f}" if ms else "" for n in lengths),
                    f"{row['stored_bytes'] / 2**30:.2f}" if "stored_bytes" in row else "",
                    f"{(held - row['stored_bytes']) / 2**30:+.2f}" if held is not None else "",
                    f"{row['error']:.1e} / {result['eager_error']:.1e}" if "error" in row else "",
                ]
            )
    first = results[0]
    prompted = [f"{n} tokens (ms)" for n in lengths]
    headers = [
        "format",
        "side",
        "ms per step",
        "of the weights' limit",
        *prompted,
        "weights GiB",
        "held besides",
        "error / eager's",
    ]
    return f"{first['model']}, batch {first['batch']}\n{tabulate(rows, headers, disable_numparse=True)}"


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="4b", help="presets, config files or `tiny`, by comma")
    parser.add_argument("--formats", default=",".join((PLAIN, *QUANTIZED)), help=f"of {', '.join((PLAIN, *QUANTIZED))}, by comma")
    parser.add_argument("--sides", default=",".join(SIDES), help=f"of {', '.join(SIDES)}")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--prompt", type=int, default=128, help="tokens before the steps")
    parser.add_argument("--prompts", default="4096", help="tokens of the prompts that are timed, by comma")
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="that a side's process may take, or the reference's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    parser.add_argument("--quantize", choices=[*QUANTIZED], help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sides, formats, worker = args.sides.split(","), args.formats.split(","), args.__dict__.pop("worker")
    for option, found, valid in (("--sides", sides, SIDES), ("--formats", formats, (PLAIN, *QUANTIZED))):
        if unknown := set(found) - set(valid):
            parser.error(f"{option} must be of {', '.join(valid)}, found {', '.join(sorted(unknown))}")
    if args.steps < 2 * BLOCK:
        parser.error(f"--steps must be at least {2 * BLOCK}")
    if min(args.batch, args.prompt) < 1 or args.warmup < 0:
        parser.error("--batch and --prompt must be at least 1, and --warmup at least 0")
    lengths = args.prompts.split(",")
    if not all(n.isdecimal() and int(n) for n in lengths):
        parser.error(f"--prompts must be numbers of tokens by comma, found {args.prompts}")
    args.prompts = [int(n) for n in lengths]
    args.cache, args.mode, args.lora = "static", "reduce-overhead", None
    transformers.utils.logging.set_verbosity_error()
    if worker:
        side, name, folder = worker
        how = reference if side == "reference" else lambda *given: run_side(side, *given)
        answer(lambda: how(name, args, Path(folder)))
        return 0

    command = shlex.join(["python", "benchmarks/quantized.py", *argv])
    data: dict[str, Any] = {"command": command, "machine": machine(), "arguments": vars(args), "results": []}
    for name in args.models.split(","):
        of_model = []
        for format in formats:
            given = argv if format == PLAIN else [*argv, "--quantize", format]
            first, rows = run_sides(
                [__file__], name, sides_of(format, sides), given, title=f"{name}, {format}", timeout=args.timeout
            )
            of_model.append({"model": name, "format": format, "batch": args.batch, **first.get("facts", {}), "sides": rows})
            data["results"].append(of_model[-1])
            if args.json:
                Path(args.json).write_text(json.dumps(data, indent=1))
        print(table(of_model, args.prompts), end="\n\n", flush=True)
    silent = [(r, row) for r in data["results"] for row in r["sides"] if "ms" not in row]
    for r, row in silent:
        reason = row.get("failed", "its logits are too far from float32's or not finite.")
        print(f"No speed reported of {r['model']} in {r['format']}, {row['side']}: {reason}", file=sys.stderr)
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main())
