"""one_shot_all_reduce: a small sum over ranks, the residual behind it and the norm behind that, in one launch.

The kernel is in one_shot_sum.py, with what keeps ranks apart and together. Here are the ops, and the memory that they share; no
triton, so that the lowering may ask what they take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gdnfuse import compat
from gdnfuse.dialect.rms_norm import reference as rms_norm
from gdnfuse.errors import GdnfuseError
from gdnfuse.options import ONE_SHOT_MOST

ALIGNED = 16  # bytes of which a sum is a multiple
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_RANKS = 8
MAX_ROWS, MAX_ROW = 32, 2**14  # of a sum that is normalised too, and bytes of a row: a program holds it
WORD, PACKET = 8, 16  # bytes of data that are stored at once, and with the numbers of the call beside them
PACKETS = ONE_SHOT_MOST // WORD  # of a rank in a call
# Places of eight bytes in front of the packets: of the number of the last call, of how many programs have read it, from where on
# there is where this rank finds each rank's memory; and how many there are in all.
HEADER_NUMBERS = (CALL, READ, PEERS, HEADER) = (0, 1, 2, 16)


@dataclass(frozen=True)
class Home:
    """What a rank has for the sums of a group: `memory`, int64 [HEADER + 4 · ranks · PACKETS], in which the others store, and
    what must be kept with it."""

    memory: torch.Tensor
    rank: int
    ranks: int
    kept: Any = None


_homes: dict[tuple[str, torch.device], Home | None] = {}


@torch.library.custom_op("gdnfuse::one_shot_all_reduce", mutates_args=())
def one_shot_all_reduce(x: torch.Tensor, group: str, residual: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of all ranks' x, and of a residual that all have.

    Args:
        x: any shape, of at most ONE_SHOT_MOST bytes and a multiple of ALIGNED, in one of DTYPES. On a CPU it is summed as always.
            With a residual also [parts, ...] partial sums of it, as split_linear leaves them.
        group: name of the process group, in which every rank must call this.
        residual: of the shape and dtype of the sum, or None.

    Returns:
        A tensor of the residual's shape, or without one of x's.
    """
    home = _home(x.device, group)
    if home is None:
        summed = compat.summed_over_ranks(_whole(x, residual), group)
        return summed if residual is None else residual + summed
    from gdnfuse.kernels.one_shot_sum import launch

    return launch(x, residual, None, 0.0, 0.0, home)[0]


@torch.library.custom_op("gdnfuse::one_shot_add_rms_norm", mutates_args=())
def one_shot_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden = residual + the sum of all ranks' x, and rms_norm(hidden).

    Args:
        x, residual, group: as of one_shot_all_reduce.
        weight, eps, offset: as of rms_norm.

    Returns:
        hidden and its norm, both of the residual's shape and dtype.
    """
    home = _home(x.device, group)
    if home is None:
        hidden = residual + compat.summed_over_ranks(_whole(x, residual), group)
        return hidden, rms_norm(hidden, weight, eps, offset)
    from gdnfuse.kernels.one_shot_sum import launch

    return launch(x, residual, weight, eps, offset, home)


@one_shot_all_reduce.register_fake
def _(x, group, residual=None):
    return _like(x if residual is None else residual)


@one_shot_add_rms_norm.register_fake
def _(x, residual, weight, eps, offset, group):
    return _like(residual), _like(residual)


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _whole(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """x, added up if it came in parts."""
    return x.sum(0).to(residual.dtype) if residual is not None and x.dim() > residual.dim() else x


def takes(x: torch.Tensor, most: int) -> bool:
    """Whether a sum of this, an example of it, may go that way, of at most `most` bytes."""
    static = all(isinstance(size, int) for size in x.shape)
    return static and x.dtype in DTYPES and 0 < x.nbytes <= most and x.nbytes % ALIGNED == 0


def takes_norm(hidden: torch.Tensor) -> bool:
    """Whether the rows of a sum that `takes` may be normalised with it."""
    row = hidden.shape[-1] * hidden.itemsize
    return row <= MAX_ROW and row % WORD == 0 and hidden.nbytes // row <= MAX_ROWS


def _home(device: torch.device, group: str) -> Home | None:
    """The group's memory on a device, made by all ranks at their first call; None where sums go as always."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    if (group, device) not in _homes:
        if torch.cuda.is_current_stream_capturing():
            raise GdnfuseError(
                "Small sums over ranks need memory that is made before a CUDA graph is captured, found that the first call is "
                "captured: call once before, or set one_shot_bytes=0."
            )
        _homes[group, device] = _made(device, group)
    return _homes[group, device]


def _made(device: torch.device, group: str) -> Home | None:
    most = min(torch.distributed.get_world_size(), MAX_RANKS)
    made = compat.symmetric_memory(HEADER + 2 * most * PACKETS * PACKET // 8, device, group)
    if made is None:
        return None
    memory, pointers, rank, kept = made
    ranks = len(pointers)
    if ranks > MAX_RANKS or pointers[rank] != memory.data_ptr() or not all(pointers):
        raise GdnfuseError(
            f"Small sums over ranks need at most {MAX_RANKS} ranks that can write each other's memory, found {ranks} with memory "
            f"at {pointers}: set one_shot_bytes=0."
        )
    memory[PEERS : PEERS + ranks] = torch.tensor(pointers)
    torch.cuda.synchronize(device)
    return Home(memory, rank, ranks, kept)
