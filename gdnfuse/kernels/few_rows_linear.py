"""A few rows times a weight, on tensor cores: the linears of a decode step of 2 to 32 sequences. They mainly stream weights.

It computes the dialect's fused_linear, with SwiGLU after it (Shazeer 2020, arXiv:2002.05202) or nothing, and split_linear.

The weight's rows are the products' rows, so a tile needs no more sequences than there are. On Hopper a program may start, and
load its first weights, while the kernel before it still runs (programmatic dependent launch). It only waits for x.

Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) take one launch more, of low_rank.py: A·x of all adapters. The launch of the
linear then adds B·(A·x), before SwiGLU. If the linear is in parts, its first part has it. Both products are of float32 operands.

Layout: x [..., N] and weight [M, N] with contiguous rows at any distance; A and B contiguous; output contiguous. Products and
sums are float32. There is one rounding, to the weight's dtype, and none for split_linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from gdnfuse import compat
from gdnfuse.kernels import devices, low_rank, quantized, tuned
from gdnfuse.kernels.launch.implementation import kernel_of, overlap_options
from gdnfuse.kernels.linear_configs import (
    FewRowsConfig,
    RingConfig,
    columns_of,
    quantized_ring_config,
    require_few_rows,
    require_ring,
    ring_config,
    rows_and_out,
)
from gdnfuse.kernels.quantized import times, times_pairs, widen, zeros_of_rows
from gdnfuse.kernels.skinny_linear import MAX_LORA

if compat.gluon():
    from gdnfuse.kernels import few_rows_hopper, few_rows_hopper_quantized
else:
    few_rows_hopper = few_rows_hopper_quantized = None
gdc_launch_dependents, gdc_wait = compat.dependent_launch()

Lora = tuple[torch.Tensor, list[torch.Tensor], tuple[Any, ...]]
# Dtypes of products' operands, by the dtype of the weight.
OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def adapters_table(B: list[torch.Tensor], parts: list[int], scaling: list[float]) -> tuple[Any, ...]:
    """The kernel's table of adapters.

    For each tensor of B: the rank, and the number of adapters of projections whose B it has. For each of these: the first row of
    the projection and its end, the first rows of B and of A, and the scaling.
    """
    table: list[list[Any]] = [[] for _ in B]
    for (first, width, row, of, start), scale in zip(zip(*[iter(parts)] * 5, strict=True), scaling, strict=True):
        table[of] += [first, first + width, start, row, float(scale)]
    return tuple((b.shape[1], len(found) // 5, *found) for b, found in zip(B, table, strict=True))


@triton.jit
def _of_adapter(k, LORA: tl.constexpr, i: tl.constexpr, j: tl.constexpr):
    """The j-th number of the k-th adapter whose B is in the i-th tensor."""
    COUNT: tl.constexpr = LORA[i][1]
    found = LORA[i][2 + j]
    for n in tl.static_range(1, COUNT):
        found = tl.where(k == n, LORA[i][2 + 5 * n + j], found)
    return found


@triton.jit
def _add_of_tensor(
    acc, first_row, end_row, row, b, B, low_ptr, low_columns, b_ptr, part,
    BB: tl.constexpr, LORA: tl.constexpr, i: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BB] plus scaling·B·(A·x) of the adapters whose B's are in the i-th tensor, `b_ptr`."""
    WIDTH: tl.constexpr = 16  # columns of B at once, the fewest that a product takes
    RANK: tl.constexpr = LORA[i][0]
    COUNT: tl.constexpr = LORA[i][1]
    for k in range(tl.where(part == 0, COUNT, 0)):
        first, end = _of_adapter(k, LORA, i, 0), _of_adapter(k, LORA, i, 1)
        if (end_row > first) & (first_row < end):
            start, low_row, scaling = _of_adapter(k, LORA, i, 2), _of_adapter(k, LORA, i, 3), _of_adapter(k, LORA, i, 4)
            inside = (row >= first) & (row < end)  # [BM]
            at = tl.where(inside, row - first + start, 0)  # [BM]
            for column in tl.range(0, RANK, WIDTH, num_stages=1):
                j = column + tl.arange(0, WIDTH)  # [WIDTH]
                up_ptrs = b_ptr + at.to(tl.int64)[:, None] * RANK + j[None, :]  # [BM, WIDTH]
                up = tl.load(up_ptrs, mask=inside[:, None] & (j < RANK)[None, :], other=0.0).to(tl.float32)
                low_ptrs = low_ptr + b[None, :] * low_columns + (low_row + j)[:, None]  # [WIDTH, BB]
                live = (j < RANK)[:, None] & (b < B)[None, :]  # [WIDTH, BB]
                low = tl.load(low_ptrs, mask=live, other=0.0)
                acc = tl.dot(up, low * scaling, acc, input_precision="ieee")
    return acc


