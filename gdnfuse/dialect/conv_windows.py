"""conv_windows: what a cache would hold of a conv's input after every so many tokens of a prompt."""

from __future__ import annotations

import torch

from gdnfuse.dialect.op import register


def reference(x: torch.Tensor, v: torch.Tensor, every: int, width: int) -> torch.Tensor:
    """The last columns of x before the tokens every, 2·every, … of a prompt.

    Args:
        x: [B, D, S + T], the conv's input, of which the last T columns are the prompt's.
        v: [B, T, …], any tensor with the length of the prompt.
        every: tokens, at least `width`.
        width: columns of each window.

    Returns:
        [B, T // every, D, width] in x's dtype.

    Raises:
        ValueError: every is less than width.
    """
    if every < width:
        raise ValueError(f"Windows of {width} columns need as many tokens between them, found {every}.")
    n, first = v.shape[1] // every, x.shape[2] - v.shape[1]
    tokens = x[:, :, first : first + n * every].unflatten(2, (n, every))
    return tokens[..., -width:].transpose(1, 2).contiguous()


def fake(x, v, every, width):
    B, D, _ = x.shape
    return torch.empty((B, v.shape[1] // every, D, width), dtype=x.dtype, device=x.device)


def examples():
    return [
        ((torch.randn(2, 6, 70), torch.randn(2, 70, 3), 16, 4), {}),
        ((torch.randn(1, 5, 12), torch.randn(1, 8, 2, 2), 4, 4), {}),
    ]


# The length is known only at run time. In a graph this is at most one small copy.
op = register("conv_windows", reference, fake, examples, equation="x[t − W … t − 1] at each t = every, 2·every, …", inline=False)
