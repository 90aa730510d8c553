"""One token of the depthwise causal conv: out = act(Σⱼ w[d, j]·window[d, j] + bias[d]) with window = [conv_state | x].

The short convolution before the gated delta rule (Yang et al. 2024, arXiv:2412.06464). The kernel that reads the cached window
also updates it, as in the decode kernels of causal-conv1d and vLLM.

Layout: x [B, D, 1] and conv_state [B, D, S] with any strides, so x may be columns of a packed row; output [B, D, 1] contiguous.
The last S columns of the window replace conv_state in place. Accumulation and output are float32 for all inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gdnfuse import compat
from gdnfuse.errors import Refused
from gdnfuse.kernels.launch.implementation import (
    kernel_of,
    overlap_options,
    register,
    require_dtypes,
    require_one_token,
    require_static,
)

gdc_launch_dependents, gdc_wait = compat.dependent_launch()

ACTIVATIONS = ("silu", "none")

# Not measured. There is a thread per channel, so the 8192 channels of a 4B model give 64 programs even at B = 1.
BLOCK_D, NUM_WARPS = 128, 4


@triton.jit
def load_window(ptrs, stride_ss, live, S: tl.constexpr, PACKED: tl.constexpr):
    """The S columns of the windows at ptrs [...]: a tuple of [...]. PACKED: there are four, adjacent."""
    columns = ()
    if PACKED:
        axis: tl.constexpr = len(ptrs.shape)
        four = tl.load(
            tl.expand_dims(ptrs, axis) + tl.arange(0, 4),
            mask=tl.broadcast_to(tl.expand_dims(live, axis), ptrs.shape + [4]),
            other=0.0,
        )  # [..., 4]
        even, odd = tl.split(tl.reshape(four, ptrs.shape + [2, 2]))  # [..., 2]
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        columns = (first, second, third, fourth)
    else:
        for j in tl.static_range(S):
            columns = columns + (tl.load(ptrs + j * stride_ss, mask=live, other=0.0),)
    return columns


@triton.jit
def store_window(ptrs, stride_ss, live, columns, newest, S: tl.constexpr, PACKED: tl.constexpr):
    """Store the windows moved by one column: all of `columns` but the first, and `newest`."""
    # If threads hold the same elements, all must have read them before one writes.
    tl.debug_barrier()
    if PACKED:
        axis: tl.constexpr = len(ptrs.shape)
        pairs = tl.join(tl.join(columns[1], columns[3]), tl.join(columns[2], newest))  # [..., 2, 2]
        four = tl.reshape(pairs, ptrs.shape + [4])  # [..., 4]
        mask = tl.broadcast_to(tl.expand_dims(live, axis), ptrs.shape + [4])
        tl.store(tl.expand_dims(ptrs, axis) + tl.arange(0, 4), four, mask=mask)
    else:
        for j in tl.static_range(S - 1):
            tl.store(ptrs + j * stride_ss, columns[j + 1], mask=live)
        tl.store(ptrs + (S - 1) * stride_ss, newest, mask=live)


@triton.jit
def window_stride(stride, PACKED: tl.constexpr):
    """The same number. With PACKED the compiler knows that it is a multiple of four, which reading four columns at once needs."""
    return stride // 4 * 4 if PACKED else stride


def packed(conv_state: torch.Tensor) -> bool:
    """Whether windows are four adjacent columns, which a thread can read and write at once.

    Triton knows the alignment only of addresses that are multiples of 16 bytes. Allocated memory starts at such an address.
    """
    batch, channel, column = conv_state.stride()
    at_16_bytes = conv_state.storage_offset() * conv_state.itemsize % 16 == 0
    return conv_state.shape[2] == 4 and column == 1 and batch % 4 == channel % 4 == 0 and at_16_bytes


@triton.jit
def column_of(channel, PARTS: tl.constexpr):
    """The columns of channels of [q | k | v] in a row.

    For each of the three, PARTS has its first channel, and for a head of it the width, the first column and the distance to the
    next head.
    """
    column = channel
    for i in tl.static_range(len(PARTS)):
        e = channel - PARTS[i][0]
        column = tl.where(e >= 0, PARTS[i][2] + e // PARTS[i][1] * PARTS[i][3] + e % PARTS[i][1], column)
    return column


@triton.jit
def causal_conv_update_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, out_ptr,
    stride_xb, stride_xd, stride_sb, stride_sd, stride_ss, stride_wd, stride_ww,
    D: tl.constexpr, S: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr,
    PACKED: tl.constexpr, OVERLAP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    pid = tl.program_id(0).to(tl.int64)
    batch = pid // tl.cdiv(D, BD)
    d = pid % tl.cdiv(D, BD) * BD + tl.arange(0, BD)  # [BD]
    live = d < D
    state_ptrs = state_ptr + batch * window_stride(stride_sb, PACKED) + d * window_stride(stride_sd, PACKED)  # [BD]
    weight_ptrs = weight_ptr + d * stride_wd  # [BD]
    last = tl.load(weight_ptrs + (W - 1) * stride_ww, mask=live, other=0.0).to(tl.float32)  # [BD]
    acc = tl.zeros((BD,), tl.float32)
    columns = load_window(state_ptrs, stride_ss, live, S, PACKED)  # of [BD]
    for j in tl.static_range(S + 1 - W, S):
        tap = tl.load(weight_ptrs + (j - (S + 1 - W)) * stride_ww, mask=live, other=0.0)  # [BD]
        acc += columns[j].to(tl.float32) * tap.to(tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + d, mask=live, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_wait()
    column = d if PARTS is None else column_of(d, PARTS)  # [BD]
    x = tl.load(x_ptr + batch * stride_xb + column * stride_xd, mask=live, other=0.0)  # [BD]
    acc += x.to(tl.float32) * last
    if SILU:
        acc = acc * tl.sigmoid(acc)
    tl.store(out_ptr + batch * D + d, acc, mask=live)

    store_window(state_ptrs, stride_ss, live, columns, x.to(state_ptr.dtype.element_ty), S, PACKED)


def launch(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The dialect's causal_conv_update at T = 1.

    Args:
        x: [B, D, 1], any strides.
        conv_state: [B, D, S], S ≥ W − 1, any strides; written in place.
        weight: [D, 1, W].
        bias: [D] or None.
        activation: "silu" or "none".
        overlap: whether conv_state, weight and bias may be read while kernels before this one run.

    Returns:
        [B, D, 1] in float32.
    """
    return launch_with(x, conv_state, weight, bias, activation, overlap=overlap)


