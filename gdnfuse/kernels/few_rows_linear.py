"""A few rows times a weight, on tensor cores: the linears of a decode step of 2 to 32 sequences, which only stream their weights.

Meaning: the dialect's fused_linear, with SwiGLU behind it (Shazeer 2020, arXiv:2002.05202) or nothing, and split_linear.

The weight's rows are the products' rows, so that a tile of them needs no more sequences than there are. On Hopper a program may
start, and load its first weights, while the kernel before it still runs (programmatic dependent launch); only x is waited for.

Layout: x [..., N] and weight [M, N] with contiguous rows any distance apart; output contiguous. Products and sums are float32;
one rounding, to the weight's dtype, none for split_linear.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gdnfuse import compat
from gdnfuse.kernels import devices
from gdnfuse.kernels.launch.implementation import kernel_of, overlap_options
from gdnfuse.kernels.linear_configs import FewRowsConfig, columns_of, few_rows_config, ring_config, rows_and_out

if compat.gluon():
    from gdnfuse.kernels import few_rows_hopper
else:
    few_rows_hopper = None
gdc_launch_dependents, gdc_wait = compat.dependent_launch()

# Operands of products, by the weight's dtype.
OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def few_rows_linear_kernel(
    x_ptr, weight_ptr, out_ptr,
    B, M, columns, stride_xb, stride_wm,
    SWIGLU: tl.constexpr, OPERAND: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    pid, part = tl.program_id(0), tl.program_id(1)
    b = tl.arange(0, BB)  # [BB]
    i = tl.arange(0, BM)  # [BM]
    BO: tl.constexpr = BM // 2 if SWIGLU else BM
    first = pid * BO + i % BO  # [BM]
    # With SwiGLU the second half of a tile is the rows of up that belong to the rows of gate in the first.
    row = tl.where(first < M, first, 0) + tl.where(i < BO, 0, M)
    k = part * columns + tl.arange(0, BK)  # [BK]
    w_ptrs = weight_ptr + row.to(tl.int64)[:, None] * stride_wm + k[None, :]  # [BM, BK]
    x_ptrs = x_ptr + tl.where(b < B, b, 0).to(tl.int64)[None, :] * stride_xb + k[:, None]  # [BK, BB]

    out_row = pid * BO + tl.arange(0, BO)  # [BO]
    live = (out_row < M)[:, None] & (b < B)[None, :]  # [BO, BB]
    acc = tl.zeros((BM, BB), tl.float32)
    if EARLY:
        w = tl.load(w_ptrs)
        if OVERLAP:
            gdc_wait()
        acc = tl.dot(w.to(OPERAND), tl.load(x_ptrs).to(OPERAND), acc, input_precision="ieee")
        w_ptrs += BK
        x_ptrs += BK
    elif OVERLAP:
        gdc_wait()
    for _ in tl.range(BK if EARLY else 0, columns, BK, num_stages=STAGES):
        w = tl.load(w_ptrs)
        x = tl.load(x_ptrs)
        acc = tl.dot(w.to(OPERAND), x.to(OPERAND), acc, input_precision="ieee")
        w_ptrs += BK
        x_ptrs += BK

    if SWIGLU:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, BO, BB)), (1, 2, 0)))
        acc = gate * tl.sigmoid(gate) * up
    out_ptrs = out_ptr + (part * B + b[None, :]).to(tl.int64) * M + out_row[:, None]  # [BO, BB]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=live)


def launch_with(
    chosen: FewRowsConfig, x: torch.Tensor, weight: torch.Tensor, swiglu: bool = False, overlap: bool = False
) -> torch.Tensor:
    """The parts of a linear, [parts, ..., M], or without the first axis if there is but one.

    Args:
        chosen: of N, a multiple of its parts times its columns per step.
        x: [..., N], a few rows.
        weight: [M, N], with `swiglu` [2·M, N].
        swiglu: whether the weight is of gate and up.
        overlap: whether the weight may be read while kernels before this one run.
    """
    BM, BK, num_warps, stages, parts, early = chosen
    rows, out = rows_and_out(x, weight, swiglu, parts)
    (B, N), M = rows.shape, out.shape[-1]
    options = overlap_options(x) if overlap else {}
    kernel_of(few_rows_linear_kernel)[(-(-M // (BM // 2 if swiglu else BM)), parts)](
        rows, weight, out, B, M, N // parts, rows.stride(0), weight.stride(0),
        SWIGLU=swiglu, OPERAND=OPERANDS[weight.dtype], BM=BM, BK=BK, BB=columns_of(B),
        STAGES=stages, EARLY=early, OVERLAP=bool(options), num_warps=num_warps, **options,
    )  # fmt: skip
    return out


def launch(x: torch.Tensor, weight: torch.Tensor, swiglu: bool = False, parts: int = 1, overlap: bool = False) -> torch.Tensor:
    """`launch_with` the config for the weight's shape and the number of rows, or few_rows_hopper in its place."""
    M, N = weight.shape[0] // (2 if swiglu else 1), weight.shape[1]
    rows = x.reshape(-1, N)
    x = rows.view(x.shape)  # so that what had to be copied is copied once
    if few_rows_hopper and (ring := ring_config(M, N, swiglu, parts)) and few_rows_hopper.supports_here(rows, weight):
        return few_rows_hopper.launch_with(ring, x, weight, swiglu, overlap)
    config = few_rows_config(N, rows.shape[0], swiglu, parts, weight.dtype, devices.of(x.device))
    return launch_with(config, x, weight, swiglu, overlap)
