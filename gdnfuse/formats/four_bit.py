"""nf4 and fp4: entries of a table of 16, and the largest magnitude of each block of elements, which may be quantised too.

What bitsandbytes' Linear4bit stores (QLoRA, arXiv 2305.14314): two columns in a byte, the first in its upper bits; blocks of 32
to 4096 elements of the matrix, row by row. With double quantisation the magnitudes are bytes: an entry of a table of 256, times a
number for each 256 of them, plus an offset for all.
"""

from __future__ import annotations

from functools import partial

import torch

from gdnfuse.errors import Refused
from gdnfuse.formats.format import register

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # elements
NESTED = 256  # magnitudes that are quantised together
MORE = ("its table", "the magnitudes' own scale", "table", "offset")


def dequantize(
    data: torch.Tensor, scale: torch.Tensor, acc: torch.dtype, table: torch.Tensor, *nested: torch.Tensor
) -> torch.Tensor:
    """The table's entries for data [M, N/2], times the magnitude of each one's block, in `acc`: [M, N].

    Args:
        data: uint8.
        scale: [M·N/block], float32, or uint8 where magnitudes are quantised.
        acc: of the result.
        table: [16], float32.
        nested: where magnitudes are quantised a float32 for each 256 of them, a table [256] and an offset of one element.
    """
    M, N = data.shape[0], 2 * data.shape[1]
    if nested:
        own, entries, offset = (x.to(acc) for x in nested)
        scale = entries[scale.long()] * own.repeat_interleave(NESTED)[: len(scale)] + offset
    places = torch.stack([data >> 4, data & 15], -1).reshape(len(scale), -1)
    return (table.to(acc)[places.long()] * scale.to(acc)[:, None]).reshape(M, N)


def check(name: str, data: torch.Tensor, scale: torch.Tensor, *more: torch.Tensor) -> None:
    """Raises Refused unless these are what `dequantize` takes, with whole blocks."""
    if data.dtype != torch.uint8 or data.ndim != 2:
        raise Refused(f"Data of {name} must be a matrix of uint8, found {_short(data)}.")
    elements = 2 * data.numel()
    if scale.ndim != 1 or scale.shape[0] == 0 or (elements / scale.shape[0]) not in BLOCKS:
        raise Refused(
            f"The scale of {name} must be one number for each block of {', '.join(map(str, BLOCKS))} elements, of which there "
            f"are {elements}, found {_short(scale)}."
        )
    nested = -(-scale.shape[0] // NESTED)
    wanted = {1: [(torch.float32, 16)], 4: [(torch.float32, n) for n in (16, nested, 256, 1)]}.get(len(more))
    if wanted is None or [(x.dtype, x.numel()) for x in more] != wanted:
        raise Refused(
            f"Beside data and scale {name} must have a table of 16, and where its scale is quantised {nested} numbers, a table "
            f"of 256 and an offset, in float32, found {', '.join(map(_short, more)) or 'nothing'}."
        )
    if scale.dtype != (of := torch.uint8 if len(more) > 1 else torch.float32):
        raise Refused(f"The scale of {name} must be {str(of).removeprefix('torch.')} here, found {_short(scale)}.")


def _short(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _register(name: str) -> None:
    register(
        name=name,
        about=f"{name}, two in a byte, a magnitude per block",
        supported=f"{name} data of bitsandbytes, two in a byte, with one magnitude per block",
        dequantize=dequantize,
        check=partial(check, name),
        quantize=None,
        rows=None,
        bits=4,
        columns=2,
        more=MORE,
    )


for _name in ("nf4", "fp4"):
    _register(_name)
