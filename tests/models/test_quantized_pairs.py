"""Quantised weights with what else a model may be given: the tokens are those without it."""

import pytest
import torch

import gdnfuse
from gdnfuse import models
from gdnfuse.capture_fp8 import dequantized_calls
from tests.models import zoo


def quantized(format, **options):
    model = models.quantized(zoo.causal_lm(**zoo.FILLED), format)
    return gdnfuse.compile(model, inner="eager", **options) or model


def generate(model, ids, new=4):
    return model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0)[:, ids.shape[1] :]


def fused(since, format):
    found = [r for r in gdnfuse.reports() if r.graph_id >= since and r.layers]
    assert found and all(r.fused_layers == len(r.layers) for r in found)
    kinds = {p.name: p.format for r in found for p in r.projections}
    return kinds["in_proj_qkv"] == kinds["down_proj"] == format


def next_report():
    return max((r.graph_id for r in gdnfuse.reports()), default=-1) + 1


@pytest.mark.sweep
@pytest.mark.parametrize(("format", "scale"), [("fp8_block128", "weight_scale_inv"), ("int4_group64", "weight_scale")])
def test_prefixes_and_speculation(format, scale):
    torch._dynamo.reset()
    ids = zoo.prompt(1, 70)[0]
    model = quantized(format)
    since = next_report()
    wanted = generate(model, ids)
    assert fused(since, format)
    model = models.quantized(zoo.causal_lm(**zoo.FILLED), format)
    store = gdnfuse.PrefixStore(model, every=64, max_bytes=1 << 24)
    gdnfuse.compile(model, inner="eager", prefixes=store)
    since = next_report()
    assert torch.equal(generate(model, ids), wanted)
    assert torch.equal(generate(model, ids), wanted) and store.stats().tokens_taken >= 64
    assert fused(since, format)
    before = store.stats().tokens_taken
    with torch.no_grad():
        getattr(model.model.layers[0].mlp.down_proj, scale).mul_(3)
    changed = generate(model, ids)
    assert not torch.equal(changed, wanted) and store.stats().tokens_taken == before, "another model has prefixes of its own"
    speculative = quantized(format, speculate=gdnfuse.PromptLookup(3))
    since = next_report()
    assert torch.equal(generate(speculative, ids), wanted) and fused(since, format)


@pytest.mark.sweep
@pytest.mark.parametrize("what", ["adapters", "experts", "speculation and prefixes"])
def test_activations_in_e4m3(what):
    """A prompt's linears on e4m3 quantise their input. Adapters, experts and steps do not."""
    torch._dynamo.reset()
    ids = zoo.prompt(1, 70)[0]
    build = (
        (lambda: zoo.moe(**zoo.FILLED, moe_intermediate_size=128)) if what == "experts" else lambda: zoo.causal_lm(**zoo.FILLED)
    )
    model, options = models.quantized(build()), {}
    if what == "adapters":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["in_proj_qkv", "out_proj", "gate_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, config).eval().requires_grad_(False).base_model.model
    with dequantized_calls(model, activations="fp8"), torch.no_grad():
        wanted = model(ids).logits
    with dequantized_calls(model), torch.no_grad():
        exact = model(ids).logits
    if what.startswith("speculation"):
        options = {"speculate": gdnfuse.PromptLookup(3), "prefixes": gdnfuse.PrefixStore(model, every=64, max_bytes=1 << 24)}
    gdnfuse.compile(model, inner="eager", activations="fp8", **options)
    since = next_report()
    with torch.no_grad():
        found = model(ids).logits
    assert zoo.relative(found, wanted) < 1e-2 and zoo.relative(exact, wanted) > 5e-2
    tokens = generate(model, ids)
    assert torch.equal(generate(model, ids), tokens)
    # The last layer computes one row there, and does not quantise it. So a token that is nearly as likely may be chosen.
    assert wanted[0, -1, tokens[0, 0]] > wanted[0, -1].max() - 0.1 * wanted[0, -1].std()
    prompts = [r for r in gdnfuse.reports() if r.graph_id >= since and r.phase == "prefill"]
    assert prompts and all(r.fused_layers == len(r.layers) for r in prompts)
    in_e4m3 = {p.name: "(activations in e4m3)" in p.computed for p in prompts[0].projections if p.format == "fp8_block128"}
    left = {name for name, quantised in in_e4m3.items() if not quantised}
    assert (
        in_e4m3["o_proj"]
        and left <= {"gate_up", "down", "gate_proj", "up_proj", "down_proj"}
        and (what == "experts") == bool(left)
    )
    reasons = {r.reason for r in prompts[0].all_records if r.rule == "activations"}
    assert ("Activations are quantised for linears, found experts." in reasons) == (what == "experts")
