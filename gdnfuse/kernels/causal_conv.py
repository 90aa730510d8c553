"""Depthwise causal conv over a prompt: out[t] = act(Σⱼ weight[d, j]·x[d, t − W + 1 + j] + bias[d]).

The short convolution before the gated delta rule (Yang et al. 2024, arXiv:2412.06464).

For up to 8 tokens after a context there is a second kernel. It has a channel's columns in registers, so it can also record them,
and the inputs of the gates beside them, for a verify step (`causal_conv_record`).

Layout: x [B, D, T] with any strides; D is innermost if the projection wrote it so. Before the first column is the context [B, D,
S], or zero. The output is [B, D, T] with D innermost, as the rule reads it. Accumulation is float32, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gdnfuse import compat
from gdnfuse.errors import Refused
from gdnfuse.kernels.causal_conv_update import ACTIVATIONS
from gdnfuse.kernels.launch.implementation import (
    INDEX_POINTERS,
    kernel_of,
    overlap_options,
    register,
    require_dtypes,
    require_static,
    require_tokens,
)

# Channels and tokens per program, warps. Chosen on an H200, 8192 channels of 4096 and 16384 tokens, bfloat16, among (256 to 1024,
# 8 to 32, 1 to 8); as fast is (512, 16, 4). No committed benchmark sweeps them.
BLOCK_D, BLOCK_T, NUM_WARPS = 256, 16, 2
# Of the kernel for few tokens: the most tokens and columns before them, channels per program, warps. Not measured. One sequence
# of 8192 channels has 128 programs.
FEW_TOKENS, FEW_COLUMNS, FEW_D, FEW_WARPS = 8, 8, 64, 1

gdc_launch_dependents, gdc_wait = compat.dependent_launch()


@triton.jit(do_not_specialize=["T", "N"])
def causal_conv_kernel(
    x_ptr, context_ptr, weight_ptr, bias_ptr, cu_seqlens_ptr, out_ptr,
    T, N, stride_xb, stride_xd, stride_xt, stride_cb, stride_cd, stride_cs, stride_wd, stride_ww,
    D: tl.constexpr, S: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    # All programs are on one axis of the grid. The others allow only 65535, which is too few for a long prompt.
    block = tl.program_id(0) // tl.cdiv(D, BD)
    d = (tl.program_id(0) % tl.cdiv(D, BD)).to(tl.int64) * BD + tl.arange(0, BD)  # [BD]
    batch = (block // tl.cdiv(T, BT)).to(tl.int64)
    first = (block % tl.cdiv(T, BT)).to(tl.int64) * BT
    live = d < D
    taps = ()
    for j in tl.static_range(W):
        taps += (tl.load(weight_ptr + d * stride_wd + j * stride_ww, mask=live, other=0.0).to(tl.float32),)  # [BD]
    # All rows are loaded before the first is used, each once. The W taps read them from registers.
    rows = ()
    for i in tl.static_range(W - 1 + BT):
        at = first + (i - (W - 1))
        there = at < T
        if i < W - 1:
            there = there & (at >= 0)
        x = tl.load(x_ptr + batch * stride_xb + at * stride_xt + d * stride_xd, mask=live & there, other=0.0)  # [BD]
        if i < W - 1 and context_ptr is not None:
            before = (at < 0) & (at + S >= 0)
            c_ptrs = context_ptr + batch * stride_cb + (at + S) * stride_cs + d * stride_cd
            x = tl.where(before, tl.load(c_ptrs, mask=live & before, other=0.0).to(tl.float32), x.to(tl.float32))
        rows += (x,)
    t = first + tl.arange(0, BT)  # [BT]
    starts = tl.zeros((BT,), dtype=tl.int64) - W  # of each token's sequence; the first goes on from the context
    if cu_seqlens_ptr is not None:
        end = tl.load(cu_seqlens_ptr + N).to(tl.int64)
        for n in range(1, N):
            start = tl.load(cu_seqlens_ptr + n).to(tl.int64) + T - end
            starts = tl.where(start <= t, tl.maximum(starts, start), starts)
    for i in tl.static_range(BT):
        acc = tl.zeros((BD,), dtype=tl.float32)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + d, mask=live, other=0.0).to(tl.float32)
        start = tl.sum(tl.where(t == first + i, starts, 0), 0)
        for j in tl.static_range(W):
            x = rows[i + j].to(tl.float32)
            if cu_seqlens_ptr is not None:
                x = tl.where(first + (i + j - (W - 1)) >= start, x, 0.0)
            acc += x * taps[j]
        if SILU:
            acc = acc * tl.sigmoid(acc)
        out_ptrs = out_ptr + (batch * T + first + i) * D + d  # [BD]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=live & (first + i < T))


@triton.jit
def few_tokens_conv_kernel(
    x_ptr, context_ptr, weight_ptr, bias_ptr, a_ptr, b_ptr, out_ptr, windows_ptr, recorded_a_ptr, recorded_b_ptr,
    stride_xb, stride_xd, stride_xt, stride_cb, stride_cd, stride_cs, stride_wd, stride_ww, stride_bias,
    stride_ab, stride_at, stride_ah, stride_bb, stride_bt, stride_bh, stride_nb, stride_nt, stride_nd,
    stride_rab, stride_rat, stride_rah, stride_rbb, stride_rbt, stride_rbh,
    D: tl.constexpr, T: tl.constexpr, S: tl.constexpr, W: tl.constexpr, HV: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr,
    BLOCKS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    d = (tl.program_id(0) % BLOCKS).to(tl.int64) * BD + tl.arange(0, BD)  # [BD]
    batch = (tl.program_id(0) // BLOCKS).to(tl.int64)
    live = d < D
    taps, columns = (), ()
    for j in tl.static_range(W):
        taps += (tl.load(weight_ptr + d * stride_wd + j * stride_ww, mask=live, other=0.0).to(tl.float32),)  # [BD]
    bias = tl.zeros((BD,), tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + d * stride_bias, mask=live, other=0.0).to(tl.float32)
    for i in tl.static_range(S):
        c_ptrs = context_ptr + batch * stride_cb + i * stride_cs + d * stride_cd  # [BD]
        columns += (tl.load(c_ptrs, mask=live, other=0.0),)
    # Nothing is written before this: newly allocated memory may still be read by a kernel before this one.
    if OVERLAP:
        gdc_wait()
    for t in tl.static_range(T):
        columns += (tl.load(x_ptr + batch * stride_xb + t * stride_xt + d * stride_xd, mask=live, other=0.0),)
    for t in tl.static_range(T):
        acc = bias
        for j in tl.static_range(W):
            if S + t + j >= W - 1:  # what lies before the context is zero
                acc += columns[S + t + j - (W - 1)].to(tl.float32) * taps[j]
        if SILU:
            acc = acc * tl.sigmoid(acc)
        tl.store(out_ptr + (batch * T + t) * D + d, acc.to(out_ptr.dtype.element_ty), mask=live)
    if windows_ptr is not None:
        for i in tl.static_range(S + T):
            n_ptrs = windows_ptr + batch * stride_nb + i * stride_nt + d * stride_nd  # [BD]
            tl.store(n_ptrs, columns[i].to(windows_ptr.dtype.element_ty), mask=live)
        heads = d < HV  # the first programs have as many heads as channels
        for t in tl.static_range(T):
            a = tl.load(a_ptr + batch * stride_ab + t * stride_at + d * stride_ah, mask=heads, other=0.0)  # [BD]
            b = tl.load(b_ptr + batch * stride_bb + t * stride_bt + d * stride_bh, mask=heads, other=0.0)
            to_a = recorded_a_ptr + batch * stride_rab + t * stride_rat + d * stride_rah
            to_b = recorded_b_ptr + batch * stride_rbb + t * stride_rbt + d * stride_rbh
            tl.store(to_a, a.to(recorded_a_ptr.dtype.element_ty), mask=heads)
            tl.store(to_b, b.to(recorded_b_ptr.dtype.element_ty), mask=heads)


def launch_few(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    context: torch.Tensor,
    recorded: tuple[torch.Tensor, ...] | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """The conv of up to 8 tokens after a context of up to 8 columns.

    Args:
        x: [B, D, T], any strides.
        weight: [D, W], any strides.
        bias: [D] or None.
        activation: "silu" or "none".
        context: [B, D, S], any strides.
        recorded: a, b, windows, recorded_a and recorded_b of the dialect's record, any strides; or None to record nothing.
        overlap: whether weight, bias and context may be read while kernels before this one run.

    Returns:
        [B, D, T] in x's dtype, D innermost in memory.
    """
    B, D, T = x.shape
    a, b, windows, recorded_a, recorded_b = recorded or (None,) * 5
    HV = 0 if a is None else a.shape[-1]
    out = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    options = overlap_options(x) if overlap else {}
    strides: list[Any] = [*x.stride(), *context.stride(), *weight.stride(), 0 if bias is None else bias.stride(0)]
    for t in (a, b, windows, recorded_a, recorded_b):
        strides += (0, 0, 0) if t is None else t.stride()
    blocks = -(-max(D, HV) // FEW_D)
    kernel_of(few_tokens_conv_kernel)[(blocks * B,)](
        x, context, weight, bias, a, b, out, windows, recorded_a, recorded_b, *strides,
        D=D, T=T, S=context.shape[-1], W=weight.shape[-1], HV=HV, SILU=activation == "silu", BD=FEW_D,
        BLOCKS=blocks, num_warps=FEW_WARPS, OVERLAP=bool(options), **options,
    )  # fmt: skip
    return out.mT


def few(x: torch.Tensor, context: torch.Tensor | None) -> bool:
    """Whether the kernel for few tokens supports this many, and this many before them, for all inputs."""
    sizes = () if context is None else (x.shape[-1], context.shape[-1])
    return bool(sizes) and all(isinstance(n, int) for n in sizes) and sizes[0] <= FEW_TOKENS and sizes[1] <= FEW_COLUMNS


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    context: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """The dialect's causal_conv.

    Args:
        x: [B, D, T], any strides.
        weight: [D, W].
        bias: [D] or None.
        activation: "silu" or "none".
        context: [B, D, S] or None, any strides.
        cu_seqlens: [N + 1] int32 or int64, bounds of sequences packed into a row, or None.

    Returns:
        [B, D, T] in x's dtype, D innermost in memory.
    """
    if few(x, context) and cu_seqlens is None:
        return launch_few(x, weight, bias, activation, context)
    B, D, T = x.shape
    out = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    S = 0 if context is None else context.shape[-1]
    kernel_of(causal_conv_kernel)[(-(-D // BLOCK_D) * -(-T // BLOCK_T) * B,)](
        x, context, weight, None if bias is None else bias.contiguous(), cu_seqlens, out,
        T, 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        *x.stride(), *((0,) * 3 if context is None else context.stride()), *weight.stride(),
        D=D, S=S, W=weight.shape[-1], SILU=activation == "silu", BD=BLOCK_D, BT=BLOCK_T, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out.mT


def supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    context: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> None:
    """Raise Refused unless T ≥ 1, D, W and S are static, dtypes are float32, bfloat16 or float16 and the activation is known."""
    require_dtypes(x=x, weight=weight, bias=bias, context=context)
    require_tokens(x.shape[-1])
    require_static(D=x.shape[1], W=weight.shape[-1])
    if context is not None:
        require_static(S=context.shape[-1])
    if cu_seqlens is not None and cu_seqlens.dtype not in INDEX_POINTERS:
        raise Refused(f"cu_seqlens must be int32 or int64, found {cu_seqlens.dtype}.")
    if activation not in ACTIVATIONS:
        raise Refused(f"activation must be one of {', '.join(ACTIVATIONS)}, found {activation}.")


implementation = register("causal_conv", launch, supports)
