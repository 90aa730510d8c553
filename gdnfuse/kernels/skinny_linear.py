"""One row times a weight, with what is around the linears of a decode step, which mainly stream their weights.

It computes the dialect's fused_linear and in_proj_conv for one row. y = f(x)·Wᵀ, where f is nothing, an RMSNorm, or the gated
RMSNorm of the gated delta rule (Yang et al. 2024, arXiv:2412.06464). The factor of an RMSNorm is applied to y, so the whole row
need not be known before the weights are used. After the product come low-rank adapters (Hu et al. 2021, arXiv:2106.09685), SwiGLU
(Shazeer 2020, arXiv:2002.05202), a residual, or the conv update of the channels, each of which belongs to the one program that
computes it.

A program takes whole rows of the weight. So no sum is split over programs, and results are deterministic. It goes on to further
rows where that pays. On Hopper it may start, and load its first weights, while the kernel before it still runs (programmatic
dependent launch). It only waits for x, gate and residual, which are all that it reads of a step's results.

Layout: x [..., N] with one row, weight [M, N] with contiguous rows at any distance; output contiguous. Products and sums are
float32. There is one rounding, to the weight's dtype, and none for in_proj_conv.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl

from gdnfuse import compat
from gdnfuse.errors import Refused
from gdnfuse.kernels import devices, quantized, tuned
from gdnfuse.kernels.gated_rms_norm import gated
from gdnfuse.kernels.launch.implementation import kernel_of, overlap_options
from gdnfuse.kernels.quantized import dot_scaled, dot_widened, load_scales, load_scales_of_rows, load_zeros_of_rows

gdc_launch_dependents, gdc_wait = compat.dependent_launch()

MAX_N = 2**15  # the loop over columns is unrolled
MAX_TILE = 2**20  # elements of a block, as Triton allows

# For what is fused around a linear: the largest N, rows per tile (of gate and of up each with SwiGLU), columns per step, warps,
# and programs per multiprocessor (0: one per tile). The first line that fits is used. Chosen on an H200 for bfloat16 with
# benchmarks/gemm.py, or in a chain of layers where that gave another result (docs/trials.md).
CONFIGS = {
    "conv": ((1024, (8, 256, 4, 4)), (2048, (8, 256, 4, 3)), (2560, (8, 256, 4, 2)), (float("inf"), (4, 1024, 4, 0))),
    "norm": ((1024, (8, 256, 4, 4)), (2560, (2, 512, 2, 0)), (float("inf"), (4, 1024, 4, 0))),
    "gate": ((2048, (4, 512, 8, 2)), (4096, (4, 512, 4, 3)), (float("inf"), (4, 512, 4, 2))),
    "swiglu": ((1024, (4, 256, 2, 0)), (2560, (2, 512, 2, 0)), (float("inf"), (2, 4096, 8, 0))),
    "plain": (
        (2048, (2, 1024, 2, 0)),
        (3584, (4, 512, 8, 0)),
        (4096, (2, 512, 2, 4)),
        (8192, (2, 1024, 4, 2)),
        (9216, (1, 1024, 4, 4)),
        (12288, (2, 1024, 4, 2)),
        (float("inf"), (1, 2048, 8, 0)),
    ),
}

# The same for a quantised weight, and for how many columns at a time the sum of products is multiplied with a scale.
QUANTIZED_CONFIGS = {
    "conv": ((512, (8, 256, 4, 0, 16)), (2560, (8, 512, 4, 0, 16)), (float("inf"), (8, 1024, 4, 0, 16))),
    "norm": ((512, (8, 256, 4, 0, 16)), (2560, (16, 512, 4, 0, 16)), (float("inf"), (8, 1024, 4, 0, 16))),
    "gate": ((512, (8, 512, 4, 0, 16)), (float("inf"), (8, 1024, 4, 0, 16))),
    "swiglu": (
        (512, (8, 256, 4, 0, 16)),
        (2560, (8, 512, 4, 0, 16)),
        (4096, (4, 1024, 4, 0, 16)),
        (float("inf"), (4, 1024, 4, 0, 8)),
    ),
    "plain": ((3072, (8, 512, 4, 0, 8)), (float("inf"), (2, 1024, 4, 0, 8))),
}

# The same for four bits. Chosen from int4's machine code for sm_90: the fewest instructions per weight without spilling. Not
# measured.
INT4_CONFIGS = {
    "conv": ((1024, (16, 1024, 4, 0, 32)), (2560, (16, 512, 4, 0, 32)), (float("inf"), (8, 1024, 4, 0, 32))),
    "norm": ((1024, (16, 1024, 4, 0, 32)), (2560, (16, 512, 4, 0, 32)), (float("inf"), (8, 1024, 4, 0, 32))),
    "gate": ((512, (8, 512, 4, 0, 32)), (float("inf"), (8, 1024, 4, 0, 32))),
    "swiglu": ((2560, (8, 512, 4, 0, 16)), (float("inf"), (4, 1024, 4, 0, 16))),
    "plain": ((4096, (8, 512, 4, 0, 16)), (12288, (4, 2048, 4, 0, 16)), (float("inf"), (4, 2048, 8, 0, 16))),
}

Config = tuple[int, ...]
# For all A's of the adapters on a linear. These are few rows. The kernel of the linear waits for this one while it loads its
# weights. There are as many programs as rows, up to ROWS_APART. Not measured.
LORA_COLUMNS, LORA_GATED_COLUMNS, LORA_WARPS, ROWS_APART = 1024, 512, 4, 512
MAX_LORA = 4  # the most tensors of B's, one for each rank
# For rows after a quantised weight: how many a program takes, and how many of their columns at once.
PLAIN_ROWS, PLAIN_COLUMNS = tl.constexpr(2), tl.constexpr(2048)


def kind(norm_weight: Any = None, gate: Any = None, swiglu: bool = False, conv: Any = None) -> str:
    """What is fused around a linear, as named in CONFIGS."""
    given = {"conv": conv is not None, "gate": gate is not None, "swiglu": swiglu, "norm": norm_weight is not None, "plain": True}
    return next(name for name, is_given in given.items() if is_given)


def config(kind: str, n: int, dtype: torch.dtype = torch.bfloat16) -> Config:
    """Rows per tile, columns per step, warps and programs per multiprocessor for a weight of n columns.

    For a quantised weight, also the number of columns whose sum is multiplied with a scale.
    """
    if dtype.itemsize == 1:
        rows, block, num_warps, per_sm, group = next(c for width, c in QUANTIZED_CONFIGS[kind] if n <= width)
        return rows, max(min(block, triton.next_power_of_2(n)), group), num_warps, per_sm, group
    rows, block, num_warps, per_sm = next(c for width, c in CONFIGS[kind] if n <= width)
    # In other dtypes as many rows may spill registers. A thread still loads 16 bytes.
    if dtype != torch.bfloat16 and rows > 1 and rows // 2 * block * dtype.itemsize >= 16 * 32 * num_warps:
        rows //= 2
    return rows, min(block, triton.next_power_of_2(n)), num_warps, per_sm


def config_of(kind: str, weight: torch.Tensor, format: str = "") -> Config:
    """`config` for a weight, which is data if there is a format."""
    n = quantized.width(weight, format)
    if format and quantized.stored(format).packed > 1:
        rows, block, *rest = next(c for width, c in INT4_CONFIGS[kind] if n <= width)
        return rows, max(min(block, triton.next_power_of_2(n)), rest[-1]), *rest
    return config(kind, n, weight.dtype)


def require_config(chosen: Config, M: int, n: int, how: quantized.Stored | None, kind: str, head: int) -> None:
    """Refuse a config that this kernel cannot be launched with.

    Args:
        chosen: as `config` returns it.
        M: rows of the result, without plain rows after a quantised weight.
        n: columns of the weight.
        how: how the weight is stored, or None if it is not quantised.
        kind: as in CONFIGS.
        head: columns of a head under a gate.
    """
    rows, block, num_warps, per_sm, *group = chosen
    tuned.require_powers(rows=rows, columns=block, warps=num_warps, **({"group": group[0]} if group else {}))
    if per_sm < 0 or rows * block > MAX_TILE or bool(group) != (how is not None):
        raise Refused(f"A config must have tiles of up to {MAX_TILE} weights and no negative numbers, found {list(chosen)}.")
    if kind == "gate":
        tuned.require_divides(n, block, "The columns of the weight")
        tuned.require_divides(block, head, "The columns of a step")
    if how is None:
        return
    tuned.require_divides(block, max(group[0], 8 if how.packed > 1 else 1), "The columns of a step")
    tuned.require_divides(how.columns, group[0], "The columns that share a scale")
    if kind != "plain":
        tuned.require_divides(M, rows, "The rows of a quantised weight")
    if how.rows > 1:
        tuned.require_divides(how.rows, rows, "The rows that share a scale")


def lora_config(rows: int, n: int, gated: bool) -> Config:
    """`config` for the A's of adapters, [rows, n] in all."""
    block = LORA_GATED_COLUMNS if gated else LORA_COLUMNS
    return 1 if rows <= ROWS_APART else 4, min(block, triton.next_power_of_2(n)), LORA_WARPS, 0