def launch_with(x, conv_state, weight, bias, activation, parts=None, overlap=False) -> torch.Tensor:
    """The same. With `parts` as in `column_of`, x is [B, N, 1] and has the channels in those columns."""
    B, D, S = conv_state.shape
    options = overlap_options(x, bias) if overlap else {}
    out = torch.empty((B, D, 1), dtype=torch.float32, device=x.device)
    kernel_of(causal_conv_update_kernel)[(B * -(-D // BLOCK_D),)](
        x, conv_state, weight, None if bias is None else bias.contiguous(), out,
        x.stride(0), x.stride(1), *conv_state.stride(), weight.stride(0), weight.stride(2),
        D=D, S=S, W=weight.shape[-1], SILU=activation == "silu", BD=BLOCK_D,
        PACKED=packed(conv_state), OVERLAP=bool(options), PARTS=parts, num_warps=NUM_WARPS, **options,
    )  # fmt: skip
    return out


def supports(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
) -> None:
    """Raise Refused unless the kernel supports the arguments.

    T must be 1, D, S and W static with S ≥ W − 1 and S ≥ 1, dtypes float32, bfloat16 or float16, and the activation known.
    """
    require_dtypes(x=x, conv_state=conv_state, weight=weight, bias=bias)
    require_one_token(x.shape[-1])
    _, D, S = conv_state.shape
    W = weight.shape[-1]
    require_static(D=D, S=S, W=W)
    if S < 1 or S < W - 1:
        raise Refused(f"conv_state must keep at least W - 1 = {W - 1} columns and at least one, found {S}.")
    if activation not in ACTIVATIONS:
        raise Refused(f"activation must be one of {', '.join(ACTIVATIONS)}, found {activation}.")


implementation = register("causal_conv_update", launch, supports, early=("conv_state", "weight", "bias"))
