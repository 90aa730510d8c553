"""fp8_block128: e4m3 data and one scale per block of 128 × 128. The last blocks of rows and columns may be smaller.

DeepSeek-V3 (arXiv 2412.19437, section 3.3) was trained with it, and the official FP8 checkpoints of Qwen use it. transformers'
FineGrainedFP8Config calls the scale `weight_scale_inv`. A scale of e8m0 is a power of two.
"""

from __future__ import annotations

import torch

from gdnfuse.errors import Refused
from gdnfuse.formats.format import register, require_dtypes

BLOCK = 128
SCALES = tuple(getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float8_e8m0fnu") if hasattr(torch, name))
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def dequantize(data: torch.Tensor, scale: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    """data [..., M, N] times the scale [..., ⌈M/128⌉, ⌈N/128⌉] of each element's block, in `acc`."""
    M, N = data.shape[-2:]
    wide, scale = data.to(acc), scale.to(acc)
    whole = N // BLOCK
    if M % BLOCK or N % BLOCK:
        rows = scale.repeat_interleave(BLOCK, -2)[..., :M, :]
        blocks = wide[..., : whole * BLOCK].unflatten(-1, (whole, BLOCK)) * rows[..., :whole, None]
        # Columns after the last whole block are computed separately. In a loop over a row that uses the block of the column as
        # an index, Inductor of torch 2.13 leaves these columns out on a CPU.
        rest = wide[..., whole * BLOCK :] * rows[..., whole:]
        return torch.cat([blocks.flatten(-2), rest], -1) if N % BLOCK else blocks.flatten(-2)
    blocks = wide.unflatten(-1, (whole, BLOCK)).unflatten(-3, (M // BLOCK, BLOCK))
    return (blocks * scale[..., :, None, :, None]).flatten(-4, -3).flatten(-2)


def check(data: torch.Tensor, scale: torch.Tensor) -> None:
    """Raise Refused unless data is e4m3 [..., M, N] and scale is [..., ⌈M/128⌉, ⌈N/128⌉] of a known dtype."""
    require_dtypes("fp8_block128", data, scale, torch.float8_e4m3fn, SCALES)
    if data.ndim < 2:
        raise Refused(f"Data of fp8_block128 must be a matrix, found the shape {list(data.shape)}.")
    wanted = [*data.shape[:-2], *(-(-size // BLOCK) for size in data.shape[-2:])]
    if list(scale.shape) != wanted:
        of = f"for data of {list(data.shape)}"
        raise Refused(f"The scale of fp8_block128 must have the shape {wanted} {of}, found {list(scale.shape)}.")


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale the largest magnitude of each block to e4m3's largest number. The scale of a block of zeros is 1."""
    M, N = weight.shape[-2:]
    rows, columns = -(-M // BLOCK), -(-N // BLOCK)
    wide = torch.nn.functional.pad(weight.float(), (0, columns * BLOCK - N, 0, rows * BLOCK - M))
    blocks = wide.unflatten(-1, (columns, BLOCK)).unflatten(-3, (rows, BLOCK))
    largest = blocks.abs().amax((-3, -1))
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    data = (blocks / scale[..., :, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return data.flatten(-4, -3).flatten(-2)[..., :M, :N].contiguous(), scale


format = register(
    name="fp8_block128",
    about="fp8 (e4m3), a scale per 128 × 128",
    supported="e4m3 data with one scale per block of 128 × 128",
    dequantize=dequantize,
    check=check,
    quantize=quantize,
    rows=BLOCK,
    bits=8,
)
