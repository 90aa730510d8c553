"""delta_rule_verify: the gated delta rule over a few tokens, gates inside, which reads its state and does not write it.

A step that checks drafted tokens needs it. vLLM PR 35777 also has the gates inside the rule over several tokens. SGLang PR 28695
keeps inputs instead of a state per token, which `delta_rule_commit` replays.
"""

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
    state: torch.Tensor,
    scale: float,
    l2norm_eps: float | None = None,
    beta_scale: float = 1.0,
) -> torch.Tensor:
    """The output of delta_rule with g = gating(a, A_log, dt_bias) and β = beta_scale·sigmoid(b), without its new state.

    Args:
        q, k: [B, T, H, K], T ≥ 1.
        v: [B, T, HV, V].
        a, b: [B, T, HV], before the nonlinearities.
        A_log, dt_bias: [HV].
        state: [B, HV, K, V], before the first token; not written.
        scale: factor on q.
        l2norm_eps: if given, q and k are l2-normalised with it first.
        beta_scale: 2 allows the state negative eigenvalues (Grazzi et al. 2024, arXiv:2411.12537).

    Returns:
        o [B, T, HV, V] in float32 (float64 for float64 inputs).

    Raises:
        ValueError: no tokens.
    """
    need_tokens("delta_rule_verify", v.shape[1])
    beta = beta_scale * b.to(acc_dtype(b, v)).sigmoid()
    return delta_rule(q, k, v, gating(a, A_log, dt_bias), beta, state, scale, l2norm_eps)[0]


def fake(q, k, v, a, b, A_log, dt_bias, state, scale, l2norm_eps=None, beta_scale=1.0):
    need_tokens("delta_rule_verify", v.shape[1])
    return torch.empty(v.shape, dtype=acc_dtype(q, v, a, b, A_log, dt_bias, state), device=v.device)


def examples():
    calls = []
    for B, T, H, HV, K, V, eps in [(2, 5, 2, 4, 8, 16, 1e-6), (1, 2, 1, 3, 16, 8, None), (3, 8, 2, 2, 8, 8, 1e-6)]:
        calls.append((example_tensors(B, T, H, HV, K, V), {"scale": K**-0.5, "l2norm_eps": eps, "beta_scale": float(B)}))
    return calls


op = register(
    "delta_rule_verify",
    reference,
    fake,
    examples,
    equation="o of delta_rule(q, k, v, −exp(A_log)·softplus(a + dt_bias), β = beta_scale·σ(b), state), which is not written",
)
