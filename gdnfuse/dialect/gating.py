"""gating: g = −exp(A_log) · softplus(a + dt_bias), the log decay of Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gdnfuse.dialect.op import acc_dtype, register


def reference(a: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    """Log decay of every value head.

    Args:
        a: [..., HV], the projection `in_proj_a` of the hidden states.
        A_log: [HV].
        dt_bias: [HV].

    Returns:
        g of shape [..., HV], ≤ 0, in float32 (float64 for float64 inputs).
    """
    acc = acc_dtype(a, A_log, dt_bias)
    return (-A_log.to(acc).exp() * F.softplus(a.to(acc) + dt_bias.to(acc))).contiguous()


def fake(a: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    return torch.empty(a.shape, dtype=acc_dtype(a, A_log, dt_bias), device=a.device)


def examples():
    return [
        ((torch.randn(2, 1, 4), torch.randn(4), torch.randn(4)), {}),
        ((torch.randn(2, 3, 4).half() * 30, torch.randn(4), torch.randn(4)), {}),
    ]


op = register("gating", reference, fake, examples, equation="g = −exp(A_log) · softplus(a + dt_bias)")
