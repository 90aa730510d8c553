"""Depthwise causal conv over a prompt: out[t] = act(Σⱼ weight[d, j]·x[d, t − W + 1 + j] + bias[d]).

The short convolution before the gated delta rule (Yang et al. 2024, arXiv:2412.06464).

Layout: x [B, D, T] of any strides, D innermost where the projection wrote it so; what lies before the first column is the
context [B, D, S], or zero; output [B, D, T] with D innermost, as the rule reads it. Accumulation is float32, rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gdnfuse.kernels.causal_conv_update import ACTIVATIONS
from gdnfuse.kernels.implementation import INDEX_POINTERS, kernel_of, register, require_dtypes, require_static
from gdnfuse.report import Refused

# Channels and tokens per program, warps. Chosen on an H200, 8192 channels of 4096 tokens, bfloat16; (1024, 4), (64, 64) and
# (256, 32) are slower. No committed benchmark sweeps them.
BLOCK_D, BLOCK_T, NUM_WARPS = 256, 16, 4


@triton.jit(do_not_specialize=["T", "N"])
def causal_conv_kernel(
    x_ptr, context_ptr, weight_ptr, bias_ptr, cu_seqlens_ptr, out_ptr,
    T, N, stride_xb, stride_xd, stride_xt, stride_cb, stride_cd, stride_cs, stride_wd, stride_ww,
    D: tl.constexpr, S: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0).to(tl.int64) * BD + tl.arange(0, BD)  # [BD]
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    live = d < D
    acc = tl.zeros((BT, BD), dtype=tl.float32)
    for j in tl.static_range(W):
        at = t + (j - (W - 1))  # [BT]
        mask = (live[None, :] & (at >= 0)[:, None]) & (at < T)[:, None]
        x_ptrs = x_ptr + batch * stride_xb + at[:, None] * stride_xt + d[None, :] * stride_xd  # [BT, BD]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        if context_ptr is not None:
            c_ptrs = context_ptr + batch * stride_cb + (at + S)[:, None] * stride_cs + d[None, :] * stride_cd
            before = live[None, :] & ((at < 0) & (at + S >= 0))[:, None]
            x += tl.load(c_ptrs, mask=before, other=0.0).to(tl.float32)
        if cu_seqlens_ptr is not None:
            end = tl.load(cu_seqlens_ptr + N).to(tl.int64)
            apart = tl.zeros((BT,), dtype=tl.int32)
            for n in range(1, N):
                first = tl.load(cu_seqlens_ptr + n).to(tl.int64) + T - end
                apart += ((first <= t) & (first > at)).to(tl.int32)
            x = tl.where((apart == 0)[:, None], x, 0.0)
        tap = tl.load(weight_ptr + d * stride_wd + j * stride_ww, mask=live, other=0.0).to(tl.float32)  # [BD]
        acc += x * tap[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + d, mask=live, other=0.0).to(tl.float32)[None, :]
    if SILU:
        acc = acc * tl.sigmoid(acc)
    mask = live[None, :] & (t < T)[:, None]
    tl.store(out_ptr + (batch * T + t)[:, None] * D + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


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
    B, D, T = x.shape
    out = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    S = 0 if context is None else context.shape[-1]
    kernel_of(causal_conv_kernel)[(-(-D // BLOCK_D), -(-T // BLOCK_T), B)](
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
    """Raises Refused unless D, W and S are static, dtypes are float32, bfloat16 or float16 and the activation is known."""
    require_dtypes(x=x, weight=weight, bias=bias, context=context)
    require_static(D=x.shape[1], W=weight.shape[-1])
    if context is not None:
        require_static(S=context.shape[-1])
    if cu_seqlens is not None and cu_seqlens.dtype not in INDEX_POINTERS:
        raise Refused(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}.")
    if activation not in ACTIVATIONS:
        raise Refused(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation}.")


implementation = register("causal_conv", launch, supports)
