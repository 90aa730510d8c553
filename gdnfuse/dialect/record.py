"""record: what enters the conv and the gates of a few tokens is kept, so that `delta_rule_commit` can replay some of them."""

from __future__ import annotations

import torch

from gdnfuse.dialect.op import register


def reference(
    x: torch.Tensor,
    context: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    windows: torch.Tensor,
    recorded_a: torch.Tensor,
    recorded_b: torch.Tensor,
) -> None:
    """windows ← [context | x] with time before channels, recorded_a ← a, recorded_b ← b, each from its first token on.

    What lies behind these tokens stays as it was.

    Args:
        x: [B, D, T], what enters the conv.
        context: [B, D, S], the columns before x, oldest first.
        a, b: [B, T, HV], the inputs of the gates.
        windows: [B, at least S + T, D], written.
        recorded_a, recorded_b: [B, at least T, HV], written.
    """
    columns = torch.cat([context.to(windows.dtype), x.to(windows.dtype)], -1)
    windows[:, : columns.shape[-1]].copy_(columns.mT)
    for recorded, gate in ((recorded_a, a), (recorded_b, b)):
        recorded[:, : gate.shape[1]].copy_(gate)


def fake(x, context, a, b, windows, recorded_a, recorded_b):
    return None


def example_tensors(B, T, D, S, HV, more=0, dtype=torch.float32):
    """Random inputs, with room for `more` tokens: x, context, a, b, windows, recorded_a, recorded_b."""
    gates = (torch.randn(B, T, HV).to(dtype) for _ in range(2))
    x, context = (torch.randn(B, D, n).to(dtype) for n in (T, S))
    room = (torch.randn(B, n + more, width).to(dtype) for n, width in ((S + T, D), (T, HV), (T, HV)))
    return x, context, *gates, *room


def examples():
    return [(example_tensors(2, 3, 6, 4, 2, more=2), {}), (example_tensors(1, 2, 5, 3, 3), {})]


op = register(
    "record",
    reference,
    fake,
    examples,
    equation="windows ← [context | x]ᵀ, recorded_a ← a, recorded_b ← b",
    mutates=("windows", "recorded_a", "recorded_b"),
)
