"""All of a GDN layer between in_proj and out_proj for one token: the conv kernel, then the gated delta rule with the gated norm.

Equations and papers stand with the two kernels (causal_conv_update, delta_rule). All six parts are read in place from the packed
row; the only intermediate is the conv's output, float32 [B, D, 1], so that q, k, v are not rounded between the two.
"""

from __future__ import annotations

import torch

from gdnfuse.kernels.causal_conv_update import launch as causal_conv_update
from gdnfuse.kernels.causal_conv_update import supports as supports_conv
from gdnfuse.kernels.delta_rule import launch_gated, supports_packed_decode
from gdnfuse.kernels.implementation import register, require_dtypes


def launch(
    row: torch.Tensor,
    conv_state: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    recurrent_state: torch.Tensor,
    norm_weight: torch.Tensor,
    qkv_offset: int,
    z_offset: int,
    b_offset: int,
    a_offset: int,
    activation: str,
    scale: float,
    l2norm_eps: float,
    norm_eps: float,
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The dialect's mixer_decode.

    Args:
        row: [B, 1, N], any strides; part p starts at column `p_offset`.
        conv_state: [B, D, S], D = 2·H·K + HV·V; written in place.
        conv_weight: [D, 1, W].
        conv_bias: [D] or None.
        A_log, dt_bias: [HV].
        recurrent_state: [B, HV, K, V]; written in place.
        norm_weight: [V].
        qkv_offset, z_offset, b_offset, a_offset: columns of D, HV·V, HV and HV parts.
        activation: of the conv, "silu" or "none".
        scale: factor on q.
        l2norm_eps, norm_eps: eps of the l2norm of q and k, and of the gated norm.
        overlap: whether states and weights may be read while kernels before these run.

    Returns:
        [B, 1, HV·V] in row's dtype.
    """
    _, HV, _, V = recurrent_state.shape
    D = conv_state.shape[1]
    x = row.narrow(-1, qkv_offset, D).transpose(1, 2)
    mixed_qkv = causal_conv_update(x, conv_state, conv_weight, conv_bias, activation, overlap=overlap).transpose(1, 2)
    z, b, a = row.narrow(-1, z_offset, HV * V), row.narrow(-1, b_offset, HV), row.narrow(-1, a_offset, HV)
    return launch_gated(
        mixed_qkv, z, a, b, A_log, dt_bias, recurrent_state, norm_weight, scale, l2norm_eps, norm_eps, overlap=overlap
    )


def supports(
    row: torch.Tensor,
    conv_state: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    recurrent_state: torch.Tensor,
    norm_weight: torch.Tensor,
    qkv_offset: int,
    z_offset: int,
    b_offset: int,
    a_offset: int,
    activation: str,
    scale: float,
    l2norm_eps: float,
    norm_eps: float,
) -> None:
    """Raises Refused where the conv's or the packed rule's kernel would, on the parts of the row."""
    require_dtypes(row=row, norm_weight=norm_weight)
    D = conv_state.shape[1]
    mixed_qkv = row.narrow(-1, qkv_offset, D)
    supports_conv(mixed_qkv.transpose(1, 2), conv_state, conv_weight, conv_bias, activation)
    supports_packed_decode(mixed_qkv, row, row, A_log, dt_bias, recurrent_state, scale, l2norm_eps)


implementation = register(
    "mixer_decode",
    launch,
    supports,
    mutates=("conv_state", "recurrent_state"),
    early=("conv_state", "conv_weight", "conv_bias", "A_log", "dt_bias", "recurrent_state"),
    measured="benchmarks/mixer.py --sweep",
)
