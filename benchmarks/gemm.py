"""Linears of one row or a few with cold weights: cuBLAS, our kernels' configs, and the one their tables choose.

    python benchmarks/gemm.py --json gemm.json
    python benchmarks/gemm.py --models 4b --roles conv,swiglu
    python benchmarks/gemm.py --chosen --rows 1,8 --json gemm_chosen.json
    python benchmarks/gemm.py --rows 2,8,16,32 --json gemm_rows.json
    python benchmarks/gemm.py --format int4_group128 --models 4b --rows 1,8,32
    python benchmarks/gemm.py --format fp8_block128 --models 4b,9b --json gemm_fp8.json

Each linear is measured as a decode step has it, with what is fused around it, by its role:

    conv     in_proj of a GDN layer: norm before, conv update of its q, k, v behind
    norm     attention's qkv, and the head: norm before
    gate     out_proj: gated norm of heads of 128 before, residual behind
    swiglu   gate and up: norm before, SwiGLU behind; M is half the rows of the weight
    plain    down: residual behind

Several rows, as many sequences decode at once, are another kernel's, which has SwiGLU behind gate and up and nothing around any
other linear: these are plain then. They may come in parts of their columns, float32 sums that their reader adds up, which is not
timed. Beyond MAX_ROWS in gdnfuse/kernels/linear_configs.py a decode step leaves them to cuBLAS.

With --format the weights are quantised. Checkpoints leave heads as they are, and so are the last rows of an in_proj, those of b
and a, which fill no block of 128. cuBLAS's time is that of the same weight in bfloat16.

cuBLAS's time is that of the bare linear. Weights, and the conv states and norm weights that belong to them, are rotated so that
none is in the L2 when its turn comes: a CUDA graph runs one linear after another on one stream, each allowed to start while the
one before it runs (programmatic dependent launch), over copies that together exceed COLD_BYTES, again and again up to LAUNCHES
linears. The figure is the median of REPLAYS replays, in microseconds per linear, with its share of what streaming the weight once
would take at the rate of a copy, which is measured on the same device.

Configs for one row are rows per tile × columns per step × warps × programs per multiprocessor (0: one per tile); for several rows
of the weight per tile × columns per step × warps × stages × parts × whether the first step is loaded early. Each config's outputs
are compared with float64's first, and no speed is reported for one that is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
from tabulate import tabulate
from torch.nn.functional import linear
from tqdm import tqdm

from gdnfuse.bench.configs import DEVICE, HEAD, Config, Linear, chosen, configs, weights_like
from gdnfuse.bench.measure import COLD_BYTES, SETTLING, bandwidth, machine, replayed
from gdnfuse.dialect import fused_linear, in_proj_conv
from gdnfuse.kernels import (
    few_rows_hopper,
    few_rows_hopper_quantized,
    few_rows_linear,
    quantized,
    skinny_linear,
    skinny_tensor_cores,
)
from gdnfuse.kernels.linear_configs import FewRowsConfig, RingConfig, TensorCoresConfig
from gdnfuse.progress import hidden

ROLES = ("conv", "norm", "gate", "swiglu", "plain")
MODELS = ("0.8b", "4b", "9b", "35b-a3b")
WINDOW = 4  # columns of a conv state, and taps of the conv
EPS = 1e-6
MOST_ROWS = 32


LINEARS = [
    Linear("conv", "0.8B GDN in_proj", 8224, 1024, 6144, ("0.8b",)),
    Linear("conv", "35B-A3B GDN in_proj", 12352, 2048, 8192, ("35b-a3b",)),
    Linear("conv", "4B GDN in_proj", 12352, 2560, 8192, ("4b",)),
    Linear("conv", "9B GDN in_proj", 12352, 4096, 8192, ("9b",)),
    Linear("norm", "4B attention qkv", 10240, 2560, 0, ("4b",)),
    Linear("norm", "0.8B head", 248320, 1024, 0, ("0.8b",)),
    Linear("norm", "4B head", 248320, 2560, 0, ("4b",)),
    Linear("norm", "9B head", 248320, 4096, 0, ("9b",)),
    Linear("gate", "0.8B out_proj", 1024, 2048, 0, ("0.8b",)),
    Linear("gate", "35B-A3B out_proj", 2048, 4096, 0, ("35b-a3b",)),
    Linear("gate", "4B out_proj", 2560, 4096, 0, ("4b",)),
    Linear("gate", "9B out_proj", 4096, 4096, 0, ("9b",)),
    Linear("swiglu", "0.8B gate and up", 7168, 1024, 0, ("0.8b",)),
    Linear("swiglu", "4B gate and up", 18432, 2560, 0, ("4b",)),
    Linear("swiglu", "9B gate and up", 24576, 4096, 0, ("9b",)),
    Linear("plain", "0.8B down", 1024, 3584, 0, ("0.8b",)),
    Linear("plain", "4B attention o_proj", 2560, 4096, 0, ("4b",)),
    Linear("plain", "4B down", 2560, 9216, 0, ("4b",)),
    Linear("plain", "9B down", 4096, 12288, 0, ("9b",)),
]

LAUNCHES = 48
REPLAYS = 9
KEPT = 12  # configs of a linear whose times the JSON keeps, best first
MEMORY = 0.8  # of what is free, at most
TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float32: 1e-4}  # of outputs and conv states, relative to the largest


def operands(of: Linear, copies: int) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The rows, and for each copy of the weight the other arguments of the kernel, uninitialised."""
    make = partial(torch.empty, device=DEVICE)
    bf16 = {"dtype": torch.bfloat16}
    alone = of.sequences == 1
    x = make(of.sequences, 1, of.columns, dtype=torch.float32 if of.role == "gate" else torch.bfloat16)
    weights = weights_like(of, copies, DEVICE)
    sets: list[dict[str, Any]] = [{"weight": w} for w in weights]
    for each in sets if of.format else ():
        scale = make(of.scales, dtype=of.scale_dtype)
        each |= {"scale": scale, "format": of.format, "dtype": torch.bfloat16}
        if of.plain:
            each["plain"] = make(of.plain, of.columns, **bf16)
    more: dict[str, Any] = {}
    if of.role == "gate":
        more["gate"] = make(1, 1, of.columns)
    if of.role in ("gate", "plain") and alone:
        more["residual"] = make(1, 1, of.outputs, **bf16)
    if of.role == "swiglu":
        more["swiglu"] = True
    for each in sets:
        each |= more
        if of.role != "plain" and alone:
            norm_weight = make(HEAD if of.role == "gate" else of.columns, **bf16)
            each |= {"norm_weight": norm_weight, "norm_eps": EPS, "norm_offset": 0.0 if of.role == "gate" else 1.0}
        if of.role == "conv" and alone:
            state, taps = make(1, of.channels, WINDOW, **bf16), make(of.channels, 1, WINDOW, **bf16)
            each["conv"] = (state, taps, None, 0, "silu")
    return x, sets


