"""Gated RMSNorm: out = o · rsqrt(mean(o²) + eps) · w · act(z), the norm of Gated DeltaNet (Yang et al., arXiv:2412.06464).

Layout: o and z [..., V] of up to four dimensions, each with strides of its own, so z may be columns of a packed row; output
contiguous. All maths is float32. One rounding, from the float32 product to z's dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gdnfuse import compat
from gdnfuse.dialect.gated_rms_norm import GATES
from gdnfuse.errors import Refused
from gdnfuse.kernels.launch.implementation import (
    kernel_of,
    overlap_options,
    register,
    require_dtypes,
    require_head_dims,
    require_static,
)

gdc_launch_dependents, gdc_wait = compat.dependent_launch()

# Chosen on an H200, 131072 rows of 128 bfloat16: (16, 4) is as fast, 4 or 64 rows are slower. No committed benchmark sweeps them.
ROWS, NUM_WARPS = 8, 2


def require_gate(activation: str) -> None:
    """Refuse an activation of the gate that kernels do not support."""
    if activation not in GATES:
        raise Refused(f"The gate's activation must be one of {', '.join(GATES)}, found {activation}.")


@triton.jit
def gated(x, mean_square, z, weight, eps, SILU: tl.constexpr):
    """Normalise x by its mean square, weight it and gate it with silu(z) or sigmoid(z); all float32."""
    gate = z * tl.sigmoid(z) if SILU else tl.sigmoid(z)
    return weight * (x * tl.rsqrt(mean_square + eps)) * gate


@triton.jit(do_not_specialize=["rows", "N1"])
def gated_rms_norm_kernel(
    o_ptr, z_ptr, weight_ptr, out_ptr,
    eps, rows, N1, N2,
    stride_o0, stride_o1, stride_o2, stride_ov, stride_z0, stride_z1, stride_z2, stride_zv,
    V: tl.constexpr, SILU: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    i2, i1, i0 = row % N2, row // N2 % N1, row // N2 // N1  # [BR]
    v = tl.arange(0, BV).to(tl.int64)  # [BV]
    live = (row < rows)[:, None] & (v < V)[None, :]  # [BR, BV]
    o_rows = o_ptr + i0 * stride_o0 + i1 * stride_o1 + i2 * stride_o2  # [BR]
    z_rows = z_ptr + i0 * stride_z0 + i1 * stride_z1 + i2 * stride_z2  # [BR]

    weight = tl.load(weight_ptr + v, mask=v < V, other=0.0).to(tl.float32)  # [BV]
    if OVERLAP:
        gdc_wait()
    x = tl.load(o_rows[:, None] + v[None, :] * stride_ov, mask=live, other=0.0).to(tl.float32)  # [BR, BV]
    z = tl.load(z_rows[:, None] + v[None, :] * stride_zv, mask=live, other=0.0).to(tl.float32)  # [BR, BV]
    mean_square = tl.sum(x * x, 1) / V  # [BR]
    y = gated(x, mean_square[:, None], z, weight[None, :], tl.cast(eps, tl.float32), SILU)  # [BR, BV]
    tl.store(out_ptr + row[:, None] * V + v[None, :], y.to(out_ptr.dtype.element_ty), mask=live)


def launch(
    o: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, activation: str = "silu", *, overlap: bool = False
) -> torch.Tensor:
    """The dialect's gated_rms_norm.

    Args:
        o: [..., V], up to four dimensions, any strides.
        z: of o's shape, any strides.
        weight: [V].
        eps: added to the mean square.
        activation: of the gate, "silu" or "sigmoid".
        overlap: whether the weight may be read while kernels before this one run.

    Returns:
        [..., V] in z's dtype, contiguous.
    """
    options = overlap_options(o, weight) if overlap else {}
    out = torch.empty(o.shape, dtype=z.dtype, device=o.device)
    while o.dim() < 4:
        o, z = o.unsqueeze(0), z.unsqueeze(0)
    N0, N1, N2, V = o.shape
    rows = N0 * N1 * N2
    kernel_of(gated_rms_norm_kernel)[(-(-rows // ROWS),)](
        o, z, weight.contiguous(), out, eps, rows, N1, N2, *o.stride(), *z.stride(),
        V=V, SILU=activation == "silu", BR=ROWS, BV=triton.next_power_of_2(V), num_warps=NUM_WARPS,
        OVERLAP=bool(options), **options,
    )  # fmt: skip
    return out


def supports(o: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, activation: str = "silu") -> None:
    """Raise Refused unless the kernel supports the arguments.

    Dtypes must be float32, bfloat16 or float16, o must have at most four dimensions, V ≤ 256 must be static and the activation
    known.
    """
    require_gate(activation)
    require_dtypes(o=o, z=z, weight=weight)
    require_head_dims(V=o.shape[-1])
    require_static(**{"z's last size": z.shape[-1]})
    if o.dim() > 4 or z.dim() != o.dim() or z.shape[-1] != o.shape[-1]:
        raise Refused(f"o and z must have one shape of at most four dimensions, found {list(o.shape)} and {list(z.shape)}.")


implementation = register("gated_rms_norm", launch, supports, early=("weight",))
