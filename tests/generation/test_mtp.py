"""MTP heads: loaded from a checkpoint as it is published, and drafting what they say."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import gdnfuse
from gdnfuse import MTP
from gdnfuse.bench.speculation import forced
from gdnfuse.generation import mtp, speculation
from gdnfuse.generation.proposers import Run
from gdnfuse.generation.speculation import Generation
from tests.generation.repeated import repeat_steps
from tests.models import zoo

# What Qwen3.5's dense checkpoints hold.
PUBLISHED = [
    "fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm",
    *(f"layers.0.{name}" for name in ("input_layernorm", "post_attention_layernorm")),
    *(f"layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
]  # fmt: skip
SMALL = {**zoo.SMALL, "vocab_size": 8}  # of which some drafts stand by chance
GREEDY = {"max_new_tokens": 20, "do_sample": False}


def weights_of(model, seed=0):
    """Random ones of a head, as published: experts one by one."""
    decoder, generator = model.get_decoder(), torch.Generator().manual_seed(seed)
    config = copy.deepcopy(zoo.text_config(model))
    config.layer_types, config.num_hidden_layers = ["full_attention"], 1
    layer = decoder.layers[-1]
    shapes = mtp.Head(config, type(layer), type(layer.input_layernorm)).state_dict()
    found = {}
    for name, like in shapes.items():
        x = torch.randn(like.shape, generator=generator) * 0.2
        if name.endswith("experts.gate_up_proj"):
            for i, (gate, up) in enumerate(each.chunk(2) for each in x):
                of = f"{name.removesuffix('gate_up_proj')}{i}"
                found |= {f"{of}.gate_proj.weight": gate.contiguous(), f"{of}.up_proj.weight": up.contiguous()}
        elif name.endswith("experts.down_proj"):
            found |= {f"{name.removesuffix('down_proj')}{i}.down_proj.weight": each.contiguous() for i, each in enumerate(x)}
        else:
            found[name] = x
    return {f"mtp.{name}": x for name, x in found.items()}


def checkpoint(model, folder, weights, sharded=False):
    """The model's folder with weights of a head in it, in its file or in one of their own."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    own = load_file(file)
    if not sharded:
        save_file({**own, **weights}, file)
        return folder
    file.rename(folder / "model-00001-of-00002.safetensors")
    save_file(weights, folder / "model-00002-of-00002.safetensors")
    where = dict.fromkeys(own, "model-00001-of-00002.safetensors") | dict.fromkeys(weights, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize("sharded", [False, True])
def test_a_published_layout_is_loaded_tensor_by_tensor(sharded, tmp_path):
    model = zoo.causal_lm(**zoo.SMALL)
    weights = weights_of(model)
    assert sorted(weights) == sorted(f"mtp.{name}.weight" for name in PUBLISHED) and len(weights) == 15
    head = mtp.load(model, checkpoint(model, tmp_path, weights, sharded))
    state = head.state_dict()
    assert len(state) == 15
    for name, x in weights.items():
        assert torch.equal(state[name.removeprefix("mtp.")], x)
    assert not any(p.requires_grad for p in head.parameters())


@pytest.mark.parametrize("family", ["moe", "qwen3_next"])
def test_experts_that_are_stored_one_by_one_are_stacked(family, tmp_path):
    model = getattr(zoo, family)(**zoo.SMALL)
    weights = weights_of(model)
    state = mtp.load(model, checkpoint(model, tmp_path, weights)).state_dict()
    of = "layers.0.mlp.experts"
    for i in range(4):
        gate, up = state[f"{of}.gate_up_proj"][i].chunk(2)
        assert torch.equal(gate, weights[f"mtp.{of}.{i}.gate_proj.weight"]) and torch.equal(
            up, weights[f"mtp.{of}.{i}.up_proj.weight"]
        )
        assert torch.equal(state[f"{of}.down_proj"][i], weights[f"mtp.{of}.{i}.down_proj.weight"])


@torch.no_grad()
def said(model, head, ids, n):
    """What a head drafts behind a prompt, over all tokens anew at each, without a cache."""
    hidden = model(ids, output_hidden_states=True).hidden_states[-1][:, :-1]
    tokens, decoder = ids[:, 1:], model.get_decoder()
    for _ in range(n):
        T = tokens.shape[1]
        places = torch.arange(T)[None].expand(len(ids), T)
        embedded = model.get_input_embeddings()(tokens)
        rotary = decoder.rotary_emb(embedded, places[None].expand(3, -1, -1) if mtp._several(decoder) else places)
        mask = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)[None, None]
        x = head(embedded, hidden, position_embeddings=rotary, attention_mask=mask, position_ids=places)
        tokens = torch.cat([tokens, model.get_output_embeddings()(x)[:, -1:].argmax(-1)], 1)
        hidden = torch.cat([hidden, x[:, -1:]], 1)
    return tokens[:, -n:]


