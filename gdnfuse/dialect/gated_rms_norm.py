"""gated_rms_norm: RMSNorm(o) · w · act(z), the output norm of Gated DeltaNet."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gdnfuse.dialect.op import acc_dtype, register

GATES = {"silu": F.silu, "sigmoid": torch.sigmoid}


def reference(o: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, activation: str = "silu") -> torch.Tensor:
    """Norm before gate, both in float32; one rounding at the end.

    Args:
        o: [..., V].
        z: [..., V], the gate, of o's shape.
        weight: [V].
        eps: added to the mean square.
        activation: of the gate, "silu" or "sigmoid".

    Returns:
        [..., V] in z's dtype.
    """
    acc = acc_dtype(o, z, weight)
    x = o.to(acc)
    x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return (weight.to(acc) * x * GATES[activation](z.to(acc))).to(z.dtype).contiguous()


def fake(o, z, weight, eps, activation="silu"):
    return torch.empty(o.shape, dtype=z.dtype, device=o.device)


def examples():
    return [
        ((torch.randn(6, 8), torch.randn(6, 8), torch.randn(8), 1e-6), {}),
        ((torch.randn(2, 1, 4, 16), torch.randn(2, 1, 4, 16).bfloat16(), torch.randn(16).bfloat16(), 1e-5, "sigmoid"), {}),
    ]


op = register("gated_rms_norm", reference, fake, examples, equation="o · rsqrt(mean(o²) + eps) · w · act(z)")
