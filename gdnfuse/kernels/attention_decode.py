"""1 to 8 tokens of a full-attention layer on a static cache, between qkv and o_proj: one to three launches.

One token:

    split     q ← rope(norm(q)); keys[position] ← rope(norm(k)); values[position] ← v;
              softmax(q·Kᵀ·scale)·V over some of the cache's blocks  programs per up to four queries of a key head × SPLITS
    combine   the splits' sums rescaled to one maximum, times σ(gate);
              not launched if SPLITS is 1                            programs per head and some of its columns

Several tokens:

    turn      q' ← rope(norm(q)); keys[position] ← rope(norm(k)); values[position] ← v
                                                                     programs per token and head of queries and of keys
              then the kernels of attention_tile.py with q', and the combining kernel, which is there too

Splitting the cache over programs and rescaling follows Flash-Decoding (Dao et al. 2023). The norm is RMSNorm. The rotary
embedding is that of Su et al. (arXiv:2104.09864) on the first R columns, in halves.

A program of split is one warp, which at usual sizes needs no barrier. Its registers have room for the first keys and values,
which are read while the kernels before this one still run. Every program computes its own queries. The new key and value come
from registers, in the last split, which alone writes them to the cache. So no program uses what another one writes.

A split takes every SPLITS-th block of the cache, and always its first. If it has more than one, it looks at the mask and skips
blocks at both ends that the query may not see. So the time depends on what is filled and not on what is allocated.
attention_few_queries and attention_growing use both kernels too. In the latter, the programs of the first queries of a key head
also copy what they read.

Layout: q, k, v, gate [B, T, heads, D], keys and values [B, HKV, L, D], mask [B or 1, 1, T, L], or L + 1 if keys grow, all with
any strides. Products, sums and the rotation are float32. q and the new key are rounded once, to their dtype, as the cache stores
them. If nothing may be seen, the output is zero. If a token's `position` is outside the
cache, nothing is written and its output is NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gdnfuse import compat
from gdnfuse.errors import Refused
from gdnfuse.kernels.attention_tile import attend_tiles, combine, require_few, strides
from gdnfuse.kernels.launch.implementation import (
    kernel_of,
    overlap_options,
    register,
    require_dtypes,
    require_head_dims,
    require_static,
)

gdc_launch_dependents, gdc_wait = compat.dependent_launch()

# The most splits on growing keys and on a static cache, and the most programs. Chosen on an H200 with 200 to 32000 filled
# positions. benchmarks/attention.py --sweep compares the splits of a static cache. No committed benchmark compares the others.
GROWING_SPLITS, STATIC_SPLITS, PROGRAMS = 128, 256, 1024
QUERIES, BLOCK = 4, 4  # queries of one key head, and keys that a program has at once; half as many keys in float32
AT_ONCE = 64  # blocks whose mask a program reads at once
GROWS = {"keys": 2, "values": 2, "mask": 3}  # the axes that grow with the keys


@triton.jit
def _norm_and_turn(
    row_ptr, stride_d, there, norm_ptr, norm_eps, norm_offset, cos, sin, D: tl.constexpr, ROTARY: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """A row of a head, with norm and rotary embedding: [BD] in float32."""
    d = tl.arange(0, BD)  # [BD]
    # The column that each of the first ROTARY columns is rotated with, and its sign.
    other = tl.where(d < ROTARY // 2, d + ROTARY // 2, d - ROTARY // 2)
    if ROTARY % 16 == 0:
        other = tl.max_contiguous(tl.multiple_of(other, 8), 8)
    sign = tl.where(d < ROTARY // 2, -1.0, 1.0)
    x = tl.load(row_ptr + d * stride_d, mask=there & (d < D), other=0.0).to(tl.float32)
    y = tl.load(row_ptr + other * stride_d, mask=there & (d < ROTARY), other=0.0).to(tl.float32)
    if norm_ptr is not None:
        factor = tl.rsqrt(tl.sum(x * x, 0) / D + tl.cast(norm_eps, tl.float32))
        offset = tl.cast(norm_offset, tl.float32)
        x = x * factor * (offset + tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32))
        y = y * factor * (offset + tl.load(norm_ptr + other, mask=d < ROTARY, other=0.0).to(tl.float32))
    return x * cos + sign * y * sin


@triton.jit
def _load_block(
    keys_ptr, values_ptr, at, end, stride_yl, stride_yd, stride_ul, stride_ud, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Keys and values at these positions before `end`: [BL, BD] each."""
    d = tl.arange(0, BD)  # [BD]
    there = (at < end)[:, None] & (d < D)[None, :]
    k = tl.load(keys_ptr + at[:, None] * stride_yl + d[None, :] * stride_yd, mask=there, other=0.0)
    v = tl.load(values_ptr + at[:, None] * stride_ul + d[None, :] * stride_ud, mask=there, other=0.0)
    return k, v