def weights_of(of: Linear, copies: int) -> torch.Tensor:
    """As many weights that are not quantised, uninitialised."""
    return torch.empty(copies, of.rows, of.columns, dtype=torch.bfloat16, device=DEVICE)


def fill(x: torch.Tensor, sets: Sequence[dict[str, Any]]) -> None:
    """Standard normal numbers, but weights that keep the size of what they multiply."""
    x.normal_()
    for each in sets:
        for name, value in each.items():
            for tensor in value if name == "conv" else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int32:
                    tensor.random_(-(2**31), 2**31)
                elif isinstance(tensor, torch.Tensor) and tensor.dtype == torch.uint8:
                    tensor.random_(0, 256)
                elif isinstance(tensor, torch.Tensor) and tensor.itemsize == 1:
                    tensor.copy_(torch.randn_like(tensor, dtype=torch.float16))
                elif isinstance(tensor, torch.Tensor):
                    tensor.normal_(std=x.shape[-1] ** -0.5 if name in ("weight", "plain", "scale") else 0.5)


def run_with(config: Config, x: torch.Tensor, each: dict[str, Any]) -> torch.Tensor:
    """The kernel as a decode step launches it."""
    if isinstance(config, RingConfig):
        kernel = few_rows_hopper_quantized if "format" in each else few_rows_hopper
        return kernel.launch_with(config, x, overlap=True, **each)
    if isinstance(config, FewRowsConfig):
        return few_rows_linear.launch_with(config, x, overlap=True, **each)
    kernel = skinny_tensor_cores if isinstance(config, TensorCoresConfig) else skinny_linear
    return kernel.launch_with(config, x, overlap=True, **each)


