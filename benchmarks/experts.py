"""A mixture-of-experts block alone, at the sizes of Qwen3.5-35B-A3B, beside torch's grouped products: bfloat16, cold.

    python benchmarks/experts.py --json experts.json
    python benchmarks/experts.py --rows 1,8,32 --sides gdnfuse,grouped_mm,inductor
    python benchmarks/experts.py --sweep --json experts_sweep.json

Sides, each with the router, the chosen experts, the shared expert with its gate and the residual:

    gdnfuse     routed_experts for one row, route and experts for more, every launch allowed to start while the one before it runs
    grouped_mm  transformers' block with `experts_implementation="grouped_mm"`, its default, eager
    inductor    the same compiled, anew for each number of rows

One row has its norm in front, as a decode step does; more rows are normalised before. Rows are random, so are their experts. A
CUDA graph runs a side over rows and weights in turn, over BLOCKS sets of weights, each 27 times the L2, so that what a call needs
is cold. The figure is the median of replays, in microseconds per call.

The limit reads once the router, the shared expert and those experts that the rows of a call chose, at the rate of a copy, which
is measured on the same device; or does the products of that call at the rate of one large product of torch's, if that takes
longer.

The outputs are compared with float64's first, and no speed is reported for a side that is off. A rounding may choose other
experts, which is no error, so rows are taken whose last choice is far from the first that was not made: every side then makes the
same.

With --sweep: gdnfuse by how the launches share out their work, one launch after another, each with the best of those before.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from gemm import Ahead
from tabulate import tabulate
from tqdm import tqdm
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeRMSNorm, Qwen3_5MoeSparseMoeBlock

from gdnfuse.bench.measure import SETTLING, bandwidth, machine, replayed
from gdnfuse.dialect import routed_experts
from gdnfuse.errors import Refused
from gdnfuse.kernels import devices, experts, few_rows_hopper, few_rows_linear, grouped_experts, implementations, route
from gdnfuse.models import load_config
from gdnfuse.progress import hidden

MODEL = "qwen3.5-35b-a3b"
SIDES = ("gdnfuse", "grouped_mm", "inductor")
ROWS = (1, 2, 4, 8, 16, 32, 64, 512, 2048, 4096, 16384)
SWEPT = (1, 8, 32, 512, 4096)
BLOCKS = 3
SETS = {1: 24, 64: 6}  # calls that a graph holds, by rows up to; of more rows 2
FAR = 0.06  # between the logits of the last choice and of the next, several roundings of bfloat16
TOLERANCE = 1e-2  # relative: bfloat16's logits alone move a weight by up to 0.4 %
DEVICE = "cuda"
LARGE = 8192  # rows and columns of the product whose rate limits many rows


@dataclass(frozen=True)
class Block:
    """norm: its module. moe: the block's."""

    norm: torch.nn.Module
    moe: torch.nn.Module

    @property
    def router(self) -> torch.Tensor:
        return self.moe.gate.weight

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.moe.experts.gate_up_proj, self.moe.experts.down_proj

    def shared(self) -> tuple[torch.Tensor, ...]:
        mlp = self.moe.shared_expert
        return mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, self.moe.shared_expert_gate.weight

    def norms(self) -> tuple[torch.Tensor, float, float]:
        return self.norm.weight, self.norm.eps, 1.0


