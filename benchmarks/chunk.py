"""The chunked gated delta rule, forward, bfloat16: gdnfuse's kernels compared with flash-linear-attention's.

    python benchmarks/chunk.py --json chunk.json
    python benchmarks/chunk.py --shapes 1x8192 --sides gdnfuse
    python benchmarks/chunk.py --sides gdnfuse --checkpoints 1024 --json chunk_checkpoints.json

Both take the same q, k (16 heads), v (32 heads), g, β and initial state, l2-normalise q and k inside, and return the output and
the last state. A CUDA graph runs the op over sets of inputs that together are four times as large as the L2. The figure is the
median of REPLAYS replays, in microseconds per call. The limit is the time to stream q, k, v, o and the states once at the rate of
a copy, which is measured on the same device. Peak memory is what a call allocates in addition to its inputs. A side whose output
or state differs from float64's on the first SEGMENT tokens gets no speed. Cold figures are seconds and machine codes of the first
calls over all shapes with an empty Triton cache. With --checkpoints N there is one more side, gdnfuse's that also returns the
states after every N tokens, and `of_gdnfuse`, its time divided by that of gdnfuse without, measured in turns.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from gdnfuse.bench.measure import COLD_BYTES, bandwidth, machine, replayed
from gdnfuse.dialect import chunk_delta_rule
from gdnfuse.dialect.chunk_delta_rule import CHUNK
from gdnfuse.kernels import implementations
from gdnfuse.progress import hidden

H, HV, K, V = 16, 32, 128, 128
SIDES = ("fla", "gdnfuse")
REPLAYS = 15
ROUNDS = 5  # of what leaving states costs
SEGMENT = 1024
TOLERANCE = 2e-2  # ‖found − wanted‖ / ‖wanted‖ against float64, for bfloat16 operands
EPS = 1e-6  # of the l2norm, in both


def call_of(side: str) -> Callable[..., Any]:
    """A function of (q, k, v, g, beta, state) → (o, last state, and for gdnfuse the states on the way)."""
    if side.startswith("gdnfuse"):
        op, every = implementations()["chunk_delta_rule"].op, every_of(side)
        return lambda q, k, v, g, beta, state: op(q, k, v, g, beta, state, K**-0.5, EPS, None, every // CHUNK, 1.0)
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def fla(q, k, v, g, beta, state):
        options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        return chunk_gated_delta_rule(q, k, v, g=g, beta=beta, **options)

    return fla


def leaving(every: int) -> str:
    """The name of the side that also returns states after every so many tokens."""
    return f"gdnfuse, states every {every}"


def every_of(side: str) -> int:
    return int(side.rpartition(" ")[2]) if " " in side else 0


def inputs(B: int, T: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(seed)
    of = lambda *shape: torch.randn(shape, device="cuda", generator=generator)  # noqa: E731
    gates = -torch.nn.functional.softplus(of(B, T, HV) - 2), of(B, T, HV).sigmoid().bfloat16()
    qkv = (of(B, T, heads, size).bfloat16() for heads, size in ((H, K), (H, K), (HV, V)))
    return *qkv, *gates, of(B, HV, K, V)


def error(side: str, args: tuple[torch.Tensor, ...]) -> float:
    """The largest error of output, state and states on the way, on the first tokens of one row."""
    part = [x[:1, :SEGMENT].contiguous() for x in args[:5]] + [args[5][:1].contiguous()]
    options = {"checkpoint_every": every_of(side) // CHUNK}
    want = chunk_delta_rule.reference(*(x.double() for x in part), K**-0.5, EPS, **options)
    pairs = [pair for pair in zip(call_of(side)(*part), want, strict=False) if pair[1].numel()]
    return max(float((found.double() - wanted).norm() / wanted.norm()) for found, wanted in pairs)


def microseconds(call: Callable[..., Any], sets: Sequence[tuple[torch.Tensor, ...]]) -> list[float]:
    return replayed(lambda args: call(*args), sets, replays=REPLAYS)


def peak(call: Callable[..., Any], args: tuple[torch.Tensor, ...]) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(*args)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cold(side: str, shapes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """First calls over all shapes, with nothing compiled before."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        call, start = call_of(side), time.perf_counter()
        for B, T in shapes:
            call(*inputs(B, T))
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        codes = len(list(Path(folder).rglob("*.cubin")))
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before
    return {"first_calls_seconds": seconds, "machine_codes": codes}


