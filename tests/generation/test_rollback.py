"""RollbackCache: what is recorded is read past, what stays is replayed, and whatever cannot be taken back is said."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import transformers

import gdnfuse
from gdnfuse import compat
from gdnfuse.generation import rollback
from gdnfuse.generation.rollback import RollbackCache
from tests.models import zoo

FAMILIES = ("causal_lm", "moe", "qwen3_next", "olmo_hybrid", "conditional_generation")
T = 5


def filled(model, capacity=None, rows=2, **options):
    """A cache that holds a prompt and records."""
    cache = RollbackCache(model, capacity, **options)
    with torch.no_grad():
        model(zoo.prompt(rows, 9)[0], **zoo.held(cache))
    cache.activate_past_recording()
    return cache


def stepped(model, tokens, rows=2):
    """A cache of transformers with the same prompt and these tokens one by one, and the logits behind each."""
    cache = zoo.new_cache(model, "dynamic")
    with torch.no_grad():
        model(zoo.prompt(rows, 9)[0], **zoo.held(cache))
        logits = [model(tokens[:, t : t + 1], **zoo.held(cache)).logits[:, 0] for t in range(tokens.shape[1])]
    return cache, logits


def alike(found, wanted):
    for kind in ("recurrent", "conv"):
        assert zoo.relative(zoo.flat_states(found, kind), zoo.flat_states(wanted, kind)) < 1e-5
    assert int(found.get_seq_length()) == wanted.get_seq_length()


@pytest.mark.parametrize("capacity", [None, 32])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_after_every_count_are_those_of_steps(family, capacity):
    model, tokens = getattr(zoo, family)(), zoo.tokens_for(2, T)
    for keep in range(T + 1):
        wanted, logits = stepped(model, tokens[:, :keep])
        cache = filled(model, capacity)
        before = [x.clone() for kind in ("recurrent", "conv") for x in zoo.states(cache)[kind]]
        found = model(tokens, **zoo.held(cache)).logits
        assert all(map(torch.equal, before, [x for kind in ("recurrent", "conv") for x in zoo.states(cache)[kind]]))
        cache.crop(keep - T)
        alike(cache, wanted)
        for t in range(keep):
            assert zoo.relative(found[:, t], logits[t]) < 1e-4
        cache.stop_past_recording()
        again = [model(tokens[:, :1], **zoo.held(x)).logits for x in (cache, wanted)]
        assert zoo.relative(*again) < 1e-4


@torch.no_grad()
def test_lengths_of_all_layers_are_cropped_in_one_launch():
    model = zoo.causal_lm(num_hidden_layers=4, layer_types=["linear_attention", *["full_attention"] * 3])
    cache, seen = filled(model, 32), []
    model(zoo.tokens_for(2, 3), **zoo.held(cache))
    with compat.seeing_ops(lambda op, result: seen.append(op.name())):
        cache.crop(-2)
    assert [name for name in seen if "sub_" in name] == ["aten::_foreach_sub_.Scalar"]
    assert [int(layer.get_seq_length()) for layer in cache.layers[1:]] == [10] * 3


@torch.no_grad()
def test_rounds_follow_each_other_and_other_calls_write_again():
    model, tokens = zoo.causal_lm(**zoo.SMALL), zoo.tokens_for(2, 12)
    cache, kept = filled(model), []
    for keep in (2, 0, 3):
        part = tokens[:, len(kept) : len(kept) + 3]
        model(part, **zoo.held(cache))
        cache.crop(keep - 3)
        kept += range(len(kept), len(kept) + keep)
    cache.stop_past_recording()
    model(tokens[:, 5:6], **zoo.held(cache))
    model(tokens[:, 6:12], **zoo.held(cache))
    alike(cache, stepped(model, tokens)[0])


@torch.no_grad()
def test_what_is_not_what_the_layer_computes_is_refused(monkeypatch):
    model = zoo.causal_lm(**zoo.SMALL)
    monkeypatch.setattr(rollback, "_proved", set())
    monkeypatch.setattr(rollback, "beta_scale_of", lambda mixer: 2.0)
    with pytest.raises(gdnfuse.GdnfuseError, match="relative error of .* in the state of Qwen3_5GatedDeltaNet: this model"):
        RollbackCache(model)


@torch.no_grad()
def test_bad_crops_and_calls_are_sentences_and_change_nothing():
    model = zoo.causal_lm(**zoo.SMALL)
    with pytest.raises(gdnfuse.GdnfuseError, match="must hold a prompt before it records, found it empty"):
        RollbackCache(model).activate_past_recording()
    cache = filled(model)
    with pytest.raises(gdnfuse.GdnfuseError, match="takes up to 8 tokens of 2 sequences in a call, found 9 of 2"):
        model(zoo.tokens_for(2, 9), **zoo.held(cache))
    tokens = zoo.tokens_for(2, 4)
    with pytest.raises(gdnfuse.GdnfuseError, match="be used with the model that it was made for, or a copy of it, found a model"):
        zoo.causal_lm(**zoo.SMALL)(tokens, **zoo.held(cache))
    cache = filled(model)
    model(tokens, **zoo.held(cache))
    before = copy.deepcopy(zoo.states(cache))
    for amount, sentence in (
        (-6, "takes back what it recorded since the last crop, 4 tokens, found 6"),
        (1, "as a negative number, or 0, found 1"),
        (True, "as a negative number, or 0, found True"),
    ):
        with pytest.raises(gdnfuse.GdnfuseError, match=sentence):
            cache.crop(amount)
    with pytest.raises(gdnfuse.GdnfuseError, match="found a second call after 4 tokens: call crop first"):
        model(tokens, **zoo.held(cache))
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(gdnfuse.GdnfuseError, match="must hold no recorded tokens when it is copied, found 4 tokens"):
            copied(cache)
    assert all(map(torch.equal, before["recurrent"], zoo.states(cache)["recurrent"])) and cache.pending == 4
    cache.abandon(9)
    alike(cache, stepped(model, tokens[:, :0])[0])
    for wrong in (0, True, "8"):
        with pytest.raises(gdnfuse.GdnfuseError, match="tokens must be at least 1, found"):
            RollbackCache(model, tokens=wrong)
        with pytest.raises(gdnfuse.GdnfuseError, match="max_cache_len must be None or at least 1, found"):
            RollbackCache(model, wrong)


@pytest.mark.parametrize("capacity", [None, 32])
@torch.no_grad()
def test_a_call_that_raised_in_the_middle_is_said_or_abandoned(capacity):
    model, tokens = zoo.causal_lm(), zoo.tokens_for(2, 4)
    cache = filled(model, capacity)

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(tokens, **zoo.held(cache))
    handle.remove()
    with pytest.raises(gdnfuse.GdnfuseError, match=r"found layers with \[0, 4\] tokens: the call did not run to its end"):
        cache.crop(0)
    cache.abandon(9)
    model(tokens, **zoo.held(cache))
    cache.crop(0)
    alike(cache, stepped(model, tokens)[0])


@torch.no_grad()
def test_copies_resets_and_states_of_another_dtype_are_whole():
    """Of which none lies where the first one's states do, which one launch reaches."""
    model, tokens = zoo.causal_lm(**zoo.SMALL), zoo.tokens_for(2, 3)
    wanted = stepped(model, tokens)[0]
    cache = filled(model, 32)
    copied = copy.deepcopy(cache)
    assert not copied.is_recording and next(iter(copied._mixers.values())) is model.model.layers[0].linear_attn
    copied.activate_past_recording()
    for one in (copied, cache):
        model(tokens, **zoo.held(one))
        one.crop(0)
        alike(one, wanted)
    cache.reset()
    model(zoo.prompt(2, 9)[0], **zoo.held(cache))
    cache.activate_past_recording()
    model(tokens, **zoo.held(cache))
    for layer in cache.layers[:1]:  # somebody else puts states elsewhere, as beams do
        layer.recurrent_states[0] = layer.recurrent_states[0].clone()
    cache.crop(-1)
    alike(cache, stepped(model, tokens[:, :2])[0])
    cache = RollbackCache(model)
    model(zoo.prompt(2, 9)[0], **zoo.held(cache))
    gdnfuse.set_state_dtype(cache, torch.bfloat16)
    cache.activate_past_recording()
    model(tokens, **zoo.held(cache))
    cache.crop(0)
    states = zoo.states(cache)["recurrent"]
    assert all(x.dtype == torch.bfloat16 for x in states)
    assert zoo.relative(states[0], zoo.states(wanted)["recurrent"][0]) < 1e-2


