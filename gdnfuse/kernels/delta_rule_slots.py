"""The gated delta rule over a few tokens, gates inside, with a state for each token in slots of a pool.

It is the kernel of `gdnfuse/kernels/delta_rule.py`, which describes it. A program looks up where its state is, and stores a state
after each token.
"""

from __future__ import annotations

import torch

from gdnfuse.errors import Refused
from gdnfuse.kernels.delta_rule import launch_rule
from gdnfuse.kernels.delta_rule import supports as supports_rule
from gdnfuse.kernels.launch.implementation import register


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    accepted: torch.Tensor,
    scale: float,
    l2norm_eps: float | None = None,
    beta_scale: float = 1.0,
) -> torch.Tensor:
    """The dialect's delta_rule_slots.

    Args:
        q, k: [B, T, H, K], any strides.
        v: [B, T, HV, V], any strides.
        a, b: [B, T, HV], before the nonlinearities, any strides.
        A_log, dt_bias: [HV].
        states: [slots, HV, K, V], any strides, written in place.
        slots: [B, T], int32 or int64, below the number of slots, which is not checked; negative ones stand for no slot.
        accepted: [B], int32 or int64, from 0 to T, which is not checked.
        scale: factor on q.
        l2norm_eps: if given, q and k are l2-normalised with it first.
        beta_scale: factor on σ(b).

    Returns:
        o [B, T, HV, V] in float32.
    """
    # The kernel before this one may decide which states are read, so they cannot be loaded early.
    held = {"slots": slots.contiguous(), "accepted": accepted.contiguous()}
    return launch_rule(q, k, v, a, b, A_log, dt_bias, states, scale, l2norm_eps, beta_scale, overlap=False, write=False, **held)


def supports(q, k, v, a, b, A_log, dt_bias, states, slots, accepted, scale, l2norm_eps=None, beta_scale=1.0) -> None:
    """Raise Refused unless slots and accepted are int32 or int64, and for the same reasons as the rule without slots."""
    supports_rule(q, k, v, a, b, A_log, dt_bias, states, scale, l2norm_eps, beta_scale)
    for name, x in (("slots", slots), ("accepted", accepted)):
        if x.dtype not in (torch.int32, torch.int64):
            raise Refused(f"{name} must be int32 or int64, found {str(x.dtype).removeprefix('torch.')}.")


implementation = register("delta_rule_slots", launch, supports)
