"""The one-liner and generate(): tokens are eager's, whatever the decoding strategy."""

import copy

import pytest
import torch
from transformers import CompileConfig

import gdnfuse
from tests.models import zoo

STRATEGIES = {
    "greedy": {"max_new_tokens": 64, "do_sample": False},
    "sampling": {"max_new_tokens": 16, "do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"max_new_tokens": 16, "num_beams": 3, "do_sample": False},
}


def generated(model, strategy, batch=2, padded=True, **kwargs):
    ids, mask = zoo.prompt(batch, padded=padded)
    mask = torch.ones_like(ids) if mask is None else mask
    torch.manual_seed(3)
    return model.generate(ids, attention_mask=mask, **STRATEGIES[strategy], **kwargs)


def decode_reports():
    return [r for r in gdnfuse.reports() if r.phase == "decode"]


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tokens_are_eagers(strategy, cache):
    model = zoo.causal_lm()
    ours = gdnfuse.compile(copy.deepcopy(model), inner="eager")
    wanted = generated(model, strategy, cache_implementation=cache)
    assert torch.equal(generated(ours, strategy, cache_implementation=cache), wanted)
    assert decode_reports() and all(r.fused_layers == zoo.GDN_LAYERS for r in decode_reports())


@pytest.mark.parametrize("family", ["conditional_generation", "moe"])
def test_other_families_generate_eagers_tokens(family):
    model = zoo.FAMILIES[family](**zoo.SMALL)
    ours = gdnfuse.compile(copy.deepcopy(model), inner="eager")
    wanted = generated(model, "greedy", cache_implementation="static")
    assert torch.equal(generated(ours, "greedy", cache_implementation="static"), wanted)
    assert decode_reports() and all(r.fused_layers == 1 for r in decode_reports())


def test_compile_config_reaches_the_backend_by_name():
    model = zoo.causal_lm()
    config = CompileConfig(backend="gdnfuse", mode=None, options={"inner": "eager"}, fullgraph=True)
    config._compile_all_devices = True
    wanted = generated(copy.deepcopy(model), "greedy", cache_implementation="static")
    assert torch.equal(generated(model, "greedy", cache_implementation="static", compile_config=config), wanted)
    assert len(decode_reports()) == 1 and decode_reports()[0].fused_layers == zoo.GDN_LAYERS


def test_model_compile_takes_prefill_and_decode():
    model = zoo.causal_lm()
    ours = copy.deepcopy(model)
    ours.compile(backend="gdnfuse", options={"inner": "eager"})
    assert torch.equal(generated(ours, "greedy", padded=False), generated(model, "greedy", padded=False))
    assert {r.phase for r in gdnfuse.reports()} == {"prefill", "decode"}
