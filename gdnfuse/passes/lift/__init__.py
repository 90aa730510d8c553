"""lift: recognise the motifs of GDN and turn each into one dialect op. A motif is a file here and a line in RULES."""

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
    prompt_attention,
    rms_norm,
    route,
    shared_expert,
)

# l2norm comes before the rules that read it. The chunked rule comes before the recurrent one, whose anchor is any copy into a
# state. The first two rules of attention match more of a layer than the last. Siblings come last, so that the other rules read
# slices of them, and adapters come after siblings, because they add to slices.
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
    prompt_attention.RULE,
    experts.RULE,
    route.RULE,
    shared_expert.RULE,
    packed_linear.RULE,
    lora_linear.RULE,
]
