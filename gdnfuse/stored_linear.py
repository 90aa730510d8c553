"""A linear whose weight is quantised data and a scale, under the names that compressed-tensors gives them.

In a graph of gdnfuse its weight is a `dequantize`; everywhere else, eager calls included, it is dequantised at each call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from gdnfuse import capture, formats
from gdnfuse.dialect import dequantize

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class StoredLinear(torch.nn.Linear):
    """x·Wᵀ with W = dequantize(data, scale), in x's dtype; activations are not quantised.

    A cast of the model, as by `model.to(torch.bfloat16)`, leaves data and scale as they are stored.

    Attributes:
        format: a name of `gdnfuse.formats.FORMATS`.
        weight_packed, weight_shape: the data of a format with several columns in an element, and the weight's shape, int64 [2].
        weight: the data of any other format.
        weight_scale: the scale.
    """

    def __init__(self, format: str, data: torch.Tensor, scale: torch.Tensor, bias: torch.nn.Parameter | None = None):
        """
        Raises:
            Refused: data and scale are not what the format has.
        """
        found = formats.named(format)
        found.check(data, scale)
        M, N = found.shape(data)
        with torch.device("meta"):
            super().__init__(N, M, bias=False)
        del self.weight
        self.format, self.packed = format, N != data.shape[-1]
        for name, tensor in (("weight_packed" if self.packed else "weight", data), ("weight_scale", scale)):
            kept = isinstance(tensor, torch.nn.Parameter)
            setattr(self, name, tensor if kept else torch.nn.Parameter(tensor, requires_grad=False))
        if self.packed:
            self.register_parameter("weight", None)  # which peft asks for first
            self.weight_shape = torch.nn.Parameter(torch.tensor([M, N], device=data.device), requires_grad=False)
        self.bias = bias

    @property
    def qweight(self) -> torch.Tensor:
        """The data under the name by which peft takes the device of a linear that has no plain weight."""
        return self.stored()[0]

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Data and scale."""
        return self.weight_packed if self.packed else self.weight, self.weight_scale

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> torch.nn.Module:
        """What torch calls for `to`, `half` and their like. They cast no integers, so data and scale go as such."""
        stored = self.stored()

        def apply(x: torch.Tensor) -> torch.Tensor:
            return fn(x.view(INTEGERS[x.itemsize])).view(x.dtype) if any(x is s for s in stored) else fn(x)

        return super()._apply(apply, recurse)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        data, scale = self.stored()
        if capture.wanted():
            weight = torch.ops.gdnfuse.dequantize.default(data, scale, self.format, input.dtype)
        else:  # so that another compiler sees what is computed
            weight = dequantize.reference(data, scale, self.format, input.dtype)
        return F.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format}"
