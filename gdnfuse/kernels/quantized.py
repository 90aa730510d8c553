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
from gdnfuse.kernels.four_bit import eight_entries, two_entries
from gdnfuse.kernels.linear_configs import SCALED, FewRowsConfig, few_rows_config

GROUP = 16  # columns whose products are added up before their scale, at most: 16 bytes, what a thread reads at once


class Stored(NamedTuple):
    """How a kernel reads a format: what the data are, of how many rows and columns of the weight a scale is, and how many columns
    are in an element that it reads. A scale of no columns is of all."""

    kind: str
    rows: int
    columns: int
    packed: int = 1


STORED = {
    "fp8_block128": Stored("e4m3", 128, 128),
    "fp8_channel": Stored("e4m3", 1, 0),
    "int8_channel": Stored("int8", 1, 0),
    **{
        f"int4_group{columns}{zero}": Stored("int4", 1, columns, formats.int4_group.PACKED)
        for zero in ("", "_zero")
        for columns in formats.int4_group.GROUPS
    },
    **{
        f"{table}_block{columns}": Stored(table, 1, columns, formats.int4_group.PACKED)
        for table in formats.four_bit.TABLES
        for columns in formats.four_bit.OF_ROWS
    },
}
FOUR_BIT = ("int4", *formats.four_bit.TABLES)  # kinds
SCALES = (torch.float32, torch.bfloat16, torch.float16)


def stored(format: str) -> Stored | None:
    """How kernels read a format, or None for weights that are not quantised.

    Raises:
        Refused: they do not.
    """
    if format and format not in STORED:
        known = "; ".join(formats.named(name).about for name in STORED)
        raise Refused(f"Kernels read weights in {known}, found {formats.named(format).about}.")
    return STORED.get(format)


def raw(data: torch.Tensor) -> torch.Tensor:
    """The data as integers: not all devices that can compute with e4m3 in other ways know its pointers."""
    return data if data.dtype in (torch.int8, torch.int32) else data.view(torch.uint8)


def words(data: torch.Tensor, how: Stored | None) -> torch.Tensor:
    """The data as a kernel of one row reads them: of a format of four bits eight columns in an int32, however they are stored."""
    if how is None:
        return data
    return data.view(torch.int32) if how.packed > 1 else raw(data)


def width(weight: torch.Tensor, format: str) -> int:
    """The columns of a weight, which is data where there is a format."""
    return formats.named(format).shape(weight)[-1] if format else weight.shape[-1]


def config_of_rows(
    weight: torch.Tensor, format: str, rows: int, swiglu: bool, parts: int, device: devices.Device
) -> FewRowsConfig:
    """`few_rows_config` for so many rows times a weight, which is data where there is a format."""
    N, how = width(weight, format), stored(format)
    dtype, scaled = (torch.uint8, (how.columns or SCALED)) if how else (weight.dtype, SCALED)
    return few_rows_config(N, rows, swiglu, parts, dtype, device, scaled)


PAIRS = {4: torch.int64, 2: torch.int32}


def pairs(x: torch.Tensor) -> torch.Tensor:
    """Two columns of x [B, N] as one integer: [B, N/2]. Rows that do not begin at a whole one are copied."""
    if x.storage_offset() % 2 or x.stride(0) % 2:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(PAIRS[x.itemsize])


def converts(device: torch.device, how: Stored | None) -> bool:
    """Whether a device has an instruction that helps to widen such data: one for e4m3, or for four bits logic of three inputs and
    the choice of bytes, as NVIDIA's have. Triton's interpreter has one for e4m3 that takes NaN for a number."""
    if how is None or compat.interpreting():
        return False
    return not devices.of(device).amd if how.kind in FOUR_BIT else devices.of(device).widens_e4m3


