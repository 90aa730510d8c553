"""What kernels ask of a device before they say yes; no triton, so that the lowering may ask before it launches."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from gdnfuse.errors import Refused


class Device(NamedTuple):
    """What one program may have, and how many run at once.

    Attributes:
        shared_memory: bytes of it that a program may take: 99 KiB on sm_86, sm_89 and sm_120, 163 KiB on sm_80, 227 KiB on sm_90
            and sm_100, 64 KiB on gfx90a and gfx942. A launch that takes more raises OutOfResources.
        multiprocessors: how many there are.
        amd: whether Triton lays memory out as for AMD.
        widens_e4m3: whether it has an instruction that makes float16 of e4m3: NVIDIA's from 8.9 on.
    """

    shared_memory: int
    multiprocessors: int
    amd: bool = False
    widens_e4m3: bool = True


# Where there is no GPU, a report is made for this one.
H200 = Device(227 * 1024, 132)
EVERY = 48 * 1024  # bytes of shared memory that every GPU has


def of(device: torch.device) -> Device:
    """What a device has; for tensors that are on no GPU, as those of a report are, what the current one has, or an H200."""
    index = device.index if device.type == "cuda" else None
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return _of(index)


@functools.cache
def _of(index: int) -> Device:
    if not torch.cuda.is_available():
        return H200
    properties = torch.cuda.get_device_properties(index)
    # The first is what a launch may ask for on NVIDIA's devices; AMD's have the second, and in older versions of torch neither.
    found = [getattr(properties, name, 0) for name in ("shared_memory_per_block_optin", "shared_memory_per_block")]
    shared_memory = next(filter(None, found), EVERY)
    amd = torch.version.hip is not None
    return Device(
        shared_memory, properties.multi_processor_count, amd, not amd and (properties.major, properties.minor) >= (8, 9)
    )


def require_shared(kernel: str, needed: int, device: Device) -> None:
    """Refuse a kernel whose programs take more shared memory than there is."""
    if needed > device.shared_memory:
        raise Refused(f"{kernel} needs {needed} bytes of shared memory per program, found a device with {device.shared_memory}.")
