"""What the kernels accept, and the sentence they refuse with."""

import subprocess
import sys

import kernel_cases
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from gdnfuse import dialect
from gdnfuse.kernels import implementations
from gdnfuse.report import Refused


@pytest.mark.parametrize("case", kernel_cases.CASES, ids=str)
def test_every_case_is_supported(case):
    args, kwargs = case.call()
    implementations()[case.op].supports(*args, **kwargs)


F64 = torch.float64
REFUSED = [
    ("causal_conv", kernel_cases.prompt_conv(1, 4, 4, 4, F64), "x must be float32, bfloat16 or float16, got float64."),
    ("causal_conv", kernel_cases.prompt_conv(1, 4, 4, 4, act="gelu"), "activation must be one of silu, none, got gelu."),
    ("chunk_delta_rule", kernel_cases.chunked(1, 3, 1, 1, 257, 8), "K must be at most 256, got 257."),
    ("chunk_delta_rule", kernel_cases.chunked(1, 3, 1, 1, 256, 8), "K above 128 must be 256, and q, k and v bfloat16;"),
    ("chunk_delta_rule", kernel_cases.chunked(1, 3, 2, 3, 8, 8), "HV must be a multiple of H, got HV = 3 and H = 2."),
    (
        "fused_gating_chunk_delta_rule",
        lambda: (lambda a: ((a[0][0].half(), *a[0][1:]), a[1]))(kernel_cases.chunked(1, 3, 1, 1, 8, 8, gated=True)()),
        "q, k and v must have one dtype, got torch.float16, torch.float32 and torch.float32.",
    ),
    ("causal_conv_update", kernel_cases.conv(1, 4, 4, 4, F64), "x must be float32, bfloat16 or float16, got float64."),
    ("causal_conv_update", kernel_cases.conv(1, 4, 4, 4, act="gelu"), "activation must be one of silu, none, got gelu."),
    ("causal_conv_update", kernel_cases.conv(1, 4, 2, 4), "conv_state must keep at least W - 1 = 3 columns"),
    ("causal_conv_update", lambda: dialect.OPS["causal_conv_update"].examples()[1], "T must be 1, got 3."),
    ("fused_gating_delta_rule", kernel_cases.rule(1, 1, 1, 1, 257, 8), "K must be at most 256, got 257."),
    ("fused_gating_delta_rule", kernel_cases.rule(1, 1, 2, 3, 8, 8), "HV must be a multiple of H, got HV = 3 and H = 2."),
    ("fused_gating_delta_rule", kernel_cases.rule(1, 1, 1, 1, 8, 8, state_dtype=F64), "recurrent_state must be float32"),
    ("packed_decode", kernel_cases.packed(1, 1, 1, 8, 300), "V must be at most 256, got 300."),
    ("packed_decode", kernel_cases.packed(1, 2, 3, 8, 8), "D must be 2·H·K + HV·V with HV a multiple of H, got D = 56,"),
    ("gated_rms_norm", kernel_cases.norm((1, 1, 1, 1, 8), torch.float32, torch.float32), "o and z must have one shape"),
    ("gated_rms_norm", kernel_cases.norm((2, 8), torch.float32, F64), "z must be float32"),
    ("mixer_decode", kernel_cases.mixer(1, 1, 1, 8, 8, dtype=F64), "row must be float32"),
    ("mixer_decode", kernel_cases.mixer(1, 1, 1, 8, 260), "V must be at most 256, got 260."),
    ("mixer_decode", kernel_cases.mixer(1, 1, 1, 8, 8, state_dtype=F64), "recurrent_state must be float32"),
    ("fused_linear", kernel_cases.linear(4, 8, F64), "x must be float32, bfloat16 or float16, got float64."),
    ("fused_linear", kernel_cases.linear(4, 8, wrap=lambda x: x.half()), "x and weight must have one dtype, got float16"),
    ("fused_linear", kernel_cases.linear(4, 8, lead=(2, 1)), "x must be one row, got the sizes [2, 1, 8]."),
    ("fused_linear", kernel_cases.linear(4, 8, lead=(1, 0)), "x must be one row, got the sizes [1, 0, 8]."),
    (
        "fused_linear",
        kernel_cases.linear(4, 8, wrap_weight=lambda w: w[0]),
        "x must have at least one dimension and weight two, got 3 and 1.",
    ),
    ("fused_linear", kernel_cases.linear(4, 8, wrap_weight=lambda w: w[:, :4]), "x and weight must agree on N, got 8 and 4."),
    ("fused_linear", kernel_cases.linear(0, 8), "weight must not be empty nor wider than 32768, got the sizes [0, 8]."),
    ("fused_linear", kernel_cases.linear(1, 32769), "weight must not be empty nor wider than 32768, got the sizes [1, 32769]."),
    (
        "fused_linear",
        kernel_cases.linear(4, 8, wrap=lambda x: kernel_cases.strided(x, 2)),
        "x must have contiguous rows, got the strides",
    ),
    (
        "fused_linear",
        kernel_cases.linear(4, 8, wrap_weight=kernel_cases.v_major),
        "weight must have contiguous rows, got the strides [1, 4].",
    ),
    ("fused_linear", kernel_cases.linear(4, 8, head=3, lead=(1, 1)), "Heads must fill steps of 8 columns"),
    ("attention_decode", kernel_cases.attention(1, 3, 2, 8, 4), "H must be a multiple of HKV, got H = 3 and HKV = 2."),
    ("attention_decode", kernel_cases.attention(1, 2, 2, 300, 4), "D must be at most 256, got 300."),
    ("attention_decode", kernel_cases.attention(1, 2, 2, 8, 4, R=3), "R must be even, got 3."),
    ("attention_decode", kernel_cases.attention(1, 2, 2, 8, 4, F64), "q must be float32, bfloat16 or float16, got float64."),
    ("in_proj_conv", kernel_cases.in_proj(9, 8, 4, B=2), "x must be one row, got the sizes [2, 1, 8]."),
    ("in_proj_conv", kernel_cases.in_proj(9, 8, 4, state_dtype=F64), "conv_state must be float32"),
]


