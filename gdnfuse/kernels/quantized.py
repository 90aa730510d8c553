"""How kernels use quantised weights: they read them as they are stored, and multiply sums of products with the scales.

A scale is never multiplied with a weight. Each thread first adds up its products for a block of columns, and the sum is
multiplied with the scale. That is one multiplication for a group of weights, and nothing is rounded between the stored data and
the float32 sum.
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

GROUP = 16  # the most columns whose products are added up before the scale: 16 bytes, what a thread reads at once


class Stored(NamedTuple):
    """How a kernel reads a format: the kind of data, the rows and columns of the weight per scale, and the columns per element.

    0 columns per scale means that a scale is for all columns.
    """

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
        Refused: kernels do not read the format.
    """
    if format and format not in STORED:
        known = "; ".join(formats.named(name).about for name in STORED)
        raise Refused(f"Kernels read weights in {known}, found {formats.named(format).about}.")
    return STORED.get(format)


def raw(data: torch.Tensor) -> torch.Tensor:
    """The data as integers. Not all devices that can compute with e4m3 support pointers to it."""
    return data if data.dtype in (torch.int8, torch.int32) else data.view(torch.uint8)


def words(data: torch.Tensor, how: Stored | None) -> torch.Tensor:
    """The data as a kernel of one row reads them. A format of four bits becomes int32 with eight columns each."""
    if how is None:
        return data
    return data.view(torch.int32) if how.packed > 1 else raw(data)


def octets(data: torch.Tensor, how: Stored) -> torch.Tensor:
    """The data as bytes. A format of four bits has two columns in each."""
    return data.view(torch.uint8) if how.packed > 1 else raw(data)


def width(weight: torch.Tensor, format: str) -> int:
    """The number of columns of a weight, which is data if there is a format."""
    return formats.named(format).shape(weight)[-1] if format else weight.shape[-1]


def config_of_rows(
    weight: torch.Tensor, format: str, rows: int, swiglu: bool, parts: int, device: devices.Device
) -> FewRowsConfig:
    """`few_rows_config` for so many rows times a weight, which is data if there is a format."""
    N, how = width(weight, format), stored(format)
    dtype, scaled = (torch.uint8, (how.columns or SCALED)) if how else (weight.dtype, SCALED)
    return few_rows_config(N, rows, swiglu, parts, dtype, device, scaled)


PAIRS = {4: torch.int64, 2: torch.int32}


def pairs(x: torch.Tensor) -> torch.Tensor:
    """Two columns of x [B, N] as one integer: [B, N/2]. Rows that do not begin at a whole integer are copied."""
    if x.storage_offset() % 2 or x.stride(0) % 2:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(PAIRS[x.itemsize])


def converts(device: torch.device, how: Stored | None) -> bool:
    """Whether a device has an instruction that helps to widen such data.

    For e4m3 that is a conversion. For four bits it is logic with three inputs and the choice of bytes, as on NVIDIA's devices.
    Triton's interpreter has one for e4m3 that treats NaN as a number.
    """
    if how is None or compat.interpreting():
        return False
    return not devices.of(device).amd if how.kind in FOUR_BIT else devices.of(device).widens_e4m3


def require(data: torch.Tensor, scale: torch.Tensor, format: str, zero: torch.Tensor | None = None) -> None:
    """Refuse what kernels cannot read.

    That is another format, scales of another kind, rows that are not contiguous, or columns that do not fill a group.
    """
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
    """The integer in the I-th four bits of int32, for I up to 3, in float32.

    Devices have no fast conversion. The bits are put, where they are, into the fraction of 2^23. One multiplication and addition
    then moves them to their place and removes the excess, without rounding.
    """
    FACTOR: tl.constexpr = 1.0 / (1 << (4 * I))
    if CONVERTS:
        # (w & mask) | 2^23 in one instruction. ptxas would make two if both are constants.
        given = [w, 15 << (4 * I), 0x4B000000]
        bits = tl.inline_asm_elementwise("lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", given, tl.int32, is_pure=True, pack=1)
    else:
        bits = (w & (15 << (4 * I))) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) * FACTOR - (8388608 * FACTOR + 8)


@triton.jit
def widen(w, KIND: tl.constexpr, CONVERTS: tl.constexpr):
    """Stored weights as float32, exactly. NaN stays NaN, and zero keeps its sign. [R, C] with four bits become [R, 8·C]."""
    if KIND == "int4":
        # In the order of columns, because what is joined last is adjacent.
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
            # Moved to float32's places, exponent and fraction are 2^-120 times the number. This holds for subnormal numbers too.
            bits = w.to(tl.uint32)
            magnitude = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
            magnitude = tl.where((bits & 0x7F) == 0x7F, float("nan"), magnitude)
            wide = (magnitude.to(tl.uint32, bitcast=True) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)
    else:
        wide = w.to(tl.float32)
    return wide


@triton.jit
def load_scales(scale_ptr, N: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The scales of a row in steps of BN columns, one for each GROUP columns: a tuple of [BN / GROUP]."""
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
    """The same for rows with their own scales, whose addresses are [R]: a tuple of [R, BN / GROUP]."""
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
    """The zero points of rows, one for GROUP columns, with eight rows per int32: a tuple of [R, BN / GROUP], float32.

    After the end of the weight, they are those of its first row.
    """
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
    """Σ over steps and columns of (w − zero)·scale·x, for rows that share scales or have their own: [R], float32.

    A zero point is multiplied with the sum of x over its columns, which all rows share, and never with a weight.
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
    """Σ over steps and columns of w·x, for weights whose scales are for whole rows: [R], float32."""
    acc = tl.zeros((R, BN), tl.float32)
    for i in tl.static_range(len(x)):
        acc += widen(w[i], KIND, CONVERTS) * x[i][None, :]
    return tl.sum(acc, 1)


@triton.jit
def scales_of_rows(expert, rows, row, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The addresses of the scales of rows of an expert. Scales are contiguous, for weights with so many rows of N columns."""
    columns = (N + COLUMNS - 1) // COLUMNS
    return (tl.cast(expert, tl.int64) * ((rows + ROWS - 1) // ROWS) + row // ROWS) * columns


@triton.jit
def times(w, x, scale, OPERAND: tl.constexpr, KIND: tl.constexpr, CONVERTS: tl.constexpr):
    """A step of a product on tensor cores, for columns that share a scale: w [BM, BK] as stored, x [BK, BB], scale [BM]."""
    return scale.to(tl.float32)[:, None] * tl.dot(widen(w, KIND, CONVERTS).to(OPERAND), x, input_precision="ieee")


@triton.jit
def zeros_of_rows(zero_ptr, row, stride_zm):
    """The addresses of the zero points of rows, and the bit offsets: [BM] each."""
    return zero_ptr + row.to(tl.int64) // 8 * stride_zm, row % 8 * 4


@triton.jit
def times_pairs(w, x, scale, zero, X: tl.constexpr, OPERAND: tl.constexpr, KIND: tl.constexpr, CONVERTS: tl.constexpr):
    """The same for four bits: w [BM, BK/2] as bytes, and pairs of columns of x [BK/2, BB], whose halves have the dtype X.

    There is one product of the even columns and one of the odd ones, so columns need not be interleaved. Zero points, [BM] or
    None, are subtracted before: integers up to 15 are exact in every operand dtype.
    """
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
    """A step of a weight [BM, BK], for columns that share the scale [BM], in float32.

    It is for products with so many rows that scaling the weight is cheaper than scaling the product.
    """
    return widen(w, KIND, CONVERTS) * scale.to(tl.float32)[:, None]