def lora_table(B: list[torch.Tensor], parts: list[int], scaling: list[float]) -> tuple[Any, ...]:
    """The kernel's table of adapters.

    For each adapter that a row may have: which tensor its B is in, the rank, the next power of two, and the number of
    projections. For each projection: its first row and its end, the rows of B and of A for the first one, and the scaling.
    """
    slots: list[tuple[int, list[tuple[Any, ...]]]] = []
    for (first, width, row, of, start), scale in zip(zip(*[iter(parts)] * 5, strict=True), scaling, strict=True):
        part = (first, first + width, start, row, float(scale))
        free = (p for t, p in slots if t == of and all(part[1] <= a or b <= first for a, b, *_ in p))
        if (slot := next(free, None)) is None:
            slots.append((of, slot := []))
        slot.append(part)
    rank = [b.shape[1] for b in B]
    heads = [(of, rank[of], triton.next_power_of_2(rank[of]), len(found)) for of, found in slots]
    return tuple((*head, *chain.from_iterable(found)) for head, (_, found) in zip(heads, slots, strict=True))


@triton.jit
def load_rows(weight_ptr, row, live, stride_wm, N: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr = 0):
    """The rows of the weight in steps of BN columns: a tuple of [R, BN].

    A thread reads at most GROUP columns at once, unless GROUP is 0.
    """
    column = tl.arange(0, BN)  # [BN]
    if GROUP > 0:
        column = tl.max_contiguous(column, GROUP)
    w_ptrs = weight_ptr + row.to(tl.int64)[:, None] * stride_wm + column[None, :]  # [R, BN]
    steps = ()
    for start in tl.static_range(0, N, BN):
        if EVEN and start + BN <= N:
            steps = steps + (tl.load(w_ptrs + start),)
        else:
            steps = steps + (tl.load(w_ptrs + start, mask=live[:, None] & (column < N - start)[None, :], other=0.0),)
    return steps


