"""Attention of 2 to 8 queries per sequence, and the kernel that combines the splits of any kernel of attention.

    tile      softmax(q·Kᵀ·scale)·V over some of the blocks of keys, for the queries that share a key head,
              which are the rows of tiles on tensor cores                         programs per key head's tiles × SPLITS
    combine   the splits' sums rescaled to one maximum, times σ(gate);
              not launched if SPLITS is 1                                         programs per head and some of its columns

Splits follow Flash-Decoding (Dao et al. 2023). Each row has its own mask. A block that no row may see is not read. Nothing is
compiled for one length: there are as many programs per key head for short keys as for the longest.

Layout: q [B, H, T, D], gate [B, T, H, D], keys and values [B, HKV, L, D], mask [B or 1, 1, T, L], all with any strides. Products
in half precision use its operands, with softmax weights rounded to it. Sums are float32. If nothing may be seen, the output is
zero.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gdnfuse import compat
from gdnfuse.errors import Refused
from gdnfuse.kernels.few_rows_linear import OPERANDS
from gdnfuse.kernels.launch.implementation import kernel_of, overlap_options, require_static

gdc_launch_dependents, gdc_wait = compat.dependent_launch()

MOST_QUERIES = 8
# The most rows of a tile, keys at once, the most splits, the most programs, and warps. Not measured. There are too few rows for
# wgmma, for which Triton 3.6 computes some operands wrong if loads in a loop are not pipelined.
ROWS, BLOCK, SPLITS, PROGRAMS, NUM_WARPS = 32, 32, 32, 512, 4
COMBINED, COMBINE_WARPS = 2048, 2  # how many sums a program of combine adds up, and its warps


@triton.jit(do_not_specialize=["L", "stride_mb", "stride_mt"])
def attention_tile_kernel(
    q_ptr, keys_ptr, values_ptr, mask_ptr, gate_ptr, sums_ptr, largest_ptr, total_ptr, out_ptr, scale, L,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_gb, stride_gt, stride_gh, stride_gd,
    stride_yb, stride_yh, stride_yl, stride_yd, stride_ub, stride_uh, stride_ul, stride_ud, stride_mb, stride_mt, stride_ml,
    T: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BD: tl.constexpr, BL: tl.constexpr, SPLITS: tl.constexpr, OPERAND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    pair, split = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(1)
    batch, h = pair // HKV, pair % HKV
    row = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)  # [ROWS]
    head, t, live = h * G + row // T, row % T, row < G * T
    d = tl.arange(0, BD)  # [BD]
    n = tl.arange(0, BL)  # [BL]
    keys_ptr += batch * stride_yb + h * stride_yh
    values_ptr += batch * stride_ub + h * stride_uh
    whole = live[:, None] & (d < D)[None, :]  # [ROWS, BD]
    if OVERLAP:
        gdc_wait()
    q_ptrs = q_ptr + batch * stride_qb + head[:, None] * stride_qh + t[:, None] * stride_qt + d[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=whole, other=0.0).to(OPERAND)  # [ROWS, BD]
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BD), tl.float32)

    for block in range(split, tl.cdiv(L, BL), SPLITS):
        at = (block * BL + n).to(tl.int64)  # [BL]
        seen = live[:, None] & (at < L)[None, :]  # [ROWS, BL]
        if mask_ptr is not None:
            ptrs = mask_ptr + batch * stride_mb + t[:, None] * stride_mt + at[None, :] * stride_ml
            seen = tl.load(ptrs, mask=seen, other=0).to(tl.int32) > 0
        some = tl.max(seen.to(tl.int32), 0)  # [BL]
        if tl.max(some, 0) > 0:
            there = (at < L)[:, None] & (d < D)[None, :]
            k = tl.load(keys_ptr + at[:, None] * stride_yl + d[None, :] * stride_yd, mask=there, other=0.0)  # [BL, BD]
            v = tl.load(values_ptr + at[:, None] * stride_ul + d[None, :] * stride_ud, mask=there, other=0.0)
            # Hidden values may be NaN.
            v = tl.where((some > 0)[:, None], v, 0.0).to(OPERAND)
            scores = tl.dot(q, tl.trans(k.to(OPERAND)), input_precision="ieee") * tl.cast(scale, tl.float32)  # [ROWS, BL]
            scores = tl.where(seen, scores, float("-inf"))
            new = tl.maximum(largest, tl.max(scores, 1))
            # If nothing was seen so far, everything is −∞, and exp(−∞ − −∞) would be NaN.
            base = tl.where(new == float("-inf"), 0.0, new)
            weight, keep = tl.exp(scores - base[:, None]), tl.exp(largest - base)  # [ROWS, BL], [ROWS]
            total = total * keep + tl.sum(weight, 1)
            acc = acc * keep[:, None] + tl.dot(weight.to(OPERAND), v, input_precision="ieee")
            largest = new

    at_row = (batch * T + t) * (HKV * G) + head  # [ROWS]
    if SPLITS == 1:
        o = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        if gate_ptr is not None:
            ptrs = gate_ptr + batch * stride_gb + t[:, None] * stride_gt + head[:, None] * stride_gh + d[None, :] * stride_gd
            o = o * tl.sigmoid(tl.load(ptrs, mask=whole, other=0.0).to(tl.float32))
        tl.store(out_ptr + at_row[:, None] * D + d[None, :], o.to(out_ptr.dtype.element_ty), mask=whole)
    else:
        at_row = at_row * SPLITS + split
        tl.store(sums_ptr + at_row[:, None] * D + d[None, :], acc, mask=whole)
        tl.store(largest_ptr + at_row, largest, mask=live)
        tl.store(total_ptr + at_row, total, mask=live)


@triton.jit
def attention_combine_kernel(
    sums_ptr, largest_ptr, total_ptr, gate_ptr, out_ptr, stride_gb, stride_gt, stride_gh, stride_gd,
    T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    batch, t, head = row // (T * H), row // H % T, row % H
    split = tl.arange(0, SPLITS)  # [SPLITS]
    d = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    live = d < D
    if OVERLAP:
        gdc_wait()
    largest = tl.load(largest_ptr + row * SPLITS + split)  # [SPLITS]
    total = tl.load(total_ptr + row * SPLITS + split)
    sums = tl.load(sums_ptr + (row * SPLITS + split)[:, None] * D + d[None, :], mask=live[None, :], other=0.0)  # [SPLITS, BD]
    top = tl.max(largest, 0)
    weight = tl.exp(largest - tl.where(top == float("-inf"), 0.0, top))  # [SPLITS]
    whole = tl.sum(weight * total, 0)
    o = tl.sum(sums * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)  # [BD]
    if gate_ptr is not None:
        gate_ptr += batch * stride_gb + t * stride_gt + head * stride_gh
        o = o * tl.sigmoid(tl.load(gate_ptr + d * stride_gd, mask=live, other=0.0).to(tl.float32))
    tl.store(out_ptr + row * D + d, o.to(out_ptr.dtype.element_ty), mask=live)


def attend_tiles(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    gate: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    overlap: bool,
) -> torch.Tensor:
    """Attention with 2 to 8 queries per sequence, its output times σ(gate).

    Args:
        q: [B, H, T, D], any strides.
        keys, values: [B, HKV, L, D], any strides.
        gate: [B, T, H, D] or None.
        mask: [B or 1, 1, T, L] of bool or None.
        scale: factor on the scores.
        overlap: whether both kernels may start while the kernel before them runs.

    Returns:
        [B, T, H·D] in q's dtype.

    Raises:
        ValueError: keys, values and mask are not of one length.
    """
    B, H, T, D = q.shape
    HKV, L = keys.shape[1:3]
    if values.shape != keys.shape or mask is not None and mask.shape[2:] != (T, L):
        found = f"{list(keys.shape)}, {list(values.shape)} and {None if mask is None else list(mask.shape)}"
        raise ValueError(f"Keys, values and mask must be of one length, found {found}.")
    G = H // HKV
    rows = min(ROWS, max(16, triton.next_power_of_2(G * T)))
    tiles, splits = -(-G * T // rows), SPLITS
    while splits > 1 and splits * B * HKV * tiles > PROGRAMS:
        splits //= 2
    empty = lambda *shape: torch.empty(shape, dtype=torch.float32, device=q.device)  # noqa: E731
    sums = largest = total = None
    if splits > 1:
        sums, largest, total = empty(B, T, H, splits, D), empty(B, T, H, splits), empty(B, T, H, splits)
    out = torch.empty((B, T, H * D), dtype=q.dtype, device=q.device)
    options = overlap_options(q) if overlap else {}
    early = {"OVERLAP": bool(options), **options}
    kernel_of(attention_tile_kernel)[(B * HKV * tiles, splits)](
        q, keys, values, mask, gate, sums, largest, total, out, scale, L,
        *strides(q, 0, 1, 2, 3), *strides(gate, 0, 1, 2, 3), *keys.stride(), *values.stride(), *strides(mask, 0, 2, 3),
        T=T, HKV=HKV, G=G, TILES=tiles, D=D, ROWS=rows, BD=max(16, triton.next_power_of_2(D)), BL=BLOCK,
        SPLITS=splits, OPERAND=OPERANDS[q.dtype], num_warps=NUM_WARPS, **early,
    )  # fmt: skip
    if splits > 1:
        combine(sums, largest, total, gate, out, early)
    return out


def strides(t: torch.Tensor | None, *axes: int) -> list[int]:
    """The strides of these axes of a tensor. Zero for an axis that all sequences share, or if the tensor is absent."""
    return [0 if t is None or i == 0 and t.shape[0] == 1 else t.stride(i) for i in axes]


def combine(
    sums: torch.Tensor,
    largest: torch.Tensor,
    total: torch.Tensor,
    gate: torch.Tensor | None,
    out: torch.Tensor,
    early: dict[str, Any],
) -> None:
    """Combine the splits' sums [B, T, H, SPLITS, D], largest scores and totals [B, T, H, SPLITS] into `out` [B, T, H·D]."""
    B, T, H, splits, D = sums.shape
    columns = min(triton.next_power_of_2(D), max(COMBINED // splits, 1))
    kernel_of(attention_combine_kernel)[(B * T * H, -(-D // columns))](
        sums, largest, total, gate, out, *strides(gate, 0, 1, 2, 3),
        T=T, H=H, D=D, BD=columns, SPLITS=splits, num_warps=COMBINE_WARPS, **early,
    )  # fmt: skip


def require_few(T: Any) -> None:
    """Refuse more queries per sequence than these kernels support, or a number that is not known."""
    require_static(T=T)
    if T > MOST_QUERIES:
        raise Refused(f"T must be at most {MOST_QUERIES}, found {T}.")
