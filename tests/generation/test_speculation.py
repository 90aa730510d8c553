"""Speculative decoding: the tokens, or their distribution, are those of plain generate, whoever drafts."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import pickle
import threading

import pytest
import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

import gdnfuse
from gdnfuse import Callback, Draft, PromptLookup, models
from gdnfuse.generation import recorded, speculation
from gdnfuse.generation.generate import OTHERS
from gdnfuse.generation.lookup import History
from gdnfuse.generation.proposers import Always, Drafts, Run, _Drafting, _Places
from tests.generation.repeated import Repeated, StandIn, repeat_steps
from tests.models import zoo
from tests.models.test_adapters import LoRA
from tests.sweeps import some

FAMILIES = ("causal_lm", "moe", "qwen3_next", "olmo_hybrid", "conditional_generation")
PROPOSERS = ("lookup", "draft", "function")
GREEDY = {"max_new_tokens": 24, "do_sample": False}


def built(family="causal_lm", **overrides):
    """Logits far apart, so that tokens vary and no rounding chooses between two."""
    model = getattr(zoo, family)(**overrides)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    model.generation_config.pad_token_id = 0
    return model


def disturbed(model, scale):
    """One that says what the model says, mostly."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * p.std().nan_to_num(0) * scale)
    return other


def guesses(answer, right, seed=0):
    """A function that gives the tokens that the model will say, each with a probability, and else others."""
    generator = torch.Generator().manual_seed(seed)

    def propose(ids):
        tokens = answer[:, ids.shape[1] : ids.shape[1] + 4]
        if not tokens.shape[1]:
            return None
        return torch.where(torch.rand(tokens.shape, generator=generator) < right, tokens, (tokens + 1) % 128)

    return propose


def draft_for(proposer, model, answer, seed):
    if proposer == "lookup":
        return PromptLookup(4, 1 + seed % 3)
    return Draft(disturbed(model, 0.05), 1 + seed % 4) if proposer == "draft" else guesses(answer, 0.7, seed)


