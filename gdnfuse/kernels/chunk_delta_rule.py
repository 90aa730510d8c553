"""The gated delta rule over many tokens, in chunks of C = 64 (Yang et al. 2024, arXiv:2412.06464, section 3.3).

Inside a chunk, with γ the running sum of g and D[i, j] = e^(γᵢ − γⱼ) for i ≥ j:

    A = (I + tril(β·KKᵀ ⊙ D, −1))⁻¹·diag(β),  P = tril(scale·QKᵀ ⊙ D)                 (chunk_prepare_kernel, all chunks at once)
    U = A·(V − e^γ·KS),  O = scale·e^γ·QS + P·U,  S ← e^γ_C·S + (e^(γ_C − γ)·K)ᵀU      (chunk_scan_kernel, chunk by chunk)

There are two launches for any T. Only A and P, 64 columns per token, go through memory, and never a state per chunk. So no memory
grows as T·K·V: the output is computed where the state is. The l2norm of q and k is a factor per row. Rows of K and Q are only
multiplied from the right, so the factors are applied to 64-vectors and products, and k and q are read as the model wrote them.

The triangular inverse grows by block elimination from 2×2 blocks of the diagonal to 64×64, with all blocks of a size in one
product. It is stable where the powers of the doubling method would overflow (equal keys, β = 1). If q and k are l2-normalised,
its entries are at most max(1, β). For bfloat16 inputs it is then computed from float16 operands, which are as precise as tf32 in
that range. This does not hold for β up to 2. Then steps damp nothing, and with similar keys the rounding errors of float16 grow
to several percent of the inverse, those of float32 to 1e-5. So all operands are float32 in that case.

Layout: q, k [B, T, H, K], v [B, T, HV, V], gates [B, T, HV], with any strides but innermost 1 for q, k, v; value head hv uses key
head hv // (HV // H); state [N, HV, K, V], any strides. Accumulation and state are float32. Operands of products are bfloat16 for
bfloat16 inputs. For float16, whose range the state may leave, and float32 they are float32, in three tf32 products on NVIDIA.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gdnfuse import compat
from gdnfuse.dialect.chunk_delta_rule import CHUNK, check
from gdnfuse.errors import Refused
from gdnfuse.kernels import devices
from gdnfuse.kernels.delta_rule import log_decay
from gdnfuse.kernels.devices import Device
from gdnfuse.kernels.launch.implementation import (
    INDEX_POINTERS,
    kernel_of,
    register,
    require_dtypes,
    require_head_dims,
    require_static,
    require_tokens,
)

if compat.gluon() and compat.gluon_tiles():
    from gdnfuse.kernels import chunk_scan_hopper
else:
    chunk_scan_hopper = None

# AMD's matrix units support float32.
EXACT = "tf32x3" if torch.version.hip is None else "ieee"
# dtype of q, k, v: (dtype of the operands of products, precision of products of float32 operands). Bfloat16 operands need a K
# that fills its tile: on sm_90 Triton 3.6 gives wrong results if loads of bfloat16 wgmma operands in a loop are not pipelined.
OPERANDS = {torch.bfloat16: (torch.bfloat16, EXACT)}
WIDE, MAX_WIDE = (torch.float32, EXACT), 128


# Chosen on an H200, 32 heads, T = 8192: 8 warps are slower. No committed benchmark sweeps them.
PREPARE_WARPS = 4


@triton.jit
def _inverse(L, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)⁻¹ for a strictly lower triangular L [64, 64], from the inverses of 2×2 blocks on the diagonal up to the whole."""
    i, j = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    x = tl.where(i == j, 1.0, tl.where(i >> 1 == j >> 1, -L, 0.0))
    for shift in range(1, 6):
        # Two blocks X, Y of the diagonal, with C below X, become [[X, 0], [−Y·C·X, Y]].
        below = tl.where((i >> shift != j >> shift) & (i >> (shift + 1) == j >> (shift + 1)), L, 0.0)
        if HALF:
            factor = x.to(tl.float16)
            x -= tl.dot(factor, tl.dot(below.to(tl.float16), factor).to(tl.float16))
        else:
            x -= tl.dot(x, tl.dot(below, x, input_precision=PRECISION), input_precision=PRECISION)
    return x