@pytest.mark.parametrize(("family", "static"), [("causal_lm", True), ("causal_lm", False), ("qwen3_next", True)])
@torch.no_grad()
def test_drafts_are_what_the_head_says_round_by_round(family, static, tmp_path, monkeypatch):
    monkeypatch.setattr(mtp, "PIECE", 4)  # so that a prompt comes in two
    model = getattr(zoo, family)(**zoo.SMALL)
    checkpoint(model, tmp_path, weights_of(model))
    of = MTP(3, tmp_path)
    of.check(model)
    ids = zoo.prompt(2, 14)[0]
    chain, cache = of.start(Run(model, None, 99, static)), zoo.new_cache(model, "dynamic")
    at = 0
    for end, extra in ((7, 0), (9, 2), (10, 3), (14, 0)):  # and tokens that were fed and do not stand
        fed = torch.cat([ids[:, at : end - 1], zoo.tokens_for(2, extra)], 1)
        held = copy.deepcopy(cache)
        model(fed, **zoo.held(held))
        chain.hear(fed)
        model(ids[:, at : end - 1], **zoo.held(cache))
        at = end - 1
        assert torch.equal(chain.propose(ids[:, :end], ()).tokens, said(model, of.head(model), ids[:, :end], 3))
    chain.close()


@pytest.mark.parametrize("family", ["causal_lm", "moe", "qwen3_next"])
def test_tokens_are_greedys(family, tmp_path):
    model = getattr(zoo, family)(**SMALL)
    model.generation_config.pad_token_id = 0
    checkpoint(model, tmp_path, weights_of(model))
    accepted = 0
    for seed in range(4):
        rows, padded = 1 + seed % 2, seed == 3
        ids, mask = zoo.prompt(rows, 7 + seed, padded, seed=seed)
        ids = ids % 7 + 1 if mask is None else (ids % 7 + 1) * mask
        mask = torch.ones_like(ids) if mask is None else mask
        asked = {**GREEDY, "attention_mask": mask, "cache_implementation": ("static", None)[seed % 2]}
        speculative = gdnfuse.speculative(MTP(1 + seed, tmp_path))
        found = model.generate(ids, **asked, custom_generate=speculative)
        assert torch.equal(found, model.generate(ids, **asked)), seed
        accepted += speculative.acceptance.accepted
    assert accepted
    drawn = model.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=9, custom_generate=speculative)
    assert drawn.shape == (rows, ids.shape[1] + 9)


