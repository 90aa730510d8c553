"""The one-liner and generate(): tokens are eager's, whatever the decoding strategy."""

import copy

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

import gdnfuse
from gdnfuse.report.records import Status
from tests.models import zoo
from tests.sweeps import ALL, some

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


CASES = [(strategy, cache) for strategy in STRATEGIES for cache in ("static", "dynamic")]


@pytest.mark.parametrize(("strategy", "cache"), CASES if ALL else [CASES[1], CASES[4]])
def test_tokens_are_eagers(strategy, cache):
    model = zoo.causal_lm(**zoo.SMALL)
    ours = gdnfuse.compile(copy.deepcopy(model), inner="eager", strict=True)
    wanted = generated(model, strategy, cache_implementation=cache)
    assert torch.equal(generated(ours, strategy, cache_implementation=cache), wanted)
    assert decode_reports() and all(r.fused_layers == 1 for r in decode_reports())


@pytest.mark.parametrize("family", some(["conditional_generation", "moe"], "moe"))
def test_other_families_generate_eagers_tokens(family):
    model = zoo.FAMILIES[family](**zoo.SMALL)
    ours = gdnfuse.compile(copy.deepcopy(model), inner="eager")
    wanted = generated(model, "greedy", cache_implementation="static")
    assert torch.equal(generated(ours, "greedy", cache_implementation="static"), wanted)
    assert decode_reports() and all(r.fused_layers == 1 for r in decode_reports())


def test_compile_config_reaches_the_backend_by_name():
    model = zoo.causal_lm(**zoo.SMALL)
    config = CompileConfig(backend="gdnfuse", mode=None, options={"inner": "eager"}, fullgraph=True)
    config._compile_all_devices = True
    wanted = generated(copy.deepcopy(model), "greedy", cache_implementation="static")
    assert torch.equal(generated(model, "greedy", cache_implementation="static", compile_config=config), wanted)
    assert len(decode_reports()) == 1 and decode_reports()[0].fused_layers == 1


def test_model_compile_takes_prefill_and_decode():
    model = zoo.causal_lm(**zoo.SMALL)
    ours = copy.deepcopy(model)
    ours.compile(backend="gdnfuse", options={"inner": "eager"})
    assert torch.equal(generated(ours, "greedy", padded=False), generated(model, "greedy", padded=False))
    assert {r.phase for r in gdnfuse.reports()} == {"prefill", "decode"}


@pytest.mark.parametrize("padded", some([False, True], True))
def test_prompts_and_steps_are_compiled_once_for_all_lengths(padded):
    """Dynamo alone compiles them for the first length, and again for all."""
    model = zoo.causal_lm(**zoo.SMALL)
    ours = gdnfuse.compile(copy.deepcopy(model), inner="eager")
    for length in (7, 70):
        ids = torch.randint(0, 32, (2, length))
        mask = torch.ones_like(ids)
        mask[0, : 2 * padded] = 0
        call = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(ours.generate(ids, **call), model.generate(ids, **call))
    assert [r.phase for r in gdnfuse.reports()] == ["prefill", "decode"]
    (record,) = [r for r in decode_reports()[0].all_records if r.rule == "attention_growing" and r.stage == "lift"]
    assert record.status is Status.FIRED


@pytest.mark.parametrize(("padded", "made"), [(True, "here"), pytest.param(False, "before", marks=pytest.mark.sweep)])
def test_keys_of_a_fixed_length_are_not_marked(padded, made):
    model = zoo.causal_lm(**zoo.SMALL)
    ours = gdnfuse.compile(copy.deepcopy(model), inner="eager")
    ids, mask = zoo.prompt(2, padded=padded)
    mask = torch.ones_like(ids) if mask is None else mask
    for cache, marked in ((StaticCache(config=model.config, max_cache_len=32), False), (DynamicCache(config=model.config), True)):
        with torch.no_grad():
            if made == "before":
                model(ids[:, :2], attention_mask=mask[:, :2], **zoo.held(cache))
            ours(ids, attention_mask=torch.cat([mask[:, :2], mask], 1) if made == "before" else mask, **zoo.held(cache))
        held = [x for layer in cache.layers for x in (getattr(layer, n, None) for n in ("keys", "values")) if x is not None]
        assert [bool(getattr(x, "_dynamo_weak_dynamic_indices", ())) for x in held if x.ndim == 4] == [marked] * 2


def test_the_caller_s_tensors_are_not_marked():
    model = gdnfuse.compile(zoo.causal_lm(**zoo.SMALL), inner="eager")
    ids, mask = zoo.prompt(2, padded=True)
    longer = torch.cat([mask, mask[:, -1:]], 1)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True)[zoo.CACHE]
        model(ids[:, -1:], attention_mask=longer, **zoo.held(cache))
    assert decode_reports() and not any(vars(x) for x in (ids, mask, longer))


def prompts(model, lengths, mark=lambda ids: None, positional=False):
    with torch.no_grad():
        for length in lengths:
            ids = torch.randint(0, 32, (2, length))
            mask = torch.ones_like(ids)
            mask[0, :2] = 0
            mark(ids)
            model(ids, mask) if positional else model(ids, attention_mask=mask)
    return len(gdnfuse.reports())


def test_a_mask_by_position_has_any_length():
    model = gdnfuse.compile(zoo.causal_lm(**zoo.SMALL), inner="eager")
    assert prompts(model, (7, 12), positional=True) == 1


def test_what_the_caller_says_of_sizes_holds():
    static = lambda ids: torch._dynamo.mark_static(ids, 1)  # noqa: E731
    assert prompts(gdnfuse.compile(zoo.causal_lm(**zoo.SMALL), inner="eager"), (7, 12), static) == 2


def test_without_dynamic_sizes_each_length_has_a_graph():
    model = gdnfuse.compile(zoo.causal_lm(**zoo.SMALL), inner="eager", dynamic=False)
    ids, _ = zoo.prompt(2, 7)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3)
    assert [r.phase for r in gdnfuse.reports()] == ["prefill", "decode", "decode"]


def test_steps_behind_an_eager_prompt_are_compiled_once():
    model = gdnfuse.compile(zoo.causal_lm(**zoo.SMALL), inner="eager", prefill=False)
    generated(model, "greedy", cache_implementation="dynamic")
    assert [r.phase for r in gdnfuse.reports()] == ["decode"]
