"""causal_conv_update: depthwise causal conv over the cached window and the new tokens, with its activation; cache in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gdnfuse.dialect.op import acc_dtype, need_tokens, register

ACTIVATIONS = {"silu": F.silu, "none": lambda x: x}


def reference(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """Append x to the window, convolve each channel with its own W taps, keep the last columns as the new window.

    Args:
        x: [B, D, T], T ≥ 1.
        conv_state: [B, D, S], the last S ≥ W − 1 inputs of every channel, oldest first; written in place.
        weight: [D, 1, W] as nn.Conv1d stores it.
        bias: [D] or None.
        activation: "silu" or "none".

    Returns:
        [B, D, T] in float32 (float64 for float64 inputs).

    Raises:
        ValueError: no tokens.
    """
    need_tokens("causal_conv_update", x.shape[-1])
    acc = acc_dtype(x, weight)
    T, W, S = x.shape[-1], weight.shape[-1], conv_state.shape[-1]
    window = torch.cat([conv_state.to(acc), x.to(acc)], -1)
    first = S - (W - 1)
    out = sum(window[..., first + j : first + j + T] * weight[:, :, j].to(acc) for j in range(W))
    if bias is not None:
        out = out + bias.to(acc)[:, None]
    conv_state.copy_(window[..., T:])
    return ACTIVATIONS[activation](out)


def fake(x, conv_state, weight, bias, activation):
    need_tokens("causal_conv_update", x.shape[-1])
    return torch.empty(x.shape, dtype=acc_dtype(x, weight), device=x.device)


def examples():
    return [
        ((torch.randn(2, 12, 1), torch.randn(2, 12, 4), torch.randn(12, 1, 4), None, "silu"), {}),
        ((torch.randn(1, 5, 3), torch.randn(1, 5, 3), torch.randn(5, 1, 4), torch.randn(5), "none"), {}),
    ]


op = register(
    "causal_conv_update",
    reference,
    fake,
    examples,
    equation="act(conv1d([conv_state | x], weight) + bias); conv_state ← last columns",
    mutates=("conv_state",),
)
