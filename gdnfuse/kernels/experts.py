"""The chosen experts of a step's rows, with the shared expert and the residual. Weights of needed experts are streamed once each.

It computes the dialect's experts and routed_experts (Shazeer et al. 2017, arXiv:1701.06538; SwiGLU: Shazeer 2020,
arXiv:2002.05202). Grids depend on the number of choices and never on what was chosen. So CUDA graphs can contain them, and the
host reads nothing back.

One row is two launches: gate and up with SwiGLU, then down with the sum over the choices. If the router is part of the op, a
launch for its logits comes first, and each program finds its expert from the logits itself. That takes less time than waiting for
another program, and the weights of the first choices stream while the others are still being found.

Several rows are three launches: gate and up, down, and the sum over the choices. The first choice of an expert has the programs
for all rows that chose it, which they gather. The programs of its other choices end at once. If there are more choices than
experts, each expert has programs instead. Products are on tensor cores with the weight's rows as the product's rows.

On Hopper each launch may start while the one before it runs (programmatic dependent launch). What depends on no choice, norms and
the shared expert, is read before the wait. The launch of gate and up lets that of down start only after it has waited itself. By
then everything before both has ended. So down knows the choices and loads its weights while gate and up still runs. It reads the
choices from the L2, because they were written so shortly before that the L1 may still hold old values.

Layout: x [N, H], gate_up [E, 2·I, H] and down [E, H, I] with contiguous rows at any distance. Products and sums are float32. The
result of SwiGLU is rounded to the weights' dtype, and so is the final result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gdnfuse import compat, formats
from gdnfuse.dialect.experts import ACTIVATIONS
from gdnfuse.errors import Refused
from gdnfuse.kernels import devices, grouped_experts, quantized, route, skinny_linear
from gdnfuse.kernels.few_rows_linear import OPERANDS
from gdnfuse.kernels.launch.implementation import kernel_of, overlap_options, register, require_dtypes, require_static
from gdnfuse.kernels.quantized import dot_scaled, load_scales, scales_of_rows, times
from gdnfuse.kernels.route import LOWEST, MAX_EXPERTS, MAX_ROWS, MAX_TOP_K, keys, largest, normed
from gdnfuse.kernels.skinny_linear import load_row, load_rows

gdc_launch_dependents, gdc_wait = compat.dependent_launch()

GROUP = tl.constexpr(quantized.GROUP)
COMPARED = 128  # how many choices a program compares with its expert at once


class DownConfig(NamedTuple):
    """For one row: rows of the weight per program, columns per step, warps."""

    R: int
    BN: int
    num_warps: int


class RowsConfig(NamedTuple):
    """For several rows: rows of the weight per tile (half of gate, half of up), columns per step, warps, stages in flight."""

    BM: int
    BK: int
    num_warps: int
    stages: int


# The first that fits, by bytes of weight per thread. Chosen on an H200, like all below, with benchmarks/experts.py --sweep.
DOWN = (DownConfig(2, 512, 2), DownConfig(2, 512, 4), DownConfig(1, 512, 4), DownConfig(1, 1024, 8), DownConfig(1, 2048, 16))
REGISTERS = 384  # the most bytes of weight that a thread holds
UP_ROWS = DOWN_ROWS = RowsConfig(128, 64, 4, 3)
LEAST, MOST = 8, 16  # the fewest and the most rows that a program takes at once
SUMMED = 1024  # columns per program of the sum
LINES = 64  # lines of 128 bytes of the shared expert's down projection that a waiting program loads into the L2; 0 for none


@triton.jit
def _rows_where(steps, weight_ptr, row, live, stride_wm, N: tl.constexpr, BN: tl.constexpr):
    """The steps, in which rows of the weight that are live replace the given ones: a tuple of [R, BN]."""
    column = tl.arange(0, BN)  # [BN]
    w_ptrs = weight_ptr + row.to(tl.int64)[:, None] * stride_wm + column[None, :]  # [R, BN]
    loaded = ()
    for start in tl.static_range(0, N, BN):
        if start + BN <= N:
            loaded = loaded + (tl.load(w_ptrs + start, mask=live[:, None], other=steps[start // BN]),)
        else:
            inside = live[:, None] & (column < N - start)[None, :]
            loaded = loaded + (tl.load(w_ptrs + start, mask=inside, other=steps[start // BN]),)
    return loaded


@triton.jit
def _prefetch(weight_ptr, part, M, N, stride_wm, LINES: tl.constexpr):
    """Load a part of a weight [M, N], so many lines of 128 bytes, into the L2."""
    LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth  # elements
    i = (part * LINES + tl.arange(0, LINES)) * LINE  # [LINES]
    i = tl.where(i < M * N, i, 0)
    address = (weight_ptr + (i // N).to(tl.int64) * stride_wm + i % N).to(tl.int64)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], tl.int32, is_pure=False, pack=1)


@triton.jit
def _scales_of(expert, rows, row, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The address of the scales of an expert's row, for weights with so many rows of N columns.

    After the end, those of the first row.
    """
    return scales_of_rows(expert, rows, tl.where(row < rows, row, 0), N, ROWS, COLUMNS)


