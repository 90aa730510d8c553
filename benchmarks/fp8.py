"""A linear of a prompt on FP8 weights: on activations in e4m3 (W8A8), on the dequantised weight (W8A16), and in bfloat16.

    python benchmarks/fp8.py --json fp8.json
    python benchmarks/fp8.py --rows 70 --shapes small --device cpu        (any machine: only whether results are right)

The shapes are the linears of Qwen3.5-4B after packing. Weights have a scale per block of 128 × 128, or one per row. Sides:

- bf16: torch's linear.
- w8a16: the weight is dequantised by what Inductor makes of the reference, then torch's linear, as in a prompt's graph.
- w8a8: x is quantised by what Inductor makes of the reference ("quantize"), then the operation that a prompt's graph calls.
- triton: the same with the kernel of this project, where w8a8 takes torch's scaled product.

A CUDA graph runs a side over copies that together exceed the L2 four times.

Results are compared with the dialect's reference in float64 on the same e4m3 numbers, for the rows that are timed and for ODD
ones. The error is the largest difference over the largest value. A side above TOLERANCE gets no figure.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import together
import torch
import torch.nn.functional as F
from tabulate import tabulate

from gdnfuse import formats
from gdnfuse.bench.measure import COLD_BYTES, machine, replayed
from gdnfuse.dialect import dequantize, fp8_linear, quantize_rows

SHAPES = {
    "in_proj": (12288, 2560),
    "qkv": (10240, 2560),
    "out_proj": (2560, 4096),
    "gate_up": (18432, 2560),
    "down": (2560, 9216),
    "small": (256, 384),
}
COLUMNS = {"fp8_block128": 128, "fp8_channel": 0}  # of x that share a scale; 0 for a whole row
ODD = (33, 1001, 4095)  # rows, none of which is a multiple of 16
TOLERANCE = 2.0**-8 + 1e-3  # of bfloat16, and of what tensor cores lose in a sum of 128 products
SIDES = ("bf16", "w8a16", "w8a8", "triton")


def largest(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference over the largest value; infinite if a number is not finite."""
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def product(side: str, rows: Sequence[torch.Tensor], weight: Sequence[torch.Tensor], format: str) -> torch.Tensor:
    """The product with rows that are quantised, by what a graph calls or by the kernel of this project."""
    if not rows[0].is_cuda:
        return fp8_linear.op.overload(*rows, *weight, format, torch.bfloat16)
    from gdnfuse.kernels import fp8_linear as kernel
    from gdnfuse.kernels import implementations

    call = implementations()["fp8_linear"].op if side == "w8a8" else kernel.by_kernel
    return call(*rows, *weight, format, torch.bfloat16)


class Linear:
    """A linear of one shape and format, with what Inductor makes of the references.

    Args:
        name: of SHAPES.
        format: of COLUMNS.
        device: a GPU, or a CPU where references are called as they are.
    """

    def __init__(self, name: str, format: str, device: str):
        torch.manual_seed(0)
        self.name, self.format, self.device = name, format, device
        M, N = SHAPES[name]
        self.columns = COLUMNS[format] or N
        self.weight = [t.to(device) for t in formats.named(format).quantize(torch.randn(M, N, device=device) * N**-0.5)]
        compiled = torch.compile if device == "cuda" else lambda f: f
        self.quantize = compiled(lambda x: quantize_rows.reference(x, self.columns))
        self.wide = compiled(lambda data, scale: dequantize.reference(data, scale, format, torch.bfloat16))

    def input(self, rows: int) -> torch.Tensor:
        """Activations whose number of rows is not known to a compiler, as in a prompt's graph."""
        x = torch.randn(1, rows, SHAPES[self.name][1], device=self.device).bfloat16()
        torch._dynamo.mark_dynamic(x, 1)
        return x

    def errors(self, rows: Sequence[int], sides: Sequence[str]) -> dict[str, float]:
        """The largest errors, by what computes."""
        found: dict[str, float] = {}
        exact = formats.named(self.format).dequantize(*self.weight, torch.float64)
        for T in rows:
            x = self.input(T)
            data, scale = quantize_rows.reference(x, self.columns)
            found["quantize"] = max(found.get("quantize", 0.0), off_by(self.quantize(x), (data, scale)))
            groups = data.double().unflatten(-1, (scale.shape[0], -1)) * scale.double().T.reshape(1, T, -1, 1)
            wanted = groups.flatten(-2) @ exact.T
            for side in [side for side in ("w8a8", "triton") if side in sides]:
                error = largest(product(side, (data, scale), self.weight, self.format), wanted)
                found[side] = max(found.get(side, 0.0), error)
        return found

    def times(self, rows: int, sides: Sequence[str]) -> dict[str, float]:
        """Microseconds of each side and of quantising."""
        copies = max(2, math.ceil(COLD_BYTES / self.weight[0].nbytes))
        sets = [(self.input(rows), [t.clone() for t in self.weight]) for _ in range(copies)]
        plain = [(x, self.wide(*weight)) for x, weight in sets]
        calls: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
            "bf16": (lambda each: F.linear(*each), plain),
            "w8a16": (lambda each: F.linear(each[0], self.wide(*each[1])), sets),
            "quantize": (lambda each: self.quantize(each[0]), sets),
        }
        for side in ("w8a8", "triton"):
            calls[side] = (lambda each, side=side: product(side, self.quantize(each[0]), each[1], self.format), sets)
        return {side: statistics.median(replayed(*calls[side], launches=8)) for side in sides}


