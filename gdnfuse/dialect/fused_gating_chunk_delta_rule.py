"""fused_gating_chunk_delta_rule: the chunked rule with its gates inside; β and the decay are never rounded below float32."""

from __future__ import annotations

import torch

from gdnfuse.dialect import chunk_delta_rule
from gdnfuse.dialect.delta_rule import example_tensors
from gdnfuse.dialect.gating import reference as gating
from gdnfuse.dialect.op import acc_dtype, register


def reference(
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
    """chunk_delta_rule with g = gating(a, A_log, dt_bias) and β = beta_scale·sigmoid(b).

    Args:
        a, b: [B, T, HV], before the nonlinearities.
        A_log, dt_bias: [HV].
        q, k, v, state, scale, l2norm_eps, cu_seqlens, checkpoint_every: as for chunk_delta_rule.
        beta_scale: as for fused_gating_delta_rule.

    Returns:
        As chunk_delta_rule: o [B, T, HV, V], the last states [N, HV, K, V], checkpoints.

    Raises:
        ValueError: as chunk_delta_rule.
    """
    acc = acc_dtype(q, k, v, a, b, A_log, dt_bias)
    g, beta = gating(a, A_log, dt_bias).to(acc), beta_scale * b.to(acc).sigmoid()
    return chunk_delta_rule.reference(q, k, v, g, beta, state, scale, l2norm_eps, cu_seqlens, checkpoint_every)


def fake(q, k, v, a, b, A_log, dt_bias, state, scale, l2norm_eps=None, cu_seqlens=None, checkpoint_every=0, beta_scale=1.0):
    acc = acc_dtype(q, k, v, a, b, A_log, dt_bias)
    g = torch.empty(a.shape, dtype=acc, device=a.device)
    return chunk_delta_rule.fake(q, k, v, g, g, state, scale, l2norm_eps, cu_seqlens, checkpoint_every)


def examples():
    calls = []
    for B, T, H, HV, K, V, every in [(2, 70, 1, 2, 8, 4, 1), (1, 5, 2, 2, 4, 8, 0)]:
        *tensors, s = example_tensors(B, T, H, HV, K, V)
        kwargs = {"scale": K**-0.5, "l2norm_eps": 1e-6, "checkpoint_every": every, "beta_scale": float(B)}
        calls.append(((*tensors, s if every else None), kwargs))
    return calls


op = register(
    "fused_gating_chunk_delta_rule",
    reference,
    fake,
    examples,
    equation="chunk_delta_rule(q, k, v, −exp(A_log)·softplus(a + dt_bias), β = beta_scale·σ(b), state)",
    inline=False,
)
