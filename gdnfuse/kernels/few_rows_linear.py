"""A few rows times a weight, on tensor cores: the linears of a decode step of 2 to 32 sequences. They mainly stream weights.

It computes the dialect's fused_linear, with SwiGLU after it (Shazeer 2020, arXiv:2002.05202) or nothing, and split_linear.

The weight's rows are the products' rows, so a tile needs no more sequences than there are. On Hopper a program may start, and
load its first weights, while the kernel before it still runs (programmatic dependent launch). It only waits for x.

Layout: x [..., N] and weight [M, N] with contiguous rows at any distance; output contiguous. Products and sums are float32. There
is one rounding, to the weight's dtype, and none for split_linear.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gdnfuse import compat
from gdnfuse.kernels import devices, quantized
from gdnfuse.kernels.launch.implementation import kernel_of, overlap_options
from gdnfuse.kernels.linear_configs import (
    FewRowsConfig,
    columns_of,
    quantized_ring_config,
    ring_config,
    rows_and_out,
)
from gdnfuse.kernels.quantized import times, times_pairs, widen, zeros_of_rows

if compat.gluon():
    from gdnfuse.kernels import few_rows_hopper, few_rows_hopper_quantized
else:
    few_rows_hopper = few_rows_hopper_quantized = None
gdc_launch_dependents, gdc_wait = compat.dependent_launch()

# Dtypes of products' operands, by the dtype of the weight.
OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def few_rows_linear_kernel(
    x_ptr, pairs_ptr, weight_ptr, scale_ptr, zero_ptr, plain_ptr, out_ptr,
    B, M, stored, columns, stride_xb, stride_pb, stride_wm, stride_sm, stride_zm, stride_pm,
    SWIGLU: tl.constexpr, OPERAND: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr, OVERLAP: tl.constexpr,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PACKED: tl.constexpr, CONVERTS: tl.constexpr,
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

    if SWIGLU:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, BO, BB)), (1, 2, 0)))
        acc = gate * tl.sigmoid(gate) * up
    out_ptrs = out_ptr + (part * B + b[None, :]).to(tl.int64) * M + out_row[:, None]  # [BO, BB]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=live)


def launch_with(
    chosen: FewRowsConfig, x: torch.Tensor, weight: torch.Tensor, swiglu: bool = False, overlap: bool = False,
    scale: torch.Tensor | None = None, format: str = "", plain: torch.Tensor | None = None, dtype: torch.dtype | None = None,
    zero: torch.Tensor | None = None,
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
    kernel_of(few_rows_linear_kernel)[(-(-stored // tile) + -(-(M - stored) // tile), parts)](
        rows, pairs, data, scale, zero, plain, out,
        B, M, stored, N // parts, rows.stride(0), 0 if pairs is None else pairs.stride(0), data.stride(0),
        0 if scale is None else scale.stride(0), 0 if zero is None else zero.stride(0), 0 if plain is None else plain.stride(0),
        SWIGLU=swiglu, OPERAND=OPERANDS[dtype], BM=BM, BK=BK, BB=columns_of(B),
        STAGES=stages, EARLY=early, OVERLAP=bool(options), KIND=how and how.kind, ROWS=how.rows if how else 1,
        COLUMNS=how.columns if how else 0, PACKED=how.packed if how else 1, CONVERTS=quantized.converts(x.device, how),
        num_warps=num_warps, **options,
    )  # fmt: skip
    return out


def launch(
    x: torch.Tensor, weight: torch.Tensor, swiglu: bool = False, parts: int = 1, overlap: bool = False, **stored: Any
) -> torch.Tensor:
    """`launch_with` the config for the shape of the weight and the number of rows, or few_rows_hopper instead.

    `stored` has the arguments of `launch_with` for a quantised weight.
    """
    M, format = weight.shape[0] // (2 if swiglu else 1), stored.get("format", "")
    N = quantized.width(weight, format)
    rows = x.reshape(-1, N)
    x = rows.view(x.shape)  # if a copy is needed, it is made once
    if "zero" in stored:
        pass  # the ring does not support four bits
    elif stored and few_rows_hopper_quantized and (ring := quantized_ring_config(M, N, rows.shape[0], swiglu, parts)):
        if few_rows_hopper_quantized.supports_here(rows, weight, **stored):
            return few_rows_hopper_quantized.launch_with(ring, x, weight, swiglu, overlap, **stored)
    elif few_rows_hopper and (ring := ring_config(M, N, swiglu, parts)) and few_rows_hopper.supports_here(rows, weight):
        return few_rows_hopper.launch_with(ring, x, weight, swiglu, overlap)
    config = quantized.config_of_rows(weight, format, rows.shape[0], swiglu, parts, devices.of(x.device))
    return launch_with(config, x, weight, swiglu, overlap, **stored)