def off_by(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The share of numbers that Inductor's code rounds to another one, or 1 if scales differ by more than their last bits."""
    (data, scale), (same, of_scale) = found, wanted
    close = torch.allclose(scale, of_scale, rtol=1e-6, atol=0.0)
    return float((data.float() != same.float()).double().mean()) if close else 1.0


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = []
    for r in results:
        M, N = r["shape"]
        flops = 2 * r["rows"] * M * N
        times = [f"{r['us'][side]:.1f}" if side in r["us"] else "" for side in (*SIDES, "quantize")]
        rate = f"{flops / r['us']['w8a8'] / 1e6:.0f}" if "w8a8" in r["us"] else ""
        errors = ", ".join(f"{side} {error:.1e}" for side, error in r["errors"].items())
        lines.append([r["name"], f"{M} × {N}", r["format"], r["rows"], *times, rate, errors])
    headers = ["linear", "weight", "format", "rows", *(f"{side} (µs)" for side in (*SIDES, "quantize")), "w8a8 TFLOP/s", "errors"]
    return tabulate(lines, headers, disable_numparse=True)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="in_proj,qkv,out_proj,gate_up,down", help=f"of {', '.join(SHAPES)}, by comma")
    parser.add_argument("--formats", default="fp8_block128", help=f"of {', '.join(COLUMNS)}, by comma")
    parser.add_argument("--sides", default=",".join(SIDES), help=f"of {', '.join(SIDES)}, by comma")
    parser.add_argument("--rows", default="512,4096", help="by comma")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    shapes, sides, kinds = args.shapes.split(","), args.sides.split(","), args.formats.split(",")
    for option, found, valid in (("--shapes", shapes, SHAPES), ("--sides", sides, SIDES), ("--formats", kinds, COLUMNS)):
        if unknown := set(found) - set(valid):
            parser.error(f"{option} must be of {', '.join(valid)}, found {', '.join(sorted(unknown))}")
    if not all(n.isdecimal() and int(n) for n in args.rows.split(",")):
        parser.error(f"--rows must be numbers of rows by comma, found {args.rows}")
    command, rows = shlex.join(["python", "benchmarks/fp8.py", *argv]), [int(n) for n in args.rows.split(",")]
    data: dict[str, Any] = {"command": command, "machine": machine(), "arguments": vars(args), "results": []}
    cuda = args.device == "cuda"
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):
        linears = [Linear(name, format, args.device) for format in kinds for name in shapes]
        errors = [linear.errors((*rows, *ODD) if cuda else rows, sides) for linear in linears]
        together.turn()
        for linear, found in zip(linears, errors, strict=True):
            about = {"name": linear.name, "shape": SHAPES[linear.name], "format": linear.format, "errors": found}
            timed = [side for side in (*sides, "quantize") if found.get(side, 0.0) <= TOLERANCE]
            data["results"] += [{**about, "rows": T, "us": linear.times(T, timed) if cuda else {}} for T in rows]
            if args.json:
                Path(args.json).write_text(json.dumps(data, indent=1))
    print(table(data["results"]))
    wrong = [r for r in data["results"] if any(error > TOLERANCE for error in r["errors"].values())]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