def block(config: Any, seed: int) -> Block:
    """Random weights that keep the size of what they multiply."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        norm, moe = Qwen3_5MoeRMSNorm(config.hidden_size, config.rms_norm_eps), Qwen3_5MoeSparseMoeBlock(config)
    for module in (norm, moe):
        module.to(torch.bfloat16).to_empty(device=DEVICE)
        for weight in module.parameters():
            weight.requires_grad_(False).normal_(std=weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.1, generator=generator)
    return Block(norm, moe)


def rows_for(of: Block, N: int, generator: torch.Generator) -> torch.Tensor:
    """N random rows, each with its last choice far from the next. Of one row the norm is still to come."""
    found, count, top_k = [], 0, of.moe.gate.top_k
    while count < N:
        x = torch.randn(max(4 * N, 64), of.router.shape[1], device=DEVICE, generator=generator).bfloat16()
        logits = (of.norm(x) if N == 1 else x).float() @ of.router.float().T
        first = logits.topk(top_k + 1, -1).values
        found.append(x[first[:, -2] - first[:, -1] > FAR])
        count += len(found[-1])
    return torch.cat(found)[:N]


def ours(of: Block, x: torch.Tensor, swept: bool = False) -> torch.Tensor:
    """As a model has it: one op for one row, two for more; with `swept` not what their ops have recorded."""
    call = lambda name: partial(implementations()[name].launch if swept else implementations()[name].op, overlap=True)  # noqa: E731
    top_k = of.moe.gate.top_k
    if len(x) == 1:
        return call("routed_experts")(
            x, of.router, top_k, True, *of.weights(), "silu", False, False, *of.norms(), *of.shared(), x
        )
    weights, indices = call("route")(x, of.router, top_k, True)
    return call("experts")(x, indices, weights, *of.weights(), "silu", None, 0.0, 0.0, *of.shared(), x)


def supported(of: Block, x: torch.Tensor) -> str:
    """Why gdnfuse does not take so many rows, or nothing."""
    try:
        if len(x) > 1:
            weights, indices = (torch.empty(len(x), of.moe.gate.top_k, dtype=d, device="meta") for d in (x.dtype, torch.int64))
            implementations()["route"].supports(x, of.router, of.moe.gate.top_k, True)
            implementations()["experts"].supports(x, indices, weights, *of.weights(), "silu", None, 0.0, 0.0, *of.shared(), x)
    except Refused as refusal:
        return refusal.reason
    return ""


def theirs(of: Block, x: torch.Tensor) -> torch.Tensor:
    return x + of.moe((of.norm(x) if len(x) == 1 else x)[None])[0]


def exact(of: Block, x: torch.Tensor) -> torch.Tensor:
    """float64's."""
    wide = lambda given: [t.double() if isinstance(t, torch.Tensor) else t for t in given]  # noqa: E731
    norms = wide(of.norms()) if len(x) == 1 else (None, 0.0, 0.0)
    (x, router), weights, shared = wide((x, of.router)), wide(of.weights()), wide(of.shared())
    return routed_experts.reference(x, router, of.moe.gate.top_k, True, *weights, "silu", False, True, *norms, *shared, x)


def needed(of: Block, x: torch.Tensor) -> int:
    """How many experts some row of x chose."""
    logits = (of.norm(x) if len(x) == 1 else x).float() @ of.router.float().T
    return len(logits.topk(of.moe.gate.top_k, -1).indices.unique())


def moved(of: Block, experts: float) -> float:
    """Bytes of the router, the shared expert and so many experts."""
    once = sum(t.nbytes for t in (of.router, *of.shared()))
    return once + experts * sum(t.nbytes / len(t) for t in of.weights())


def products(of: Block, N: int) -> float:
    """Floating point operations of N rows."""
    _, down = of.weights()
    _, H, width = down.shape
    return 2 * N * H * (3 * (of.moe.gate.top_k * width + of.shared()[0].shape[0]) + len(down))


def arithmetic() -> float:
    """Floating point operations per second of one large product."""
    a, b = torch.randn(2, LARGE, LARGE, device=DEVICE).bfloat16()
    return 1e6 * 2 * LARGE**3 / statistics.median(replayed(lambda each: a @ each, [b], launches=8))


def error(call: Callable[[Block, torch.Tensor], torch.Tensor], of: Block, x: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to what is added to the residual."""
    found = call(of, x).double() - x.double()
    return float((found - wanted).norm() / wanted.norm())


Sets = Sequence[tuple[Block, torch.Tensor]]


def sets_for(blocks: Sequence[Block], N: int) -> Sets:
    generator = torch.Generator(DEVICE).manual_seed(N)
    count = next((n for rows, n in SETS.items() if rows >= N), 2)
    return [(of, rows_for(of, N, generator)) for of, _ in zip(itertools.cycle(blocks), range(count), strict=False)]


def timed(call: Callable[[Block, torch.Tensor], torch.Tensor], sets: Sets, wanted: torch.Tensor) -> dict[str, Any]:
    row: dict[str, Any] = {"error": error(call, *sets[0], wanted)}
    if row["error"] <= TOLERANCE:
        times = replayed(lambda each: call(*each), sets, untimed=SETTLING)
        row |= {"us": statistics.median(times), "us_min": min(times), "us_max": max(times)}
    return row


def run(blocks: Sequence[Block], N: int, sides: Sequence[str], rate: float, arithmetic_rate: float) -> dict[str, Any]:
    """Each side's times for N rows, and their limit at rates in bytes and operations per second."""
    torch.cuda.empty_cache()
    sets = sets_for(blocks, N)
    count = statistics.mean(needed(*each) for each in sets)
    wanted = exact(*sets[0]) - sets[0][1].double()
    bytes_us, products_us = 1e6 * moved(blocks[0], count) / rate, 1e6 * products(blocks[0], N) / arithmetic_rate
    result = {"rows": N, "experts": count, "bytes_us": bytes_us, "products_us": products_us, "sides": {}}
    result["limit_us"] = max(bytes_us, products_us)
    for side in sides:
        if side == "gdnfuse" and (reason := supported(*sets[0])):
            result["sides"][side] = {"refused": reason}
            continue
        call = {"gdnfuse": ours, "grouped_mm": theirs}.get(side)
        if side == "inductor":
            torch._dynamo.reset()
            call = torch.compile(theirs, dynamic=False)
        start = time.perf_counter()
        call(*sets[0])
        torch.cuda.synchronize()
        result["sides"][side] = {"first_s": time.perf_counter() - start, **timed(call, sets, wanted)}
    return result


# With --sweep: rows per program, columns per step and warps for one row, and bytes of weight per thread that are sensible.
ONE_ROW = tuple(itertools.product((1, 2, 4, 8), (256, 512, 1024, 2048), (1, 2, 4, 8)))
BYTES = range(64, 385)
# For several: rows of the weight per tile, columns per step, warps, stages; bytes of shared memory per program.
TILES = tuple(itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (2, 3, 4, 5)))
SHARED = range(32 * 1024, 116 * 1024)
# For prompts: rows of the weight per tile and warps, choices per tile, columns per step, stages; bytes of shared memory and sums
# per thread.
GROUPED = tuple(itertools.product(((64, 4), (128, 4), (256, 8)), (16, 32, 64, 128, 256), (64, 128), (3, 4)))
GROUPED_SHARED, SUMS = range(32 * 1024, 220 * 1024), range(16, 129)


