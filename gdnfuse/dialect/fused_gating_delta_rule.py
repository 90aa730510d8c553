"""fused_gating_delta_rule: gates inside the rule, state updated in place (vLLM's fused_sigmoid_gating_delta_rule_update)."""

from __future__ import annotations

import torch

from gdnfuse.dialect.delta_rule import example_tensors
from gdnfuse.dialect.delta_rule import reference as delta_rule
from gdnfuse.dialect.gating import reference as gating
from gdnfuse.dialect.op import acc_dtype, need_tokens, register


def reference(
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
) -> torch.Tensor:
    """delta_rule with g = gating(a, A_log, dt_bias) and β = beta_scale·sigmoid(b), T ≥ 1.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V].
        a, b: [B, T, HV], before the nonlinearities.
        A_log, dt_bias: [HV].
        recurrent_state: [B, HV, K, V], written in place.
        scale: factor on q.
        l2norm_eps: if given, q and k are l2-normalised with it first.
        beta_scale: 2 allows the state negative eigenvalues (Grazzi et al. 2024, arXiv:2411.12537).

    Returns:
        o [B, T, HV, V] in float32 (float64 for float64 inputs).

    Raises:
        ValueError: no tokens.
    """
    need_tokens("fused_gating_delta_rule", v.shape[1])
    acc = acc_dtype(b, v)
    beta = beta_scale * b.to(acc).sigmoid()
    o, new = delta_rule(q, k, v, gating(a, A_log, dt_bias), beta, recurrent_state, scale, l2norm_eps)
    recurrent_state.copy_(new)
    return o


def fake(q, k, v, a, b, A_log, dt_bias, recurrent_state, scale, l2norm_eps=None, beta_scale=1.0):
    need_tokens("fused_gating_delta_rule", v.shape[1])
    return torch.empty(v.shape, dtype=acc_dtype(q, v, a, b, A_log, dt_bias, recurrent_state), device=v.device)


def examples():
    calls = []
    for B, T, H, HV, K, V, eps in [(2, 1, 2, 4, 8, 16, 1e-6), (1, 3, 1, 3, 16, 8, None), (3, 2, 2, 2, 8, 8, 1e-6)]:
        calls.append((example_tensors(B, T, H, HV, K, V), {"scale": K**-0.5, "l2norm_eps": eps, "beta_scale": float(B)}))
    return calls


op = register(
    "fused_gating_delta_rule",
    reference,
    fake,
    examples,
    equation="delta_rule(q, k, v, −exp(A_log)·softplus(a + dt_bias), β = beta_scale·σ(b), state!)",
    mutates=("recurrent_state",),
)
