"""A linear of many rows whose input and weight are e4m3 (W8A8), on tensor cores for e4m3.

On Hopper with CUDA 12.9 torch's scaled product computes it, which is cuBLAS's: blocks of 1 × 128 times blocks of 128 × 128, or
one scale per row of both. cuBLAS has the first on Hopper only. On other devices with such tensor cores, from compute capability
8.9 on, and for sizes that cuBLAS does not take, the kernel of this file does. Products of 128 columns are added up on tensor
cores, multiplied with their scales, and added up in float32.

Layout: x [rows, N] and weight [M, N] contiguous; scales of x [groups, rows], of which one group is adjacent; output [rows, M].
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from gdnfuse.dialect import fp8_linear
from gdnfuse.errors import Refused, one_line
from gdnfuse.kernels import devices
from gdnfuse.kernels.launch.implementation import kernel_of, launching, register, require_dtypes, require_static
from gdnfuse.kernels.quantized import SCALES, widen

log = logging.getLogger(__name__)

COLUMNS = 128  # that are added up before they are multiplied with scales
# Of a program: rows of x, rows of the weight, warps. Not measured, because cuBLAS is used where there was a device to measure.
BT, BM, NUM_WARPS = 128, 128, 8
SIDE_BY_SIDE = 8  # blocks of rows of x that read one block of the weight at about the same time
OPERAND = tl.float8e4nv
HOPPER, CUDA = (9, 0), (12, 9)
ALIGNED = 16  # cuBLAS needs multiples of it: rows and columns of a weight, and rows of x, of which 33 and 4094 were refused
SCALES_ALIGNED = 4  # the same for columns of a weight's scales (https://docs.nvidia.com/cuda/cublas/#scaling-factors-layouts)
ROWS = {"fp8_block128": 128, "fp8_channel": 1, "fp8_tensor": 0}  # of a weight that share a scale; 0 for all

_failed: set[torch.device] = set()  # devices on which torch's scaled product raised an error


@triton.jit(do_not_specialize=["T"])
def fp8_linear_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, out_ptr, T,
    M: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, OPERAND: tl.constexpr, TOGETHER: tl.constexpr,
    BT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # TOGETHER blocks of rows of x come before the next block of the weight, so that it is read while it is in a cache.
    across, tiles = tl.cdiv(M, BM), tl.cdiv(T, BT)
    first = tl.program_id(0) // (TOGETHER * across) * TOGETHER
    together = tl.minimum(tiles - first, TOGETHER)
    place = tl.program_id(0) % (TOGETHER * across)
    t = (first + place % together).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    m = (place // together).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    k = tl.arange(0, BK)  # [BK]
    x_ptrs = x_ptr + t[:, None] * N + k[None, :]  # [BT, BK]
    w_ptrs = weight_ptr + m[None, :] * N + k[:, None]  # [BK, BM]
    acc = tl.zeros((BT, BM), dtype=tl.float32)
    for i in range(N // BK):
        x = tl.load(x_ptrs + i * BK, mask=(t < T)[:, None], other=0)
        w = tl.load(w_ptrs + i * BK, mask=(m < M)[None, :], other=0)
        if OPERAND == tl.float8e4nv:
            product = tl.dot(x.to(OPERAND, bitcast=True), w.to(OPERAND, bitcast=True))
        else:  # the interpreter multiplies no e4m3
            product = tl.dot(widen(x, "e4m3", False).to(OPERAND), widen(w, "e4m3", False).to(OPERAND), input_precision="ieee")
        # [BT] and [BM]
        x_scale = tl.load(x_scale_ptr + (i * T if BLOCKS else 0) + t, mask=t < T, other=0.0)
        block = (m // ROWS) * (N // BK) + i if BLOCKS else m * ROWS
        scale = tl.load(scale_ptr + block, mask=m < M, other=0.0).to(tl.float32)
        acc += product * (x_scale[:, None] * scale[None, :])
    out_ptrs = out_ptr + t[:, None] * M + m[None, :]  # [BT, BM]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None] & (m < M)[None, :])


def launch(
    x: torch.Tensor, x_scale: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, format: str, dtype: torch.dtype
) -> torch.Tensor:
    """The dialect's fp8_linear.

    Args:
        x, x_scale, data, scale, format, dtype: as in the dialect.

    Returns:
        [..., M] in `dtype`.
    """
    if by_library(x, data, dtype):
        if not launching():
            return fp8_linear.fake(x, x_scale, data, scale, format, dtype)
        try:
            return by_torch(x, x_scale, data, scale, format, dtype)
        except RuntimeError as e:  # another cuBLAS than torch was built with, for one
            _failed.add(x.device)
            log.warning("torch's scaled product failed, so a kernel of gdnfuse computes linears of e4m3. %s", one_line(e))
    return by_kernel(x, x_scale, data, scale, format, dtype)


def by_kernel(
    x: torch.Tensor, x_scale: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, format: str, dtype: torch.dtype
) -> torch.Tensor:
    """The same by the kernel of this file, on any device that it supports."""
    M, N = data.shape
    rows = x.reshape(-1, N).contiguous()
    T = rows.shape[0]
    out = torch.empty((T, M), dtype=dtype, device=x.device)
    scale = (scale if scale.dtype in SCALES else scale.float()).contiguous()  # Triton has no pointers to e8m0
    kernel_of(fp8_linear_kernel)[(-(-T // BT) * -(-M // BM),)](
        rows.view(torch.uint8), x_scale.contiguous(), data.contiguous().view(torch.uint8), scale, out, T,
        M=M, N=N, BLOCKS=ROWS[format] == COLUMNS, ROWS=ROWS[format], OPERAND=OPERAND, TOGETHER=SIDE_BY_SIDE,
        BT=BT, BM=BM, BK=COLUMNS, num_warps=NUM_WARPS, num_stages=_stages(devices.of(x.device)),
    )  # fmt: skip
    return out.view(*x.shape[:-1], M)


def by_torch(
    x: torch.Tensor, x_scale: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, format: str, dtype: torch.dtype
) -> torch.Tensor:
    """The same by torch's scaled product, where `by_library`."""
    M, N = data.shape
    lead, x, kinds = x.shape[:-1], x.reshape(-1, N), F.ScalingType
    if ROWS[format] != COLUMNS:
        scale = scale.float().reshape(1, -1).expand(1, M).contiguous()
        out = F.scaled_mm(x, data.T, x_scale.T, kinds.RowWise, scale, kinds.RowWise, output_dtype=dtype)
        return out.view(*lead, M)
    T = x.shape[0]
    if more := -T % ALIGNED:
        x = F.pad(x.view(torch.uint8), (0, 0, 0, more)).view(x.dtype)
        x_scale = F.pad(x_scale, (0, more))
    scale = F.pad(scale.float(), (0, -scale.shape[1] % SCALES_ALIGNED)).contiguous()
    out = F.scaled_mm(x, data.T, x_scale.T, kinds.BlockWise1x128, scale.T, kinds.BlockWise128x128, output_dtype=dtype)
    return out[:T].view(*lead, M)


