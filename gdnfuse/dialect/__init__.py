"""The GDN dialect: one op per file, each with schema, plain PyTorch reference, fake and example inputs.

A reference is meaning, fallback and oracle at once. All references compute in ``promote_types(dtype, float32)``: in float32 for
models of any dtype up to float32, in float64 when every input is float64, which is what the proofs rely on.
"""

from gdnfuse.dialect import (
    add_rms_norm,
    attention_decode,
    attention_growing,
    attention_one_query,
    causal_attention,
    causal_conv,
    causal_conv_update,
    chunk_delta_rule,
    delta_rule,
    experts,
    fused_gating_chunk_delta_rule,
    fused_gating_delta_rule,
    fused_linear,
    gated_rms_norm,
    gating,
    in_proj_conv,
    l2norm,
    mixer_decode,
    packed_decode,
    packed_linear,
    rms_norm,
    route,
    routed_experts,
    split_linear,
)
from gdnfuse.dialect.op import OPS, DialectOp, op_of

__all__ = [
    "OPS",
    "DialectOp",
    "add_rms_norm",
    "attention_decode",
    "attention_growing",
    "attention_one_query",
    "causal_attention",
    "causal_conv",
    "causal_conv_update",
    "chunk_delta_rule",
    "delta_rule",
    "experts",
    "fused_gating_chunk_delta_rule",
    "fused_gating_delta_rule",
    "fused_linear",
    "gated_rms_norm",
    "gating",
    "in_proj_conv",
    "l2norm",
    "mixer_decode",
    "op_of",
    "packed_decode",
    "packed_linear",
    "rms_norm",
    "route",
    "routed_experts",
    "split_linear",
]
