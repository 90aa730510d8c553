"""The whole prefill: milliseconds per prompt of eager, eager with flash-linear-attention, Inductor and gdnfuse.

    python benchmarks/prefill.py --models 4b --lengths 4096,16384 --json prefill.json
    python benchmarks/prefill.py --models 4b --lengths 4096 --sides gdnfuse --quantize fp8 --activations fp8
    python benchmarks/prefill.py --models 4b --lengths 4096 --batch 4 --cache static --padded --sides eager,gdnfuse,kernel
    python benchmarks/prefill.py --models tiny --lengths 70,300 --dtype float32 --device cpu --sides eager,gdnfuse

Weights are random, of the published shapes. Each side runs in a process of its own (see gdnfuse/bench/workers.py). A prompt goes
through the model into a new dynamic cache, the logits of its last token are kept. Compiled sides are called with two short
prompts first, which gives one graph for a fixed and one for any length; their first calls, Inductor's cache being empty, are the
cold figures. Times are medians over PROMPTS prompts of one length, each waited for, and, as chats have it, over NEW prompts of
lengths that this process has not met, one token apart. No speed is reported for a side whose logits on CHECKED
tokens are off float32's by more than SLACK times eager's (see gdnfuse/bench/measure.py). For that the routing of a mixture of
experts is held fixed (see benchmarks/routing.py); the prompts that are timed have random routers.

With --cache static there is one static cache for all prompts, as long as the longest. It held a prompt before and is reset
before each. With --padded the first columns of a batch are padding: none of its first sequence, nearly half of its last. Logits
are compared where there is none. The side "kernel" is gdnfuse with the kernel of prompt_attention, which is for such prompts and
off by default.

With --quantize the linears have quantised weights, and logits are compared with those of the dequantised weights. With
--activations fp8 linears also quantise their input, as transformers' FP8Linear does. Then float32's logits and eager's are of a
model whose linears do that too. So eager's error is that of the roundings of bfloat16 ahead of those to e4m3: a number that is
rounded the other way differs by a step of e4m3. This error is many times that of a model which leaves activations in bfloat16,
and "off_unquantised" is the distance of a side to such a model in float32. The row of a side says how many of its linears are
computed by what.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import routing
import together
import torch
import transformers
from decode import SHARED, build, own_calls
from tabulate import tabulate
from torch._inductor.utils import fresh_cache

import gdnfuse
from gdnfuse.bench.measure import compare_logits, difference, machine, seconds, widen
from gdnfuse.bench.workers import answer, fla_version, run_sides, show_fla
from gdnfuse.generation.caches import cache_argument
from gdnfuse.models import OF_TRANSFORMERS, QUANTIZED, dequantized_calls
from gdnfuse.passes.lift import prompt_attention
from gdnfuse.report.records import GraphReport

SIDES = ("eager", "fla", "inductor", "gdnfuse", "kernel")
OURS = ("gdnfuse", "kernel")
CHECKED = 300
PROMPTS, NEW = 7, 3
SHORT = (200, 333)  # the prompts that compile


def prompt(
    model: torch.nn.Module,
    call: Callable[..., Any],
    tokens: torch.Tensor,
    keep: int = 1,
    cache: Any = None,
    padded: bool = False,
) -> torch.Tensor:
    """Logits of the last tokens [B, T] of a prompt, into a static cache that was reset or into a new dynamic one."""
    held = cache_argument(model, transformers.DynamicCache(config=model.config) if cache is None else cache)
    mask = shown(tokens).long() if padded else None
    return call(tokens, attention_mask=mask, **held, use_cache=True, logits_to_keep=keep).logits


def shown(tokens: torch.Tensor) -> torch.Tensor:
    """Which tokens [B, T] are no padding: all of the first sequence, half and a little more of the last."""
    B, T = tokens.shape
    hidden = torch.arange(B, device=tokens.device) * T // (2 * B)
    return torch.arange(T, device=tokens.device) >= hidden[:, None]


def static_cache(model: torch.nn.Module, tokens: torch.Tensor) -> Any:
    """A static cache for tokens [B, T] that has held a short prompt."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=tokens.shape[1])
    prompt(model, model, tokens[:, :8], cache=cache)
    return cache


def reset(cache: Any) -> None:
    if cache is not None:
        cache.reset()


def compiled(side: str, model: torch.nn.Module, activations: str | None) -> Callable[..., Any]:
    if side in ("eager", "fla"):
        return model
    options = {"activations": activations} if side in OURS and activations else None
    return torch.compile(model, backend="gdnfuse" if side in OURS else side, options=options, fullgraph=side in OURS)


