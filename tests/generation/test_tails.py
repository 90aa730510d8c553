"""Tails: rows behind the last token change nothing that a prompt leaves."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import gdnfuse
from gdnfuse import PrefixStore, Status, compat
from gdnfuse.errors import GdnfuseError
from tests.models import zoo
from tests.sweeps import some

pytestmark = pytest.mark.skipif(zoo.FILLED_STATIC_CACHE_BREAKS, reason="this version breaks graphs on filled static caches")

ASKED = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
STATIC = {"cache_implementation": "static"}
KNOWN = 128


def ids(n, seed=0, rows=1):
    return torch.randint(2, 128, (rows, n), generator=torch.Generator().manual_seed(seed))


def behind(n, rows=1):
    return torch.cat([ids(KNOWN, rows=rows), ids(n, n, rows)], 1)


class Talk:
    """A model as it came, and the same whose tails are padded on a CPU too. Rows of padding are NaN."""

    def __init__(self, family=zoo.causal_lm):
        self.plain = family(**zoo.SMALL)
        self.ours = copy.deepcopy(self.plain)
        self.ours.get_input_embeddings().weight[0] = float("nan")
        self.store = PrefixStore(self.ours, 64)
        gdnfuse.compile(self.ours, inner="eager", prefixes=self.store, strict=True)
        self.tails = self.ours.generate.tails
        assert not self.tails.used  # what has no CUDA graphs gains nothing
        self.tails.used, self.seen, self.call = True, [], self.tails._compiled
        self.tails._compiled = self.noted

    def noted(self, **given):
        self.seen.append(int(given["cu_seq_lens_q"][1]))
        return self.call(**given)

    def agree(self, prompt, **options):
        """Both generate the same, and leave the same in their caches; returns how many tokens each tail had."""
        self.seen.clear()
        found, wanted = (m.generate(prompt, **{**ASKED, "max_new_tokens": 1, **options}) for m in (self.ours, self.plain))
        assert torch.equal(found.sequences, wanted.sequences)
        assert zoo.relative(torch.stack(found.logits), torch.stack(wanted.logits)) < 1e-5
        layout, caches = self.store._layout, [out[zoo.CACHE] for out in (found, wanted)]
        assert type(caches[0]) is type(caches[1])
        lengths = {int(layer.get_seq_length()) for cache in caches for layer in cache.layers if hasattr(layer, "keys")}
        assert len(lengths) == 1
        for of in (layout.held, layout.states_of):  # keys and values to their last row, which nothing is written behind
            assert all(zoo.relative(x, y) < 1e-5 for x, y in zip(*map(of, caches), strict=True))
        return list(self.seen)


@pytest.fixture(scope="module")
def talk():
    with torch.no_grad():
        talk = Talk()
        talk.agree(ids(KNOWN), **STATIC)
        return talk


@pytest.fixture
def nothing_but_nan():
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


TAILS = {9: [9], 63: [63], 64: [64], 100: [64, 36]}  # a prompt ends a call at its last whole block


@pytest.mark.parametrize("n", some(TAILS, 9, 100))
def test_rows_behind_the_last_token_change_nothing(n, talk, nothing_but_nan):
    # With one token the cache has no room for as many rows as the graph has. The first call packs weights, and is made again.
    assert talk.agree(behind(n), **STATIC, max_new_tokens=3 if n == 64 else 1)[-len(TAILS[n]) :] == TAILS[n]


@pytest.mark.sweep
@pytest.mark.parametrize(
    "family", [zoo.conditional_generation, zoo.moe, zoo.qwen3_next, zoo.olmo_hybrid], ids=lambda f: f.__name__
)
@torch.no_grad()
def test_other_families(family, nothing_but_nan):
    talk = Talk(family)
    talk.agree(ids(KNOWN), **STATIC)
    for n in TAILS:
        assert talk.agree(behind(n), **STATIC)[-len(TAILS[n]) :] == TAILS[n] and not talk.tails.why_not


def test_nothing_of_a_tail_is_left_unfused(talk):
    gdnfuse.clear_reports()
    torch._dynamo.reset()
    assert talk.agree(behind(9), **STATIC)[-1:] == [9]
    report = gdnfuse.reports()[0]  # if no test has run before, the tail is also computed as a prompt, behind it
    fired = {record.rule for record in report.all_records if record.status is Status.FIRED}
    assert {"gating_chunk_delta_rule", "attention_few_queries"} <= fired


def takes(talk, tokens=64, rows=1, cache=None):
    cache = cache or StaticCache(config=talk.ours.config, max_cache_len=256)
    return talk.tails.takes(tokens, behind(9, rows), cache)


def test_what_has_no_graph_for_tails_is_computed_as_before(talk):
    assert takes(talk) and not takes(talk, cache=DynamicCache(config=talk.ours.config)) and not takes(talk, rows=2)
    assert not any(takes(talk, tokens) for tokens in (1, 8, 65))
    assert talk.agree(behind(9)) == [] and talk.store.stats().left_out == {}


def test_weights_that_changed_are_found_while_a_tail_is_computed(talk):
    before, taken = talk.store.stats().states, talk.store.stats().tokens_taken
    for factor in (2.0, 0.5):  # exact
        for model in (talk.ours, talk.plain):
            model.model.layers[0].mlp.down_proj.weight.mul_(factor)
        assert talk.agree(behind(9), **STATIC)[:1] == [9]
        assert (talk.store.stats().tokens_taken > taken) == (factor == 0.5)
    assert talk.store.stats().states > before


@pytest.mark.parametrize("how", ["its bounds are ignored", "its bounds are refused"])
def test_where_a_rule_does_not_keep_to_the_bounds_the_prompt_is_computed_again(how, talk, caplog):
    def uncompiled(cu_seq_lens_q, **given):
        if how == "its bounds are refused":  # as transformers does since 5.24
            raise ValueError("no bounds")
        return compat.call_of(talk.ours)(**given)

    call, talk.call = talk.call, uncompiled
    try:
        assert talk.agree(behind(9), **STATIC)[-1:] == [9] and not takes(talk)
    finally:
        talk.call, why, talk.tails.why_not = call, talk.tails.why_not, ""
    assert why.startswith("The rules of 1 layers must keep to the bounds of a tail, found ")
    assert caplog.text.count(f"{why}, so tokens behind known prefixes are computed as other prompts.") == 1


WRONG = ("logits", "states", "windows", "keys", "lengths")


@pytest.mark.parametrize("what", some(WRONG, "windows", "lengths"))
def test_a_tail_that_leaves_something_else_is_not_used(what, talk, caplog):
    def wrong(**given):
        out, (states, keys) = call(**given), given[zoo.CACHE].layers
        x = {
            "logits": out["logits"], "states": states.recurrent_states[0], "windows": states.conv_states[0],
            "keys": keys.keys[:, :, KNOWN : KNOWN + 9], "lengths": keys.cumulative_length,
        }[what]  # fmt: skip
        x.copy_(x.roll(1, -1) if x.ndim else x + 1)
        return out

    call, talk.call = talk.call, wrong
    proved, talk.tails.proved = talk.tails.proved, set()
    try:
        assert talk.agree(behind(9), **STATIC) == [9] and not takes(talk)
    finally:
        talk.call, why, talk.tails.why_not, talk.tails.proved = call, talk.tails.why_not, "", proved
    assert why.startswith("A tail must leave what a prompt leaves up to 1e-03, found an error of ") and why in caplog.text


def test_a_cache_gets_the_memory_of_the_last_if_nobody_holds_it(talk):
    talk.store.rooms.used = True

    def addresses(cache):
        layout = talk.store._layout
        lengths = [cache.layers[i].cumulative_length for i, *_ in layout.attention]
        return [x.data_ptr() for x in (*layout.held(cache), *layout.states_of(cache), *lengths)]

    def opened():
        return talk.store.open(behind(9), 200)

    try:
        cache = opened()
        first = addresses(cache)
        assert opened() is not cache and addresses(opened()) != first  # while it is held, another one
        cache = opened()
        first = addresses(cache)
        del cache
        cache = opened()
        assert addresses(cache) == first
        part = cache.layers[1].keys[:, :, 3:5]
        before = part.clone()
        del cache
        cache = opened()
        assert not set(addresses(cache)[:2]) & set(first[:2]) and cache.get_seq_length() == 128
        cache.layers[1].keys.zero_()
        assert torch.equal(part, before)
        assert addresses(talk.store.open(behind(9), 201)) != addresses(cache)
        del cache
        # A graph is recorded only for memory that has come back. Whatever was compiled may hold memory for a while.
        found = [talk.agree(behind(9), **STATIC) for _ in range(6)]
        assert found[0] == [] and found[-1] == [9]
    finally:
        talk.store.rooms.used = False


@pytest.mark.sweep
@torch.no_grad()
def test_a_warmup_compiles_tails_too():
    talk = Talk()
    talk.store.rooms.used = True
    gdnfuse.warmup(talk.ours, **STATIC)
    assert talk.seen and len(talk.tails.proved) == 2
    gdnfuse.clear_reports()
    for n in (9, 63, 63, 63, 64, 20):
        talk.ours.generate(behind(n), **ASKED, **STATIC, max_new_tokens=1)
    assert talk.seen[-1] == 20 and gdnfuse.reports() == []


def test_tails_that_cannot_be_are_said(caplog):
    model = zoo.causal_lm(**zoo.SMALL)
    for more, found in (({}, "found no GPU"), ({"prefill": False}, "found that prompts are not compiled")):
        caplog.clear()
        gdnfuse.compile(model, inner="eager", prefixes=PrefixStore(model, 64, tails=True), **more)
        (said,) = [r.message for r in caplog.records if "tails" in r.message]
        assert found in said
        with pytest.raises(GdnfuseError, match=found):
            gdnfuse.compile(model, inner="eager", prefixes=PrefixStore(model, 64, tails=True), strict=True, **more)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "ahead"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
@torch.no_grad()
def test_on_a_gpu_a_tail_leaves_what_a_prompt_leaves(dtype, ahead):
    torch.manual_seed(0)
    model = zoo.causal_lm(**zoo.SMALL, head_dim=64, linear_key_head_dim=128, linear_value_head_dim=128).to("cuda", dtype)
    plain, store = copy.deepcopy(model), PrefixStore(model, 64, tails=True)
    store.ahead = ahead
    gdnfuse.compile(model, prefixes=store, strict=True)
    used = model.generate.tails
    assert used.used and store.rooms.used
    for i in range(10):
        prompt = torch.cat([ids(KNOWN), ids(9 + 5 * i, i + 1)], 1).cuda()
        out = model.generate(prompt, **ASKED, **STATIC, max_new_tokens=3)
        assert out.sequences.shape[1] == prompt.shape[1] + 3 and torch.stack(out.logits).isfinite().all()
    for _ in range(6):  # of one length, so that memory comes back
        out = model.generate(prompt, **ASKED, **STATIC, max_new_tokens=3)
        del out
    assert used.proved and not used.why_not  # which compares all that both leave
    for i in range(20):
        prompt = torch.cat([ids(KNOWN), ids(54, i + 1)], 1).cuda()
        found, wanted = (m.generate(prompt, **ASKED, **STATIC, max_new_tokens=3).logits for m in (model, plain))
        assert dtype != torch.float32 or zoo.relative(torch.stack(found), torch.stack(wanted)) < 1e-3
        del found, wanted
    for factor in (2.0, 0.5):  # weights that changed are found although the tail is not waited for
        taken = store.stats().tokens_taken
        model.model.layers[0].mlp.down_proj.weight.data.mul_(factor)  # past torch's counter
        model.generate(prompt, **ASKED, **STATIC, max_new_tokens=3)
        assert (store.stats().tokens_taken > taken) == (factor == 0.5)


def test_a_tail_is_launched_before_transformers_prepares_its_call(talk):
    store, when, call = talk.store, [], compat.compiled_call(talk.ours)

    def noted(*args, **given):
        when.append(len(talk.seen))  # tails before the model was called
        return call(*args, **given)

    def launched(prompt, tail=True, **options):
        when.clear()
        assert talk.agree(prompt, **{**STATIC, **options})[-1:] == [prompt.shape[1] - KNOWN] * tail
        return when[:1] == [1]

    store.rooms.used = store.ahead = True
    compat.set_compiled_call(talk.ours, noted)
    try:
        for most in (1, 2):
            for _ in range(6):  # until memory has come back
                talk.agree(behind(64), **STATIC, max_new_tokens=most)
            assert launched(behind(64), max_new_tokens=most) and launched(behind(9), max_new_tokens=most)
        states, left_out = store.stats().states, store.stats().left_out
        assert launched(behind(33), max_new_tokens=2) and store.stats().states == states + 1
        assert not launched(behind(63))  # not as the last one
        assert launched(behind(63))
        # Weights that changed are found meanwhile.
        for factor in (2.0, 0.5):
            for model in (talk.ours, talk.plain):
                model.model.layers[0].mlp.down_proj.weight.mul_(factor)
            when.clear()
            talk.agree(behind(9), **STATIC)
            assert when[:1] == [1]
            for _ in range(6):
                talk.agree(behind(9), **STATIC)
        assert launched(behind(9)) and store.stats().left_out == left_out
        # What was not as expected is computed as ever, and for a while nothing is expected.
        seen = torch.ones(1, KNOWN + 9, dtype=torch.long)
        for _ in range(2):
            talk.agree(behind(9), **STATIC, attention_mask=seen)
        assert launched(behind(9), attention_mask=seen)
        hidden = seen.index_fill(1, torch.tensor([0]), 0)
        talk.agree(behind(9), **STATIC, attention_mask=hidden)
        assert store.stats().left_out != left_out
        for _ in range(3):
            when.clear()
            talk.agree(behind(9), **STATIC, attention_mask=seen)
            assert when[:1] == [0]
    finally:
        compat.set_compiled_call(talk.ours, call)
        store.rooms.used = store.ahead = False
    assert not talk.tails.ahead
