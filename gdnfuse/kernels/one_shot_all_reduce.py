"""one_shot_all_reduce: a small sum over ranks by torch's kernel over symmetric memory: no kernel of ours.

Each rank copies what it has where the others can read it, and reads what all have: one launch and two waits, where a ring needs
as many steps as there are ranks. It reads other GPUs' memory directly and needs no NVLink multicast. All ranks add up in the same
order, so all get the same. Larger sums are for NCCL: every rank reads all of it from every other one.
"""

from __future__ import annotations

import torch

from gdnfuse import compat
from gdnfuse.options import ONE_SHOT_MOST

ALIGNED = 16  # bytes: parts of that many are read at once
DTYPES = (torch.bfloat16, torch.float32)  # that torch's kernel takes
_buffers: dict[tuple[str, torch.dtype], torch.Tensor | None] = {}


@torch.library.custom_op("gdnfuse::one_shot_all_reduce", mutates_args=())
def one_shot_all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum of all ranks' x.

    Args:
        x: any shape, of at most ONE_SHOT_MOST bytes and a multiple of ALIGNED, in one of DTYPES. On a CPU it is summed as always.
        group: name of the process group, in which every rank must call this.
    """
    if x.device.type != "cuda":
        return compat.summed_over_ranks(x, group)
    if (group, x.dtype) not in _buffers:
        _buffers[group, x.dtype] = compat.symmetric_buffer(ONE_SHOT_MOST // x.element_size(), x.dtype, x.device, group)
    buffer = _buffers[group, x.dtype]
    if buffer is None:
        return compat.summed_over_ranks(x, group)
    buffer = buffer[: x.numel()].view(x.shape)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, x.contiguous(), "sum", group)


@one_shot_all_reduce.register_fake
def _(x, group):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def takes(x: torch.Tensor, most: int) -> bool:
    """Whether a sum of this, an example of it, may go that way, of at most `most` bytes."""
    static = all(isinstance(size, int) for size in x.shape)
    return static and x.dtype in DTYPES and 0 < x.nbytes <= most and x.nbytes % ALIGNED == 0