@pytest.mark.parametrize(("op", "make", "sentence"), REFUSED, ids=[f"{op}-{i}" for i, (op, _, _) in enumerate(REFUSED)])
def test_refused(op, make, sentence):
    args, kwargs = make()
    with pytest.raises(Refused) as refusal:
        implementations()[op].supports(*args, **kwargs)
    assert refusal.value.reason.startswith(sentence)


def test_symbolic_sizes_other_than_the_batch_are_refused():
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    args, kwargs = kernel_cases.norm((6, 8), torch.float32, torch.float32)()
    with mode, pytest.raises(Refused, match="V must be static, got the symbolic size"):
        fakes = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in args]
        implementations()["gated_rms_norm"].supports(*fakes, **kwargs)
    assert not mode.shape_env.guards


@pytest.mark.parametrize(
    ("symbolic", "sentence"),
    [
        ({"x": 0}, r"x must be one row, got the sizes \[s"),
        ({"x": 2}, "x's last size must be static"),
        ({"weight": 0}, "M must be static"),
        ({"weight": 1}, "N must be static"),
    ],
    ids=str,
)
def test_symbolic_linears_are_refused(symbolic, sentence):
    mode = FakeTensorMode(shape_env=ShapeEnv())
    args, _ = kernel_cases.linear(7, 8, lead=(3, 1))()

    def fake(name, t):
        sizes = [DimDynamic.DUCK if i == symbolic.get(name) else DimDynamic.STATIC for i in range(t.dim())]
        return mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    with mode, pytest.raises(Refused, match=sentence):
        implementations()["fused_linear"].supports(fake("x", args[0]), [fake("weight", args[1][0])])
    assert not mode.shape_env.guards


def test_missing_triton_is_a_refusal(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refused, match="Triton is required for GPU kernels; it is not installed"):
        implementations()


def test_importing_the_package_does_not_import_triton():
    code = "import sys, gdnfuse.kernels; assert 'gdnfuse.kernels.implementation' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