@triton.jit
def experts_up_kernel(
    x_ptr, norm_weight_ptr, logits_ptr, indices_ptr, gate_up_ptr, shared_gate_ptr, shared_up_ptr, shared_expert_gate_ptr,
    shared_down_ptr, h_ptr, shared_h_ptr, open_ptr, scale_ptr, shared_gate_scale_ptr, shared_up_scale_ptr,
    norm_eps, norm_offset, E, I, S, tiles, shared_tiles, fetching, stride_e, stride_w, stride_sg, stride_su, stride_sd,
    H: tl.constexpr, BE: tl.constexpr, ROUND: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, LINES: tl.constexpr,
    OVERLAP: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """One row: R columns of SwiGLU of the shared expert, whose programs come first, or of one choice.

    While the other programs wait, the first of them load the shared expert's down projection into the L2, LINES lines of 128
    bytes each.
    """
    pid = tl.program_id(0)
    shared = pid < shared_tiles
    choice = (pid - shared_tiles) // tiles
    tile = tl.where(shared, pid, (pid - shared_tiles) % tiles)
    row = tile * R + tl.arange(0, R)  # [R]
    if shared_gate_ptr is not None:
        gate = load_rows(shared_gate_ptr, row, (row < S) & shared, stride_sg, H, BN, False)
        up = load_rows(shared_up_ptr, row, (row < S) & shared, stride_su, H, BN, False)
    norm_weight = ()
    if norm_weight_ptr is not None:
        norm_weight = load_row(norm_weight_ptr, H, BN)
    if OVERLAP:
        if shared_down_ptr is not None and LINES > 0:
            if (pid >= shared_tiles) & (pid < shared_tiles + fetching):
                _prefetch(shared_down_ptr, pid - shared_tiles, H, S, stride_sd, LINES)
        gdc_wait()
        gdc_launch_dependents()

    if logits_ptr is not None:
        e = tl.arange(0, BE)  # [BE]
        key = keys(tl.load(logits_ptr + e, mask=e < E, other=0.0).to(ROUND).to(tl.float32), e, E, ROUND)
        _, expert = largest(key, e, ROUND)
        for _ in range(tl.where(shared, 0, choice)):
            key = tl.where(e == expert, LOWEST, key)
            _, expert = largest(key, e, ROUND)
        there = row < I
    else:
        expert = tl.load(indices_ptr + choice, mask=choice >= 0, other=0).to(tl.int32)
        there = (row < I) & (expert >= 0) & (expert < E)
    weight_ptr = gate_up_ptr + expert.to(tl.int64) * stride_e
    up_ptr = weight_ptr + tl.cast(I, tl.int64) * stride_w
    if shared_gate_ptr is not None:
        x_row = load_row(x_ptr, H, BN)
        gate = _rows_where(gate, weight_ptr, row, there & (pid >= shared_tiles), stride_w, H, BN)
        up = _rows_where(up, up_ptr, row, there & (pid >= shared_tiles), stride_w, H, BN)
    else:
        gate = load_rows(weight_ptr, row, there, stride_w, H, BN, False)
        up = load_rows(up_ptr, row, there, stride_w, H, BN, False)
        x_row = load_row(x_ptr, H, BN)

    x, factor = normed(x_row, norm_weight, norm_eps, norm_offset, H, BN)
    if KIND is None:
        y = skinny_linear.dot_rows(gate, x, R, BN) * factor  # [R]
        y = y * tl.sigmoid(y) * (skinny_linear.dot_rows(up, x, R, BN) * factor)
    else:
        known = tl.minimum(tl.maximum(expert, 0), E - 1)  # an index that is not an expert has no scales, and weights of zero
        of_gate = scale_ptr + _scales_of(known, 2 * I, tile * R, H, ROWS, COLUMNS)
        of_up = scale_ptr + _scales_of(known, 2 * I, I + tile * R, H, ROWS, COLUMNS)
        if shared_gate_ptr is not None:
            place = _scales_of(0, S, tile * R, H, ROWS, COLUMNS)
            of_gate = tl.where(shared, shared_gate_scale_ptr + place, of_gate)
            of_up = tl.where(shared, shared_up_scale_ptr + place, of_up)
        scales, up_scales = load_scales(of_gate, H, BN, COLUMNS, GROUP), load_scales(of_up, H, BN, COLUMNS, GROUP)
        y = dot_scaled(gate, x, scales, (), R, BN, KIND, CONVERTS, GROUP) * factor  # [R]
        y = y * tl.sigmoid(y) * (dot_scaled(up, x, up_scales, (), R, BN, KIND, CONVERTS, GROUP) * factor)
    y = y.to(h_ptr.dtype.element_ty)
    if shared_gate_ptr is not None:
        tl.store(shared_h_ptr + row, y, mask=shared & (row < S))
        if shared_expert_gate_ptr is not None:
            if pid == 0:
                opening = tl.zeros((BN,), tl.float32)
                s = load_row(shared_expert_gate_ptr, H, BN)
                for i in tl.static_range(len(s)):
                    opening += s[i].to(tl.float32) * x[i]
                tl.store(open_ptr, tl.sum(opening, 0) * factor)
    tl.store(h_ptr + choice.to(tl.int64) * I + row, y, mask=there & (pid >= shared_tiles))


@triton.jit
def experts_down_kernel(
    h_ptr, shared_h_ptr, open_ptr, logits_ptr, indices_ptr, weights_ptr, down_ptr, shared_down_ptr, residual_ptr, out_ptr,
    scale_ptr, shared_scale_ptr,
    E, M, stride_e, stride_w, stride_s,
    K: tl.constexpr, I: tl.constexpr, S: tl.constexpr, BE: tl.constexpr, ROUND: tl.constexpr, NORMALIZE: tl.constexpr,
    R: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CONVERTS: tl.constexpr,
):  # fmt: skip
    """One row: R columns of the result, over all choices."""
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0) * R + tl.arange(0, R)  # [R]
    live = row < M
    w = ()
    if shared_down_ptr is not None:
        shared_w = load_rows(shared_down_ptr, row, live, stride_s, S, BN, False)
    weights = ()
    scales = ()
    choices = ()  # whether each has an expert
    total = 0.0
    if logits_ptr is not None:
        e = tl.arange(0, BE)  # [BE]
        logit = tl.load(logits_ptr + e, mask=e < E, other=-float("inf"), cache_modifier=".cg").to(ROUND).to(tl.float32)
        key = keys(logit, e, E, ROUND)
    for j in tl.static_range(K):
        if logits_ptr is not None:
            value, expert = largest(key, e, ROUND)
            key = tl.where(e == expert, LOWEST, key)
            if j == 0:
                most = value
                total = 0.0 if NORMALIZE else tl.sum(tl.exp(logit - most), 0)
            weight = tl.exp(value - most)
            if NORMALIZE:
                total += weight
            there = live
        else:
            expert = tl.load(indices_ptr + j, cache_modifier=".cg").to(tl.int32)
            weight = tl.load(weights_ptr + j, cache_modifier=".cg").to(tl.float32)
            chosen = (expert >= 0) & (expert < E)
            choices = choices + (chosen,)
            there = live & chosen
        w = w + load_rows(down_ptr + expert.to(tl.int64) * stride_e, row, there, stride_w, I, BN, False)
        if KIND is not None:
            known = tl.minimum(tl.maximum(expert, 0), E - 1)
            place = _scales_of(known, M, tl.program_id(0) * R, I, ROWS, COLUMNS)
            scales = scales + load_scales(scale_ptr + place, I, BN, COLUMNS, GROUP)
        weights = weights + (weight,)
    if OVERLAP:
        gdc_wait()

    column = tl.arange(0, BN)  # [BN]
    STEPS: tl.constexpr = (I + BN - 1) // BN
    SUMS: tl.constexpr = BN if KIND is None else BN // GROUP
    acc = tl.zeros((R, SUMS), tl.float32)
    for j in tl.static_range(K):
        for i in tl.static_range(STEPS):
            inside = column < I - i * BN
            if logits_ptr is None:
                inside = inside & choices[j]
            h = tl.load(h_ptr + j * I + i * BN + column, mask=inside, other=0.0).to(tl.float32)  # [BN]
            if KIND is None:
                acc += w[j * STEPS + i].to(tl.float32) * (h * weights[j])[None, :]
            else:
                products = quantized.widen(w[j * STEPS + i], KIND, CONVERTS) * h[None, :]
                grouped = tl.sum(tl.reshape(products, (R, SUMS, GROUP)), 2)  # [R, SUMS]
                acc += grouped * (scales[j * STEPS + i] * weights[j])[None, :]
    y = tl.sum(acc, 1)  # [R]
    if logits_ptr is not None:
        y = y / total
    if shared_down_ptr is not None:
        shared_h = load_row(shared_h_ptr, S, BN)
        if KIND is None:
            y_shared = skinny_linear.dot_rows(shared_w, shared_h, R, BN)
        else:
            h_wide = ()
            for i in tl.static_range(len(shared_h)):
                h_wide = h_wide + (shared_h[i].to(tl.float32),)
            place = _scales_of(0, M, tl.program_id(0) * R, S, ROWS, COLUMNS)
            shared_scales = load_scales(shared_scale_ptr + place, S, BN, COLUMNS, GROUP)
            y_shared = dot_scaled(shared_w, h_wide, shared_scales, (), R, BN, KIND, CONVERTS, GROUP)
        if open_ptr is not None:
            y_shared = y_shared * tl.sigmoid(tl.load(open_ptr))
        y += y_shared
    if residual_ptr is not None:
        y += tl.load(residual_ptr + row, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, y.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _choosers(indices_ptr, entry, E, NK, P: tl.constexpr, BY_CHOICE: tl.constexpr):
    """The expert of an entry, which is a choice or an expert, and how many choices of that expert the entry computes."""
    expert = entry
    if BY_CHOICE:
        expert = tl.load(indices_ptr + entry, mask=entry >= 0, other=0, cache_modifier=".cg").to(tl.int32)
    count = 0
    earliest = NK
    for start in range(0, NK, P):
        p = start + tl.arange(0, P)  # [P]
        chosen = tl.load(indices_ptr + p, mask=p < NK, other=-1, cache_modifier=".cg").to(tl.int32) == expert
        count += tl.sum(chosen.to(tl.int32), 0)
        earliest = tl.minimum(earliest, tl.min(tl.where(chosen, p, NK), 0))
    mine = (expert >= 0) & (expert < E)
    if BY_CHOICE:
        mine = mine & (earliest == entry)
    return expert, tl.where(mine, count, 0)


@triton.jit
def _next(indices_ptr, expert, first, NK, P: tl.constexpr, BB: tl.constexpr):
    """The choices of an expert from the first-th on: [BB], 0 if there are none left."""
    b = first + tl.arange(0, BB)  # [BB]
    at = tl.zeros((BB,), tl.int32)
    before = 0
    for start in range(0, NK, P):
        p = start + tl.arange(0, P)  # [P]
        chosen = tl.load(indices_ptr + p, mask=p < NK, other=-1, cache_modifier=".cg").to(tl.int32) == expert
        rank = before + tl.cumsum(chosen.to(tl.int32), 0) - 1  # [P]
        at += tl.sum(tl.where(chosen[:, None] & (rank[:, None] == b[None, :]), p[:, None], 0), 0)
        before += tl.sum(chosen.to(tl.int32), 0)
    return at


@triton.jit
def _open(x_ptr, shared_expert_gate_ptr, open_ptr, N, columns, stride_x, BK: tl.constexpr, BB: tl.constexpr):
    """The product of every row with the shared expert's gate."""
    k = tl.arange(0, BK)  # [BK]
    for first in range(0, N, BB):
        n = first + tl.arange(0, BB)  # [BB]
        acc = tl.zeros((BK, BB), tl.float32)
        for start in range(0, columns, BK):
            s = tl.load(shared_expert_gate_ptr + start + k).to(tl.float32)  # [BK]
            x_ptrs = x_ptr + n.to(tl.int64)[None, :] * stride_x + (start + k)[:, None]  # [BK, BB]
            acc += s[:, None] * tl.load(x_ptrs, mask=(n < N)[None, :], other=0.0).to(tl.float32)
        tl.store(open_ptr + n, tl.sum(acc, 0), mask=n < N)


@triton.jit
def experts_up_rows_kernel(
    x_ptr, indices_ptr, gate_up_ptr, shared_gate_ptr, shared_up_ptr, shared_expert_gate_ptr, h_ptr, shared_h_ptr, open_ptr,
    scale_ptr, shared_gate_scale_ptr, shared_up_scale_ptr,
    N, NK, E, I, S, columns, tiles, shared_tiles, stride_x, stride_e, stride_w, stride_sg, stride_su,
    K: tl.constexpr, P: tl.constexpr, BY_CHOICE: tl.constexpr, OPERAND: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """Several rows: BM / 2 columns of SwiGLU of the shared expert for all rows, or of an expert for the rows that chose it.

    If the shared expert has a gate, the first program computes its product. The tile of that program has only this row.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    pid = tl.program_id(0)
    BO: tl.constexpr = BM // 2
    k = tl.arange(0, BK)  # [BK]
    b = tl.arange(0, BB)  # [BB]
    if KIND is not None and shared_expert_gate_ptr is not None:  # the gate is stored in another way than quantised weights
        if pid == 0:
            _open(x_ptr, shared_expert_gate_ptr, open_ptr, N, columns, stride_x, BK, BB)
            return
    shared = pid < shared_tiles
    opens = (pid == 0) & (shared_expert_gate_ptr is not None)
    tile = tl.where(shared, pid - (shared_expert_gate_ptr is not None), (pid - shared_tiles) % tiles)
    expert, count = _choosers(indices_ptr, (pid - shared_tiles) // tiles, E, NK, P, BY_CHOICE)
    width = I
    gate_ptr = gate_up_ptr + expert.to(tl.int64) * stride_e
    up_ptr = gate_ptr + tl.cast(I, tl.int64) * stride_w
    stride_gate, stride_up = stride_w, stride_w
    out_ptr = h_ptr
    if shared_gate_ptr is not None:
        width = tl.where(shared, S, I)
        gate_ptr = tl.where(shared, shared_gate_ptr, gate_ptr)
        up_ptr = tl.where(shared, shared_up_ptr, up_ptr)
        stride_gate, stride_up = tl.where(shared, stride_sg, stride_w), tl.where(shared, stride_su, stride_w)
        out_ptr = tl.where(shared, shared_h_ptr, h_ptr)
        count = tl.where(shared, N, count)
    if KIND is None and shared_expert_gate_ptr is not None:
        gate_ptr, up_ptr = tl.where(opens, shared_expert_gate_ptr, gate_ptr), tl.where(opens, shared_expert_gate_ptr, up_ptr)
    row = tile * BO + tl.arange(0, BO)  # [BO]
    inside = (row >= 0) & (row < width)  # [BO]
    w_row = tl.where(inside, row, 0).to(tl.int64)  # [BO]
    gate_ptrs = gate_ptr + w_row[:, None] * stride_gate + k[None, :]  # [BO, BK]
    up_ptrs = up_ptr + w_row[:, None] * stride_up + k[None, :]  # [BO, BK]
    if KIND is not None:
        known = tl.minimum(tl.maximum(expert, 0), E - 1)
        of_gate = scale_ptr + scales_of_rows(known, 2 * I, w_row, columns, ROWS, COLUMNS)  # [BO]
        of_up = scale_ptr + scales_of_rows(known, 2 * I, I + w_row, columns, ROWS, COLUMNS)  # [BO]
        if shared_gate_ptr is not None:
            place = scales_of_rows(0, S, w_row, columns, ROWS, COLUMNS)
            of_gate = tl.where(shared, shared_gate_scale_ptr + place, of_gate)
            of_up = tl.where(shared, shared_up_scale_ptr + place, of_up)
    for first in range(0, count, BB):
        at = _next(indices_ptr, expert, first, NK, P, BB)  # [BB]
        at = tl.where(shared, first + b, at)
        n = tl.where(shared, at, at // K)  # [BB]
        live = first + b < count  # [BB]
        x_ptrs = x_ptr + tl.where(live, n, 0).to(tl.int64)[None, :] * stride_x + k[:, None]  # [BK, BB]
        gate = tl.zeros((BO, BB), tl.float32)
        up = tl.zeros((BO, BB), tl.float32)
        for start in tl.range(0, columns, BK, num_stages=STAGES):
            x = tl.load(x_ptrs + start, mask=live[None, :], other=0.0).to(OPERAND)
            if KIND is None:
                gate = tl.dot(tl.load(gate_ptrs + start).to(OPERAND), x, gate, input_precision="ieee")
                up = tl.dot(tl.load(up_ptrs + start).to(OPERAND), x, up, input_precision="ieee")
            else:
                block = start // COLUMNS
                gate += times(tl.load(gate_ptrs + start), x, tl.load(of_gate + block), OPERAND, KIND, CONVERTS)
                up += times(tl.load(up_ptrs + start), x, tl.load(of_up + block), OPERAND, KIND, CONVERTS)
        if KIND is None and shared_expert_gate_ptr is not None:
            tl.store(open_ptr + at, tl.sum(tl.where(row[:, None] == -BO, gate, 0.0), 0), mask=opens & live)
        y = gate * tl.sigmoid(gate) * up  # [BO, BB]
        out_ptrs = out_ptr + at.to(tl.int64)[None, :] * width + row[:, None]
        tl.store(out_ptrs, y.to(h_ptr.dtype.element_ty), mask=inside[:, None] & live[None, :])


@triton.jit
def experts_down_rows_kernel(
    h_ptr, shared_h_ptr, open_ptr, indices_ptr, weights_ptr, down_ptr, shared_down_ptr, parts_ptr,
    scale_ptr, shared_scale_ptr,
    N, NK, E, M, I, S, tiles, shared_tiles, stride_e, stride_w, stride_s,
    K: tl.constexpr, P: tl.constexpr, BY_CHOICE: tl.constexpr, OPERAND: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """Several rows: BM columns of the result of each choice of an expert, times its weight, or of the shared expert."""
    if OVERLAP:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    k = tl.arange(0, BK)  # [BK]
    b = tl.arange(0, BB)  # [BB]
    shared = pid < shared_tiles
    tile = tl.where(shared, pid, (pid - shared_tiles) % tiles)
    row = tile * BM + tl.arange(0, BM)  # [BM]
    expert, count = _choosers(indices_ptr, (pid - shared_tiles) // tiles, E, NK, P, BY_CHOICE)
    weight_ptr = down_ptr + expert.to(tl.int64) * stride_e
    width, stride = I, stride_w
    in_ptr = h_ptr
    if shared_down_ptr is not None:
        width, stride = tl.where(shared, S, I), tl.where(shared, stride_s, stride_w)
        weight_ptr = tl.where(shared, shared_down_ptr, weight_ptr)
        in_ptr = tl.where(shared, shared_h_ptr, h_ptr)
        count = tl.where(shared, N, count)
    w_ptrs = weight_ptr + tl.where(row < M, row, 0).to(tl.int64)[:, None] * stride + k[None, :]  # [BM, BK]
    if KIND is not None:
        known, w_row = tl.minimum(tl.maximum(expert, 0), E - 1), tl.where(row < M, row, 0)
        scale_ptrs = scale_ptr + scales_of_rows(known, M, w_row, I, ROWS, COLUMNS)  # [BM]
        if shared_down_ptr is not None:
            of_shared = shared_scale_ptr + scales_of_rows(0, M, w_row, S, ROWS, COLUMNS)
            scale_ptrs = tl.where(shared, of_shared, scale_ptrs)
    if OVERLAP:
        gdc_wait()
    for first in range(0, count, BB):
        at = _next(indices_ptr, expert, first, NK, P, BB)  # [BB]
        at = tl.where(shared, first + b, at)
        live = first + b < count  # [BB]
        at = tl.where(live, at, 0)
        h_ptrs = in_ptr + at.to(tl.int64)[None, :] * width + k[:, None]  # [BK, BB]
        acc = tl.zeros((BM, BB), tl.float32)
        for start in tl.range(0, width, BK, num_stages=STAGES):
            w = tl.load(w_ptrs + start)
            h = tl.load(h_ptrs + start, mask=live[None, :], other=0.0)
            if KIND is None:
                acc = tl.dot(w.to(OPERAND), h.to(OPERAND), acc, input_precision="ieee")
            else:
                acc += times(w, h.to(OPERAND), tl.load(scale_ptrs + start // COLUMNS), OPERAND, KIND, CONVERTS)
        factor = tl.load(weights_ptr + at, mask=live & (pid >= shared_tiles), other=1.0).to(tl.float32)  # [BB]
        if open_ptr is not None:
            opening = tl.load(open_ptr + at, mask=live & shared, other=0.0)
            factor = tl.where(shared, tl.sigmoid(opening), factor)
        part, n = tl.where(shared, K, at % K), tl.where(shared, at, at // K)  # [BB]
        out_ptrs = parts_ptr + (part * N + n).to(tl.int64)[None, :] * M + row[:, None]
        tl.store(out_ptrs, acc * factor[None, :], mask=(row < M)[:, None] & live[None, :])


@triton.jit
def experts_sum_kernel(
    parts_ptr, indices_ptr, residual_ptr, out_ptr, N, E, M, stride_r,
    K: tl.constexpr, SHARED: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Several rows: BN columns of a row's result, over all choices that have an expert."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    n = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
    live = column < M
    y = tl.zeros((BN,), tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + n.to(tl.int64) * stride_r + column, mask=live, other=0.0).to(tl.float32)
    for j in tl.static_range(K):
        expert = tl.load(indices_ptr + n * K + j).to(tl.int32)
        inside = live & (expert >= 0) & (expert < E)
        y += tl.load(parts_ptr + (j * N + n).to(tl.int64) * M + column, mask=inside, other=0.0)
    if SHARED:
        y += tl.load(parts_ptr + (K * N + n).to(tl.int64) * M + column, mask=live, other=0.0)
    tl.store(out_ptr + n.to(tl.int64) * M + column, y.to(out_ptr.dtype.element_ty), mask=live)


class Routing(NamedTuple):
    """The router's logits [E] and how to use them, or the choices [k] of a row and their weights."""

    logits: torch.Tensor | None
    indices: torch.Tensor | None
    weights: torch.Tensor | None
    top_k: int
    normalize: bool
    round: tl.dtype


class Shared(NamedTuple):
    """The weights of the shared expert [S, H], [S, H], [H, S], and [1, H] of its gate; or None."""

    gate: torch.Tensor | None
    up: torch.Tensor | None
    down: torch.Tensor | None
    expert_gate: torch.Tensor | None

    @property
    def width(self) -> int:
        return 0 if self.down is None else self.down.shape[1]

    def strides(self) -> tuple[int, int, int]:
        return (0, 0, 0) if self.down is None else (self.gate.stride(0), self.up.stride(0), self.down.stride(0))

    def contiguous(self) -> Shared:
        return self if self.expert_gate is None else self._replace(expert_gate=self.expert_gate.contiguous())


class Scales(NamedTuple):
    """Scales of quantised experts, contiguous, and the format of their weights. None and "" if they are not quantised."""

    format: str = ""
    gate_up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    shared_gate: torch.Tensor | None = None
    shared_up: torch.Tensor | None = None
    shared_down: torch.Tensor | None = None

    def how(self, device: torch.device) -> dict[str, Any]:
        """Constexprs that say how a kernel reads the weights."""
        stored = quantized.stored(self.format) if self.format else None
        if stored is None:
            return {"KIND": None, "ROWS": 1, "COLUMNS": 1, "CONVERTS": False}
        how = {"KIND": stored.kind, "ROWS": stored.rows, "COLUMNS": stored.columns}
        return how | {"CONVERTS": quantized.converts(device, stored)}


def as_stored(
    gate_up: torch.Tensor, down: torch.Tensor, shared: Shared, scales: list[torch.Tensor] | None, format: str
) -> tuple[torch.Tensor, torch.Tensor, Shared, Scales]:
    """Weights as kernels read them, quantised ones as bytes, and their scales."""
    if not scales:
        return gate_up, down, shared, Scales()
    gate, up, down_shared = (None if t is None else quantized.raw(t) for t in shared[:3])
    stored = shared._replace(gate=gate, up=up, down=down_shared)
    return quantized.raw(gate_up), quantized.raw(down), stored, Scales(format, *scales)


def launch_row(
    routing: Routing,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    norm_offset: float,
    shared: Shared,
    scales: Scales,
    residual: torch.Tensor | None,
    overlap: bool,
) -> torch.Tensor:
    """experts for one row. Its choices may be the router's logits."""
    K = routing.top_k
    (E, _, H), I, S = gate_up.shape, down.shape[2], shared.width
    h, out = (torch.empty(n, dtype=x.dtype, device=x.device) for n in (K * I, x.shape))
    shared_h = torch.empty(S, dtype=x.dtype, device=x.device) if S else None
    how = scales.how(x.device)
    opening = torch.empty(1, dtype=torch.float32, device=x.device) if shared.expert_gate is not None else None
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    BE = 1 if routing.logits is None else triton.next_power_of_2(E)

    R, BN, num_warps, *_ = config_of_up(H, gate_up.dtype)
    tiles, shared_tiles = -(-I // R), -(-S // R)
    fetching = -(-H * S * down.dtype.itemsize // (128 * LINES)) if LINES else 0
    options = overlap_options(x, norm_weight) if overlap else {}
    kernel_of(experts_up_kernel)[(shared_tiles + K * tiles,)](
        x, norm_weight, routing.logits, routing.indices, gate_up, shared.gate, shared.up, shared.expert_gate,
        shared.down, h, shared_h, opening, scales.gate_up, scales.shared_gate, scales.shared_up,
        norm_eps, norm_offset, E, I, S, tiles, shared_tiles, fetching, gate_up.stride(0), gate_up.stride(1), *shared.strides(),
        H=H, BE=BE, ROUND=routing.round, R=R, BN=BN, LINES=LINES, OVERLAP=bool(options), **how, num_warps=num_warps, **options,
    )  # fmt: skip

    R, BN, num_warps = config_of_down(K, I, S, down.dtype)
    kernel_of(experts_down_kernel)[(-(-H // R),)](
        h, shared_h, opening, routing.logits, routing.indices, routing.weights, down, shared.down, residual, out,
        scales.down, scales.shared_down, E, H, down.stride(0), down.stride(1), shared.strides()[2],
        K=K, I=I, S=S, BE=BE, ROUND=routing.round, NORMALIZE=routing.normalize,
        R=R, BN=BN, OVERLAP=bool(options), **how, num_warps=num_warps, **options,
    )  # fmt: skip
    return out


def config_of_up(H: int, dtype: torch.dtype) -> skinny_linear.Config:
    """The config of skinny_linear for a weight of gate and up with H columns.

    There is one tile per program, and steps are longer at 2048 columns.
    """
    R, BN, num_warps, *_ = skinny_linear.config("swiglu", H, dtype)
    if dtype.itemsize == 1:
        return R // 2 if H > 1024 else R, BN, num_warps, 0
    return R, 1024 if 1024 < H <= 2048 else BN, num_warps, 0


def config_of_down(K: int, I: int, S: int, dtype: torch.dtype) -> DownConfig:
    """The most rows per program for which a thread can hold its part of the weights of all choices.

    Raises:
        Refused: even the fewest rows are too many.
    """
    for R, BN, num_warps in DOWN:
        BN = min(BN, max(triton.next_power_of_2(max(I, S)), 16))
        columns = (K * -(-I // BN) + -(-S // BN)) * BN
        if R * columns * dtype.itemsize <= REGISTERS * 32 * num_warps:
            return DownConfig(R, BN, num_warps)
    most = REGISTERS * 32 * DOWN[-1].num_warps // dtype.itemsize
    raise Refused(f"The experts of one row must have at most {most} columns together, found {K} of {I} and a shared one of {S}.")


def launch_rows(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared: Shared,
    scales: Scales,
    residual: torch.Tensor | None,
    overlap: bool,
) -> torch.Tensor:
    """experts for several rows."""
    (N, K), (E, _, H), I, S = indices.shape, gate_up.shape, down.shape[2], shared.width
    indices, weights = indices.contiguous(), weights.contiguous()
    empty = lambda *shape, dtype=x.dtype: torch.empty(shape, dtype=dtype, device=x.device)  # noqa: E731
    h, parts, out = empty(N * K, I), empty(K + (S > 0), N, H, dtype=torch.float32), empty(N, H, dtype=x.dtype)
    shared_h = empty(N, S) if S else None
    opening = empty(N, dtype=torch.float32) if shared.expert_gate is not None else None
    entries = min(N * K, E)
    common = {
        "K": K,
        "P": min(COMPARED, triton.next_power_of_2(N * K)),
        "BY_CHOICE": N * K <= E,
        "OPERAND": OPERANDS[x.dtype],
        "BB": LEAST if N <= LEAST else MOST,
        **scales.how(x.device),
    }
    options = overlap_options(x) if overlap else {}

    BM, BK, num_warps, stages = config_of_rows(UP_ROWS, gate_up.dtype, H)
    tiles, shared_tiles = -(-I // (BM // 2)), -(-S // (BM // 2)) + (opening is not None)
    kernel_of(experts_up_rows_kernel)[(shared_tiles + entries * tiles,)](
        x, indices, gate_up, shared.gate, shared.up, shared.expert_gate, h, shared_h, opening,
        scales.gate_up, scales.shared_gate, scales.shared_up,
        N, N * K, E, I, S, H, tiles, shared_tiles, x.stride(0), gate_up.stride(0), gate_up.stride(1), *shared.strides()[:2],
        **common, BM=BM, BK=BK, STAGES=stages, OVERLAP=bool(options), num_warps=num_warps, **options,
    )  # fmt: skip

    BM, BK, num_warps, stages = config_of_rows(DOWN_ROWS, down.dtype, *(n for n in (I, S) if n))
    tiles = -(-H // BM)
    shared_tiles = tiles if S else 0
    kernel_of(experts_down_rows_kernel)[(shared_tiles + entries * tiles,)](
        h, shared_h, opening, indices, weights, down, shared.down, parts, scales.down, scales.shared_down,
        N, N * K, E, H, I, S, tiles, shared_tiles, down.stride(0), down.stride(1), shared.strides()[2],
        **common, BM=BM, BK=BK, STAGES=stages, OVERLAP=bool(options), num_warps=num_warps, **options,
    )  # fmt: skip

    BN = min(SUMMED, triton.next_power_of_2(H))
    kernel_of(experts_sum_kernel)[(N, -(-H // BN))](
        parts, indices, residual, out, N, E, H, 0 if residual is None else residual.stride(0),
        K=K, SHARED=S > 0, BN=BN, OVERLAP=bool(options), num_warps=4, **options,
    )  # fmt: skip
    return out


def config_of_rows(config: RowsConfig, dtype: torch.dtype, *columns: int) -> RowsConfig:
    """The config with the most columns per step such that all these numbers of columns are multiples of it.

    Raises:
        Refused: there is no such step.
    """
    block = config.BK * 2 // max(dtype.itemsize, 2)
    while block > SMALLEST and any(n % block for n in columns):
        block //= 2
    if any(n % block for n in columns):
        found = " and ".join(map(str, columns))
        raise Refused(f"The columns of experts' weights for several rows must be multiples of {SMALLEST}, found {found}.")
    return config._replace(BK=block, BM=config.BM if dtype.itemsize <= 2 else config.BM // 2)


SMALLEST = 16  # the fewest columns of a step


def launch(
    x: torch.Tensor,
    indices: torch.Tensor,
    routing_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str = "silu",
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    shared_gate: torch.Tensor | None = None,
    shared_up: torch.Tensor | None = None,
    shared_down: torch.Tensor | None = None,
    shared_expert_gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scales: list[torch.Tensor] | None = None,
    format: str = "",
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The dialect's experts. Those of more than MAX_ROWS rows are grouped_experts.py's.

    Args:
        x, indices, routing_weights, gate_up, down, activation, norm_weight, norm_eps, norm_offset, shared_gate, shared_up,
            shared_down, shared_expert_gate, residual, scales, format: as in the dialect.
        overlap: whether norm_weight, shared_gate and shared_up may be read while kernels before these run.

    Returns:
        [N, H] in x's dtype, contiguous.
    """
    shared = Shared(shared_gate, shared_up, shared_down, shared_expert_gate).contiguous()
    gate_up, down, shared, stored = as_stored(gate_up, down, shared, scales, format)
    if x.shape[0] != indices.shape[0] or residual is not None and residual.shape[0] != x.shape[0]:
        raise ValueError(f"experts needs as many rows of indices and residual as of x, {x.shape[0]}.")
    if x.shape[0] > MAX_ROWS:
        memory = devices.of(x.device).shared_memory
        return grouped_experts.launch(x, indices, routing_weights, gate_up, down, shared, stored, residual, memory)
    if x.shape[0] > 1:
        return launch_rows(x, indices, routing_weights, gate_up, down, shared, stored, residual, overlap)
    routing = Routing(None, indices.contiguous(), routing_weights.contiguous(), indices.shape[1], False, tl.float32)
    return launch_row(routing, x, gate_up, down, norm_weight, norm_eps, norm_offset, shared, stored, residual, overlap)


def launch_routed(
    x: torch.Tensor,
    router: torch.Tensor,
    top_k: int,
    normalize: bool,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str = "silu",
    wide_logits: bool = False,
    wide_weights: bool = False,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    shared_gate: torch.Tensor | None = None,
    shared_up: torch.Tensor | None = None,
    shared_down: torch.Tensor | None = None,
    shared_expert_gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scales: list[torch.Tensor] | None = None,
    format: str = "",
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The dialect's routed_experts for one row.

    Args:
        x, router, top_k, normalize, gate_up, down, activation, wide_logits, wide_weights, norm_weight, norm_eps, norm_offset,
            shared_gate, shared_up, shared_down, shared_expert_gate, residual, scales, format: as in the dialect; the weights are
                never
            rounded.
        overlap: whether router, norm_weight, shared_gate and shared_up may be read while kernels before these run.

    Returns:
        [1, H] in x's dtype, contiguous.
    """
    logits = route.logits_of(x, router, norm_weight, norm_eps, norm_offset, overlap)
    routing = Routing(logits, None, None, top_k, normalize, route.rounded(router, wide_logits))
    shared = Shared(shared_gate, shared_up, shared_down, shared_expert_gate).contiguous()
    gate_up, down, shared, stored = as_stored(gate_up, down, shared, scales, format)
    return launch_row(routing, x, gate_up, down, norm_weight, norm_eps, norm_offset, shared, stored, residual, overlap)


def supports(
    x, indices, routing_weights, gate_up, down, activation="silu", norm_weight=None, norm_eps=0.0, norm_offset=0.0,
    shared_gate=None, shared_up=None, shared_down=None, shared_expert_gate=None, residual=None, scales=None, format="",
) -> None:  # fmt: skip
    """Raise Refused unless the kernels support the arguments.

    There must be rows. All sizes but their number must be static, x and all weights must have one dtype of float32, bfloat16 and
    float16, and rows must be contiguous. Several rows must have no norm and must fill the steps over columns.
    """
    require_dtypes(routing_weights=routing_weights)
    if indices.dim() != 2 or routing_weights.shape != indices.shape or indices.dtype not in (torch.int32, torch.int64):
        found = f"{list(indices.shape)} of {str(indices.dtype).removeprefix('torch.')} and {list(routing_weights.shape)}"
        raise Refused(f"indices must be of int64 and like routing_weights [N, k], found {found}.")
    N, k = indices.shape
    shared = Shared(shared_gate, shared_up, shared_down, shared_expert_gate)
    _require(x, gate_up, down, k, activation, norm_weight, shared, residual, scales, format)
    require_sizes("indices", (x.shape[0],), (N,))


def supports_routed(
    x, router, top_k, normalize, gate_up, down, activation="silu", wide_logits=False, wide_weights=False,
    norm_weight=None, norm_eps=0.0, norm_offset=0.0,
    shared_gate=None, shared_up=None, shared_down=None, shared_expert_gate=None, residual=None, scales=None, format="",
) -> None:  # fmt: skip
    """Raise Refused for the same reasons as route and experts, and unless there is one row and a router row per expert."""
    if x.shape[0] != 1:
        raise Refused(f"x must be one row, found the sizes {list(x.shape)}.")
    route.supports(x, router, top_k, normalize, wide_logits, wide_weights, norm_weight, norm_eps, norm_offset)
    shared = Shared(shared_gate, shared_up, shared_down, shared_expert_gate)
    _require(x, gate_up, down, top_k, activation, norm_weight, shared, residual, scales, format)
    if router.shape[0] != gate_up.shape[0]:
        raise Refused(f"The router must have a row per expert, found {router.shape[0]} of {gate_up.shape[0]}.")


def _require(x, gate_up, down, k, activation, norm_weight, shared, residual, scales, format) -> None:
    tensors = {"gate_up": gate_up, "down": down, "shared_gate": shared.gate, "shared_up": shared.up, "shared_down": shared.down}
    tensors |= {"shared_expert_gate": shared.expert_gate, "residual": residual}
    require_dtypes(x=x, norm_weight=norm_weight, residual=residual)
    if x.dim() != 2 or gate_up.dim() != 3 or down.dim() != 3:
        raise Refused(f"x, gate_up and down must have 2, 3 and 3 dimensions, found {x.dim()}, {gate_up.dim()} and {down.dim()}.")
    quantised = _require_scales(x, gate_up, down, shared, scales, format) if scales else ()
    for name, t in {"x": x, **tensors}.items():
        if t is None:
            continue
        if name not in ("x", "residual", *quantised) and t.dtype != x.dtype:
            both = " and ".join(str(d).removeprefix("torch.") for d in (x.dtype, t.dtype))
            raise Refused(f"x and {name} must have one dtype, found {both}.")
        if t.shape[-1] > 1 and (not isinstance(t.stride(-1), int) or t.stride(-1) != 1):
            raise Refused(f"{name} must have contiguous rows, found the strides {list(t.stride())}.")
        if name not in ("x", "residual"):
            require_static(**{f"{name}'s size {i}": n for i, n in enumerate(t.shape)})
    if len({t is None for t in shared[:3]}) > 1 or shared.down is None and shared.expert_gate is not None:
        raise Refused("A shared expert must have gate, up and down, found only some of them.")
    (E, _, H), I, S, N = gate_up.shape, down.shape[2], shared.width, x.shape[0]
    wanted = {"x": (N, H), "down": (E, H, I), "gate_up": (E, 2 * I, H), "residual": (N, H)}
    wanted |= {"shared_gate": (S, H), "shared_up": (S, H), "shared_down": (H, S), "shared_expert_gate": (1, H)}
    for name, t in {"x": x, **tensors}.items():
        if t is not None:
            require_sizes(name, wanted[name], tuple(t.shape))
    if activation not in ACTIVATIONS:
        raise Refused(f"activation must be one of {', '.join(ACTIVATIONS)}, found {activation}.")
    if not 1 <= k <= MAX_TOP_K or E > MAX_EXPERTS:
        raise Refused(f"A row must go to 1 to {MAX_TOP_K} of at most {MAX_EXPERTS} experts, found {k} of {E}.")
    route.require_rows(x)
    one, few = isinstance(N, int) and N == 1, not isinstance(N, int) or N <= MAX_ROWS
    if not one:
        if norm_weight is not None:
            raise Refused("Several rows take no norm before their experts, found one.")
        config_of_rows(UP_ROWS, gate_up.dtype, H)
        config_of_rows(DOWN_ROWS, gate_up.dtype, *(n for n in (I, S) if n))
    if few:
        if H > skinny_linear.MAX_N:
            raise Refused(f"One row must be at most {skinny_linear.MAX_N} wide, found {H}.")
        config_of_down(k, I, S, gate_up.dtype)


def _require_scales(x, gate_up, down, shared, scales, format) -> tuple[str, ...]:
    """Refuse quantised experts that kernels cannot read. Returns the names of the quantised weights."""
    weights = {"gate_up": gate_up, "down": down}
    if shared.down is not None:
        weights |= {"shared_gate": shared.gate, "shared_up": shared.up, "shared_down": shared.down}
    if len(scales) != len(weights):
        raise Refused("Experts and the shared one must be quantised in the same way, found others.")
    if not quantized.stored(format).columns or quantized.stored(format).rows == 1:
        raise Refused(f"Kernels read experts whose scales are of blocks, found {formats.named(format).about}.")
    for (name, w), scale in zip(weights.items(), scales, strict=True):
        quantized.require(w, scale, format)
        if not scale.is_contiguous():
            raise Refused(f"Scales of {name} must be contiguous, found the strides {list(scale.stride())}.")
    tile, _, _, *_ = config_of_up(gate_up.shape[2], gate_up.dtype)
    if down.shape[2] % tile:
        raise Refused(f"Quantised experts must have a multiple of {tile} columns between their products, found {down.shape[2]}.")
    return tuple(weights)


def require_sizes(name: str, wanted: tuple[Any, ...], found: tuple[Any, ...]) -> None:
    """Refuse sizes other than those wanted. Symbolic ones are compared when the kernel is called, which adds no guard."""
    differ = (isinstance(m, int) and isinstance(n, int) and m != n for m, n in zip(wanted, found, strict=False))
    if len(wanted) != len(found) or any(differ):
        raise Refused(f"{name} must have the sizes {list(wanted)}, found {list(found)}.")


MEASURED = "benchmarks/experts.py --sweep"
EARLY = ("norm_weight", "shared_gate", "shared_up")
experts = register("experts", launch, supports, early=EARLY, measured=MEASURED)
routed_experts = register("routed_experts", launch_routed, supports_routed, early=("router", *EARLY), measured=MEASURED)