@triton.jit
def _running_sum(x, PRECISE: tl.constexpr):
    """The running sum of x [64] as two addends.

    If the sum is near −1000, its ulp is 6e-5, and the decay between two close tokens would be off by as much. If PRECISE, the
    first addend is a sum of multiples of 2⁻⁸, which is exact up to 2¹⁶, and so are its differences.
    """
    if PRECISE:
        coarse = tl.where(tl.abs(x) < 65536.0, tl.floor(x * 256.0) / 256.0, x)
        return tl.cumsum(coarse, 0), tl.cumsum(x - coarse, 0)
    else:
        return tl.cumsum(x, 0), tl.zeros_like(x)


@triton.jit
def _bounds(cu_seqlens_ptr, n, T, VARLEN: tl.constexpr):
    """The row of the batch, the first token and the length of sequence n."""
    if VARLEN:
        start = tl.load(cu_seqlens_ptr + n).to(tl.int64)
        return n * 0, start, (tl.load(cu_seqlens_ptr + n + 1).to(tl.int64) - start).to(tl.int32)
    else:
        return n, n * 0, T


@triton.jit(do_not_specialize=["T", "TOKENS", "plane", "stride_ab", "stride_bb"])
def chunk_prepare_kernel(
    q_ptr, k_ptr, a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, cu_seqlens_ptr, inverse_ptr, attention_ptr, factors_ptr,
    scale, l2norm_eps, T, TOKENS, plane,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_ab, stride_at, stride_ah, stride_bb, stride_bt, stride_bh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    L2NORM: tl.constexpr, GATED: tl.constexpr, BETA_SCALE: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # All programs are on one axis of the grid. The others allow only 65535, and there may be more heads or chunks.
    chunk, head = tl.program_id(0) % tl.cdiv(T, 64), tl.program_id(0) // tl.cdiv(T, 64)
    n, hv = (head // HV).to(tl.int64), (head % HV).to(tl.int64)
    h = hv // (HV // H)
    plane = tl.cast(plane, tl.int64)
    batch, start, T = _bounds(cu_seqlens_ptr, n, T, VARLEN)
    if chunk * 64 >= T:
        return
    r = tl.arange(0, 64)
    i_k = tl.arange(0, BK)
    live = chunk * 64 + r < T  # [64]
    mask = live[:, None] & (i_k < K)[None, :]  # [64, BK]
    t = start + chunk * 64  # the chunk's first token
    dtype = inverse_ptr.dtype.element_ty
    q_ptr += batch * stride_qb + h * stride_qh + t * stride_qt
    k_ptr += batch * stride_kb + h * stride_kh + t * stride_kt
    a_ptr += batch * stride_ab + hv * stride_ah + t * stride_at
    b_ptr += batch * stride_bb + hv * stride_bh + t * stride_bt
    q = tl.load(q_ptr + (r[:, None] * stride_qt + i_k[None, :]), mask=mask, other=0.0).to(dtype)  # [64, BK]
    k = tl.load(k_ptr + (r[:, None] * stride_kt + i_k[None, :]), mask=mask, other=0.0).to(dtype)
    a = tl.load(a_ptr + r * stride_at, mask=live, other=0.0).to(tl.float32)  # [64]
    beta = tl.load(b_ptr + r * stride_bt, mask=live, other=0.0).to(tl.float32)
    if GATED:
        a = log_decay(a, tl.load(A_log_ptr + hv).to(tl.float32), tl.load(dt_bias_ptr + hv).to(tl.float32))
        beta = BETA_SCALE * tl.sigmoid(beta)
    beta = tl.where(live, beta, 0.0)
    g, rest = _running_sum(tl.where(live, a, 0.0), dtype == tl.float32)  # [64]
    # The sum at the last token. After it the sum does not change, except for rounding.
    at_last = r == tl.minimum(T - chunk * 64, 64) - 1
    last, last_rest = tl.sum(tl.where(at_last, g, 0.0), 0), tl.sum(tl.where(at_last, rest, 0.0), 0)
    kk = tl.dot(k, tl.trans(k), input_precision=PRECISION)  # [64, 64]
    norm_q, norm_k = tl.where(live, tl.cast(scale, tl.float32), 0.0), tl.where(live, 1.0, 0.0)  # [64]
    if L2NORM:
        eps = tl.cast(l2norm_eps, tl.float32)
        diagonal = r[:, None] == r[None, :]
        norm_k = tl.where(live, tl.rsqrt(tl.sum(tl.where(diagonal, kk, 0.0), 1) + eps), 0.0)
        qq = tl.dot(q, tl.trans(q), input_precision=PRECISION)
        norm_q = tl.where(live, norm_q * tl.rsqrt(tl.sum(tl.where(diagonal, qq, 0.0), 1) + eps), 0.0)

    # Factors of rows: of KS, of QS, of K in the update of the state; and the decay up to the token.
    row = (batch * HV + hv) * TOKENS + t
    factors_ptr += row
    grown = tl.exp(g + rest)
    tl.store(factors_ptr + r, grown * norm_k, mask=live)
    tl.store(factors_ptr + plane + r, grown * norm_q, mask=live)
    tl.store(factors_ptr + 2 * plane + r, tl.exp((last - g) + (last_rest - rest)) * norm_k, mask=live)
    tl.store(factors_ptr + 3 * plane + r, grown, mask=live)

    tile = r[:, None] * 64 + r[None, :]  # [64, 64]
    between = (g[:, None] - g[None, :]) + (rest[:, None] - rest[None, :])  # [64, 64]
    decay = tl.exp(tl.where(r[:, None] >= r[None, :], between, -float("inf"))) * norm_k[None, :]
    attention = tl.dot(q, tl.trans(k), input_precision=PRECISION) * decay * norm_q[:, None]
    tl.store(attention_ptr + row * 64 + tile, attention.to(dtype), mask=live[:, None])
    system = kk * decay * (norm_k * beta)[:, None]
    system = tl.where(r[:, None] > r[None, :], system, 0.0)
    x = _inverse(system, L2NORM and dtype == tl.bfloat16, PRECISION) * beta[None, :]
    tl.store(inverse_ptr + row * 64 + tile, x.to(dtype), mask=live[:, None])


@triton.jit(do_not_specialize=["T", "TOKENS", "plane", "checkpoint_every", "checkpoints"])
def chunk_scan_kernel(
    q_ptr, k_ptr, v_ptr, inverse_ptr, attention_ptr, factors_ptr, state_ptr, cu_seqlens_ptr, out_ptr, last_ptr, checkpoint_ptr,
    T, TOKENS, plane, checkpoint_every, checkpoints,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_sb, stride_sh, stride_sk, stride_sv,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    VARLEN: tl.constexpr, CHECKPOINT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column, head = tl.program_id(0) % tl.cdiv(V, BV), tl.program_id(0) // tl.cdiv(V, BV)
    n, hv = (head // HV).to(tl.int64), (head % HV).to(tl.int64)
    h = hv // (HV // H)
    plane = tl.cast(plane, tl.int64)
    batch, start, T = _bounds(cu_seqlens_ptr, n, T, VARLEN)
    r = tl.arange(0, 64)
    i_k = tl.arange(0, BK)
    i_v = column * BV + tl.arange(0, BV)
    live_k, live_v = i_k < K, i_v < V
    dtype = inverse_ptr.dtype.element_ty
    # A scalar start and fixed 32-bit offsets inside a chunk take fewer registers than moving 64-bit pointers.
    q_ptr += batch * stride_qb + h * stride_qh + start * stride_qt
    k_ptr += batch * stride_kb + h * stride_kh + start * stride_kt
    v_ptr += batch * stride_vb + hv * stride_vh + start * stride_vt
    row = (batch * HV + hv) * TOKENS + start
    inverse_ptr += row * 64
    attention_ptr += row * 64
    factors_ptr += row
    out_ptr += ((batch * TOKENS + start) * HV + hv) * V
    tile = r[:, None] * 64 + r[None, :]  # [64, 64]
    live_state = live_k[:, None] & live_v[None, :]  # [BK, BV]

    s = tl.zeros((BK, BV), dtype=tl.float32)
    if state_ptr is not None:
        state_ptrs = state_ptr + n * stride_sb + hv * stride_sh + i_k[:, None] * stride_sk + i_v[None, :] * stride_sv
        s += tl.load(state_ptrs, mask=live_state, other=0.0).to(tl.float32)

    for chunk in tl.range(0, tl.cdiv(T, 64), num_stages=STAGES):
        live = chunk * 64 + r < T  # [64]
        mask = live[:, None] & live_k[None, :]  # [64, BK]
        mask_v = live[:, None] & live_v[None, :]  # [64, BV]
        k = tl.load(k_ptr + (r[:, None] * stride_kt + i_k[None, :]), mask=mask, other=0.0).to(dtype)
        q = tl.load(q_ptr + (r[:, None] * stride_qt + i_k[None, :]), mask=mask, other=0.0).to(dtype)
        v = tl.load(v_ptr + (r[:, None] * stride_vt + i_v[None, :]), mask=mask_v, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + tile, mask=live[:, None], other=0.0)  # [64, 64]
        attention = tl.load(attention_ptr + tile, mask=live[:, None], other=0.0)
        of_ks = tl.load(factors_ptr + r, mask=live, other=0.0)  # [64]
        of_qs = tl.load(factors_ptr + plane + r, mask=live, other=0.0)
        of_k = tl.load(factors_ptr + 2 * plane + r, mask=live, other=0.0)
        decay = tl.load(factors_ptr + 3 * plane + (tl.minimum(T - chunk * 64, 64) - 1))

        operand = s.to(dtype)
        x = v - tl.dot(k, operand, input_precision=PRECISION) * of_ks[:, None]
        u = tl.dot(inverse, x.to(dtype), input_precision=PRECISION)  # [64, BV]
        o = tl.dot(q, operand, input_precision=PRECISION) * of_qs[:, None]
        o = tl.dot(attention, u.to(dtype), acc=o, input_precision=PRECISION)
        s = tl.dot(tl.trans(k), (u * of_k[:, None]).to(dtype), acc=s * decay, input_precision=PRECISION)
        tl.store(out_ptr + (r[:, None] * (HV * V) + i_v[None, :]), o.to(out_ptr.dtype.element_ty), mask=mask_v)
        if CHECKPOINT:
            if (chunk + 1) % checkpoint_every == 0 and (chunk + 1) * 64 <= T:
                index = (n * checkpoints + (chunk + 1) // checkpoint_every - 1) * HV + hv
                tl.store(checkpoint_ptr + index * K * V + (i_k[:, None] * V + i_v[None, :]), s, mask=live_state)
        k_ptr += 64 * stride_kt
        q_ptr += 64 * stride_qt
        v_ptr += 64 * stride_vt
        inverse_ptr += 64 * 64
        attention_ptr += 64 * 64
        factors_ptr += 64
        out_ptr += 64 * HV * V
    tl.store(last_ptr + (n * HV + hv) * K * V + (i_k[:, None] * V + i_v[None, :]), s, mask=live_state)


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    scale: float,
    l2norm_eps: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    checkpoint_every: int = 0,
    beta_max: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The dialect's chunk_delta_rule.

    Args:
        q, k: [B, T, H, K], T ≥ 1.
        v: [B, T, HV, V].
        g, beta: [B, T, HV], log decay and learning rate.
        state: [N, HV, K, V] or None for zero; not written.
        scale: factor on q.
        l2norm_eps: if given, q and k are l2-normalised with it first.
        cu_seqlens: [N + 1] int32 or int64, bounds of sequences packed into one row, or None.
        checkpoint_every: if n > 0, return the states after every n·64 tokens too.
        beta_max: what β is at most; above 1 operands are float32.

    Returns:
        o [B, T, HV, V] in v's dtype; the last states [N, HV, K, V] and the checkpoints [B, T // (64·n), HV, K, V] in float32.

    Raises:
        ValueError: as the dialect's op.
    """
    return launch_with(q, k, v, g, beta, None, None, state, scale, l2norm_eps, cu_seqlens, checkpoint_every, beta_max)


def launch_gated(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor | None,
    scale: float,
    l2norm_eps: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    checkpoint_every: int = 0,
    beta_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The dialect's fused_gating_chunk_delta_rule: `launch` with the gates computed inside.

    Args:
        a, b: [B, T, HV], before the nonlinearities.
        A_log, dt_bias: [HV].
        beta_scale: factor on σ(b).
        q, k, v, state, scale, l2norm_eps, cu_seqlens, checkpoint_every: as for `launch`.

    Returns:
        As `launch`.

    Raises:
        ValueError: no tokens.
    """
    return launch_with(q, k, v, a, b, A_log, dt_bias, state, scale, l2norm_eps, cu_seqlens, checkpoint_every, beta_scale)


def launch_with(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    scale: float,
    l2norm_eps: float | None,
    cu_seqlens: torch.Tensor | None,
    checkpoint_every: int,
    beta_max: float,
    config: tuple[int, int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch both kernels. Gates are g and β if A_log is None, else β is beta_max·σ(b).

    `config` (value columns per program, warps and stages) selects the scan that runs everywhere. None chooses by shape, and uses
    the scan of chunk_scan_hopper.py if it applies.
    """
    q, k, v = (x if _aligned(x) else x.contiguous() for x in (q, k, v))
    B, T, HV, V = v.shape
    H, K = q.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check(v, state, cu_seqlens, checkpoint_every)
    BK = max(16, triton.next_power_of_2(K))
    operands, precision = _operands(v.dtype, K, beta_max)
    new = {"device": v.device, "dtype": torch.float32}
    hopper = chunk_scan_hopper if config is None and operands == torch.bfloat16 else None
    on_hopper = hopper is not None and hopper.supports_here(q, k, v)
    tokens = hopper.padded(T) if on_hopper else T
    inverse = torch.empty((B, HV, tokens, CHUNK), device=v.device, dtype=operands)
    attention, factors = torch.empty_like(inverse), torch.empty((4, B, HV, tokens), **new)
    out, last = torch.empty((B, T, HV, V), device=v.device, dtype=v.dtype), torch.empty((N, HV, K, V), **new)
    checkpoints = T // (CHUNK * checkpoint_every) if checkpoint_every else 0
    kept = torch.empty((B, checkpoints, HV, K, V), **new)
    shared = {"H": H, "HV": HV, "K": K, "BK": BK, "VARLEN": cu_seqlens is not None, "PRECISION": precision}
    kernel_of(chunk_prepare_kernel)[(-(-T // CHUNK) * N * HV,)](
        q, k, a, b, None if A_log is None else A_log.contiguous(), None if dt_bias is None else dt_bias.contiguous(),
        cu_seqlens, inverse, attention, factors,
        scale, 0.0 if l2norm_eps is None else l2norm_eps, T, tokens, B * HV * tokens,
        *q.stride()[:3], *k.stride()[:3], *a.stride(), *b.stride(),
        L2NORM=l2norm_eps is not None, GATED=A_log is not None, BETA_SCALE=beta_max, num_warps=PREPARE_WARPS, **shared,
    )  # fmt: skip
    if on_hopper:
        hopper.launch_scan(q, k, v, inverse, attention, factors, state, cu_seqlens, out, last, kept, checkpoint_every)
        return out, last, kept
    columns, num_warps, stages = _config(operands, N * HV, BK, V, devices.of(v.device)) if config is None else config
    BV = _tile(columns, V)
    kernel_of(chunk_scan_kernel)[(-(-V // BV) * N * HV,)](
        q, k, v, inverse, attention, factors, state, cu_seqlens, out, last, kept,
        T, tokens, B * HV * tokens, checkpoint_every, checkpoints,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *((0,) * 4 if state is None else state.stride()),
        V=V, BV=BV, CHECKPOINT=checkpoint_every > 0, STAGES=stages, num_warps=num_warps, **shared,
    )  # fmt: skip
    return out, last, kept


def _operands(dtype: torch.dtype, K: int, beta_max: float) -> tuple[torch.dtype, str]:
    """The dtype of the operands of products and the precision of products, for q, k, v of a dtype."""
    return OPERANDS.get(dtype, WIDE) if K == max(16, triton.next_power_of_2(K)) and abs(beta_max) <= 1 else WIDE


# The most heads N·HV, then value columns per program, warps, stages. Chosen on an H200 with K = V = 128, T = 8192, and 32 and 128
# heads. 64 or 128 columns and 8 warps are slower. No committed benchmark sweeps them.
SCAN_CONFIGS = ((64, 32, 4, 3), (float("inf"), 32, 4, 2))


def _config(operands: torch.dtype, heads: int, BK: int, V: int, device: Device) -> tuple[int, int, int]:
    """Value columns per program, warps, and as many stages as fit the shared memory."""
    if operands == torch.float32:
        return 16, 4, 1
    columns, num_warps, stages = (32, 4, 2) if BK > 128 else next(config[1:] for config in SCAN_CONFIGS if heads <= config[0])
    while stages > 1 and scan_bytes(BK, _tile(columns, V), stages, device.amd) > device.shared_memory:
        stages -= 1
    return columns, num_warps, stages


def _tile(columns: int, V: int) -> int:
    return min(columns, max(16, triton.next_power_of_2(V)))


def scan_bytes(BK: int, BV: int, stages: int, amd: bool) -> int:
    """Bytes of shared memory per program of chunk_scan_kernel with bfloat16 operands, in the layout of Triton 3.6 to 3.8.

    These are what is loaded of the chunks ahead, and the largest operand that is made. On NVIDIA k has one tile for any number of
    stages, because it is stored there from registers. On AMD v and the factors stay in registers. On sm_90 and sm_100, where
    products read shared memory themselves, it is more, and there is room for it. Operands of float32 take 40 KiB at most.
    """
    made, k, squares = max(BK, CHUNK) * BV, CHUNK * BK, 2 * CHUNK * CHUNK
    ahead = stages - 1
    if amd:
        return 2 * (made + ahead * (2 * k + squares)) if ahead else 2 * max(k, made)
    if not ahead:
        return 2 * (made + 2 * k + squares)
    return 2 * (made + k + ahead * (k + CHUNK * BV + squares)) + 4 * ahead * (3 * CHUNK + 1)


def prepare_bytes(BK: int, amd: bool) -> int:
    """The most bytes for chunk_prepare_kernel: k and q, or one of them on AMD, in padded rows."""
    return 2 * CHUNK * (BK + 16) * (1 if amd else 2)


def _aligned(x: torch.Tensor) -> bool:
    """Whether rows can be read 16 bytes at a time."""
    step = 16 // x.element_size()
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in strides)


def supports(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    scale: float,
    l2norm_eps: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    checkpoint_every: int = 0,
    beta_max: float = 2.0,
) -> None:
    """Raise Refused unless the kernels support the arguments.

    T must be at least 1, q, k and v of one dtype of float32, bfloat16 and float16, heads static, K, V ≤ 256, K ≤ 128 with float32
    operands, HV a multiple of H, cu_seqlens int32 or int64, and programs must fit the device.
    """
    require_dtypes(q=q, k=k, v=v, g=g, beta=beta, state=state)
    H, HV = q.shape[2], v.shape[2]
    require_tokens(v.shape[1])
    require_static(H=H, HV=HV)
    require_head_dims(K=q.shape[-1], V=v.shape[-1])
    if HV % H:
        raise Refused(f"HV must be a multiple of H, found HV = {HV} and H = {H}.")
    if not q.dtype == k.dtype == v.dtype:
        raise Refused(f"q, k and v must have one dtype, found {q.dtype}, {k.dtype} and {v.dtype}.")
    K = k.shape[-1]
    if K > MAX_WIDE and _operands(q.dtype, K, beta_max) == WIDE:
        found = f"K = {K}, {q.dtype} and β up to {beta_max:g}"
        raise Refused(f"K above {MAX_WIDE} must be 256, q, k and v bfloat16 and β at most 1; found {found}.")
    if cu_seqlens is not None and cu_seqlens.dtype not in INDEX_POINTERS:
        raise Refused(f"cu_seqlens must be int32 or int64, found {cu_seqlens.dtype}.")
    BK, device = max(16, triton.next_power_of_2(K)), devices.of(v.device)
    if _operands(v.dtype, K, beta_max)[0] != torch.float32:
        needed = max(scan_bytes(BK, _tile(32, v.shape[-1]), 1, device.amd), prepare_bytes(BK, device.amd))
        devices.require_shared(f"The chunked rule with K = {K}", needed, device)


def supports_gated(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    *rest: Any,
    beta_scale: float = 1.0,
    **options: Any,
) -> None:
    """Raise Refused for the same reasons as `supports`, and for A_log and dt_bias of other dtypes."""
    require_dtypes(A_log=A_log, dt_bias=dt_bias)
    supports(q, k, v, a, b, *rest, **options, beta_max=beta_scale)


chunk_delta_rule = register("chunk_delta_rule", launch, supports)
fused_gating_chunk_delta_rule = register("fused_gating_chunk_delta_rule", launch_gated, supports_gated)
