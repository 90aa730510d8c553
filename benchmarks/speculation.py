"""Speculative decoding beside plain steps: tokens per second at forced acceptances, and the replay of accepted tokens.

    python benchmarks/speculation.py --models 4b --speculate lookup:4,lookup:7,mtp:3 --json speculation.json
    python benchmarks/speculation.py --models 27b --speculate draft:4:0.8b --json speculation_27b.json
    python benchmarks/speculation.py --models CONFIG.json --dtype float32 --new 16 --prompt 32 --inner eager      (any machine)

Weights are random, of the published shapes, so acceptance is forced: each draft stands with a probability, given the one before
it (gdnfuse/bench/speculation.py). "its own" is what random weights accept, which for lookup shows what it costs where nothing is
found. Each figure is printed on stderr as soon as it is there, and the file has by then all that were found; tables come last.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import together
import torch
import transformers

from gdnfuse.bench.speculation import ACCEPTANCES, Settings, run, tables
from gdnfuse.files import check_writable, replacing


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="4b", help="presets or config.json, with commas between")
    parser.add_argument("--speculate", default="lookup:4", help="lookup:N, mtp:N or draft:N:MODEL, with commas between")
    parser.add_argument("--acceptances", default=",".join(map(str, ACCEPTANCES)))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args(argv)
    if args.json:
        check_writable(args.json)
    transformers.utils.logging.set_verbosity_error()
    done: list[dict[str, Any]] = []
    command = shlex.join(["python", "benchmarks/speculation.py", *(sys.argv[1:] if argv is None else argv)])

    def finished(data: dict[str, Any], line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        if args.json:
            with replacing(args.json) as file:
                file.write_text(json.dumps({"command": command, "machine": data["machine"], "results": [*done, data]}, indent=1))

    for model in args.models.split(","):
        acceptances = tuple(map(float, args.acceptances.split(",")))
        how = {name: getattr(args, name) for name in ("batch", "prompt", "new", "dtype", "device", "inner")}
        done.append(run(Settings(model, args.speculate.split(","), acceptances, **how), finished, together.turn))
        print(tables(done[-1]), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
