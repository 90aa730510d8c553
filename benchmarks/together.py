"""Several benchmarks of one side each: they compile at the same time, and are timed one after the other, on a quiet device.

    python benchmarks/together.py "step.py --models 4b --json 4b.json" "step.py --models 9b --json 9b.json"

Most of a benchmark's minute is compilation, on one core of a device's host. Here each benchmark runs until it has something to
time, and waits there (`turn`) until all the others are there too or have ended. Then they take turns, and each keeps its turn
until it ends. The rate of a copy is measured once, before any of them builds a model (`rate`). The first call of such a benchmark
says nothing, so no figures of it are kept (`quiet`). What a benchmark says goes to a file beside its --json.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# In the environment of each: the folder that all share, its own number, and how many there are.
FOLDER, PLACE, COUNT = "GDNFUSE_TOGETHER", "GDNFUSE_TOGETHER_PLACE", "GDNFUSE_TOGETHER_COUNT"
POLL, SETTLED = 0.2, 3.0  # seconds: between looks at the others; and that a device has to finish what it was given


def quiet() -> bool:
    """Whether nothing else runs at the same time."""
    return FOLDER not in os.environ


@functools.cache
def turn() -> None:
    """Wait until it is this process's turn to time something. It keeps its turn until it ends."""
    if quiet():
        return
    folder, count = Path(os.environ[FOLDER]), int(os.environ[COUNT])
    (folder / f"there.{os.environ[PLACE]}").touch()
    while len([*folder.glob("there.*")]) < count:
        time.sleep(POLL)
    _hold(folder)
    time.sleep(SETTLED)


@functools.cache
def _hold(folder: Path) -> object:
    """The lock of a folder. What is cached is not collected, so the lock is held as long as this process lives."""
    file = (folder / "lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def rate(measure: Callable[[], float]) -> float:
    """What `measure` says, once for all benchmarks that run together: the others wait for it."""
    if quiet():
        return measure()
    with (Path(os.environ[FOLDER]) / "rate").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if not (known := file.read()):
            known = repr(measure())
            file.write(known)
        return float(known)


def main(argv: Sequence[str] | None = None) -> int:
    commands = [shlex.split(line) for line in (sys.argv[1:] if argv is None else argv)]
    if not commands or any("--json" not in command[:-1] for command in commands):
        print("together.py needs benchmarks with their arguments, each in quotes and with --json FILE.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {FOLDER: folder, COUNT: str(len(commands))}
        running: dict[int, subprocess.Popen[bytes]] = {}
        for i, command in enumerate(commands):
            script = Path(__file__).parent / command[0]
            with Path(command[command.index("--json") + 1]).with_suffix(".txt").open("wb") as out:
                line = [sys.executable, str(script), *command[1:]]
                running[i] = subprocess.Popen(line, env=environment | {PLACE: str(i)}, stdout=out, stderr=subprocess.STDOUT)
        codes: dict[int, int] = {}
        while running:
            for i in [i for i, process in running.items() if process.poll() is not None]:
                codes[i] = running.pop(i).returncode
                Path(folder, f"there.{i}").touch()  # one that failed is not waited for
                print(f"{shlex.join(commands[i])}: {codes[i]}", flush=True)
            time.sleep(POLL)
    return max(codes.values())


if __name__ == "__main__":
    sys.exit(main())
