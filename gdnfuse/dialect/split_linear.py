"""split_linear: a linear without bias as partial sums over parts of its columns (split-K). Its reader adds them up.

A weight with few rows and many columns has too few rows for all programs. With parts of rows there is enough work, and the sum is
free if a pointwise kernel or a norm follows anyway.
"""

from __future__ import annotations

import torch

from gdnfuse.dialect.fused_linear import adapted, dequantized, example_adapters, weight_dtype
from gdnfuse.dialect.op import acc_dtype, register
from gdnfuse.formats import named


def reference(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    parts: int,
    scales: list[torch.Tensor] | None = None,
    format: str = "",
    zeros: list[torch.Tensor] | None = None,
    lora_A: list[torch.Tensor] | None = None,
    lora_B: list[torch.Tensor] | None = None,
    lora_parts: list[int] | None = None,
    lora_scaling: list[float] | None = None,
) -> torch.Tensor:
    """[x[…, pᵢ]·W[:, pᵢ]ᵀ for the i-th of `parts` equal ranges pᵢ of columns]; their sum is x·Wᵀ + adapters.

    Args:
        x: [..., N].
        weights: one [M, N].
        parts: a divisor of N.
        scales, format, zeros: as of fused_linear.
        lora_A, lora_B, lora_parts, lora_scaling: as of fused_linear. What adapters add is in the first part.

    Returns:
        [parts, ..., M] in float32 (float64 for float64 inputs).
    """
    (weight,) = dequantized(weights, scales, format, weight_dtype(x, weights, scales), zeros)
    acc = acc_dtype(x, weight)
    columns = zip(x.to(acc).chunk(parts, -1), weight.to(acc).chunk(parts, -1), strict=True)
    first, *others = [a @ w.T for a, w in columns]
    if lora_A:
        A, B = ([t.to(acc) for t in of] for of in (lora_A, lora_B))
        first = adapted(first, x, A, B, lora_parts, lora_scaling)
    return torch.stack([first, *others])


def fake(x, weights, parts, scales=None, format="", zeros=None, lora_A=None, lora_B=None, lora_parts=None, lora_scaling=None):
    (weight,) = weights
    acc = torch.promote_types(acc_dtype(x), weight_dtype(x, weights, scales))
    return torch.empty((parts, *x.shape[:-1], weight.shape[0]), dtype=acc, device=x.device)


def examples():
    data, scale = named("fp8_block128").quantize(torch.randn(130, 256))
    return [
        ((torch.randn(3, 1, 12), [torch.randn(5, 12)], 4), {}),
        ((torch.randn(2, 8), [torch.randn(3, 8)], 2), {}),
        ((torch.randn(2, 256).bfloat16(), [data], 2, [scale], "fp8_block128"), {}),
        (
            (torch.randn(2, 12).bfloat16(), [torch.randn(7, 12).bfloat16()], 3),
            example_adapters([4, 3], 12, (2, 3), torch.float32),
        ),
    ]


op = register("split_linear", reference, fake, examples, equation="(x[…, pᵢ]·W[:, pᵢ]ᵀ)ᵢ [+ s·B·A·x in the first]")