@triton.jit
def _add_lora(
    acc, first_row, end_row, row, b, B, low_ptr, low_columns, b_ptrs, part,
    BB: tl.constexpr, LORA: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BB] plus what the adapters on its rows add, for the first part of the columns.

    The tile's rows are between `first_row` and `end_row`. `low_ptr` is A·x, [B, low_columns].
    """
    for i in tl.static_range(len(LORA)):
        acc = _add_of_tensor(acc, first_row, end_row, row, b, B, low_ptr, low_columns, b_ptrs[i], part, BB, LORA, i)
    return acc


@triton.jit
def few_rows_linear_kernel(
    x_ptr, pairs_ptr, weight_ptr, scale_ptr, zero_ptr, plain_ptr, low_ptr, b0_ptr, b1_ptr, b2_ptr, b3_ptr, out_ptr,
    B, M, stored, columns, low_columns, stride_xb, stride_pb, stride_wm, stride_sm, stride_zm, stride_pm,
    SWIGLU: tl.constexpr, OPERAND: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr, OVERLAP: tl.constexpr,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PACKED: tl.constexpr, CONVERTS: tl.constexpr,
    LORA: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    pid, part = tl.program_id(0), tl.program_id(1)
    b = tl.arange(0, BB)  # [BB]
    i = tl.arange(0, BM)  # [BM]
    BO: tl.constexpr = BM // 2 if SWIGLU else BM
    shift, end = 0, M
    if KIND is None:
        stored = M
    else:
        # Plain rows after the `stored` rows of a quantised weight start a new tile.
        tiles = tl.cdiv(stored, BO)
        shift, end = tl.where(pid < tiles, 0, tiles * BO - stored), tl.where(pid < tiles, stored, M)
    first = pid * BO - shift + i % BO  # [BM]
    # With SwiGLU the second half of a tile has the rows of up that belong to the rows of gate in the first.
    row = tl.where(first < stored, first, 0) + tl.where(i < BO, 0, M)
    k = part * columns + tl.arange(0, BK)  # [BK]
    w_ptrs = weight_ptr + row.to(tl.int64)[:, None] * stride_wm + k[None, :]  # [BM, BK]
    x_ptrs = x_ptr + tl.where(b < B, b, 0).to(tl.int64)[None, :] * stride_xb + k[:, None]  # [BK, BB]

    out_row = pid * BO - shift + tl.arange(0, BO)  # [BO]
    live = (out_row < end)[:, None] & (b < B)[None, :]  # [BO, BB]
    acc = tl.zeros((BM, BB), tl.float32)
    if KIND is not None:
        if OVERLAP:
            gdc_wait()
        if pid < tiles:
            scale_ptrs = scale_ptr + row.to(tl.int64) // ROWS * stride_sm  # [BM]
            if PACKED > 1:
                # A byte of the weight has two columns, and so has a pair of x.
                half = part * (columns // BK) * (BK // 2) + tl.arange(0, BK // 2)  # [BK / 2]
                byte_ptrs = weight_ptr + row.to(tl.int64)[:, None] * stride_wm + half[None, :]  # [BM, BK / 2]
                pair_ptrs = pairs_ptr + tl.where(b < B, b, 0).to(tl.int64)[None, :] * stride_pb + half[:, None]  # [BK / 2, BB]
                if zero_ptr is not None:
                    zero_ptrs, place = zeros_of_rows(zero_ptr, row, stride_zm)
                for start in tl.range(0, columns, BK, num_stages=STAGES):
                    w, x = tl.load(byte_ptrs + start // 2), tl.load(pair_ptrs + start // 2)
                    scale = tl.load(scale_ptrs + (part * columns + start) // COLUMNS)  # [BM]
                    if zero_ptr is not None:
                        packed = tl.load(zero_ptrs + (part * columns + start) // COLUMNS)  # [BM]
                        zeros = (((packed >> place) & 15) - 8).to(tl.float32)
                        acc += times_pairs(w, x, scale, zeros, x_ptr.dtype.element_ty, OPERAND, KIND, CONVERTS)
                    else:
                        acc += times_pairs(w, x, scale, None, x_ptr.dtype.element_ty, OPERAND, KIND, CONVERTS)
            else:
                for start in tl.range(0, columns, BK, num_stages=STAGES):
                    w, x = tl.load(w_ptrs + start), tl.load(x_ptrs + start).to(OPERAND)
                    if COLUMNS > 0:
                        scale = tl.load(scale_ptrs + (part * columns + start) // COLUMNS)  # [BM]
                        acc += times(w, x, scale, OPERAND, KIND, CONVERTS)
                    else:
                        acc = tl.dot(widen(w, KIND, CONVERTS).to(OPERAND), x, acc, input_precision="ieee")
            if COLUMNS == 0:
                acc = acc * tl.load(scale_ptrs).to(tl.float32)[:, None]
        elif plain_ptr is not None:
            plain_ptrs = plain_ptr + (tl.where(first < M, first, stored) - stored).to(tl.int64)[:, None] * stride_pm + k[None, :]
            for start in tl.range(0, columns, BK, num_stages=STAGES):
                w, x = tl.load(plain_ptrs + start).to(OPERAND), tl.load(x_ptrs + start).to(OPERAND)
                acc = tl.dot(w, x, acc, input_precision="ieee")
    elif EARLY:
        w = tl.load(w_ptrs)
        if OVERLAP:
            gdc_wait()
        acc = tl.dot(w.to(OPERAND), tl.load(x_ptrs).to(OPERAND), acc, input_precision="ieee")
        w_ptrs += BK
        x_ptrs += BK
    elif OVERLAP:
        gdc_wait()
    if KIND is None:
        for _ in tl.range(BK if EARLY else 0, columns, BK, num_stages=STAGES):
            w = tl.load(w_ptrs)
            x = tl.load(x_ptrs)
            acc = tl.dot(w.to(OPERAND), x.to(OPERAND), acc, input_precision="ieee")
            w_ptrs += BK
            x_ptrs += BK

    if LORA is not None:
        acc = _add_lora(
            acc, pid * BO, pid * BO + BO + (M if SWIGLU else 0), row, b, B,
            low_ptr, low_columns, (b0_ptr, b1_ptr, b2_ptr, b3_ptr), part, BB, LORA,
        )  # fmt: skip
    if SWIGLU:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, BO, BB)), (1, 2, 0)))
        acc = gate * tl.sigmoid(gate) * up
    out_ptrs = out_ptr + (part * B + b[None, :]).to(tl.int64) * M + out_row[:, None]  # [BO, BB]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=live)


def launch_with(
    chosen: FewRowsConfig, x: torch.Tensor, weight: torch.Tensor, swiglu: bool = False, overlap: bool = False,
    scale: torch.Tensor | None = None, format: str = "", plain: torch.Tensor | None = None, dtype: torch.dtype | None = None,
    zero: torch.Tensor | None = None, lora: Lora | None = None,
) -> torch.Tensor:  # fmt: skip
    """The parts of a linear, [parts, ..., M], without the first axis if there is only one.

    Args:
        chosen: the config. N is a multiple of its parts times its columns per step.
        x: [..., N], a few rows.
        weight: [M, N], with `swiglu` [2·M, N].
        swiglu: whether the weight is of gate and up.
        overlap: whether the weight may be read while kernels before this one run.
        scale, format: of a quantised weight, as in the dialect's dequantize.
        plain: [P, N], rows after those of a quantised weight, or None.
        dtype: of the result; None for that of the weight.
        zero: the zero points of a quantised weight, if its format has them.
        lora: A·x of all adapters, [B, Σrank] in float32, their B's, and the result of `adapters_table`.
    """
    BM, BK, num_warps, stages, parts, early = chosen
    stored, how = weight.shape[0] // (2 if swiglu else 1), quantized.stored(format)
    M, dtype = stored + (0 if plain is None else plain.shape[0]), dtype or weight.dtype
    rows, out = rows_and_out(x, M, dtype, parts)
    B, N = rows.shape
    options = overlap_options(x) if overlap else {}
    data, pairs = quantized.raw(weight) if how else weight, None
    if how and how.packed > 1:
        data, pairs = data.view(torch.uint8), quantized.pairs(rows)
    tile = BM // 2 if swiglu else BM
    low, up, table = lora or (None, (), None)
    kernel_of(few_rows_linear_kernel)[(-(-stored // tile) + -(-(M - stored) // tile), parts)](
        rows, pairs, data, scale, zero, plain, low, *up, *[None] * (MAX_LORA - len(up)), out,
        B, M, stored, N // parts, 0 if low is None else low.shape[-1],
        rows.stride(0), 0 if pairs is None else pairs.stride(0), data.stride(0),
        0 if scale is None else scale.stride(0), 0 if zero is None else zero.stride(0), 0 if plain is None else plain.stride(0),
        SWIGLU=swiglu, OPERAND=OPERANDS[dtype], BM=BM, BK=BK, BB=columns_of(B),
        STAGES=stages, EARLY=early, OVERLAP=bool(options), KIND=how and how.kind, ROWS=how.rows if how else 1,
        COLUMNS=how.columns if how else 0, PACKED=how.packed if how else 1, CONVERTS=quantized.converts(x.device, how),
        LORA=table, num_warps=num_warps, **options,
    )  # fmt: skip
    return out


def adapters(
    x: torch.Tensor, A: list[torch.Tensor] | None, B: list[torch.Tensor], parts: list[int], scaling: list[float], overlap: bool
) -> Lora | None:
    """The argument `lora` of `launch_with` for adapters as in the dialect, with one A. A·x is computed by a launch of its own."""
    if not A:
        return None
    return low_rank.launch(x, A[0], overlap), B, adapters_table(B, parts, scaling)


def launch(
    x: torch.Tensor, weight: torch.Tensor, swiglu: bool = False, parts: int = 1, overlap: bool = False,
    lora: tuple[Any, ...] = (), **stored: Any,
) -> torch.Tensor:  # fmt: skip
    """`launch_with` the config for the shape of the weight and the number of rows, or few_rows_hopper instead.

    `lora` has the arguments of adapters as in the dialect. `stored` has the arguments of `launch_with` for a quantised weight.
    """
    M, format = weight.shape[0] // (2 if swiglu else 1), stored.get("format", "")
    N = quantized.width(weight, format)
    rows = x.reshape(-1, N)
    x = rows.view(x.shape)  # if a copy is needed, it is made once
    added = {"lora": adapters(x, *lora, overlap)} if any(lora) else {}
    how, device, B = quantized.stored(format), devices.of(x.device), rows.shape[0]
    itemsize = weight.itemsize if how is None else 1
    sizes = M, 0 if stored.get("plain") is None else stored["plain"].shape[0], N, parts

    def taken(kernel: str, default: Any, require: Callable[[Any], None]) -> Any:
        """The tuned choice. With adapters the default, because they were not there when it was measured."""
        key = tuned.Key(kernel, "swiglu" if swiglu else "plain", sizes, tuned.of_weight(weight, format), B)
        return default if added else tuned.choose(key, default, require, x.device)

    def fits_ring(config: RingConfig) -> None:
        require_ring(config, N, B, itemsize, swiglu, parts, device)

    def fits(config: FewRowsConfig) -> None:
        require_few_rows(config, N, B, itemsize, parts, device, how.columns or N if how else 0)

    if "zero" in stored:
        pass  # the ring does not support four bits
    elif stored and few_rows_hopper_quantized and (ring := quantized_ring_config(M, N, rows.shape[0], swiglu, parts)):
        if few_rows_hopper_quantized.supports_here(rows, weight, **stored):
            ring = taken("few_rows_hopper_quantized", ring, fits_ring)
            return few_rows_hopper_quantized.launch_with(ring, x, weight, swiglu, overlap, **stored)
    elif few_rows_hopper and (ring := ring_config(M, N, swiglu, parts, 0 if any(lora) else rows.shape[0])):
        if few_rows_hopper.supports_here(rows, weight, *lora[1:3]):
            ring = taken("few_rows_hopper", ring, fits_ring)
            return few_rows_hopper.launch_with(ring, x, weight, swiglu, overlap, **added)
    config = taken("few_rows_linear", quantized.config_of_rows(weight, format, B, swiglu, parts, device), fits)
    return launch_with(config, x, weight, swiglu, overlap, **added, **stored)
