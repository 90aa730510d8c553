"""int4_group32, int4_group64 and int4_group128: integers of four bits and one scale per group of columns of a row, symmetric.

What compressed-tensors stores of W4A16 as "pack-quantized" (compressed_tensors.compressors.pack_quantized): eight columns in an
int32, the first in its lowest bits, each 8 more than the integer between -8 and 7 that it stands for.
"""

from __future__ import annotations

from functools import partial

import torch

from gdnfuse.errors import Refused
from gdnfuse.formats.format import register, require_dtypes

GROUPS = (32, 64, 128)
SCALES = (torch.float32, torch.bfloat16, torch.float16)
PACKED = 8  # columns in an int32
OFFSET = 8


def dequantize(group: int, data: torch.Tensor, scale: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    """The integers in data [..., M, N/8] times the scale [..., M, N/group] of each one's group, in `acc`: [..., M, N]."""
    integers = torch.stack([(data >> 4 * i) & 15 for i in range(PACKED)], -1).flatten(-2) - OFFSET
    return (integers.to(acc).unflatten(-1, (-1, group)) * scale.to(acc)[..., None]).flatten(-2)


def check(group: int, name: str, data: torch.Tensor, scale: torch.Tensor) -> None:
    """Raises Refused unless data is int32 [..., M, N/8] and scale [..., M, N/group] of a known dtype, with whole groups."""
    require_dtypes(name, data, scale, torch.int32, SCALES)
    if data.ndim < 2:
        raise Refused(f"Data of {name} must be a matrix, found the shape {list(data.shape)}.")
    columns = data.shape[-1] * PACKED
    if columns % group:
        raise Refused(f"Data of {name} must have whole groups of {group} columns, found {columns} columns.")
    wanted = [*data.shape[:-1], columns // group]
    if list(scale.shape) != wanted:
        of = f"for data of {list(data.shape)}"
        raise Refused(f"The scale of {name} must have the shape {wanted} {of}, found {list(scale.shape)}.")


def quantize(group: int, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As compressed-tensors does: 7.5 scales are a group's largest magnitude; a group of zeros has the scale 1.

    The scale has the weight's dtype.

    Raises:
        Refused: the columns are no whole groups.
    """
    if weight.shape[-1] % group:
        raise Refused(f"A weight in groups of {group} columns must have whole ones, found {weight.shape[-1]} columns.")
    groups = weight.float().unflatten(-1, (-1, group))
    largest = groups.abs().amax(-1)
    scale = torch.where(largest > 0, largest / 7.5, 1.0).to(weight.dtype if weight.dtype in SCALES else torch.float32)
    integers = (groups / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int32).flatten(-2) + OFFSET
    places = integers.unflatten(-1, (-1, PACKED)) << torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)
    return places.sum(-1, dtype=torch.int32), scale


def _register(group: int) -> None:
    name = f"int4_group{group}"
    register(
        name=name,
        about=f"int4, a scale per {group} columns",
        supported=f"int4 data, eight in an int32, with one scale per {group} columns of a row",
        dequantize=partial(dequantize, group),
        check=partial(check, group, name),
        quantize=partial(quantize, group),
        rows=1,
        bits=4,
        columns=group,
    )


for _group in GROUPS:
    _register(_group)
