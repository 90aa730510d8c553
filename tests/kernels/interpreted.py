"""Every case under Triton's interpreter; test_interpreted runs this file in processes of its own, with TRITON_INTERPRET set."""

import kernel_cases
import pytest
import torch

from gdnfuse.kernels import implementations

# The interpreter truncates where devices round to the nearest bfloat16.
TOLERANCE = kernel_cases.TOLERANCE | {torch.bfloat16: 2.0**-7 + kernel_cases.MATHS}


@pytest.mark.parametrize("case", kernel_cases.CASES, ids=str)
def test_launch(case):
    kernel_cases.check(case, implementations()[case.op].launch, tolerance=TOLERANCE)


@pytest.mark.parametrize("name", list(implementations()))
def test_op(name):
    case = next(c for c in kernel_cases.CASES if c.op == name)
    kernel_cases.check(case, implementations()[name].op, tolerance=TOLERANCE)