def test_a_compiled_model_hands_its_hidden_states_on_and_copies_want_none(tmp_path):
    torch.compiler.reset()
    gdnfuse.clear_reports()
    model = zoo.causal_lm(**SMALL)
    model.generation_config.pad_token_id = 0
    checkpoint(model, tmp_path, weights_of(model))
    ids = zoo.prompt(1, 8)[0] % 7 + 1
    wanted = model.generate(ids, **GREEDY, cache_implementation="static")
    eager = gdnfuse.speculative(MTP(3, tmp_path))
    model.generate(ids, **GREEDY, cache_implementation="static", custom_generate=eager)
    gdnfuse.compile(model, inner="eager", strict=True, speculate=MTP(3, tmp_path))
    assert torch.equal(model.generate(ids, **GREEDY, cache_implementation="static"), wanted)
    same = ("rounds", "drafted", "accepted")  # drafts of one graph are those that the head makes one by one
    assert [getattr(model.generate.acceptance, name) for name in same] == [getattr(eager.acceptance, name) for name in same]
    assert 0 < eager.acceptance.accepted < eager.acceptance.drafted
    phases = [r.phase for r in gdnfuse.reports()]
    # The head's graph is of all drafts of a round.
    assert phases.count("verify") == 1 and phases.count("draft") == 1 and model.generate.acceptance.rounds > 2
    fired = {r.rule for report in gdnfuse.reports() if report.phase == "draft" for r in report.all_records if r.status == "fired"}
    assert {"norm_linear", "swiglu_linear", "residual_linear"} <= fired
    before = str(model.generate.acceptance)
    found = gdnfuse.explain(model.generate, ids, **GREEDY, cache_implementation="static")
    (drafts,) = found.drafts
    phases = [r.phase for r in found.reports]
    assert phases.count("draft") == phases.count("verify") == phases.count("prefill") == 1
    assert (
        f"{drafts.accepted} of {drafts.drafted} drafts accepted" in found.summary()
        and drafts.rounds
        and drafts.replay == "reference"
    )
    assert found.to_dict()["drafts"][0]["tokens_per_step"] == drafts.tokens_per_step and str(model.generate.acceptance) == before
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tap = mtp.tap_of(copied)
        assert tap is not mtp.tap_of(model) and not tap.wanted and tap.hidden is None
    assert mtp.tap_of(model).hidden is None and not mtp.tap_of(model).wanted


def test_drafts_are_made_before_the_host_knows_how_many_are_accepted(tmp_path, monkeypatch):
    """They are the same as after it: with acceptances that are drawn, all later tokens depend on each draft."""
    torch.compiler.reset()
    model = zoo.causal_lm(**SMALL)
    model.generation_config.pad_token_id = 0
    checkpoint(model, tmp_path, weights_of(model))
    gdnfuse.compile(model, inner="eager", strict=True, speculate=MTP(3, tmp_path))
    ids, ahead, made = zoo.prompt(1, 8)[0] % 7 + 1, mtp._Chain.draft_ahead, []

    def generated(draft_ahead):
        monkeypatch.setattr(mtp._Chain, "draft_ahead", draft_ahead)
        loop = forced(MTP(3, tmp_path), 0.6)
        return model.generate(ids, **GREEDY, cache_implementation="static", custom_generate=loop), loop.acceptance

    wanted, _ = generated(lambda *_: None)
    found, counts = generated(lambda self, *args: made.append(ahead(self, *args)) or made[-1])
    assert torch.equal(found, wanted) and 0 < counts.accepted < counts.drafted and len(made) >= counts.rounds - 3 > 0
    # So are they if the step that checks them is launched before the host knows it too.
    launch, launched = Generation._launch, []
    graphs = repeat_steps(monkeypatch)
    monkeypatch.setattr(speculation, "EARLY", ("cpu",))
    monkeypatch.setattr(Generation, "_launch", lambda self, *args: (launched.append(1), launch(self, *args)))
    found, of_early = generated(ahead)
    assert torch.equal(found, wanted) and of_early.accepted == counts.accepted and len(launched) >= counts.rounds - 3
    assert sum(graph.replays for graph in graphs) >= counts.rounds - 1


@pytest.mark.sweep
def test_drafts_that_are_drawn_are_made_one_by_one(tmp_path):
    """A graph of the tokens of a round, and one of a further draft."""
    model = zoo.causal_lm(**SMALL)
    model.generation_config.pad_token_id = 0
    checkpoint(model, tmp_path, weights_of(model))
    gdnfuse.compile(model, inner="eager", strict=True, speculate=MTP(3, tmp_path))
    model.generate(zoo.prompt(1, 8)[0] % 7 + 1, max_new_tokens=9, do_sample=True, cache_implementation="static")
    assert [r.phase for r in gdnfuse.reports()].count("draft") == 2 and model.generate.acceptance.rounds


