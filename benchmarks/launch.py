"""Host time of our ops: launched through Python and Triton, repeated as an op, and repeated as Inductor's code calls them.

    python benchmarks/launch.py --json launch.json

This is the time of the host alone, for which a step without CUDA graphs or a short prompt waits. Tensors are so small that the
device keeps up, and the host waits for it after every BURST calls. Figures are medians over ROUNDS such bursts. The first is the
plain function. The second includes torch's dispatcher, and the third (kernels/launch/inductor.py) does not.
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
import torch.utils._pytree as pytree
from tabulate import tabulate

from gdnfuse.bench.measure import machine
from gdnfuse.dialect import attention_decode, attention_growing, delta_rule, fused_linear, in_proj_conv, mixer_decode
from gdnfuse.kernels import implementations

BURST, ROUNDS = 50, 40
BF16 = torch.bfloat16


def calls() -> dict[str, tuple[Sequence[Any], dict[str, Any]]]:
    """Arguments of ops of a decode step, and of a prompt's rule."""
    *tensors, _ = delta_rule.example_tensors(1, 100, 2, 4, 128, 128, BF16)
    o, z = torch.randn(1, 100, 4, 128), torch.randn(1, 100, 4, 128, dtype=BF16)
    return {
        "fused_linear": fused_linear.example_call(64, 256, BF16, norm=True),
        "in_proj_conv": in_proj_conv.example_call(352, 256, 128, BF16),
        "mixer_decode": mixer_decode.example_call(2, 2, 4, 32, 32, BF16),
        "attention_decode": attention_decode.example_call(1, 4, 2, 64, 128, BF16),
        "attention_growing": attention_growing.example_call(1, 4, 2, 64, 128, BF16, mask=False),
        "fused_gating_chunk_delta_rule": ((*tensors, None), {"scale": 128**-0.5, "l2norm_eps": 1e-6}),
        "gated_rms_norm": ((o, z, torch.ones(128, dtype=BF16), 1e-6), {}),
    }


def host_us(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(ROUNDS + 2):  # two to warm up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(BURST):
            call()
        times.append(1e6 * (time.perf_counter() - start) / BURST)
    return statistics.median(times[2:])


def run(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    ours = implementations()[name]
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, (list(args), kwargs))
    ours.launch(*args, **kwargs)
    kernels = len(ours.jit_kernels(*args, **kwargs))
    return {
        "op": name,
        "kernels": kernels,
        "launch_us": host_us(lambda: ours.launch(*args, **kwargs)),
        "op_us": host_us(lambda: ours.op(*args, **kwargs)),
        "inductor_us": host_us(lambda: ours.replayed(*args, **kwargs)),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    rows = [[r["op"], r["kernels"], f"{r['launch_us']:.1f}", f"{r['op_us']:.1f}", f"{r['inductor_us']:.1f}"] for r in results]
    headers = ["op", "kernels", "launch in Python (µs)", "op, repeated (µs)", "from Inductor's code, repeated (µs)"]
    return tabulate(rows, headers, disable_numparse=True)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    torch.manual_seed(0)
    results = [run(name, *call) for name, call in calls().items()]
    print(table(results))
    if args.json:
        with open(args.json, "w") as f:
            data = {"command": shlex.join(["python", "benchmarks/launch.py", *argv]), "machine": machine(), "results": results}
            json.dump(data, f, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
