"""Quantised weights with what else a model may be given: the tokens are those without it."""

import pytest
import torch

import gdnfuse
from gdnfuse import models
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