class Ahead:
    """Stands in for the kernel and compiles what is launched, for the very arguments, launching nothing."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return partial(self.kernel.warmup, grid=grid)


MODULES = (skinny_linear, skinny_tensor_cores, few_rows_linear, few_rows_hopper, few_rows_hopper_quantized)


def compile_all(linears: Sequence[Linear], sweep: bool) -> None:
    """Compile every kernel of the sweep ahead, side by side; linears of equal role and width mostly share theirs."""
    patches = [mock.patch.object(module, "kernel_of", Ahead) for module in MODULES]
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool), contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        for of in linears:
            x, sets = operands(of, 1)
            for config in configs(of, sweep):
                run_with(config, x, sets[0])


def microseconds(function: Callable[[Any, Any], Any], x: Any, sets: Sequence[Any]) -> float:
    """Median time of function(x, each) over the rotated sets, such as weights."""
    return statistics.median(replayed(partial(function, x), sets, LAUNCHES, REPLAYS, untimed=SETTLING))


def conv_of(each: dict[str, Any]) -> torch.Tensor | None:
    return each["conv"][0] if "conv" in each else None


def copied(each: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with a conv state of their own."""
    if "conv" not in each:
        return each
    state, *rest = each["conv"]
    return {**each, "conv": (state.clone(), *rest)}


def exact(x: torch.Tensor, each: dict[str, Any]) -> list[torch.Tensor]:
    """Float64's output, and conv state if there is one, by the dialect's reference."""

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.dtype not in (torch.int32, torch.uint8) else value

    stored = ("scale", "format", "dtype", "plain")
    given = {name: wide(value) for name, value in each.items() if name not in ("weight", "conv", *stored)}
    weights = [wide(each[name]) for name in ("weight", "plain") if name in each]
    quantised = {"scales": [each["scale"]], "format": each["format"]} if "scale" in each else {}
    if "conv" not in each:
        return [fused_linear.reference(x.double(), weights, **given, **quantised)]
    state, *rest = map(wide, each["conv"])
    return [in_proj_conv.reference(x.double(), weights, *given.values(), state, *rest, **quantised), state]


def wrong(config: Config, x: torch.Tensor, each: dict[str, Any], expected: Sequence[torch.Tensor]) -> bool:
    """Whether an output or a conv state is too far from float64's."""
    ours = copied(each)
    output = run_with(config, x, ours)
    if isinstance(config, FewRowsConfig | RingConfig) and config.parts > 1:
        output = output.sum(0)
    found = [output, *(s for s in [conv_of(ours)] if s is not None)]
    for tensor, want in zip(found, expected, strict=True):
        error = (tensor.flatten().double() - want.flatten()).abs().max() / want.abs().max()
        if not error <= TOLERANCE[tensor.dtype]:
            return True
    return False


def label(config: Sequence[int]) -> str:
    return "×".join(str(int(n)) for n in config)


