"""The gated delta rule over the few tokens of a verify step, gates inside, which reads its state and does not write it.

It is the kernel of `gdnfuse/kernels/delta_rule.py`, which describes it.
"""

from __future__ import annotations

import torch

from gdnfuse.errors import Refused
from gdnfuse.kernels.delta_rule import FEW_TOKENS, launch_rule
from gdnfuse.kernels.delta_rule import supports as supports_rule
from gdnfuse.kernels.launch.implementation import register, require_static


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
    """The dialect's delta_rule_verify for up to 8 tokens.

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
    return launch_rule(q, k, v, a, b, A_log, dt_bias, state, scale, l2norm_eps, beta_scale, overlap, write=False)


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
    """Raise Refused unless T is static and at most 8, and for the same reasons as the rule over any number of tokens."""
    supports_rule(q, k, v, a, b, A_log, dt_bias, state, scale, l2norm_eps, beta_scale)
    require_static(T=v.shape[1])
    if v.shape[1] > FEW_TOKENS[-1]:
        raise Refused(f"T must be at most {FEW_TOKENS[-1]}, found {v.shape[1]}.")


implementation = register("delta_rule_verify", launch, supports, ("A_log", "dt_bias", "state"))
