"""Copies and pickles of a compiled model are right, and its own compilation does not depend on its generation config."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, GenerationMixin

import gdnfuse
from gdnfuse.generation.coverage import __name__ as log
from tests.models import zoo

IDS = torch.tensor([[5, 6, 7, 8, 9]])
STATIC = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
EAGER = {**STATIC, "disable_compile": True}


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Has generate ask for a compiled call wherever the cache is static, as it does on a GPU."""

    def criteria(self, kwargs, config):
        return not config.disable_compile and kwargs[zoo.CACHE].is_compileable

    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", criteria)


@pytest.fixture
def said(caplog):
    return lambda: [r.getMessage() for r in caplog.records if r.name == log]


def compiled(**options):
    """A model with compiled steps, and the same as it came."""
    model = zoo.causal_lm(**zoo.SMALL)
    return gdnfuse.compile(copy.deepcopy(model), inner="eager", **{"prefill": False, **options}), model


def steps():
    return [r.phase for r in gdnfuse.reports()].count("decode")


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_copies_and_pickles_are_right_and_not_compiled(on_a_gpu):
    ours, plain = compiled(strict=True)
    wanted = plain.generate(IDS, **EAGER)
    assert torch.equal(ours.generate(IDS, **STATIC), wanted) and steps() == 1
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), saved(ours), copy.deepcopy(copy.deepcopy(ours))):
        weight = copied.model.layers[0].mlp.down_proj.weight
        weight.copy_(torch.randn_like(weight))
        other = copy.deepcopy(plain)
        other.load_state_dict(copied.state_dict())
        assert copied.get_compiled_call.__self__ is copied and copied._compiled_call_impl is None
        assert torch.equal(copied.generate(IDS, **EAGER), other.generate(IDS, **EAGER))
        assert not torch.equal(copied.generate(IDS, **EAGER), wanted)
    assert torch.equal(ours.generate(IDS, **STATIC), wanted) and steps() == 1
    assert gdnfuse.compile(copied, inner="eager").get_compiled_call.model is copied


def test_what_generate_has_compiled_is_not_handed_on(on_a_gpu):
    """Neither before gdnfuse.compile nor after it, with a config of the user's: it stays bound to the first model."""
    config = CompileConfig(backend="eager", mode=None)
    model = zoo.causal_lm(**zoo.SMALL)
    model.get_compiled_call(config)
    gdnfuse.compile(model, inner="eager").get_compiled_call(config)
    copied = copy.deepcopy(model)
    assert copied.get_compiled_call(config) is not model.get_compiled_call(config)
    assert copied._compiled_call._torchdynamo_orig_callable.__self__ is copied
    pickle.dumps(model)


def test_any_generation_config_has_our_compilation(on_a_gpu):
    ours, plain = compiled(strict=True)
    wanted = plain.generate(IDS, **EAGER)
    ours.generation_config = GenerationConfig(pad_token_id=0)
    other = GenerationConfig(pad_token_id=0, max_new_tokens=4, cache_implementation="static")
    for call in (STATIC, {"generation_config": other}, EAGER):
        assert torch.equal(ours.generate(IDS, **call), wanted)
        assert steps() == 1
    assert "_compiled_call" not in vars(ours)


def test_a_compile_config_of_another_backend_is_said(on_a_gpu, said):
    for strict in (False, True):
        ours, _ = compiled(strict=strict)
        config = CompileConfig(backend="eager", mode=None)
        if strict:
            with pytest.raises(gdnfuse.GdnfuseError, match="^strict: .* backend 'eager'. Leave compile_config out"):
                ours.generate(IDS, **STATIC, compile_config=config)
        else:
            ours.generate(IDS, **STATIC, compile_config=config)
            ours.generate(IDS, **STATIC, compile_config=config)
    assert ["with backend 'eager'" in s for s in said()] == [True]
    # A config that stood on the model before is in place of nothing: it was asked for gdnfuse.
    model = zoo.causal_lm(**zoo.SMALL)
    model.generation_config.compile_config = config
    assert gdnfuse.compile(model).generation_config.compile_config is None
