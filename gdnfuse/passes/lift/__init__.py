"""lift: recognise the motifs of GDN and raise each to one dialect op. A motif is a file here and a line in RULES."""

from gdnfuse.passes.lift import (
    attention_decode,
    attention_few_queries,
    attention_growing,
    causal_attention,
    causal_conv_update,
    chunk_delta_rule,
    delta_rule,
    experts,
    gated_rms_norm,
    gating,
    l2norm,
    lora_linear,
    packed_linear,
    rms_norm,
    route,
    shared_expert,
)

# l2norm stands before the rules that read it, and the chunked rule before the other, whose anchor is any copy into a state;
# of the rules of attention the first two take more in than the last;
# siblings come last so that their slices are what the others read, and adapters behind them, which are on slices.
RULES = [
    l2norm.RULE,
    gating.RULE,
    causal_conv_update.RULE,
    chunk_delta_rule.RULE,
    delta_rule.RULE,
    gated_rms_norm.RULE,
    rms_norm.RULE,
    attention_decode.RULE,
    attention_growing.RULE,
    attention_few_queries.RULE,
    causal_attention.RULE,
    experts.RULE,
    route.RULE,
    shared_expert.RULE,
    packed_linear.RULE,
    lora_linear.RULE,
]
