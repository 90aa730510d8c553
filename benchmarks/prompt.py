"""Two choices for prompts: which of torch's attentions to use, and whose kernel for a residual sum with its norm.

    python benchmarks/prompt.py --json prompt.json

Attention is causal, with the heads of the 4B model. FlashAttention-2 is compared with cuDNN's, and the first call of a new length
is timed, for which cuDNN makes a plan. The result decides LONG in gdnfuse/kernels/causal_attention.py. Sum and norm have the
width of the 4B model. gdnfuse's add_rms_norm is compared with what Inductor makes for any number of rows. Figures are medians
over REPLAYS replays of a CUDA graph, per call, over SETS sets of inputs in turn, so that none is in the L2 cache. The limit of
sum and norm is the time to move both inputs and both results once at the rate of a copy, which is measured on the same device.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tabulate import tabulate

from gdnfuse.bench.measure import bandwidth, machine, replayed
from gdnfuse.dialect import add_rms_norm
from gdnfuse.kernels import implementations
from gdnfuse.kernels.causal_attention import CUDNN, FLASH

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
HEADS, KEY_HEADS, HEAD_DIM = 16, 4, 256
WIDTH = 2560
REPLAYS, SETS = 9, 4
BF16 = torch.bfloat16


def microseconds(function: Callable[..., Any], sets: Sequence[Sequence[torch.Tensor]]) -> float:
    return statistics.median(replayed(lambda each: function(*each), sets, replays=REPLAYS))


def first_ms(function: Callable[..., Any], arguments: Sequence[torch.Tensor]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function(*arguments)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return FLASH(q, k, v, 0.0, True, False, scale=HEAD_DIM**-0.5)[0]


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return CUDNN(q, k, v, None, False, 0.0, True, False, scale=HEAD_DIM**-0.5)[0]


def attention(length: int) -> dict[str, Any]:
    def inputs(T: int) -> list[torch.Tensor]:
        q = torch.randn(1, T, HEADS, HEAD_DIM, device="cuda").to(BF16).transpose(1, 2)
        return [q, *(torch.randn(1, KEY_HEADS, T, HEAD_DIM, device="cuda").to(BF16) for _ in range(2))]

    flops = 2 * HEADS * HEAD_DIM * length**2
    sets = [inputs(length) for _ in range(SETS)]
    row: dict[str, Any] = {"tokens": length}
    for name, function in (("flash", flash), ("cudnn", cudnn)):
        function(*inputs(length + 64))  # what a process does once is not the length's
        row[f"{name}_first_ms"] = first_ms(function, sets[0])
        row[f"{name}_us"] = microseconds(function, sets)
        row[f"{name}_tflops"] = 1e-6 * flops / row[f"{name}_us"]
    one, other = flash(*sets[0]).float(), cudnn(*sets[0]).float()
    row["difference"] = float((one - other).norm() / one.norm())
    return row


def norm(rows: int, rate: float) -> dict[str, Any]:
    """Of so many rows, and the limit at a rate in bytes per second."""
    sets = [[torch.randn(1, rows, WIDTH, device="cuda").to(BF16) for _ in range(2)] for _ in range(SETS)]
    weight = torch.randn(WIDTH, device="cuda").to(BF16)
    ours = implementations()["add_rms_norm"].op
    theirs = torch.compile(lambda x, residual: add_rms_norm.reference(x, residual, weight, 1e-6, 1.0), dynamic=True)
    own, inductor = (microseconds(f, sets) for f in (lambda x, r: ours(x, r, weight, 1e-6, 1.0), theirs))
    return {"rows": rows, "gdnfuse_us": own, "inductor_us": inductor, "limit_us": 1e6 * 4 * 2 * rows * WIDTH / rate}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    torch.manual_seed(0)
    rate = bandwidth("cuda")
    results: dict[str, list[dict[str, Any]]] = {"attention": [attention(n) for n in LENGTHS]}
    results["norm"] = [norm(n, rate) for n in LENGTHS]
    for rows in results.values():
        print(tabulate([{k: f"{x:.4g}" for k, x in row.items()} for row in rows], "keys", disable_numparse=True), end="\n\n")
    print(f"The limit is at {rate / 1e9:.0f} GB/s, a copy's rate here.")
    if args.json:
        command = shlex.join(["python", "benchmarks/prompt.py", *(sys.argv[1:] if argv is None else argv)])
        with open(args.json, "w") as f:
            data = {"command": command, "machine": machine(), "dtype": "bfloat16", "bytes_per_second": rate, "results": results}
            json.dump(data, f, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
