"""Gluon kernels whose PTX runs on the CPU, against the references in float64. Triton's interpreter does not know Gluon."""

import pytest
import torch
from ptx import emulated

from gdnfuse import compat, formats
from gdnfuse.dialect import fused_linear, in_proj_conv
from gdnfuse.kernels import few_rows_hopper, skinny_tensor_cores
from gdnfuse.kernels.few_rows_linear import adapters_table
from gdnfuse.kernels.launch.implementation import kernel_of
from gdnfuse.kernels.linear_configs import TensorCoresConfig
from tests.sweeps import ALL

gluon, gl, *_ = compat.gluon()
add_lora, store_tiles = few_rows_hopper._add_lora, few_rows_hopper.store_tiles

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


@gluon.jit
def end_of_ring(
    low_ptr, b0_ptr, b1_ptr, out_ptr, B, M, live_rows, low_columns,
    SWIGLU: gl.constexpr, BB: gl.constexpr, LORA: gl.constexpr, LOW_PARTS: gl.constexpr,
):  # fmt: skip
    """What few_rows_hopper does with one tile after its last product, all of whose sums are 1."""
    products: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BB, 16])
    acc = gl.full([64, BB], 1.0, gl.float32, products)
    first, part = gl.program_id(0) * live_rows, gl.program_id(1)
    acc = add_lora(acc, first, live_rows, M, B, low_ptr, low_columns, (b0_ptr, b1_ptr), part, SWIGLU, BB, LORA, LOW_PARTS)
    store_tiles((acc,), out_ptr, first, part, B, M, M, live_rows, SWIGLU, 1, BB)


# SwiGLU or not, rows of the projections, live rows of a tile, rows of x, ranks, dtype of B, and parts of the columns.
RINGS = [
    (False, [70, 30, 45], 47, 5, (8, 20), F32, 2),
    (True, [50, 50], 29, 9, (4, 16), BF16, 1),
]
if ALL:
    RINGS += [(False, [100], 64, 32, (64,), F32, 1), (True, [33, 33], 32, 32, (8, 8), F32, 1)]


@pytest.mark.parametrize(("swiglu", "sizes", "live", "rows", "ranks", "dtype", "parts"), RINGS)
def test_adapters_of_a_few_rows_on_hopper(swiglu, sizes, live, rows, ranks, dtype, parts):
    """B·(A·x) is added to the tiles of a ring: in the first part of the columns alone, and before SwiGLU."""
    A, B, where, scaling = fused_linear.example_adapters(sizes, 16, ranks, dtype).values()
    M, P = sum(sizes) // (2 if swiglu else 1), 3
    low = torch.randn(P, rows, A[0].shape[0])
    y = torch.ones(parts, rows, sum(sizes), dtype=torch.float64)
    for (first, width, row, of, start), scale in zip(zip(*[iter(where)] * 5, strict=True), scaling, strict=True):
        b = B[of][start : start + width].double()
        y[0, :, first : first + width] += scale * low.double().sum(0)[:, row : row + b.shape[1]] @ b.T
    wanted = torch.nn.functional.silu(y[..., :M]) * y[..., M:] if swiglu else y
    out = torch.full((parts, rows, M), float("nan"))
    with emulated():
        kernel_of(end_of_ring)[(-(-M // live), parts)](
            low, *B, *[None] * (2 - len(B)), out, rows, M, live, low.shape[-1], SWIGLU=swiglu,
            BB=max(8, 1 << (rows - 1).bit_length()), LORA=adapters_table(B, where, scaling), LOW_PARTS=P, num_warps=4,
        )  # fmt: skip
    assert (out.double() - wanted).abs().max() <= TOLERANCE[F32] * wanted.abs().max()