def configs(launch: str, H: int, width: int, choices: int) -> Iterator[tuple[int, ...]]:
    """Worth measuring, of one row (router, up, lines, down), of several (up_rows, down_rows) or of a prompt (grouped)."""
    if launch == "lines":
        yield from ((0,), (32,), (64,), (128,))
        return
    if launch == "grouped":
        for (BM, warps), BB, BK, stages in GROUPED:
            config = grouped_experts.GroupedConfig(BM, BB, BK, warps, stages)
            if config.shared_memory(2) in GROUPED_SHARED and BM * BB // (32 * warps) in SUMS:
                yield config
        return
    if launch.endswith("rows"):
        for BM, BK, warps, stages in TILES:
            columns = H if launch == "up_rows" else width
            if columns % BK == 0 and stages <= columns // BK + 1 and 2 * (BM + experts.MOST) * BK * stages in SHARED:
                yield BM, BK, warps, stages
        return
    columns, rows = {"router": (H, 1), "up": (H, 2), "down": (width, choices)}[launch]
    for R, BN, warps in ONE_ROW:
        each = 2 * R * rows * columns // (32 * warps)
        if BN <= columns and 2 * R * BN >= 16 * 32 * warps and (each in BYTES or launch == "router" and each >= 32):
            yield R, BN, warps


def with_config(launch: str, config: Sequence[int]) -> contextlib.AbstractContextManager[Any]:
    """A context in which the launch takes the config."""
    if launch == "router":
        return mock.patch.object(route, "ONE_ROW", config)
    if launch == "lines":
        return mock.patch.object(experts, "LINES", *config)
    if launch == "grouped":
        return mock.patch.object(grouped_experts, "config_for", lambda *_: grouped_experts.GroupedConfig(*config))
    if launch == "up":
        return mock.patch.object(experts, "config_of_up", lambda *_: (*config, 0))
    if launch == "down":
        return mock.patch.object(experts, "config_of_down", lambda *_: experts.DownConfig(*config))
    name = {"up_rows": "UP_ROWS", "down_rows": "DOWN_ROWS"}[launch]
    return mock.patch.object(experts, name, experts.RowsConfig(*config))


def chosen(launch: str, H: int, width: int, choices: int, N: int, E: int) -> tuple[int, ...]:
    """The config that a model gets."""
    if launch == "grouped":
        return grouped_experts.config_for(N, choices - 1, E, 2, devices.of(torch.device(DEVICE)).shared_memory)
    if launch == "router":
        return route.ONE_ROW
    if launch == "lines":
        return (experts.LINES,)
    if launch == "up":
        return tuple(experts.config_of_up(H, torch.bfloat16)[:3])
    if launch == "down":
        return tuple(experts.config_of_down(choices - 1, width, width, torch.bfloat16))
    columns = (H,) if launch == "up_rows" else (width,)
    named = {"up_rows": experts.UP_ROWS, "down_rows": experts.DOWN_ROWS}[launch]
    return tuple(experts.config_of_rows(named, torch.bfloat16, *columns))


