"""Linears of one row with cold weights: cuBLAS, the skinny kernel's configs, and the one its table chooses.

    python benchmarks/gemm.py --json gemm.json
    python benchmarks/gemm.py --shapes 12352x2560,1024x3584

Weights are rotated so that none is in the L2 when its turn comes: a CUDA graph runs over copies that together exceed COLD_BYTES,
again and again up to LAUNCHES linears. The figure is the median of REPLAYS replays, in microseconds per linear, with its share of
what streaming the weight once at 4.3 TB/s would take. Configs are rows per program × columns per step × warps. Each config's
output is compared with float64's first, and no speed is reported for one that is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from decode import BYTES_PER_SECOND, machine
from tabulate import tabulate
from torch.nn.functional import linear
from tqdm import tqdm

from gdnfuse.kernels import skinny_linear

# N_out × N_in, with whose decode steps have them.
SHAPES = {
    "8224x1024": "0.8B GDN in_proj",
    "1024x2048": "0.8B out_proj",
    "7168x1024": "0.8B gate and up",
    "1024x3584": "0.8B down",
    "248320x1024": "0.8B head",
    "12352x2560": "4B GDN in_proj",
    "10240x2560": "4B attention qkv",
    "2560x4096": "4B out_proj",
    "18432x2560": "4B gate and up",
    "2560x9216": "4B down",
    "248320x2560": "4B head",
    "12352x4096": "9B GDN in_proj",
    "24576x4096": "9B gate and up",
    "4096x12288": "9B down",
    "248320x4096": "9B head",
}
CONFIGS = [(rows, block, warps) for rows in (1, 2, 4) for block in (512, 1024, 2048) for warps in (4, 8)]
MAX_STEPS = 16
COLD_BYTES = 4 * 60e6  # four times an H200's L2
LAUNCHES = 48
REPLAYS = 9
MEMORY = 0.8  # of what is free, at most
TOLERANCE = 2.0**-7  # of bfloat16 outputs, relative to the largest


def configs(n_in: int) -> list[tuple[int, int, int]]:
    """The configs worth compiling: 16 bytes of bfloat16 per thread and load, columns there are, not too many unrolled steps."""
    return [c for c in CONFIGS if c[0] * c[1] >= 256 * c[2] and c[1] <= triton.next_power_of_2(n_in) and n_in <= MAX_STEPS * c[1]]


def compile_all(shapes: Sequence[tuple[int, int]]) -> None:
    """Compile every kernel of the sweep ahead, side by side, launching none; shapes of equal N_in mostly share theirs."""
    pointer = torch.empty(16, dtype=torch.bfloat16, device="cuda")
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
        for n_out, n_in in shapes:
            for rows, block, num_warps in {*configs(n_in), skinny_linear.config(n_in)}:
                skinny_linear.skinny_linear_kernel.warmup(
                    pointer, pointer, pointer, n_out, n_in,
                    N=n_in, R=rows, BLOCK=block, EVEN_ROWS=n_out % rows == 0, num_warps=num_warps, grid=(1,),
                )  # fmt: skip


def microseconds(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, weights: torch.Tensor) -> float:
    """Median time of function(x, w) over the rotated weights."""
    passes = math.ceil(LAUNCHES / len(weights))
    function(x, weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(passes):
            for w in weights:
                function(x, w)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / (passes * len(weights)))
    return statistics.median(times)


def label(config: Sequence[int]) -> str:
    return "×".join(map(str, config))


def run(n_out: int, n_in: int) -> dict[str, Any]:
    size = 2 * n_out * n_in
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    copies = max(1, min(math.ceil(COLD_BYTES / size) + 1, int(MEMORY * free / size)))
    x = torch.randn(1, 1, n_in, device="cuda").bfloat16()
    weights = torch.empty(copies, n_out, n_in, dtype=torch.bfloat16, device="cuda").normal_(std=n_in**-0.5)
    expected = torch.cat([w.double() @ x.flatten().double() for w in weights[0].split(16384)])  # in parts, to save memory

    chosen, wrong, times = skinny_linear.config(n_in), [], {}
    for config in dict.fromkeys([*configs(n_in), chosen]):

        def kernel(x: torch.Tensor, w: torch.Tensor, config: tuple[int, int, int] = config) -> torch.Tensor:
            return skinny_linear.launch_with(x, w, config)

        error = (kernel(x, weights[0]).flatten().double() - expected).abs().max() / expected.abs().max()
        if not error <= TOLERANCE:
            wrong.append(label(config))
            continue
        times[config] = microseconds(kernel, x, weights)
    ordered = sorted(times, key=times.get)
    return {
        "shape": [n_out, n_in],
        "copies": copies,
        "limit_us": 1e6 * size / BYTES_PER_SECOND,
        "cublas_us": microseconds(linear, x, weights),
        "best": ordered[0] if ordered else None,
        "best_us": times[ordered[0]] if ordered else None,
        "chosen": chosen,
        "chosen_us": times.get(chosen),
        "configs_us": {label(c): times[c] for c in ordered},
        "wrong": wrong,
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    def cell(us: float | None, limit: float, config: Sequence[int] | None = None) -> str:
        if us is None:
            return "wrong"
        return f"{us:.2f} ({100 * limit / us:.0f} %)" + (f"  {label(config)}" if config else "")

    rows = []
    for r in results:
        limit, shape = r["limit_us"], label(r["shape"])
        times = [cell(r["cublas_us"], limit), cell(r["best_us"], limit, r["best"]), cell(r["chosen_us"], limit, r["chosen"])]
        rows.append([shape, SHAPES.get(shape.replace("×", "x"), ""), *times])
    head = "Linears of one row, bfloat16, cold weights: µs (share of 4.3 TB/s)"
    return f"{head}\n{tabulate(rows, ['N_out×N_in', 'whose', 'cuBLAS', 'best', 'chosen'], disable_numparse=True)}"


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="N_out×N_in with an x between, by comma")
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    try:
        shapes = [tuple(int(n) for n in shape.split("x")) for shape in args.shapes.split(",")]
    except ValueError:
        shapes = []
    if not all(len(shape) == 2 and min(shape) > 0 and shape[1] <= skinny_linear.MAX_N_IN for shape in shapes) or not shapes:
        parser.error(f"--shapes must be like 12352x2560, with at most {skinny_linear.MAX_N_IN} columns, got {args.shapes}")

    torch.manual_seed(0)
    start = time.perf_counter()
    compile_all(shapes)
    compile_seconds = time.perf_counter() - start
    command = shlex.join(["python", "benchmarks/gemm.py", *(sys.argv[1:] if argv is None else argv)])
    data = {"command": command, "machine": machine(), "dtype": "bfloat16", "compile_seconds": compile_seconds, "results": []}
    for shape in tqdm(shapes, disable=None, leave=False):
        data["results"].append(run(*shape))
    data["seconds"] = time.perf_counter() - start
    print(table(data["results"]))
    print(f"{data['seconds']:.0f} s, of which {compile_seconds:.0f} s compiling.")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(data, f, indent=1)
    wrong = [f"{label(r['shape'])}: {', '.join(r['wrong'])}" for r in data["results"] if r["wrong"]]
    if wrong:
        print(f"No speed reported, outputs are wrong: {'; '.join(wrong)}.", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
