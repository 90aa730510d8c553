"""few_rows_hopper for weights of e4m3 with a scale per block. Half the bytes go through the ring.

A step is the columns of one block of scales. Its tile of weights is read from the ring into registers, where it is widened and
becomes the products' first operand. x is the second operand and stays in shared memory. The product of each step is multiplied
with the scales of its rows in float32 and added to the sum. So weights are multiplied as they are stored (DeepSeek-V3 promotes
partial sums in the same places, arXiv:2412.19437, section 3.3.2). Scales are read a step ahead. Programs for rows that are not
quantised come first and are those of few_rows_hopper.

Layout: as in few_rows_hopper.py; data and plain rows are at multiples of 16 bytes; scales [⌈M/128⌉, N/128] have contiguous rows.
"""

from __future__ import annotations

import torch

from gdnfuse import compat
from gdnfuse.kernels import few_rows_hopper, quantized
from gdnfuse.kernels.few_rows_hopper import COPIED, RING, SLICE, _copy_x, store_tiles
from gdnfuse.kernels.launch.implementation import kernel_of, launching, overlap_options
from gdnfuse.kernels.linear_configs import STEP, RingConfig, columns_of, rings, rows_and_out

gluon, gl, async_copy, hopper, _, copy_to_shared = compat.gluon()  # callers check that it exists
fence_async_shared, warpgroup_mma, warpgroup_mma_wait = hopper.fence_async_shared, hopper.warpgroup_mma, hopper.warpgroup_mma_wait
gdc_launch_dependents, gdc_wait = compat.dependent_launch()

BYTES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
COPIED_BYTES = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))  # of [rows, 128]: 16 bytes a thread


@gluon.jit
def _copy_bytes(ring, slot, weight_ptrs, live, step, TILES: gl.constexpr):
    """Start to copy a step of every tile."""
    for t in gl.static_range(TILES):
        tile = ring.index(slot * TILES + t)
        copy_to_shared(tile, weight_ptrs[t] + step * 128, mask=live[t])


@gluon.jit
def _widen(w, dtype: gl.constexpr):
    """e4m3 in half precision, exactly. Through float32, because there is no fast instruction to bfloat16."""
    return w.to(gl.float8e4nv, bitcast=True).to(gl.float16).to(gl.float32).to(dtype)


