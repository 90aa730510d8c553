"""causal_conv: depthwise causal conv over a whole prompt, with its activation."""

from __future__ import annotations

import torch

from gdnfuse.dialect.causal_conv_update import ACTIVATIONS
from gdnfuse.dialect.op import acc_dtype, need_tokens, register


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    context: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[t] = act(Σⱼ weight[j]·x[t − W + 1 + j] + bias); what lies before the first column is the context, or zero.

    Args:
        x: [B, D, T], T ≥ 1.
        weight: [D, W].
        bias: [D] or None.
        activation: "silu" or "none".
        context: [B, D, S], the columns before x, oldest first, of which the last W − 1 are read; zero where there are fewer.
        cu_seqlens: [N + 1] integers, bounds of sequences packed into each row of x, the last of which ends with x: nothing before
            an inner bound is used after it.

    Returns:
        [B, D, T] in x's dtype, one rounding from the float32 sum; D is the innermost axis in memory.

    Raises:
        ValueError: no tokens.
    """
    need_tokens("causal_conv", x.shape[-1])
    acc = acc_dtype(x, weight)
    T, W = x.shape[-1], weight.shape[-1]
    window = x.to(acc) if context is None else torch.cat([context.to(acc), x.to(acc)], -1)
    window = torch.nn.functional.pad(window, (W - 1, 0))[..., -(T + W - 1) :]
    parts = [window[..., j : j + T] * weight[:, j : j + 1].to(acc) for j in range(W)]
    if cu_seqlens is not None:
        t = torch.arange(T, device=x.device)
        first = (cu_seqlens[1:-1] + (T - cu_seqlens[-1]))[:, None]  # the tokens with which sequences begin
        parts = [p.masked_fill(((first <= t) & (first > t - (W - 1 - j))).any(0), 0) for j, p in enumerate(parts)]
    out = sum(parts)
    if bias is not None:
        out = out + bias.to(acc)[:, None]
    return ACTIVATIONS[activation](out).to(x.dtype).mT.contiguous().mT


def fake(x, weight, bias, activation, context=None, cu_seqlens=None):
    B, D, T = x.shape
    need_tokens("causal_conv", T)
    return torch.empty((B, T, D), dtype=x.dtype, device=x.device).mT


def examples():
    return [
        ((torch.randn(2, 6, 5), torch.randn(6, 4), None, "silu"), {}),
        ((torch.randn(1, 5, 2), torch.randn(5, 4), torch.randn(5), "none", torch.randn(1, 5, 4)), {}),
        ((torch.randn(1, 3, 9), torch.randn(3, 4), None, "silu", None, torch.tensor([0, 2, 3, 9])), {}),
    ]


op = register("causal_conv", reference, fake, examples, equation="act(conv1d([context | x], weight) + bias)")
