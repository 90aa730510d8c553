"""A side of a benchmark in its own process.

transformers decides whether to use flash-linear-attention when it imports a model, once and for all. So only the side `fla` may
see that package.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gdnfuse.errors import one_line
from gdnfuse.files import replacing
from gdnfuse.progress import progress

STEP = "step"  # the file in the shared folder in which a worker says what it does
SO_FAR = "so_far"  # the file in which it leaves what it has found so far
FAILED = "failed"  # the file in which the first rank that failed says why
POLL = 0.5  # seconds
PATIENCE = 10.0  # seconds for a worker to end


class Interrupted(KeyboardInterrupt):
    """Raised on an interrupt, with what is known so far: the answer of the reference, and the row of every side."""

    def __init__(self, first: dict[str, Any], rows: list[dict[str, Any]]):
        super().__init__()
        self.first, self.rows = first, rows


def show_fla(side: str) -> None:
    """Hide flash-linear-attention from this process, unless the side is `fla`. Must be called before a model is imported."""
    if side != "fla":
        sys.modules["fla"] = None  # type: ignore[assignment]  # so that importing it fails
    elif importlib.util.find_spec("fla") is None:
        sys.exit("flash-linear-attention is not installed.")


def fla_version() -> str:
    """The version of flash-linear-attention that the imported model uses.

    transformers falls back to its own code without a warning.
    """
    if "fla.ops.gated_delta_rule" not in sys.modules:
        sys.exit("transformers does not use the flash-linear-attention that is installed.")
    return getattr(sys.modules["fla"], "__version__", "unknown")


def run_sides(
    program: Sequence[str] | Callable[[str], Sequence[str]],
    model: str,
    sides: Sequence[str],
    argv: Sequence[str],
    *,
    quiet: bool = False,
    title: str = "",
    timeout: float | None = None,
    again: Callable[[str], tuple[str, Sequence[str]] | None] = lambda step: None,
    found: Callable[[dict[str, Any], list[dict[str, Any]]], None] = lambda first, rows: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The answer of a benchmark's worker `reference`, with "machine" in it, and the row of each side, one after another.

    All share a folder, in which the reference leaves what sides are compared with. Without it no side runs.

    Args:
        program: the arguments of Python, a script or `-m module`; or a function of the side that returns them.
        model: a model that the program knows.
        sides: sides of the benchmark.
        argv: arguments for all its workers.
        quiet: say nothing about a failed worker except in its row.
        title: start of the line on the terminal; the model if empty.
        timeout: seconds that a worker may take. After that it is ended and has failed.
        again: for a failed worker and what it did last, the part of its row that this was, and the arguments of a worker for the
            other parts; None if there are none.
        found: called with what is known so far, whenever a side has found more or has ended. The last row may be incomplete.

    Raises:
        Interrupted: instead of KeyboardInterrupt, once the reference has answered.
    """
    rows: list[dict[str, Any]] = []
    # Processes that an ended worker had started may still write there for a moment.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, progress(lines=not quiet) as announce:
        for i, side in enumerate(["reference", *sides], 1):
            line = f"{title or model}, {side} ({i} of {len(sides) + 1})"
            known: dict[str, Any] = {}

            def say(step: str, line: str = line, known: dict[str, Any] = known) -> None:
                announce(f"{line}: {step}" if step else line)
                if rows and (more := so_far(folder)) and more != known:
                    known.update(more)
                    found(rows[0], [*rows[1:], known])

            try:
                starting = program(side) if callable(program) else program
                row = spawn(starting, side, model, argv, folder, say, timeout)
                if "failed" in row and (rest := again(row.get("step", ""))):
                    part, left = rest
                    starting = program(side) if callable(program) else program
                    others = spawn(starting, side, model, left, folder, say, timeout)
                    stderr = row.get("stderr", "") + others.get("stderr", "")
                    row = {**others, part: {"failed": row["failed"]}, "stderr": stderr}
            except KeyboardInterrupt:
                if not rows:
                    raise
                raise Interrupted(
                    rows[0], [*rows[1:], *({"side": s, "failed": "It was interrupted."} for s in sides[i - 2 :])]
                ) from None
            row.pop("step", None)
            if "failed" in row:
                row = {**so_far(folder), **row}
            Path(folder, SO_FAR).unlink(missing_ok=True)
            rows.append(row)
            stderr = row.pop("stderr", "")
            if not quiet:
                sys.stderr.write(stderr)
            if "failed" in rows[0]:
                return {"machine": {}}, [{**rows[0], "side": side} for side in sides]
            if i > 1:
                found(rows[0], rows[1:])
    first, *rows = rows
    for row in rows:
        if "fla" in row:
            first["machine"]["fla"] = row.pop("fla")
    return first, rows


