"""All of a GDN layer between in_proj and out_proj for one token: the conv kernel, then the gated delta rule with the gated norm.

The files of the two kernels (causal_conv_update, delta_rule) have the equations and papers. All six parts are read in place from
the packed row. The only intermediate is the conv's output, float32 [B, D, 1], so q, k, v are not rounded between the two.
"""

from __future__ import annotations

import torch

from gdnfuse.dialect.mixer_decode import columns, part_sizes, side_by_side
from gdnfuse.errors import Refused
from gdnfuse.kernels.causal_conv_update import launch_with as conv_with
from gdnfuse.kernels.causal_conv_update import supports as supports_conv
from gdnfuse.kernels.delta_rule import launch_gated, supports_packed_decode
from gdnfuse.kernels.gated_rms_norm import require_gate
from gdnfuse.kernels.launch.implementation import register, require_dtypes, require_static


def launch(
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
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The dialect's mixer_decode.

    Args:
        row: [B, 1, N], any strides.
        conv_state: [B, D, S], D = 2·H·K + HV·V; written in place.
        conv_weight: [D, 1, W].
        conv_bias: [D] or None.
        A_log, dt_bias: [HV].
        recurrent_state: [B, HV, K, V]; written in place.
        norm_weight: [V].
        offsets, strides: of q, k, v, z, b, a in the row, as in the dialect.
        activation: of the conv, "silu" or "none".
        scale: factor on q.
        l2norm_eps, norm_eps: eps of the l2norm of q and k, and of the gated norm.
        beta_scale: factor on σ(b).
        gate_activation: of the gated norm, "silu" or "sigmoid".
        overlap: whether states and weights may be read while kernels before these run.

    Returns:
        [B, 1, HV·V] in row's dtype.
    """
    D = conv_state.shape[1]
    heads, widths = part_sizes(D, recurrent_state)
    if side_by_side(offsets, strides, widths, heads):
        row_of_x, parts = row.narrow(-1, offsets[0], D), None
    else:
        first = (0, heads * widths[0], 2 * heads * widths[0])
        row_of_x, parts = row, tuple(zip(first, widths, offsets, strides, strict=False))
    x = row_of_x.transpose(1, 2)
    mixed_qkv = conv_with(x, conv_state, conv_weight, conv_bias, activation, parts, overlap).transpose(1, 2)
    z, b, a = (columns(row, *part, heads) for part in zip(offsets[3:], strides[3:], widths[3:], strict=True))
    return launch_gated(
        mixed_qkv, z, a, b, A_log, dt_bias, recurrent_state, norm_weight, scale, l2norm_eps, norm_eps, beta_scale,
        gate_activation, overlap=overlap,
    )  # fmt: skip


def supports(
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
) -> None:
    """Raise Refused for the same reasons as the kernels of the conv and of the packed rule, and unless the row has all parts."""
    require_dtypes(row=row, norm_weight=norm_weight)
    require_gate(gate_activation)
    D = conv_state.shape[1]
    require_static(**{"row's last size": row.shape[-1], "D": D})
    mixed_qkv = row.new_empty((*row.shape[:-1], D))
    supports_conv(mixed_qkv.transpose(1, 2), conv_state, conv_weight, conv_bias, activation)
    supports_packed_decode(mixed_qkv, row, row, A_log, dt_bias, recurrent_state, scale, l2norm_eps)
    heads, widths = part_sizes(D, recurrent_state)
    last = max(offset + (heads - 1) * stride + width for offset, stride, width in zip(offsets, strides, widths, strict=True))
    if last > row.shape[-1]:
        raise Refused(f"row must have the {last} columns of its parts, found {row.shape[-1]}.")


implementation = register(
    "mixer_decode",
    launch,
    supports,
    early=("conv_state", "conv_weight", "conv_bias", "A_log", "dt_bias", "recurrent_state"),
    measured="benchmarks/mixer.py --sweep",
)