# Growing keys need no other machine code. If heads are a multiple of 16 columns wide, so are the strides between heads and
# sequences, at any length.
@triton.jit(do_not_specialize=["L", "stride_mb"])
def attention_split_kernel(
    q_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, position_ptr, mask_ptr, gate_ptr,
    longer_keys_ptr, longer_values_ptr, sums_ptr, largest_ptr, total_ptr, out_ptr,
    norm_eps, norm_offset, scale, L,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kd, stride_vb, stride_vh, stride_vd,
    stride_cb, stride_cd, stride_sb, stride_sd, stride_gb, stride_gh, stride_gd,
    stride_yb, stride_yh, stride_yl, stride_yd, stride_ub, stride_uh, stride_ul, stride_ud, stride_mb, stride_ml,
    HKV: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr,
    BD: tl.constexpr, BL: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    pair = (tl.program_id(0) // GROUPS).to(tl.int64)
    first = tl.program_id(0) % GROUPS * QUERIES  # the first of the G queries of a key head
    split = tl.program_id(1)
    batch, h = pair // HKV, pair % HKV
    d = tl.arange(0, BD)  # [BD]
    n = tl.arange(0, BL)  # [BL]
    keys_ptr += batch * stride_yb + h * stride_yh
    values_ptr += batch * stride_ub + h * stride_uh
    if mask_ptr is not None:
        mask_ptr += batch * stride_mb
    if longer_keys_ptr is not None:  # [B, HKV, L + 1, D]
        longer_keys_ptr += pair * (L + 1) * D
        longer_values_ptr += pair * (L + 1) * D
    # The old content of a cache may be read before this step's query is ready.
    if OVERLAP and k_ptr is None:
        gdc_wait()
    at = (split * BL + n).to(tl.int64)  # [BL]
    k, v = _load_block(keys_ptr, values_ptr, at, L, stride_yl, stride_yd, stride_ul, stride_ud, D, BD)
    # Nothing is written before this: newly allocated memory may still be read by a kernel before this one.
    if OVERLAP and k_ptr is not None:
        gdc_wait()

    # Which blocks of this split any query may see. Those from the first to the last are read, or all if they are copied.
    blocks = tl.cdiv(tl.cdiv(L, BL) - split, SPLITS)
    start, last = blocks * 0, blocks
    if mask_ptr is not None and longer_keys_ptr is None:
        if blocks > 1:
            start, last = blocks, blocks * 0
            for turn in range(0, blocks, AT_ONCE):
                block = turn + tl.arange(0, AT_ONCE)  # [AT_ONCE]
                where = ((block * SPLITS + split)[:, None] * BL + n[None, :]).to(tl.int64)  # [AT_ONCE, BL]
                seen = tl.load(mask_ptr + where * stride_ml, mask=where < L, other=0).to(tl.int32)
                some = tl.max(seen, 1) > 0  # [AT_ONCE]
                start = tl.minimum(start, tl.min(tl.where(some, block, blocks), 0))
                last = tl.maximum(last, tl.max(tl.where(some, block + 1, 0), 0))
            if start > 0:
                at += start.to(tl.int64) * (SPLITS * BL)
                k, v = _load_block(keys_ptr, values_ptr, at, L, stride_yl, stride_yd, stride_ul, stride_ud, D, BD)

    position = tl.full((), -1, tl.int64)
    none = tl.full((), float("-inf"), tl.float32)
    q, largest, total, acc = (), (), (), ()
    if k_ptr is None:
        for g in tl.static_range(QUERIES):
            q_ptrs = q_ptr + batch * stride_qb + (h * G + first + g) * stride_qh + d * stride_qd  # [BD]
            q = q + (tl.load(q_ptrs, mask=(first + g < G) & (d < D), other=0.0).to(tl.float32),)
            largest, total = largest + (none,), total + (tl.full((), 0.0, tl.float32),)
            acc = acc + (tl.zeros((BD,), tl.float32),)
    else:
        turned = d < ROTARY
        cos = tl.load(cos_ptr + batch * stride_cb + d * stride_cd, mask=turned, other=1.0).to(tl.float32)  # [BD]
        sin = tl.load(sin_ptr + batch * stride_sb + d * stride_sd, mask=turned, other=0.0).to(tl.float32)
        if position_ptr is None:
            position = tl.cast(L, tl.int64)
            inside = tl.full((), True, tl.int1)
        else:
            position = tl.load(position_ptr).to(tl.int64)
            inside = (position >= 0) & (position < L)
        k_row = k_ptr + batch * stride_kb + h * stride_kh
        k_new = _norm_and_turn(k_row, stride_kd, True, k_norm_ptr, norm_eps, norm_offset, cos, sin, D, ROTARY, BD)
        k_new = k_new.to(keys_ptr.dtype.element_ty)  # [BD]
        v_new = tl.load(v_ptr + batch * stride_vb + h * stride_vh + d * stride_vd, mask=d < D, other=0.0)  # [BD]
        v_new = v_new.to(values_ptr.dtype.element_ty)
        mine = inside & (split == SPLITS - 1)
        written = mine & (first == 0) & (d < D)
        if longer_keys_ptr is None:
            tl.store(keys_ptr + position * stride_yl + d * stride_yd, k_new, mask=written)
            tl.store(values_ptr + position * stride_ul + d * stride_ud, v_new, mask=written)
        else:
            tl.store(longer_keys_ptr + position * D + d, k_new, mask=written)
            tl.store(longer_values_ptr + position * D + d, v_new, mask=written)
        if mask_ptr is not None:
            mine = mine & (tl.load(mask_ptr + position * stride_ml, mask=inside, other=0).to(tl.int32) > 0)
        for g in tl.static_range(QUERIES):
            q_row, there = q_ptr + batch * stride_qb + (h * G + first + g) * stride_qh, first + g < G
            x = _norm_and_turn(q_row, stride_qd, there, q_norm_ptr, norm_eps, norm_offset, cos, sin, D, ROTARY, BD)
            x = x.to(q_ptr.dtype.element_ty).to(tl.float32)  # [BD]
            score = tl.sum(x * k_new.to(tl.float32), 0) * tl.cast(scale, tl.float32)
            # A token after the end of the cache has no place. torch would stop the device. Here the step's output is NaN.
            largest = largest + (tl.where(inside, tl.where(mine, score, none), 0.0),)
            total = total + (tl.where(mine | ~inside, 1.0, 0.0),)
            acc = acc + (tl.where(inside, tl.where(mine, v_new.to(tl.float32), 0.0), float("nan")),)
            q = q + (x,)

    for i in range(start, last):
        live = at < L  # [BL]
        if mask_ptr is not None:
            live = live & (tl.load(mask_ptr + at * stride_ml, mask=live, other=0).to(tl.int32) > 0)
        live = live & (at != position)
        # Hidden values may be NaN, for example in memory that another program writes.
        key, value = k.to(tl.float32), tl.where(live[:, None], v, 0.0).to(tl.float32)  # [BL, BD]
        old_k, old_v, place = k, v, at
        at += SPLITS * BL
        k, v = _load_block(
            keys_ptr, values_ptr, at, tl.where(i + 1 < last, L, 0), stride_yl, stride_yd, stride_ul, stride_ud, D, BD
        )
        if longer_keys_ptr is not None:  # after the loads of the next block, so that no store delays them
            copied = (place < L)[:, None] & (d < D)[None, :] & (first == 0)
            tl.store(longer_keys_ptr + place[:, None] * D + d[None, :], old_k, mask=copied)
            tl.store(longer_values_ptr + place[:, None] * D + d[None, :], old_v, mask=copied)
        larger, more, added = (), (), ()
        for g in tl.static_range(QUERIES):
            scores = tl.where(live, tl.sum(key * q[g][None, :], 1) * tl.cast(scale, tl.float32), float("-inf"))  # [BL]
            new = tl.maximum(largest[g], tl.max(scores, 0))
            # If nothing was seen so far, everything is −∞, and exp(−∞ − −∞) would be NaN.
            base = tl.where(new == float("-inf"), 0.0, new)
            weight, keep = tl.exp(scores - base), tl.exp(largest[g] - base)  # [BL], one
            larger, more = larger + (new,), more + (total[g] * keep + tl.sum(weight, 0),)
            added = added + (acc[g] * keep + tl.sum(weight[:, None] * value, 0),)  # [BD]
        largest, total, acc = larger, more, added

    for g in tl.static_range(QUERIES):
        head, live = pair * G + first + g, (first + g < G) & (d < D)
        if SPLITS == 1:
            o = acc[g] / tl.where(total[g] == 0.0, 1.0, total[g])  # [BD]
            if gate_ptr is not None:
                gate_ptrs = gate_ptr + batch * stride_gb + (h * G + first + g) * stride_gh + d * stride_gd  # [BD]
                o = o * tl.sigmoid(tl.load(gate_ptrs, mask=live, other=0.0).to(tl.float32))
            tl.store(out_ptr + head * D + d, o.to(out_ptr.dtype.element_ty), mask=live)
        else:
            row = head * SPLITS + split
            tl.store(sums_ptr + row * D + d, acc[g], mask=live)
            if first + g < G:
                tl.store(largest_ptr + row, largest[g])
                tl.store(total_ptr + row, total[g])


@triton.jit
def attention_turn_kernel(
    q_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, position_ptr, keys_ptr, values_ptr, out_ptr,
    norm_eps, norm_offset, L,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_cb, stride_ct, stride_cd, stride_sb, stride_st, stride_sd, stride_p,
    stride_yb, stride_yh, stride_yl, stride_yd, stride_ub, stride_uh, stride_ul, stride_ud,
    T: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, BD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    token, head = (tl.program_id(0) // (H + HKV)).to(tl.int64), tl.program_id(0) % (H + HKV)
    batch, t = token // T, token % T
    d = tl.arange(0, BD)  # [BD]
    turned = d < ROTARY
    # Nothing is written before this: newly allocated memory may still be read by a kernel before this one.
    if OVERLAP:
        gdc_wait()
    cos = tl.load(cos_ptr + batch * stride_cb + t * stride_ct + d * stride_cd, mask=turned, other=1.0).to(tl.float32)  # [BD]
    sin = tl.load(sin_ptr + batch * stride_sb + t * stride_st + d * stride_sd, mask=turned, other=0.0).to(tl.float32)
    position = tl.load(position_ptr + t * stride_p).to(tl.int64)
    inside = (position >= 0) & (position < L)
    if head < H:
        q_row = q_ptr + batch * stride_qb + t * stride_qt + head * stride_qh
        q = _norm_and_turn(q_row, stride_qd, True, q_norm_ptr, norm_eps, norm_offset, cos, sin, D, ROTARY, BD)
        # A token after the end of the cache has no place. torch would stop the device. Here its output is NaN.
        q = tl.where(inside, q, float("nan"))
        out_ptrs = out_ptr + ((batch * H + head) * T + t) * D + d  # [BD]
        tl.store(out_ptrs, q.to(out_ptr.dtype.element_ty), mask=d < D)
    else:
        h = head - H
        k_row = k_ptr + batch * stride_kb + t * stride_kt + h * stride_kh
        k = _norm_and_turn(k_row, stride_kd, True, k_norm_ptr, norm_eps, norm_offset, cos, sin, D, ROTARY, BD)
        v = tl.load(v_ptr + batch * stride_vb + t * stride_vt + h * stride_vh + d * stride_vd, mask=d < D, other=0.0)  # [BD]
        k_ptrs = keys_ptr + batch * stride_yb + h * stride_yh + position * stride_yl + d * stride_yd  # [BD]
        v_ptrs = values_ptr + batch * stride_ub + h * stride_uh + position * stride_ul + d * stride_ud
        tl.store(k_ptrs, k.to(keys_ptr.dtype.element_ty), mask=inside & (d < D))
        tl.store(v_ptrs, v.to(values_ptr.dtype.element_ty), mask=inside & (d < D))


def splits_of(programs: int, blocks: int | None) -> int:
    """Into how many splits, a power of two, the keys are divided.

    Args:
        programs: number of programs without splitting.
        blocks: blocks of a static cache, or None if keys grow. Then the number must not depend on the length.
    """
    most = GROWING_SPLITS if blocks is None else min(STATIC_SPLITS, triton.next_power_of_2(blocks))
    while most > 1 and most * programs > PROGRAMS:
        most //= 2
    return most


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
        q, k, v, gate, q_norm_weight, k_norm_weight, norm_eps, norm_offset, cos, sin, position, mask, scale: as in the dialect.
        keys, values: [B, HKV, L, D], any strides; written in place.
        overlap: whether all kernels may start while the kernel before them runs.

    Returns:
        [B, T, H·D] in q's dtype.
    """
    norms = [None if w is None else w.contiguous() for w in (q_norm_weight, k_norm_weight)]
    B, T, H, D = q.shape
    if T == 1:
        new = (k, v, *norms, cos, sin, position, norm_eps, norm_offset)
        return attend(q.transpose(1, 2), keys, values, gate, mask, scale, overlap, new)
    HKV, L = keys.shape[1:3]
    turned = torch.empty((B, H, T, D), dtype=q.dtype, device=q.device)
    options = overlap_options(q) if overlap else {}
    kernel_of(attention_turn_kernel)[(B * T * (H + HKV),)](
        q, k, v, *norms, cos, sin, position, keys, values, turned, norm_eps, norm_offset, L,
        *q.stride(), *k.stride(), *v.stride(), *strides(cos, 0, 1, 2), *strides(sin, 0, 1, 2), position.stride(0),
        *keys.stride(), *values.stride(),
        T=T, H=H, HKV=HKV, D=D, ROTARY=cos.shape[-1], BD=triton.next_power_of_2(D), num_warps=1, OVERLAP=bool(options), **options,
    )  # fmt: skip
    return attend_tiles(turned, keys, values, gate, mask, scale, overlap)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    gate: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    overlap: bool,
    new: tuple[Any, ...] | None = None,
    longer: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention with one query per sequence, its output times σ(gate).

    Args:
        q: [B, H, 1, D], any strides.
        keys, values: [B, HKV, L, D], any strides; with `new` and without `longer` written in place.
        gate: [B, 1, H, D] or None.
        mask: [B or 1, 1, 1, L] of bool or None; with `longer` [B or 1, 1, 1, L + 1].
        scale: factor on the scores.
        overlap: whether both kernels may start while the kernel before them runs.
        new: k, v, q_norm_weight, k_norm_weight, cos, sin, position, norm_eps and norm_offset of attention_decode, norms
            contiguous; or None where q is normed and turned, and keys and values are complete.
        longer: with `new`, whose position is then None, where keys and values are stored with the new ones appended:
            [B, HKV, L + 1, D] each, contiguous.

    Returns:
        [B, 1, H·D] in q's dtype.

    Raises:
        ValueError: keys, values and mask are not of one length, that of the mask one more with `longer`.
    """
    B, H, _, D = q.shape
    HKV, L = keys.shape[1:3]
    seen = L if longer is None else L + 1
    if values.shape != keys.shape or mask is not None and mask.shape[3] != seen:
        found = f"{list(keys.shape)}, {list(values.shape)} and {None if mask is None else list(mask.shape)}"
        wanted = "be of one length" if longer is None else "be of one length, the mask of one more"
        raise ValueError(f"Keys, values and mask must {wanted}, found {found}.")
    G, BD = H // HKV, triton.next_power_of_2(D)
    groups = -(-G // QUERIES)  # groups of queries that share a key head
    queries = -(-G // groups)
    BL = BLOCK * 2 // max(keys.itemsize, 2)
    splits = splits_of(B * HKV * groups, None if new is None or longer is not None else -(-L // BL))
    k, v, q_norm, k_norm, cos, sin, position, norm_eps, norm_offset = new or (None,) * 7 + (0.0, 0.0)
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=q.device)  # noqa: E731
    sums = largest = total = None
    if splits > 1:
        sums, largest, total = empty(B, 1, H, splits, D), empty(B, 1, H, splits), empty(B, 1, H, splits)
    out = empty(B, 1, H * D, dtype=q.dtype)
    options = overlap_options(q) if overlap else {}
    early = {"OVERLAP": bool(options), **options}

    gate_strides = strides(gate, 0, 2, 3)
    kernel_of(attention_split_kernel)[(B * HKV * groups, splits)](
        q, k, v, q_norm, k_norm, cos, sin, keys, values, position, mask, None if splits > 1 else gate,
        *(longer or (None, None)), sums, largest, total, None if splits > 1 else out, norm_eps, norm_offset, scale, L,
        *strides(q, 0, 1, 3), *strides(k, 0, 2, 3), *strides(v, 0, 2, 3), *strides(cos, 0, 2), *strides(sin, 0, 2),
        *gate_strides, *keys.stride(), *values.stride(), *strides(mask, 0, 3),
        HKV=HKV, G=G, GROUPS=groups, QUERIES=queries, D=D, ROTARY=0 if cos is None else cos.shape[-1], BD=BD, BL=BL,
        SPLITS=splits, AT_ONCE=AT_ONCE, num_warps=1, **early,
    )  # fmt: skip
    if splits > 1:
        combine(sums, largest, total, gate, out, early)
    return out


def require_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, gate: torch.Tensor | None) -> None:
    """Refuse arguments that `attend` does not support."""
    require_dtypes(q=q, keys=keys, values=values, gate=gate)
    H, HKV = q.shape[1], keys.shape[1]
    require_static(H=H, HKV=HKV)
    require_head_dims(D=q.shape[3])
    if H % HKV:
        raise Refused(f"H must be a multiple of HKV, found H = {H} and HKV = {HKV}.")
    if not q.dtype == keys.dtype == values.dtype:
        raise Refused(f"q, keys and values must have one dtype, found {q.dtype}, {keys.dtype} and {values.dtype}.")


def require_new(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor | None,
    q_norm_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Refuse new tokens, q [B, T, H, D], that the kernels do not support."""
    require_dtypes(q=q, k=k, v=v, q_norm_weight=q_norm_weight, cos=cos, sin=sin)
    require_static(R=cos.shape[-1])
    require_attention(q.transpose(1, 2), keys, values, gate)
    if cos.shape[-1] % 2:
        raise Refused(f"R must be even, found {cos.shape[-1]}.")
    if not q.dtype == k.dtype == v.dtype:
        raise Refused(f"q, k and v must have one dtype, found {q.dtype}, {k.dtype} and {v.dtype}.")


def supports(
    q, k, v, gate, q_norm_weight, k_norm_weight, norm_eps, norm_offset, cos, sin, keys, values, position, mask, scale
) -> None:  # fmt: skip
    """Raise Refused unless the kernels support the arguments.

    T must be static and at most 8, dtypes float32, bfloat16 or float16, heads and cache length static, D ≤ 256 and R even.
    """
    require_static(L=keys.shape[2])
    require_few(q.shape[1])
    require_new(q, k, v, gate, q_norm_weight, cos, sin, keys, values)


implementation = register("attention_decode", launch, supports, early=("keys", "values"))
