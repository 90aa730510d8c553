"""A side of a benchmark in a process of its own.

transformers chooses flash-linear-attention when it imports a model, and for good: only the side `fla` may see it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from gdnfuse.progress import progress


def show_fla(side: str) -> None:
    """Hide flash-linear-attention from this process, but for the side `fla`, which needs it; before a model is imported."""
    if side != "fla":
        sys.modules["fla"] = None  # type: ignore[assignment]  # so that importing it fails
    elif importlib.util.find_spec("fla") is None:
        sys.exit("flash-linear-attention is not installed.")


def fla_version() -> str:
    """Of the flash-linear-attention that the imported model uses: transformers falls back to its own code silently."""
    if "fla.ops.gated_delta_rule" not in sys.modules:
        sys.exit("transformers does not use the flash-linear-attention that is installed.")
    return getattr(sys.modules["fla"], "__version__", "unknown")


def run_sides(
    program: Sequence[str], model: str, sides: Sequence[str], argv: Sequence[str], quiet: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a benchmark's worker `reference` answers, with "machine" in it, and the row of each side, one after another.

    They share a folder, in which the reference leaves what sides are compared with: without it no side runs.

    Args:
        program: what Python is started with, a script or `-m module`.
        model: one that the program knows.
        sides: of the benchmark.
        argv: arguments of all its workers.
        quiet: say of a worker that failed no more than its row does.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, progress() as announce:
        for i, side in enumerate(["reference", *sides], 1):
            announce(f"{model}, {side} ({i} of {len(sides) + 1})")
            rows.append(spawn(program, side, model, argv, folder))
            stderr = rows[-1].pop("stderr", "")
            if not quiet:
                sys.stderr.write(stderr)
            if "failed" in rows[0]:
                return {"machine": {}}, [{**rows[0], "side": side} for side in sides]
    first, *rows = rows
    for row in rows:
        if "fla" in row:
            first["machine"]["fla"] = row.pop("fla")
    return first, rows


def spawn(program: Sequence[str], side: str, model: str, argv: Sequence[str], folder: str) -> dict[str, Any]:
    """What a program, called with argv and `--worker side model folder`, answers.

    If it fails, {"side", "failed": sentence, "stderr": all that it printed there}; "stderr" also where it says that a part did.
    """
    command = [sys.executable, *program, *argv, "--worker", side, model, folder]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        failed = lines[-1] if lines and run.returncode > 0 else f"The process ended with status {run.returncode}."
        return {"side": side, "failed": failed, "stderr": run.stderr}
    row = json.loads(run.stdout.strip().rsplit("\n", 1)[-1])
    if any("failed" in part for part in row.values() if isinstance(part, dict)):
        row["stderr"] = run.stderr
    return row


def answer(work: Callable[[], dict[str, Any]]) -> None:
    """Print what `work` gives, as the last line; an error ends the process with its own first line as the last."""
    try:
        result = work()
    except Exception as e:
        traceback.print_exc()
        sys.exit(f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}")
    print(json.dumps(result))
