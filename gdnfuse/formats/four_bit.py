"""nf4 and fp4: indices into a table of 16 values, and the largest magnitude of each block of elements.

This is what bitsandbytes' Linear4bit stores (QLoRA, arXiv 2305.14314). A byte has two columns, the first in its upper bits.
Blocks have 32 to 4096 elements of the matrix, row by row. With double quantisation the magnitudes are quantised too: a byte is an
index into a table of 256 values, which is multiplied with a number per 256 magnitudes, plus one offset for all. These are the
formats "nf4" and "fp4".

If blocks of 64 or 128 elements fill rows, each row has its own magnitudes. With these as float32, the format is "nf4_block64" and
so on. Kernels read these formats, and their rows may be placed one after the other.
"""

from __future__ import annotations

from functools import partial

import torch

from gdnfuse.errors import Refused
from gdnfuse.formats.format import register, require_dtypes

# bitsandbytes stores these in float32.
TABLES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
        *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
    ),
}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # elements
OF_ROWS = (64, 128)  # those that may fill rows
NESTED = 256  # how many magnitudes are quantised together
MORE = ("the magnitudes' own scale", "table", "offset")


def dequantize(name: str, data: torch.Tensor, scale: torch.Tensor, acc: torch.dtype, *nested: torch.Tensor) -> torch.Tensor:
    """The table's values for data [M, N/2], times the magnitude of each block, in `acc`: [M, N].

    Args:
        name: name of the table.
        data: uint8.
        scale: [M·N/block], or [M, N/block] if rows have their own; float32, or uint8 if magnitudes are quantised.
        acc: dtype of the result.
        nested: if magnitudes are quantised: a float32 for each 256 of them, a table [256] and an offset of one element.
    """
    M, N = data.shape[0], 2 * data.shape[1]
    scale = magnitudes(scale, *nested, acc=acc) if nested else scale.to(acc).flatten()
    places = torch.stack([data >> 4, data & 15], -1).reshape(len(scale), -1)
    return (_entries(name, places, acc) * scale[:, None]).reshape(M, N)


def magnitudes(
    scale: torch.Tensor, own: torch.Tensor, table: torch.Tensor, offset: torch.Tensor, acc: torch.dtype = torch.float32
) -> torch.Tensor:
    """The magnitudes that uint8 [n] represent, in `acc`."""
    own, table, offset = (x.to(acc) for x in (own, table, offset))
    return table[scale.long()] * own.repeat_interleave(NESTED)[: len(scale)] + offset


def _entries(name: str, places: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    """The table's value at each index, chosen bit by bit. A graph would have to copy a table to its device."""
    entries = [torch.full((), entry, dtype=acc, device=places.device) for entry in TABLES[name]]
    for bit in range(4):
        chosen = (places >> bit & 1).bool()
        entries = [torch.where(chosen, odd, even) for even, odd in zip(entries[::2], entries[1::2], strict=True)]
    return entries[0]


def check(name: str, data: torch.Tensor, scale: torch.Tensor, *nested: torch.Tensor) -> None:
    """Raise Refused unless these are valid arguments of `dequantize`, with whole blocks."""
    if data.dtype != torch.uint8 or data.ndim != 2:
        raise Refused(f"Data of {name} must be a matrix of uint8, found {_short(data)}.")
    elements = 2 * data.numel()
    if scale.ndim != 1 or scale.shape[0] == 0 or (elements / scale.shape[0]) not in BLOCKS:
        raise Refused(
            f"The scale of {name} must be one number for each block of {', '.join(map(str, BLOCKS))} elements, of which there "
            f"are {elements}, found {_short(scale)}."
        )
    groups = -(-scale.shape[0] // NESTED)
    wanted = {0: [], 3: [(torch.float32, n) for n in (groups, 256, 1)]}.get(len(nested))
    if wanted is None or [(x.dtype, x.numel()) for x in nested] != wanted:
        raise Refused(
            f"Besides data and scale {name} must have nothing, or if its scale is quantised {groups} numbers, a table of 256 "
            f"and an offset, in float32, found {', '.join(map(_short, nested))}."
        )
    if scale.dtype != (of := torch.uint8 if nested else torch.float32):
        raise Refused(f"The scale of {name} must be {str(of).removeprefix('torch.')} here, found {_short(scale)}.")


def check_rows(block: int, name: str, data: torch.Tensor, scale: torch.Tensor) -> None:
    """Raise Refused unless data is uint8 [M, N/2] and scale is float32 [M, N/block], with whole blocks in each row."""
    require_dtypes(name, data, scale, torch.uint8, (torch.float32,))
    if data.ndim != 2:
        raise Refused(f"Data of {name} must be a matrix, found the shape {list(data.shape)}.")
    M, N = data.shape[0], 2 * data.shape[1]
    if N % block:
        raise Refused(f"Data of {name} must have whole blocks of {block} columns in each row, found {N} columns.")
    if list(scale.shape) != [M, N // block]:
        wanted = f"the shape {[M, N // block]} for data of {list(data.shape)}"
        raise Refused(f"The scale of {name} must have {wanted}, found {list(scale.shape)}.")


def quantize(block: int, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise as bitsandbytes does: divide by the magnitude of the block and take the nearest table value.

    Returns:
        Data and scale.

    Raises:
        Refused: rows do not have whole blocks.
    """
    if weight.shape[-1] % block:
        raise Refused(
            f"A weight in blocks of {block} columns must have whole ones in each row, found {weight.shape[-1]} columns."
        )
    blocks = weight.float().unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1)
    entries, places = torch.tensor(TABLES[name], dtype=torch.float32, device=weight.device).sort(stable=True)
    parts = (blocks / scale.masked_fill(scale == 0, 1)[..., None]).flatten(-2)
    codes = places.to(torch.uint8)[torch.bucketize(parts, (entries[1:] + entries[:-1]) / 2)]
    return codes[..., ::2] << 4 | codes[..., 1::2], scale


def _short(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _register(name: str) -> None:
    register(
        name=name,
        about=f"{name}, two in a byte, a magnitude per block",
        supported=f"{name} data of bitsandbytes, two in a byte, with one magnitude per block",
        dequantize=partial(dequantize, name),
        check=partial(check, name),
        quantize=None,
        rows=None,
        bits=4,
        columns=2,
        more=MORE,
    )


def _register_rows(name: str, block: int) -> None:
    register(
        name=f"{name}_block{block}",
        about=f"{name}, a scale per {block} columns",
        supported=f"{name} data, two in a byte, with one float32 scale per {block} columns of a row",
        dequantize=partial(dequantize, name),
        check=partial(check_rows, block, f"{name}_block{block}"),
        quantize=partial(quantize, block, name),
        rows=1,
        bits=4,
        columns=block,
    )


for _name in TABLES:
    _register(_name)
    for _block in OF_ROWS:
        _register_rows(_name, _block)