def require(data: torch.Tensor, scale: torch.Tensor, format: str, zero: torch.Tensor | None = None) -> None:
    """Refuse what kernels cannot read: another format, scales of another kind, rows that are not contiguous, or columns that do
    not fill a group."""
    stored(format)
    formats.named(format).check(data, scale, *(() if zero is None else (zero,)))
    if scale.dtype not in SCALES:
        raise Refused(f"Scales must be float32, bfloat16 or float16, found {str(scale.dtype).removeprefix('torch.')}.")
    for name, t in (("weight", data), ("its scale", scale), ("its zero points", zero)):
        if t is not None and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise Refused(f"{name} must have contiguous rows, found the strides {list(t.stride())}.")
    if (columns := width(data, format)) % GROUP:
        raise Refused(f"A quantised weight must have a multiple of {GROUP} columns, found {columns}.")
    if data.dtype == torch.uint8 and any(isinstance(n, int) and n % 4 for n in (data.storage_offset(), *data.stride()[:-1])):
        where = f"{data.storage_offset()} bytes on, with the strides {list(data.stride())}"
        raise Refused(f"Rows of four bits must begin at whole words of four bytes, found them {where}.")


@triton.jit
def _integer(w, I: tl.constexpr, CONVERTS: tl.constexpr):
    """The integer in the I'th four bits of int32, of which the first to the fourth can be asked for, in float32.

    A device has no fast conversion. These bits are put where they stand into the fraction of 2^23; moving them to their place and
    taking off what is too much is one multiplication and addition, of which nothing is rounded.
    """
    FACTOR: tl.constexpr = 1.0 / (1 << (4 * I))
    if CONVERTS:
        # (w & mask) | 2^23 in one instruction, of which ptxas makes two where both are constants.
        given = [w, 15 << (4 * I), 0x4B000000]
        bits = tl.inline_asm_elementwise("lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", given, tl.int32, is_pure=True, pack=1)
    else:
        bits = (w & (15 << (4 * I))) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) * FACTOR - (8388608 * FACTOR + 8)


