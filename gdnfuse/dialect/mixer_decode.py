"""mixer_decode: everything of a GDN layer between in_proj and out_proj, for one token, in one op."""

from __future__ import annotations

import torch

from gdnfuse.dialect.causal_conv_update import reference as causal_conv_update
from gdnfuse.dialect.gated_rms_norm import reference as gated_rms_norm
from gdnfuse.dialect.op import register
from gdnfuse.dialect.packed_decode import key_heads
from gdnfuse.dialect.packed_decode import reference as packed_decode


def reference(
    row: torch.Tensor,
    conv_state: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    recurrent_state: torch.Tensor,
    norm_weight: torch.Tensor,
    offsets: list[int],
    strides: list[int],
    activation: str,
    scale: float,
    l2norm_eps: float,
    norm_eps: float,
    beta_scale: float = 1.0,
    gate_activation: str = "silu",
) -> torch.Tensor:
    """gated_rms_norm(packed_decode(causal_conv_update(qkv), a, b), z), all six parts read from one row.

    Args:
        row: [B, 1, N], the packed in_proj's output.
        conv_state: [B, D, S], D = 2·H·K + HV·V; written in place.
        conv_weight: [D, 1, W].
        conv_bias: [D] or None.
        A_log, dt_bias: [HV].
        recurrent_state: [B, HV, K, V]; written in place.
        norm_weight: [V].
        offsets, strides: of q, k, v, z, b, a. The columns of key head h start at offset + h·stride. These are K columns of q and
            of k, HV/H·V of v and of z, HV/H of b and of a. If the stride is this number, the heads are adjacent.
        activation: of the conv, "silu" or "none".
        scale: factor on q.
        l2norm_eps, norm_eps: eps of the l2norm of q and k, and of the gated norm.
        beta_scale, gate_activation: as for fused_gating_delta_rule and gated_rms_norm.

    Returns:
        [B, 1, HV·V] in row's dtype.
    """
    B, HV, _, V = recurrent_state.shape
    D = conv_state.shape[1]
    heads, widths = part_sizes(D, recurrent_state)
    q, k, v, z, b, a = (columns(row, *part, heads).reshape(B, 1, -1) for part in zip(offsets, strides, widths, strict=True))
    packed = side_by_side(offsets, strides, widths, heads)
    mixed_qkv = row.narrow(-1, offsets[0], D) if packed else torch.cat([q, k, v], -1)
    mixed_qkv = causal_conv_update(mixed_qkv.reshape(B, D, 1), conv_state, conv_weight, conv_bias, activation)
    o = packed_decode(mixed_qkv.reshape(B, 1, D), a, b, A_log, dt_bias, recurrent_state, scale, l2norm_eps, beta_scale)
    return gated_rms_norm(o, z.reshape(B, 1, HV, V), norm_weight, norm_eps, gate_activation).reshape(B, 1, HV * V)


def part_sizes(channels: int, recurrent_state: torch.Tensor) -> tuple[int, list[int]]:
    """The number of key heads, and how many columns of q, k, v, z, b and a belong to each."""
    _, HV, K, V = recurrent_state.shape
    H = key_heads(channels, recurrent_state)
    return H, [K, K, HV // H * V, HV // H * V, HV // H, HV // H]


def columns(row: torch.Tensor, offset: int, stride: int, width: int, heads: int) -> torch.Tensor:
    """A part of a row [..., N] as a view [..., heads, width]. The columns of head h start at offset + h·stride."""
    return row.narrow(-1, offset, (heads - 1) * stride + width).unfold(-1, width, stride)


def side_by_side(offsets: list[int], strides: list[int], widths: list[int], heads: int) -> bool:
    """Whether q, k and v are one range of columns, like the channels of the conv."""
    at = [offsets[0], offsets[0] + heads * widths[0], offsets[0] + 2 * heads * widths[0]]
    return list(offsets[:3]) == at and (heads == 1 or list(strides[:3]) == widths[:3])


def fake(
    row, conv_state, conv_weight, conv_bias, A_log, dt_bias, recurrent_state, norm_weight,
    offsets, strides, activation, scale, l2norm_eps, norm_eps, beta_scale=1.0, gate_activation="silu",
):  # fmt: skip
    B, HV, _, V = recurrent_state.shape
    return torch.empty((B, 1, HV * V), dtype=row.dtype, device=row.device)


def example_call(
    B, H, HV, K, V, dtype=torch.float32, *, bias=False, state_dtype=torch.float32, order="qkvzba", W=4, beta_scale=1.0,
    gate_activation="silu",
):  # fmt: skip
    """A call with random inputs. `order` is the order of the parts in the row: of all heads, or head by head between commas."""
    D = 2 * H * K + HV * V
    offsets, strides, total = layout(order, H, HV, K, V)
    args = (
        torch.randn(B, 1, total, dtype=dtype),
        torch.randn(B, D, W, dtype=dtype),
        torch.randn(D, 1, W, dtype=dtype) / 2,
        torch.randn(D, dtype=dtype) if bias else None,
        torch.rand(HV, dtype=dtype).add(0.1).log(),
        torch.randn(HV, dtype=dtype),
        torch.randn(B, HV, K, V, dtype=state_dtype),
        torch.randn(V, dtype=dtype),
        offsets, strides, "silu", K**-0.5, 1e-6, 1e-6, beta_scale, gate_activation,
    )  # fmt: skip
    return args, {}


def layout(order, H, HV, K, V):
    """Offsets and strides of q, k, v, z, b, a, and the total number of columns.

    In "qkvzba" the heads of each part are adjacent. "qkvz,ba" has q, k, v and z of the first key head, then of the next, and so
    on, then b and a of each.
    """
    widths = dict(zip("qkvzba", (K, K, HV // H * V, HV // H * V, HV // H, HV // H), strict=True))
    where, total = {}, 0
    for group in order.split(",") if "," in order else order:
        at = total
        for part in group:
            where[part] = (at, sum(widths[p] for p in group))
            at += widths[part]
        total += H * sum(widths[p] for p in group)
    offsets, strides = zip(*(where[p] for p in "qkvzba"), strict=True)
    return list(offsets), list(strides), total


def examples():
    return [
        example_call(2, 2, 4, 8, 16),
        example_call(1, 1, 3, 16, 8, bias=True, order="azqkvb", beta_scale=2.0),
        example_call(2, 2, 4, 8, 4, order="qkvz,ba", gate_activation="sigmoid"),
    ]


op = register(
    "mixer_decode",
    reference,
    fake,
    examples,
    equation="gated_rms_norm(packed_decode(causal_conv_update(qkv), a, b), z) on columns of one row",
    mutates=("conv_state", "recurrent_state"),
)
