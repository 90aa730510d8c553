"""Separate sibling linears compared with one linear on their packed weight, by number of rows, with cold weights.

    python benchmarks/packing.py --json packing.json

Both sides use cuBLAS's linears. The parts of the packed weight are its row ranges, as the model's own Parameters are after
packing. The result decides `MAX_ROWS` in gdnfuse/passes/lift/packed_linear.py: where packing is no longer faster. It is timed as
in gemm.py.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import torch
from gemm import microseconds
from tabulate import tabulate
from torch.nn.functional import linear

from gdnfuse.bench.measure import COLD_BYTES, machine

# Widths of the parts, and columns: qkv, z, b, a of a GDN layer; gate and up.
GROUPS = {
    "0.8B GDN in_proj": ((6144, 2048, 16, 16), 1024),
    "4B GDN in_proj": ((8192, 4096, 32, 32), 2560),
    "9B GDN in_proj": ((8192, 4096, 32, 32), 4096),
    "4B gate and up": ((9216, 9216), 2560),
    "4B attention qkv": ((8192, 1024, 1024), 2560),
}
ROWS = (1, 16, 64, 256, 1024, 2048, 4096, 8192, 16384)


def run(name: str, rows: int) -> dict[str, Any]:
    widths, n_in = GROUPS[name]
    n_out = sum(widths)
    copies = math.ceil(COLD_BYTES / (2 * n_out * n_in)) + 1
    x = torch.randn(rows, n_in, device="cuda").bfloat16()
    weights = torch.empty(copies, n_out, n_in, dtype=torch.bfloat16, device="cuda").normal_(std=n_in**-0.5)

    def apart(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        return [linear(x, part) for part in w.split(widths)]

    times = {"packed_us": microseconds(linear, x, weights), "apart_us": microseconds(apart, x, weights)}
    return {"group": name, "rows": rows, **times}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="numbers of rows, by comma")
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    torch.manual_seed(0)
    results = [run(name, int(rows)) for name in GROUPS for rows in args.rows.split(",")]
    table = [
        [r["group"], r["rows"], f"{r['packed_us']:.1f}", f"{r['apart_us']:.1f}", f"{r['apart_us'] / r['packed_us']:.2f}"]
        for r in results
    ]
    print(tabulate(table, ["whose", "rows", "packed µs", "apart µs", "apart / packed"], disable_numparse=True))
    if args.json:
        command = shlex.join(["python", "benchmarks/packing.py", *(sys.argv[1:] if argv is None else argv)])
        with open(args.json, "w") as f:
            json.dump({"command": command, "machine": machine(), "dtype": "bfloat16", "results": results}, f, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
