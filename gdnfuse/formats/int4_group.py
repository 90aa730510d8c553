"""int4_group128 and the like: int4 in groups of 32, 64 or 128 columns of a row, with one scale per group.

int4_group128 is symmetric, and int4_group128_zero has zero points. compressed-tensors stores W4A16 in this way as
"pack-quantized" (compressed_tensors.compressors.pack_quantized). An int32 has eight columns, the first in its lowest bits. Each
is stored as its integer between -8 and 7 plus 8. Zero points are stored in the same way, one per group, with eight rows in an
int32. Weights of AWQ and GPTQ (arXiv 2306.00978, 2210.17323) have zero points.
"""

from __future__ import annotations

from functools import partial

import torch

from gdnfuse.errors import Refused
from gdnfuse.formats.format import register, require_dtypes

GROUPS = (32, 64, 128)
SCALES = (torch.float32, torch.bfloat16, torch.float16)
PACKED = 8  # how many columns of data, or rows of zero points, are in an int32
OFFSET = 8


def dequantize(
    group: int, data: torch.Tensor, scale: torch.Tensor, acc: torch.dtype, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """The integers in data, minus the zero points of their groups, times the scales of their groups.

    data is [..., M, N/8], zero points are [..., ⌈M/8⌉, N/group], scale is [..., M, N/group], and the result is [..., M, N] in
    `acc`.
    """
    groups = unpack(data, -1).to(acc).unflatten(-1, (-1, group))
    if zero is not None:
        groups = groups - unpack(zero, -2)[..., : data.shape[-2], :].to(acc)[..., None]
    return (groups * scale.to(acc)[..., None]).flatten(-2)


def unpack(packed: torch.Tensor, axis: int) -> torch.Tensor:
    """The integers between -8 and 7 in int32 values, eight in each, along an axis counted from the last."""
    return torch.stack([(packed >> 4 * i) & 15 for i in range(PACKED)], axis).flatten(axis - 1, axis) - OFFSET


def pack(integers: torch.Tensor, axis: int) -> torch.Tensor:
    """Pack eight integers between -8 and 7 into each int32. An incomplete last int32 is filled with zero bits."""
    integers = (integers.nan_to_num(0).to(torch.int32) + OFFSET).movedim(
        axis, -1
    )  # NaN as an integer would change the bits of its neighbours
    integers = torch.nn.functional.pad(integers, (0, -integers.shape[-1] % PACKED))
    places = integers.unflatten(-1, (-1, PACKED)) << torch.arange(0, 32, 4, dtype=torch.int32, device=integers.device)
    return places.sum(-1, dtype=torch.int32).movedim(-1, axis).contiguous()


def check(group: int, name: str, data: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> None:
    """Raise Refused unless data, scale and zero points fit the format.

    data must be int32 [..., M, N/8] with whole groups, scale [..., M, N/group] of a known dtype, and zero points, if the format
    has them, int32 [..., ⌈M/8⌉, N/group].
    """
    require_dtypes(name, data, scale, torch.int32, SCALES)
    if data.ndim < 2:
        raise Refused(f"Data of {name} must be a matrix, found the shape {list(data.shape)}.")
    columns = data.shape[-1] * PACKED
    if columns % group:
        raise Refused(f"Data of {name} must have whole groups of {group} columns, found {columns} columns.")
    wanted = [*data.shape[:-1], columns // group]
    of = f"for data of {list(data.shape)}"
    if list(scale.shape) != wanted:
        raise Refused(f"The scale of {name} must have the shape {wanted} {of}, found {list(scale.shape)}.")
    if (zero is not None) != name.endswith("_zero"):
        raise Refused(f"A weight of {name} must have {'no zero points, found some' if zero is not None else 'zero points'}.")
    if zero is not None:
        wanted[-2] = -(-wanted[-2] // PACKED)
        if zero.dtype != torch.int32 or list(zero.shape) != wanted:
            found = f"{str(zero.dtype).removeprefix('torch.')} {list(zero.shape)}"
            raise Refused(f"The zero points of {name} must be int32 {wanted} {of}, found {found}.")


def quantize(group: int, zeros: bool, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Quantise as compressed-tensors does.

    Symmetric: 7.5 scales are the largest magnitude of a group. With zero points: 15 scales are the distance from the smallest to
    the largest number of a group, zero included. The scale of a group of zeros is 1. The scale has the dtype of the weight.

    Raises:
        Refused: the columns are not a multiple of the group.
    """
    if weight.shape[-1] % group:
        raise Refused(f"A weight in groups of {group} columns must have whole ones, found {weight.shape[-1]} columns.")
    groups = weight.unflatten(-1, (-1, group))
    least, most = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    span = (most - least).float() / 15 if zeros else groups.abs().amax(-1).float() / 7.5
    scale = span.to(weight.dtype if weight.dtype in SCALES else torch.float32)
    scale = scale.masked_fill(scale == 0, 1)
    steps = groups.float() / scale.float()[..., None]
    if not zeros:
        return pack(steps.round().clamp(-8, 7).flatten(-2), -1), scale
    zero = (-8 - least.float() / scale.float()).round().clamp(-8, 7)
    return pack((steps.round() + zero[..., None]).clamp(-8, 7).flatten(-2), -1), scale, pack(zero, -2)


def _register(group: int, zeros: bool) -> None:
    name = f"int4_group{group}" + ("_zero" if zeros else "")
    scales = f"a scale and a zero point per {group} columns" if zeros else f"a scale per {group} columns"
    register(
        name=name,
        about=f"int4, {scales}",
        supported=f"int4 data, eight in an int32, with {scales.replace('a ', 'one ')} of a row",
        dequantize=partial(dequantize, group),
        check=partial(check, group, name),
        quantize=partial(quantize, group, zeros),
        rows=PACKED if zeros else 1,
        bits=4,
        columns=group,
        more=("zero points",) if zeros else (),
    )


for _zeros in (False, True):
    for _group in GROUPS:
        _register(_group, _zeros)
