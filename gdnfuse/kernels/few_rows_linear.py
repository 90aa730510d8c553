"""A few rows times a weight, on tensor cores: the linears of a decode step of 2 to 32 sequences, which only stream their weights.

Meaning: the dialect's fused_linear without norm and residual, in_proj_conv without norm, and split_linear. What is fused behind
is SwiGLU (Shazeer 2020, arXiv:2002.05202), or the conv update of the channels, each owned by the one program that computes it.

The weight's rows are the products' rows, so that a tile of them needs no more sequences than there are. On Hopper a program may
start, and load its first weights, while the kernel before it still runs (programmatic dependent launch); only x is waited for.

Layout: x [..., N] and weight [M, N] with contiguous rows any distance apart; output contiguous. Products and sums are float32;
one rounding, to the weight's dtype, none for in_proj_conv and split_linear.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gdnfuse.kernels.implementation import kernel_of, overlap_options
from gdnfuse.kernels.linear_configs import FewRowsConfig, few_rows_config

# Operands of products, by the weight's dtype.
OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def few_rows_linear_kernel(
    x_ptr, weight_ptr, conv_state_ptr, conv_weight_ptr, conv_bias_ptr, out_ptr,
    B, M, columns, conv_offset, D,
    stride_xb, stride_wm, stride_sb, stride_sd, stride_ss, stride_cd, stride_cw,
    S: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, SWIGLU: tl.constexpr, OPERAND: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, OVERLAP: tl.constexpr,
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
    if conv_state_ptr is not None:
        channel = (out_row - conv_offset).to(tl.int64)[:, None]  # [BM, 1]
        convolved = live & (channel >= 0) & (channel < D)  # [BM, BB]
        state_ptrs = conv_state_ptr + b.to(tl.int64)[None, :] * stride_sb + channel * stride_sd  # [BM, BB]
        window = ()
        for j in tl.static_range(S):
            window = window + (tl.load(state_ptrs + j * stride_ss, mask=convolved, other=0.0),)

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
    if conv_state_ptr is not None:
        tap_ptrs = conv_weight_ptr + channel * stride_cd  # [BM, 1]
        owned = (channel >= 0) & (channel < D)  # [BM, 1]
        y = acc * tl.load(tap_ptrs + (W - 1) * stride_cw, mask=owned, other=0.0).to(tl.float32)  # [BM, BB]
        for j in tl.static_range(S + 1 - W, S):
            tap = tl.load(tap_ptrs + (j - (S + 1 - W)) * stride_cw, mask=owned, other=0.0)  # [BM, 1]
            y += window[j].to(tl.float32) * tap.to(tl.float32)
        if conv_bias_ptr is not None:
            y += tl.load(conv_bias_ptr + channel, mask=owned, other=0.0).to(tl.float32)
        if SILU:
            y = y * tl.sigmoid(y)
        # Threads that hold the same elements must have read them all before one of them writes.
        tl.debug_barrier()
        for j in tl.static_range(S - 1):
            tl.store(state_ptrs + j * stride_ss, window[j + 1], mask=convolved)
        tl.store(state_ptrs + (S - 1) * stride_ss, acc.to(conv_state_ptr.dtype.element_ty), mask=convolved)
        acc = tl.where(convolved, y, acc)
    out_ptrs = out_ptr + (part * B + b[None, :]).to(tl.int64) * M + out_row[:, None]  # [BO, BB]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=live)


def launch_with(
    chosen: FewRowsConfig, x: torch.Tensor, weight: torch.Tensor, swiglu: bool = False, conv: Any = None, overlap: bool = False
) -> torch.Tensor:
    """The parts of a linear, [parts, ..., M], or without the first axis if there is but one.

    Args:
        chosen: of N, a multiple of its parts times its columns per step.
        x: [..., N], at most 32 rows.
        weight: [M, N], with `swiglu` [2·M, N].
        swiglu: whether the weight is of gate and up.
        conv: (conv_state, conv_weight, conv_bias, conv_offset, activation) of an in_proj_conv, or None.
        overlap: whether weights and the conv state may be read while kernels before this one run.
    """
    N = weight.shape[1]
    M = weight.shape[0] // (2 if swiglu else 1)
    rows = x.reshape(-1, N)
    B = rows.shape[0]
    BM, BK, num_warps, stages, parts, early = chosen
    state, taps, bias, conv_offset, activation = (None, None, None, 0, "none") if conv is None else conv
    dtype = weight.dtype if conv is None and parts == 1 else torch.float32
    out = torch.empty(((parts,) if parts > 1 else ()) + (*x.shape[:-1], M), dtype=dtype, device=x.device)
    options = overlap_options(x, bias) if overlap else {}
    kernel_of(few_rows_linear_kernel)[(-(-M // (BM // 2 if swiglu else BM)), parts)](
        rows, weight, state, taps, None if bias is None else bias.contiguous(), out,
        B, M, N // parts, conv_offset, 0 if state is None else state.shape[1],
        rows.stride(0), weight.stride(0), *((0,) * 5 if conv is None else (*state.stride(), taps.stride(0), taps.stride(2))),
        S=1 if state is None else state.shape[2], W=1 if taps is None else taps.shape[2], SILU=activation == "silu",
        SWIGLU=swiglu, OPERAND=OPERANDS[weight.dtype], BM=BM, BK=BK, BB=max(8, triton.next_power_of_2(B)), STAGES=stages,
        EARLY=early, OVERLAP=bool(options), num_warps=num_warps, **options,
    )  # fmt: skip
    return out


def launch(
    x: torch.Tensor, weight: torch.Tensor, swiglu: bool = False, conv: Any = None, parts: int = 1, overlap: bool = False
) -> torch.Tensor:
    """`launch_with` the config for the weight's shape and the number of rows."""
    rows, M, N = x.numel() // x.shape[-1], weight.shape[0], weight.shape[1]
    chosen = few_rows_config("swiglu" if swiglu else "conv" if conv is not None else "plain", M, N, rows, weight.dtype, parts)
    return launch_with(chosen, x, weight, swiglu, conv, overlap)