def run(of: Linear, rate: float, sweep: bool = True) -> dict[str, Any]:
    """A linear's times, and its limit at a rate in bytes per second."""
    size = of.size
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    copies = max(
        1, min(math.ceil(COLD_BYTES / size) + 1, int(MEMORY * free / size) - 8 // of.itemsize)
    )  # float64 takes as many weights
    x, sets = operands(of, copies)
    fill(x, sets)
    first = copied(sets[0])  # its conv state stays as it is, while those of the sets are written
    expected = exact(x, first)

    off, too_large, times = [], [], {}
    for config in configs(of, sweep):
        try:
            if wrong(config, x, first, expected):
                off.append(label(config))
            else:
                times[config] = microseconds(partial(run_with, config), x, sets)
        except triton.OutOfResources:  # operands on their way to the tensor cores take shared memory too
            too_large.append(label(config))
    ordered = sorted(times, key=times.get)
    rows, taken = x.to(torch.bfloat16), chosen(of)
    beside = [each["weight"] for each in sets] if not of.format else torch.randn_like(weights_of(of, len(sets) // 2 + 1))
    return {
        "role": of.role,
        "whose": of.whose,
        "rows": of.sequences,
        "shape": [of.rows, of.columns],
        "copies": copies,
        "limit_us": 1e6 * size / rate,
        "format": of.format,
        "cublas_us": microseconds(linear, rows, beside),
        "best": ordered[0] if ordered else None,
        "best_us": times[ordered[0]] if ordered else None,
        "chosen": taken,
        "chosen_us": times.get(taken),
        "configs_us": {label(c): times[c] for c in ordered[:KEPT]},
        "wrong": off,
        "too_large": too_large,
    }


def table(results: Sequence[dict[str, Any]], rate: float) -> str:
    def cell(us: float | None, limit: float, config: Sequence[int] | None = None) -> str:
        if us is None:
            return "wrong"
        return f"{us:.2f} ({100 * limit / us:.0f} %)" + (f"  {label(config)}" if config else "")

    rows = []
    for r in results:
        limit = r["limit_us"]
        times = [cell(r["cublas_us"], limit), cell(r["best_us"], limit, r["best"]), cell(r["chosen_us"], limit, r["chosen"])]
        rows.append([r["rows"], r["role"], label(r["shape"]), r["whose"], *times])
    share = f"share of {rate / 1e9:.0f} GB/s, a copy's rate here"
    stored = results[0]["format"] or "bfloat16"
    head = f"Linears of a few rows, {stored}, cold weights: µs ({share}); cuBLAS's without what is fused around them"
    headers = ["rows", "role", "weight", "whose", "cuBLAS", "best", "chosen"]
    return f"{head}\n{tabulate(rows, headers, disable_numparse=True)}"


def chosen_of(parser: argparse.ArgumentParser, option: str, given: str, valid: Sequence[str]) -> list[str]:
    """The words of a list by comma, all of them valid."""
    words = given.split(",")
    if unknown := [w for w in words if w not in valid]:
        parser.error(f"{option} must be of {', '.join(valid)}, got {', '.join(unknown)}")
    return words


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--roles", default=",".join(ROLES), help=f"at one row, of {', '.join(ROLES)}, by comma")
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}, by comma")
    parser.add_argument("--rows", default="1", help=f"how many there are, 1 to {MOST_ROWS}, by comma")
    parser.add_argument("--format", default="", choices=("", *quantized.STORED), help="of quantised weights")
    parser.add_argument("--chosen", action="store_true", help="only the configs that a decode step takes, no sweep")
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    roles = chosen_of(parser, "--roles", args.roles, ROLES)
    models = chosen_of(parser, "--models", args.models, MODELS)
    counts = [int(n) if n.isdecimal() else 0 for n in args.rows.split(",")]
    if not all(1 <= n <= MOST_ROWS for n in counts):
        parser.error(f"--rows must be numbers from 1 to {MOST_ROWS} by comma, got {args.rows}")
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    linears = [of.of_rows(n) for n in counts for of in LINEARS if of.role in roles and {*of.models} & {*models}]
    if args.format:
        linears = [replace(of, format=args.format) for of in linears if "head" not in of.whose]
    if not linears:
        parser.error(f"no linear of the roles {args.roles} is measured for the models {args.models}")

    torch.manual_seed(0)
    start = time.perf_counter()
    compile_all(linears, not args.chosen)
    compile_seconds = time.perf_counter() - start
    command = shlex.join(["python", "benchmarks/gemm.py", *(sys.argv[1:] if argv is None else argv)])
    rate = bandwidth(DEVICE)
    data: dict[str, Any] = {"command": command, "machine": machine(), "dtype": "bfloat16", "compile_seconds": compile_seconds}
    data |= {"bytes_per_second": rate, "results": []}
    for of in tqdm(linears, disable=hidden(), leave=False):
        data["results"].append(run(of, rate, not args.chosen))
    data["seconds"] = time.perf_counter() - start
    print(table(data["results"], rate))
    print(f"{data['seconds']:.0f} s, of which {compile_seconds:.0f} s compiling.")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(data, f, indent=1)
    off = [f"{r['role']} {label(r['shape'])}, rows {r['rows']}: {', '.join(r['wrong'])}" for r in data["results"] if r["wrong"]]
    if off:
        print(f"No speed reported, outputs are wrong: {'; '.join(off)}.", file=sys.stderr)
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
