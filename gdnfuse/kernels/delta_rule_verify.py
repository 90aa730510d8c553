"""The gated delta rule over the few tokens of a verify step, gates inside, that reads its state and leaves it as it is:

    S ← e^g·S;  S ← S + k ⊗ β(v − Sᵀk);  o = Sᵀ(q·scale)   (Yang et al. 2024, arXiv:2412.06464)

Fused gates over several tokens follow vLLM PR 35777.

Layout: q, k [B, T, H, K], v [B, T, HV, V], a, b [B, T, HV], state [B, HV, K, V], all of any strides; value head hv uses key head
hv // (HV // H). Output [B, T, HV, V] float32. All maths is float32. The state is read once. T is known when the kernel is
compiled: all tokens are loaded before the first is used, so that a step waits for memory once and not for each token. On Hopper a
kernel may load its state while the one before it still runs (programmatic dependent launch).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gdnfuse import compat
from gdnfuse.errors import Refused
from gdnfuse.kernels.delta_rule import columns_of, fits, load_qk, log_decay, rule_step
from gdnfuse.kernels.delta_rule import supports as supports_rule
from gdnfuse.kernels.launch.implementation import kernel_of, overlap_options, register, require_static

gdc_launch_dependents, gdc_wait = compat.dependent_launch()

MOST_TOKENS = 8
# Value columns per program (of 128 keys) and warps, as of the rule over several tokens. Not measured for this kernel.
COLUMNS, NUM_WARPS = 32, 2


@triton.jit
def delta_rule_verify_kernel(
    q_ptr, k_ptr, v_ptr, a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, state_ptr, out_ptr,
    scale, l2norm_eps,
    stride_qb, stride_qt, stride_qh, stride_qk, stride_kb, stride_kt, stride_kh, stride_kk,
    stride_vb, stride_vt, stride_vh, stride_vv, stride_ab, stride_at, stride_ah, stride_bb, stride_bt, stride_bh,
    stride_sb, stride_sh, stride_sk, stride_sv,
    T: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    L2NORM: tl.constexpr, BETA_SCALE: tl.constexpr, EVICT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
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
    state_ptrs = state_ptr + batch * stride_sb + hv * stride_sh + i_k[:, None] * stride_sk + i_v[None, :] * stride_sv
    A_log, dt_bias = tl.load(A_log_ptr + hv).to(tl.float32), tl.load(dt_bias_ptr + hv).to(tl.float32)

    s = tl.load(state_ptrs, mask=live, other=0.0, eviction_policy=EVICT).to(tl.float32)  # [BK, BV]
    if OVERLAP:
        gdc_wait()
    qs, ks, vs, decays, betas = (), (), (), (), ()
    for t in tl.static_range(T):
        q, k = load_qk(q_ptrs + t * stride_qt, k_ptrs + t * stride_kt, live_k, scale, l2norm_eps, L2NORM)
        qs, ks = qs + (q,), ks + (k,)
        vs = vs + (tl.load(v_ptrs + t * stride_vt, mask=live_v, other=0.0).to(tl.float32),)  # [BV]
        decays = decays + (tl.exp(log_decay(tl.load(a_ptr + t * stride_at).to(tl.float32), A_log, dt_bias)),)
        betas = betas + (BETA_SCALE * tl.sigmoid(tl.load(b_ptr + t * stride_bt).to(tl.float32)),)
    for t in tl.static_range(T):
        s, o = rule_step(s, qs[t], ks[t], vs[t], decays[t], betas[t])
        tl.store(out_ptr + ((batch * T + t) * HV + hv) * V + i_v, o, mask=live_v)


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    scale: float,
    l2norm_eps: float | None = None,
    beta_scale: float = 1.0,
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The dialect's delta_rule_verify of up to 8 tokens.

    Args:
        q, k: [B, T, H, K], any strides.
        v: [B, T, HV, V], any strides.
        a, b: [B, T, HV], before the nonlinearities, any strides.
        A_log, dt_bias: [HV].
        state: [B, HV, K, V], any strides.
        scale: factor on q.
        l2norm_eps: if given, q and k are l2-normalised with it first.
        beta_scale: factor on σ(b).
        overlap: whether A_log, dt_bias and the state may be read while kernels before this one run.

    Returns:
        o [B, T, HV, V] in float32.
    """
    B, T, HV, V = v.shape
    H, K = q.shape[2:]
    BV = columns_of(COLUMNS, K, V)
    out = torch.empty((B, T, HV, V), dtype=torch.float32, device=v.device)
    options = overlap_options(v, A_log, dt_bias) if overlap and fits(state) else {}
    kernel_of(delta_rule_verify_kernel)[(B * HV * -(-V // BV),)](
        q, k, v, a, b, A_log.contiguous(), dt_bias.contiguous(), state, out,
        scale, 0.0 if l2norm_eps is None else l2norm_eps,
        *q.stride(), *k.stride(), *v.stride(), *a.stride(), *b.stride(), *state.stride(),
        T=T, H=H, HV=HV, K=K, V=V, BK=triton.next_power_of_2(K), BV=BV, L2NORM=l2norm_eps is not None,
        BETA_SCALE=beta_scale, EVICT="evict_first" if fits(state) else "", OVERLAP=bool(options), num_warps=NUM_WARPS, **options,
    )  # fmt: skip
    return out


def supports(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    scale: float,
    l2norm_eps: float | None = None,
    beta_scale: float = 1.0,
) -> None:
    """Raises Refused unless T is static and at most 8, and for whatever the rule over any number of tokens refuses."""
    supports_rule(q, k, v, a, b, A_log, dt_bias, state, scale, l2norm_eps, beta_scale)
    require_static(T=v.shape[1])
    if v.shape[1] > MOST_TOKENS:
        raise Refused(f"T must be at most {MOST_TOKENS}, got {v.shape[1]}.")


implementation = register("delta_rule_verify", launch, supports, ("A_log", "dt_bias", "state"))
