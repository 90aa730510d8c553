"""few_rows_linear on Hopper (compute capability 9) for half precision, in Gluon. Weights come through a ring in shared memory.

It replaces few_rows_linear.py and computes the same. A program has a range of the weight's rows, in tiles of up to 64, and goes
over their columns in steps. Copies of a step into the ring (cp.async) run several steps ahead of the products (wgmma, with the
weight's rows as the product's rows). Every multiprocessor has equally many rows, for any number of rows: rows that a tile lacks
are neither copied nor stored. The ring is full of weights before the kernel waits for the one that makes x. few_rows_linear has
one step by then.

What low-rank adapters add (see few_rows_linear.py) are more columns: those of their B's, times A·x, in slots of 16. B's are
loaded before the wait and A·x right behind it, while x is on its way. Both stay in shared memory until the other columns are
done. Slots for which there is no room come in turns after that. Tensor cores multiply numbers in bfloat16. An element of A·x is
the exact sum of three, and one of B of one, two or three, by its dtype. Of their products only the smallest are left out, which
are below the rounding of a product in float32.

Layout: as in few_rows_linear.py; x and weight have rows at multiples of 16 elements. Products and sums are float32. There is one
rounding, to the weight's dtype, and none for split_linear.
"""

from __future__ import annotations

from typing import Any

import torch

from gdnfuse import compat
from gdnfuse.kernels.launch.implementation import kernel_of, launching, overlap_options
from gdnfuse.kernels.linear_configs import (
    ADAPTER_SLOT,
    MAX_ADAPTER_SLOTS,
    STEP,
    RingConfig,
    columns_of,
    rings,
    rows_and_out,
    slots_at_once,
)
from gdnfuse.kernels.skinny_linear import MAX_LORA

gluon, gl, async_copy, hopper, _, copy_to_shared = compat.gluon()  # callers check that it exists
fence_async_shared, warpgroup_mma, warpgroup_mma_wait = hopper.fence_async_shared, hopper.warpgroup_mma, hopper.warpgroup_mma_wait
gdc_launch_dependents, gdc_wait = compat.dependent_launch()

SLICE = gl.constexpr(64)  # columns of half a step: 128 bytes, the width of the swizzle of shared memory
RING = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
COPIED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # of [rows, SLICE]: 16 bytes a thread
STORED = gl.constexpr(gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1]))  # of [rows of the weight, rows of x]
SCRATCH = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0, 1]))
SLOT = gl.constexpr(ADAPTER_SLOT)  # columns of an adapter's B that are multiplied at once
FACTOR = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2))
UP = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))  # of [rows of the weight, SLOT]
LOW = gl.constexpr(gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0]))  # of [rows of x, SLOT]

NUMBERS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # numbers in bfloat16 whose sum is one of another dtype


@gluon.jit
def _copy_weights(ring, slot, weight_ptrs, live, step, TILES: gl.constexpr):
    """Start to copy a step of every tile. The two halves of each are adjacent in the ring."""
    for t in gl.static_range(TILES):
        for half in gl.static_range(2):
            tile = ring.index((slot * TILES + t) * 2 + half)
            copy_to_shared(tile, weight_ptrs[t] + (step * 2 + half) * SLICE, mask=live[t])


@gluon.jit
def _copy_x(ring, slot, x_ptrs, there, step):
    for half in gl.static_range(2):
        tile = ring.index(slot * 2 + half)
        copy_to_shared(tile, x_ptrs + (step * 2 + half) * SLICE, mask=there)


