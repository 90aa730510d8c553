"""Quantised weights with what else a model may be given: the tokens are those without it."""

import pytest
import torch

import gdnfuse
from gdnfuse import models
from tests.models import zoo


def quantized(**options):
    model = models.quantized(zoo.causal_lm(**zoo.FILLED))
    return gdnfuse.compile(model, inner="eager", **options) or model


def generate(model, ids, new=4):
    return model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0)[:, ids.shape[1] :]


def fused(since):
    found = [r for r in gdnfuse.reports() if r.graph_id >= since and r.layers]
    assert found and all(r.fused_layers == len(r.layers) for r in found)
    kinds = {p.name: p.format for r in found for p in r.projections}
    return kinds["in_proj_qkv"] == kinds["down_proj"] == "fp8_block128"


def next_report():
    return max((r.graph_id for r in gdnfuse.reports()), default=-1) + 1


@pytest.mark.sweep
def test_prefixes_and_speculation():
    torch._dynamo.reset()
    ids = zoo.prompt(1, 70)[0]
    model = quantized()
    since = next_report()
    wanted = generate(model, ids)
    assert fused(since)
    model = models.quantized(zoo.causal_lm(**zoo.FILLED))
    store = gdnfuse.PrefixStore(model, every=64, max_bytes=1 << 24)
    gdnfuse.compile(model, inner="eager", prefixes=store)
    since = next_report()
    assert torch.equal(generate(model, ids), wanted)
    assert torch.equal(generate(model, ids), wanted) and store.stats().tokens_taken >= 64
    assert fused(since)
    before = store.stats().tokens_taken
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight_scale_inv.mul_(3)
    changed = generate(model, ids)
    assert not torch.equal(changed, wanted) and store.stats().tokens_taken == before, "another model has prefixes of its own"
    speculative = quantized(speculate=gdnfuse.PromptLookup(3))
    since = next_report()
    assert torch.equal(generate(speculative, ids), wanted) and fused(since)