def case(model, proposer, seed, **more):
    """One random call, plain and with drafts; and how many of these stood."""
    rows, padded = 1 + seed % 2, seed % 3 == 1
    ids, mask = zoo.prompt(rows, 5 + seed % 7, padded, seed=seed)
    ids = ids.clamp(min=1)  # the embedding of 0 is zero, so that it would not show if padding were not masked
    if proposer == "lookup":  # tokens that stand there before
        ids, mask = (x if x is None else torch.cat([x, x.clamp(min=1) if x is mask else x], 1) for x in (ids, mask))
    asked = {**GREEDY, "attention_mask": mask, "cache_implementation": ("static", None)[seed // 2 % 2], **more}
    if mask is None:
        del asked["attention_mask"]
    wanted = model.generate(ids, **asked)
    speculative = gdnfuse.speculative(draft_for(proposer, model, wanted, seed))
    found = model.generate(ids, custom_generate=speculative, **asked)
    assert torch.equal(found, wanted), (proposer, seed)
    return speculative.acceptance


def run(family, proposer, seeds):
    model = built(family)
    counts = [case(model, proposer, seed) for seed in seeds]
    accepted, drafted = sum(c.accepted for c in counts), sum(c.drafted for c in counts)
    assert 0 < accepted < drafted


@pytest.mark.parametrize(
    ("family", "proposer", "first"),
    [
        ("causal_lm", "lookup", 0), ("causal_lm", "draft", 4), ("moe", "function", 8), ("qwen3_next", "draft", 12),
        ("olmo_hybrid", "function", 16),
    ],
)  # fmt: skip
def test_tokens_are_greedys(family, proposer, first):
    """20 cases; the other 580 are the sweep's."""
    run(family, proposer, range(first, first + 4))


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_tokens_are_greedys_in_200_cases(family, proposer):
    run(family, proposer, range(40))


@pytest.mark.parametrize("proposer", some(PROPOSERS, "draft"))
def test_in_bfloat16_the_first_difference_is_a_near_tie(proposer):
    model = built().bfloat16()
    for seed in range(4):
        ids = zoo.prompt(1, 8, seed=seed)[0]
        wanted = model.generate(ids, **GREEDY, output_logits=True, return_dict_in_generate=True)
        drafts = draft_for(proposer, model, wanted.sequences, seed)
        found = model.generate(ids, **GREEDY, custom_generate=gdnfuse.speculative(drafts))
        differ = (found != wanted.sequences)[0].nonzero().flatten().tolist()
        if differ:
            logits = wanted.logits[differ[0] - ids.shape[1]][0]
            chosen, other = logits[wanted.sequences[0, differ[0]]], logits[found[0, differ[0]]]
            assert chosen - other < 0.02 * logits.abs().max()


def answers(model, speculate, **more):
    """What a call gives, plain and with drafts of its answer, and the second's acceptance."""
    asked = {**GREEDY, "return_dict_in_generate": True, **more}
    ids = zoo.prompt(1, 8)[0]
    fresh = {k: copy.deepcopy(v) for k, v in asked.items()}
    wanted = model.generate(ids, **asked)
    speculative = gdnfuse.speculative(speculate or guesses(wanted.sequences, 0.8))
    return wanted, model.generate(ids, custom_generate=speculative, **fresh), speculative.acceptance


class Own:
    """A proposer of a user's."""

    def __init__(self, give, n=4):
        self.give, self.n = give, n

    def start(self, run):
        return self

    def propose(self, ids, rows):
        return self.give(ids)


def test_what_a_users_proposer_gives_is_looked_at():
    """Fewer tokens than n, or none, are steps of fewer; what is none of the model's is a sentence, and the model goes on."""
    model = built()
    ids = zoo.prompt(1, 8)[0]
    wanted = model.generate(ids, **GREEDY)
    for n in (2, 0):
        speculative = gdnfuse.speculative(Own(lambda ids, n=n: Drafts(ids[:, ids.shape[1] - n :])))
        assert torch.equal(model.generate(ids, **GREEDY, custom_generate=speculative), wanted)
        assert speculative.acceptance.drafted == n * speculative.acceptance.rounds
    for give, sentence in (
        (lambda ids: Drafts(ids[:, -4:] + 1000), "Drafts must be ids below 128, the model's vocabulary, found 10"),
        (lambda ids: Drafts(ids[:, -4:] - 1000), "Drafts must be ids below 128"),
        (
            lambda ids: Drafts(ids[:, -4:].float()),
            r"Drafts of ids \[1, up to 4\] on cpu, or None, found \[1, 4\] of torch.float32",
        ),
        (lambda ids: Drafts(ids[:, -6:]), r"or None, found \[1, 6\] of torch.int64"),
        (lambda ids: Drafts(ids[:, -4:].repeat(2, 1)), r"or None, found \[2, 4\]"),
        (lambda ids: Drafts(ids[:, -4:], torch.ones(1, 4, 7)), r"must be \[1, 4, 128\], found \[1, 4, 7\]"),
        (lambda ids: [[1, 2]], "or None, found list"),
    ):
        with pytest.raises(gdnfuse.GdnfuseError, match=sentence):
            model.generate(ids, **GREEDY, custom_generate=gdnfuse.speculative(Own(give)))
    for n in (0, 8, "4"):
        with pytest.raises(gdnfuse.GdnfuseError, match="Own drafts 1 to 7 tokens at a time"):
            gdnfuse.speculative(Own(None, n))


def test_after_a_warmup_no_step_with_drafts_is_compiled():
    """Also where random prompts have nothing that is looked up."""
    torch.compiler.reset()
    gdnfuse.clear_reports()
    model = gdnfuse.compile(built(**zoo.SMALL), inner="eager", speculate=PromptLookup(2))
    warm = gdnfuse.warmup(model)
    assert warm.graphs["verify"] == 1 and warm.graphs["decode"] and model.generate.acceptance.rounds
    gdnfuse.clear_reports()
    ids = zoo.prompt(1, 30)[0].repeat(1, 2)
    model.generate(ids, **GREEDY)
    assert model.generate.acceptance.rounds and not gdnfuse.reports()


class Remembering(LogitsProcessor):
    """One that must be asked once of each token that stands, in order: it forbids what it said last but one."""

    def __init__(self):
        self.asked = []

    def __call__(self, input_ids, scores):
        self.asked.append(input_ids.shape[1])
        return scores.roll(len(self.asked) % 3, -1)


class Sum(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None or len(scores)
        return torch.tensor([int(row[8:].sum()) > 900 for row in input_ids])


def test_processors_and_criteria_see_the_tokens_that_stand_and_no_others():
    model = built()
    ours, theirs = Remembering(), Remembering()
    ids = zoo.prompt(1, 8)[0]
    wanted = model.generate(ids, **GREEDY, logits_processor=[theirs])
    found = model.generate(
        ids, **GREEDY, logits_processor=[ours], custom_generate=gdnfuse.speculative(guesses(wanted, 0.8))
    )  # fmt: skip
    assert torch.equal(found, wanted) and ours.asked == theirs.asked
    for more in (
        {"repetition_penalty": 2.0, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
        {"stopping_criteria": [Sum()], "output_scores": True},
        {"max_new_tokens": 1}, {"max_new_tokens": 2}, {"max_time": 0.0},
    ):  # fmt: skip
        wanted, found, _ = answers(model, None, **more)
        assert torch.equal(found.sequences, wanted.sequences), more


def test_scores_logits_and_the_cache_are_those_of_plain_generate():
    model = built()
    for implementation in (None, "static"):
        more = {"output_scores": True, "output_logits": True, "repetition_penalty": 1.5, "cache_implementation": implementation}
        wanted, found, acceptance = answers(model, None, **more)
        assert acceptance.accepted and {*wanted.keys()} == {*found.keys()} and len(found.scores) == len(wanted.scores) == 24
        for name in ("scores", "logits"):
            assert zoo.relative(torch.stack(found[name]), torch.stack(wanted[name])) < 1e-4
        ours, theirs = found[zoo.CACHE], wanted[zoo.CACHE]
        assert int(ours.get_seq_length()) == int(theirs.get_seq_length())
        for kind in ("recurrent", "conv"):
            assert zoo.relative(zoo.flat_states(ours, kind), zoo.flat_states(theirs, kind)) < 1e-4
        assert acceptance.tokens == 24 and acceptance.accepted <= acceptance.drafted == 4 * acceptance.rounds
        steps = acceptance.rounds + acceptance.plain_steps
        assert acceptance.tokens_per_step == 23 / steps > 1.5 and f"{23 / steps:.2f} tokens per step" in str(acceptance)


def test_an_end_of_text_inside_a_draft_ends_it_there():
    model = built()
    for rows in (1, 3):
        ids = torch.cat([zoo.prompt(1, 8, seed=i)[0] for i in range(rows)])
        plain = model.generate(ids, **GREEDY)
        for place in (9, 11, 14):
            eos = [int(row[place + i]) for i, row in enumerate(plain)]  # each row ends elsewhere
            wanted = model.generate(ids, **GREEDY, eos_token_id=eos)
            drafts = gdnfuse.speculative(guesses(plain, 1.0))
            found = model.generate(ids, **GREEDY, eos_token_id=eos, custom_generate=drafts, return_dict_in_generate=True)
            assert torch.equal(found.sequences, wanted)
            assert int(found[zoo.CACHE].get_seq_length()) == wanted.shape[1] - 1


class Short(StoppingCriteria):
    """Each row is done at another length."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= 11 + 3 * i for i in range(len(input_ids))])


def test_rows_that_are_done_are_padded_as_transformers_pads_them():
    model = built(**zoo.SMALL)
    model.generation_config.pad_token_id = model.config.pad_token_id = None
    ids = torch.cat([zoo.prompt(1, 8, seed=i)[0] for i in range(3)])
    plain = model.generate(ids, **GREEDY)
    ends = [int(row[11]) for row in plain]
    for more in ({"eos_token_id": ends}, {"eos_token_id": ends[::-1]}, {}):
        for criteria in ([], [Short()]):
            for processors in ([], [Remembering()]):
                asked = {**GREEDY, **more, "stopping_criteria": criteria, "logits_processor": processors}
                wanted = model.generate(ids, **asked)
                drafts = gdnfuse.speculative(guesses(wanted, 1.0))
                assert torch.equal(model.generate(ids, **asked, custom_generate=drafts), wanted), (more, criteria, processors)
                assert drafts.acceptance.accepted


class Streamed:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamers_get_every_token_once():
    model = built(**zoo.SMALL)
    ids = zoo.prompt(1, 8)[0]
    wanted = model.generate(ids, **GREEDY)
    gdnfuse.compile(model, inner="eager", speculate=guesses(wanted, 0.8))
    streamer = Streamed()
    found = model.generate(ids, **GREEDY, streamer=streamer)
    assert streamer.ended and streamer.tokens == found[0].tolist() == wanted[0].tolist()
    explicit = Streamed()
    del model.generate
    model.generate(ids, **GREEDY, custom_generate=gdnfuse.speculative(PromptLookup(2), explicit))
    assert explicit.ended and explicit.tokens == wanted[0, 8:].tolist()


def test_a_filled_cache_goes_on_where_it_was():
    model = built()
    ids = zoo.prompt(1, 8)[0]
    for capacity in (None, 64):
        cache = gdnfuse.RollbackCache(model, capacity)
        first = model.generate(ids, **GREEDY, **{zoo.CACHE: cache}, custom_generate=gdnfuse.speculative(PromptLookup(3)))
        longer = torch.cat([first, zoo.tokens_for(1, 3)], 1)  # with the token of padding in it, which transformers hides
        assert (longer == 0).any()
        wanted = model.generate(longer, **GREEDY)
        for proposer in (PromptLookup(3), guesses(wanted, 0.7)):
            held = copy.deepcopy(cache)
            found = model.generate(longer, **GREEDY, **{zoo.CACHE: held}, custom_generate=gdnfuse.speculative(proposer))
            assert torch.equal(found, wanted) and int(held.get_seq_length()) == wanted.shape[1] - 1
    chunked = model.generate(longer, **GREEDY, prefill_chunk_size=5, custom_generate=gdnfuse.speculative(PromptLookup(3)))
    assert torch.equal(chunked, wanted)


def test_an_error_in_the_middle_leaves_the_cache_whole():
    model = built()
    ids = zoo.prompt(1, 8)[0]
    answer = model.generate(ids, **GREEDY)

    class Broken(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == 15:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def raising(ids):
        if ids.shape[1] > 12:
            raise ValueError("mine")
        return guesses(answer, 1.0)(ids)

    for proposer, more, error in (
        (raising, {}, ValueError),
        (guesses(answer, 1.0), {"stopping_criteria": [Broken()]}, KeyboardInterrupt),
    ):
        for capacity in (None, 64):
            cache = gdnfuse.RollbackCache(model, capacity)
            with pytest.raises(error):
                model.generate(ids, **GREEDY, **more, **{zoo.CACHE: cache}, custom_generate=gdnfuse.speculative(proposer))
            length = int(cache.get_seq_length())
            assert 8 < length < 16 and not cache.pending and not cache.is_recording
            wanted = zoo.new_cache(model, "dynamic")
            with torch.no_grad():
                model(answer[:, :length], **zoo.held(wanted))
            assert zoo.relative(zoo.flat_states(cache, "recurrent"), zoo.flat_states(wanted, "recurrent")) < 1e-5
            found = model.generate(
                answer[:, : length + 1], max_new_tokens=4, do_sample=False, **{zoo.CACHE: cache},
                custom_generate=gdnfuse.speculative(PromptLookup(2)),
            )  # fmt: skip
            assert torch.equal(found, answer[:, : length + 5])


# Drawn tokens


def chi_square(counts, probabilities, total):
    """How far counts lie from what is expected, in standard deviations of the statistic; cells of few are one."""
    expected = probabilities * total
    small = expected < 5
    cells = [(counts[~small], expected[~small])]
    if small.any():
        cells.append((counts[small].sum()[None], expected[small].sum()[None].clamp(min=1e-9)))
    statistic = sum(float(((c - e) ** 2 / e).sum()) for c, e in cells)
    freedom = int((~small).sum()) + bool(small.any()) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 6, "top_p": 1.0}


@torch.no_grad()
def exact(model, ids, length):
    """The probability of each continuation [vocabulary] * length under SAMPLED."""
    vocabulary, p = model.config.vocab_size, torch.ones(1)
    for n in range(length):
        more = torch.tensor([[*x] for x in itertools.product(range(vocabulary), repeat=n)], dtype=torch.long)
        rows = torch.cat([ids.expand(len(more), -1), more.view(len(more), n)], 1)
        logits = model(rows).logits[:, -1].float() / SAMPLED["temperature"]
        logits = logits.masked_fill(logits < logits.topk(SAMPLED["top_k"]).values[:, -1:], float("-inf"))
        p = (p[:, None] * logits.softmax(-1)).flatten()
    return p


@pytest.mark.parametrize("proposer", some(["draft", "function"], "draft"))
def test_drawn_tokens_have_the_models_distribution(proposer):
    """Against exact probabilities of all continuations of three tokens; a draft that was drawn, and one that was not."""
    model = built(vocab_size=8, **zoo.SMALL)
    with torch.no_grad():
        model.get_output_embeddings().weight.div_(2)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    wanted = exact(model, ids, 3)
    assert abs(float(wanted.sum()) - 1) < 1e-5
    other = disturbed(model, 0.3)
    likeliest = lambda ids: other(ids).logits[:, -1:].argmax(-1).expand(-1, 2)  # noqa: E731
    speculative = gdnfuse.speculative(Draft(other, 2) if proposer == "draft" else Callback(likeliest, 2))
    rows, runs = (3, 200) if proposer == "draft" else (1, 350)
    torch.manual_seed(0)
    counts, accepted = torch.zeros(8**3), 0
    for _ in range(runs):
        out = model.generate(ids.expand(rows, -1), max_new_tokens=3, **SAMPLED, custom_generate=speculative)[:, 5:]
        counts += torch.bincount((out * torch.tensor([64, 8, 1])).sum(1), minlength=8**3)
        accepted += speculative.acceptance.accepted
    assert accepted > runs / 20
    assert abs(chi_square(counts, wanted, rows * runs)) < 4
    assert chi_square(counts, exact(other, ids, 3), rows * runs) > 8  # which another distribution fails


def test_a_prompt_of_which_no_token_is_a_pictures_is_text():
    model = built("conditional_generation", **zoo.SMALL)
    ids = zoo.prompt(1, 8)[0]
    asked = {**GREEDY, "mm_token_type_ids": torch.zeros_like(ids)}
    wanted = model.generate(ids, **asked)
    assert torch.equal(model.generate(ids, **asked, custom_generate=gdnfuse.speculative(PromptLookup(2))), wanted)
    asked["mm_token_type_ids"][0, 2] = 1
    with pytest.raises(gdnfuse.GdnfuseError, match="needs prompts of plain text, found mm_token_type_ids"):
        model.generate(ids, **asked, custom_generate=gdnfuse.speculative(PromptLookup(2)))


# What is compiled


@pytest.fixture
def fresh():
    torch.compiler.reset()
    gdnfuse.clear_reports()


@pytest.mark.parametrize("implementation", [pytest.param("static", marks=pytest.mark.sweep), None])
def test_a_compiled_model_has_three_graphs_for_all_rounds(fresh, implementation):
    """The prompt's, the plain step's and the verify step's; all layers fused in each."""
    model = built(**zoo.SMALL)
    plain, drafts = copy.deepcopy(model), {}
    inner = "aot_eager" if implementation else "eager"  # which makes writes explicit
    gdnfuse.compile(model, inner=inner, strict=True, speculate=lambda ids: drafts["of"](ids))
    for seed in range(3):
        ids = zoo.prompt(1, 6 + 3 * seed, seed=seed)[0]
        asked = {**GREEDY, "cache_implementation": implementation, "max_new_tokens": 30 - 3 * seed}
        wanted = plain.generate(ids, **asked)
        guess = guesses(wanted, 0.7, seed)
        drafts["of"] = lambda ids, guess=guess: None if ids.shape[1] % 3 == 0 else guess(ids)
        assert torch.equal(model.generate(ids, **asked), wanted)
        counts = model.generate.acceptance
        assert counts.rounds > 2 and counts.plain_steps > 2 and 0 < counts.accepted < counts.drafted
    assert [r.phase for r in gdnfuse.reports()].count("decode") == 1 and len(gdnfuse.reports()) == 3
    assert all(r.fused_layers == 1 for r in gdnfuse.reports())
    assert "generate" not in vars(gdnfuse.compile(model, inner="eager"))


def test_copies_and_pickles_have_transformers_generate(fresh):
    model = built(**zoo.SMALL)
    ids = zoo.prompt(1, 8)[0]
    wanted = model.generate(ids, **GREEDY)
    gdnfuse.compile(model, inner="eager", speculate=PromptLookup(3))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(copy.deepcopy(model))):
        assert copied.generate.__self__ is copied and not hasattr(copied.generate, "acceptance")
        assert torch.equal(copied.generate(ids, **GREEDY), wanted)
    assert model.generate.acceptance is None
    assert torch.equal(model.generate(ids, **GREEDY), wanted) and model.generate.acceptance.tokens == 24


def test_other_ways_of_decoding_are_transformers_own(fresh, monkeypatch):
    model = built(**zoo.SMALL)
    ids = zoo.prompt(1, 8)[0]
    wanted = model.generate(ids, **GREEDY, num_beams=2)
    gdnfuse.compile(model, inner="eager", prefill=False, speculate=PromptLookup(3))
    assert torch.equal(model.generate(ids, **GREEDY, num_beams=2), wanted)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3)
    assert model.generate(ids, **GREEDY, custom_generate=lambda model, input_ids, **_: input_ids) is not None
    assert model.generate.acceptance is None and "assistant_model" in OTHERS
    model.generation_config.num_beams = 2  # which a config that says nothing of beams has too
    passed = GenerationConfig(max_new_tokens=24, do_sample=False)
    assert torch.equal(model.generate(ids, passed), wanted) and model.generate.acceptance is None
    model.generation_config.num_beams = None
    several = model.generate(ids, do_sample=True, max_new_tokens=4, num_return_sequences=3)
    assert several.shape == (3, 12) and model.generate.acceptance.tokens == 4


@pytest.mark.parametrize(
    ("share", "implementation"),
    [(0.0, None), (0.7, "static"), *(pytest.param(*c, marks=pytest.mark.sweep) for c in ((0.7, None), (1.0, "static")))],
)
def test_prompts_begin_with_known_prefixes_and_turns_end_behind_their_drafts(fresh, share, implementation):
    """All that the cache has seen is kept, as without drafts, and a turn behind it is computed from there."""
    model = built(**zoo.SMALL)
    plain, store = copy.deepcopy(model), gdnfuse.PrefixStore(model)
    talk, known = zoo.prompt(1, 140)[0].clamp(min=1), 0
    for turn in range(3):
        asked = {**GREEDY, "cache_implementation": implementation, "attention_mask": torch.ones_like(talk)}
        asked |= {"output_logits": True, "return_dict_in_generate": True}
        wanted = plain.generate(talk, **asked)
        gdnfuse.compile(model, inner="eager", prefill=False, fuel=0, prefixes=store, speculate=guesses(wanted.sequences, share))
        before = store.stats().tokens_taken
        found = model.generate(talk, **asked)
        assert torch.equal(found.sequences, wanted.sequences) and model.generate.acceptance.rounds
        assert zoo.relative(torch.stack(found.logits), torch.stack(wanted.logits)) < 1e-5
        assert store.stats().tokens_taken - before == known
        known = wanted.sequences.shape[1] - 1
        cache, computed = store.open(wanted.sequences), zoo.new_cache(plain, "dynamic")
        with torch.no_grad():
            plain(wanted.sequences[:, :-1], **zoo.held(computed))
        assert cache.get_seq_length() == known
        for kind in ("conv", "recurrent"):
            assert zoo.relative(zoo.flat_states(cache, kind), zoo.flat_states(computed, kind)) < 1e-5
        talk = torch.cat([wanted.sequences, zoo.tokens_for(1, 9, seed=turn)], 1)
    # An earlier part of the talk begins where its prompt was known.
    before = store.stats().tokens_taken
    model.generate(torch.cat([talk[:, :135], talk[:, :9]], 1), **GREEDY)
    assert store.stats().tokens_taken - before == 128 and not store.stats().left_out


def test_of_rows_that_end_apart_no_end_is_kept_that_a_cache_has_not_seen(fresh):
    """A row that is done is padded, while the cache was fed its drafts."""
    model, ids = built(**zoo.SMALL), zoo.prompt(2, 70)[0].clamp(min=1)
    on = model.generate(ids, **GREEDY)
    ends = {**GREEDY, "eos_token_id": int(on[0, 75])}
    wanted = model.generate(ids, **ends)
    assert (wanted[0, 76:] == 0).all() and (wanted[1, 76:] != 0).all()
    store = gdnfuse.PrefixStore(model)
    gdnfuse.compile(model, inner="eager", prefill=False, fuel=0, prefixes=store, speculate=guesses(on, 1.0))
    assert torch.equal(model.generate(ids, **ends), wanted) and model.generate.acceptance.accepted
    assert [store.open(row[None]).get_seq_length() for row in wanted] == [64, 64]


def test_with_adapters_the_gates_that_they_change_are_recorded():
    """Also where they come after the first cache, which puts another module in the place of the one that had hooks."""
    model = built(**zoo.SMALL)
    gdnfuse.RollbackCache(model)
    mixer = model.model.layers[0].linear_attn
    torch.manual_seed(0)
    for name in ("in_proj_a", "in_proj_b", "in_proj_qkv"):
        wrapped = LoRA(getattr(mixer, name))
        wrapped.add("one")
        with torch.no_grad():
            wrapped.adapters["one"][1].weight.mul_(20)
        setattr(mixer, name, wrapped)
    plain_gates = copy.deepcopy(model)
    plain_gates.model.layers[0].linear_attn.in_proj_a.active = ()
    ids = zoo.prompt(1, 8)[0]
    wanted = model.generate(ids, **GREEDY)
    assert not torch.equal(plain_gates.generate(ids, **GREEDY), wanted)
    speculative = gdnfuse.speculative(guesses(wanted, 0.7))
    found = model.generate(ids, **GREEDY, return_dict_in_generate=True, custom_generate=speculative)
    assert torch.equal(found.sequences, wanted) and speculative.acceptance.accepted
    cache = zoo.new_cache(model, "dynamic")
    with torch.no_grad():
        model(wanted[:, :-1], **zoo.held(cache))
    assert zoo.relative(zoo.flat_states(found[zoo.CACHE], "recurrent"), zoo.flat_states(cache, "recurrent")) < 1e-5


@pytest.mark.sweep
def test_with_quantised_weights_tokens_are_those_of_plain_steps(fresh):
    model = models.quantized(built(**zoo.FILLED))
    gdnfuse.compile(model, inner="eager")
    ids = zoo.prompt(1, 8)[0]
    wanted = model.generate(ids, **GREEDY)
    gdnfuse.compile(model, inner="eager", speculate=guesses(wanted, 0.7))
    assert torch.equal(model.generate(ids, **GREEDY), wanted) and model.generate.acceptance.accepted


# What is refused


def test_what_cannot_draft_is_a_sentence(fresh):
    model = built(**zoo.SMALL)
    other, distant = built(vocab_size=96, **zoo.SMALL), built(**zoo.SMALL).to("meta")
    for make, sentence in (
        (lambda: PromptLookup(0), "PromptLookup drafts 1 to 7 tokens at a time, found 0"),
        (lambda: PromptLookup(99), "found 99"),
        (lambda: PromptLookup(True), "found True"),
        (lambda: PromptLookup(2, ngram=0), "at least one token, found ngram=0"),
        (lambda: Draft(model, 8), "Draft drafts 1 to 7 tokens at a time, found 8"),
        (lambda: Draft("0.8B"), "needs a causal language model of transformers, found str"),
        (lambda: Callback(3), "Callback needs a function, found int"),
        (lambda: gdnfuse.compile(model, speculate=4), "speculate must be a PromptLookup, .* found int"),
        (lambda: gdnfuse.compile(model, speculate=PromptLookup), "found PromptLookup; a model drafts"),
        (lambda: gdnfuse.compile(model, speculate=other), "found Qwen3_5ForCausalLM; a model drafts as gdnfuse.Draft"),
        (lambda: gdnfuse.compile(model, speculate=Draft(other)), "must have the vocabulary .* 128 tokens .* found 96"),
        (lambda: gdnfuse.compile(model, speculate=Draft(model)), "must be another model than the one it drafts for"),
        (lambda: gdnfuse.compile(model, speculate=Draft(distant)), "on the device of the model it drafts for, cpu, found meta"),
        (lambda: gdnfuse.compile(model.model, speculate=PromptLookup()), "needs a model with transformers' generate"),
        (lambda: gdnfuse.speculative(None), "found NoneType"),
    ):
        with pytest.raises(gdnfuse.GdnfuseError, match=sentence):
            make()
    assert "generate" not in vars(model) and model._compiled_call_impl is None


def streams():
    """Whether transformers can make a cache that is offloaded: a build of torch for CUDA has no streams without a GPU."""
    try:
        return torch.Stream() is not None
    except RuntimeError:
        return False


def test_what_cannot_be_speculated_on_is_a_sentence_before_anything_runs(monkeypatch):
    model = built(**zoo.SMALL)
    ids, mask = zoo.prompt(1, 8)[0], torch.ones(1, 8, dtype=torch.long)
    recorded = gdnfuse.RollbackCache(model)
    with torch.no_grad():
        model(ids[:, :3], **zoo.held(recorded))
        recorded.activate_past_recording()
        model(ids[:, 3:5], **zoo.held(recorded))
        full, two = gdnfuse.RollbackCache(model), gdnfuse.RollbackCache(model)
        model(ids, **zoo.held(full))
        model(ids[:, :3].expand(2, 3), **zoo.held(two))
    right = mask.clone()
    right[:, -1] = 0
    monkeypatch.setattr(type(model), "forward", model.forward.__func__)
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    cache = lambda **options: {zoo.CACHE: gdnfuse.RollbackCache(model, **options)}  # noqa: E731
    for more, sentence in (
        (
            {zoo.CACHE: zoo.new_cache(model, "dynamic")},
            r"needs a gdnfuse.RollbackCache\(model\), because it takes tokens back, found DynamicCache: pass",
        ),
        ({zoo.CACHE: zoo.new_cache(model, "static", 64)}, "found StaticCache: pass"),
        *[({"cache_implementation": "offloaded"}, "found DynamicCache from cache_implementation")][: streams()],
        (cache(max_cache_len=32), "for 32 tokens and 4 drafts must hold 35, found 32: make it longer"),
        (cache(tokens=4), "for 4 drafts must take 5 tokens a call, found 4"),
        ({zoo.CACHE: recorded}, "must hold no recorded tokens, found 2 tokens: crop first"),
        ({zoo.CACHE: full}, "must hold the 8 tokens that the cache holds and at least one more, found 8"),
        ({zoo.CACHE: two}, "of 2 sequences takes as many rows of input_ids, found 1"),
        ({"use_cache": False}, "needs a cache, found use_cache=False"),
        ({"num_beams": 2}, "one sequence per row, found num_beams=2"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "found output_attentions=True: generate without it"),
        ({"attention_mask": right}, "padded on the left, found an attention_mask that ends in 0"),
        (
            {"position_ids": torch.arange(8)[None] + 3},
            "needs positions that count from each row's first token, found other position_ids",
        ),
        ({"inputs_embeds": torch.zeros(1, 8, 64)}, "needs prompts of plain text, found inputs_embeds"),
    ):
        with pytest.raises(gdnfuse.GdnfuseError, match=sentence):
            model.generate(ids, **{**GREEDY, **more}, custom_generate=gdnfuse.speculative(PromptLookup(4)))
    assert not ran


@pytest.mark.parametrize(
    ("drafts", "sentence"),
    [
        (torch.zeros(2, 2, dtype=torch.long), r"must give ids of tokens \[1, up to 4\], .* found \[2, 2\] of torch.int64"),
        (torch.zeros(1, 5, dtype=torch.long), r"found \[1, 5\]"), ([[0.5]], "of torch.float32"), ("text", "found something else"),
        (torch.ones(1, 2).cfloat(), "of torch.complex64"), (torch.ones(1, 2).int().to_sparse(), "torch.int32, torch.sparse_coo"),
        ([[3, 128]], "must be ids below 128, the model's vocabulary, found 3 to 128"), ([[-1]], "found -1 to -1"),
    ],
)  # fmt: skip
def test_bad_drafts_of_a_function_are_sentences(drafts, sentence):
    with pytest.raises(gdnfuse.GdnfuseError, match=sentence):
        built(**zoo.SMALL).generate(zoo.prompt(1, 4)[0], **GREEDY, custom_generate=gdnfuse.speculative(lambda ids: drafts))


def test_a_function_may_write_what_it_is_given():
    model = built(**zoo.SMALL)
    ids = zoo.prompt(1, 8)[0]
    wanted = model.generate(ids, **GREEDY)
    writing = gdnfuse.speculative(lambda ids: ids.fill_(7)[:, :3])
    assert torch.equal(model.generate(ids, **GREEDY, custom_generate=writing), wanted)


def test_lookup_finds_the_longest_and_last_and_goes_on_with_a_period():
    def after(row, n=4, ngram=3):
        return PromptLookup(n, ngram).start(Run(None, None, 99, False)).propose(torch.tensor([row]), [row])

    assert after([1, 2, 3]) is None and after([7]) is None
    assert after([1, 2, 3, 9, 4, 1, 2, 3]).tokens.tolist() == [[9, 4, 1, 2]]
    assert after([1, 2, 5, 3, 2, 6, 1, 2]).tokens.tolist() == [[5, 3, 2, 6]]  # two tokens, not the one after the last 2
    assert after([1, 2, 5, 3, 2, 6, 1, 2], ngram=1).tokens.tolist() == [[6, 1, 2, 6]]
    assert after([8, 4, 4]).tokens.tolist() == [[4, 4, 4, 4]]
    lookup, row = PromptLookup(2).start(Run(None, None, 99, False)), [5, 6, 7]
    for token, wanted in ((5, [[6, 7]]), (6, [[7, 5]]), (9, None), (6, [[9, 6]])):  # as it grows
        row.append(token)
        found = lookup.propose(torch.tensor([row]), [row])
        assert (found and found.tokens.tolist()) == wanted


def test_lookup_pauses_after_drafts_that_were_wrong():
    """Each step adds two tokens, and what followed the last 7 is drafted. From step 40 on the drafts come true."""
    lookup, row, proposed = PromptLookup(2).start(Run(None, None, 99, False)), [7, 6, 7], []
    for step in range(60):
        drafts = lookup.propose(torch.tensor([row]), [row])
        if drafts is not None:
            proposed.append(step)
        row += drafts.tokens[0].tolist() if step >= 40 and drafts else [100 + step, 7]
    assert [b - a for a, b in itertools.pairwise(proposed)] == [2, 2, 3, 5, 9, 9, 9, 9, *[1] * 11]


@pytest.mark.parametrize("sampled", [False, True])
def test_plain_steps_may_be_launched_before_their_token_is_read(sampled, monkeypatch):
    """Where nobody sees the cache. Ends of text, criteria and the length end it as before, and what is drawn is the same."""
    model = built()
    ids = zoo.prompt(1, 8)[0]
    asked = {**GREEDY, "do_sample": sampled, "max_new_tokens": 24}
    # Where drafts come a step later, other numbers are drawn for them.
    drafts = Callback(lambda ids: ids[:, -2:] if ids.shape[1] % 7 == 0 and not sampled else None, 2)
    tokens = model.generate(ids, **{**asked, "do_sample": False})[0, 8:].tolist()

    def generated(early, **more):
        monkeypatch.setattr(speculation, "EARLY", ("cpu",) if early else ())
        torch.manual_seed(0)
        loop = gdnfuse.speculative(drafts)
        return model.generate(ids, **{**asked, **more}, custom_generate=loop), loop

    odd = lambda ids, scores, **_: torch.tensor([ids.shape[1] == 19])  # noqa: E731
    for more in ({}, {"eos_token_id": tokens[9]}, {"stopping_criteria": [odd]}, {"max_new_tokens": 2}):
        (wanted, waited), (found, loop) = generated(False, **more), generated(True, **more)
        assert torch.equal(found, wanted), more
        cache, fed = loop.seen
        assert cache.get_seq_length() == ids.shape[1] + sum(x.shape[1] for x in fed)
        assert loop.acceptance.rounds <= waited.acceptance.rounds and loop.acceptance.plain_steps >= waited.acceptance.plain_steps
        if "stopping_criteria" in more:  # the last token is in it
            assert found.shape[1] == cache.get_seq_length() == 19
    seen = []
    hook = model.register_forward_hook(lambda *_: seen.append(1))
    _, loop = generated(True, stopping_criteria=[odd])
    hook.remove()
    assert len(seen) == 1 + loop.acceptance.rounds + loop.acceptance.plain_steps and loop.seen[0].get_seq_length() == 18
    # A cache that is returned or was passed holds all tokens but the last.
    for more in ({"return_dict_in_generate": True}, {zoo.CACHE: gdnfuse.RollbackCache(model, 64)}):
        _, loop = generated(True, **more)
        assert loop.seen[0].get_seq_length() == 8 + 24 - 1


@pytest.mark.parametrize("seed", range(4))
def test_lookup_on_a_device_finds_what_lookup_on_the_host_finds(seed):
    generator = torch.Generator().manual_seed(seed)
    random = lambda high, *shape: torch.randint(high, shape, generator=generator)  # noqa: E731
    row = random(3 + seed, 5 + seed).tolist()
    history, places = History(torch.tensor([row]), 99, 1 + seed), _Places(1 + seed)
    for _ in range(20):
        found = history.after(4)
        assert found.tolist() == [places.after(row, 4) or row[-1:] * 4]
        kept = 1 + random(4, 1)
        more = random(3 + seed, 1, 4)
        history.add(more, kept)
        row += more[0, : int(kept)].tolist()


def counting(model, n):
    """One that mostly says the next of n tokens, round and round."""
    with torch.no_grad():
        embedded, head = model.get_input_embeddings().weight, torch.nn.Linear(*model.lm_head.weight.shape[::-1], bias=False)
        head.weight.zero_()
        of = embedded[1 : n + 1]  # the first is padding
        head.weight[torch.arange(n).roll(-1) + 1] = 40 * of / of.norm(dim=1, keepdim=True)
        model.lm_head = head
    return model


class Knowing:
    """Drafts what a model will say, each fourth token but with a wrong one, and does so ahead if it may."""

    n = 3

    def __init__(self, answer, ahead=True):
        wrong = torch.arange(answer.shape[1] + 99) % 4 == 0
        longer = torch.cat([answer, answer.new_ones(1, 99)], 1)
        self.tokens, self.known, self.ahead = torch.where(wrong, (longer + 1) % 128, longer), None, None
        if not ahead:
            self.draft_ahead = lambda *_: None

    def start(self, run):
        self.known = None
        return self

    def draft_ahead(self, picked, standing):
        self.known = self.known + standing[0] + 1
        self.ahead = Drafts(self.tokens[:, self.known + torch.arange(self.n)])
        return self.ahead

    def propose(self, ids, rows):
        ahead, self.ahead = self.ahead, None
        if ahead is None:
            self.known = torch.tensor([ids.shape[1]])
            ahead = Drafts(self.tokens[:, ids.shape[1] : ids.shape[1] + self.n])
        return ahead if ids.shape[1] % 11 else None


Knowing.__module__ = "gdnfuse.tests"  # of users' classes no step is launched early


@pytest.mark.parametrize(("proposer", "repeated"), [("lookup", True), ("knowing", False), ("draft", True), ("draft", False)])
def test_steps_with_drafts_may_be_launched_before_their_tokens_are_read(proposer, repeated, monkeypatch):
    """Tokens, counts, and what the cache holds then are right, wherever it ends, and if CUDA graphs repeat the steps."""
    graphs = repeat_steps(monkeypatch) if repeated else []
    model = counting(built(), 7) if proposer == "lookup" else built()
    draft = disturbed(model, 0.05)
    ids = zoo.prompt(1, 5)[0].repeat(1, 2) % (7 if proposer == "lookup" else 128) + 1
    asked = {**GREEDY, "max_new_tokens": 40, "cache_implementation": "static"}
    answer = model.generate(ids, **asked)
    tokens, launch, launched = answer[0, 10:].tolist(), speculation.Generation._launch, []
    monkeypatch.setattr(speculation.Generation, "_launch", lambda self, *args: (launched.append(1), launch(self, *args)))

    def generated(early, **more):
        monkeypatch.setattr(speculation, "EARLY", ("cpu",) if early else ())
        launched.clear()
        graphs.clear()
        of = {"lookup": lambda: PromptLookup(4), "knowing": lambda: Knowing(answer), "draft": lambda: Draft(draft, 3)}
        loop = gdnfuse.speculative(of[proposer]())
        return model.generate(ids, **{**asked, **more}, custom_generate=loop), loop

    odd = lambda ids, scores, **_: torch.tensor([ids.shape[1] == 33])  # noqa: E731
    ends = [{"eos_token_id": t} for t in tokens[8:20:4]]
    for more in ({}, *ends, {"stopping_criteria": [odd]}, *({"max_new_tokens": n} for n in (2, 5, 6, 7, 8))):
        (wanted, waited), (found, loop) = generated(False, **more), generated(True, **more)
        assert torch.equal(found, wanted) and torch.equal(found[:, : answer.shape[1]], answer[:, : found.shape[1]]), more
        counts, (cache, fed) = loop.acceptance, loop.seen
        replays = sum(graph.replays for graph in graphs if isinstance(graph.cache, gdnfuse.RollbackCache))
        if "stopping_criteria" in more or not repeated:  # a user's code runs between steps
            assert not replays
        else:  # the last may have been one too many
            assert max(counts.rounds - 1, 0) <= replays <= counts.rounds, more
        assert (len(launched) > 2 or more) and counts.tokens == waited.acceptance.tokens
        assert counts.tokens <= 1 + counts.plain_steps + counts.rounds + counts.accepted <= counts.tokens + 4
        held = torch.cat([ids, *fed], 1)
        assert cache.pending == 0 and cache.get_seq_length() == held.shape[1]
        assert torch.equal(held[:, : found.shape[1]], found[:, : held.shape[1]])
        with torch.no_grad():
            cache.stop_past_recording()
            after = torch.tensor([[7]])
            logits = model(torch.cat([held, after], 1)).logits[:, -1]
            torch.testing.assert_close(model(after, **{zoo.CACHE: cache}).logits[:, -1], logits, rtol=1e-4, atol=1e-4)
    # A cache that is returned or was passed is not ahead of its tokens.
    for more in ({"return_dict_in_generate": True}, {"cache_implementation": None, zoo.CACHE: gdnfuse.RollbackCache(model, 64)}):
        generated(True, **more)
        assert not launched


def test_graphs_repeat_steps_between_which_only_known_code_runs(monkeypatch, caplog):
    """Those of the model and of a draft. What cannot be recorded runs as it is, which is said once."""
    graphs, model, every = repeat_steps(monkeypatch), built(), list(range(128))
    ids = zoo.prompt(1, 8)[0]
    asked = {**GREEDY, "cache_implementation": "static"}
    answer = model.generate(ids, **asked)

    def generated(**more):
        graphs.clear()
        loop = gdnfuse.speculative(Draft(disturbed(model, 0.05), 3), more.pop("streamer", None))
        assert torch.equal(model.generate(ids, **asked, **more, custom_generate=loop), answer)
        return loop.acceptance

    rounds = generated().rounds
    of_model, of_draft = sorted(graph.replays for graph in graphs)
    assert of_model == rounds - 1 and of_draft > 2 * rounds
    mine = type("Mine", (transformers.generation.streamers.BaseStreamer,), {"put": lambda *_: None, "end": lambda _: None})
    mines = (
        {"stopping_criteria": [lambda ids, scores, **_: torch.tensor([False])]},
        {"prefix_allowed_tokens_fn": lambda *_: every},
    )
    for more in ({"streamer": mine()}, *mines):
        assert generated(**more) and not graphs
    loop = gdnfuse.speculative(Always(Callback(guesses(answer, 0.8))))  # as in a warmup
    assert torch.equal(model.generate(ids, **asked, custom_generate=loop), answer) and loop.acceptance.rounds and not graphs
    windows = other("window")
    steps = Repeated(windows, zoo.new_cache(windows, "static"))
    steps.made = []
    for token in ids[0]:
        steps(input_ids=token[None, None], **zoo.held(steps._cache))
    assert steps._cache.layers[0].cumulative_length_int == 8 and "cumulative_length_int of its cache" in steps.why_not
    monkeypatch.setattr(StandIn, "record", lambda self, fn: 1 / 0)
    tried, call = [], Repeated.__call__
    monkeypatch.setattr(Repeated, "__call__", lambda self, **given: (tried.append(1), call(self, **given))[1])
    generated()
    assert len(tried) == 2 * 2  # then the model's and the draft's steps are those that have Inductor's CUDA graphs
    assert sum("recordable as a CUDA graph" in r.getMessage() for r in caplog.records) == 2
    assert not any(graph.replays for graph in graphs)


def test_nothing_is_recorded_while_another_thread_generates(monkeypatch):
    """The random numbers of which torch 2.11 would refuse to draw meanwhile."""
    graphs, model = repeat_steps(monkeypatch), built(**zoo.SMALL)
    ids, under_way, goes_on = zoo.prompt(1, 5)[0].repeat(1, 2), threading.Event(), threading.Event()
    asked = {**GREEDY, "cache_implementation": "static"}
    answer = model.generate(ids, **asked)

    class Waiting(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            under_way.set()
            assert goes_on.wait(60)

        def end(self):
            pass

    def generated(streamer=None):
        assert torch.equal(model.generate(ids, **asked, custom_generate=gdnfuse.speculative(Draft(draft, 3), streamer)), answer)

    draft = disturbed(model, 0.05)
    other = threading.Thread(target=generated, args=(Waiting(),))
    other.start()
    assert under_way.wait(60)
    generated()
    assert not graphs
    goes_on.set()
    other.join()
    generated()
    assert any(graph.replays for graph in graphs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_random_numbers_are_drawn_behind_a_recording_that_failed():
    x = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError):
        recorded.Graph(x.device).record(lambda: x.sum().item())
    assert x.multinomial(1).shape == (1,) and torch.rand_like(x).shape == (2,)
    graph = recorded.Graph(x.device)
    out = graph.record(lambda: x + 1)
    graph.replay()
    assert out.tolist() == [2, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("proposer", ["lookup", "draft"])
def test_on_a_gpu_graphs_repeat_steps(proposer, monkeypatch, caplog):
    """Generations, each with graphs of its own, say what the model says, and one takes over the memory of the one before."""
    heads = {"head_dim": 64, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    model, replay, replays = counting(built(**zoo.SMALL, **heads), 7).cuda(), recorded.Graph.replay, []
    monkeypatch.setattr(recorded.Graph, "replay", lambda self: (replays.append(1), replay(self)))
    ids = (zoo.prompt(1, 5)[0].repeat(1, 2) % 7 + 1).cuda()
    asked = {**GREEDY, "max_new_tokens": 48, "cache_implementation": "static"}
    wanted = model.generate(ids, **asked, disable_compile=True)
    drafts = PromptLookup(4) if proposer == "lookup" else Draft(gdnfuse.compile(disturbed(model.cpu(), 0.05).cuda()), 3)
    gdnfuse.compile(model.cuda(), speculate=drafts, strict=True)
    reserved = []
    for _ in range(5):
        replays.clear()
        assert torch.equal(model.generate(ids, **asked), wanted)
        assert len(replays) >= model.generate.acceptance.rounds - 1 > 3
        gc.collect()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[-2] == reserved[-3]
    assert not [r for r in caplog.records if r.name.startswith("gdnfuse") and r.levelno >= logging.WARNING]


@pytest.mark.parametrize("implementation", [None, "static"])
def test_a_criterion_may_allow_more_tokens_than_the_config(implementation, monkeypatch):
    """It takes the place of the config's. What was made for the config's length is not used behind it."""
    monkeypatch.setattr(speculation, "EARLY", ("cpu",) if implementation else ())
    model = counting(built(**zoo.SMALL), 7)
    length, ends = (11, 41) if implementation else (12, 60)  # with which the last step is launched just behind the config's
    ids = zoo.prompt(1, length)[0] % 7 + 1
    criteria = [transformers.MaxLengthCriteria(60), lambda ids, scores, **_: torch.tensor([ids.shape[1] >= ends])]
    asked = {"max_new_tokens": 30, "do_sample": False, "cache_implementation": implementation, "stopping_criteria": criteria}
    wanted = model.generate(ids, **asked)
    loop = gdnfuse.speculative(Knowing(wanted) if implementation else PromptLookup(4))
    assert torch.equal(model.generate(ids, **asked, custom_generate=loop), wanted) and wanted.shape[1] == ends
    assert loop.acceptance.accepted


def test_an_error_while_a_step_with_drafts_is_under_way_is_raised(monkeypatch):
    monkeypatch.setattr(speculation, "EARLY", ("cpu",))
    model, calls = built(), []
    ids = zoo.prompt(1, 5)[0].repeat(1, 2)
    answer = model.generate(ids, **GREEDY, cache_implementation="static")

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            calls.append(value)
            if len(calls) == 9:
                raise KeyError("streamer")

        def end(self):
            pass

    with pytest.raises(KeyError):
        loop = gdnfuse.speculative(Knowing(answer), Streamer())
        model.generate(ids, **GREEDY, cache_implementation="static", custom_generate=loop)
    loop = gdnfuse.speculative(Knowing(answer))
    assert torch.equal(model.generate(ids, **GREEDY, cache_implementation="static", custom_generate=loop), answer)


def test_nothing_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        case(built(**zoo.SMALL), "lookup", 0)
    assert not [r for r in caplog.records if r.name.startswith("gdnfuse")]


def other(kind):
    """Small models whose caches have layers of other kinds."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": 128, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.3}
    states = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
    torch.manual_seed(0)
    if kind == "index":
        return zoo.qwen4_exp()
    if kind == "both in one layer":
        return transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**sizes, **states)).eval()
    if kind == "window":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, sliding_window=8)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


@pytest.mark.parametrize("kind", ["no states", "both in one layer", "window", "index"])
def test_from_any_kind_of_cache_the_tokens_of_a_draft_are_taken_back(kind, monkeypatch):
    """Behind a window too. So what is drafted is what the draft says, also if it is drafted ahead and if graphs repeat steps."""
    monkeypatch.setattr(speculation, "EARLY", ("cpu",))
    repeat_steps(monkeypatch)
    model, draft, propose, asked = built(**zoo.SMALL), other(kind), _Drafting.propose, []

    def heard(self, ids, rows):
        found = propose(self, ids, rows)
        said = draft.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        assert torch.equal(torch.cat([ids, found.tokens], 1), said)
        asked.append(1)
        return found

    monkeypatch.setattr(_Drafting, "propose", heard)
    for implementation, rows in ((None, 1), ("static", 2), ("static", 1)):
        ids = zoo.prompt(rows, 12)[0]
        given = {**GREEDY, "max_new_tokens": 12, "cache_implementation": implementation}
        wanted = model.generate(ids, **given)
        assert torch.equal(model.generate(ids, **given, custom_generate=gdnfuse.speculative(Draft(draft, 2))), wanted)
    assert len(asked) > 12
