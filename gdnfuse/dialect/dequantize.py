"""dequantize: the floating weight that quantised data and their scale represent.

A quantised weight is a value of the graph, so anything that takes the weight of a linear can take it. If a kernel reads data and
scale itself, the lowering passes both, and the weight is never made.
"""

from __future__ import annotations

import torch

from gdnfuse import formats
from gdnfuse.dialect.op import register


def reference(
    data: torch.Tensor, scale: torch.Tensor, format: str, dtype: torch.dtype, more: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """The weight as the format's own library makes it, computed in float32 (float64 if any input is) and rounded once.

    Args:
        data: [M, N] as stored, or [E, M, N] of experts; fewer columns if an element holds several.
        scale: as the format has it.
        format: a name of `gdnfuse.formats.FORMATS`.
        dtype: of the weight.
        more: what else the format stores, such as zero points, in order; None for nothing.

    Returns:
        [M, N] or [E, M, N].

    Raises:
        Refused: there is no such format.
    """
    acc = formats.acc_dtype(data.dtype, scale.dtype, dtype)
    return formats.named(format).dequantize(data, scale, acc, *(more or ())).to(dtype).contiguous()


def fake(data, scale, format, dtype, more=None):
    formats.named(format).check(data, scale, *(more or ()))  # a scale of another shape might broadcast to a wrong weight
    return torch.empty(formats.named(format).shape(data), dtype=dtype, device=data.device)


def examples():
    made = [
        ("fp8_block128", (256, 128), torch.bfloat16), ("fp8_block128", (130, 200), torch.float32),
        ("fp8_block128", (2, 128, 130), torch.float16), ("fp8_tensor", (5, 8), torch.float32),
        ("int8_channel", (5, 8), torch.bfloat16), ("fp8_channel", (5, 8), torch.float32),
        ("int4_group32", (5, 64), torch.bfloat16), ("int4_group32_zero", (5, 64), torch.bfloat16),
        ("nf4_block64", (5, 64), torch.bfloat16),
    ]  # fmt: skip
    stored = [(formats.named(name).quantize(torch.randn(shape)), name, dtype) for name, shape, dtype in made]
    return [((data, scale, name, dtype, more or None), {}) for (data, scale, *more), name, dtype in stored]


op = register("dequantize", reference, fake, examples, equation="W = scale · data")
