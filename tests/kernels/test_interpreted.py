"""Kernels against the references under Triton's interpreter, on the CPU.

Triton decides whether to interpret when a kernel is defined, and other tests define the same kernels for compilation; hence a
process per op.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("interpreted.py")
OPS = [
    "add_rms_norm",
    "attention_decode",
    "attention_one_query",
    "causal_conv-",
    "causal_conv_update",
    "chunk_delta_rule",
    "fused_gating_delta_rule",
    "packed_decode",
    "gated_rms_norm",
    "mixer_decode",
    "fused_linear",
    "in_proj_conv",
    "split_linear",
]


@pytest.mark.parametrize("op", OPS)
def test_interpreted(op, pytestconfig):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "-k", op]
    command = [sys.executable, "-m", "pytest", *options, str(FILE)]
    run = subprocess.run(command, env=env, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def test_every_test_has_the_name_of_an_op():
    """One that has none would not run."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-p", "no:xdist", str(FILE)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=True)
    tests = [line.rpartition("::")[2] for line in run.stdout.splitlines() if "::" in line]
    assert len(tests) > len(OPS) and [name for name in tests if not any(op in name for op in OPS)] == []
