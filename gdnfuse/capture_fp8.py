"""Capture of FP8 linears: transformers' `fp8_linear` becomes torch's linear on a dequantised weight.

transformers quantises the activations too, to eight bits at every call (W8A8), and needs a kernel from the hub or DeepGEMM for
that. Here weights alone are quantised and activations stay in the model's dtype, which is nearer to what the checkpoint means. An
`activation_scale`, which says how to quantise them, is not needed then.

A GPU's kernels are all that the function has, so it cannot be run in a proof. Proved is instead what loading with
`dequantize=True` makes of such weights.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from gdnfuse import formats
from gdnfuse.errors import Refused

MODULE = "transformers.integrations.finegrained_fp8"
FUNCTION = "fp8_linear"
PARAMETERS = ("input", "weight", "weight_scale_inv", "block_size", "bias", "activation_scale", "allow_deepgemm")


def call(input, weight, weight_scale_inv, block_size=None, bias=None, activation_scale=None, allow_deepgemm=True):
    name = "fp8_tensor" if block_size is None else "fp8_block128"
    dequantized = torch.ops.gdnfuse.dequantize.default(weight, weight_scale_inv, name, input.dtype)
    if bias is None:
        return F.linear(input, dequantized)
    if bias.dtype == input.dtype:
        return F.linear(input, dequantized, bias)
    return (F.linear(input, dequantized) + bias).to(input.dtype)


def accepts(input, weight, weight_scale_inv, block_size=None, bias=None, activation_scale=None, allow_deepgemm=True):
    """Whether the weight is of a format that is known. Dynamo traces it; of whatever else the function's own code runs."""
    if not _plain(type(weight)) or not _plain(type(weight_scale_inv)) or not input.is_floating_point():
        return False
    if weight.device != input.device or weight_scale_inv.device != input.device:
        return False
    if block_size is not None and not (block_size[0] == 128 and block_size[1] == 128):
        return False
    sizes = (tuple(weight.shape), tuple(weight_scale_inv.shape))
    return _known("fp8_tensor" if block_size is None else "fp8_block128", *sizes, weight.dtype, weight_scale_inv.dtype)


@torch.compiler.assume_constant_result
def _plain(cls: type) -> bool:
    return cls in (torch.Tensor, torch.nn.Parameter)


@torch.compiler.assume_constant_result
def _known(name: str, data: tuple[int, ...], scale: tuple[int, ...], data_dtype: torch.dtype, scale_dtype: torch.dtype) -> bool:
    try:
        formats.named(name).check(
            torch.empty(data, dtype=data_dtype, device="meta"), torch.empty(scale, dtype=scale_dtype, device="meta")
        )
    except Refused:
        return False
    return True


def found(name: str, module: types.ModuleType) -> Iterator[tuple[str, Any, None]]:
    """The name of the function and the function, where a module is the one that has it."""
    if name == MODULE and FUNCTION in vars(module):
        yield FUNCTION, vars(module)[FUNCTION], None


def keep(function: types.FunctionType) -> None:
    """Prove what the weights of a function mean.

    Raises:
        Refused: it has other parameters, or transformers dequantises its weights otherwise than we do.
    """
    given = tuple(inspect.signature(function).parameters)
    if given != PARAMETERS:
        raise Refused(f"{FUNCTION} must have the parameters {', '.join(PARAMETERS)}, found {', '.join(given)}.")
    generator = torch.Generator().manual_seed(0)
    for name, scale_shape in (("fp8_block128", (2, 3)), ("fp8_tensor", (1, 1))):
        data = torch.randn(256, 384, generator=generator).to(torch.float8_e4m3fn)
        scale = torch.rand(scale_shape, generator=generator) + 0.5
        wanted = vars(sys.modules[MODULE])["Fp8Dequantize"](None).convert({"w.weight": [data], "w.weight_scale_inv": [scale]})
        if not torch.equal(wanted["w.weight"][0], formats.named(name).dequantize(data, scale, torch.float32)):
            raise Refused(f"Weights of {name} must mean what transformers' Fp8Dequantize makes of them, found other values.")
