"""The whole decode step: milliseconds per step, tokens per second, cold compile time and peak memory of each side.

    python benchmarks/decode.py --models 0.8b,4b --sides fla,inductor,gdnfuse --json decode.json
    python benchmarks/decode.py --models 4b --cache dynamic --json decode_dynamic.json
    python benchmarks/decode.py --models 4b --sides inductor,gdnfuse --second --timeout 300
    python benchmarks/decode.py --models 4b --lora 16:2                       (two adapters of rank 16 on every projection)
    python benchmarks/decode.py --models tiny --dtype float32 --steps 16       (any machine)

Sides: eager, fla (eager with flash-linear-attention), inductor, max-autotune (with coordinate descent, Inductor's best) and
gdnfuse, each in a process of its own (see gdnfuse/bench/workers.py), whose compile caches are empty. With --second each compiled
side has another process behind it, which finds the caches that the first one left, and whose first call is a column.

Weights are random, of the published shapes, and built on the device from one seed. Every side decodes the same tokens from the
same eager prefill into a cache: a static one, with CUDA graphs, or, as generate() has it if told nothing, a dynamic one without.
Times are medians over blocks of BLOCK steps with nothing waited for inside (see gdnfuse/bench/measure.py). "each waited for" is
the median where the host waits for every step, as generate() does.
No speed is reported for a side whose logits are wrong: their relative error against the same weights run in float32 must stay
within SLACK times eager's own (see gdnfuse/bench/measure.py). For that the routing of a mixture of experts is held fixed (see
benchmarks/routing.py); the steps that are timed have random routers.

A step is compared with two limits, at the rate of a copy, measured in the same run on the same device: every weight read once;
and besides, recurrent and conv states read and written once, and the keys and values of the tokens so far read once.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import routing
import together
import torch
import transformers
from tabulate import tabulate
from torch._inductor.utils import fresh_cache
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import gdnfuse
from gdnfuse.bench.measure import (
    BLOCK,
    Decoder,
    bandwidth,
    compare_logits,
    difference,
    machine,
    state_bytes,
    synchronize,
    time_steps,
    time_waited,
    weight_bytes,
    widen,
)
from gdnfuse.bench.workers import answer, fla_version, run_sides, show_fla
from gdnfuse.models import QUANTIZED, dequantized_calls, load_config, quantized, random_model

SIDES = ("eager", "fla", "inductor", "max-autotune", "gdnfuse")
COMPILED = ("inductor", "max-autotune", "gdnfuse")
SECOND = ":second"  # behind the name of a side, the worker that finds its caches
DTYPES = ("float32", "bfloat16", "float16")
CHECKED = 8  # steps whose logits are compared
WAITED = 16  # steps that are waited for
PROFILED = 2  # steps whose kernels are counted
EAGER_STEPS = 16  # timed of the sides that are not compiled
LIMITS = ("limit_ms", "limit_with_states_ms")
SHARED = "reference.pt"  # tokens, logits and a copy's rate that all sides of a model share


class LoRALinear(torch.nn.Module):
    """A linear under active adapters, which computes what peft's does: base(x) + scaling · B·A·x of one after the other.

    Adapters have the dtype of the base, or another one: peft's are float32 unless it is told otherwise.
    """

    def __init__(self, base: torch.nn.Linear, rank: int, adapters: int, dtype: str | None = None):
        super().__init__()
        factory = {"bias": False, "device": base.weight.device, "dtype": getattr(torch, dtype) if dtype else base.weight.dtype}
        self.base_layer, self.scaling = base, 2.0  # as with lora_alpha = 2 · rank
        self.lora_A = torch.nn.ModuleList(torch.nn.Linear(base.in_features, rank, **factory) for _ in range(adapters))
        self.lora_B = torch.nn.ModuleList(torch.nn.Linear(rank, base.out_features, **factory) for _ in range(adapters))
        for up in self.lora_B:  # so that an adapter adds a tenth or so of what its linear gives
            torch.nn.init.normal_(up.weight, std=0.02 * rank**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = y = self.base_layer(x)
        for down, up in zip(self.lora_A, self.lora_B, strict=True):
            result = result + up(down(x.to(self.lora_A[0].weight.dtype))) * self.scaling
        return result.to(y.dtype)


def adapted(model: torch.nn.Module, lora: tuple[Any, ...]) -> torch.nn.Module:
    """Put adapters on every projection of a model's layers, in place: `lora` is what `rank_and_adapters` returns."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and "_proj" in name.rpartition(".")[2]:
            model.set_submodule(name, LoRALinear(linear, *lora))
    return model.eval().requires_grad_(False)