def test_behind_known_prefixes_a_head_has_what_the_last_call_of_a_prompt_computed(tmp_path):
    model = zoo.causal_lm(**SMALL)
    model.generation_config.pad_token_id = 0
    checkpoint(model, tmp_path, weights_of(model))
    plain, store = copy.deepcopy(model), gdnfuse.PrefixStore(model, 64)
    gdnfuse.compile(model, inner="eager", prefill=False, fuel=0, prefixes=store, speculate=MTP(2, tmp_path))
    for n, chunk in ((150, None), (200, None), (201, 110)):
        ids = torch.randint(1, 8, (1, n), generator=torch.Generator().manual_seed(0))
        asked = {**GREEDY, "prefill_chunk_size": chunk}
        assert torch.equal(model.generate(ids, **asked), plain.generate(ids, **asked)) and model.generate.acceptance.rounds
    assert store.stats().hits == 2 and not store.stats().left_out


def test_a_call_that_hands_nothing_on_is_said(tmp_path):
    """As one whose graph was traced before there was a hook."""
    model = zoo.causal_lm(**zoo.SMALL)
    of = MTP(2, checkpoint(model, tmp_path, weights_of(model)))
    of.check(model)
    chain = of.start(Run(model, None, 99, False))
    ids = zoo.prompt(1, 6)[0]
    with pytest.raises(gdnfuse.GdnfuseError, match="graphs were traced without them: call gdnfuse.compile"):
        chain.hear(ids)
    with torch.no_grad():
        model(ids)
    with pytest.raises(gdnfuse.GdnfuseError, match=r"its own generation, \[1, 5\] tokens, found those of \[1, 6\]"):
        chain.hear(ids[:, 1:])


def test_a_second_generation_of_a_model_is_refused_while_one_goes_on(tmp_path):
    """Its head hears whoever calls the model. The first goes on, and once it is done another may begin."""
    model = zoo.causal_lm(**SMALL)
    model.generation_config.pad_token_id = 0
    of = MTP(2, checkpoint(model, tmp_path, weights_of(model)))
    ids, refused = zoo.prompt(1, 8)[0] % 7 + 1, []

    class Streamer:
        def put(self, value):
            with pytest.raises(gdnfuse.GdnfuseError, match="one generation of a model at a time, found a second one"):
                model.generate(ids, **GREEDY, custom_generate=gdnfuse.speculative(of))
            refused.append(value)

        def end(self):
            pass

    wanted = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, custom_generate=gdnfuse.speculative(of, Streamer())), wanted) and refused
    assert torch.equal(model.generate(ids, **GREEDY, custom_generate=gdnfuse.speculative(of)), wanted)


def test_what_cannot_be_loaded_is_a_sentence(tmp_path):
    model = zoo.causal_lm(**zoo.SMALL)
    weights = weights_of(model)
    for n in (0, 5, True):
        with pytest.raises(gdnfuse.GdnfuseError, match="MTP drafts 1 to 4 tokens at a time"):
            MTP(n)
    with pytest.raises(
        gdnfuse.GdnfuseError, match=r"a checkpoint in safetensors, found none in .*: pass the folder as MTP\(n, folder\)"
    ):
        gdnfuse.compile(model, speculate=MTP(2))
    model.save_pretrained(tmp_path)
    with pytest.raises(gdnfuse.GdnfuseError, match=r"needs a checkpoint with weights named mtp.\*, found none in"):
        gdnfuse.compile(model, speculate=MTP(2, tmp_path))
    assert "generate" not in vars(model)
    wide = {**weights, "mtp.fc.weight": torch.zeros(3, 3)}
    for wrong, sentence in (
        (
            {k: v for k, v in weights.items() if "q_norm" not in k},
            "must be all of those .* found no mtp.layers.0.self_attn.q_norm",
        ),
        ({**weights, "mtp.other.weight": torch.zeros(1)}, "must be only those .* found mtp.other.weight"),
        (wide, r"mtp.fc.weight in .* must be \[64, 128\] in full or half precision, found \[3, 3\] of torch.float32"),
    ):
        with pytest.raises(gdnfuse.GdnfuseError, match=sentence):
            mtp.load(model, checkpoint(model, tmp_path, wrong))
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(gdnfuse.GdnfuseError, match="cannot be read"):
        mtp.load(model, tmp_path)
