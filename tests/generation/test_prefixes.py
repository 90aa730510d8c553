"""generate with a prefix store: what it takes belongs to the prompt, and tokens and logits are those of a full prefill."""

import copy
import gc
import pickle
import random
import re
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

import gdnfuse
from gdnfuse import GdnfuseError, PrefixStore, compat
from gdnfuse.generation import explain, generate
from gdnfuse.generation.caches import cache_finder
from gdnfuse.generation.generate import Run
from gdnfuse.generation.prefixes import tokens
from gdnfuse.passes import checkpoints
from tests.models import zoo
from tests.sweeps import some

FAMILIES = {"qwen3_5": zoo.causal_lm, "qwen3_5_moe": zoo.moe, "qwen3_next": zoo.qwen3_next, "olmo_hybrid": zoo.olmo_hybrid}
ONE = {"max_new_tokens": 1, "do_sample": False}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}


def pair(family=zoo.causal_lm, every=64, max_bytes=64 << 20, **options):
    """A model as it came, and the same with a store. Prompts and steps run eager, which takes no time to compile."""
    plain = family(**zoo.SMALL)
    ours = copy.deepcopy(plain)
    store = PrefixStore(ours, every, max_bytes, **{k: options.pop(k) for k in ("host_bytes",) if k in options})
    gdnfuse.compile(ours, inner="eager", prefixes=store, **{"prefill": False, "fuel": 0, **options})
    return plain, ours, store


def ids(n, seed=0, rows=1):
    return torch.randint(2, 128, (rows, n), generator=torch.Generator().manual_seed(seed))


def agree(plain, ours, prompt, **options):
    """Both generate the same with logits within 1e-5; returns the tokens."""
    wanted = plain.generate(prompt, **{**ONE, **LOGITS, **options})
    found = ours.generate(prompt, **{**ONE, **LOGITS, **options})
    assert zoo.relative(torch.stack(found.logits), torch.stack(wanted.logits)) < 1e-5
    assert torch.equal(found.sequences, wanted.sequences)
    return found.sequences


def taken(store, call):
    before = store.stats().tokens_taken
    call()
    return store.stats().tokens_taken - before


def cases(family, seeds, longest, folder):
    """Prompts that share and part, in stores of all sizes."""
    plain = FAMILIES[family](**zoo.SMALL)
    for seed in seeds:
        rng = random.Random(seed)
        ours = copy.deepcopy(plain)
        state = PrefixStore(ours).state_bytes
        store = PrefixStore(
            ours, 64 * rng.choice([1, 2, 16]), rng.choice([2, 8, 999]) * 4 * state, host_bytes=rng.choice([0, 8 * state])
        )
        gdnfuse.compile(ours, inner="eager", prefill=False, fuel=0, prefixes=store)
        talk = ids(rng.randrange(1, longest), seed)
        for turn in range(3):
            if turn and rng.random() < 0.5:  # another process, that knows what this one saved
                store.save(folder / str(seed))
                store = PrefixStore(ours, store.every, store.max_bytes, host_bytes=store.host_bytes)
                store.load(folder / str(seed))
                gdnfuse.compile(ours, inner="eager", prefill=False, fuel=0, prefixes=store)
            static = {"cache_implementation": "static"} if rng.random() < 0.5 else {}
            out = agree(plain, ours, talk, **static, max_new_tokens=rng.choice([1, 1, 3]))
            cut = rng.choice([out.shape[1], rng.randrange(1, out.shape[1] + 1)])
            talk = torch.cat([out[:, :cut], ids(rng.randrange(1, 90), seed + turn)], 1)
        assert store.stats().device_bytes <= store.max_bytes and not store.stats().left_out