@triton.jit
def load_row(ptr, N: tl.constexpr, BN: tl.constexpr):
    """A row in steps of BN columns: a tuple of [BN]."""
    column = tl.arange(0, BN)  # [BN]
    steps = ()
    for start in tl.static_range(0, N, BN):
        if start + BN <= N:
            steps = steps + (tl.load(ptr + start + column),)
        else:
            steps = steps + (tl.load(ptr + start + column, mask=column < N - start, other=0.0),)
    return steps


@triton.jit
def dot_rows(w, x, R: tl.constexpr, BN: tl.constexpr):
    """Σ over steps and columns of w·x: [R], float32."""
    acc = tl.zeros((R, BN), tl.float32)
    for i in tl.static_range(len(x)):
        acc += w[i].to(tl.float32) * x[i][None, :]
    return tl.sum(acc, 1)


@triton.jit
def _regrouped(row, PARTS: tl.constexpr, HEADS: tl.constexpr):
    """The place of columns of a row, which has parts head by head, if the parts follow each other. −1 for a column of no part.

    PARTS has for each part its first column there, the width of a head, its first column here and the distance to the next head.
    """
    column = tl.full(row.shape, -1, row.dtype)
    for i in tl.static_range(len(PARTS)):
        e = row - PARTS[i][2]
        head, inner = e // PARTS[i][3], e % PARTS[i][3]
        inside = (e >= 0) & (head < HEADS) & (inner < PARTS[i][1])
        column = tl.where(inside, PARTS[i][0] + head * PARTS[i][1] + inner, column)
    return column


