"""Every case under Triton's interpreter; test_interpreted runs this file in processes of its own, with TRITON_INTERPRET set."""

import kernel_cases
import pytest
import torch

from gdnfuse.kernels import chunk_delta_rule, implementations, skinny_linear

# The interpreter multiplies the bits of bfloat16 as integers, so products get float32 operands here.
chunk_delta_rule.OPERANDS.clear()

# The interpreter truncates where devices round to the nearest bfloat16.
TOLERANCE = kernel_cases.TOLERANCE | {torch.bfloat16: 2.0**-7 + kernel_cases.MATHS}


@pytest.mark.parametrize("case", kernel_cases.CASES, ids=str)
def test_launch(case):
    kernel_cases.check(case, implementations()[case.op].launch, tolerance=TOLERANCE)


@pytest.mark.parametrize("n_in", [16, 100, 128])
@pytest.mark.parametrize("n_out", [1, 7, 8])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_linear_configs(rows, n_out, n_in):
    case = kernel_cases.Case("linear", "config", kernel_cases.linear(n_out, n_in, torch.bfloat16))
    kernel_cases.check(case, lambda x, w: skinny_linear.launch_with(x, w, (rows, 64, 4)), tolerance=TOLERANCE)
