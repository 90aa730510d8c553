"""Runs the tests for the promise that no token is silently wrong, row by row, and writes the table in trust.md.

    make trust                                        (CPU)
    python docs/trust.py --gpu --json trust_gpu.json  (on a machine with a GPU: only that row; trust.md does not change)

Each row is a separate run of pytest. The exit code is 1 if a test failed or a row ran none.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gdnfuse.versions import version

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "trust.md"
START, END = "<!-- table -->\n", "<!-- end of table -->\n"

NEAR_MISSES = os.environ.get("GDNFUSE_FUZZ", "1000")

ROWS: dict[str, list[str]] = {
    "Both graphs on the inputs of a real call; a rewrite that makes a difference is named": ["tests/passes/test_verify.py"],
    "A proof fails where one constant, operand or cast of a match is changed": [
        "tests/models/test_proof_bites.py",
        "tests/rewrite",
    ],
    "Steps and prompts against eager and float64, also after 512 steps": [
        "tests/models/test_decode.py",
        "tests/models/test_prefill.py",
    ],
    "`generate`: greedy, sampled, beams, padded, chunked prompts": [
        "tests/models/test_generate.py",
        "tests/generation/test_compile.py",
        "tests/generation/test_arguments.py",
        "tests/generation/test_wrappers.py",
        "tests/generation/test_coverage.py",
        "tests/generation/test_explain.py",
    ],
    "Drafts, several checked in one step": ["tests/generation/test_speculation.py", "tests/generation/test_mtp.py"],
    "Recurrent states in half precision": ["tests/models/test_state_dtype.py"],
    "Quantised weights: formats, sizes, events": [
        "tests/models/test_quantized.py",
        "tests/models/test_quantized_pairs.py",
        "tests/models/test_bitsandbytes.py",
        "tests/models/test_torchao.py",
    ],
    "Models split over two and four ranks": ["tests/generation/test_shards.py"],
    "Models over several devices in one process": ["tests/generation/test_device_map.py"],
    "Prefixes of prompts, used and kept": [
        *(f"tests/generation/test_{name}.py" for name in ("prefixes", "prefix_tree", "tails")),
    ],
    "Weights loaded, moved, replaced, copied, saved, shared, deleted": ["tests/test_packing.py", "tests/models/test_weights.py"],
    "Low-rank adapters merged, unmerged, switched": ["tests/models/test_adapters.py"],
    "Families, prompts and steps": ["tests/models/test_families.py"],
    "Examples, with a layer written by hand; pictures match the graphs": [
        "tests/test_examples.py",
        "tests/test_docs.py",
        "-k",
        "test_examples or pictures or blocks",
    ],
    f"Near misses of real graphs ({NEAR_MISSES} of them), shapes and layouts": ["tests/fuzz"],
    "Operations' references": ["tests/dialect"],
    "Kernels compiled for sm_80, 86, 89, 90, 100, 120 and gfx942": ["tests/kernels/test_cross_compile.py"],
    "The graph of each stage runs and gives the same; what is fused in whole models": [
        "tests/passes/test_stages.py",
        "tests/passes/test_fuse_linears.py",
    ],
    "Each motif: hits, and refusals with a sentence": [
        "tests/passes/test_lift.py",
        "tests/passes/test_lift_chunk.py",
        "tests/passes/test_lift_experts.py",
        "tests/passes/test_experts.py",
    ],
    "Functions that are captured": ["tests/test_capture.py", "tests/test_capture_experts.py"],
    "Mixtures of experts: families, dtypes, rows, ties": ["tests/models/test_experts.py"],
    "Sequences are not mixed": ["tests/passes/test_sequences.py"],
    "Kernels against float64, through Triton's interpreter": [
        "tests/kernels/test_interpreted.py",
        "tests/kernels/test_supports.py",
    ],
    "Kernels written in Gluon against float64, their PTX run on a CPU": ["tests/kernels/test_ptx.py"],
    "Kernels read nothing early that the same graph writes": ["tests/passes/test_lower.py"],
    "A repeated launch equals the launch, in every mode and layout": [
        "tests/kernels/test_replay.py",
        "tests/kernels/test_repeated_launches.py",
    ],
    "Attention of steps and prompts: masks, caches, lengths": [
        "tests/passes/test_attention_decode.py",
        "tests/passes/test_attention_growing.py",
        "tests/passes/test_attention_few_queries.py",
        "tests/passes/test_causal_attention.py",
        "tests/passes/test_prompt_attention.py",
        "tests/kernels/test_causal_attention.py",
    ],
    "Rows of a prompt that nobody reads are not computed, all others are": ["tests/passes/test_last_rows.py"],
    "Cases that reviews found": ["tests/passes/test_reviewed.py"],
    "Models, threads, recompilations, resets, failing passes, training, export": [
        "tests/test_process.py",
        "tests/test_backend.py",
    ],
    "Bit-identical from run to run": ["tests/models/test_determinism.py"],
    "Benchmarks: no speed for wrong results": [
        *(f"tests/test_{name}.py" for name in ("benchmarks", "bench", "step", "engines")),
    ],
}
GPU = {"Kernels and whole models on a GPU": ["-m", "gpu", "tests"]}


def run(title: str, arguments: Sequence[str], workers: int) -> dict[str, Any]:
    """The counts of one run of pytest."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), f"--junitxml={file}", "-m", "", *arguments]
        env = os.environ | {"GDNFUSE_FUZZ": NEAR_MISSES, "GDNFUSE_SWEEP": "1"}
        run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if run.returncode:
            print(run.stdout, file=sys.stderr)  # all of it, because a random example appears nowhere else
        suite = ElementTree.parse(file).getroot().find("testsuite") if file.exists() else None
    counts = {name: int(suite.get(name, 0)) if suite is not None else 0 for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    print(f"{passed:5} passed, {failed} failed, {counts['skipped']} skipped  {title}", flush=True)
    return {
        "what": title,
        "tests": " ".join(a for a in arguments if a.startswith("tests")),
        "passed": passed,
        "failed": failed,
        "skipped": counts["skipped"],
        "seconds": round(time.monotonic() - start),
    }


def where() -> dict[str, str]:
    machine = {package: version(package) for package in ("torch", "transformers", "triton")}
    machine |= {"python": platform.python_version(), "cpu": f"{platform.machine()}, {os.cpu_count()} cores"}
    import torch

    return machine | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="only what needs a GPU")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results, the machine and the versions here")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest (default 2)")
    args = parser.parse_args(argv)
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    behind = rest.split(END)[1]
    rows = [run(title, arguments, args.workers) for title, arguments in (GPU if args.gpu else ROWS).items()]
    data = {"machine": where(), "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(data, indent=1))
    if not args.gpu:
        PAGE.write_text(f"{before}{START}\n{table(data)}\n\n{END}{behind}", encoding="utf-8")
    return 0 if all(row["passed"] and not row["failed"] for row in rows) else 1


def table(data: dict[str, Any]) -> str:
    cells = [[r["what"], f"`{r['tests']}`", r["passed"], r["failed"], r["skipped"], r["seconds"]] for r in data["rows"]]
    heads = ["what", "tests", "passed", "failed", "skipped", "seconds"]
    machine = ", ".join(f"{name} {found}" if name != "cpu" else found for name, found in data["machine"].items())
    return f"{tabulate(cells, heads, tablefmt='github')}\n\nOn {machine}."


if __name__ == "__main__":
    sys.exit(main())