@triton.jit
def widen(w, KIND: tl.constexpr, CONVERTS: tl.constexpr):
    """Stored weights as float32, exactly: NaN stays NaN, and zero keeps its sign. Of [R, C] of four bits come [R, 8·C]."""
    if KIND == "int4":
        # In the order of columns: what is joined last lies side by side.
        upper = w >> 16
        w04 = tl.join(_integer(w, 0, CONVERTS), _integer(upper, 0, CONVERTS))
        w15 = tl.join(_integer(w, 1, CONVERTS), _integer(upper, 1, CONVERTS))
        w26 = tl.join(_integer(w, 2, CONVERTS), _integer(upper, 2, CONVERTS))
        w37 = tl.join(_integer(w, 3, CONVERTS), _integer(upper, 3, CONVERTS))
        even, odd = tl.join(w04, w26), tl.join(w15, w37)
        wide = tl.reshape(tl.join(even, odd), (w.shape[0], 8 * w.shape[1]))
    elif KIND == "nf4" or KIND == "fp4":
        wide = eight_entries(w, KIND, CONVERTS)
    elif KIND == "e4m3":
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
def load_scales_of_rows(scale_ptrs, N: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The same of rows that have scales of their own, from where those of each begin, [R]: a tuple of [R, BN / GROUP]."""
    first = tl.arange(0, BN // GROUP) * GROUP  # [BN / GROUP]
    steps = ()
    for start in tl.static_range(0, N, BN):
        place = scale_ptrs[:, None] + ((start + first) // COLUMNS)[None, :]  # [R, BN / GROUP]
        if start + BN <= N:
            steps = steps + (tl.load(place).to(tl.float32),)
        else:
            steps = steps + (tl.load(place, mask=(first < N - start)[None, :], other=0.0).to(tl.float32),)
    return steps


@triton.jit
def load_zeros_of_rows(
    zero_ptr, row, end, stride_zm, N: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr
):
    """The zero points of rows, each for GROUP columns, of which eight rows are in an int32: a tuple of [R, BN / GROUP], float32.
    Behind the weight's end those of its first row."""
    row = tl.where(row < end, row, 0).to(tl.int64)  # [R]
    zero_ptrs, shift = zero_ptr + row // 8 * stride_zm, (row % 8 * 4).to(tl.int32)
    first = tl.arange(0, BN // GROUP) * GROUP  # [BN / GROUP]
    steps = ()
    for start in tl.static_range(0, N, BN):
        place = zero_ptrs[:, None] + ((start + first) // COLUMNS)[None, :]  # [R, BN / GROUP]
        if start + BN <= N:
            packed = tl.load(place)
        else:
            packed = tl.load(place, mask=(first < N - start)[None, :], other=0)
        steps = steps + ((((packed >> shift[:, None]) & 15) - 8).to(tl.float32),)
    return steps


@triton.jit
def dot_scaled(
    w, x, scales, zeros, R: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr, CONVERTS: tl.constexpr, GROUP: tl.constexpr
):
    """Σ over steps and columns of (w − zero)·scale·x for rows of one block of rows, or each with scales of its own: [R], float32.

    A zero point meets the sum of its columns' x, which all rows share, and no weight.
    """
    acc = tl.zeros((R, BN // GROUP), tl.float32)
    for i in tl.static_range(len(x)):
        products = tl.reshape(widen(w[i], KIND, CONVERTS) * x[i][None, :], (R, BN // GROUP, GROUP))
        sums = tl.sum(products, 2)
        if len(zeros) > 0:
            sums -= zeros[i] * tl.sum(tl.reshape(x[i], (BN // GROUP, GROUP)), 1)[None, :]
        acc += sums * (scales[i] if len(scales[i].shape) == 2 else scales[i][None, :])
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
def zeros_of_rows(zero_ptr, row, stride_zm):
    """Where the zero points of rows begin, and by how many bits: [BM] each."""
    return zero_ptr + row.to(tl.int64) // 8 * stride_zm, row % 8 * 4


@triton.jit
def times_pairs(w, x, scale, zero, X: tl.constexpr, OPERAND: tl.constexpr, KIND: tl.constexpr, CONVERTS: tl.constexpr):
    """The same of four bits [BM, BK/2] as bytes and pairs of columns of x [BK/2, BB], whose halves have the dtype X: a product of
    the even columns and one of the odd ones, so that nothing need be put side by side. Zero points, [BM] or None, are taken off
    before: integers up to 15 are exact in every operand."""
    BITS: tl.constexpr = X.primitive_bitwidth
    HALF: tl.constexpr = tl.uint16 if BITS == 16 else tl.uint32
    even, odd = x.to(HALF).to(X, bitcast=True), (x >> BITS).to(HALF).to(X, bitcast=True)
    if KIND == "int4":
        w = w.to(tl.int32)
        w_even, w_odd = _integer(w, 0, CONVERTS), _integer(w, 1, CONVERTS)
        scale = scale.to(tl.float32)
    else:
        w_even, w_odd, factor = two_entries(w, KIND, OPERAND, CONVERTS)
        scale = scale.to(tl.float32) * (1.0 / factor)
    if zero is not None:
        w_even, w_odd = w_even - zero[:, None], w_odd - zero[:, None]
    product = tl.dot(w_even.to(OPERAND), even.to(OPERAND), input_precision="ieee")
    product = tl.dot(w_odd.to(OPERAND), odd.to(OPERAND), product, input_precision="ieee")
    return scale[:, None] * product


@triton.jit
def dequantize(w, scale, KIND: tl.constexpr, CONVERTS: tl.constexpr):
    """A step of a weight [BM, BK], of columns that share the scale [BM], in float32: for products of so many rows that a scale is
    cheaper on the weight than on the product."""
    return widen(w, KIND, CONVERTS) * scale.to(tl.float32)[:, None]
