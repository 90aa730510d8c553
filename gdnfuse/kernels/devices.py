"""What kernels need to know about a device before they accept a call. It does not import triton, so the lowering can use it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from gdnfuse.errors import Refused


class Device(NamedTuple):
    """What one program may use, and how many programs run at once.

    Attributes:
        shared_memory: bytes of shared memory that a program may use: 99 KiB on sm_86, sm_89 and sm_120, 163 KiB on sm_80, 227 KiB
            on sm_90 and sm_100, 64 KiB on gfx90a and gfx942. A launch that needs more raises OutOfResources.
        multiprocessors: number of multiprocessors.
        amd: whether Triton uses the memory layout of AMD.
        widens_e4m3: whether the device has an instruction that turns e4m3 into float16: NVIDIA's from 8.9 on.
    """

    shared_memory: int
    multiprocessors: int
    amd: bool = False
    widens_e4m3: bool = True


# Without a GPU, a report is made for this one.
H200 = Device(227 * 1024, 132)
EVERY = 48 * 1024  # bytes of shared memory that every GPU has


def of(device: torch.device) -> Device:
    """What a device has. For tensors on no GPU, as in a report, it is the current GPU, or an H200 if there is none."""
    return _of(index_of(device))


def index_of(device: torch.device) -> int:
    """The number of a GPU. For tensors on no GPU it is that of the current one, or 0 if there is none."""
    index = device.index if device.type == "cuda" else None
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return index


@functools.cache
def _of(index: int) -> Device:
    if not torch.cuda.is_available():
        return H200
    properties = torch.cuda.get_device_properties(index)
    # NVIDIA's devices have the first, which is what a launch may ask for. AMD's have the second. Older versions of torch have
    # neither.
    found = [getattr(properties, name, 0) for name in ("shared_memory_per_block_optin", "shared_memory_per_block")]
    shared_memory = next(filter(None, found), EVERY)
    amd = torch.version.hip is not None
    return Device(
        shared_memory, properties.multi_processor_count, amd, not amd and (properties.major, properties.minor) >= (8, 9)
    )


def require_shared(kernel: str, needed: int, device: Device) -> None:
    """Refuse a kernel whose programs need more shared memory than the device has."""
    if needed > device.shared_memory:
        raise Refused(f"{kernel} needs {needed} bytes of shared memory per program, found a device with {device.shared_memory}.")