@triton.jit
def _rows_of_B(b_ptr, row, LORA: tl.constexpr, i: tl.constexpr):
    """The rows of an adapter's B: [R, rank], padded with zeros to a power of two."""
    width: tl.constexpr = LORA[i][2]
    count: tl.constexpr = LORA[i][3]
    at = tl.full(row.shape, -1, row.dtype)
    for k in tl.static_range(count):
        inside = (row >= LORA[i][4 + 5 * k]) & (row < LORA[i][5 + 5 * k])
        at = tl.where(inside, row - LORA[i][4 + 5 * k] + LORA[i][6 + 5 * k], at)
    j = tl.arange(0, width)  # [rank]
    b_ptrs = b_ptr + at.to(tl.int64)[:, None] * LORA[i][1] + j[None, :]  # [R, rank]
    return tl.load(b_ptrs, mask=(at >= 0)[:, None] & (j < LORA[i][1])[None, :], other=0.0)


@triton.jit
def _load_B(b0_ptr, b1_ptr, b2_ptr, b3_ptr, row, LORA: tl.constexpr):
    """The rows of B of each adapter that a row may have: a tuple of [R, rank]."""
    found = ()
    for i in tl.static_range(len(LORA)):
        if LORA[i][0] == 0:
            found = found + (_rows_of_B(b0_ptr, row, LORA, i),)
        elif LORA[i][0] == 1:
            found = found + (_rows_of_B(b1_ptr, row, LORA, i),)
        elif LORA[i][0] == 2:
            found = found + (_rows_of_B(b2_ptr, row, LORA, i),)
        else:
            found = found + (_rows_of_B(b3_ptr, row, LORA, i),)
    return found


@triton.jit
def _times_low(b, low_ptr, row, LORA: tl.constexpr, i: tl.constexpr):
    """scaling·B·(A·x) of an adapter whose A·x is known: [R]."""
    width: tl.constexpr = LORA[i][2]
    count: tl.constexpr = LORA[i][3]
    first = tl.zeros(row.shape, row.dtype)
    scaling = tl.zeros(row.shape, tl.float32)
    for k in tl.static_range(count):
        inside = (row >= LORA[i][4 + 5 * k]) & (row < LORA[i][5 + 5 * k])
        first = tl.where(inside, LORA[i][7 + 5 * k], first)
        scaling = tl.where(inside, LORA[i][8 + 5 * k], scaling)
    j = tl.arange(0, width)  # [rank]
    live = (j[None, :] < LORA[i][1]) & (row >= 0)[:, None]
    low = tl.load(low_ptr + first[:, None] + j[None, :], mask=live, other=0.0)  # [R, rank]
    return scaling * tl.sum(b.to(tl.float32) * low, 1)


@triton.jit
def _add_lora(y, b, low_ptr, row, LORA: tl.constexpr):
    """y plus what the adapters add to each row."""
    for i in tl.static_range(len(LORA)):
        y += _times_low(b[i], low_ptr, row, LORA, i)
    return y