def run_shape(B: int, T: int, sides: Sequence[str], rate: float) -> dict[str, Any]:
    """The times of each side, and the limit at a rate in bytes per second."""
    size = 2 * B * T * (2 * H * K + 2 * HV * V) + 2 * 4 * B * HV * K * V
    count = max(1, math.ceil(COLD_BYTES / size))
    sets = [inputs(B, T, seed) for seed in range(count)]
    result: dict[str, Any] = {"batch": B, "tokens": T, "limit_us": 1e6 * size / rate, "sides": []}
    for side in sides:
        call = call_of(side)
        row: dict[str, Any] = {"side": side, "error": error(side, sets[0])}
        if row["error"] <= TOLERANCE:
            times = microseconds(call, sets)
            row |= {"us": statistics.median(times), "us_min": min(times), "us_max": max(times), "peak_bytes": peak(call, sets[0])}
        result["sides"].append(row)
    leaves = [row for row in result["sides"] if "us" in row and every_of(row["side"])]
    for row in leaves:
        row["of_gdnfuse"] = cost(row["side"], sets)
    return result


def cost(side: str, sets: Sequence[tuple[torch.Tensor, ...]]) -> float:
    """Time of a side that returns states divided by gdnfuse's time before and after it; the median of ROUNDS."""
    ratios = []
    for _ in range(ROUNDS):
        before, us, behind = (statistics.median(microseconds(call_of(x), sets)) for x in ("gdnfuse", side, "gdnfuse"))
        ratios.append(2 * us / (before + behind))
    return statistics.median(ratios)


def table(results: Sequence[dict[str, Any]], rate: float) -> str:
    rows = []
    for result in results:
        first = result["sides"][0].get("us")
        for row in result["sides"]:
            us = row.get("us")
            figures = ["refused: wrong", "", "", ""]
            if us:
                times = f"{first / us:.2f} ×" if first else ""
                figures = [f"{us:.1f}", times, f"{100 * result['limit_us'] / us:.0f} %", f"{row['peak_bytes'] / 2**20:.0f}"]
            rows.append([f"{result['batch']}x{result['tokens']}", row["side"], *figures, f"{row['error']:.1e}"])
    headers = ["B x T", "side", "µs", "of the first", "of the limit", "peak MiB", "error"]
    head = f"Forward; the limit streams inputs, output and states at {rate / 1e9:.0f} GB/s, a copy's rate here"
    return f"{head}\n{tabulate(rows, headers, disable_numparse=True)}"


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1x2048,1x8192,1x32768,4x8192", help="batch x tokens, by comma")
    parser.add_argument("--sides", default="fla,gdnfuse", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--checkpoints", type=int, metavar="N", help="gdnfuse's that leaves states every N tokens, too")
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    sides = args.sides.split(",")
    if unknown := set(sides) - set(SIDES):
        parser.error(f"unknown sides {', '.join(sorted(unknown))}; the valid ones are {', '.join(SIDES)}")
    if args.checkpoints is not None:
        if args.checkpoints <= 0 or args.checkpoints % CHUNK:
            parser.error(f"--checkpoints must be a multiple of {CHUNK} tokens, found {args.checkpoints}")
        sides.append(leaving(args.checkpoints))
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed, found none")
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]

    command = shlex.join(["python", "benchmarks/chunk.py", *(sys.argv[1:] if argv is None else argv)])
    data: dict[str, Any] = {"command": command, "machine": machine(), "arguments": vars(args)}
    if "fla" in sides:
        import fla

        data["machine"]["fla"] = fla.__version__
    data["cold"] = {side: cold(side, shapes) for side in sides}
    rate = data["bytes_per_second"] = bandwidth("cuda")
    data["results"] = [run_shape(B, T, sides, rate) for B, T in tqdm(shapes, disable=hidden(), leave=False, delay=1)]
    print(table(data["results"], rate))
    for result in data["results"]:
        for row in result["sides"]:
            if "of_gdnfuse" in row:
                shape, more = f"{result['batch']}x{result['tokens']}", 100 * row["of_gdnfuse"] - 100
                print(f"{shape}, {row['side']}: {more:+.1f} % beside gdnfuse without")
    for side, figures in data["cold"].items():
        print(f"{side}: first calls {figures['first_calls_seconds']:.1f} s, {figures['machine_codes']} machine codes")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(data, f, indent=1)
    return 0 if all("us" in row for result in data["results"] for row in result["sides"]) else 1


if __name__ == "__main__":
    sys.exit(main())