@gluon.jit
def store_tiles(acc, out_ptr, first, part, B, M, width, live_rows, SWIGLU: gl.constexpr, TILES: gl.constexpr, BB: gl.constexpr):
    """Store the tiles of a program, [64, BB] each, for rows from `first` on, of which there are M.

    Rows of the result have distance `width`. With SwiGLU the first half of a tile is gate and the second is up.
    """
    ROWS: gl.constexpr = 32 if SWIGLU else 64
    i = gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORED))
    column = gl.arange(0, BB, layout=gl.SliceLayout(0, STORED))
    if SWIGLU:
        scratch = gl.allocate_shared_memory(gl.float32, [64, BB], SCRATCH)
    for t in gl.static_range(TILES):
        if SWIGLU:
            scratch.store(acc[t])
            gate = scratch.slice(0, ROWS).load(STORED)
            y = gate / (1.0 + gl.exp(-gate)) * scratch.slice(ROWS, ROWS).load(STORED)
        else:
            y = gl.convert_layout(acc[t], STORED)
        out_row = first + t * live_rows + i
        inside = ((i < live_rows) & (out_row < M))[:, None] & (column < B)[None, :]
        out_ptrs = out_ptr + ((part * B + column).to(gl.int64)[None, :] * width + out_row[:, None])
        gl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _load_up(first, live_rows, M, part, b_ptrs, SWIGLU: gl.constexpr, ADAPTERS: gl.constexpr, n: gl.constexpr):
    """The rows of B for a tile [64, SLOT] of `live_rows` rows from `first` on. Zeros where the adapter is on other rows."""
    OF: gl.constexpr = ADAPTERS[n][0]
    RANK: gl.constexpr = ADAPTERS[n][1]
    ROWS: gl.constexpr = 32 if SWIGLU else 64
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, UP))
    out_row = first + r % ROWS
    row = out_row + gl.where(r < ROWS, 0, M)
    inside = (r % ROWS < live_rows) & (out_row < M) & (row >= ADAPTERS[n][3]) & (row < ADAPTERS[n][4]) & (part == 0)
    at = gl.where(inside, row - ADAPTERS[n][3] + ADAPTERS[n][5], 0)
    j = ADAPTERS[n][2] + gl.arange(0, SLOT, layout=gl.SliceLayout(0, UP))
    up_ptrs = b_ptrs[OF] + (at.to(gl.int64)[:, None] * RANK + j[None, :])
    return gl.load(up_ptrs, mask=inside[:, None] & (j < RANK)[None, :], other=0.0)


@gluon.jit
def _load_low(B, low_ptr, low_columns, BB: gl.constexpr, ADAPTERS: gl.constexpr, n: gl.constexpr):
    """scaling·(A·x), [BB, SLOT]."""
    b = gl.arange(0, BB, layout=gl.SliceLayout(1, LOW))
    j = ADAPTERS[n][2] + gl.arange(0, SLOT, layout=gl.SliceLayout(0, LOW))
    low_ptrs = low_ptr + (b[:, None] * low_columns + (ADAPTERS[n][6] + j)[None, :])
    return gl.load(low_ptrs, mask=(b < B)[:, None] & (j < ADAPTERS[n][1])[None, :], other=0.0) * ADAPTERS[n][7]


@gluon.jit
def _load_ups(
    first, live_rows, M, part, b_ptrs,
    SWIGLU: gl.constexpr, TILES: gl.constexpr, SLOTS: gl.constexpr, ADAPTERS: gl.constexpr, turn: gl.constexpr,
):  # fmt: skip
    """The rows of B of every slot of a turn, for every tile."""
    ups = ()
    for s in gl.static_range(SLOTS):
        for t in gl.static_range(TILES):
            if turn * SLOTS + s < len(ADAPTERS):
                ups = ups + (_load_up(first + t * live_rows, live_rows, M, part, b_ptrs, SWIGLU, ADAPTERS, turn * SLOTS + s),)
    return ups


@gluon.jit
def _load_lows(
    B, low_ptr, low_columns, BB: gl.constexpr, SLOTS: gl.constexpr, ADAPTERS: gl.constexpr, turn: gl.constexpr
):  # fmt: skip
    """scaling·(A·x) of every slot of a turn."""
    lows = ()
    for s in gl.static_range(SLOTS):
        if turn * SLOTS + s < len(ADAPTERS):
            lows = lows + (_load_low(B, low_ptr, low_columns, BB, ADAPTERS, turn * SLOTS + s),)
    return lows


@gluon.jit
def _store_sums(memory, at: gl.constexpr, rest, NUMBERS: gl.constexpr):
    """Store numbers in bfloat16 whose sum is a tile, from the `at`-th place of the memory on."""
    for n in gl.static_range(NUMBERS):
        number = rest.to(gl.bfloat16)
        memory[at + n].store(number)
        if n + 1 < NUMBERS:
            rest = rest.to(gl.float32) - number.to(gl.float32)


@gluon.jit
def _store_factors(up_memory, low_memory, ups, lows, NUMBERS: gl.constexpr):
    for i in gl.static_range(len(ups)):
        _store_sums(up_memory, i * NUMBERS, ups[i], NUMBERS)
    for s in gl.static_range(len(lows)):
        _store_sums(low_memory, s * 3, lows[s], 3)
    fence_async_shared()


@gluon.jit
def _multiply(acc, up_memory, low_memory, TILES: gl.constexpr, SLOTS: gl.constexpr, NUMBERS: gl.constexpr):
    """Every tile plus B·(A·x) of the slots in memory."""
    for s in gl.static_range(SLOTS):
        for n in gl.static_range(NUMBERS):
            for m in gl.static_range(3 - n):
                low = low_memory[s * 3 + m].permute((1, 0))
                started = ()
                for t in gl.static_range(TILES):
                    up = up_memory[(s * TILES + t) * NUMBERS + n]
                    started = started + (warpgroup_mma(up, low, acc[t], is_async=True),)
                acc = started
    # Waiting for a single product does not return a tuple.
    return (warpgroup_mma_wait(0, acc),) if TILES == 1 else warpgroup_mma_wait(0, acc)


