"""Replays the accepted tokens of a verify step into the states of all GDN layers, in one launch.

For each layer and sequence, with n accepted tokens: k, v = silu(conv) of rows 1 … n of [conv state | tokens], then

    S ← e^g·S;  S ← S + k ⊗ β(v − Sᵀk)   (Yang et al. 2024, arXiv:2412.06464)

for each token. The conv state becomes the W rows that end with the last accepted one. Checkpoint and replay are as in SGLang's PR
28695.

Layout: windows [L, B, W + T, D] with D = 2·H·K + HV·V, a, b [L, B, T, HV], accepted [B], conv_weight [L, D, W], conv_state [L, B,
D, W], recurrent_state [L, B, HV, K, V], with any strides. A program has some value columns of one head of one layer and sequence.
It computes k of the head's rows itself, and the conv reads only the windows. The inputs of a few tokens are loaded before the
first is used, and the state is read and written once for these. Each channel of a conv state is written by one program: those of
v by the programs of the head, those of q and k by the first program of the first value head of their key head. If n is 0, nothing
is read or written. All maths is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gdnfuse.errors import Refused
from gdnfuse.kernels.delta_rule import columns_of, log_decay
from gdnfuse.kernels.launch.implementation import kernel_of, register, require_dtypes, require_head_dims, require_static

# Value columns of a tile (with 128 keys), tiles per program, and warps; and the most tokens at once. More would spill.
COLUMNS, TILES, NUM_WARPS = 16, 2, 1
AT_ONCE = 4


@triton.jit
def _conv(rows, weights, stride_xt, stride_ww, n, live, FEW: tl.constexpr, W: tl.constexpr):
    """silu of the conv for each of FEW tokens, of which the first n matter. The rows of the others are not read."""
    xs, ws, found = (), (), ()
    for i in tl.static_range(FEW + W - 1):
        xs = xs + (tl.load(rows + (i + 1) * stride_xt, mask=live & (i + 1 < n + W), other=0.0).to(tl.float32),)
    for w in tl.static_range(W):
        ws = ws + (tl.load(weights + w * stride_ww, mask=live, other=0.0).to(tl.float32),)
    for t in tl.static_range(FEW):
        y = xs[t] * ws[0]
        for w in tl.static_range(1, W):
            y += xs[t + w] * ws[w]
        found = found + (y * tl.sigmoid(y),)
    return found


@triton.jit
def _keys(rows, weights, stride_xt, stride_ww, n, live, eps, FEW: tl.constexpr, W: tl.constexpr):
    """The keys of FEW tokens after the conv, of length one."""
    ks, found = _conv(rows, weights, stride_xt, stride_ww, n, live, FEW, W), ()
    for t in tl.static_range(FEW):
        found = found + (ks[t] * tl.rsqrt(tl.sum(ks[t] * ks[t], 0) + tl.cast(eps, tl.float32)),)
    return found


@triton.jit
def _after(s, ks, vs, decays, betas, FEW: tl.constexpr):
    """The state after FEW tokens, with products of pairs of keys in place of a state after each token.

    With S the state before all, c_t the product of the decays up to token t, and d_ts that of the tokens behind s up to t:

        u_t = β_t(v_t − c_t·Sᵀk_t − Σ_{s<t} d_ts·(k_t·k_s)·u_s), and the state after all is c_T·S + Σ_t d_Tt·k_t ⊗ u_t

    So only short sums wait for one another. s: [BK, BV], ks: [BK] each, vs: [BV] each, decays, betas: numbers.
    """
    us, behind, c = (), (), 1.0
    for t in tl.static_range(FEW):
        c = c * decays[t]
        now = ()
        for i in tl.static_range(t):
            now = now + (behind[i] * decays[t],)
        u = vs[t] - c * tl.sum(s * ks[t][:, None], 0)  # [BV]
        for i in tl.static_range(t):
            u -= (now[i] * tl.sum(ks[t] * ks[i], 0)) * us[i]
        us = us + (u * betas[t],)
        behind = now + (1.0,)
    s = s * c
    for t in tl.static_range(FEW):
        s += ks[t][:, None] * (behind[t] * us[t])[None, :]
    return s


@triton.jit
def _move(state, rows, stride_cw, stride_xt, live, W: tl.constexpr):
    """Set columns of a conv state to the W rows from `rows` on."""
    for w in tl.static_range(W):
        x = tl.load(rows + w * stride_xt, mask=live, other=0.0)
        tl.store(state + w * stride_cw, x.to(state.dtype.element_ty), mask=live)


@triton.jit
def delta_rule_commit_kernel(
    x_ptr, a_ptr, b_ptr, accepted_ptr, weight_ptr, A_log_ptr, dt_bias_ptr, conv_ptr, state_ptr,
    l2norm_eps, B,
    stride_xl, stride_xb, stride_xt, stride_xd, stride_al, stride_ab, stride_at, stride_ah,
    stride_bl, stride_bb, stride_bt, stride_bh, stride_wl, stride_wd, stride_ww,
    stride_cl, stride_cb, stride_cd, stride_cw, stride_sl, stride_sb, stride_sh, stride_sk, stride_sv,
    FEW: tl.constexpr, W: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, TILES: tl.constexpr, BETA_SCALE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    PARTS: tl.constexpr = (V + BV * TILES - 1) // (BV * TILES)
    part, head = pid % PARTS, pid // PARTS
    hv, of = head % HV, head // HV
    batch, layer = of % B, of // B
    n = tl.load(accepted_ptr + batch).to(tl.int32)
    if n > 0:
        h = hv // (HV // H)
        i_k = tl.arange(0, BK).to(tl.int64)  # [BK]
        live_k = i_k < K
        k_of = (H + h) * K + i_k  # channels [BK]

        x_ptr += layer * stride_xl + batch * stride_xb
        weight_ptr += layer * stride_wl
        conv_ptr += layer * stride_cl + batch * stride_cb
        a_ptr += layer * stride_al + batch * stride_ab + hv * stride_ah
        b_ptr += layer * stride_bl + batch * stride_bb + hv * stride_bh
        state_ptr += layer * stride_sl + batch * stride_sb + hv * stride_sh
        A_log = tl.load(A_log_ptr + layer * HV + hv).to(tl.float32)
        dt_bias = tl.load(dt_bias_ptr + layer * HV + hv).to(tl.float32)
        k_rows, k_weights = x_ptr + k_of * stride_xd, weight_ptr + k_of * stride_wd
        last = n * stride_xt

        for start in range(0, n, FEW):
            first, left = tl.cast(start, tl.int64), n - start
            ks = _keys(k_rows + first * stride_xt, k_weights, stride_xt, stride_ww, left, live_k, l2norm_eps, FEW, W)
            decays, betas = (), ()
            for t in tl.static_range(FEW):  # a token that was not accepted decays nothing and adds nothing
                a = tl.load(a_ptr + (first + t) * stride_at, mask=t < left, other=0.0).to(tl.float32)
                b = tl.load(b_ptr + (first + t) * stride_bt, mask=t < left, other=0.0).to(tl.float32)
                decays = decays + (tl.where(t < left, tl.exp(log_decay(a, A_log, dt_bias)), 1.0),)
                betas = betas + (tl.where(t < left, BETA_SCALE * tl.sigmoid(b), 0.0),)
            for i in range(TILES):
                i_v = (part * TILES + i) * BV + tl.arange(0, BV)  # [BV]
                v_of, live_v = 2 * H * K + hv * V + i_v, i_v < V
                live = live_k[:, None] & live_v[None, :]  # [BK, BV]
                state_ptrs = state_ptr + i_k[:, None] * stride_sk + i_v[None, :] * stride_sv  # [BK, BV]
                s = tl.load(state_ptrs, mask=live, other=0.0).to(tl.float32)  # [BK, BV]
                v_rows, v_weights = x_ptr + v_of * stride_xd, weight_ptr + v_of * stride_wd
                vs = _conv(v_rows + first * stride_xt, v_weights, stride_xt, stride_ww, left, live_v, FEW, W)
                s = _after(s, ks, vs, decays, betas, FEW)
                tl.store(state_ptrs, s.to(state_ptr.dtype.element_ty), mask=live)
                if start + FEW >= n:
                    _move(conv_ptr + v_of * stride_cd, v_rows + last, stride_cw, stride_xt, live_v, W)

        if (hv % (HV // H) == 0) & (part == 0):  # the first of its key head
            q_of = k_of - H * K
            _move(conv_ptr + k_of * stride_cd, k_rows + last, stride_cw, stride_xt, live_k, W)
            _move(conv_ptr + q_of * stride_cd, x_ptr + q_of * stride_xd + last, stride_cw, stride_xt, live_k, W)


def few(T: int) -> int:
    """How many of T tokens are replayed at once: as many each time, and at most AT_ONCE."""
    return -(-T // -(-T // AT_ONCE))


def launch(
    windows: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    accepted: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    conv_state: torch.Tensor,
    recurrent_state: torch.Tensor,
    l2norm_eps: float,
    beta_scale: float = 1.0,
) -> None:
    """The dialect's delta_rule_commit.

    Args:
        windows: [L, B, W + T, D], any strides.
        a, b: [L, B, T, HV], any strides.
        accepted: [B], int32 or int64, contiguous; from 0 to T.
        conv_weight: [L, D, W], any strides.
        A_log, dt_bias: [L, HV].
        conv_state: [L, B, D, W], any strides, written.
        recurrent_state: [L, B, HV, K, V], any strides, written in place.
        l2norm_eps: of the l2norm of k.
        beta_scale: factor on σ(b).
    """
    L, B, HV, K, V = recurrent_state.shape
    D, W = conv_weight.shape[1:]
    H, BV = (D - HV * V) // (2 * K), columns_of(COLUMNS, K, V)
    kernel_of(delta_rule_commit_kernel)[(L * B * HV * -(-V // (BV * TILES)),)](
        windows, a, b, accepted, conv_weight, A_log.contiguous(), dt_bias.contiguous(), conv_state, recurrent_state,
        l2norm_eps, B,
        *windows.stride(), *a.stride(), *b.stride(), *conv_weight.stride(), *conv_state.stride(), *recurrent_state.stride(),
        FEW=few(a.shape[2]), W=W, H=H, HV=HV, K=K, V=V, BK=triton.next_power_of_2(K), BV=BV, TILES=TILES,
        BETA_SCALE=beta_scale, num_warps=NUM_WARPS,
    )  # fmt: skip


def supports(
    windows: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    accepted: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    conv_state: torch.Tensor,
    recurrent_state: torch.Tensor,
    l2norm_eps: float,
    beta_scale: float = 1.0,
) -> None:
    """Raise Refused unless dtypes are float32, bfloat16 or float16, sizes are static, K, V ≤ 256 and HV is a multiple of H."""
    require_dtypes(
        windows=windows, a=a, b=b, conv_weight=conv_weight, A_log=A_log, dt_bias=dt_bias, conv_state=conv_state,
        recurrent_state=recurrent_state,
    )  # fmt: skip
    if accepted.dtype not in (torch.int32, torch.int64):
        raise Refused(f"accepted must be int32 or int64, found {str(accepted.dtype).removeprefix('torch.')}.")
    _, _, HV, K, V = recurrent_state.shape
    D, W = conv_weight.shape[1:]
    require_static(D=D, W=W, HV=HV)
    require_head_dims(K=K, V=V)
    H, rest = divmod(D - HV * V, 2 * K)
    if H < 1 or rest or HV % H:
        raise Refused(f"D must be 2·H·K + HV·V with HV a multiple of H, found D = {D}, HV = {HV}, K = {K} and V = {V}.")


implementation = register("delta_rule_commit", launch, supports)