def worker(side: str, name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The row of a side. For "reference" the machine, and in `folder` the logits that sides are compared with."""
    show_fla(side)
    transformers.utils.logging.set_verbosity_error()
    model = build(name, getattr(torch, args.dtype), args.device, args.quantize, hold_routing=True)
    generator = torch.Generator(args.device).manual_seed(1)
    longest = max(*args.lengths, *SHORT, CHECKED)
    tokens = torch.randint(0, model.config.vocab_size, (args.batch, longest), device=args.device, generator=generator)

    def new_cache() -> Any:
        return static_cache(model, tokens) if args.cache == "static" else None

    def run(call: Callable[..., Any], cache: Any, length: int, keep: int = 1) -> torch.Tensor:
        return prompt(model, call, tokens[:, :length], keep, cache, args.padded)

    def checked(call: Callable[..., Any], cache: Any) -> torch.Tensor:
        reset(cache)
        logits = run(call, cache, CHECKED, CHECKED)
        return logits[shown(tokens[:, :CHECKED])] if args.padded else logits

    def timed(call: Callable[..., Any], cache: Any, length: int) -> float:
        reset(cache)
        return seconds(lambda: run(call, cache, length), args.device)

    if side == "reference":
        with dequantized_calls(model, args.activations):
            eager = checked(model, new_cache())
            widen(model)
            exact = checked(model, new_cache())
        shared = {"exact": exact, "eager_error": difference(eager, exact)}
        if args.activations:
            with dequantized_calls(model):
                shared["unquantised"] = checked(model, new_cache())
        torch.save(shared, folder / SHARED)
        return {"machine": machine()}
    prompt_attention.KERNEL = prompt_attention.KERNEL or side == "kernel"
    call = compiled(side, model, args.activations)
    row: dict[str, Any] = {"side": side}
    if side == "fla":
        row["fla"] = fla_version()
    with fresh_cache(), own_calls("gdnfuse" if side in OURS else side, model, args.activations):
        cache = new_cache()
        first = [timed(call, cache, n) for n in SHORT]
        if together.quiet():
            row["first_calls_seconds"] = first
        saved = torch.load(folder / SHARED)
        logits = checked(call, cache)
        found = compare_logits(logits, saved["exact"], saved["eager_error"])
        row["error"], row["eager_error"] = found["error"], saved["eager_error"]
        if "unquantised" in saved:
            row["off_unquantised"] = difference(logits, saved["unquantised"])
        row["graphs"] = [report.summary() for report in gdnfuse.reports()]
        row["linears"] = computed_by(gdnfuse.reports())
        row["attention"] = attention(gdnfuse.reports())
        routing.put_back(model)
        if found["accurate"]:
            together.turn()
            row["ms"], row["ms_new_length"] = {}, {}
            for length in args.lengths:
                new = [1e3 * timed(call, cache, length - i) for i in range(1, NEW + 1)]
                row["ms_new_length"][str(length)] = statistics.median(new)
                timed(call, cache, length)
                row["ms"][str(length)] = statistics.median(1e3 * timed(call, cache, length) for _ in range(PROMPTS))
    if args.device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def computed_by(reports: Sequence[GraphReport]) -> dict[str, int]:
    """How many linears of the last prompt's graph are computed by what."""
    found: Counter[str] = Counter()
    for projection in [p for report in reports[-1:] for p in report.projections]:
        found[projection.computed] += len(projection.paths)
    return dict(found)


def attention(reports: Sequence[GraphReport]) -> dict[str, int]:
    """How many attentions of the last prompt's graph are which op, computed by what."""
    records = [r for report in reports[-1:] for r in report.all_records if r.stage == "lower" and "attention" in r.rule]
    return dict(Counter(f"{r.rule} ({r.chosen})" for r in records))


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
    parser.add_argument("--cache", default="dynamic", choices=("dynamic", "static"), help="a static one was filled before")
    parser.add_argument("--padded", action="store_true", help="left-pad the sequences of a batch")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quantize", choices=[*QUANTIZED], help="quantise the linears to this format first")
    parser.add_argument("--activations", choices=["fp8"], help="quantise the activations too, of linears in fp8 or fp8-tensor")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sides, args.lengths = args.sides.split(","), [int(n) for n in args.lengths.split(",")]
    if unknown := set(sides) - set(SIDES):
        parser.error(f"unknown sides {', '.join(sorted(unknown))}; the valid ones are {', '.join(SIDES)}")
    if args.activations and QUANTIZED.get(args.quantize) not in OF_TRANSFORMERS:
        parser.error(f"--activations needs --quantize fp8 or fp8-tensor, found {args.quantize}")
    if args.padded and args.batch < 2:
        parser.error(f"--padded needs a --batch of at least 2, found {args.batch}")
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
        about = {"quantize": args.quantize, "activations": args.activations}
        how = {"cache": args.cache, "padded": args.padded}
        said = [f"{option} {value}" for option, value in about.items() if value]
        said += [word for word, so in (("static cache", args.cache == "static"), ("padded", args.padded)) if so]
        title = ", ".join([name, *said])
        data["results"].append({"model": name, "batch": args.batch, **about, **how, "sides": rows})
        print(table(title, rows, args.lengths), end="\n\n", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(data, indent=1))
    return 0 if all("ms" in row for result in data["results"] for row in result["sides"]) else 1


if __name__ == "__main__":
    sys.exit(main())
