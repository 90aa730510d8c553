"""Attention of one token between a layer's projections on a static cache, compared with torch: bfloat16, cold.

    python benchmarks/attention.py --json attention.json
    python benchmarks/attention.py --batches 1,32 --tokens 200,2000
    python benchmarks/attention.py --sweep --json attention_sweep.json

Sides, at the sizes of a 4B model (16 query heads, 4 key heads of 256 columns, of which 64 have a rotary embedding):

    reference         the same operations from torch, scaled_dot_product_attention among them, over the whole cache
    attention_decode  gdnfuse: norms, rotary embedding, cache update, attention and output gate

The cache has room for a third more tokens than there are, which the mask hides. A CUDA graph runs a side over caches that
together are four times as large as the L2, so each is cold. Kernels of gdnfuse may start while the one before runs, as in a
decode step. The figure is the median of some replays, in microseconds per call. The limit is the time to read the keys and values
of the tokens once, at the rate of a copy, which is measured on the same device. A side whose output or cache differs from
float64's gets no speed. With --sweep: attention_decode by the number of splits of the cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mixer import microseconds
from tabulate import tabulate
from tqdm import tqdm

from gdnfuse.bench.measure import COLD_BYTES, bandwidth, machine
from gdnfuse.dialect import attention_decode
from gdnfuse.kernels import implementations
from gdnfuse.progress import hidden

H, HKV, D, R = 16, 4, 256, 64
SIDES = ("reference", "attention_decode")
SWEEP = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # splits
ROOM = 4 / 3
TOLERANCE = 8e-3
CACHES = (10, 11)  # keys and values among the arguments
DEVICE = "cuda"


def arguments(B: int, tokens: int, seed: int = 0) -> tuple[Any, ...]:
    """A call of attention_decode whose token is the last of so many."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    of = lambda *shape: torch.randn(shape, device=DEVICE, generator=generator).bfloat16()  # noqa: E731
    length = math.ceil(ROOM * tokens)
    row, angles = of(B, 1, H, 2 * D), torch.rand(1, 1, R, device=DEVICE, generator=generator)
    mask = (torch.arange(length, device=DEVICE) < tokens).expand(B, 1, 1, length).contiguous()
    return (
        row[..., :D], of(B, 1, HKV, D), of(B, 1, HKV, D), row[..., D:], of(D) / 8, of(D) / 8, 1e-6, 1.0,
        angles.cos().bfloat16(), angles.sin().bfloat16(), of(B, HKV, length, D), of(B, HKV, length, D),
        torch.tensor([tokens - 1], device=DEVICE), mask, D**-0.5,
    )  # fmt: skip


def call_of(side: str, swept: bool = False) -> Callable[..., torch.Tensor]:
    if side == "reference":
        return attention_decode.reference
    # With --sweep not the op, because it would repeat what it recorded with other constants.
    ours = implementations()["attention_decode"]
    return partial(ours.launch if swept else ours.op, overlap=True)


def error(call: Callable[..., torch.Tensor], B: int, tokens: int) -> float:
    """The largest relative error of output, new keys and new values against float64. Infinite if other values changed."""
    given = arguments(B, tokens)
    before = [given[i].clone() for i in CACHES]
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given]
    wanted = attention_decode.reference(*wide)
    torch.cuda.synchronize()  # an overlapping kernel may read the cache before its writer has ended
    pairs = [(call(*given), wanted), *((given[i][:, :, tokens - 1], wide[i][:, :, tokens - 1]) for i in CACHES)]
    for i, old in zip(CACHES, before, strict=True):
        old[:, :, tokens - 1] = given[i][:, :, tokens - 1]
        if not torch.equal(given[i], old):
            return math.inf
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def timed(call: Callable[..., torch.Tensor], B: int, tokens: int) -> dict[str, Any]:
    torch.cuda.empty_cache()
    row: dict[str, Any] = {"error": error(call, B, tokens)}
    if row["error"] <= TOLERANCE:
        count = max(2, math.ceil(COLD_BYTES / moved(B, tokens)))
        times = microseconds(lambda given: call(*given), [arguments(B, tokens, seed) for seed in range(count)])
        row |= {"us": statistics.median(times), "us_min": min(times), "us_max": max(times)}
    return row


def moved(B: int, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens."""
    return 2 * 2 * B * HKV * tokens * D


def swept(B: int, tokens: int) -> dict[str, Any]:
    """Microseconds by the number of splits of the cache."""
    from gdnfuse.kernels import attention_decode as kernels

    chosen = kernels.splits_of(B * HKV * -(-H // HKV // kernels.QUERIES), -(-math.ceil(ROOM * tokens) // kernels.BLOCK))
    rows = {}
    for splits in SWEEP:
        with mock.patch.object(kernels, "splits_of", lambda programs, blocks, splits=splits: splits):
            rows[str(splits)] = timed(call_of("attention_decode", swept=True), B, tokens).get("us")
    return {"chosen": str(chosen), "configs_us": rows}


def table(results: Sequence[dict[str, Any]], rate: float) -> str:
    rows = []
    for r in results:
        if "configs_us" in r:
            ordered = sorted((us or math.inf, config) for config, us in r["configs_us"].items())
            rows.append(
                [r["batch"], r["tokens"], f"{r['limit_us']:.1f}", r["chosen"], "  ".join(f"{c}: {us:.1f}" for us, c in ordered)]
            )
            continue
        for side, row in r["sides"].items():
            us = row.get("us")
            figures = [f"{us:.1f}", f"{100 * r['limit_us'] / us:.0f} %"] if us else ["refused: wrong", ""]
            rows.append([r["batch"], r["tokens"], side, *figures, f"{r['limit_us']:.1f}", f"{row['error']:.1e}"])
    head = f"Microseconds; the limit reads keys and values at {rate / 1e9:.0f} GB/s, a copy's rate here"
    headers = ["B", "tokens", "side", "µs", "of the limit", "limit µs", "error"]
    if results and "configs_us" in results[0]:
        headers = ["B", "tokens", "limit µs", "chosen", "splits: µs"]
    return f"{head}\n{tabulate(rows, headers, disable_numparse=True)}"


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,8,32", help="numbers of sequences, by comma")
    parser.add_argument("--tokens", default="200,2000,8000", help="that the cache holds with the new one, by comma")
    parser.add_argument("--sweep", action="store_true", help="instead: attention_decode by the splits of the cache")
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    try:
        batches, counts = ([int(n) for n in given.split(",")] for given in (args.batches, args.tokens))
    except ValueError:
        parser.error("--batches and --tokens must be numbers by comma")
    if min(*batches, *counts) < 1:
        parser.error("--batches and --tokens must be at least 1")
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")

    rate = bandwidth(DEVICE)
    data: dict[str, Any] = {"command": shlex.join(["python", "benchmarks/attention.py", *argv]), "machine": machine()}
    data |= {"bytes_per_second": rate, "results": []}
    for B, tokens in tqdm(list(itertools.product(batches, counts)), disable=hidden()):
        size = moved(B, tokens)
        found = swept(B, tokens) if args.sweep else {"sides": {side: timed(call_of(side), B, tokens) for side in SIDES}}
        data["results"].append({"batch": B, "tokens": tokens, "limit_us": 1e6 * size / rate, **found})
        if args.json:
            Path(args.json).write_text(json.dumps(data, indent=1))
    print(table(data["results"], rate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