@gluon.jit
def _program(
    x_ptr, weight_ptr, scale_ptr, out_ptr,
    index, part, B, M, stored, live_rows, steps, stride_xb, stride_wm, stride_sm,
    SWIGLU: gl.constexpr, TILES: gl.constexpr, BB: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """The work of the index-th program of a part of the columns, for quantised rows, of which there are `stored` of M."""
    # With SwiGLU the second half of a tile has the rows of up that belong to the rows of gate in the first.
    HALF: gl.constexpr = 32 if SWIGLU else 64
    accumulator: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BB, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator, 2)
    of_rows: gl.constexpr = gl.SliceLayout(1, accumulator)
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    first = index * (TILES * live_rows)
    w_ring = gl.allocate_shared_memory(gl.uint8, [STAGES * TILES, 64, 128], BYTES)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES * 2, BB, SLICE], RING)

    r = gl.arange(0, 64, layout=gl.SliceLayout(1, COPIED_BYTES))
    k = part * steps * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, COPIED_BYTES))
    s = gl.arange(0, 64, layout=of_rows)
    weight_ptrs = ()
    scale_ptrs = ()
    live = ()
    for t in gl.static_range(TILES):
        out_row = first + t * live_rows + r % HALF
        inside = (r % HALF < live_rows) & (out_row < stored)
        row = gl.where(inside, out_row, 0) + gl.where(r < HALF, 0, stored)
        weight_ptrs = weight_ptrs + (weight_ptr + row.to(gl.int64)[:, None] * stride_wm + k[None, :],)
        live = live + (inside[:, None],)
        scale_row = gl.minimum(first + t * live_rows + s % HALF, stored - 1) + gl.where(s < HALF, 0, stored)
        scale_ptrs = scale_ptrs + (scale_ptr + (scale_row // ROWS).to(gl.int64) * stride_sm + part * steps,)
    b = gl.arange(0, BB, layout=gl.SliceLayout(1, COPIED))
    column = part * steps * 128 + gl.arange(0, SLICE, layout=gl.SliceLayout(0, COPIED))
    x_ptrs = x_ptr + (b.to(gl.int64)[:, None] * stride_xb + column[None, :])
    there = (b < B)[:, None]

    # Groups of copies end in the order of their commits. So if an x has arrived, all weights before it have too.
    for i in gl.static_range(STAGES - 1):
        _copy_bytes(w_ring, i, weight_ptrs, live, i, TILES)
        async_copy.commit_group()
    scales = ()
    for t in gl.static_range(TILES):
        scales = scales + (gl.load(scale_ptrs[t]).to(gl.float32),)
    if OVERLAP:
        gdc_wait()
    for i in gl.static_range(STAGES - 1):
        _copy_x(x_ring, i, x_ptrs, there, i)
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
            _copy_bytes(w_ring, free, weight_ptrs, live, ahead, TILES)
            _copy_x(x_ring, free, x_ptrs, there, ahead)
        async_copy.commit_group()  # also if it is empty, because groups are counted
        next_scales = ()
        for t in gl.static_range(TILES):
            next_scales = next_scales + (gl.load(scale_ptrs[t] + gl.minimum(step + 1, steps - 1)).to(gl.float32),)
        products = ()
        for t in gl.static_range(TILES):
            tile = w_ring.index(slot * TILES + t)
            product = gl.zeros([64, BB], gl.float32, accumulator)
            for half in gl.static_range(2):
                w = _widen(tile.slice(half * SLICE, SLICE, dim=1).load(operand), dtype)
                x = x_ring.index(slot * 2 + half).permute((1, 0))
                product = warpgroup_mma(w, x, product, is_async=True)
            products = products + (product,)
        # Waiting for a single product does not return a tuple.
        products = (warpgroup_mma_wait(0, products),) if TILES == 1 else warpgroup_mma_wait(0, products)
        added = ()
        for t in gl.static_range(TILES):
            added = added + (acc[t] + scales[t][:, None] * products[t],)
        acc = added
        scales = next_scales
        free = slot
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)

    async_copy.wait_group(0)
    store_tiles(acc, out_ptr, first, part, B, stored, M, live_rows, SWIGLU, TILES, BB)


@gluon.jit(do_not_specialize=["B", "M", "stored", "live_rows", "steps", "plain_programs", "plain_rows"])
def few_rows_hopper_quantized_kernel(
    x_ptr, weight_ptr, scale_ptr, plain_ptr, out_ptr,
    B, M, stored, live_rows, steps, plain_programs, plain_rows, stride_xb, stride_wm, stride_sm, stride_pm,
    SWIGLU: gl.constexpr, TILES: gl.constexpr, BB: gl.constexpr, STAGES: gl.constexpr, PLAIN_STAGES: gl.constexpr,
    ROWS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    index, part = gl.program_id(0) - plain_programs, gl.program_id(1)
    if index >= 0:
        _program(
            x_ptr, weight_ptr, scale_ptr, out_ptr,
            index, part, B, M, stored, live_rows, steps, stride_xb, stride_wm, stride_sm,
            SWIGLU, TILES, BB, STAGES, ROWS, OVERLAP,
        )  # fmt: skip
    elif plain_ptr is not None:
        few_rows_hopper.program(
            x_ptr, plain_ptr, None, None, out_ptr + stored,
            index + plain_programs, part, B, M - stored, M, plain_rows, steps, 0, stride_xb, stride_pm,
            False, 1, BB, PLAIN_STAGES, OVERLAP, None, 1, 1,
        )  # fmt: skip


def supports_here(
    rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, format: str, plain: torch.Tensor | None, dtype: torch.dtype
) -> bool:
    """Whether this kernel supports these rows [B, N].

    It needs half precision, a Hopper GPU, e4m3 in blocks of STEP columns, and rows that can be copied 16 bytes at a time.
    """
    how = quantized.stored(format)
    copied = [t for t in (rows, weight, plain) if t is not None]
    return (
        rings(rows)
        and not compat.interpreting()
        and rows.dtype == dtype
        and (how.kind, how.columns) == ("e4m3", STEP)
        and all(t.stride(0) * t.itemsize % 16 == 0 and (not launching() or t.data_ptr() % 16 == 0) for t in copied)
    )


def launch_with(
    chosen: RingConfig, x: torch.Tensor, weight: torch.Tensor, swiglu: bool = False, overlap: bool = False,
    scale: torch.Tensor | None = None, format: str = "", plain: torch.Tensor | None = None, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """The parts of a linear, [parts, ..., M], without the first axis if there is only one.

    Args:
        chosen: the config. N is a multiple of its parts times STEP, and it has at most one more stage than a part has steps.
        x: [..., N], at most 32 rows, that `supports_here` accepts.
        weight, scale: of a quantised weight [M, N], with `swiglu` [2·M, N].
        swiglu: whether the weight is of gate and up.
        overlap: whether the weight may be read while kernels before this one run.
        format, plain, dtype: as for few_rows_linear's.
    """
    tiles, live, stages, parts = chosen
    stored = weight.shape[0] // (2 if swiglu else 1)
    behind = 0 if plain is None else plain.shape[0]
    rows, out = rows_and_out(x, stored + behind, dtype or x.dtype, parts)
    B, N = rows.shape
    plain_programs = -(-behind // PLAIN_ROWS)
    options = overlap_options(x) if overlap else {}
    kernel_of(few_rows_hopper_quantized_kernel)[(plain_programs + -(-stored // (live * tiles)), parts)](
        rows, quantized.raw(weight), scale, plain, out,
        B, stored + behind, stored, live, N // parts // STEP, plain_programs, PLAIN_ROWS,
        rows.stride(0), weight.stride(0), scale.stride(0), 0 if plain is None else plain.stride(0),
        SWIGLU=swiglu, TILES=tiles, BB=columns_of(B), STAGES=stages, PLAIN_STAGES=min(3, N // parts // STEP + 1),
        ROWS=quantized.stored(format).rows, OVERLAP=bool(options), num_warps=4, **options,
    )  # fmt: skip
    return out


PLAIN_ROWS = 16  # rows per program
