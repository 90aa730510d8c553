"""The whole decode step: milliseconds per step, tokens per second, cold compile time and peak memory of each side.

    python benchmarks/decode.py --models 0.8b,4b --sides fla,inductor,gdnfuse --json decode.json
    python benchmarks/decode.py --models 4b --cache dynamic --json decode_dynamic.json
    python benchmarks/decode.py --models tiny --dtype float32 --steps 16       (any machine)

Sides: eager, fla (eager with flash-linear-attention), inductor, max-autotune and gdnfuse, each in a process of its own (see
gdnfuse/bench/workers.py). Weights are random, of the published shapes, and built on the device from one seed. Every side decodes
the same tokens from the same eager prefill into a cache: a static one, with CUDA graphs, or, as generate() has it if told
nothing, a dynamic one without. Times are medians over blocks of BLOCK steps, each block between two events with nothing waited
for inside, as a decode loop runs. No speed is reported for a side whose logits are wrong: their relative error against the same
weights run in float32 must stay within SLACK times eager's own (see gdnfuse/bench/measure.py).
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate
from torch._inductor.utils import fresh_cache
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import gdnfuse
from gdnfuse.bench.measure import BLOCK, Decoder, difference, machine, right, synchronize, time_steps, weight_bytes, widen
from gdnfuse.bench.workers import answer, fla_version, run_sides, show_fla
from gdnfuse.huggingface import load_config, random_model

SIDES = ("eager", "fla", "inductor", "max-autotune", "gdnfuse")
BYTES_PER_SECOND = 4.3e12  # what an H200 streams, measured with a copy
DTYPES = ("float32", "bfloat16", "float16")
CHECKED = 8  # steps whose logits are compared
PROFILED = 2  # steps whose kernels are counted
EAGER_STEPS = 16  # timed of the sides that are not compiled
SHARED = "reference.pt"  # tokens and logits that all sides of a model share


def build(name: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = load_config("0.8b" if name == "tiny" else name)
    if name == "tiny":
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 512, "head_dim": 32}
        small |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
        for key, size in {**small, "num_attention_heads": 2, "num_key_value_heads": 1}.items():
            setattr(config, key, size)
        config.layer_types = config.layer_types[:4]
    return random_model(config, dtype, device)


def compiled(side: str, model: torch.nn.Module, mode: str | None) -> Callable[..., Any]:
    if side in ("eager", "fla"):
        return model
    if side == "max-autotune":
        return torch.compile(model, options={**torch._inductor.list_mode_options("max-autotune")}, fullgraph=True)
    return torch.compile(model, backend=side, mode=mode, fullgraph=True)


def logits(model: torch.nn.Module, args: argparse.Namespace, tokens: torch.Tensor) -> torch.Tensor:
    """Eager logits of the steps that are compared."""
    decode = Decoder(model, model, prompt_of(args, tokens), CHECKED)
    return torch.stack([decode(t).float().cpu() for t in tokens[args.prompt : args.prompt + CHECKED]])


def prompt_of(args: argparse.Namespace, tokens: torch.Tensor) -> torch.Tensor:
    """[B, prompt] of tokens [steps, B, 1]."""
    return tokens[: args.prompt].squeeze(-1).T.contiguous()


def reference(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the tokens, and the logits in the model's dtype and in float32 of those that are compared, for all sides to read."""
    show_fla("reference")
    model = build(name, getattr(torch, args.dtype), args.device)
    count = args.prompt + CHECKED + args.warmup + args.steps
    generator = torch.Generator(args.device).manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (count, args.batch, 1), device=args.device, generator=generator)
    size = weight_bytes(model, args.batch)
    eager = logits(model, args, tokens)
    widen(model)
    expected = logits(model, args, tokens)
    eager_error = difference(eager, expected)
    torch.save({"tokens": tokens, "expected": expected, "eager_error": eager_error}, folder / SHARED)
    limit = 1e3 * size / BYTES_PER_SECOND if args.device == "cuda" else None
    return {"machine": machine(), "facts": {"weight_bytes": size, "limit_ms": limit, "eager_error": eager_error}}


