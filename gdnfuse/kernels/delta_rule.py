"""The gated delta rule in recurrent form, gates inside (Yang et al. 2024, arXiv:2412.06464).

    S ← e^g·S;  S ← S + k ⊗ β(v − Sᵀk);  o = Sᵀ(q·scale),  with g = −exp(A_log)·softplus(a + dt_bias) and β = beta_scale·σ(b).

Fusing the gates into the rule, and reading q, k, v from the packed row, follow vLLM's fused sigmoid-gating update and packed
recurrent decode. The gated norm in the same kernel is new here.

Layout: q, k [B, T, H, K], v [B, T, HV, V], a, b [B, T, HV], state [B, HV, K, V], all with any strides; value head hv uses key
head hv // (HV // H). The state is read once and written once, in place, for any T. All maths is float32; β and the decay are
never rounded below it.

Two kernels share the rule. `delta_rule_kernel` splits V over programs. For 2 to 8 tokens it is compiled for their number. Then
all tokens are loaded before the first is used, so a step waits for memory once and not for each token. A step that checks drafts
does not write its state (`delta_rule_verify`), and a pool has one state per token (`delta_rule_slots`). `delta_rule_gated_kernel`
(T = 1) ends in the gated RMSNorm, which needs all V columns of a head. So it has one program per head, which goes tile by tile.
On Hopper both may start, and load the state, while the kernel before them still runs (programmatic dependent launch).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gdnfuse import compat
from gdnfuse.errors import Refused
from gdnfuse.kernels import tuned
from gdnfuse.kernels.gated_rms_norm import gated
from gdnfuse.kernels.launch.implementation import (
    kernel_of,
    overlap_options,
    register,
    require_dtypes,
    require_head_dims,
    require_one_token,
    require_static,
    require_tokens,
)

gdc_launch_dependents, gdc_wait = compat.dependent_launch()

# For at most so many heads in all: value columns per program (with 128 keys) and warps of the rule alone. For the rule with its
# norm the same per tile, and whether the next tile is loaded before this one is done. A state is needed again only after those of
# all layers. So if it fits the L2, it is marked to leave it first. If it does not fit, the mark would only cost time.
# benchmarks/mixer.py --sweep compares these.
RULE_CONFIGS = ((64, (16, 1)), (512, (32, 1)), (float("inf"), (64, 2)))
GATED_CONFIGS = ((1024, (128, 4, False)), (float("inf"), (64, 4, False)))
FEW_TOKENS = range(2, 9)  # numbers of tokens that the kernel is compiled for
# The same for so many tokens. A program of one warp has no barrier in its sums over K.
FEW_CONFIGS = ((64, (8, 1)), (float("inf"), (16, 1)))
TWO_CONFIG = (16, 1)
SLOTS_CONFIG = (8, 1)  # for several tokens whose states go to slots; more columns would spill
LOOP_CONFIG = (32, 2)  # for more tokens; more columns per warp would spill
SMALL = 512  # heads of 128×128 states in float32, 32 MiB


def columns_of(columns: int, K: int, V: int) -> int:
    """Value columns of a tile with as many elements for K keys as `columns` have for 128, or half as many above that."""
    BK = triton.next_power_of_2(K)
    return min(max(columns * 128 // BK // (2 if BK > 128 else 1), 1), triton.next_power_of_2(V))


@triton.jit
def _l2norm(x, eps):
    return x * tl.rsqrt(tl.sum(x * x, 0) + eps)


@triton.jit
def log_decay(a, A_log, dt_bias):
    """g = −exp(A_log)·softplus(a + dt_bias); float32."""
    x = a + dt_bias
    # log1p(e) = log(u)·e/(u − 1) with u = 1 + e rounded. It is exact to rounding, even if 1 + e loses low bits of e.
    e = tl.exp(tl.where(x > 20.0, 0.0, x))
    u = 1.0 + e
    lost = u == 1.0
    log1p = tl.where(lost, e, tl.log(u) * (e / tl.where(lost, 1.0, u - 1.0)))
    return -tl.exp(A_log) * tl.where(x > 20.0, x, log1p)


@triton.jit
def rule_step(s, q, k, v, decay, beta):
    """One token. s: [BK, BV], q, k: [BK], v: [BV]. Returns the new s and o [BV]."""
    s = s * decay
    delta = (v - tl.sum(s * k[:, None], 0)) * beta  # [BV]
    s = s + k[:, None] * delta[None, :]  # [BK, BV]
    return s, tl.sum(s * q[:, None], 0)


@triton.jit
def load_qk(q_ptrs, k_ptrs, live, scale, l2norm_eps, L2NORM: tl.constexpr):
    q = tl.load(q_ptrs, mask=live, other=0.0).to(tl.float32)  # [BK]
    k = tl.load(k_ptrs, mask=live, other=0.0).to(tl.float32)  # [BK]
    if L2NORM:
        q, k = _l2norm(q, tl.cast(l2norm_eps, tl.float32)), _l2norm(k, tl.cast(l2norm_eps, tl.float32))
    return q * tl.cast(scale, tl.float32), k


@triton.jit
def _store_slot(ptrs, s, slot_ptr, stride_slot, live, EVICT: tl.constexpr):
    """Store a state s [BK, BV] in the slot of a pool whose number is at slot_ptr, unless the number is negative."""
    slot = tl.load(slot_ptr).to(tl.int64)
    tl.store(ptrs + slot * stride_slot, s.to(ptrs.dtype.element_ty), mask=live & (slot >= 0), eviction_policy=EVICT)


@triton.jit
def delta_rule_kernel(
    q_ptr, k_ptr, v_ptr, a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, state_ptr, slots_ptr, accepted_ptr, out_ptr,
    scale, l2norm_eps, T,
    stride_qb, stride_qt, stride_qh, stride_qk, stride_kb, stride_kt, stride_kh, stride_kk,
    stride_vb, stride_vt, stride_vh, stride_vv, stride_ab, stride_at, stride_ah, stride_bb, stride_bt, stride_bh,
    stride_sb, stride_sh, stride_sk, stride_sv,
    FEW: tl.constexpr, WRITE: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, L2NORM: tl.constexpr,
    BETA_SCALE: tl.constexpr, EVICT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The rule over T tokens, or over FEW tokens if their number is known.

    With slots [B, T], the state of a sequence is in the slot of the token before the first, and a state goes to the slot of each
    token.
    """
    if OVERLAP:
        gdc_launch_dependents()
    pid = tl.program_id(0).to(tl.int64)
    head = pid // tl.cdiv(V, BV)
    batch, hv = head // HV, head % HV
    h = hv // (HV // H)
    i_k = tl.arange(0, BK).to(tl.int64)  # [BK]
    i_v = pid % tl.cdiv(V, BV) * BV + tl.arange(0, BV)  # [BV]
    live_k, live_v = i_k < K, i_v < V
    live = live_k[:, None] & live_v[None, :]  # [BK, BV]

    q_ptrs = q_ptr + batch * stride_qb + h * stride_qh + i_k * stride_qk  # [BK]
    k_ptrs = k_ptr + batch * stride_kb + h * stride_kh + i_k * stride_kk  # [BK]
    v_ptrs = v_ptr + batch * stride_vb + hv * stride_vh + i_v * stride_vv  # [BV]
    a_ptr += batch * stride_ab + hv * stride_ah
    b_ptr += batch * stride_bb + hv * stride_bh
    state_ptrs = state_ptr + hv * stride_sh + i_k[:, None] * stride_sk + i_v[None, :] * stride_sv  # [BK, BV]
    A_log, dt_bias = tl.load(A_log_ptr + hv).to(tl.float32), tl.load(dt_bias_ptr + hv).to(tl.float32)

    if slots_ptr is not None:
        slots_ptr += batch * T
        n = tl.load(accepted_ptr + batch).to(tl.int64)
        slot = tl.load(slots_ptr + n - 1, mask=n > 0, other=-1).to(tl.int64)
        there = live & (slot >= 0)
        s = tl.load(state_ptrs + slot * stride_sb, mask=there, other=0.0, eviction_policy=EVICT).to(tl.float32)  # [BK, BV]
    else:
        state_ptrs += batch * stride_sb
        s = tl.load(state_ptrs, mask=live, other=0.0, eviction_policy=EVICT).to(tl.float32)  # [BK, BV]
    if OVERLAP:
        gdc_wait()
    if FEW:
        qs, ks, vs, decays, betas = (), (), (), (), ()
        for t in tl.static_range(FEW):
            q, k = load_qk(q_ptrs + t * stride_qt, k_ptrs + t * stride_kt, live_k, scale, l2norm_eps, L2NORM)
            qs, ks = qs + (q,), ks + (k,)
            vs = vs + (tl.load(v_ptrs + t * stride_vt, mask=live_v, other=0.0).to(tl.float32),)  # [BV]
            decays = decays + (tl.exp(log_decay(tl.load(a_ptr + t * stride_at).to(tl.float32), A_log, dt_bias)),)
            betas = betas + (BETA_SCALE * tl.sigmoid(tl.load(b_ptr + t * stride_bt).to(tl.float32)),)
        for t in tl.static_range(FEW):
            s, o = rule_step(s, qs[t], ks[t], vs[t], decays[t], betas[t])
            tl.store(out_ptr + ((batch * FEW + t) * HV + hv) * V + i_v, o, mask=live_v)
            if slots_ptr is not None:
                _store_slot(state_ptrs, s, slots_ptr + t, stride_sb, live, EVICT)
    else:
        for i in range(T):
            t = tl.cast(i, tl.int64)
            q, k = load_qk(q_ptrs + t * stride_qt, k_ptrs + t * stride_kt, live_k, scale, l2norm_eps, L2NORM)
            v = tl.load(v_ptrs + t * stride_vt, mask=live_v, other=0.0).to(tl.float32)  # [BV]
            decay = tl.exp(log_decay(tl.load(a_ptr + t * stride_at).to(tl.float32), A_log, dt_bias))
            beta = BETA_SCALE * tl.sigmoid(tl.load(b_ptr + t * stride_bt).to(tl.float32))
            s, o = rule_step(s, q, k, v, decay, beta)
            tl.store(out_ptr + ((batch * T + t) * HV + hv) * V + i_v, o, mask=live_v)
            if slots_ptr is not None:
                _store_slot(state_ptrs, s, slots_ptr + t, stride_sb, live, EVICT)
    if WRITE:
        tl.store(state_ptrs, s.to(state_ptr.dtype.element_ty), mask=live, eviction_policy=EVICT)