@gluon.jit
def program(
    x_ptr, weight_ptr, low_ptr, b_ptrs, out_ptr,
    index, part, B, M, width, live_rows, steps, low_columns, stride_xb, stride_wm,
    SWIGLU: gl.constexpr, TILES: gl.constexpr, BB: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
    ADAPTERS: gl.constexpr, SLOTS: gl.constexpr, NUMBERS: gl.constexpr,
):  # fmt: skip
    """The work of the index-th program of a part of the columns. `width` is the distance of rows of the result.

    ADAPTERS is None or what `adapter_slots` returns. SLOTS is how many of them are in memory at once. NUMBERS in bfloat16 are an
    element of B.
    """
    # With SwiGLU the second half of a tile has the rows of up that belong to the rows of gate in the first.
    ROWS: gl.constexpr = 32 if SWIGLU else 64
    accumulator: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BB, 16])
    dtype: gl.constexpr = weight_ptr.dtype.element_ty
    first = index * (TILES * live_rows)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES * TILES * 2, 64, SLICE], RING)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES * 2, BB, SLICE], RING)

    r = gl.arange(0, 64, layout=gl.SliceLayout(1, COPIED))
    k = part * steps * (2 * SLICE) + gl.arange(0, SLICE, layout=gl.SliceLayout(0, COPIED))
    weight_ptrs = ()
    live = ()
    for t in gl.static_range(TILES):
        out_row = first + t * live_rows + r % ROWS
        inside = (r % ROWS < live_rows) & (out_row < M)
        row = gl.where(inside, out_row, 0) + gl.where(r < ROWS, 0, M)
        weight_ptrs = weight_ptrs + (weight_ptr + row.to(gl.int64)[:, None] * stride_wm + k[None, :],)
        live = live + (inside[:, None],)
    b = gl.arange(0, BB, layout=gl.SliceLayout(1, COPIED))
    x_ptrs = x_ptr + (b.to(gl.int64)[:, None] * stride_xb + k[None, :])
    there = (b < B)[:, None]

    # Groups of copies end in the order of their commits. So if an x has arrived, all weights before it have too.
    for s in gl.static_range(STAGES - 1):
        _copy_weights(w_ring, s, weight_ptrs, live, s, TILES)
        async_copy.commit_group()
    if ADAPTERS is not None:
        ups = _load_ups(first, live_rows, M, part, b_ptrs, SWIGLU, TILES, SLOTS, ADAPTERS, 0)
    if OVERLAP:
        gdc_wait()
    for s in gl.static_range(STAGES - 1):
        _copy_x(x_ring, s, x_ptrs, there, s)
        async_copy.commit_group()
    if ADAPTERS is not None:
        # Each has its own memory, because stores to one would wait for each other.
        up_memory = ()
        for _ in gl.static_range(SLOTS * TILES * NUMBERS):
            up_memory = up_memory + (gl.allocate_shared_memory(gl.bfloat16, [64, SLOT], FACTOR),)
        low_memory = ()
        for _ in gl.static_range(SLOTS * 3):
            low_memory = low_memory + (gl.allocate_shared_memory(gl.bfloat16, [BB, SLOT], FACTOR),)
        lows = _load_lows(B, low_ptr, low_columns, BB, SLOTS, ADAPTERS, 0)
        _store_factors(up_memory, low_memory, ups, lows, NUMBERS)

    acc = ()
    for _ in gl.static_range(TILES):
        acc = acc + (gl.zeros([64, BB], gl.float32, accumulator),)
    slot = 0
    free = STAGES - 1
    for step in range(steps):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        ahead = step + STAGES - 1
        if ahead < steps:
            _copy_weights(w_ring, free, weight_ptrs, live, ahead, TILES)
            _copy_x(x_ring, free, x_ptrs, there, ahead)
        async_copy.commit_group()  # also if it is empty, because groups are counted
        for half in gl.static_range(2):
            x = x_ring.index(slot * 2 + half).permute((1, 0))
            started = ()
            for t in gl.static_range(TILES):
                tile = w_ring.index((slot * TILES + t) * 2 + half)
                started = started + (warpgroup_mma(tile, x, acc[t], is_async=True),)
            acc = started
        # Waiting for a single product does not return a tuple.
        acc = (warpgroup_mma_wait(0, acc),) if TILES == 1 else warpgroup_mma_wait(0, acc)
        free = slot
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)

    async_copy.wait_group(0)
    if ADAPTERS is not None:
        acc = _multiply(acc, up_memory, low_memory, TILES, SLOTS, NUMBERS)
        for turn in gl.static_range(1, (len(ADAPTERS) + SLOTS - 1) // SLOTS):
            ups = _load_ups(first, live_rows, M, part, b_ptrs, SWIGLU, TILES, SLOTS, ADAPTERS, turn)
            lows = _load_lows(B, low_ptr, low_columns, BB, SLOTS, ADAPTERS, turn)
            _store_factors(up_memory, low_memory, ups, lows, NUMBERS)
            acc = _multiply(acc, up_memory, low_memory, TILES, len(lows), NUMBERS)
    store_tiles(acc, out_ptr, first, part, B, M, width, live_rows, SWIGLU, TILES, BB)


@gluon.jit(do_not_specialize=["B", "M", "live_rows", "steps", "low_columns"])
def few_rows_hopper_kernel(
    x_ptr, weight_ptr, low_ptr, b0_ptr, b1_ptr, b2_ptr, b3_ptr, out_ptr,
    B, M, live_rows, steps, low_columns, stride_xb, stride_wm,
    SWIGLU: gl.constexpr, TILES: gl.constexpr, BB: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
    ADAPTERS: gl.constexpr, SLOTS: gl.constexpr, NUMBERS: gl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    program(
        x_ptr, weight_ptr, low_ptr, (b0_ptr, b1_ptr, b2_ptr, b3_ptr), out_ptr,
        gl.program_id(0), gl.program_id(1), B, M, M, live_rows, steps, low_columns, stride_xb, stride_wm,
        SWIGLU, TILES, BB, STAGES, OVERLAP, ADAPTERS, SLOTS, NUMBERS,
    )  # fmt: skip


def adapter_slots(table: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
    """The adapters of few_rows_linear's `adapters_table`, in slots of SLOT columns of B.

    For each slot: which tensor B is in, its rank, the slot's first column, and the adapter's five numbers in the table.
    """
    return tuple(
        (of, rank, column, *found[n : n + 5])
        for of, (rank, _, *found) in enumerate(table)
        for n in range(0, len(found), 5)
        for column in range(0, rank, ADAPTER_SLOT)
    )


def supports_here(
    rows: torch.Tensor, weight: torch.Tensor, lora_B: list[torch.Tensor] | None = None, lora_parts: list[int] | None = None
) -> bool:
    """Whether this kernel supports these rows [B, N], with adapters as in the dialect.

    It needs half precision, a Hopper GPU, rows that can be copied 16 bytes at a time, and at most MAX_ADAPTER_SLOTS slots.
    """
    ranks = [lora_B[of].shape[1] for of in lora_parts[3::5]] if lora_B else []
    return (
        rings(weight)
        and not compat.interpreting()
        and rows.dtype == weight.dtype
        and all(t.stride(0) % 16 == 0 and (not launching() or t.data_ptr() % 16 == 0) for t in (rows, weight))
        and sum(-(-rank // ADAPTER_SLOT) for rank in ranks) <= MAX_ADAPTER_SLOTS
    )


def launch_with(
    chosen: RingConfig, x: torch.Tensor, weight: torch.Tensor, swiglu: bool = False, overlap: bool = False,
    lora: tuple[torch.Tensor, list[torch.Tensor], tuple[Any, ...]] | None = None,
) -> torch.Tensor:  # fmt: skip
    """The parts of a linear, [parts, ..., M], without the first axis if there is only one.

    Args:
        chosen: the config. N is a multiple of its parts times STEP, and it has at most one more stage than a part has steps.
        x: [..., N], at most 32 rows, that `supports_here` accepts.
        weight: [M, N], with `swiglu` [2·M, N].
        swiglu: whether the weight is of gate and up.
        overlap: whether the weight may be read while kernels before this one run.
        lora: as in few_rows_linear.
    """
    tiles, live, stages, parts = chosen
    rows, out = rows_and_out(x, weight.shape[0] // (2 if swiglu else 1), weight.dtype, parts)
    (B, N), M = rows.shape, out.shape[-1]
    options = overlap_options(x) if overlap else {}
    low, up, table = lora or (None, (), ())
    adapters, numbers = adapter_slots(table), NUMBERS[up[0].dtype] if up else 1
    kernel_of(few_rows_hopper_kernel)[(-(-M // (live * tiles)), parts)](
        rows, weight, low, *up, *[None] * (MAX_LORA - len(up)), out,
        B, M, live, N // parts // STEP, 0 if low is None else low.shape[-1], rows.stride(0), weight.stride(0),
        SWIGLU=swiglu, TILES=tiles, BB=columns_of(B), STAGES=stages,
        OVERLAP=bool(options), ADAPTERS=adapters or None, SLOTS=slots_at_once(chosen, B, len(adapters), numbers), NUMBERS=numbers,
        num_warps=4, **options,
    )  # fmt: skip
    return out
