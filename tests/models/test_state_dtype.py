"""Recurrent states kept in half precision: same maths as eager on the same cache, opted into, and nothing else changed."""

import copy
import itertools

import pytest
import torch

import gdnfuse
from tests.models import zoo
from tests.sweeps import ALL

HALVES = [torch.bfloat16, torch.float16]


def small():
    return zoo.causal_lm(**zoo.SMALL)


def lowered(model, batch, kind, dtype):
    cache, mask = zoo.prefill(model, batch, kind)
    gdnfuse.set_state_dtype(cache, dtype)
    return cache, mask


CASES = [*itertools.product(HALVES, (1, 3), ("static", "dynamic"))]


@pytest.mark.parametrize(("dtype", "batch", "kind"), CASES if ALL else [CASES[0], CASES[-1]])
def test_decode_on_half_precision_states_is_eagers(dtype, batch, kind):
    model = small()
    run = torch.compile(copy.deepcopy(model), backend="gdnfuse", fullgraph=True, options={"inner": "eager", "strict": True})
    tokens = zoo.tokens_for(batch, 12)
    logits, caches = {}, {}
    for name, call in (("ours", run), ("eager", model)):
        caches[name], mask = lowered(model, batch, kind, dtype)
        logits[name] = zoo.decode(call, caches[name], mask, tokens)
    assert all(s.dtype == dtype for cache in caches.values() for s in zoo.states(cache)["recurrent"])
    # Float32 maths on both sides: what differs is which of two neighbours a sum was rounded to, now and then.
    assert zoo.relative(logits["ours"], logits["eager"]) < 0.1 * torch.finfo(dtype).eps
    found, wanted = (zoo.flat_states(caches[name], "recurrent") for name in ("ours", "eager"))
    assert zoo.relative(found, wanted) < 0.1 * torch.finfo(dtype).eps


def test_generate_keeps_the_states_of_its_prompt_in_the_dtype():
    model = small()
    ours = gdnfuse.compile(copy.deepcopy(model), inner="eager", state_dtype=torch.bfloat16)
    ids, _ = zoo.prompt(2)
    cache = zoo.new_cache(model, "static")
    found = ours.generate(ids, attention_mask=torch.ones_like(ids), **zoo.held(cache), max_new_tokens=12, do_sample=False)
    assert all(s.dtype == torch.bfloat16 for s in zoo.states(cache)["recurrent"])

    cache = zoo.new_cache(model, "static")
    wanted = [ids]
    with torch.no_grad():
        logits = model(ids, **zoo.held(cache)).logits
        gdnfuse.set_state_dtype(cache, torch.bfloat16)
        for _ in range(12):
            wanted.append(logits[:, -1:].argmax(-1))
            logits = model(wanted[-1], **zoo.held(cache)).logits
    assert torch.equal(found, torch.cat(wanted, 1))
    assert all(r.fused_layers == 1 for r in gdnfuse.reports())


def test_states_stay_float32_unless_asked():
    model = small().to(torch.bfloat16)
    ours = gdnfuse.compile(model, inner="eager")
    cache = zoo.new_cache(model, "static")
    ids, _ = zoo.prompt(2)
    ours.generate(ids, attention_mask=torch.ones_like(ids), **zoo.held(cache), max_new_tokens=3, do_sample=False)
    assert all(s.dtype == torch.float32 for s in zoo.states(cache)["recurrent"])


def test_a_state_goes_back_to_float32():
    model = small()
    cache, _ = lowered(model, 2, "static", torch.bfloat16)
    before = zoo.flat_states(cache, "recurrent")
    gdnfuse.set_state_dtype(cache, torch.float32)
    assert all(s.dtype == torch.float32 for s in zoo.states(cache)["recurrent"])
    assert torch.equal(zoo.flat_states(cache, "recurrent"), before)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "bfloat16", None])
def test_another_dtype_is_an_error_and_changes_nothing(dtype):
    model = small()
    cache, _ = zoo.prefill(model, 1, "static")
    with pytest.raises(gdnfuse.GdnfuseError, match=r"^state_dtype must be one of torch.float32, .* found "):
        gdnfuse.set_state_dtype(cache, dtype)
    assert all(s.dtype == torch.float32 for s in zoo.states(cache)["recurrent"])
    if dtype is not None:
        with pytest.raises(gdnfuse.GdnfuseError, match=r"^state_dtype must be one of"):
            gdnfuse.compile(model, inner="eager", state_dtype=dtype)
        assert model._compiled_call_impl is None


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_cache_before_its_prompt_is_an_error(kind):
    with pytest.raises(gdnfuse.GdnfuseError, match=r"must hold recurrent states, found none: run a prompt first\.$"):
        gdnfuse.set_state_dtype(zoo.new_cache(small(), kind), torch.bfloat16)


def test_a_prompt_that_returns_a_tuple_leaves_its_states_in_the_dtype():
    model = small()
    ours = gdnfuse.compile(model, inner="eager", state_dtype=torch.bfloat16)
    cache = zoo.new_cache(model, "static")
    ids, _ = zoo.prompt(2)
    with torch.no_grad():
        ours(ids, **zoo.held(cache), return_dict=False)
    assert all(s.dtype == torch.bfloat16 for s in zoo.states(cache)["recurrent"])