def by_library(x: torch.Tensor, data: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's scaled product computes a call: on Hopper with CUDA 12.9, for bfloat16 and sizes in multiples of 16."""
    sizes = data.shape[0] % ALIGNED == 0 and data.shape[1] % ALIGNED == 0
    return sizes and dtype == torch.bfloat16 and x.device.type == "cuda" and x.device not in _failed and _has_blocks(x.device)


@functools.cache
def _has_blocks(device: torch.device) -> bool:
    """Whether torch's scaled product takes blocks of 128 × 128 on a GPU."""
    if not torch.cuda.is_available() or torch.version.cuda is None or not hasattr(F, "scaled_mm"):
        return False
    version = tuple(int(n) for n in torch.version.cuda.split(".")[:2])
    return version >= CUDA and torch.cuda.get_device_capability(device) == HOPPER


def _stages(device: devices.Device) -> int:
    """As many steps ahead as shared memory has room for."""
    return max(2, min(4, device.shared_memory // ((BT + BM) * COLUMNS)))


def supports(
    x: torch.Tensor, x_scale: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, format: str, dtype: torch.dtype
) -> None:
    """Raise Refused unless the device multiplies e4m3, M and N are static, N is a multiple of 128 and the dtypes are known."""
    device = devices.of(x.device)
    if device.amd:
        raise Refused("Tensor cores must multiply e4m3 as checkpoints store it, found a GPU of AMD, which was not tried.")
    if not device.widens_e4m3:
        raise Refused("Tensor cores must multiply e4m3, which NVIDIA's do from compute capability 8.9 on, found an older GPU.")
    if format not in ROWS:
        raise Refused(f"The weight must be {', '.join(ROWS)}, found {format}.")
    require_static(M=data.shape[0], N=data.shape[1])
    if data.shape[1] % COLUMNS:
        raise Refused(f"N must be a multiple of {COLUMNS}, found {data.shape[1]}.")
    require_dtypes(out=torch.empty(0, dtype=dtype, device="meta"), x_scale=x_scale)
    wanted = data.shape[1] // COLUMNS if ROWS[format] == COLUMNS else 1
    if x_scale.shape[0] != wanted:
        raise Refused(f"x must have {wanted} groups of columns for {format}, found {x_scale.shape[0]}.")


implementation = register("fp8_linear", launch, supports, by="cuBLAS or triton")
