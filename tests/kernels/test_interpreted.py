"""Kernels against the references under Triton's interpreter, on the CPU.

Triton decides whether to interpret when a kernel is defined, and other tests define the same kernels for compilation; hence
a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).with_name("interpreted.py")


def test_interpreted(pytestconfig):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", *options, str(FILE)]
    run = subprocess.run(command, env=env, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