@triton.jit
def _load_tile(
    state_rows, tile, live_k, stride_sv,
    V: tl.constexpr, BV: tl.constexpr, INDEX: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Columns [tile, tile + BV) of a state: [BK, BV]."""
    i_v = (tile + tl.arange(0, BV)).to(INDEX)  # [BV]
    ptrs = state_rows + i_v[None, :] * stride_sv  # [BK, BV]
    if EVEN:
        return tl.load(ptrs, eviction_policy=EVICT)
    else:
        return tl.load(ptrs, mask=live_k[:, None] & (i_v < V)[None, :], other=0.0, eviction_policy=EVICT)


@triton.jit
def _store_tile(
    state_rows, tile, s, live_k, stride_sv,
    V: tl.constexpr, BV: tl.constexpr, INDEX: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    i_v = (tile + tl.arange(0, BV)).to(INDEX)  # [BV]
    ptrs = state_rows + i_v[None, :] * stride_sv  # [BK, BV]
    if EVEN:
        tl.store(ptrs, s.to(state_rows.dtype.element_ty), eviction_policy=EVICT)
    else:
        live = live_k[:, None] & (i_v < V)[None, :]  # [BK, BV]
        tl.store(ptrs, s.to(state_rows.dtype.element_ty), mask=live, eviction_policy=EVICT)


@triton.jit
def delta_rule_gated_kernel(
    q_ptr, k_ptr, v_ptr, z_ptr, a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, norm_weight_ptr, state_ptr, out_ptr,
    scale, l2norm_eps, norm_eps,
    stride_qb, stride_qh, stride_qk, stride_kb, stride_kh, stride_kk, stride_vb, stride_vh, stride_vv,
    stride_zb, stride_zh, stride_zg, stride_zv, stride_ab, stride_ah, stride_ag, stride_bb, stride_bh, stride_bg,
    stride_sb, stride_sh, stride_sk, stride_sv,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    INDEX: tl.constexpr, AHEAD: tl.constexpr, BETA_SCALE: tl.constexpr, SILU: tl.constexpr,
    EVICT: tl.constexpr, ANNOUNCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if ANNOUNCE:
        gdc_launch_dependents()
    EVEN: tl.constexpr = K == BK and V % BV == 0
    head = tl.program_id(0).to(tl.int64)
    batch, hv = head // HV, head % HV
    h, group = hv // (HV // H), hv % (HV // H)
    i_k = tl.arange(0, BK).to(INDEX)  # [BK]
    live_k = i_k < K
    q_ptrs = q_ptr + batch * stride_qb + h * stride_qh + i_k * stride_qk  # [BK]
    k_ptrs = k_ptr + batch * stride_kb + h * stride_kh + i_k * stride_kk  # [BK]
    v_ptr += batch * stride_vb + hv * stride_vh
    z_ptr += batch * stride_zb + h * stride_zh + group * stride_zg
    a_ptr += batch * stride_ab + h * stride_ah + group * stride_ag
    b_ptr += batch * stride_bb + h * stride_bh + group * stride_bg
    state_rows = state_ptr + batch * stride_sb + hv * stride_sh + i_k[:, None] * stride_sk  # [BK, 1]

    A_log, dt_bias = tl.load(A_log_ptr + hv).to(tl.float32), tl.load(dt_bias_ptr + hv).to(tl.float32)
    ahead = _load_tile(state_rows, 0, live_k, stride_sv, V, BV, INDEX, EVEN, EVICT)  # [BK, BV]
    if OVERLAP:
        gdc_wait()

    q, k = load_qk(q_ptrs, k_ptrs, live_k, scale, l2norm_eps, True)
    decay = tl.exp(log_decay(tl.load(a_ptr).to(tl.float32), A_log, dt_bias))
    beta = BETA_SCALE * tl.sigmoid(tl.load(b_ptr).to(tl.float32))

    outs = ()
    square = 0.0
    for tile in tl.static_range(0, V, BV):
        i_v = (tile + tl.arange(0, BV)).to(INDEX)  # [BV]
        s = ahead.to(tl.float32)
        if AHEAD and tile + BV < V:
            ahead = _load_tile(state_rows, tile + BV, live_k, stride_sv, V, BV, INDEX, EVEN, EVICT)
        v = tl.load(v_ptr + i_v * stride_vv, mask=i_v < V, other=0.0).to(tl.float32)  # [BV]
        s, o = rule_step(s, q, k, v, decay, beta)
        _store_tile(state_rows, tile, s, live_k, stride_sv, V, BV, INDEX, EVEN, EVICT)
        if not AHEAD and tile + BV < V:
            ahead = _load_tile(state_rows, tile + BV, live_k, stride_sv, V, BV, INDEX, EVEN, EVICT)
        square += tl.sum(o * o, 0)
        outs = outs + (o,)

    for tile in tl.static_range(0, V, BV):
        i_v = (tile + tl.arange(0, BV)).to(INDEX)  # [BV]
        z = tl.load(z_ptr + i_v * stride_zv, mask=i_v < V, other=0.0).to(tl.float32)  # [BV]
        weight = tl.load(norm_weight_ptr + i_v, mask=i_v < V, other=0.0).to(tl.float32)  # [BV]
        y = gated(outs[tile // BV], square / V, z, weight, tl.cast(norm_eps, tl.float32), SILU)  # [BV]
        tl.store(out_ptr + head * V + i_v, y.to(out_ptr.dtype.element_ty), mask=i_v < V)


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    recurrent_state: torch.Tensor,
    scale: float,
    l2norm_eps: float | None = None,
    beta_scale: float = 1.0,
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The dialect's fused_gating_delta_rule, any T ≥ 1.

    Args:
        q, k: [B, T, H, K], any strides.
        v: [B, T, HV, V], any strides.
        a, b: [B, T, HV], before the nonlinearities, any strides.
        A_log, dt_bias: [HV].
        recurrent_state: [B, HV, K, V], any strides, written in place.
        scale: factor on q.
        l2norm_eps: if given, q and k are l2-normalised with it first.
        beta_scale: factor on σ(b).
        overlap: whether A_log, dt_bias and the state may be read while kernels before this one run.

    Returns:
        o [B, T, HV, V] in float32.
    """
    return launch_rule(q, k, v, a, b, A_log, dt_bias, recurrent_state, scale, l2norm_eps, beta_scale, overlap, write=True)


def launch_rule(
    q, k, v, a, b, A_log, dt_bias, state, scale, l2norm_eps, beta_scale, overlap: bool, write: bool, slots=None, accepted=None
) -> torch.Tensor:
    """`launch` without writing the state, or with states in slots as in `delta_rule_slots`."""
    B, T, HV, V = v.shape
    H, K = q.shape[2:]
    columns, num_warps = _config_of_rule(T, state) if slots is None or T == 1 else SLOTS_CONFIG
    BV = columns_of(columns, K, V)
    out = torch.empty((B, T, HV, V), dtype=torch.float32, device=v.device)
    options = overlap_options(v, A_log, dt_bias) if overlap and fits(state) else {}
    kernel_of(delta_rule_kernel)[(B * HV * -(-V // BV),)](
        q, k, v, a, b, A_log.contiguous(), dt_bias.contiguous(), state, slots, accepted, out,
        scale, 0.0 if l2norm_eps is None else l2norm_eps, T,
        *q.stride(), *k.stride(), *v.stride(), *a.stride(), *b.stride(), *state.stride(),
        FEW=T if T in FEW_TOKENS else 0, WRITE=write,
        H=H, HV=HV, K=K, V=V, BK=triton.next_power_of_2(K), BV=BV, L2NORM=l2norm_eps is not None,
        BETA_SCALE=beta_scale, EVICT="evict_first" if fits(state) else "", OVERLAP=bool(options),
        num_warps=num_warps, **options,
    )  # fmt: skip
    return out


def _split(mixed_qkv: torch.Tensor, recurrent_state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views q, k [B, 1, H, K] and v [B, 1, HV, V] of a packed row [B, 1, 2·H·K + HV·V]."""
    _, HV, K, V = recurrent_state.shape
    keys = (mixed_qkv.shape[-1] - HV * V) // 2
    return (
        mixed_qkv.narrow(-1, 0, keys).unflatten(-1, (keys // K, K)),
        mixed_qkv.narrow(-1, keys, keys).unflatten(-1, (keys // K, K)),
        mixed_qkv.narrow(-1, 2 * keys, HV * V).unflatten(-1, (HV, V)),
    )


def launch_packed_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    recurrent_state: torch.Tensor,
    scale: float,
    l2norm_eps: float,
    beta_scale: float = 1.0,
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The dialect's packed_decode: q, k, v are read in place.

    Args:
        mixed_qkv: [B, 1, D] with D = 2·H·K + HV·V, any strides.
        a, b: [B, 1, HV], any strides.
        A_log, dt_bias: [HV].
        recurrent_state: [B, HV, K, V], any strides, written in place.
        scale: factor on q.
        l2norm_eps: eps of the l2norm of q and k.
        beta_scale, overlap: as for `launch`.

    Returns:
        o [B, 1, HV, V] in float32.
    """
    q, k, v = _split(mixed_qkv, recurrent_state)
    return launch(q, k, v, a, b, A_log, dt_bias, recurrent_state, scale, l2norm_eps, beta_scale, overlap=overlap)


def launch_gated(
    mixed_qkv: torch.Tensor,
    z: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    recurrent_state: torch.Tensor,
    norm_weight: torch.Tensor,
    scale: float,
    l2norm_eps: float,
    norm_eps: float,
    beta_scale: float = 1.0,
    gate_activation: str = "silu",
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """packed_decode and gated_rms_norm in one kernel.

    Args:
        mixed_qkv, A_log, dt_bias, recurrent_state, scale, l2norm_eps, beta_scale, overlap: as for `launch_packed_decode`.
        z: the gate, [B, 1, HV·V] or, of each key head, [B, 1, H, HV/H·V], any strides.
        a, b: [B, 1, HV] or [B, 1, H, HV/H], any strides.
        norm_weight: [V].
        norm_eps: eps of the norm.
        gate_activation: "silu" or "sigmoid".

    Returns:
        [B, 1, HV·V] in z's dtype.
    """
    B, HV, K, V = recurrent_state.shape
    q, k, v = (x.squeeze(1) for x in _split(mixed_qkv, recurrent_state))
    H = q.shape[1]
    a, b, z = (x.squeeze(1) if x.dim() > 3 else x.squeeze(1).unflatten(-1, (H, -1)) for x in (a, b, z))
    z = z.unflatten(-1, (HV // H, V))
    columns, num_warps, ahead = _tuned("delta_rule_gated", _config(GATED_CONFIGS, recurrent_state), recurrent_state)
    out = torch.empty((B, 1, HV * V), dtype=z.dtype, device=z.device)
    # Offsets of 32 bits are enough inside the state of a head, for the strides of any cache. They leave more registers for tiles.
    farthest = sum(n * max(t.stride(-1), 1) for t, n in ((q, K), (k, K), (v, V), (z, V))) + K * recurrent_state.stride(2)
    index = tl.int32 if farthest + V * recurrent_state.stride(3) < 2**31 else tl.int64
    able = overlap_options(z, A_log, dt_bias) if overlap else {}
    options = able if fits(recurrent_state) else {}
    kernel_of(delta_rule_gated_kernel)[(B * HV,)](
        q, k, v, z, a, b, A_log.contiguous(), dt_bias.contiguous(), norm_weight.contiguous(), recurrent_state, out,
        scale, l2norm_eps, norm_eps,
        *q.stride(), *k.stride(), *v.stride(), *z.stride(), *a.stride(), *b.stride(), *recurrent_state.stride(),
        H=H, HV=HV, K=K, V=V, BK=triton.next_power_of_2(K), BV=columns_of(columns, K, V), INDEX=index, AHEAD=ahead,
        BETA_SCALE=beta_scale, SILU=gate_activation == "silu", EVICT="evict_first" if fits(recurrent_state) else "",
        ANNOUNCE=bool(able), OVERLAP=bool(options), num_warps=num_warps, **options,
    )  # fmt: skip
    return out


def _config_of_rule(T: int, state: torch.Tensor) -> tuple[int, int]:
    """Columns per program and warps for so many tokens."""
    if T == 1:
        return _tuned("delta_rule", _config(RULE_CONFIGS, state), state)
    if T not in FEW_TOKENS:
        return LOOP_CONFIG
    return TWO_CONFIG if T == 2 else _config(FEW_CONFIGS, state)


def _config(table: tuple[Any, ...], recurrent_state: torch.Tensor) -> Any:
    B, HV = recurrent_state.shape[:2]
    return next(config for heads, config in table if B * HV <= heads)


def _tuned(kernel: str, default: Any, recurrent_state: torch.Tensor) -> Any:
    """The config that was measured on this card for a state of these sizes, or the default."""
    B, HV, K, V = recurrent_state.shape
    if not isinstance(B, int):
        return default

    def require(config: Any) -> None:
        tuned.require_powers(columns=config[0], warps=config[1])

    key = tuned.Key(kernel, "", (B * HV, K, V), tuned.of_weight(recurrent_state))
    return tuned.choose(key, default, require, recurrent_state.device)


def fits(recurrent_state: torch.Tensor) -> bool:
    """Whether the state is small compared with the L2. With a larger one, more programs would only delay the kernel that they
    overlap.

    The kernel after them may start early anyway, and fetch its weights while the last states are written.
    """
    B, HV = recurrent_state.shape[:2]
    return B * HV <= SMALL


def supports(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    recurrent_state: torch.Tensor,
    scale: float,
    l2norm_eps: float | None = None,
    beta_scale: float = 1.0,
) -> None:
    """Raise Refused unless the kernel supports the arguments.

    T must be at least 1, dtypes float32, bfloat16 or float16, heads static, K, V ≤ 256 and HV a multiple of H.
    """
    require_dtypes(q=q, k=k, v=v, a=a, b=b, A_log=A_log, dt_bias=dt_bias, recurrent_state=recurrent_state)
    H, HV = q.shape[2], v.shape[2]
    require_tokens(v.shape[1])
    require_static(H=H, HV=HV)
    require_head_dims(K=q.shape[-1], V=v.shape[-1])
    if HV % H:
        raise Refused(f"HV must be a multiple of H, found HV = {HV} and H = {H}.")


def supports_packed_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    recurrent_state: torch.Tensor,
    scale: float,
    l2norm_eps: float,
    beta_scale: float = 1.0,
) -> None:
    """Raise Refused unless T is 1 and D = 2·H·K + HV·V is static, and for the same reasons as `supports`."""
    require_dtypes(mixed_qkv=mixed_qkv, a=a, b=b, A_log=A_log, dt_bias=dt_bias, recurrent_state=recurrent_state)
    _, T, D = mixed_qkv.shape
    _, HV, K, V = recurrent_state.shape
    require_one_token(T)
    require_static(D=D, HV=HV)
    require_head_dims(K=K, V=V)
    H, rest = divmod(D - HV * V, 2 * K)
    if H < 1 or rest or HV % H:
        raise Refused(f"D must be 2·H·K + HV·V with HV a multiple of H, found D = {D}, HV = {HV}, K = {K} and V = {V}.")


EARLY = ("A_log", "dt_bias", "recurrent_state")
SWEEP = "benchmarks/mixer.py --sweep"
fused_gating_delta_rule = register("fused_gating_delta_rule", launch, supports, EARLY, SWEEP)
packed_decode = register("packed_decode", launch_packed_decode, supports_packed_decode, EARLY, SWEEP)
