"""Gluon kernels whose PTX runs on the CPU, against the references in float64. Triton's interpreter does not know Gluon."""

import pytest
import torch
from ptx import emulated

from gdnfuse import formats
from gdnfuse.dialect import fused_linear, in_proj_conv
from gdnfuse.kernels import few_rows_hopper, skinny_tensor_cores
from gdnfuse.kernels.few_rows_linear import adapters_table
from gdnfuse.kernels.linear_configs import RingConfig, TensorCoresConfig
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


# SwiGLU or not, rows of the projections, columns, config of the ring, rows of x, ranks, and dtypes of the weight and of adapters:
# slots that are full and not, tiles of several projections, one turn and several, and parts of the columns.
RINGS = [
    (False, [70, 30, 45], 256, (2, 40, 2, 1), 5, (16, 4), BF16, BF16),
    (True, [50, 50], 256, (1, 29, 3, 1), 9, (20, 8), BF16, F32),
    (False, [100], 512, (1, 48, 3, 2), 3, (64, 16), F16, F16),
]
if ALL:
    RINGS += [
        (True, [100, 100], 256, (3, 32, 2, 1), 8, (16,), BF16, BF16),
        (False, [33, 33], 128, (1, 64, 2, 1), 32, (8, 8), F16, F32),
        (False, [70, 30], 256, (2, 40, 2, 1), 17, (64, 64), F16, BF16),
        (False, [90], 512, (2, 40, 3, 2), 2, (8, 24), F16, F32),
        (False, [70, 30], 256, (3, 40, 2, 1), 2, (), F16, None),
    ]


@pytest.mark.parametrize(("swiglu", "sizes", "n", "config", "rows", "ranks", "dtype", "lora_dtype"), RINGS)
def test_a_ring_of_weights_with_adapters(swiglu, sizes, n, config, rows, ranks, dtype, lora_dtype):
    """B·(A·x) is added to the products: in the first part of the columns alone, and before SwiGLU."""
    x, weight = torch.randn(rows, n).to(dtype), (torch.randn(sum(sizes), n) * n**-0.5).to(dtype)
    chosen, more, parts = RingConfig(*config), {}, config[-1]
    y = torch.stack([a.double() @ w.double().T for a, w in zip(x.chunk(parts, -1), weight.chunk(parts, -1), strict=True)])
    if ranks:
        A, B, where, scaling = fused_linear.example_adapters(sizes, n, ranks, lora_dtype).values()
        low = torch.randn(rows, A[0].shape[0])
        more["lora"] = low, B, adapters_table(B, where, scaling)
        for (first, width, row, of, start), scale in zip(zip(*[iter(where)] * 5, strict=True), scaling, strict=True):
            b = B[of][start : start + width].double()
            y[0, :, first : first + width] += scale * low.double()[:, row : row + b.shape[1]] @ b.T
    wanted = torch.nn.functional.silu(y[..., : sum(sizes) // 2]) * y[..., sum(sizes) // 2 :] if swiglu else y
    with emulated():
        found = few_rows_hopper.launch_with(chosen, x, weight, swiglu, **more)
    assert found.dtype == (F32 if parts > 1 else dtype)
    assert (found.double() - wanted).abs().max() <= TOLERANCE[found.dtype] * wanted.abs().max()
