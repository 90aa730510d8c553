"""Speculative decoding beside plain steps: tokens per second at forced acceptances, and the replay of accepted tokens.

    python benchmarks/speculation.py --models 4b --speculate lookup:4,lookup:7,mtp:3 --json speculation.json
    python benchmarks/speculation.py --models 27b --speculate draft:4:0.8b --json speculation_27b.json
    python benchmarks/speculation.py --models CONFIG.json --dtype float32 --new 16 --prompt 32 --inner eager      (any machine)

Weights are random, of the published shapes, so acceptance is forced: each draft stands with a probability, given the one before
it (gdnfuse/bench/speculation.py). "its own" is what random weights accept, which for lookup shows what it costs where nothing is
found.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from gdnfuse.bench.speculation import ACCEPTANCES, Settings, run, tables
from gdnfuse.files import check_writable


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
    found = []
    for model in args.models.split(","):
        acceptances = tuple(map(float, args.acceptances.split(",")))
        how = {name: getattr(args, name) for name in ("batch", "prompt", "new", "dtype", "device", "inner")}
        found.append(run(Settings(model, args.speculate.split(","), acceptances, **how)))
        print(tables(found[-1]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