@pytest.mark.parametrize("family", some(FAMILIES, "qwen3_5", "olmo_hybrid"))
def test_tokens_and_logits_are_those_of_a_full_prefill(family, tmp_path):
    cases(family, range(5), 400, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
def test_many_random_prompts(family, tmp_path):
    cases(family, range(100, 175), 3000, tmp_path)


@pytest.mark.parametrize("family", some(FAMILIES, "qwen3_5"))
def test_half_precision_is_as_near_to_float64_as_eager(family):
    plain, ours, store = pair(FAMILIES[family])
    _, exact = zoo.in_float64(plain.bfloat16())
    ours.bfloat16()
    errors = {"eager": [], "ours": []}
    for seed in range(12):
        prompt = torch.cat([ids(140 + 64 * (seed % 3)), ids(9 + seed, seed)], 1)
        wanted = exact(input_ids=prompt).logits[0, -1]
        for name, model in (("eager", plain), ("ours", ours)):
            errors[name].append(model.generate(prompt, **ONE, **LOGITS).logits[0][0].double() - wanted)
    eager, found = (torch.cat(errors[name]).norm() for name in ("eager", "ours"))
    assert store.stats().hits == 11 and found <= 1.1 * eager


def test_prompts_and_steps_are_compiled_and_fused_on_what_was_taken():
    plain, ours, store = pair(every=1024, prefill=True, fuel=None, strict=True)
    static = {} if zoo.FILLED_STATIC_CACHE_BREAKS else {"cache_implementation": "static"}
    for seed, kind in ((1, {}), (2, {}), (3, {}), (4, static)):
        agree(plain, ours, torch.cat([ids(130), ids(9 + seed, seed)], 1), max_new_tokens=3, **kind)
    assert store.stats().hits == 3
    # Empty and filled caches are two graphs, whatever the lengths.
    assert [r.phase for r in gdnfuse.reports()] == ["prefill", "prefill", "decode", *["prefill", "decode"] * len(static)]


def test_explain_says_what_would_be_taken():
    plain, ours, store = pair()
    prompt = torch.cat([ids(100), ids(30, 1)], 1)
    agree(plain, ours, ids(100))
    before = store.stats()
    found = gdnfuse.explain(ours.generate, prompt, **ONE)
    assert found.to_dict()["prefixes"] == [{"tokens": 100, "prompt": 130, "why_not": "", "no_end": ""}]
    assert store.stats() == before
    assert "\n100 of the 130 tokens of the prompt were taken from the prefix store.\n" in found.summary()
    found = gdnfuse.explain(ours.generate, prompt, use_cache=False, **ONE)
    assert "\nNothing was taken from the prefix store: there is no cache.\n" in found.summary() and store.stats() == before
    assert taken(store, lambda: agree(plain, ours, prompt)) == 100


def test_after_a_warmup_nothing_is_compiled():
    _, ours, store = pair(prefill=True, fuel=None, every=128)
    # Prompts on an empty and on a filled cache, and both with states on the way.
    assert gdnfuse.warmup(ours).graphs == {"prefill": 4, "decode": 1} and store.stats().prompts == store.stats().states == 0
    gdnfuse.clear_reports()
    for n in (60, 300, 700, 80, 710):
        ours.generate(torch.cat([ids(100), ids(n, n)], 1), max_new_tokens=2)
    assert store.stats().hits == 3 and not gdnfuse.reports()


@pytest.mark.parametrize("family", some(FAMILIES, "qwen3_5"))
def test_a_prompt_leaves_its_states_in_one_call(family, monkeypatch):
    plain, ours, store = pair(FAMILIES[family], prefill=True, fuel=None, strict=True)
    calls = []
    part = generate._part
    monkeypatch.setattr(generate, "_part", lambda given, *at: calls.append(at[:2]) or part(given, *at))
    prompt = ids(330, rows=2)
    agree(plain, ours, prompt, max_new_tokens=1)
    assert calls == [(0, 330)] and not store.in_pieces  # 320 is the last whole block, and a multiple of 64 itself
    for n in range(64, 330, 64):
        cache, wanted = store.open(prompt[:, : n + 1]), zoo.new_cache(plain, "dynamic")
        plain(input_ids=prompt[:, :n], **zoo.held(wanted))
        assert cache.get_seq_length() == n
        for kind in ("conv", "recurrent"):
            assert zoo.relative(zoo.flat_states(cache, kind), zoo.flat_states(wanted, kind)) < 1e-5
    # The same on what was taken, behind a turn's end that is no multiple of anything.
    calls.clear()
    longer = torch.cat([prompt, ids(400, 5, rows=2)], 1)
    agree(plain, ours, longer)
    assert calls == [(330, 384), (384, 730)]
    assert store.open(torch.cat([longer[:, :650], ids(9, rows=2)], 1)).get_seq_length() == 640


def test_a_long_prompt_holds_few_states_at_a_time():
    store = pair()[2]
    run = generate.Run(store, ["input_ids"], cache_finder())
    store.in_pieces, run._rows = False, [b"", b""]
    stops, at, pieces = list(range(64, 64 * 30, 64)), 0, []
    while at < 64 * 30:
        at, passed = run._piece(at, [n for n in stops if n > at], 64 * 30)
        pieces.append((at // 64, len(passed)))
    assert pieces == [(9, 8), (18, 8), (27, 8), (30, 2)]  # of two rows 16 states and those at the end, which the cache has


def test_where_a_graph_leaves_no_states_calls_end_where_they_are_wanted(monkeypatch):
    plain, ours, store = pair(prefill=True, fuel=None)
    monkeypatch.setattr(checkpoints, "hand_back", lambda *_: (0, []))
    for seed in (1, 2, 2):
        agree(plain, ours, ids(330, seed))
    assert store.in_pieces and store.stats().tokens_taken == 320


def test_states_are_where_prompts_part_and_where_they_end():
    plain, ours, store = pair(every=1024)
    document = ids(300)
    assert taken(store, lambda: agree(plain, ours, torch.cat([document, ids(90, 1)], 1))) == 0
    # Of the first prompt there are states at 384 and 390 alone. It is the second that shows where prompts part.
    assert taken(store, lambda: agree(plain, ours, torch.cat([document, ids(90, 2)], 1))) == 0
    assert taken(store, lambda: agree(plain, ours, torch.cat([document, ids(90, 3)], 1))) == 256
    prompt = torch.cat([document, ids(90, 3)], 1)
    assert taken(store, lambda: agree(plain, ours, prompt)) == 384
    assert taken(store, lambda: agree(plain, ours, prompt[:, :385])) == 384  # at most all tokens but one
    assert taken(store, lambda: agree(plain, ours, prompt[:, :384])) == 256


def test_a_chat_goes_on_where_it_ended_and_where_thoughts_were():
    plain, ours, store = pair(every=1024)
    talk, end = ids(70), 0
    for turn in range(3):
        out = agree(plain, ours, talk, max_new_tokens=10)
        first = (out[:, [talk.shape[1]]] + 1) % 128  # whatever is left of the answer without its thoughts, it begins otherwise
        stripped = torch.cat([talk, first, ids(11, 9)], 1)
        assert taken(store, lambda talk=stripped: agree(plain, ours, talk)) == max(end, (talk.shape[1] - 1) // 64 * 64)
        talk, end = torch.cat([out, ids(7, turn)], 1), out.shape[1] - 1
        assert store.open(talk).get_seq_length() == end


def test_rows_take_what_is_known_of_all():
    plain, ours, store = pair()
    a, b = ids(200, 1), torch.cat([ids(130, 1), ids(70, 2)], 1)
    both = torch.cat([a, b])
    assert taken(store, lambda: agree(plain, ours, both, max_new_tokens=3)) == 0
    assert taken(store, lambda: agree(plain, ours, both, max_new_tokens=3)) == 2 * 192
    assert taken(store, lambda: agree(plain, ours, torch.cat([a, ids(200, 3)]))) == 0
    assert taken(store, lambda: agree(plain, ours, torch.cat([a, torch.cat([a[:, :140], ids(60, 4)], 1)]))) == 2 * 128
    assert taken(store, lambda: agree(plain, ours, a, num_return_sequences=2, num_beams=2)) == 2 * 192
    with ours.generate.noting() as noted:
        ours.generate(a, num_beams=2, **ONE)
    said = str(explain.taken(noted[0]))
    assert said.endswith("prefix store. Only the prompt of this turn can be kept: the rows of beams trade places.")


def test_streamers_processors_and_chunks_of_a_prompt_stay_as_they_are():
    plain, ours, store = pair(every=128)
    prompt = ids(300)
    put = []

    class Streamer:
        def put(self, value):
            put.append(value.flatten().tolist())

        def end(self):
            put.append("end")

    for _ in range(2):
        agree(plain, ours, prompt, max_new_tokens=3, repetition_penalty=1.5, prefill_chunk_size=100)
    # Of the second the chunks up to 200 and 300 begin at 128 and 256; each takes what is known behind the one before it.
    assert store.stats().tokens_taken == 28 + 56 and store.stats().prompts == 2 and store.stats().hits == 1
    out = ours.generate(prompt, streamer=Streamer(), max_new_tokens=2, do_sample=False)
    assert put == [prompt[0].tolist(), [int(out[0, -2])], [int(out[0, -1])], "end"]


LEFT_OUT = {
    "padding": ("the mask hides|positions do not count", lambda m: {"attention_mask": torch.tensor([[0] * 3 + [1] * 97])}),
    "a cache": ("a cache was passed to generate", lambda m: {zoo.CACHE: DynamicCache(config=zoo.text_config(m))}),
    "embeddings": ("given as embeddings", lambda m: {"inputs": None, "inputs_embeds": m.get_input_embeddings()(ids(100))}),
    "positions": ("positions do not count", lambda m: {"position_ids": torch.arange(3, 103)[None]}),
    "hidden states": ("output_hidden_states was given", lambda m: {"output_hidden_states": True}),
    "no cache": ("there is no cache", lambda m: {"use_cache": False}),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_a_store_cannot_know_of_is_left_out(name, caplog):
    plain, ours, store = pair()
    agree(plain, ours, ids(100))
    why, arguments = LEFT_OUT[name]
    with caplog.at_level("INFO", "gdnfuse.generation.generate"):
        logits = [m.generate(**{"inputs": ids(100), **ONE, **LOGITS, **arguments(m)}).logits[0] for m in (plain, ours)]
    assert torch.equal(*logits)
    stats = store.stats()
    assert stats.tokens_taken == 0 and stats.states == 2 and list(stats.left_out.values()) == [1]
    assert re.search(why, next(iter(stats.left_out))) and next(iter(stats.left_out)) in caplog.text


def test_caches_that_cannot_be_cut_are_left_out():
    _, ours, store = pair()
    recording = zoo.new_cache(ours, "dynamic")
    recording.activate_past_recording()
    assert store.unlike(recording) == "a cache that records the past"
    assert store.unlike(DynamicCache(config=zoo.text_config(zoo.causal_lm()))) == "3 layers of other kinds than the model's"
    assert store.unlike(DynamicCache()) == "0 layers of other kinds than the model's"
    assert store.unlike(zoo.new_cache(ours, "static")) is None


def test_pictures_are_left_out_and_move_no_positions_afterwards():
    plain, ours, store = pair(zoo.conditional_generation)
    agree(plain, ours, ids(100))
    run = Run(store, ["input_ids"], cache_finder())
    given = {
        "input_ids": ids(100),
        "pixel_values": torch.zeros(1),
        "logits_to_keep": 1,
        **zoo.held(zoo.new_cache(ours, "dynamic")),
    }
    assert run(lambda **given: given, (), given).keys() == given.keys()
    assert store.stats().left_out == {"pixel_values was given": 1} and run.taken is None
    ours.model.rope_deltas = torch.tensor([[-5]])  # as a picture of an earlier prompt leaves it
    assert taken(store, lambda: agree(plain, ours, torch.cat([ids(70), ids(30, 1)], 1))) == 64
    ours.model.rope_deltas = torch.tensor([[-5]])
    prompt = torch.cat([ids(70), ids(30, 2)], 1)
    cache = store.open(prompt)
    assert cache.get_seq_length() == 64
    logits = [m.generate(prompt, **ONE, **LOGITS, **held).logits[0] for m, held in ((plain, {}), (ours, {zoo.CACHE: cache}))]
    assert zoo.relative(*logits) < 1e-5


CHANGES = {
    "in place": lambda w: w.mul_(1.01),
    "by .data": lambda w: w.data.copy_(w.data * 1.01),
    "one number": lambda w: w.view(-1)[7:8].add_(1),
    "another tensor": lambda w: setattr(w, "data", w.data * 1.01),
}


@pytest.mark.parametrize("how", CHANGES)
def test_changed_weights_have_other_prefixes(how):
    plain, ours, store = pair()
    prompt = ids(200)
    agree(plain, ours, prompt)
    before = [copy.deepcopy(m.model.layers[0].mlp.down_proj.weight) for m in (plain, ours)]
    for model in (plain, ours):
        CHANGES[how](model.model.layers[0].mlp.down_proj.weight)
    assert taken(store, lambda: agree(plain, ours, prompt)) == 0
    assert taken(store, lambda: agree(plain, ours, prompt)) == 192
    for model, weight in zip((plain, ours), before, strict=True):
        model.model.layers[0].mlp.down_proj.weight.copy_(weight)
    assert taken(store, lambda: agree(plain, ours, prompt)) == 192  # as they were, at another place or not


def test_a_turn_in_which_weights_changed_is_not_kept():
    """What a cache holds then is of no weights that there were, even if they are again what they have been."""
    plain, ours, store = pair()
    weight = ours.model.layers[0].mlp.down_proj.weight
    before = weight.clone()

    class Streamer:
        def __init__(self, back):
            self.puts, self.back = 0, back

        def put(self, value):
            self.puts += 1
            if self.puts == 4:
                weight.mul_(1.5)
            if self.puts == 6 and self.back:
                weight.copy_(before)

        def end(self):
            pass

    for back in (True, False):
        out = ours.generate(ids(100), streamer=Streamer(back), max_new_tokens=8, do_sample=False)
        weight.copy_(before)
        assert store.open(torch.cat([out, ids(5)], 1)).get_seq_length() == 64
        agree(plain, ours, torch.cat([out, ids(5)], 1))
        store.clear()


def test_weights_that_only_moved_have_the_same_prefixes():
    plain, ours, store = pair()
    agree(plain, ours, ids(200))
    for p in ours.parameters():
        p.data = p.data.clone()
    assert taken(store, lambda: agree(plain, ours, ids(200))) == 192


def test_adapters_and_hooks_have_prefixes_of_their_own():
    peft = pytest.importorskip("peft")
    plain, ours, store = pair()
    agree(plain, ours, ids(200))
    config = peft.LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(ours, config)
    torch.manual_seed(0)
    other = peft.get_peft_model(plain, config)
    for model in (wrapped, other):
        model.requires_grad_(False).eval()
    assert taken(store, lambda: agree(other, wrapped, ids(200))) == 0
    assert taken(store, lambda: agree(other, wrapped, ids(200))) == 192
    with wrapped.disable_adapter(), other.disable_adapter():
        assert taken(store, lambda: agree(other, wrapped, ids(200))) == 0
    for model in (wrapped, other):
        model.merge_adapter()
    assert taken(store, lambda: agree(other, wrapped, ids(200))) == 0
    hooks = [
        m.get_submodule("base_model.model.model.layers.0").register_forward_hook(lambda *a: a[-1] * 1.1) for m in (wrapped, other)
    ]
    assert taken(store, lambda: agree(other, wrapped, ids(200))) == 0
    for hook in hooks:
        hook.remove()
    assert taken(store, lambda: agree(other, wrapped, ids(200))) == 192


def test_another_dtype_has_other_prefixes():
    plain, ours, store = pair()
    agree(plain, ours, ids(200))
    ours.bfloat16()
    assert taken(store, lambda: ours.generate(ids(200), **ONE)) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert taken(store, lambda: ours.generate(ids(200), **ONE)) == 0


def test_rounded_states_are_others(tmp_path):
    plain, ours, store = pair(state_dtype=torch.bfloat16)
    ours.generate(ids(200), **ONE)
    store.save(tmp_path)
    gdnfuse.compile(ours, inner="eager", prefill=False, fuel=0, prefixes=store)
    assert taken(store, lambda: agree(plain, ours, ids(200))) == 0
    with pytest.raises(GdnfuseError, match="with state_dtype None, found state_dtype bfloat16"):
        store.load(tmp_path)


def test_by_hand():
    plain = zoo.causal_lm(**zoo.SMALL)
    store = PrefixStore(plain, every=64)
    plain.model.layers[1].requires_grad_(True)
    for kind, made in (({}, DynamicCache), ({"max_cache_len": 120}, StaticCache)):
        prompt = torch.cat([ids(70), ids(30, len(kind))], 1)
        cache = store.open(prompt, **kind)
        assert type(cache) is made and cache.get_seq_length() == (0 if not kind else 64)
        out = plain.generate(prompt, **{zoo.CACHE: cache}, **ONE, max_length=None)
        assert store.close(cache, out) == 1
        again = torch.cat([out, ids(5, 3)], 1)
        cache = store.open(again, **kind)
        assert cache.get_seq_length() == 100
        logits = plain(input_ids=again[:, 100:], **zoo.held(cache)).logits[:, -1].detach()
        assert zoo.relative(logits, plain(input_ids=again).logits[:, -1].detach()) < 1e-5
        if not kind:  # a state where the next prompt parts
            head = store.open(prompt[:, :64])
            plain(input_ids=prompt[:, :64], **zoo.held(head))
            store.close(head, prompt[:, :64])
    held = [x for e in store._tree.entries() for x in (*e.states, e.rest, *(node.block for node in e.node.path()))]
    assert held and not any(x.requires_grad for x in held if x is not None)  # nor is the graph that made them held


@pytest.mark.parametrize("kind", [{}, {"max_cache_len": 210}], ids=["dynamic", "static"])
def test_what_is_known_goes_behind_what_a_cache_holds(kind):
    plain, ours, store = pair()
    prompt = ids(201, rows=2)
    ours.generate(prompt[:, :200], **ONE)
    wanted = plain(input_ids=prompt[:, :200], use_cache=True)[zoo.CACHE]
    n, entries = store.find(tokens(prompt), 200)
    for start in (0, 64, 70, 195):
        cache = store.open(prompt[:, :1], **kind)
        if start:
            plain(input_ids=prompt[:, :start], **zoo.held(cache))
        store.fill(cache, entries, start)
        assert cache.get_seq_length() == n == 200
        pairs = zip(store._layout.held(cache), store._layout.held(wanted), strict=True)
        assert all(zoo.relative(x[:, :, :n], y) < 1e-5 and not x[:, :, n:].any() for x, y in pairs)
        pairs = zip(store._layout.states_of(cache), store._layout.states_of(wanted), strict=True)
        assert all(zoo.relative(x, y) < 1e-5 for x, y in pairs)


def test_what_a_prompt_waits_for_is_copied_in_few_launches_and_not_zeroed_before():
    _, ours, store = pair()
    ours.generate(ids(400), **ONE)
    _, entries = store.find(tokens(ids(400)), 400)
    cache, seen = store.open(ids(1)), []
    with compat.seeing_ops(lambda op, result: seen.append((op.name(), result))):
        store.fill(cache, entries, 0)
    assert not any(x.numel() for name, x in seen if "zero" in name)
    # Blocks are put together once, then keys, values, recurrent states and conv windows are copied: two of them need no loop.
    copies = ("aten::stack", "aten::_foreach_copy_", "aten::copy_", "aten::cat", "aten::clone")
    assert sum(name in copies for name, _ in seen) <= 1 + 4
    seen.clear()
    with compat.seeing_ops(lambda op, result: seen.append((op.name(), result))):
        assert store.keep("others", cache, tokens(ids(400)))
    # Recurrent states, conv windows, the rest of a block, six blocks together, and each apart.
    assert sum(name in copies for name, _ in seen) == 2 + 1 + 1 + 6
    # Tokens, their positions and the mask are read from the GPU together.
    x = ids(400)
    given = {"input_ids": x, "position_ids": torch.arange(400)[None], "attention_mask": torch.ones_like(x)}
    seen.clear()
    with compat.seeing_ops(lambda op, result: seen.append((op.name(), result))):
        assert generate._plain_tokens(given, 0) == (tokens(x), "")
    assert sum(name in copies for name, _ in seen) == 1


def test_a_cache_of_other_tokens_is_refused():
    plain, ours, store = pair()
    agree(plain, ours, ids(100))
    cache, other = store.open(ids(100)), ids(100, 1)
    with pytest.raises(GdnfuseError, match="prompt that it was opened for, found one that does not begin with the 64 tokens"):
        ours.generate(other, **{zoo.CACHE: cache}, **ONE)
    ours.generate(ids(100), **{zoo.CACHE: cache}, **ONE)
    # It has gone on with its prompt, and goes on from there alone, until it is reset.
    with pytest.raises(GdnfuseError, match="found one that does not begin with the 100 tokens"):
        ours.generate(ids(99), **{zoo.CACHE: cache}, **ONE)
    static = store.open(ids(100), 200)
    static.reset()
    assert torch.equal(ours.generate(other, **{zoo.CACHE: static}, **ONE), plain.generate(other, **ONE))
    for sequences, why in (
        (other, "A cache must go on with the prompt"),
        (ids(99), "close needs all the tokens that the cache has seen, 100, found 99"),
        (ids(100, rows=2), "close needs a row of tokens for each of the cache's 1, found 2"),
        (torch.zeros(1, 100), "A PrefixStore needs token ids .* found torch.float32"),
        ("text", "A PrefixStore needs token ids .* found str"),
    ):
        with pytest.raises(GdnfuseError, match=why):
            store.close(cache, sequences)
    another = zoo.causal_lm(**zoo.SMALL, linear_num_value_heads=8)
    caches = [zoo.new_cache(model, "dynamic") for model in (another, plain, plain, plain)]
    for model, filled in zip((another, plain, plain), caches, strict=False):
        model(input_ids=ids(100), **zoo.held(filled))
    caches[1].layers[0].recurrent_states[0] = None
    caches[2].layers[0].recurrent_states[0] = cache.layers[0].recurrent_states[0].to("meta")
    for cache, why in (
        (object(), "whose states and keys can be kept, found a object"),
        (caches[0], "whose states and keys can be kept, found states of other sizes than the model's"),
        (caches[1], "that a model has filled, found one of 100 tokens that lacks states"),
        (caches[2], "whose states and keys can be kept, found tensors on meta, where the model's are on cpu"),
        (caches[3], "that a model has filled, found one of 0 tokens that lacks states"),
    ):
        with pytest.raises(GdnfuseError, match=f"close needs a cache {why}"):
            store.close(cache, ids(100))


def test_pinned_prefixes_stay():
    plain, ours, _ = pair()
    store = PrefixStore(ours, 64, 2 * PrefixStore(ours).state_bytes + 4 * PrefixStore(ours).block_bytes)
    gdnfuse.compile(ours, inner="eager", prefill=False, fuel=0, prefixes=store)
    agree(plain, ours, ids(65))
    assert store.pin(ids(65)) == 65
    for seed in range(1, 5):
        agree(plain, ours, ids(65, seed))
    assert taken(store, lambda: agree(plain, ours, torch.cat([ids(65), ids(9, 3)], 1))) == 65
    store.unpin(ids(65))
    with pytest.raises(GdnfuseError, match="The tokens must have a pinned prefix, found none: pin them first."):
        store.unpin(ids(65))
    with pytest.raises(GdnfuseError, match="The tokens must have a known prefix, found none: generate from them"):
        store.pin(ids(65, 99))
    store.clear()
    assert store.stats().states == store.stats().device_bytes == 0


def test_what_the_device_has_no_room_for_goes_to_the_host_and_comes_back():
    plain, ours, store = pair()
    one = store.state_bytes + store.block_bytes
    store = PrefixStore(ours, 64, 2 * one, host_bytes=20 * one)
    gdnfuse.compile(ours, inner="eager", prefill=False, fuel=0, prefixes=store)
    for seed in range(4):
        agree(plain, ours, ids(65, seed))
    stats = store.stats()
    assert stats.offloaded > 0 and stats.host_bytes > 0 and stats.device_bytes <= 2 * one and stats.evicted == 0
    for seed in range(4):
        assert taken(store, lambda seed=seed: agree(plain, ours, torch.cat([ids(65, seed), ids(3)], 1))) == 65


def test_threads_save_to_one_folder(tmp_path):
    plain, ours, store = pair()
    agree(plain, ours, ids(200))
    failed = []

    def work():
        try:
            for _ in range(5):
                store.save(tmp_path)
        except GdnfuseError as e:
            failed.append(str(e))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and PrefixStore(ours, 64).load(tmp_path) == store.stats().states
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"} and len(list(tmp_path.iterdir())) == 2


def test_threads_share_a_store():
    plain, ours, store = pair(max_bytes=300_000)
    wanted = {seed: plain.generate(torch.cat([ids(130), ids(20, seed)], 1), **ONE) for seed in range(4)}
    wrong = []

    def work(seed):
        for _ in range(4):
            found = ours.generate(torch.cat([ids(130), ids(20, seed)], 1), **ONE)
            if not torch.equal(found, wanted[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and store.stats().hits >= 8 and store.stats().prompts == 16


def test_a_prompt_is_known_while_another_thread_compiles(monkeypatch):
    plain, ours, store = pair()
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # which is one for all threads
    assert [taken(store, lambda: agree(plain, ours, ids(130), max_new_tokens=3)) for _ in range(2)] == [0, 128]
    assert not store.stats().left_out


def test_copies_and_pickles_have_no_store():
    plain, ours, store = pair()
    agree(plain, ours, ids(100))
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.deepcopy(copy.deepcopy(ours))):
        assert copied.generate.__self__ is copied and copied.generate.__func__ is type(copied).generate
        assert taken(store, lambda copied=copied: agree(plain, copied, ids(100))) == 0
        with pytest.raises(
            GdnfuseError, match="prefixes must be a PrefixStore of the model that is compiled, found one of another"
        ):
            gdnfuse.compile(copied, inner="eager", prefixes=store)
    with pytest.raises(GdnfuseError, match="A PrefixStore must stay with its model and process, found a copy"):
        copy.deepcopy(store)
    assert taken(store, lambda: agree(plain, ours, ids(100))) == 64
    gdnfuse.compile(ours, inner="eager", prefill=False, fuel=0)
    assert taken(store, lambda: agree(plain, ours, ids(100))) == 0 and "generate" not in vars(ours)


def test_a_store_keeps_no_model_alive():
    _, ours, store = pair()
    gone = weakref.ref(ours)
    del ours
    gc.collect()
    assert gone() is None
    with pytest.raises(GdnfuseError, match="must be used while its model lives"):
        store.open(ids(5))


@pytest.mark.parametrize(
    "arguments, why",
    [
        ({"every": 100}, "every must be a multiple of 64 tokens, found 100"),
        ({"every": 0}, "every must be a multiple of 64 tokens, found 0"),
        ({"every": 64.0}, "every must be a multiple of 64 tokens, found 64.0"),
        ({"max_bytes": 1000}, r"max_bytes must have room for one state of Qwen3_5ForCausalLM, 6144 bytes, found 1000 bytes"),
        ({"max_bytes": "4GB"}, "max_bytes must be a number of bytes, found '4GB'"),
        ({"host_bytes": -1}, "host_bytes must be a number of bytes, found -1"),
        ({"tails": 1}, "tails must be True or False, found 1"),
    ],
)
def test_bad_arguments(arguments, why):
    model = zoo.causal_lm(**zoo.SMALL)
    with pytest.raises(GdnfuseError, match=why):
        PrefixStore(model, **arguments)
    assert torch.equal(model.generate(ids(5), **ONE), zoo.causal_lm(**zoo.SMALL).generate(ids(5), **ONE))


def test_bad_models_and_prompts():
    with pytest.raises(GdnfuseError, match="A PrefixStore needs one model with Gated DeltaNet layers, found Linear without one"):
        PrefixStore(torch.nn.Linear(2, 2))
    with pytest.raises(GdnfuseError, match="on one device, found meta"):
        PrefixStore(zoo.causal_lm(**zoo.SMALL).to("meta"))
    for name, family, kind in (("LaraMini", zoo.lara_mini, "Sliding"), ("Qwen4Exp", zoo.qwen4_exp, "Indexed")):
        if hasattr(zoo.transformers, f"{name}ForCausalLM"):
            with pytest.raises(GdnfuseError, match=f"keys and GDN states, found a .*{kind}.* in {name}.*: compile it without"):
                PrefixStore(family())
    with pytest.raises(GdnfuseError, match="same at all lengths, found rope_type 'dynamic'"):
        PrefixStore(zoo.causal_lm(**zoo.SMALL, rope_parameters={**zoo.ROPE, "rope_type": "dynamic", "factor": 2.0}))
    model = zoo.causal_lm(**zoo.SMALL)
    store = PrefixStore(model)
    with pytest.raises(GdnfuseError, match="prefixes must be a gdnfuse.PrefixStore, found int"):
        gdnfuse.compile(model, prefixes=3)
    for bad, why in (
        ([[1, 2]], "needs token ids .* found list"),
        (torch.zeros(1, 0, dtype=torch.long), r"needs token ids .* found torch.int64 of the shape \[1, 0\]"),
        (ids(9)[0], r"needs token ids .* found torch.int64 of the shape \[9\]"),
        (ids(9) > 5, "needs token ids .* found torch.bool"),
        (ids(9).to("meta"), "needs token ids .* torch.strided on meta"),
        (ids(9).to_sparse(), "needs token ids .* torch.sparse_coo on cpu"),
        (ids(9) + 128, "of the model's vocabulary, at least 0 and below 128, found "),
        (ids(9) - 128, "of the model's vocabulary, at least 0 and below 128, found -"),
    ):
        for call in (store.open, store.pin, store.unpin):
            with pytest.raises(GdnfuseError, match=why):
                call(bad)
    for length, why in (
        (8, "have room for the prompt of 9 tokens, found 8"),
        ("8", "be None or a number of tokens, found '8'"),
        (9.0, "be None or a number of tokens, found 9.0"),
    ):
        with pytest.raises(GdnfuseError, match=f"max_cache_len must {why}"):
            store.open(ids(9), max_cache_len=length)
    assert "generate" not in vars(model) and not model._compiled_call_impl
    model.to("meta")
    with pytest.raises(GdnfuseError, match="while its model is on cpu, where it was, found it on meta: make one anew"):
        store.open(ids(9))


def fingerprints(folder):
    """Every file of a folder, with what is in it."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def saved(tmp_path, **options):
    """A model, another of the same weights in a store that has nothing yet, and a folder of three prompts."""
    plain, ours, store = pair(**options)
    for seed in range(3):
        agree(plain, ours, torch.cat([ids(130), ids(9, seed)], 1))
    assert store.save(tmp_path / "known") == store.stats().states == 5
    _, other, empty = pair(**options)
    return plain, other, empty, tmp_path / "known"


def test_a_store_is_saved_and_loaded(tmp_path):
    plain, ours, store, folder = saved(tmp_path)
    assert store.load(folder) == 5 and store.stats().blocks == 2
    assert taken(store, lambda: agree(plain, ours, torch.cat([ids(130), ids(9, 1), ids(3)], 1))) == 139
    assert taken(store, lambda: agree(plain, ours, torch.cat([ids(130), ids(20, 9)], 1))) == 128
    # What it replaces goes, and what is somebody else's stays.
    before = fingerprints(folder)
    (folder / "notes.txt").write_text("mine")
    store.clear()
    agree(plain, ours, ids(70))
    store.save(folder)
    assert (folder / "notes.txt").read_text() == "mine" and not set(before) & set(fingerprints(folder)) - {"index.json"}
    assert store.load(folder) == 2


def test_the_model_may_come_from_a_folder_too(tmp_path):
    plain, _, _, folder = saved(tmp_path)
    plain.save_pretrained(tmp_path / "model")
    again = type(plain).from_pretrained(tmp_path / "model").requires_grad_(False)
    assert PrefixStore(again, 64).load(folder) == 5


def test_what_does_not_fit_is_not_loaded(tmp_path):
    plain, ours, store, folder = saved(tmp_path)
    small = PrefixStore(ours, 64, store.state_bytes + 9 * store.block_bytes // 4)
    assert small.load(folder) == 1 and small.stats().device_bytes <= small.max_bytes
    gdnfuse.compile(ours, inner="eager", prefill=False, fuel=0, prefixes=small)
    agree(plain, ours, torch.cat([ids(130), ids(9, 2), ids(3)], 1))


@pytest.mark.parametrize("of", ["weights", "dtype", "model", "transformers"])
def test_a_folder_of_another_model_is_refused(of, tmp_path, monkeypatch):
    _, ours, store, folder = saved(tmp_path)
    if of == "weights":
        ours.model.layers[0].mlp.down_proj.weight.mul_(2)
    elif of == "dtype":
        ours.bfloat16()
    elif of == "model":
        ours = zoo.moe(**zoo.SMALL)
        store = PrefixStore(ours)
    else:
        monkeypatch.setattr("gdnfuse.versions.version", lambda package: "5.99")
    with pytest.raises(GdnfuseError, match=f"must be of this model, with .*{of if of != 'transformers' else 'gdnfuse'}"):
        store.load(folder)
    assert store.stats().states == 0


def cut(file):
    file.write_bytes(file.read_bytes()[:-10])


def change(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name, do, why",
    [
        ("*.safetensors", cut, "must be as they were saved, found .* cut short or changed: save them again"),
        ("*.safetensors", change, "must be as they were saved, found .* cut short or changed: save them again"),
        ("*.safetensors", lambda f: f.unlink(), "must be readable, found FileNotFoundError"),
        ("index.json", cut, "must be an index of prefixes as gdnfuse.prefixes/2 writes it, found something else"),
        ("index.json", lambda f: f.write_text(f.read_text().replace("[", "[ ", 1)), "found other contents"),
        ("index.json", lambda f: f.write_text(f.read_text().replace("prefixes/2", "prefixes/9")), "format gdnfuse.prefixes.9"),
        ("index.json", lambda f: f.unlink(), "must be read from a folder that they were saved to, found FileNotFoundError"),
    ],
)  # fmt: skip
def test_what_was_changed_is_never_served(name, do, why, tmp_path):
    _, _, store, folder = saved(tmp_path)
    do(next(folder.glob(name)))
    with pytest.raises(GdnfuseError, match=why):
        store.load(folder)
    assert store.stats().states == store.stats().device_bytes == 0


def test_a_folder_that_cannot_be_written_is_left_as_it_is(tmp_path, monkeypatch):
    plain, ours, store, folder = saved(tmp_path)
    agree(plain, ours, ids(70))
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(store, "_owner", None)  # digests all weights: nothing of it before the folder is looked at
    for bad in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(GdnfuseError, match="Prefixes must be written to a folder, found that .*file is a file"):
            store.save(bad)
    for bad in (None, 3, "", "a\0b", b"prefixes", ["prefixes"]):
        for call in (store.save, store.load):
            with pytest.raises(GdnfuseError, match="A folder of prefixes must be named by a path, found "):
                call(bad)
    for call, way in ((store.save, "written to a folder"), (store.load, "read from a folder that they were saved to")):
        with pytest.raises(GdnfuseError, match=f"Prefixes must be {way}, found OSError"):
            call("a" * 5000)
    monkeypatch.undo()
    before = fingerprints(folder)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(GdnfuseError, match="found OSError: .*No space left on device"):
        store.save(folder)
    assert fingerprints(folder) == before and (tmp_path / "file").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.json").write_text('{"mine": 1}')
    with pytest.raises(GdnfuseError, match="must be an index of prefixes"):
        store.save(tmp_path / "other")
    hook = ours.model.layers[0].register_forward_hook(lambda *a: None)
    for call in (store.save, store.load):
        with pytest.raises(GdnfuseError, match="no forward hooks when its prefixes are saved or loaded, found 1"):
            call(folder)
    hook.remove()
    assert store.load(folder) == 5


@pytest.mark.sweep
def test_two_processes_read_one_folder(tmp_path):
    _, _, _, folder = saved(tmp_path)
    code = f"""
import torch
from tests.generation.test_prefixes import *
plain, ours, store = pair()
assert store.load({str(folder)!r}) == 5
assert taken(store, lambda: agree(plain, ours, torch.cat([ids(130), ids(9, 1), ids(3)], 1))) == 139
"""
    running = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate(timeout=300)[1][-2000:] * process.returncode for process in running] == [b"", b""]
