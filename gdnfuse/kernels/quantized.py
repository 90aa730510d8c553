"""What kernels do with quantised weights: read them as they are stored, and put their scales on sums of products.

A scale never meets a weight. Of a block of columns each thread adds up its products first, and their sum is multiplied with the
scale: one multiplication for a group of weights, and nothing is rounded between the stored data and the float32 sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gdnfuse import compat, formats
from gdnfuse.errors import Refused
from gdnfuse.kernels import devices

GROUP = 16  # columns whose products are added up before their scale, at most: 16 bytes, what a thread reads at once


class Stored(NamedTuple):
    """How a kernel reads a format: what the data are, and of how many rows and columns of them a scale is. No columns are all."""

    kind: str
    rows: int
    columns: int


STORED = {
    "fp8_block128": Stored("e4m3", 128, 128),
    "fp8_channel": Stored("e4m3", 1, 0),
    "int8_channel": Stored("int8", 1, 0),
}
SCALES = (torch.float32, torch.bfloat16, torch.float16)


def stored(format: str) -> Stored | None:
    """How kernels read a format, or None for weights that are not quantised.

    Raises:
        Refused: they do not.
    """
    if format and format not in STORED:
        known = ", ".join(formats.named(name).about for name in STORED)
        raise Refused(f"Kernels read weights in {known}, found {formats.named(format).about}.")
    return STORED.get(format)


def raw(data: torch.Tensor) -> torch.Tensor:
    """The data as integers: not all devices that can compute with e4m3 in other ways know its pointers."""
    return data if data.dtype == torch.int8 else data.view(torch.uint8)


def converts(device: torch.device) -> bool:
    """Whether a device has an instruction that widens e4m3. Triton's interpreter has one that takes NaN for a number."""
    return devices.of(device).widens_e4m3 and not compat.interpreting()


def require(data: torch.Tensor, scale: torch.Tensor, format: str) -> None:
    """Refuse what kernels cannot read: another format, scales of another kind, rows that are not contiguous, or columns that do
    not fill a group."""
    stored(format)
    formats.named(format).check(data, scale)
    if scale.dtype not in SCALES:
        raise Refused(f"Scales must be float32, bfloat16 or float16, got {str(scale.dtype).removeprefix('torch.')}.")
    for name, t in (("weight", data), ("its scale", scale)):
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            raise Refused(f"{name} must have contiguous rows, got the strides {list(t.stride())}.")
    if data.shape[-1] % GROUP:
        raise Refused(f"A quantised weight must have a multiple of {GROUP} columns, got {data.shape[-1]}.")


@triton.jit
def widen(w, KIND: tl.constexpr, CONVERTS: tl.constexpr):
    """Stored weights as float32, exactly: NaN stays NaN, and zero keeps its sign."""
    if KIND == "e4m3":
        if CONVERTS:
            wide = w.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            # Exponent and fraction moved to float32's places are 2^-120 times the number, subnormal ones included.
            bits = w.to(tl.uint32)
            magnitude = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
            magnitude = tl.where((bits & 0x7F) == 0x7F, float("nan"), magnitude)
            wide = (magnitude.to(tl.uint32, bitcast=True) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)
    else:
        wide = w.to(tl.float32)
    return wide


@triton.jit
def load_scales(scale_ptr, N: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The scales of a row in steps of BN columns, one for each GROUP of them: a tuple of [BN / GROUP]."""
    first = tl.arange(0, BN // GROUP) * GROUP  # [BN / GROUP]
    steps = ()
    for start in tl.static_range(0, N, BN):
        place = (start + first) // COLUMNS
        if start + BN <= N:
            steps = steps + (tl.load(scale_ptr + place).to(tl.float32),)
        else:
            steps = steps + (tl.load(scale_ptr + place, mask=first < N - start, other=0.0).to(tl.float32),)
    return steps


@triton.jit
def dot_scaled(w, x, scales, R: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr, CONVERTS: tl.constexpr, GROUP: tl.constexpr):
    """Σ over steps and columns of w·scale·x for rows of one block of rows: [R], float32."""
    acc = tl.zeros((R, BN // GROUP), tl.float32)
    for i in tl.static_range(len(x)):
        products = tl.reshape(widen(w[i], KIND, CONVERTS) * x[i][None, :], (R, BN // GROUP, GROUP))
        acc += tl.sum(products, 2) * scales[i][None, :]
    return tl.sum(acc, 1)


@triton.jit
def dot_widened(w, x, R: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr, CONVERTS: tl.constexpr):
    """Σ over steps and columns of w·x, of weights whose scales are of whole rows: [R], float32."""
    acc = tl.zeros((R, BN), tl.float32)
    for i in tl.static_range(len(x)):
        acc += widen(w[i], KIND, CONVERTS) * x[i][None, :]
    return tl.sum(acc, 1)


@triton.jit
def scales_of_rows(expert, rows, row, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the scales of rows of an expert begin: of contiguous scales of weights that have so many rows of N columns."""
    columns = (N + COLUMNS - 1) // COLUMNS
    return (tl.cast(expert, tl.int64) * ((rows + ROWS - 1) // ROWS) + row // ROWS) * columns


@triton.jit
def times(w, x, scale, OPERAND: tl.constexpr, KIND: tl.constexpr, CONVERTS: tl.constexpr):
    """A step of a product on tensor cores, of columns that share a scale: w [BM, BK] as stored, x [BK, BB], scale [BM]."""
    return scale.to(tl.float32)[:, None] * tl.dot(widen(w, KIND, CONVERTS).to(OPERAND), x, input_precision="ieee")


@triton.jit
def dequantize(w, scale, KIND: tl.constexpr, CONVERTS: tl.constexpr):
    """A step of a weight [BM, BK], of columns that share the scale [BM], in float32: for products of so many rows that a scale is
    cheaper on the weight than on the product."""
    return widen(w, KIND, CONVERTS) * scale.to(tl.float32)[:, None]