@torch.no_grad()
def test_weights_that_change_between_call_and_crop_are_said_and_later_ones_heeded():
    model, tokens = zoo.causal_lm(**zoo.SMALL), zoo.tokens_for(2, 3)
    cache = filled(model)
    model(tokens, **zoo.held(cache))
    mixer = model.model.layers[0].linear_attn
    mixer.A_log.add_(0.5)
    with pytest.raises(gdnfuse.GdnfuseError, match="found that they were written: cache.abandon"):
        cache.crop(-1)
    mixer.A_log.sub_(0.5)
    cache.abandon(9)
    cache.stop_past_recording()
    cache.activate_past_recording()
    model(tokens, **zoo.held(cache))
    cache.crop(0)
    alike(cache, stepped(model, tokens)[0])
    cache.stop_past_recording()
    mixer.conv1d.weight.mul_(1.5)
    wanted = copy.deepcopy(cache)
    for t in range(2):
        model(tokens[:, t : t + 1], **zoo.held(wanted))
    cache.activate_past_recording()
    model(tokens, **zoo.held(cache))
    cache.crop(-1)
    for kind in ("recurrent", "conv"):
        assert zoo.relative(zoo.flat_states(cache, kind), zoo.flat_states(wanted, kind)) < 1e-5


def test_other_caches_and_copies_of_the_model_know_nothing_of_it():
    model = zoo.causal_lm(**zoo.SMALL)
    RollbackCache(model)
    RollbackCache(model)
    (mixer,) = (m for m in model.modules() if hasattr(m, "A_log"))
    assert len(mixer._forward_hooks) == len(mixer._forward_pre_hooks) == len(mixer.in_proj_a._forward_hooks) == 1
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (other,) = (m for m in copied.modules() if hasattr(m, "A_log"))
        recorders = {id(hook.__self__) for m in (mixer, other) for hook in m._forward_hooks.values()}
        assert len(recorders) == 2
        cache, wanted = filled(copied), stepped(copied, zoo.tokens_for(2, 3))[0]
        with torch.no_grad():
            copied(zoo.tokens_for(2, 3), **zoo.held(cache))
        cache.crop(0)
        alike(cache, wanted)


