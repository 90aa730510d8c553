"""causal_conv_record: the causal conv of a few tokens, and `record` of what enters it and the gates."""

from __future__ import annotations

import torch

from gdnfuse.dialect.causal_conv import reference as causal_conv
from gdnfuse.dialect.op import need_tokens, register
from gdnfuse.dialect.record import example_tensors
from gdnfuse.dialect.record import reference as record


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    context: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    windows: torch.Tensor,
    recorded_a: torch.Tensor,
    recorded_b: torch.Tensor,
) -> torch.Tensor:
    """record(x, context, a, b, windows, recorded_a, recorded_b), and causal_conv(x, weight, bias, activation, context).

    Args:
        x: [B, D, T], T ≥ 1.
        weight: [D, W].
        bias: [D] or None.
        activation: "silu" or "none".
        context: [B, D, S], the columns before x, oldest first, of which the conv reads the last W − 1.
        a, b: [B, T, HV], the inputs of the gates.
        windows: [B, at least S + T, D], written.
        recorded_a, recorded_b: [B, at least T, HV], written.

    Returns:
        [B, D, T] in x's dtype, one rounding from the float32 sum; D is the innermost axis in memory.

    Raises:
        ValueError: no tokens.
    """
    record(x, context, a, b, windows, recorded_a, recorded_b)
    return causal_conv(x, weight, bias, activation, context)


def fake(x, weight, bias, activation, context, a, b, windows, recorded_a, recorded_b):
    B, D, T = x.shape
    need_tokens("causal_conv", T)
    return torch.empty((B, T, D), dtype=x.dtype, device=x.device).mT


def examples():
    calls = []
    for (B, T, D, S, HV, more), bias, activation in (((2, 3, 6, 4, 2, 2), False, "silu"), ((1, 2, 5, 3, 3, 0), True, "none")):
        x, context, *rest = example_tensors(B, T, D, S, HV, more)
        calls.append(((x, torch.randn(D, 4), torch.randn(D) if bias else None, activation, context, *rest), {}))
    return calls


op = register(
    "causal_conv_record",
    reference,
    fake,
    examples,
    equation="act(conv1d([context | x], weight) + bias); windows ← [context | x]ᵀ, recorded_a ← a, recorded_b ← b",
    mutates=("windows", "recorded_a", "recorded_b"),
)
