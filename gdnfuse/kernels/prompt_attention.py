"""Attention of a prompt where not all keys are its own: on a static cache, or in a left-padded batch.

softmax(q·Kᵀ·scale)·V by blocks of queries and of keys, with a running maximum and sum per row: FlashAttention-2 (Dao 2023,
arXiv:2307.08691). A query sees the keys up to its position that the mask of its sequence shows. So a program starts at the first
key that its sequence shows, and ends at the position of its last query. Only the blocks of keys at the end compare positions.
Nothing is compiled for one length.

torch's kernels take a causal flag or a mask. With a mask they write it to memory and read every block.

Layout: q [B, H, T, D], k and v [B, HKV, L, D] with any strides but contiguous rows, positions [T], mask [B or 1, L]; output
[B, H, T, D], in memory as [B, T, H, D]. Products in half precision use its operands, with softmax weights rounded to it. Sums are
float32. If nothing may be seen, the output is zero.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gdnfuse.dialect import causal_attention
from gdnfuse.errors import Refused
from gdnfuse.kernels import devices
from gdnfuse.kernels.devices import Device
from gdnfuse.kernels.few_rows_linear import OPERANDS
from gdnfuse.kernels.launch.implementation import (
    kernel_of,
    register,
    require_dtypes,
    require_head_dims,
    require_static,
)
from gdnfuse.rewrite.rule import shown

# Queries and keys per block, warps and stages, from the largest on, for heads of 256 columns; narrower heads take twice the keys.
# The first that fits the device's shared memory is taken. Not measured. With 64 keys of 256 columns registers spill on sm_90.
CONFIGS = ((128, 32, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2), (16, 16, 4, 1))
WIDE = 128  # columns of narrower heads
SCAN = 1024  # columns of a mask that are read at once to find the first that it shows


@triton.jit
def attend_blocks(
    acc, largest, total, q, k_ptr, v_ptr, mask_ptr, position, start, end, L, scale, stride_kl, stride_vl, stride_ml,
    D: tl.constexpr, BD: tl.constexpr, BL: tl.constexpr, OPERAND: tl.constexpr, CAUSAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the keys from start to end to the sums of a block of queries. Without CAUSAL every query is behind all of them."""
    n, d = tl.arange(0, BL), tl.arange(0, BD)  # [BL], [BD]
    for first in tl.range(start, end, BL, num_stages=STAGES):
        at = first + n  # [BL]
        k_ptrs = k_ptr + tl.cast(first, tl.int64) * stride_kl + (d[:, None] + n[None, :] * stride_kl)  # [BD, BL]
        v_ptrs = v_ptr + tl.cast(first, tl.int64) * stride_vl + (n[:, None] * stride_vl + d[None, :])  # [BL, BD]
        if D == BD and not CAUSAL:
            k, v = tl.load(k_ptrs), tl.load(v_ptrs)
        else:
            k = tl.load(k_ptrs, mask=(d < D)[:, None] & (at < L)[None, :], other=0.0)
            v = tl.load(v_ptrs, mask=(at < L)[:, None] & (d < D)[None, :], other=0.0)
        scores = tl.dot(q, k.to(OPERAND), input_precision="ieee") * scale  # [BT, BL]
        if CAUSAL:
            scores = tl.where((at[None, :] <= position[:, None]) & (at < L)[None, :], scores, float("-inf"))
        if mask_ptr is not None:
            shows = tl.load(mask_ptr + at * stride_ml, mask=at < L, other=0).to(tl.int32) > 0
            scores = tl.where(shows[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        # If nothing was seen so far, everything is −∞, and exp(−∞ − −∞) would be NaN.
        base = tl.where(new == float("-inf"), 0.0, new)
        weight, keep = tl.exp2(scores - base[:, None]), tl.exp2(largest - base)  # [BT, BL], [BT]
        total = total * keep + tl.sum(weight, 1)
        acc = tl.dot(weight.to(OPERAND), v.to(OPERAND), acc * keep[:, None], input_precision="ieee")
        largest = new
    return acc, largest, total


@triton.jit(do_not_specialize=["T", "L"])
def prompt_attention_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, mask_ptr, out_ptr, scale, T, L,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, stride_mb, stride_ml,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BL: tl.constexpr,
    SCAN: tl.constexpr, OPERAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The last queries see most keys, so their programs come first.
    pair, block = tl.program_id(0).to(tl.int64), tl.num_programs(1) - 1 - tl.program_id(1)
    batch, head = pair // H, pair % H
    row = block * BT + tl.arange(0, BT)  # [BT]
    d = tl.arange(0, BD)  # [BD]
    live = row < T
    q_ptrs = q_ptr + batch * stride_qb + head * stride_qh + row.to(tl.int64)[:, None] * stride_qt + d[None, :]
    q = tl.load(q_ptrs, mask=live[:, None] & (d < D)[None, :], other=0.0).to(OPERAND)  # [BT, BD]
    position = tl.load(positions_ptr + row, mask=live, other=-1).to(tl.int32)  # [BT]
    k_ptr += batch * stride_kb + head // G * stride_kh
    v_ptr += batch * stride_vb + head // G * stride_vh

    start = 0
    end = tl.minimum(tl.max(position, 0) + 1, L)  # behind the last key that a query sees
    if mask_ptr is not None:
        mask_ptr += batch * stride_mb
        column = tl.arange(0, SCAN)
        begin, hidden = 0, 1
        while (hidden > 0) & (begin < end):
            at = begin + column  # [SCAN]
            shows = tl.load(mask_ptr + at * stride_ml, mask=at < end, other=0).to(tl.int32) > 0
            start = tl.min(tl.where(shows, at, end), 0)
            hidden = (start == end).to(tl.int32)
            begin += SCAN
        start = start // BL * BL
    # Behind it some query of the block may not see a key.
    full = tl.minimum(tl.min(tl.where(live, position, L), 0) + 1, L) // BL * BL

    largest = tl.full((BT,), float("-inf"), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    acc = tl.zeros((BT, BD), tl.float32)
    factor = tl.cast(scale, tl.float32) * 1.4426950408889634  # log₂ e
    acc, largest, total = attend_blocks(
        acc, largest, total, q, k_ptr, v_ptr, mask_ptr, position, start, full, L, factor, stride_kl, stride_vl, stride_ml,
        D, BD, BL, OPERAND, False, STAGES,
    )  # fmt: skip
    acc, largest, total = attend_blocks(
        acc, largest, total, q, k_ptr, v_ptr, mask_ptr, position, tl.maximum(start, full), end, L, factor, stride_kl, stride_vl,
        stride_ml, D, BD, BL, OPERAND, True, STAGES,
    )  # fmt: skip
    o = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_ptrs = out_ptr + ((batch * T + row)[:, None] * H + head) * D + d[None, :]
    tl.store(out_ptrs, o.to(out_ptr.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The dialect's prompt_attention.

    Args:
        q, k, v, positions, mask, scale: as in the dialect; rows of q, k and v contiguous, or they are copied.

    Returns:
        [B, H, T, D] in q's dtype, in memory as [B, T, H, D].

    Raises:
        ValueError: keys, values, positions and mask do not fit.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    B, H, T, D = q.shape
    HKV, L = k.shape[1:3]
    if v.shape != k.shape or positions.shape != (T,) or mask is not None and mask.shape not in ((1, L), (B, L)):
        found = ", ".join(str(None if x is None else list(x.shape)) for x in (k, v, positions, mask))
        raise ValueError(f"Keys, values and mask must be of one length, and a position per query, found {found}.")
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    operand, BD = OPERANDS[q.dtype], max(16, triton.next_power_of_2(D))
    BT, BL, num_warps, stages = config(q.dtype, BD, devices.of(q.device))
    mask_strides = (0, 0) if mask is None else (0 if mask.shape[0] == 1 else mask.stride(0), mask.stride(1))
    kernel_of(prompt_attention_kernel)[(B * H, -(-T // BT))](
        q, k, v, positions, mask, out, scale, T, L, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask_strides,
        H=H, G=H // HKV, D=D, BD=BD, BT=BT, BL=BL, SCAN=SCAN, OPERAND=operand, STAGES=stages, num_warps=num_warps,
    )  # fmt: skip
    return out.transpose(1, 2)


def config(dtype: torch.dtype, BD: int, device: Device) -> tuple[int, int, int, int]:
    """Queries and keys per block, warps and stages: the most that fit the shared memory of a device."""
    found = [(BT, BL if BD > WIDE else 2 * BL, *rest) for BT, BL, *rest in CONFIGS]
    return next((c for c in found if shared_bytes(dtype, BD, *c) <= device.shared_memory), found[-1])


def shared_bytes(dtype: torch.dtype, BD: int, BT: int, BL: int, num_warps: int, stages: int) -> int:
    """The most bytes of shared memory per program: queries, softmax weights, and the keys and values of all stages."""
    return dtype.itemsize * (BT * BD + BT * BL + 2 * stages * BL * BD)


def supports(q: Any, k: Any, v: Any, positions: Any, mask: Any, scale: Any) -> None:
    """Raise Refused unless the kernel supports the arguments.

    Dtypes must be float32, bfloat16 or float16 and equal, heads static, H a multiple of HKV and D ≤ 256, positions [T] of int64
    and the mask [B or 1, L] of bool.
    """
    require_dtypes(q=q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        raise Refused(f"q, k and v must have one dtype, found {q.dtype}, {k.dtype} and {v.dtype}.")
    if not causal_attention.takes(q, k, v):
        found = ", ".join(shown(t.shape) for t in (q, k, v))
        raise Refused(f"Queries, keys and values must be of the same sequences and heads, found {found}.")
    require_static(H=q.shape[1], HKV=k.shape[1])
    require_head_dims(D=q.shape[-1])
    if positions.dtype != torch.int64 or positions.ndim != 1:
        raise Refused(f"Positions must be [T] of int64, found {shown(positions.shape)} of {positions.dtype}.")
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 2):
        raise Refused(f"The mask must be [B or 1, L] of bool, found {shown(mask.shape)} of {mask.dtype}.")
    BD, device = max(16, triton.next_power_of_2(q.shape[-1])), devices.of(q.device)
    devices.require_shared("Attention of a prompt", shared_bytes(q.dtype, BD, *config(q.dtype, BD, device)), device)


implementation = register("prompt_attention", launch, supports)