def sweep(blocks: Sequence[Block], N: int, rate: float) -> dict[str, Any]:
    """Microseconds by config of each launch in turn, the others with the best that is known."""
    sets = sets_for(blocks, N)
    _, down = blocks[0].weights()
    sizes = down.shape[1], down.shape[2], blocks[0].moe.gate.top_k + 1
    wanted = exact(*sets[0]) - sets[0][1].double()
    count = statistics.mean(needed(*each) for each in sets)
    call, results = partial(ours, swept=True), []
    launches = ("up", "down", "router", "lines") if N == 1 else ("up_rows", "down_rows") if N <= route.MAX_ROWS else ("grouped",)
    with contextlib.ExitStack() as best_so_far:
        for launch in launches:
            first = chosen(launch, *sizes, N, len(down))
            tried = [first, *(c for c in configs(launch, *sizes) if c != first)]
            compile_all(launch, tried, sets[0])
            times, off = {}, []
            for config in tqdm(tried, desc=launch, disable=hidden(), leave=False):
                with with_config(launch, config):
                    try:
                        row = timed(call, sets, wanted)
                    except triton.OutOfResources:
                        continue
                times |= {config: row["us"]} if "us" in row else {}
                off += [] if "us" in row else [label(config)]
            ordered = sorted(times, key=times.__getitem__)
            if ordered:
                best_so_far.enter_context(with_config(launch, ordered[0]))
            results.append({"launch": launch, "chosen": label(first), "chosen_us": times.get(first), "wrong": off})
            results[-1]["configs_us"] = {label(c): times[c] for c in ordered}
    return {"rows": N, "experts": count, "limit_us": 1e6 * moved(blocks[0], count) / rate, "launches": results}


def compile_all(launch: str, tried: Sequence[Sequence[int]], each: tuple[Block, torch.Tensor]) -> None:
    """Side by side."""
    modules = (experts, grouped_experts, route, few_rows_linear, few_rows_hopper)
    with contextlib.ExitStack() as patched, ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for module in modules:
            patched.enter_context(mock.patch.object(module, "kernel_of", Ahead))
        for config in tried:
            with with_config(launch, config):
                ours(*each, swept=True)


def label(config: Sequence[int]) -> str:
    return "×".join(map(str, config))


def table(results: Sequence[dict[str, Any]], rate: float) -> str:
    rows = []
    for r in results:
        for side, row in r["sides"].items():
            us = row.get("us")
            figures = [f"{us:.1f}", f"{us / r['limit_us']:.2f}"] if us else [row.get("refused", "refused: wrong"), ""]
            found = f"{row['error']:.1e}" if "error" in row else ""
            rows.append([r["rows"], f"{r['experts']:.0f}", side, *figures, f"{r['limit_us']:.1f}", found])
    head = f"A block of experts of Qwen3.5-35B-A3B: µs; limit at {rate / 1e9:.0f} GB/s, a copy's rate here, or at a product's"
    headers = ["rows", "experts", "side", "µs", "of the limit", "limit µs", "error"]
    return f"{head}\n{tabulate(rows, headers, disable_numparse=True)}"


def swept_table(results: Sequence[dict[str, Any]], shown: int = 8) -> str:
    rows = []
    for r in results:
        for of in r["launches"]:
            best = "  ".join(f"{c}: {us:.1f}" for c, us in list(of["configs_us"].items())[:shown])
            us = of["chosen_us"]
            rows.append([r["rows"], f"{r['limit_us']:.1f}", of["launch"], f"{of['chosen']}: {us:.1f}" if us else "wrong", best])
    headers = ["rows", "limit µs", "launch", "chosen: µs of the block", "best"]
    return tabulate(rows, headers, disable_numparse=True)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help=f"by comma; {','.join(map(str, ROWS))}, or with --sweep {','.join(map(str, SWEPT))}")
    parser.add_argument("--sides", default="gdnfuse,grouped_mm", help=f"of {', '.join(SIDES)}, by comma")
    parser.add_argument("--sweep", action="store_true", help="instead: gdnfuse by how its launches share out their work")
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    sides = args.sides.split(",")
    if unknown := [s for s in sides if s not in SIDES]:
        parser.error(f"--sides must be of {', '.join(SIDES)}, got {', '.join(unknown)}")
    given = args.rows.split(",") if args.rows else list(map(str, SWEPT if args.sweep else ROWS))
    if not all(n.isdecimal() and int(n) > 0 for n in given):
        parser.error(f"--rows must be numbers of at least 1 by comma, got {args.rows}")
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")

    config = load_config(MODEL)
    blocks = [block(config, seed) for seed in range(BLOCKS)]
    rate = bandwidth(DEVICE)
    data: dict[str, Any] = {"command": shlex.join(["python", "benchmarks/experts.py", *argv]), "machine": machine()}
    data |= {"model": MODEL, "bytes_per_second": rate, "operations_per_second": arithmetic(), "results": []}
    for N in tqdm(list(map(int, given)), disable=hidden()):
        if args.sweep:
            data["results"].append(sweep(blocks, N, rate))
        else:
            data["results"].append(run(blocks, N, sides, rate, data["operations_per_second"]))
        if args.json:
            Path(args.json).write_text(json.dumps(data, indent=1))
    print(swept_table(data["results"]) if args.sweep else table(data["results"], rate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
