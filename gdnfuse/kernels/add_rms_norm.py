"""h = residual + x and h · rsqrt(mean(h²) + eps) · (offset + w) (Zhang and Sennrich 2019, arXiv:1910.07467), a row per program.

x may be partial sums of a linear whose columns were split. They are added up here. In a decode step this is the only kernel
between two linears. On Hopper it lets the second linear start, and load its weight, while it runs.

Layout: x [..., N] or [parts, ..., N], residual [..., N]; outputs contiguous. Maths is float32. x, the sum and the norm are each
rounded once, as if they were computed separately.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gdnfuse import compat
from gdnfuse.errors import Refused
from gdnfuse.kernels import devices
from gdnfuse.kernels.launch.implementation import kernel_of, overlap_options, register, require_dtypes, require_static

gdc_launch_dependents, gdc_wait = compat.dependent_launch()

MAX_N = 2**14  # a program holds its row
FEW = 132  # rows, at most, of which each gets a multiprocessor of its own


@triton.jit
def add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, hidden_ptr, out_ptr, eps, offset, stride_xp,
    N: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    i = tl.arange(0, BN)  # [BN]
    live = i < N
    at = tl.program_id(0).to(tl.int64) * N + i  # [BN]
    weight = tl.load(weight_ptr + i, mask=live, other=0.0).to(tl.float32)  # [BN]
    if OVERLAP:
        gdc_wait()
    dtype = residual_ptr.dtype.element_ty
    residual = tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32)  # [BN]
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)  # [BN]
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + part * stride_xp + at, mask=live, other=0.0)
    hidden = (residual + x.to(dtype).to(tl.float32)).to(dtype)
    tl.store(hidden_ptr + at, hidden, mask=live)
    h = hidden.to(tl.float32)
    factor = tl.rsqrt(tl.sum(h * h, 0) / N + tl.cast(eps, tl.float32))
    tl.store(out_ptr + at, (h * factor * (tl.cast(offset, tl.float32) + weight)).to(dtype), mask=live)


def launch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, *, overlap: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The dialect's add_rms_norm.

    Args:
        x, residual, weight, eps, offset: as in the dialect.
        overlap: whether the weight may be read while kernels before this one run.

    Returns:
        hidden and its norm, [..., N] in residual's dtype, contiguous.
    """
    N = residual.shape[-1]
    parts = x.shape[0] if x.dim() > residual.dim() else 1
    x, residual = x.contiguous(), residual.contiguous()
    hidden = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    options = overlap_options(x, weight) if overlap else {}
    kernel_of(add_rms_norm_kernel)[(residual.numel() // N,)](
        x, residual, weight.contiguous(), hidden, out, eps, offset, x.stride(0),
        N=N, PARTS=parts, BN=triton.next_power_of_2(N), OVERLAP=bool(options),
        num_warps=_warps(N, residual.numel() // N, devices.of(residual.device)), **options,
    )  # fmt: skip
    return hidden, out


def _warps(N: int, rows: int, device: devices.Device) -> int:
    """Of a program. A few rows are computed as fast as the slowest thread; of many, more than one is on a multiprocessor."""
    if rows <= FEW:
        return max(1, min(triton.next_power_of_2(N) // 128, 16 if device.amd else 32))  # warps of AMD have 64 threads
    return 8 if N <= 2**13 else 16


def supports(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> None:
    """Raise Refused unless dtypes are float32, bfloat16 or float16, and N is static and at most MAX_N."""
    require_dtypes(x=x, residual=residual, weight=weight)
    require_static(N=residual.shape[-1])
    if residual.shape[-1] > MAX_N:
        raise Refused(f"A row must be at most {MAX_N} wide, found {residual.shape[-1]}.")


implementation = register("add_rms_norm", launch, supports, early=("weight",))