def rank_and_adapters(given: str) -> tuple[Any, ...]:
    """RANK, RANK:ADAPTERS or RANK:ADAPTERS:DTYPE of an argument: two numbers, and the dtype if it is given."""
    rank, adapters, *dtype = *given.split(":"), *("1" if ":" not in given else ())
    found = int(rank), int(adapters)
    if min(found) < 1 or len(dtype) > 1 or not {*dtype} <= {*DTYPES}:
        raise ValueError(given)
    return *found, *dtype


def build(
    name: str,
    dtype: torch.dtype,
    device: str,
    quantize: str | None = None,
    lora: tuple[Any, ...] | None = None,
    hold_routing: bool = False,
) -> torch.nn.Module:
    """A model with random weights, of which the linears are turned to a format of QUANTIZED, or get adapters.

    `lora` is what `rank_and_adapters` returns. Its own calls dequantise: see `dequantized_calls`. With `hold_routing` its tokens
    choose its experts: see benchmarks/routing.py.
    """
    torch.manual_seed(0)
    config = load_config("0.8b" if name == "tiny" else name)
    if name == "tiny":
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 512, "head_dim": 32}
        small |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
        for key, size in {**small, "num_attention_heads": 2, "num_key_value_heads": 1}.items():
            setattr(config, key, size)
        config.layer_types = config.layer_types[:4]
    model = random_model(config, dtype, device)
    if hold_routing:
        routing.hold(model)
    if quantize:
        model = quantized(model, QUANTIZED[quantize])
        if device == "cuda":
            torch.cuda.empty_cache()  # of the weights that are gone: others may need it
    return adapted(model, lora) if lora else model


def own_calls(side: str, model: torch.nn.Module, activations: str | None = None) -> AbstractContextManager[None]:
    """Of a quantised model, the calls that a side compiles: gdnfuse's are those that users have, which it captures.

    For others, FP8 modules compute what such a captured call does: transformers' own code for them needs a kernel from the hub.
    With `activations` their linears quantise them.
    """
    return nullcontext() if side == "gdnfuse" else dequantized_calls(model, activations)


def compiled(side: str, model: torch.nn.Module, mode: str | None) -> Callable[..., Any]:
    if side in ("eager", "fla"):
        return model
    if side == "max-autotune":
        best = {"max_autotune": True, "coordinate_descent_tuning": True, "triton.cudagraphs": mode != "default"}
        return torch.compile(model, options=best, fullgraph=True)
    return torch.compile(model, backend=side, mode=mode, fullgraph=True)