@triton.jit
def _dot_stored(
    w, x, scales, zeros, scale_ptr, row, live, stride_sm, R: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr,
    CONVERTS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Like dot_rows, for rows of a quantised weight."""
    if COLUMNS > 0:
        y = dot_scaled(w, x, scales, zeros, R, BN, KIND, CONVERTS, GROUP)
    else:
        scale_ptrs = scale_ptr + (row // ROWS).to(tl.int64) * stride_sm  # [R]
        y = dot_widened(w, x, R, BN, KIND, CONVERTS) * tl.load(scale_ptrs, mask=live, other=0.0).to(tl.float32)
    return y


@triton.jit
def _scales_of(scale_ptr, row, end, stride_sm, ROWS: tl.constexpr):
    """The address of the scales of a row's block. After the end of the weight, that of the first."""
    return scale_ptr + tl.where(row < end, row, 0).to(tl.int64) // ROWS * stride_sm


@triton.jit
def _plain_rows(
    x_ptr, plain_ptr, norm_weight_ptr, out_ptr, norm_eps, norm_offset, first, stored, M, stride_pm,
    N: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr, LINES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The work of a program for PLAIN_ROWS of the rows after a quantised weight, with a norm before them.

    Before the wait they are loaded into the L2, LINES lines of 128 bytes each.
    """
    BN: tl.constexpr = PLAIN_COLUMNS
    i = first * PLAIN_ROWS + tl.arange(0, PLAIN_ROWS)  # [PLAIN_ROWS]
    live = i < M - stored
    row_ptrs = plain_ptr + tl.where(live, i, 0).to(tl.int64) * stride_pm  # [PLAIN_ROWS]
    if OVERLAP:
        line = tl.minimum(tl.arange(0, LINES) * (1024 // plain_ptr.dtype.element_ty.primitive_bitwidth), N - 1)  # [LINES]
        address = (row_ptrs[:, None] + line[None, :]).to(tl.int64)
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], tl.int32, is_pure=False, pack=1)
        gdc_wait()
    acc = tl.zeros((PLAIN_ROWS, BN), tl.float32)
    square = tl.zeros((BN,), tl.float32)
    for start in range(0, N, BN):
        column = start + tl.arange(0, BN)  # [BN]
        inside = column < N
        w = tl.load(row_ptrs[:, None] + column[None, :], mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)  # [BN]
        if norm_weight_ptr is not None:
            square += x * x
            norm_weight = tl.load(norm_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)  # [BN]
            x = x * (tl.cast(norm_offset, tl.float32) + norm_weight)
        acc += w * x[None, :]
    y = tl.sum(acc, 1)  # [PLAIN_ROWS]
    if norm_weight_ptr is not None:
        y = y * tl.rsqrt(tl.sum(square, 0) / N + tl.cast(norm_eps, tl.float32))
    row = stored + i
    place = row if PARTS is None else _regrouped(row, PARTS, HEADS)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=live & (place >= 0))


@triton.jit
def skinny_linear_kernel(
    x_ptr, weight_ptr, scale_ptr, zero_ptr, plain_ptr, norm_weight_ptr, gate_ptr, residual_ptr,
    conv_state_ptr, conv_weight_ptr, conv_bias_ptr, low_ptr, b0_ptr, b1_ptr, b2_ptr, b3_ptr, out_ptr,
    norm_eps, norm_offset, M, stored, tiles, programs, plain_programs, conv_offset, D,
    stride_wm, stride_pm, stride_sm, stride_zm, stride_sd, stride_ss, stride_cd, stride_cw,
    N: tl.constexpr, V: tl.constexpr, S: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, SWIGLU: tl.constexpr,
    GATE_SILU: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, LOOP: tl.constexpr, OVERLAP: tl.constexpr,
    PARTS: tl.constexpr, HEADS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PACKED: tl.constexpr, CONVERTS: tl.constexpr, GROUP: tl.constexpr, LINES: tl.constexpr, LORA: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    # `stored` is M, unless plain rows follow those of a quantised weight. Their programs take longer and come first.
    first = tl.program_id(0) - plain_programs
    if plain_ptr is not None:
        if first < 0:
            _plain_rows(
                x_ptr, plain_ptr, norm_weight_ptr, out_ptr, norm_eps, norm_offset, first + plain_programs, stored, M, stride_pm,
                N, PARTS, HEADS, LINES, OVERLAP,
            )  # fmt: skip
            return
    up_ptr = weight_ptr + tl.cast(stored, tl.int64) * stride_wm
    row = first * R + tl.arange(0, R)  # [R]
    w = load_rows(weight_ptr, row, row < stored, stride_wm, N // PACKED, BN // PACKED, EVEN, GROUP // PACKED)
    scales, up_scales, zeros, up_zeros = (), (), (), ()
    if SWIGLU:
        w_up = load_rows(up_ptr, row, row < stored, stride_wm, N // PACKED, BN // PACKED, EVEN, GROUP // PACKED)
    if PACKED > 1:
        scales = load_scales_of_rows(_scales_of(scale_ptr, row, stored, stride_sm, ROWS), N, BN, COLUMNS, GROUP)
        if SWIGLU:
            of_up = _scales_of(scale_ptr, stored + row, 2 * stored, stride_sm, ROWS)
            up_scales = load_scales_of_rows(of_up, N, BN, COLUMNS, GROUP)
        if zero_ptr is not None:
            zeros = load_zeros_of_rows(zero_ptr, row, stored, stride_zm, N, BN, COLUMNS, GROUP)
            if SWIGLU:
                up_zeros = load_zeros_of_rows(zero_ptr, stored + row, 2 * stored, stride_zm, N, BN, COLUMNS, GROUP)
    elif KIND is not None and COLUMNS > 0:
        begin = first * R
        scales = load_scales(_scales_of(scale_ptr, begin, stored, stride_sm, ROWS), N, BN, COLUMNS, GROUP)
        if SWIGLU:
            up_scales = load_scales(_scales_of(scale_ptr, stored + begin, 2 * stored, stride_sm, ROWS), N, BN, COLUMNS, GROUP)
    if norm_weight_ptr is not None and gate_ptr is None:
        norm_weight = load_row(norm_weight_ptr, N, BN)
    if LORA is not None:
        b = _load_B(b0_ptr, b1_ptr, b2_ptr, b3_ptr, row, LORA)
        if SWIGLU:
            b_up = _load_B(b0_ptr, b1_ptr, b2_ptr, b3_ptr, stored + row, LORA)
    if OVERLAP:
        gdc_wait()

    loaded = load_row(x_ptr, N, BN)
    x = ()
    factor = 1.0
    if gate_ptr is not None:
        gates = load_row(gate_ptr, N, BN)
        weight = tl.load(norm_weight_ptr + tl.arange(0, BN) % V).to(tl.float32)  # [BN]
        for i in tl.static_range(len(loaded)):
            o = loaded[i].to(tl.float32)  # [BN]
            squares = tl.sum(tl.reshape(o * o, (BN // V, V)), 1) / V  # [BN / V]
            mean_square = tl.reshape(tl.broadcast_to(squares[:, None], (BN // V, V)), (BN,))  # [BN]
            x = x + (gated(o, mean_square, gates[i].to(tl.float32), weight, tl.cast(norm_eps, tl.float32), GATE_SILU),)
    else:
        square = tl.zeros((BN,), tl.float32)
        for i in tl.static_range(len(loaded)):
            step = loaded[i].to(tl.float32)  # [BN]
            if norm_weight_ptr is not None:
                square += step * step
                step = step * (tl.cast(norm_offset, tl.float32) + norm_weight[i].to(tl.float32))
            x = x + (step,)
        if norm_weight_ptr is not None:
            factor = tl.rsqrt(tl.sum(square, 0) / N + tl.cast(norm_eps, tl.float32))

    for tile in range(first, tiles, programs):
        row = tile * R + tl.arange(0, R)  # [R]
        live = row < stored
        place = row if PARTS is None else _regrouped(row, PARTS, HEADS)  # [R], column of the result
        channel = (place - conv_offset).to(tl.int64)  # [R]
        convolved = live & (channel >= 0) & (channel < D)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + row, mask=live, other=0.0).to(tl.float32)  # [R]
        columns = ()
        acc = tl.zeros((R,), tl.float32)
        if conv_state_ptr is not None:
            for j in tl.static_range(S):
                column = tl.load(conv_state_ptr + channel * stride_sd + j * stride_ss, mask=convolved, other=0.0)  # [R]
                columns = columns + (column,)
                if j >= S + 1 - W:
                    tap = tl.load(
                        conv_weight_ptr + channel * stride_cd + (j - (S + 1 - W)) * stride_cw, mask=convolved, other=0.0
                    )  # [R]
                    acc += column.to(tl.float32) * tap.to(tl.float32)
            tap = tl.load(conv_weight_ptr + channel * stride_cd + (W - 1) * stride_cw, mask=convolved, other=0.0)  # [R]
            if conv_bias_ptr is not None:
                acc += tl.load(conv_bias_ptr + channel, mask=convolved, other=0.0).to(tl.float32)

        if KIND is None:
            y = dot_rows(w, x, R, BN) * factor  # [R]
            if LORA is not None:
                y = _add_lora(y, b, low_ptr, row, LORA)
            if SWIGLU:
                up = dot_rows(w_up, x, R, BN) * factor  # [R]
                if LORA is not None:
                    up = _add_lora(up, b_up, low_ptr, stored + row, LORA)
                y = y * tl.sigmoid(y) * up
        else:
            y = factor * _dot_stored(
                w, x, scales, zeros, scale_ptr, row, live, stride_sm, R, BN, KIND, CONVERTS, GROUP, ROWS, COLUMNS
            )
            if SWIGLU:
                y = y * tl.sigmoid(y)
                y = y * factor * _dot_stored(
                    w_up, x, up_scales, up_zeros, scale_ptr, stored + row, live, stride_sm,
                    R, BN, KIND, CONVERTS, GROUP, ROWS, COLUMNS,
                )  # fmt: skip
        if LOOP:
            ahead = row + programs * R
            w = load_rows(weight_ptr, ahead, ahead < stored, stride_wm, N // PACKED, BN // PACKED, False, GROUP // PACKED)
            if SWIGLU:
                w_up = load_rows(up_ptr, ahead, ahead < stored, stride_wm, N // PACKED, BN // PACKED, False, GROUP // PACKED)
            if LORA is not None:
                b = _load_B(b0_ptr, b1_ptr, b2_ptr, b3_ptr, ahead, LORA)
                if SWIGLU:
                    b_up = _load_B(b0_ptr, b1_ptr, b2_ptr, b3_ptr, stored + ahead, LORA)
            if PACKED > 1:
                scales = load_scales_of_rows(_scales_of(scale_ptr, ahead, stored, stride_sm, ROWS), N, BN, COLUMNS, GROUP)
                if SWIGLU:
                    of_up = _scales_of(scale_ptr, stored + ahead, 2 * stored, stride_sm, ROWS)
                    up_scales = load_scales_of_rows(of_up, N, BN, COLUMNS, GROUP)
                if zero_ptr is not None:
                    zeros = load_zeros_of_rows(zero_ptr, ahead, stored, stride_zm, N, BN, COLUMNS, GROUP)
                    if SWIGLU:
                        up_zeros = load_zeros_of_rows(zero_ptr, stored + ahead, 2 * stored, stride_zm, N, BN, COLUMNS, GROUP)
            elif KIND is not None and COLUMNS > 0:
                begin = (tile + programs) * R
                scales = load_scales(_scales_of(scale_ptr, begin, stored, stride_sm, ROWS), N, BN, COLUMNS, GROUP)
                if SWIGLU:
                    up_scales = load_scales(
                        _scales_of(scale_ptr, stored + begin, 2 * stored, stride_sm, ROWS), N, BN, COLUMNS, GROUP
                    )
        if residual_ptr is not None:
            y += residual
        if conv_state_ptr is not None:
            acc += y * tap.to(tl.float32)
            if SILU:
                acc = acc * tl.sigmoid(acc)
            # If threads hold the same channels, all must have read them before one writes.
            tl.debug_barrier()
            for j in tl.static_range(S - 1):
                tl.store(conv_state_ptr + channel * stride_sd + j * stride_ss, columns[j + 1], mask=convolved)
            newest = conv_state_ptr + channel * stride_sd + (S - 1) * stride_ss  # [R]
            tl.store(newest, y.to(conv_state_ptr.dtype.element_ty), mask=convolved)
            y = tl.where(convolved, acc, y)
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=live & (place >= 0))


def launch_with(
    chosen: Config, x, weight, norm_weight=None, norm_eps=0.0, norm_offset=0.0, gate=None, swiglu=False, residual=None,
    gate_activation="silu", conv=None, parts=None, heads=1, scale=None, format="", zero=None, plain=None, dtype=None,
    lora=None, overlap=False,
) -> torch.Tensor:  # fmt: skip
    """fused_linear or in_proj_conv for one row.

    `conv` is (conv_state, conv_weight, conv_bias, conv_offset, activation). `parts` is as in `_regrouped`. A quantised weight has
    `scale`, `format` and maybe `zero`, as in the dialect's dequantize, and may be followed by rows of `plain`; the result then
    has `dtype`. `lora` is A·x of all adapters in float32, their B's, and the result of `lora_table`.
    """
    R, BN, num_warps, per_sm, *group = chosen
    N = quantized.width(weight, format)
    stored = weight.shape[0] // (2 if swiglu else 1)
    M = stored + (0 if plain is None else plain.shape[0])
    how = quantized.stored(format)
    dtype, data = dtype or weight.dtype, quantized.words(weight, how)
    tiles, plain_programs = -(-stored // R), -(-(M - stored) // PLAIN_ROWS.value)
    programs = min(tiles, per_sm * devices.of(x.device).multiprocessors) if per_sm else tiles
    state, taps, bias, conv_offset, activation = (None, None, None, 0, "none") if conv is None else conv
    columns = M if parts is None else heads * sum(width for _, width, *_ in parts)
    out = torch.empty((*x.shape[:-1], columns), dtype=dtype if conv is None else torch.float32, device=x.device)
    low, B, table = lora or (None, (), None)
    options = overlap_options(x, norm_weight, bias) if overlap else {}
    kernel_of(skinny_linear_kernel)[(plain_programs + programs,)](
        x, data, scale, zero, plain,
        None if norm_weight is None else norm_weight.contiguous(), gate, residual, state, taps,
        None if bias is None else bias.contiguous(), low, *B, *[None] * (MAX_LORA - len(B)), out,
        norm_eps, norm_offset, M, stored, tiles, programs, plain_programs, conv_offset, 0 if state is None else state.shape[1],
        data.stride(0), 0 if plain is None else plain.stride(0), 0 if scale is None else scale.stride(0),
        0 if zero is None else zero.stride(0),
        *((0, 0, 0, 0) if conv is None else (*state.stride()[1:], taps.stride(0), taps.stride(2))),
        N=N, V=1 if gate is None else norm_weight.shape[0], S=1 if state is None else state.shape[2],
        W=1 if taps is None else taps.shape[2], SILU=activation == "silu", SWIGLU=swiglu,
        GATE_SILU=gate_activation == "silu",
        R=R, BN=BN, EVEN=stored % R == 0, LOOP=programs < tiles, OVERLAP=bool(options),
        PARTS=parts, HEADS=heads, KIND=how and how.kind, ROWS=how.rows if how else 1, COLUMNS=how.columns if how else 0,
        PACKED=how.packed if how else 1, CONVERTS=quantized.converts(x.device, how), GROUP=group[0] if group else 0,
        LINES=0 if plain is None else triton.next_power_of_2(N * plain.itemsize // 128), LORA=table,
        num_warps=num_warps, **options,
    )  # fmt: skip
    return out
