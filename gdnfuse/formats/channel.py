"""int8_channel and fp8_channel: int8 or e4m3 data and one scale per row.

torchao's Int8WeightOnlyConfig and Float8WeightOnlyConfig make them (torchao.quantization). They are symmetric, without zero
points.
"""

from __future__ import annotations

from functools import partial

import torch

from gdnfuse.errors import Refused
from gdnfuse.formats.format import register, require_dtypes

SCALES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max}


def dequantize(data: torch.Tensor, scale: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    """data [..., M, N] times the scale [..., M, 1], in `acc`."""
    return data.to(acc) * scale.to(acc)


def check(name: str, dtype: torch.dtype, data: torch.Tensor, scale: torch.Tensor) -> None:
    """Raise Refused unless data is [..., M, N] of `dtype` and scale is [..., M, 1] of a known dtype."""
    require_dtypes(name, data, scale, dtype, SCALES)
    if data.ndim < 2:
        raise Refused(f"Data of {name} must be a matrix, found the shape {list(data.shape)}.")
    if list(scale.shape) != [*data.shape[:-1], 1]:
        wanted, of = [*data.shape[:-1], 1], f"for data of {list(data.shape)}"
        raise Refused(f"The scale of {name} must have the shape {wanted} {of}, found {list(scale.shape)}.")


def quantize(dtype: torch.dtype, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale each row's largest magnitude to the largest number; 1 for a row of zeros. Scales have the dtype of the weight."""
    largest = weight.float().abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / LARGEST[dtype], 1.0).to(weight.dtype if weight.dtype in SCALES else torch.float32)
    data = (weight.float() / scale.float()).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (data if dtype.is_floating_point else data.round()).to(dtype), scale


def _register(name: str, about: str, dtype: torch.dtype) -> None:
    register(
        name=name,
        about=f"{about}, a scale per row",
        supported=f"{about} data with one scale per row",
        dequantize=dequantize,
        check=partial(check, name, dtype),
        quantize=partial(quantize, dtype),
        rows=1,
        bits=8,
    )


_register("int8_channel", "int8", torch.int8)
_register("fp8_channel", "fp8 (e4m3)", torch.float8_e4m3fn)
