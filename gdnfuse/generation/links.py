"""links: up to how many bytes a sum over the ranks is faster through symmetric memory than by NCCL, measured between them.

A step of a large model on a few GPUs waits for some hundred sums of a few kilobytes, of which nothing counts but the latency.
Both ways are timed as steps run, in a CUDA graph, by all ranks together, and all choose by the slowest rank's times.
"""

from __future__ import annotations

import functools
import logging
import socket
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from gdnfuse.errors import one_line
from gdnfuse.kernels.one_shot_all_reduce import MAX_RANKS, one_shot_all_reduce

SIZES = tuple(2**n for n in range(12, 21))  # bytes that are tried
SUMS, REPLAYS = 50, 5  # in a graph, and of it
log = logging.getLogger("gdnfuse")


def everywhere(what: Any) -> list[Any]:
    """What each rank has, on all."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, what)
    return found


@functools.cache
def one_shot_bytes(device: str) -> int:
    """Of the default process group; 0 where symmetric memory is not to be had. All ranks must call it, and get the same."""
    if torch.device(device).type != "cuda" or not 1 < dist.get_world_size() <= MAX_RANKS or not _joined():
        return 0
    group, failed = dist.group.WORLD.group_name, ""
    try:
        if wrong := [size for size in SIZES if not _right(size, group, device)]:
            failed = f"sums of {wrong[0]} bytes were wrong"
    except Exception as e:  # whatever keeps a driver from it
        failed = one_line(e)
    if said := [f"rank {rank}: {text}" for rank, text in enumerate(everywhere(failed)) if text]:
        log.warning("gdnfuse needs memory that all GPUs can write for fast sums, found %s: NCCL sums instead.", said[0])
        return 0
    times = []
    for size in SIZES:
        x = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        times.append((_us(lambda x=x: one_shot_all_reduce(x, group)), _us(lambda x=x: dist.all_reduce(x))))
    found = chosen(everywhere(times))
    log.info("gdnfuse sums up to %d bytes over ranks through symmetric memory; µs of it and of NCCL: %s", found, times)
    return found


def chosen(times: list[list[tuple[float, float]]]) -> int:
    """The largest of SIZES up to which the one-shot sum is faster on all ranks.

    Args:
        times: of each rank, for each size, the microseconds of a one-shot sum and of NCCL's.
    """
    best = 0
    for size, each in zip(SIZES, zip(*times, strict=True), strict=True):
        if max(one_shot for one_shot, _ in each) >= max(nccl for _, nccl in each):
            break
        best = size
    return best


def _right(size: int, group: str, device: str) -> bool:
    """Whether a sum of so many bytes is right: of small integers, so that it is exact."""
    mine, ranks = torch.arange(size // 2, device=device) % 8, dist.get_world_size()
    found = one_shot_all_reduce((mine + dist.get_rank()).bfloat16(), group)
    return torch.equal(found, (ranks * mine + ranks * (ranks - 1) // 2).bfloat16())


def _joined() -> bool:
    """Whether every rank's GPU can read every other's: they are of one host, and each rank has its own."""
    mine = socket.gethostname(), torch.cuda.current_device()
    all_of_them = everywhere(mine)
    alone = len({host for host, _ in all_of_them}) == 1 and len(set(all_of_them)) == len(all_of_them)
    others = [gpu for _, gpu in all_of_them if gpu != mine[1]]
    return all(everywhere(alone and all(torch.cuda.can_device_access_peer(mine[1], gpu) for gpu in others)))


def _us(call: Callable[[], Any]) -> float:
    """Microseconds of a call in a CUDA graph of many."""
    call()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(SUMS):
            call()
    for _ in range(REPLAYS + 1):
        dist.barrier()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / SUMS)
    return statistics.median(times[1:])
