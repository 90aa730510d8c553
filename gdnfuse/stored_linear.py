"""A linear with a quantised weight: data, a scale and maybe zero points, with the names that compressed-tensors gives them.

In a graph of gdnfuse its weight is a `dequantize`. Everywhere else, eager calls included, it is dequantised at each call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gdnfuse import capture, compat, formats
from gdnfuse.dialect import dequantize
from gdnfuse.errors import Refused


@compat.not_cast
class StoredLinear(torch.nn.Linear):
    """x·Wᵀ with W = dequantize(data, scale), in the dtype of x. Activations are not quantised.

    A cast of the model, such as `model.to(torch.bfloat16)`, does not change what is stored.

    Attributes:
        format: a name of `gdnfuse.formats.FORMATS`.
        weight_packed, weight_shape: the data of a format with several columns per element, and the shape of the weight, int64
            [2].
        weight: the data of any other format.
        weight_scale: the scale.
        weight_zero_point: the zero points of a format that has them.
    """

    def __init__(self, format: str, data: torch.Tensor, *more: torch.Tensor, bias: torch.nn.Parameter | None = None):
        """
        Args:
            format: a name of `gdnfuse.formats.FORMATS`.
            data: what the format stores.
            more: its scale, and its zero points if it has them.
            bias: of the linear, or None.

        Raises:
            Refused: data, scale and zero points are not what the format has, or the format is one that only bitsandbytes makes.
        """
        found = formats.named(format)
        if not found.quantize:
            raise Refused(f"A StoredLinear must have a format that gdnfuse quantises to, found {format} of bitsandbytes.")
        found.check(data, *more)
        M, N = found.shape(data)
        with torch.device("meta"):
            super().__init__(N, M, bias=False)
        del self.weight
        self.format, self.packed = format, N != data.shape[-1]
        self.names = ("weight_packed" if self.packed else "weight", "weight_scale", "weight_zero_point")[: 1 + len(more)]
        for name, tensor in zip(self.names, (data, *more), strict=True):
            kept = isinstance(tensor, torch.nn.Parameter)
            setattr(self, name, tensor if kept else torch.nn.Parameter(tensor, requires_grad=False))
        if self.packed:
            self.register_parameter("weight", None)  # peft looks for this name first
            self.weight_shape = torch.nn.Parameter(torch.tensor([M, N], device=data.device), requires_grad=False)
        self.bias = bias

    @property
    def qweight(self) -> torch.Tensor:
        """The data, under the name by which peft finds the device of a linear without a plain weight."""
        return self.stored()[0]

    def stored(self) -> tuple[torch.Tensor, ...]:
        """Data, scale and, if the format has them, zero points."""
        return tuple(getattr(self, name) for name in self.names)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        data, scale, *more = self.stored()
        if not torch.compiler.is_compiling():  # in a graph the op checks them once
            formats.named(self.format).check(data, scale, *more)
        if capture.wanted():
            weight = torch.ops.gdnfuse.dequantize.default(data, scale, self.format, input.dtype, more or None)
        else:  # so that another compiler can see the computation
            weight = dequantize.reference(data, scale, self.format, input.dtype, more or None)
        return F.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format}"
