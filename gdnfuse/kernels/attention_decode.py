"""One token of a full-attention layer on a static cache, between qkv and o_proj: three launches.

    prepare   q ← rope(norm(q)); keys[position] ← rope(norm(k)); values[position] ← v        one program per head
    split     softmax(q·Kᵀ·scale)·V over some of the cache's blocks                            programs per key head × SPLITS
    combine   the splits' sums rescaled to one maximum, times σ(gate)                           one program per head

Splitting the cache over programs and rescaling follows Flash-Decoding (Dao et al. 2023); the norm is RMSNorm, the rotary
embedding that of Su et al. (arXiv:2104.09864) on the first R columns, in halves. A split takes every SPLITS-th block of the cache
and looks at the mask first: blocks that no query may see are not read, so the time goes with what is filled, not allocated.
Split and combine are attention_one_query's too.

Layout: q, k, v, gate [B, 1, heads, D], keys and values [B, HKV, L, D], mask [B or 1, 1, 1, L], all of any strides. Scores, sums
and the rotation are float32; q and the new key are rounded once, to their dtype, as the cache stores them. Where nothing may be
seen the output is zero; where `position` is outside the cache nothing is written and the output is NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gdnfuse.kernels.implementation import (
    kernel_of,
    overlap_options,
    register,
    require_dtypes,
    require_head_dims,
    require_one_token,
    require_static,
)
from gdnfuse.report import Refused

# Positions of the cache up to: programs per key head. Positions per block, warps. Chosen on an H200 in the decode step of a 0.8B
# model with 200 and 3000 positions filled; no committed benchmark sweeps them.
SPLITS = ((2048, 16), (float("inf"), 32))
BLOCK, NUM_WARPS = 16, 8
AT_ONCE = 64  # blocks whose mask a program reads at once
OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}  # of products, by the dtype of q; otherwise float32
MIN_DOT = 16  # rows of the smallest product of tensor cores: groups of queries are padded to it


@triton.jit
def attention_prepare_kernel(
    q_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, position_ptr, out_ptr,
    norm_eps, norm_offset, L,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kd, stride_vb, stride_vh, stride_vd,
    stride_cb, stride_cd, stride_sb, stride_sd,
    stride_yb, stride_yh, stride_yl, stride_yd, stride_ub, stride_uh, stride_ul, stride_ud,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    batch = (tl.program_id(0) // (H + HKV)).to(tl.int64)
    head = tl.program_id(0) % (H + HKV)
    is_q = head < H
    d = tl.arange(0, BD)  # [BD]
    live = d < D
    # The column that each of the first R columns is turned with, and the sign it comes with.
    other = tl.where(d < R // 2, d + R // 2, d - R // 2)
    sign = tl.where(d < R // 2, -1.0, 1.0)
    turned = d < R
    if OVERLAP:
        gdc_wait()
    cos = tl.load(cos_ptr + batch * stride_cb + d * stride_cd, mask=turned, other=1.0).to(tl.float32)  # [BD]
    sin = tl.load(sin_ptr + batch * stride_sb + d * stride_sd, mask=turned, other=0.0).to(tl.float32)
    if is_q:
        row_ptr, stride = q_ptr + batch * stride_qb + head * stride_qh, stride_qd
    else:
        row_ptr, stride = k_ptr + batch * stride_kb + (head - H) * stride_kh, stride_kd
    x = tl.load(row_ptr + d * stride, mask=live, other=0.0).to(tl.float32)  # [BD]
    y = tl.load(row_ptr + other * stride, mask=turned, other=0.0).to(tl.float32)
    if q_norm_ptr is not None:
        if is_q:
            norm_ptr = q_norm_ptr
        else:
            norm_ptr = k_norm_ptr
        factor = tl.rsqrt(tl.sum(x * x, 0) / D + tl.cast(norm_eps, tl.float32))
        offset = tl.cast(norm_offset, tl.float32)
        x = x * factor * (offset + tl.load(norm_ptr + d, mask=live, other=0.0).to(tl.float32))
        y = y * factor * (offset + tl.load(norm_ptr + other, mask=turned, other=0.0).to(tl.float32))
    x = x * cos + sign * y * sin
    position = tl.load(position_ptr).to(tl.int64)
    inside = (position >= 0) & (position < L)
    if is_q:
        # A token behind the end of the cache has no place: torch stops the device there, this makes the step's output NaN.
        x = tl.where(inside, x, float("nan"))
        tl.store(out_ptr + (batch * H + head) * D + d, x.to(out_ptr.dtype.element_ty), mask=live)
    else:
        h = (head - H).to(tl.int64)
        v = tl.load(v_ptr + batch * stride_vb + h * stride_vh + d * stride_vd, mask=live, other=0.0)
        key_ptrs = keys_ptr + batch * stride_yb + h * stride_yh + position * stride_yl + d * stride_yd
        value_ptrs = values_ptr + batch * stride_ub + h * stride_uh + position * stride_ul + d * stride_ud
        tl.store(key_ptrs, x.to(keys_ptr.dtype.element_ty), mask=live & inside)
        tl.store(value_ptrs, v.to(values_ptr.dtype.element_ty), mask=live & inside)


# Nothing that grows with the keys makes another machine code: where heads are a multiple of 16 columns wide, so is each step from
# one head or sequence to the next, whatever the length.
@triton.jit(do_not_specialize=["L", "stride_mb"])
def attention_split_kernel(
    q_ptr, keys_ptr, values_ptr, mask_ptr, sums_ptr, largest_ptr, total_ptr,
    scale, L, stride_qb, stride_qh, stride_qd,
    stride_yb, stride_yh, stride_yl, stride_yd, stride_ub, stride_uh, stride_ul, stride_ud, stride_mb, stride_ml,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, BL: tl.constexpr,
    SPLITS: tl.constexpr, AT_ONCE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch, h = pair // HKV, pair % HKV
    g = tl.arange(0, BG)  # [BG]
    d = tl.arange(0, BD)  # [BD]
    n = tl.arange(0, BL)  # [BL]
    if OVERLAP:
        gdc_wait()
    # Which of this split's blocks anybody may see; those between the first and the last are read.
    blocks = tl.cdiv(tl.cdiv(L, BL) - split, SPLITS)
    first, last = 0, blocks
    if mask_ptr is not None:
        first, last = blocks, 0
        for start in range(0, blocks, AT_ONCE):
            block = start + tl.arange(0, AT_ONCE)  # [AT_ONCE]
            where = ((block * SPLITS + split)[:, None] * BL + n[None, :]).to(tl.int64)  # [AT_ONCE, BL]
            seen = tl.load(mask_ptr + batch * stride_mb + where * stride_ml, mask=where < L, other=0).to(tl.int32)
            some = tl.max(seen, 1) > 0  # [AT_ONCE]
            first = tl.minimum(first, tl.min(tl.where(some, block, blocks), 0))
            last = tl.maximum(last, tl.max(tl.where(some, block + 1, 0), 0))
    live_q = (g < G)[:, None] & (d < D)[None, :]
    q_ptrs = q_ptr + batch * stride_qb + (h * G + g)[:, None] * stride_qh + d[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=live_q, other=0.0).to(OPERAND)  # [BG, BD]
    largest = tl.full((BG,), float("-inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    acc = tl.zeros((BG, BD), tl.float32)
    for i in range(first, last):
        at = ((i * SPLITS + split) * BL + n).to(tl.int64)  # [BL]
        live = at < L
        inside = live[:, None] & (d < D)[None, :]
        key_ptrs = keys_ptr + batch * stride_yb + h * stride_yh + at[:, None] * stride_yl + d[None, :] * stride_yd
        value_ptrs = values_ptr + batch * stride_ub + h * stride_uh + at[:, None] * stride_ul + d[None, :] * stride_ud
        k = tl.load(key_ptrs, mask=inside, other=0.0)  # [BL, BD]
        v = tl.load(value_ptrs, mask=inside, other=0.0)  # [BL, BD]
        if mask_ptr is not None:
            live = live & (tl.load(mask_ptr + batch * stride_mb + at * stride_ml, mask=live, other=0).to(tl.int32) > 0)
        scores = tl.dot(q, tl.trans(k.to(OPERAND)), input_precision=PRECISION) * tl.cast(scale, tl.float32)  # [BG, BL]
        scores = tl.where(live[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))  # [BG]
        # Where nothing was seen so far all is −∞, and exp(−∞ − −∞) no number.
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp(scores - base[:, None])  # [BG, BL]
        keep = tl.exp(largest - base)
        acc = acc * keep[:, None] + tl.dot(weight.to(OPERAND), v.to(OPERAND), input_precision=PRECISION)
        total = total * keep + tl.sum(weight, 1)
        largest = new
    row = (pair * G + g) * SPLITS + split  # [BG]
    tl.store(sums_ptr + row[:, None] * D + d[None, :], acc, mask=live_q)
    tl.store(largest_ptr + row, largest, mask=g < G)
    tl.store(total_ptr + row, total, mask=g < G)


@triton.jit
def attention_combine_kernel(
    sums_ptr, largest_ptr, total_ptr, gate_ptr, out_ptr, stride_gb, stride_gh, stride_gd,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // H, row % H
    split = tl.arange(0, SPLITS)  # [SPLITS]
    d = tl.arange(0, BD)  # [BD]
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
        gate = tl.load(gate_ptr + batch * stride_gb + head * stride_gh + d * stride_gd, mask=live, other=0.0).to(tl.float32)
        o = o * tl.sigmoid(gate)
    tl.store(out_ptr + row * D + d, o.to(out_ptr.dtype.element_ty), mask=live)


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor | None,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    norm_eps: float,
    norm_offset: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The dialect's attention_decode.

    Args:
        q, k, v, gate, q_norm_weight, k_norm_weight, norm_eps, norm_offset, cos, sin, position, mask, scale: as there.
        keys, values: [B, HKV, L, D], any strides; written in place.
        overlap: whether each of the three may start while the kernel before it runs.

    Returns:
        [B, 1, H·D] in q's dtype.
    """
    B, _, H, D = q.shape
    HKV, L = keys.shape[1:3]
    R, BD = cos.shape[-1], triton.next_power_of_2(D)
    splits = min(next(n for length, n in SPLITS if L <= length), triton.next_power_of_2(-(-L // BLOCK)))
    turned = torch.empty((B, H, 1, D), dtype=q.dtype, device=q.device)
    norms = [None if w is None else w.contiguous() for w in (q_norm_weight, k_norm_weight)]
    strides = lambda t, axes: [t.stride(i) for i in axes]  # noqa: E731
    at_batch = [0 if t.shape[0] == 1 else t.stride(0) for t in (cos, sin)]
    kernel_of(attention_prepare_kernel)[(B * (H + HKV),)](
        q, k, v, *norms, cos, sin, keys, values, position, turned, norm_eps, norm_offset, L,
        *(s for t in (q, k, v) for s in strides(t, (0, 2, 3))),
        at_batch[0], cos.stride(2), at_batch[1], sin.stride(2), *keys.stride(), *values.stride(),
        H=H, HKV=HKV, D=D, R=R, BD=BD, num_warps=1, **_early(q, overlap),
    )  # fmt: skip
    return attend(turned, keys, values, gate, mask, scale, splits, overlap)


def _early(q: torch.Tensor, overlap: bool) -> dict[str, Any]:
    options = overlap_options(q) if overlap else {}
    return {"OVERLAP": bool(options), **options}


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    gate: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    splits: int,
    overlap: bool,
) -> torch.Tensor:
    """Attention with one query per sequence, its output times σ(gate): the last two launches.

    Args:
        q: [B, H, 1, D], any strides.
        keys, values: [B, HKV, L, D], any strides.
        gate: [B, 1, H, D] or None.
        mask: [B or 1, 1, 1, L] of bool or None.
        scale: factor on the scores.
        splits: programs per key head, a power of two.
        overlap: whether both may start while the kernel before them runs.

    Returns:
        [B, 1, H·D] in q's dtype.

    Raises:
        ValueError: keys, values and mask are not of one length.
    """
    B, H, _, D = q.shape
    HKV, L = keys.shape[1:3]
    if values.shape != keys.shape or mask is not None and mask.shape[3] != L:
        found = f"{list(keys.shape)}, {list(values.shape)} and {None if mask is None else list(mask.shape)}"
        raise ValueError(f"Keys, values and mask must be of one length, got {found}.")
    groups, BD = H // HKV, triton.next_power_of_2(D)
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=q.device)  # noqa: E731
    sums, largest, total = new(B, H, splits, D), new(B, H, splits), new(B, H, splits)
    out = new(B, 1, H * D, dtype=q.dtype)
    kernel_of(attention_split_kernel)[(B * HKV, splits)](
        q, keys, values, mask, sums, largest, total, scale, L,
        q.stride(0), q.stride(1), q.stride(3), *keys.stride(), *values.stride(),
        0 if mask is None or mask.shape[0] == 1 else mask.stride(0), 0 if mask is None else mask.stride(3),
        HKV=HKV, G=groups, D=D, BG=max(MIN_DOT, triton.next_power_of_2(groups)), BD=max(BD, MIN_DOT), BL=BLOCK, SPLITS=splits,
        AT_ONCE=AT_ONCE, OPERAND=OPERANDS.get(q.dtype, tl.float32), PRECISION="ieee", num_warps=NUM_WARPS, **_early(q, overlap),
    )  # fmt: skip
    kernel_of(attention_combine_kernel)[(B * H,)](
        sums, largest, total, gate, out, *((0, 0, 0) if gate is None else (gate.stride(i) for i in (0, 2, 3))),
        H=H, D=D, BD=BD, SPLITS=splits, num_warps=2, **_early(q, overlap),
    )  # fmt: skip
    return out


def require_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, gate: torch.Tensor | None) -> None:
    """Refuse what `attend` cannot take."""
    require_dtypes(q=q, keys=keys, values=values, gate=gate)
    require_one_token(q.shape[2])
    H, HKV = q.shape[1], keys.shape[1]
    require_static(H=H, HKV=HKV)
    require_head_dims(D=q.shape[3])
    if H % HKV:
        raise Refused(f"H must be a multiple of HKV, got H = {H} and HKV = {HKV}.")
    if not q.dtype == keys.dtype == values.dtype:
        raise Refused(f"q, keys and values must have one dtype, got {q.dtype}, {keys.dtype} and {values.dtype}.")


def supports(
    q, k, v, gate, q_norm_weight, k_norm_weight, norm_eps, norm_offset, cos, sin, keys, values, position, mask, scale
) -> None:  # fmt: skip
    """Raises Refused unless dtypes are float32, bfloat16 or float16, heads and the cache's length static, D ≤ 256 and R even."""
    require_dtypes(q=q, k=k, v=v, q_norm_weight=q_norm_weight, cos=cos, sin=sin)
    require_static(L=keys.shape[2], R=cos.shape[-1])
    require_attention(q.transpose(1, 2), keys, values, gate)
    if cos.shape[-1] % 2:
        raise Refused(f"R must be even, got {cos.shape[-1]}.")
    if not q.dtype == k.dtype == v.dtype:
        raise Refused(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")


implementation = register("attention_decode", launch, supports, mutates=("keys", "values"))
