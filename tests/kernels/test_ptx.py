"""Gluon kernels whose PTX runs on the CPU, against the references in float64. Triton's interpreter does not know Gluon."""

import pytest
import torch
from ptx import emulated

from gdnfuse import formats
from gdnfuse.dialect import fused_linear, in_proj_conv
from gdnfuse.kernels import skinny_tensor_cores
from gdnfuse.kernels.linear_configs import TensorCoresConfig
from tests.sweeps import ALL

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# What is fused around it, rows, columns, format, dtype of the result, and the config: two rounds of loads, tiles and groups that
# the sizes do not fill, small groups, zero points, and rows behind that are not quantised.
CASES = [
    ("conv", 56, 320, "int4_group32_zero", BF16, (2, 2)),
    ("swiglu", 40, 640, "int4_group128", BF16, (2, 2, 32)),
    ("gate", 24, 512, "nf4_block64", F16, (2, 8)),
]
if ALL:
    CASES += [
        ("conv", 56, 320, "fp8_block128", BF16, (2, 4)),
        ("conv", 56, 640, "int4_group128", BF16, (4, 8)),
        ("norm", 24, 1152, "int4_group64", BF16, (2, 4)),
        ("norm", 24, 640, "int4_group32", F32, (4, 2, 32)),
        ("norm", 24, 640, "fp8_block128", F16, (4, 2)),
        ("norm", 24, 640, "fp4_block128", F16, (2, 8)),
        ("swiglu", 24, 640, "int4_group128_zero", F16, (2, 8)),
        ("swiglu", 24, 640, "nf4_block64", BF16, (2, 2, 32)),
        ("gate", 40, 512, "int4_group64_zero", BF16, (4, 2, 32)),
        ("plain", 40, 768, "int4_group128", F32, (8, 2)),
        ("plain", 40, 768, "nf4_block128", BF16, (2, 4)),
    ]
TOLERANCE = {BF16: 2.0**-8, F16: 2.0**-10, F32: 2e-6}  # relative to the largest


@pytest.mark.parametrize(("kind", "m", "n", "format", "dtype", "config"), CASES)
def test_one_row_on_tensor_cores(kind, m, n, format, dtype, config):
    make = lambda *shape: torch.randn(shape).to(dtype)  # noqa: E731
    data, scale, *zero = formats.named(format).quantize(make(m, n) * n**-0.5)
    x, around, plain = make(1, 1, n), {}, [make(8, n)] if kind == "conv" else []
    if kind in ("conv", "norm", "swiglu"):
        around = {"norm_weight": make(n) / 8, "norm_eps": 1e-6, "norm_offset": 1.0}
    if kind == "swiglu":
        around["swiglu"] = True
    if kind == "gate":
        x, around = x.float(), {"norm_weight": make(128), "norm_eps": 1e-6, "gate": make(1, 1, n)}
    if kind in ("gate", "plain"):
        around["residual"] = make(1, 1, m)
    state, taps = make(1, m // 2, 4), make(m // 2, 1, 4)
    wide = lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t  # noqa: E731
    stored = {"scales": [wide(scale)], "format": format, "zeros": zero or None}
    named = {name: wide(value) for name, value in around.items()}
    wanted, states = [wide(x), [data, *map(wide, plain)]], wide(state)
    own = {
        "scale": scale,
        "format": format,
        "zero": zero[0] if zero else None,
        "plain": plain[0] if plain else None,
        "dtype": dtype,
    }
    if kind == "conv":
        wanted = in_proj_conv.reference(*wanted, *named.values(), states, wide(taps), None, 0, "silu", **stored)
        own["conv"] = (state, taps, None, 0, "silu")
    else:
        wanted = fused_linear.reference(*wanted, **named, **stored)
    with emulated():
        found = skinny_tensor_cores.launch_with(TensorCoresConfig(*config), x, data, **around, **own)
    off = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert off <= TOLERANCE[found.dtype]
    assert (state.double() - states).abs().max() <= TOLERANCE[dtype] * states.abs().max()
