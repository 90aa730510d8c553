"""fp8_tensor: e4m3 data and one scale for the whole weight.

transformers' FineGrainedFP8Config without `weight_block_size` makes it, and so do checkpoints of compressed-tensors with the
strategy "tensor".
"""

from __future__ import annotations

import torch

from gdnfuse.errors import Refused
from gdnfuse.formats.format import register, require_dtypes

SCALES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def dequantize(data: torch.Tensor, scale: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    """data [M, N] times the scale, of one element, in `acc`."""
    return data.to(acc) * scale.to(acc).reshape(())


def check(data: torch.Tensor, scale: torch.Tensor) -> None:
    """Raise Refused unless data is an e4m3 matrix and scale is one element of a known dtype."""
    require_dtypes("fp8_tensor", data, scale, torch.float8_e4m3fn, SCALES)
    if data.ndim != 2:
        raise Refused(f"Data of fp8_tensor must be a matrix, found the shape {list(data.shape)}.")
    if scale.numel() != 1:
        raise Refused(f"The scale of fp8_tensor must be one number, found the shape {list(scale.shape)}.")


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale the largest magnitude to e4m3's largest number. The scale of a weight of zeros is 1."""
    largest = weight.float().abs().amax()
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (weight.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


format = register(
    name="fp8_tensor",
    about="fp8 (e4m3), one scale",
    supported="e4m3 data with one scale",
    dequantize=dequantize,
    check=check,
    quantize=quantize,
    rows=None,
    bits=8,
)
