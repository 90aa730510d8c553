"""few_rows_linear on Hopper (compute capability 9) for half precision, in Gluon. Weights come through a ring in shared memory.

It replaces few_rows_linear.py and computes the same. A program has a range of the weight's rows, in tiles of up to 64, and goes
over their columns in steps. Copies of a step into the ring (cp.async) run several steps ahead of the products (wgmma, with the
weight's rows as the product's rows). Every multiprocessor has equally many rows, for any number of rows: rows that a tile lacks
are neither copied nor stored. The ring is full of weights before the kernel waits for the one that makes x. few_rows_linear has
one step by then.

What low-rank adapters add (see few_rows_linear.py) is multiplied in float32, without tensor cores, when the columns are done.
Then the registers and the memory of the ring are free.

Layout: as in few_rows_linear.py; x and weight have rows at multiples of 16 elements. Products and sums are float32. There is one
rounding, to the weight's dtype, and none for split_linear.
"""

from __future__ import annotations

from typing import Any

import torch

from gdnfuse import compat
from gdnfuse.kernels.launch.implementation import kernel_of, launching, overlap_options
from gdnfuse.kernels.linear_configs import STEP, RingConfig, columns_of, rings, rows_and_out
from gdnfuse.kernels.skinny_linear import MAX_LORA

gluon, gl, async_copy, hopper, _, copy_to_shared = compat.gluon()  # callers check that it exists
fence_async_shared, warpgroup_mma, warpgroup_mma_wait = hopper.fence_async_shared, hopper.warpgroup_mma, hopper.warpgroup_mma_wait
gdc_launch_dependents, gdc_wait = compat.dependent_launch()
dot_fma = compat.dot_fma()

SLICE = gl.constexpr(64)  # columns of half a step: 128 bytes, the width of the swizzle of shared memory
RING = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
COPIED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # of [rows, SLICE]: 16 bytes a thread
STORED = gl.constexpr(gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1]))  # of [rows of the weight, rows of x]
SCRATCH = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0, 1]))
WIDTH = gl.constexpr(16)  # columns of an adapter's B at once
# Of [rows of the weight, WIDTH] and of [WIDTH, rows of x]: 16 bytes a thread of float32.
UP = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
LOW = gl.constexpr(gl.BlockedLayout([4, 1], [4, 8], [1, 4], [0, 1]))


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
def _of_adapter(k, LORA: gl.constexpr, i: gl.constexpr, j: gl.constexpr):
    """As in few_rows_linear."""
    COUNT: gl.constexpr = LORA[i][1]
    found = LORA[i][2 + j]
    for n in gl.static_range(1, COUNT):
        found = gl.where(k == n, LORA[i][2 + 5 * n + j], found)
    return found


@gluon.jit
def _add_of_tensor(
    total, first, end_row, row, B, low_ptr, low_columns, b_ptr, part,
    BB: gl.constexpr, LORA: gl.constexpr, i: gl.constexpr, LOW_PARTS: gl.constexpr,
):  # fmt: skip
    """As in few_rows_linear."""
    RANK: gl.constexpr = LORA[i][0]
    COUNT: gl.constexpr = LORA[i][1]
    b = gl.arange(0, BB, layout=gl.SliceLayout(0, LOW))
    for k in range(gl.where(part == 0, COUNT, 0)):
        begin, end = _of_adapter(k, LORA, i, 0), _of_adapter(k, LORA, i, 1)
        if (end_row > begin) & (first < end):
            start, low_row, scaling = _of_adapter(k, LORA, i, 2), _of_adapter(k, LORA, i, 3), _of_adapter(k, LORA, i, 4)
            inside = (row >= begin) & (row < end)
            at = gl.where(inside, row - begin + start, 0)
            for column in range(0, RANK, WIDTH):
                j = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, UP))
                up_ptrs = b_ptr + (at.to(gl.int64)[:, None] * RANK + j[None, :])
                up = gl.load(up_ptrs, mask=inside[:, None] & (j < RANK)[None, :], other=0.0).to(gl.float32)
                j = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(1, LOW))
                low_ptrs = low_ptr + (b[None, :] * low_columns + (low_row + j)[:, None])
                live = (j < RANK)[:, None] & (b < B)[None, :]
                low = gl.zeros([WIDTH, BB], gl.float32, LOW)
                for p in gl.static_range(LOW_PARTS):
                    low += gl.load(low_ptrs + p * B * low_columns, mask=live, other=0.0)
                up = gl.convert_layout(up, gl.DotOperandLayout(0, total.type.layout, 0))
                low = gl.convert_layout(low * scaling, gl.DotOperandLayout(1, total.type.layout, 0))
                total = dot_fma(up, low, total)
    return total


