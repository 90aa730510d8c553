"""mixer_decode: everything of a GDN layer between in_proj and out_proj, for one token, in one op."""

from __future__ import annotations

import torch

from gdnfuse.dialect.causal_conv_update import reference as causal_conv_update
from gdnfuse.dialect.gated_rms_norm import reference as gated_rms_norm
from gdnfuse.dialect.op import register
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
    qkv_offset: int,
    z_offset: int,
    b_offset: int,
    a_offset: int,
    activation: str,
    scale: float,
    l2norm_eps: float,
    norm_eps: float,
) -> torch.Tensor:
    """gated_rms_norm(packed_decode(causal_conv_update(qkv), a, b), z), all six parts read from one row.

    Args:
        row: [B, 1, N], the packed in_proj's output; part p starts at column `p_offset`.
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

    Returns:
        [B, 1, HV·V] in row's dtype.
    """
    B, HV, _, V = recurrent_state.shape
    D = conv_state.shape[1]
    mixed_qkv = causal_conv_update(row.narrow(-1, qkv_offset, D).reshape(B, D, 1), conv_state, conv_weight, conv_bias, activation)
    z, b, a = row.narrow(-1, z_offset, HV * V), row.narrow(-1, b_offset, HV), row.narrow(-1, a_offset, HV)
    o = packed_decode(mixed_qkv.reshape(B, 1, D), a, b, A_log, dt_bias, recurrent_state, scale, l2norm_eps)
    return gated_rms_norm(o, z.reshape(B, 1, HV, V), norm_weight, norm_eps).reshape(B, 1, HV * V)


def fake(
    row, conv_state, conv_weight, conv_bias, A_log, dt_bias, recurrent_state, norm_weight,
    qkv_offset, z_offset, b_offset, a_offset, activation, scale, l2norm_eps, norm_eps,
):  # fmt: skip
    B, HV, _, V = recurrent_state.shape
    return torch.empty((B, 1, HV * V), dtype=row.dtype, device=row.device)


def example_call(B, H, HV, K, V, dtype=torch.float32, *, bias=False, state_dtype=torch.float32, order="qzba", W=4):
    """A call with random inputs; `order` is the order of the parts in the row, by first letter."""
    D = 2 * H * K + HV * V
    sizes = {"q": D, "z": HV * V, "b": HV, "a": HV}
    offsets, total = {}, 0
    for part in order:
        offsets[part] = total
        total += sizes[part]
    args = (
        torch.randn(B, 1, total, dtype=dtype),
        torch.randn(B, D, W, dtype=dtype),
        torch.randn(D, 1, W, dtype=dtype) / 2,
        torch.randn(D, dtype=dtype) if bias else None,
        torch.rand(HV, dtype=dtype).add(0.1).log(),
        torch.randn(HV, dtype=dtype),
        torch.randn(B, HV, K, V, dtype=state_dtype),
        torch.randn(V, dtype=dtype),
        offsets["q"], offsets["z"], offsets["b"], offsets["a"],
        "silu", K**-0.5, 1e-6, 1e-6,
    )  # fmt: skip
    return args, {}


def examples():
    return [example_call(2, 2, 4, 8, 16), example_call(1, 1, 3, 16, 8, bias=True, order="azqb")]


op = register(
    "mixer_decode",
    reference,
    fake,
    examples,
    equation="gated_rms_norm(packed_decode(causal_conv_update(qkv), a, b), z) on row = [qkv | z | b | a]",
    mutates=("conv_state", "recurrent_state"),
)
