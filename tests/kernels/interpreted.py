"""Every case under Triton's interpreter; test_interpreted runs this file in processes of its own, with TRITON_INTERPRET set."""

import kernel_cases
import pytest
import torch

from gdnfuse.kernels import attention_decode, chunk_delta_rule, few_rows_linear, implementations, skinny_linear

# The interpreter multiplies the bits of bfloat16 as integers, so products get float32 operands here.
chunk_delta_rule.OPERANDS.clear()
attention_decode.OPERANDS.clear()
few_rows_linear.OPERANDS[torch.bfloat16] = few_rows_linear.OPERANDS[torch.float32]

# The interpreter truncates where devices round to the nearest bfloat16.
TOLERANCE = kernel_cases.TOLERANCE | {torch.bfloat16: 2.0**-7 + kernel_cases.MATHS}


@pytest.mark.parametrize("case", kernel_cases.CASES, ids=str)
def test_launch(case):
    kernel_cases.check(case, implementations()[case.op].launch, tolerance=TOLERANCE)


@pytest.mark.parametrize("n", [16, 100, 128])
@pytest.mark.parametrize("m", [1, 7, 8])
@pytest.mark.parametrize("config", [(1, 64, 4, 0), (2, 32, 4, 0), (4, 64, 4, 1)], ids=str)
def test_linear_configs(config, m, n, monkeypatch):
    """One tile per program, and a few programs that take several each."""
    monkeypatch.setattr(skinny_linear, "MAX_PROGRAMS", 2)
    skinny_linear._multiprocessors.cache_clear()
    case = kernel_cases.Case("fused_linear", "config", kernel_cases.linear(m, n, torch.bfloat16, norm=True, swiglu=True))
    kernel_cases.check(case, lambda x, w, *rest: skinny_linear.launch_with(config, x, *w, *rest), tolerance=TOLERANCE)
    skinny_linear._multiprocessors.cache_clear()


@pytest.mark.parametrize("position", [-1, 40, 2**40])
def test_attention_behind_the_end_of_the_cache_writes_nothing_and_shows(position):
    args, _ = kernel_cases.attention(2, 4, 2, 16, 40)()
    args = (*args[:12], torch.tensor([position]), *args[13:])
    keys, values = args[10].clone(), args[11].clone()
    assert implementations()["attention_decode"].launch(*args).isnan().all()
    assert torch.equal(args[10], keys) and torch.equal(args[11], values)