@gluon.jit
def _add_lora(
    acc, first, live_rows, M, B, low_ptr, low_columns, b_ptrs, part,
    SWIGLU: gl.constexpr, BB: gl.constexpr, LORA: gl.constexpr, LOW_PARTS: gl.constexpr,
):  # fmt: skip
    """As in few_rows_linear, for the tile [64, BB] of `live_rows` rows from `first` on."""
    ROWS: gl.constexpr = 32 if SWIGLU else 64
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, UP))
    out_row = first + r % ROWS
    row = gl.where((r % ROWS < live_rows) & (out_row < M), out_row + gl.where(r < ROWS, 0, M), -1)
    end_row = first + live_rows + (M if SWIGLU else 0)
    total = gl.zeros([64, BB], gl.float32, gl.BlockedLayout([4, BB // 8], [4, 8], [4, 1], [1, 0]))
    for i in gl.static_range(len(LORA)):
        total = _add_of_tensor(total, first, end_row, row, B, low_ptr, low_columns, b_ptrs[i], part, BB, LORA, i, LOW_PARTS)
    return acc + gl.convert_layout(total, acc.type.layout)


@gluon.jit
def program(
    x_ptr, weight_ptr, low_ptr, b_ptrs, out_ptr,
    index, part, B, M, width, live_rows, steps, low_columns, stride_xb, stride_wm,
    SWIGLU: gl.constexpr, TILES: gl.constexpr, BB: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
    LORA: gl.constexpr, LOW_PARTS: gl.constexpr,
):  # fmt: skip
    """The work of the index-th program of a part of the columns. `width` is the distance of rows of the result."""
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
    if OVERLAP:
        gdc_wait()
    for s in gl.static_range(STAGES - 1):
        _copy_x(x_ring, s, x_ptrs, there, s)
        async_copy.commit_group()

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
    if LORA is not None:
        without = acc
        acc = ()
        for t in gl.static_range(TILES):
            tile = first + t * live_rows
            added = _add_lora(without[t], tile, live_rows, M, B, low_ptr, low_columns, b_ptrs, part, SWIGLU, BB, LORA, LOW_PARTS)
            acc = acc + (added,)
    store_tiles(acc, out_ptr, first, part, B, M, width, live_rows, SWIGLU, TILES, BB)


@gluon.jit(do_not_specialize=["B", "M", "live_rows", "steps", "low_columns"])
def few_rows_hopper_kernel(
    x_ptr, weight_ptr, low_ptr, b0_ptr, b1_ptr, b2_ptr, b3_ptr, out_ptr,
    B, M, live_rows, steps, low_columns, stride_xb, stride_wm,
    SWIGLU: gl.constexpr, TILES: gl.constexpr, BB: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
    LORA: gl.constexpr, LOW_PARTS: gl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    program(
        x_ptr, weight_ptr, low_ptr, (b0_ptr, b1_ptr, b2_ptr, b3_ptr), out_ptr,
        gl.program_id(0), gl.program_id(1), B, M, M, live_rows, steps, low_columns, stride_xb, stride_wm,
        SWIGLU, TILES, BB, STAGES, OVERLAP, LORA, LOW_PARTS,
    )  # fmt: skip


# Whether this kernel takes adapters, which few_rows_linear takes otherwise. What it adds for them has run as PTX on a CPU and not
# on a Hopper GPU yet: `pytest -m gpu tests/kernels/test_gpu.py -k lora` with True tells.
ADAPTERS = False


def supports_here(rows: torch.Tensor, weight: torch.Tensor, lora: bool = False) -> bool:
    """Whether this kernel supports these rows [B, N], with adapters if `lora`.

    It needs half precision, a Hopper GPU, and rows that can be copied 16 bytes at a time.
    """
    return (
        rings(weight)
        and not compat.interpreting()
        and rows.dtype == weight.dtype
        and all(t.stride(0) % 16 == 0 and (not launching() or t.data_ptr() % 16 == 0) for t in (rows, weight))
        and not (lora and (dot_fma is None or not ADAPTERS))
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
    low, up, table = lora or (None, (), None)
    kernel_of(few_rows_hopper_kernel)[(-(-M // (live * tiles)), parts)](
        rows, weight, low, *up, *[None] * (MAX_LORA - len(up)), out,
        B, M, live, N // parts // STEP, 0 if low is None else low.shape[-1], rows.stride(0), weight.stride(0),
        SWIGLU=swiglu, TILES=tiles, BB=columns_of(B), STAGES=stages,
        OVERLAP=bool(options), LORA=table, LOW_PARTS=1 if low is None else low.shape[0], num_warps=4, **options,
    )  # fmt: skip
    return out
