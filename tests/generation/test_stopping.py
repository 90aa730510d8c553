"""`generate` asks one step late whether to stop, and nobody sees the step that is undone."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import gdnfuse
from gdnfuse.generation import stopping
from tests.models import zoo

IDS = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]])
GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}


class Event:
    """On a CPU nothing is waited for."""

    def __init__(self, **kwargs):
        pass

    record = synchronize = lambda self: None


class Streamer:
    def __init__(self):
        self.seen = []

    def put(self, tokens):
        self.seen.append(tokens.tolist())

    def end(self):
        self.seen.append("end")


class Counting(LogitsProcessor):
    def __init__(self):
        self.calls = 0

    def __call__(self, ids, scores):
        self.calls += 1
        return scores


def counting(model, monkeypatch):
    """A list with an entry for each call of the model, its prompt's too, from now on."""
    prepare, calls = model.prepare_inputs_for_generation, []
    monkeypatch.setattr(model, "prepare_inputs_for_generation", lambda *a, **k: calls.append(1) or prepare(*a, **k))
    return calls


@pytest.fixture(scope="module")
def plain():
    return zoo.causal_lm(**zoo.SMALL)


@pytest.fixture
def ours(plain, monkeypatch):
    """Compiled as on a GPU, where there are events."""
    monkeypatch.setattr(stopping, "DEVICES", ("cpu",))
    monkeypatch.setattr(torch, "Event", Event)
    return gdnfuse.compile(copy.deepcopy(plain), inner="eager")


def test_tokens_are_the_same_and_a_step_that_is_one_too_many_is_undone(plain, ours, monkeypatch):
    free, (needed, taken) = plain.generate(IDS, **GREEDY), (counting(model, monkeypatch) for model in (plain, ours))
    assert torch.equal(ours.generate(IDS, **GREEDY), free) and len(taken) == 9  # the longest is known ahead
    shorter = 0
    for end in (int(free[0, 7]), int(free[1, 6]), free[:, 7].tolist(), free[:, -1].tolist()):
        needed.clear(), taken.clear()
        wanted = plain.generate(IDS, **GREEDY, eos_token_id=end)
        assert torch.equal(ours.generate(IDS, **GREEDY, eos_token_id=end), wanted)
        undone = len(taken) - len(needed)
        assert undone == (wanted.shape[1] < free.shape[1])
        shorter += undone
    assert shorter
    streams = [Streamer(), Streamer()]
    for model, streamer in zip((plain, ours), streams, strict=True):
        model.generate(IDS[:1], **GREEDY, eos_token_id=int(free[0, 7]), streamer=streamer)
    assert streams[0].seen == streams[1].seen and streams[0].seen[-1] == "end"


def test_a_step_is_waited_for_where_somebody_would_see_the_one_that_is_undone(plain, ours, monkeypatch):
    end = int(plain.generate(IDS[:1], **GREEDY)[0, 7])
    asked = {**GREEDY, "eos_token_id": end}
    needed, taken = (counting(model, monkeypatch) for model in (plain, ours))
    for bring in (
        lambda: {"logits_processor": LogitsProcessorList([Counting()])},
        lambda: {"stopping_criteria": [lambda ids, scores, **_: torch.zeros(len(ids), dtype=torch.bool)]},
        lambda: {"return_dict_in_generate": True},
    ):
        needed.clear(), taken.clear()
        brought = bring(), bring()
        outs = [model.generate(IDS[:1], **asked, **more) for model, more in zip((plain, ours), brought, strict=True)]
        assert torch.equal(*(getattr(out, "sequences", out) for out in outs)) and len(taken) == len(needed) > 0
    hook = ours.lm_head.register_forward_hook(lambda *args: None)
    for late in (False, True):
        taken.clear(), needed.clear()
        for model in (plain, ours):
            model.generate(IDS[:1], **asked)
        assert len(taken) == len(needed) + late
        hook.remove()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_drawn_behind_an_answer_is_the_same(plain):
    plain = copy.deepcopy(plain).cuda()
    ours, ids = gdnfuse.compile(copy.deepcopy(plain), inner="eager"), IDS.cuda()
    asked, found = {"max_new_tokens": 9, "do_sample": True, "pad_token_id": 0}, []
    torch.manual_seed(0)
    end = int(plain.generate(ids[:1], **asked)[0, 7])
    for model in (plain, ours):
        torch.manual_seed(0)
        found.append((model.generate(ids[:1], **asked, eos_token_id=end), torch.rand(4, device="cuda")))
    (wanted, drawn), (tokens, after) = found
    assert wanted.shape[1] == 8 and torch.equal(tokens, wanted) and torch.equal(after, drawn)
