"""packed_decode: one token of the gated delta rule, with q, k, v read in place from the packed row (as in vLLM)."""

from __future__ import annotations

import torch

from gdnfuse.dialect.fused_gating_delta_rule import reference as fused_gating_delta_rule
from gdnfuse.dialect.op import acc_dtype, register


def key_heads(channels: int, recurrent_state: torch.Tensor) -> int:
    """The number H of key heads of a packed row with D = 2·H·K + HV·V channels."""
    _, HV, K, V = recurrent_state.shape
    return (channels - HV * V) // (2 * K)


def reference(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    recurrent_state: torch.Tensor,
    scale: float,
    l2norm_eps: float,
    beta_scale: float = 1.0,
) -> torch.Tensor:
    """fused_gating_delta_rule at T = 1 on the packed row [q | k | v].

    Args:
        mixed_qkv: [B, 1, D] with D = 2·H·K + HV·V, after the causal conv.
        a, b: [B, 1, HV].
        A_log, dt_bias: [HV].
        recurrent_state: [B, HV, K, V], written in place.
        scale: factor on q.
        l2norm_eps: eps of the l2norm of q and k.
        beta_scale: as in the dialect.

    Returns:
        o [B, 1, HV, V] in float32 (float64 for float64 inputs).
    """
    B, HV, K, V = recurrent_state.shape
    H = key_heads(mixed_qkv.shape[-1], recurrent_state)
    q, k, v = mixed_qkv.split([H * K, H * K, HV * V], -1)
    q, k, v = q.reshape(B, 1, H, K), k.reshape(B, 1, H, K), v.reshape(B, 1, HV, V)
    return fused_gating_delta_rule(q, k, v, a, b, A_log, dt_bias, recurrent_state, scale, l2norm_eps, beta_scale)


def fake(mixed_qkv, a, b, A_log, dt_bias, recurrent_state, scale, l2norm_eps, beta_scale=1.0):
    B, HV, _, V = recurrent_state.shape
    acc = acc_dtype(mixed_qkv, a, b, A_log, dt_bias, recurrent_state)
    return torch.empty((B, 1, HV, V), dtype=acc, device=mixed_qkv.device)


def example_tensors(B, H, HV, K, V, dtype=torch.float32, state_dtype=torch.float32):
    return (
        torch.randn(B, 1, 2 * H * K + HV * V, dtype=dtype),
        torch.randn(B, 1, HV, dtype=dtype),
        torch.randn(B, 1, HV, dtype=dtype),
        torch.rand(HV).add(0.1).log(),
        torch.randn(HV),
        torch.randn(B, HV, K, V, dtype=state_dtype),
    )


def examples():
    return [
        (example_tensors(2, 2, 4, 8, 16), {"scale": 8**-0.5, "l2norm_eps": 1e-6}),
        (example_tensors(1, 1, 3, 16, 8), {"scale": 0.25, "l2norm_eps": 1e-6, "beta_scale": 2.0}),
    ]


op = register(
    "packed_decode",
    reference,
    fake,
    examples,
    equation="fused_gating_delta_rule at T = 1 on mixed_qkv = [q | k | v]",
    mutates=("recurrent_state",),
)