def test_calls_in_other_threads_are_none_of_its_own():
    model, tokens = zoo.causal_lm(**zoo.SMALL), zoo.tokens_for(2, 3)
    wanted, _ = stepped(model, tokens)
    cache = filled(model)

    @torch.no_grad()
    def other():
        model(zoo.prompt(1, 4)[0], **zoo.held(zoo.new_cache(model, "dynamic")))

    def meanwhile(*_):
        handle.remove()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    (mixer,) = (m for m in model.modules() if hasattr(m, "A_log"))
    handle = mixer.in_proj_qkv.register_forward_hook(meanwhile)
    with torch.no_grad():
        model(tokens, **zoo.held(cache))
    cache.crop(0)
    alike(cache, wanted)
    cache.activate_past_recording()
    mixer.in_proj_a._forward_hooks.clear()  # the gate is not heard
    with torch.no_grad():
        model(tokens, **zoo.held(cache))
    with pytest.raises(gdnfuse.GdnfuseError, match=r"Both gates of a recorded call must be .* found layers without"):
        cache.crop(-1)


def test_models_that_cannot_be_rolled_back_are_refused():
    with pytest.raises(
        gdnfuse.GdnfuseError, match="needs a model whose linear attention is Gated DeltaNet, found LlamaForCausalLM"
    ):
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
        )
        RollbackCache(transformers.LlamaForCausalLM(config))
    model = zoo.causal_lm(**zoo.SMALL)
    mixer = model.model.layers[0].linear_attn
    mixer.in_proj_beta = mixer.in_proj_b
    del mixer.in_proj_b
    with pytest.raises(gdnfuse.GdnfuseError, match="found Qwen3_5GatedDeltaNet with out_proj, in_proj_qkv, in_proj_z, in_proj_a"):
        RollbackCache(model)
    with pytest.raises(gdnfuse.GdnfuseError, match="rotary embedding that is the same at all lengths, found rope_type 'dynamic'"):
        RollbackCache(zoo.causal_lm(**zoo.SMALL, rope_parameters={**zoo.ROPE, "rope_type": "dynamic", "factor": 2.0}))
    mixer.activation = "relu"
    with pytest.raises(gdnfuse.GdnfuseError, match="conv1d without bias, followed by SiLU, .* with 'relu'"):
        RollbackCache(model)
    if hasattr(transformers, "LaraMiniForCausalLM"):
        with pytest.raises(gdnfuse.GdnfuseError, match="found a DynamicSlidingWindowLayer"):
            RollbackCache(zoo.lara_mini())
