"""fuse: tiny patterns over dialect ops. A fusion is a file here and a line in RULES, before those that build on it."""

from gdnfuse.passes.fuse import (
    add_rms_norm,
    conv_context,
    gating_chunk_delta_rule,
    gating_delta_rule,
    l2norm_delta_rule,
    mixer_decode,
    mixer_linears,
    norm_experts,
    norm_linear,
    packed_decode,
    repeat_delta_rule,
    residual_experts,
    residual_linear,
    route_experts,
    swiglu_linear,
    verify_delta_rule,
)

RULES = [
    gating_delta_rule.RULE,
    gating_chunk_delta_rule.RULE,
    l2norm_delta_rule.RULE,
    repeat_delta_rule.RULE,
    verify_delta_rule.RULE,
    conv_context.RULE,
    packed_decode.RULE,
    mixer_decode.RULE,
    route_experts.RULE,
    norm_experts.RULE,
    norm_linear.RULE,
    mixer_linears.RULE,
    swiglu_linear.RULE,
    residual_linear.RULE,
    residual_experts.RULE,
    add_rms_norm.RULE,
]