def aligned(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [steps, B, 1] of which each step's start where an allocation might: others Inductor copies before each step."""
    rows = torch.empty(len(tokens), -(-tokens.shape[1] // 2) * 2, 1, dtype=tokens.dtype, device=tokens.device)
    return rows[:, : tokens.shape[1]].copy_(tokens)


def logits(model: torch.nn.Module, args: argparse.Namespace, tokens: torch.Tensor) -> torch.Tensor:
    """Eager logits of the steps that are compared."""
    decode = Decoder(model, model, prompt_of(args, tokens), CHECKED)
    return torch.stack([decode(t).float().cpu() for t in tokens[args.prompt : args.prompt + CHECKED]])


def prompt_of(args: argparse.Namespace, tokens: torch.Tensor) -> torch.Tensor:
    """[B, prompt] of tokens [steps, B, 1]."""
    return tokens[: args.prompt].squeeze(-1).T.contiguous()


def room(args: argparse.Namespace) -> int:
    """Tokens that a side decodes behind the prompt."""
    return CHECKED + args.warmup + args.steps + WAITED + PROFILED


@contextmanager
def caches(folder: Path | None) -> Iterator[None]:
    """Compile caches, Inductor's and Triton's, of a process in a folder; without one they are empty and go again."""
    if folder is None:
        with fresh_cache():
            yield
        return
    with mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}):
        yield


def reference(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the tokens, and the logits in the model's dtype and in float32 of those that are compared, for all sides to read."""
    show_fla("reference")
    rate = together.rate(lambda: bandwidth(args.device))  # before the model takes the memory
    model = build(name, getattr(torch, args.dtype), args.device, args.quantize, args.lora, hold_routing=True)
    with dequantized_calls(model):
        return _reference(model, rate, args, folder)


def _reference(model: torch.nn.Module, rate: float, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    count = args.prompt + CHECKED + args.warmup + args.steps + WAITED
    generator = torch.Generator(args.device).manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (count, args.batch, 1), device=args.device, generator=generator)
    cache = Decoder(model, model, prompt_of(args, tokens), room(args)).cache
    halfway = args.prompt + CHECKED + args.warmup + args.steps // 2
    facts = limits(weight_bytes(model, args.batch), state_bytes(cache, halfway), rate)
    del cache
    eager = logits(model, args, tokens)
    widen(model)
    expected = logits(model, args, tokens)
    eager_error = difference(eager, expected)
    shared = {"tokens": tokens, "expected": expected, "eager_error": eager_error, "bytes_per_second": rate}
    torch.save(shared, folder / SHARED)
    return {"machine": machine(), "facts": {**facts, "eager_error": eager_error}}


def limits(weights: int, states: int, rate: float) -> dict[str, Any]:
    """What a step has to move, in bytes, and the milliseconds that takes at a rate in bytes per second."""
    return {
        "weight_bytes": weights,
        "state_bytes": states,
        "bytes_per_second": rate,
        "limit_ms": 1e3 * weights / rate,
        "limit_with_states_ms": 1e3 * (weights + states) / rate,
    }


def run_side(worker: str, name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compile, check, time: the row of a side, without a speed if its logits are wrong.

    A second process is not timed beyond its first call: its `kept` caches are those of the first one.
    """
    side = worker.removesuffix(SECOND)
    show_fla(side)
    kept = folder / f"caches_{side}" if args.second and side in COMPILED else None
    complete = folder / f"caches_{side}_complete"
    if worker != side and not complete.exists():
        sys.exit("The first process left no caches.")
    device = args.device
    model = build(name, getattr(torch, args.dtype), device, args.quantize, args.lora, hold_routing=True)
    row: dict[str, Any] = {"side": worker}
    if side == "fla":
        row["fla"] = fla_version()
    shared = torch.load(folder / SHARED, map_location="cpu")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with caches(kept), own_calls(side, model):
        decode, tokens, found = checked(side, model, args, shared, room(args))
        row |= found
        if kept:
            complete.touch()
        routing.put_back(model)
        if found["accurate"] and worker == side:
            row |= timed(decode, args, tokens, EAGER_STEPS if side in ("eager", "fla") else args.steps)
            if device == "cuda":
                row["kernels_per_step"] = kernels(decode, tokens[:PROFILED])
    if device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def checked(
    side: str, model: torch.nn.Module, args: argparse.Namespace, shared: dict[str, Any], room: int
) -> tuple[Decoder, torch.Tensor, dict[str, Any]]:
    """A side's decode after the steps that are compared, the tokens, and of its row what these steps say.

    Args:
        side, model, args: as of `run_side`.
        shared: what `reference` left.
        room: tokens that it will decode in all.
    """
    tokens = aligned(shared["tokens"].to(args.device))
    step = compiled(side, model, args.mode)
    decode = Decoder(model, step, prompt_of(args, tokens), room, dynamic=args.cache == "dynamic")
    synchronize(args.device)
    start = time.perf_counter()
    first = decode(tokens[args.prompt]).float().cpu()
    seconds = time.perf_counter() - start
    rest = [decode(t).float().cpu() for t in tokens[args.prompt + 1 : args.prompt + CHECKED]]
    found = compare_logits(torch.stack([first, *rest]), shared["expected"], shared["eager_error"])
    summary = gdnfuse.reports()[-1].summary() if gdnfuse.reports() else ""
    if together.quiet():
        found["first_call_seconds"] = seconds
    return decode, tokens, {**found, "summary": summary}


def timed(decode: Decoder, args: argparse.Namespace, tokens: torch.Tensor, steps: int) -> dict[str, Any]:
    """Of a row what so many steps say, behind those that are compared and some that are not counted."""
    together.turn()
    at = args.prompt + CHECKED
    for t in tokens[at : at + args.warmup]:
        decode(t)
    synchronize(args.device)
    at += args.warmup
    times = time_steps(decode, tokens[at : at + steps], args.device)
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    ms = statistics.median(times)
    figures = {"ms": ms, "ms_p10": deciles[0], "ms_p90": deciles[-1], "steps": steps}
    figures["waited_ms"] = time_waited(decode, tokens[at + steps : at + steps + WAITED], args.device)
    return figures | {"tokens_per_second": 1e3 * args.batch / ms}


def kernels(decode: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> float:
    """Kernels and copies that the device runs per step, those of CUDA graphs included."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for token in tokens:
            decode(token)
        torch.cuda.synchronize()
    return sum(e.device_type == DeviceType.CUDA for e in profiler.events()) / len(tokens)


def joined(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of sides, each with its second process's first call, or why there is none: it failed, or its logits are wrong."""
    sides = {row["side"]: row for row in rows if not row["side"].endswith(SECOND)}
    for row in rows:
        if row["side"].endswith(SECOND):
            first = sides[row["side"].removesuffix(SECOND)]
            if row.get("accurate"):
                first["second_first_call_seconds"] = row["first_call_seconds"]
            else:
                first["second_failed"] = row.get("failed", "Its logits are too far from float32's or not finite.")
    return list(sides.values())


def table(result: dict[str, Any]) -> str:
    rows, second = [], any("second_first_call_seconds" in row or "second_failed" in row for row in result["sides"])
    for row in result["sides"]:
        ms = row.get("ms")
        shares = [f"{100 * result[name] / ms:.0f} %" if ms and name in result else "" for name in LIMITS]
        again = row.get("second_first_call_seconds")
        rows.append(
            [
                row["side"],
                f"{ms:.3f}" if ms else row.get("failed", "refused: logits are wrong"),
                f"{row['waited_ms']:.3f}" if ms else "",
                f"{row['tokens_per_second']:.0f}" if ms else "",
                *shares,
                f"{row['kernels_per_step']:.0f}" if "kernels_per_step" in row else "",
                f"{row['first_call_seconds']:.1f}" if "first_call_seconds" in row else "",
                *([f"{again:.1f}" if again else "failed" if "second_failed" in row else ""] if second else []),
                f"{row['peak_gib']:.2f}" if "peak_gib" in row else "",
                f"{row['error']:.1e} / {result['eager_error']:.1e}" if "error" in row else "",
            ]
        )
    head = f"{result['model']}, batch {result['batch']}, {result['cache']} cache"
    if "limit_ms" in result:
        weights, states, rate = (result[name] / 1e9 for name in ("weight_bytes", "state_bytes", "bytes_per_second"))
        head += f": {weights:.2f} GB of weights a step, {result['limit_ms']:.2f} ms at {rate:.0f} GB/s, a copy's rate here; "
        head += f"with {states:.3g} GB of states, keys and values {result['limit_with_states_ms']:.2f} ms"
    headers = [
        "side",
        "ms per step (median)",
        "each waited for",
        "tokens/s",
        "of the weights' limit",
        "with states",
        "kernels",
        "cold first call (s)",
        *(["second process (s)"] if second else []),
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
    parser.add_argument("--quantize", choices=[*QUANTIZED], help="turn linears into those of a checkpoint of this format")
    parser.add_argument(
        "--lora", type=rank_and_adapters, metavar="RANK[:ADAPTERS[:DTYPE]]", help="active adapters on every projection"
    )
    parser.add_argument("--cache", default="static", choices=("static", "dynamic"))
    parser.add_argument("--mode", help="Inductor's mode, for inductor and gdnfuse: reduce-overhead, with a dynamic cache default")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--second", action="store_true", help="of each compiled side start a second process too, with its caches")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="that a side's process may take, or the reference's")
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

    processes = [p for side in sides for p in ([side, side + SECOND] if args.second and side in COMPILED else [side])]
    command = shlex.join(["python", "benchmarks/decode.py", *argv])
    data: dict[str, Any] = {"command": command, "machine": {}, "arguments": vars(args), "results": []}
    for name in args.models.split(","):
        first, rows = run_sides([__file__], name, processes, argv, timeout=args.timeout)
        facts = {"model": name, "batch": args.batch, "cache": args.cache, **first.get("facts", {})}
        data["machine"] |= first["machine"]
        data["results"].append({**facts, "sides": joined(rows)})
        print(table(data["results"][-1]), end="\n\n", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(data, indent=1))
    silent = [(r["model"], row) for r in data["results"] for row in r["sides"] if "ms" not in row]
    for model, row in silent:
        reason = row.get("failed", "its logits are too far from float32's or not finite.")
        print(f"No speed reported of {model}, {row['side']}: {reason}", file=sys.stderr)
    seconds = [(r["model"], row) for r in data["results"] for row in r["sides"] if "second_failed" in row]
    for model, row in seconds:
        print(f"No second process reported of {model}, {row['side']}: {row['second_failed']}", file=sys.stderr)
    return 1 if silent or seconds else 0


if __name__ == "__main__":
    sys.exit(main())
