"""Chooses values of a table of 16 by four bits each, without leaving registers: nf4 and fp4 in kernels.

On NVIDIA's devices each lane keeps one value in float32, and a shuffle fetches the one that a code chooses. That is one
instruction. Choosing bit by bit takes twenty. A multiprocessor has 32 shuffles per cycle, enough for 84 % of what an H200's
memory could stream.

On tensor cores a value must be in half precision, and prmt chooses any four of eight bytes. So a table is kept in two planes, one
for each byte of a value. For four codes, three prmt find one byte of each value: from the first half of the table, from the
second half, and from either by the last bit of the code. These tables are multiplied by a factor for which rounding costs least,
and the scales are divided by it. Then nf4 is twice as near to its table as a weight that is rounded after scaling, and fp4 is
exact.

On other devices values are chosen bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gdnfuse.formats.four_bit import TABLES

# The factors from 1 to 2, in steps of 2^-17, with the least error for normally distributed weights. The values of fp4 are small
# multiples of 1/192.
FACTORS = {
    ("nf4", torch.bfloat16): 1.4367141723632812,
    ("nf4", torch.float16): 1.3661956787109375,
    ("fp4", torch.bfloat16): 12.0,
    ("fp4", torch.float16): 12.0,
}


def entries(kind: str, dtype: torch.dtype) -> torch.Tensor:
    """The values of a table times the factor of a dtype, in that dtype: [16]."""
    return (torch.tensor(TABLES[kind], dtype=torch.float64, device="cpu") * FACTORS.get((kind, dtype), 1.0)).to(dtype)


def planes(kind: str, dtype: torch.dtype) -> list[list[int]]:
    """A table in half precision as two planes of bytes, the lower byte first. Each has four words with bytes of four values."""
    bits = entries(kind, dtype).view(torch.int16).tolist()
    place = [[(n >> 8 * byte & 255) << 8 * (i % 4) for i, n in enumerate(bits)] for byte in range(2)]
    return [[sum(bytes_[i : i + 4]) for i in range(0, 16, 4)] for bytes_ in place]


def choose(kind: str, dtype: torch.dtype) -> str:
    """PTX that turns the eight codes in a word into values in half precision, two per word.

    Those in upper halves of bytes come first.
    """
    lines = [".reg .b32 small, half, one, other, p0, p1;"]
    # The upper bit of a selector would choose the sign of a byte. So it is removed, and chooses between the halves of the table.
    lines += ["and.b32 small, $4, 0x77777777;", "shr.u32 half, $4, 1;", "lop3.b32 half, half, 0x44444444, 0x32103210, 0xEA;"]
    for word in range(2):
        if word:
            lines += ["shr.u32 small, small, 16;", "shr.u32 half, half, 16;"]
        for i, (a, b, c, d) in enumerate(planes(kind, dtype)):
            lines += [f"prmt.b32 one, {a:#x}, {b:#x}, small;", f"prmt.b32 other, {c:#x}, {d:#x}, small;"]
            lines += [f"prmt.b32 p{i}, one, other, half;"]
        lines += [f"prmt.b32 ${word}, p0, p1, 0x7351;", f"prmt.b32 ${2 + word}, p0, p1, 0x6240;"]
    return "{\n" + "\n".join(lines) + "\n}"


def fetch() -> str:
    """PTX that turns the eight codes in a word into values in float32, from the lowest four bits on.

    A lane has one of 16 values.
    """
    lines = [".reg .b32 code;", "mov.b32 code, $8;"]
    for i in range(8):
        lines += ["shr.u32 code, code, 4;"] * (i > 0)
        lines += [f"shfl.sync.idx.b32 ${i}, $9, code, 0x101f, 0xffffffff;"]  # the shuffle uses the code modulo 16
    return "{\n" + "\n".join(lines) + "\n}"


NF4, FP4 = (tl.constexpr(TABLES[kind]) for kind in ("nf4", "fp4"))
FETCH = tl.constexpr(fetch())
NF4_BF16, FP4_BF16 = (tl.constexpr(choose(kind, torch.bfloat16)) for kind in ("nf4", "fp4"))
NF4_F16, FP4_F16 = (tl.constexpr(choose(kind, torch.float16)) for kind in ("nf4", "fp4"))
NF4_BF16_FACTOR = tl.constexpr(FACTORS["nf4", torch.bfloat16])
NF4_F16_FACTOR = tl.constexpr(FACTORS["nf4", torch.float16])
FP4_FACTOR = tl.constexpr(FACTORS["fp4", torch.bfloat16])


@triton.jit
def _entry(w, I: tl.constexpr, TABLE: tl.constexpr, FACTOR: tl.constexpr):
    """The value that the I-th four bits of integers choose, times a factor, in float32."""
    code = w >> (4 * I)
    level = ()
    for k in tl.static_range(8):
        level = level + (tl.where((code & 1) != 0, TABLE[2 * k + 1] * FACTOR, TABLE[2 * k] * FACTOR),)
    for bit in tl.static_range(1, 4):
        chosen = (code & (1 << bit)) != 0
        above = ()
        for k in tl.static_range(8 >> bit):
            above = above + (tl.where(chosen, level[2 * k + 1], level[2 * k]),)
        level = above
    return level[0]


@triton.jit
def eight_entries(w, KIND: tl.constexpr, CONVERTS: tl.constexpr):
    """The values [R, 8·C] in float32, exactly, for int32 [R, C] with two columns per byte, the first in its upper bits."""
    TABLE: tl.constexpr = NF4 if KIND == "nf4" else FP4
    if CONVERTS:
        lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [tl.program_id(0)], tl.int32, is_pure=True, pack=1)
        n0, n1, n2, n3, n4, n5, n6, n7 = tl.inline_asm_elementwise(
            FETCH, "=f,=f,=f,=f,=f,=f,=f,=f,r,f", [w, _entry(lane, 0, TABLE, 1)],
            (tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        n0, n1, n2, n3 = _entry(w, 0, TABLE, 1), _entry(w, 1, TABLE, 1), _entry(w, 2, TABLE, 1), _entry(w, 3, TABLE, 1)
        n4, n5, n6, n7 = _entry(w, 4, TABLE, 1), _entry(w, 5, TABLE, 1), _entry(w, 6, TABLE, 1), _entry(w, 7, TABLE, 1)
    # What is joined last is adjacent.
    even = tl.join(tl.join(n1, n5), tl.join(n3, n7))
    odd = tl.join(tl.join(n0, n4), tl.join(n2, n6))
    return tl.reshape(tl.join(even, odd), (w.shape[0], 8 * w.shape[1]))


@triton.jit
def two_entries(w, KIND: tl.constexpr, OPERAND: tl.constexpr, CONVERTS: tl.constexpr):
    """The values for the upper and lower bits of bytes in a dtype of products, and the factor by which both are too large."""
    if OPERAND == tl.float32:
        FACTOR: tl.constexpr = 1.0
    elif KIND == "fp4":
        FACTOR: tl.constexpr = FP4_FACTOR
    else:
        FACTOR: tl.constexpr = NF4_BF16_FACTOR if OPERAND == tl.bfloat16 else NF4_F16_FACTOR
    if CONVERTS and OPERAND == tl.bfloat16:
        BF16: tl.constexpr = NF4_BF16 if KIND == "nf4" else FP4_BF16
        even, odd = tl.inline_asm_elementwise(
            BF16, "=r,=r,=r,=r,r", [w], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )  # fmt: skip
    elif CONVERTS and OPERAND == tl.float16:
        F16: tl.constexpr = NF4_F16 if KIND == "nf4" else FP4_F16
        even, odd = tl.inline_asm_elementwise(
            F16, "=r,=r,=r,=r,r", [w], (tl.float16, tl.float16), is_pure=True, pack=4
        )  # fmt: skip
    else:
        TABLE: tl.constexpr = NF4 if KIND == "nf4" else FP4
        codes = w.to(tl.int32)
        even, odd = _entry(codes, 1, TABLE, FACTOR).to(OPERAND), _entry(codes, 0, TABLE, FACTOR).to(OPERAND)
    return even, odd, FACTOR