def note(folder: str, step: str) -> None:
    """Tell the starter of this worker what it does next."""
    Path(folder, STEP).write_text(step, encoding="utf-8")


def leave(folder: Path, row: dict[str, Any]) -> None:
    """Tell the starter of this worker what it has found so far, in case it fails later."""
    with replacing(folder / SO_FAR) as file:
        file.write_text(json.dumps(row), encoding="utf-8")


def so_far(folder: str) -> dict[str, Any]:
    """What a worker has left."""
    file = Path(folder, SO_FAR)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def spawn(
    program: Sequence[str],
    side: str,
    model: str,
    argv: Sequence[str],
    folder: str,
    announce: Callable[[str], None] = lambda step: None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """The answer of a program that is called with argv and `--worker side model folder`.

    If it fails, the answer is {"side", "failed": sentence, "step": what it did last, "stderr": all that it printed there}.
    "stderr" is also there if only a part failed.

    Args:
        program, side, model, argv, timeout: as in `run_sides`.
        folder: the folder that workers share.
        announce: called with what the worker noted last, as long as it runs.
    """
    command = [sys.executable, *program, *argv, "--worker", side, model, folder]
    # Its compile caches are deleted with the folder, however it ends.
    how: dict[str, Any] = {"env": os.environ | {"TMPDIR": folder}, "text": True}
    note(folder, "")
    Path(folder, FAILED).unlink(missing_ok=True)
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how) as process:
        try:
            while True:
                step = Path(folder, STEP).read_text(encoding="utf-8")
                announce(step)
                try:
                    out, err = process.communicate(timeout=POLL)
                    break
                except subprocess.TimeoutExpired as e:
                    if timeout is not None and time.monotonic() - start > timeout:
                        end(process)
                        failed = f"It was ended after {timeout:g} seconds{f', at {step!r}' if step else ''}."
                        stderr = (e.stderr or b"").decode(errors="replace")
                        return {"side": side, "failed": failed, "step": step, "stderr": stderr}
        except BaseException:
            end(process)
            raise
    code, lines = process.returncode, err.strip().splitlines()
    failure = {"side": side, "step": Path(folder, STEP).read_text(encoding="utf-8"), "stderr": err}
    if code and Path(folder, FAILED).exists():
        return {**failure, "failed": Path(folder, FAILED).read_text(encoding="utf-8")}
    if code:
        ended = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"status {code}"
        return {**failure, "failed": lines[-1] if lines and code > 0 else f"The process ended with {ended}."}
    try:
        row = json.loads(out.strip().rsplit("\n", 1)[-1])
    except ValueError:
        return {**failure, "failed": "The process ended without an answer."}
    if any("failed" in part for part in row.values() if isinstance(part, dict)):
        row["stderr"] = err
    return row


def end(process: subprocess.Popen[str]) -> None:
    """End a worker and the ranks that it has started. torchrun ends its ranks only if it is asked before it is killed."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()


def say_failed(folder: str, error: Exception) -> None:
    """Leave the error of a rank, unless another rank was first. Later errors are usually caused by the first."""
    with contextlib.suppress(FileExistsError), open(Path(folder, FAILED), "x", encoding="utf-8") as file:
        file.write(one_line(error))


def answer(work: Callable[[], dict[str, Any]]) -> None:
    """Print the result of `work` as the last line.

    If it raises, the process ends with the first line of the error as the last line.
    """
    try:
        result = work()
    except Exception as e:
        traceback.print_exc()
        sys.exit(one_line(e))
    print(json.dumps(result))