def run_side(side: str, name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compile, check, time: the row of a side, without a speed if its logits are wrong."""
    show_fla(side)
    model, device = build(name, getattr(torch, args.dtype), args.device), args.device
    row: dict[str, Any] = {"side": side}
    if side == "fla":
        row["fla"] = fla_version()
    shared = torch.load(folder / SHARED, map_location="cpu")
    tokens, expected = shared["tokens"].to(device), shared["expected"]
    steps = EAGER_STEPS if side in ("eager", "fla") else args.steps
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with fresh_cache():
        decode = Decoder(
            model,
            compiled(side, model, args.mode),
            prompt_of(args, tokens),
            CHECKED + args.warmup + args.steps + PROFILED,
            dynamic=args.cache == "dynamic",
        )
        synchronize(device)
        start = time.perf_counter()
        first = decode(tokens[args.prompt]).float().cpu()
        compile_seconds = time.perf_counter() - start
        rest = [decode(t).float().cpu() for t in tokens[args.prompt + 1 : args.prompt + CHECKED]]
        got = torch.stack([first, *rest])
        found = right(got, expected, shared["eager_error"])
        row |= {
            "first_call_seconds": compile_seconds,
            "error": found["error"],
            "finite": found["finite"],
            "summary": gdnfuse.reports()[-1].summary() if gdnfuse.reports() else "",
        }
        if found["right"]:
            at = args.prompt + CHECKED
            for t in tokens[at : at + args.warmup]:
                decode(t)
            synchronize(device)
            times = time_steps(decode, tokens[at + args.warmup : at + args.warmup + steps], device)
            deciles = statistics.quantiles(times, n=10, method="inclusive")
            ms = statistics.median(times)
            row |= {"ms": ms, "ms_p10": deciles[0], "ms_p90": deciles[-1], "steps": steps}
            row["tokens_per_second"] = 1e3 * args.batch / ms
            if device == "cuda":
                row["kernels_per_step"] = kernels(decode, tokens[:PROFILED])
    if device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def kernels(decode: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> float:
    """Kernels and copies that the device runs per step, those of CUDA graphs included."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for token in tokens:
            decode(token)
        torch.cuda.synchronize()
    return sum(e.device_type == DeviceType.CUDA for e in profiler.events()) / len(tokens)


def table(result: dict[str, Any]) -> str:
    rows = []
    for row in result["sides"]:
        ms = row.get("ms")
        share = f"{100 * result['limit_ms'] / ms:.0f} %" if ms and result.get("limit_ms") else ""
        rows.append(
            [
                row["side"],
                f"{ms:.3f}" if ms else row.get("failed", "refused: logits are wrong"),
                f"{row['tokens_per_second']:.0f}" if ms else "",
                share,
                f"{row['kernels_per_step']:.0f}" if "kernels_per_step" in row else "",
                f"{row['first_call_seconds']:.1f}" if "error" in row else "",
                f"{row['peak_gib']:.2f}" if "peak_gib" in row else "",
                f"{row['error']:.1e} / {result['eager_error']:.1e}" if "error" in row else "",
            ]
        )
    head = f"{result['model']}, batch {result['batch']}, {result['cache']} cache"
    if result.get("limit_ms"):
        head += f": {result['weight_bytes'] / 1e9:.2f} GB of weights a step, {result['limit_ms']:.2f} ms at 4.3 TB/s"
    headers = [
        "side",
        "ms per step (median)",
        "tokens/s",
        "of the limit",
        "kernels",
        "cold first call (s)",
        "peak GiB",
        "error / eager's",
    ]
    return f"{head}\n{tabulate(rows, headers, disable_numparse=True)}"


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="0.8b,4b", help="presets, config files or `tiny`, by comma")
    parser.add_argument("--sides", default="eager,inductor,gdnfuse", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--cache", default="static", choices=("static", "dynamic"))
    parser.add_argument("--mode", help="Inductor's mode, for inductor and gdnfuse: reduce-overhead, with a dynamic cache default")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sides, worker = args.sides.split(","), args.__dict__.pop("worker")
    args.mode = args.mode or {"static": "reduce-overhead", "dynamic": "default"}[args.cache]
    if unknown := set(sides) - set(SIDES):
        parser.error(f"unknown sides {', '.join(sorted(unknown))}; the valid ones are {', '.join(SIDES)}")
    if args.steps < 2 * BLOCK:
        parser.error(f"--steps must be at least {2 * BLOCK}")
    if min(args.batch, args.prompt) < 1 or args.warmup < 0:
        parser.error("--batch and --prompt must be at least 1, and --warmup at least 0")
    transformers.utils.logging.set_verbosity_error()
    if worker:
        side, name, folder = worker
        if side == "reference":
            answer(lambda: reference(name, args, Path(folder)))
        else:
            answer(lambda: run_side(side, name, args, Path(folder)))
        return 0

    command = shlex.join(["python", "benchmarks/decode.py", *argv])
    data: dict[str, Any] = {"command": command, "machine": {}, "arguments": vars(args), "results": []}
    for name in args.models.split(","):
        first, rows = run_sides([__file__], name, sides, argv)
        data["machine"] |= first["machine"]
        data["results"].append({"model": name, "batch": args.batch, "cache": args.cache, **first.get("facts", {}), "sides": rows})
        print(table(data["results"][-1]), end="\n\n", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(data, indent=1))
    silent = [(r["model"], row) for r in data["results"] for row in r["sides"] if "ms" not in row]
    for model, row in silent:
        reason = row.get("failed", "its logits are too far from float32's or not finite.")
        print(f"No speed reported of {model}, {row['side']}: {reason}", file=sys.stderr)
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main())
