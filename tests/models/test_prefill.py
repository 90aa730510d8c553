"""Prompts: two graphs for all lengths, every GDN layer one conv, one rule and one norm, and the results are eager's."""

import copy
import random

import pytest
import torch

import gdnfuse
from gdnfuse.passes.lift import prompt_attention
from tests.models import zoo
from tests.sweeps import ALL, some

LENGTHS = [5, 63, 64, 65, 70, 130, 515, 1030, 4096] if ALL else [5, 63, 64, 65, 130, 1030]
# Views, the cache's own tensors, numbers; before the conv also the mask of padded prompts and the padding of very short ones.
VIEWS = {"narrow", "transpose", "reshape", "getitem", "split", "squeeze", "unsqueeze", "zeros", "zeros_like", "copy_", "neg"}
BEFORE = {"linear", "mul", "pad", "sub"}


def compiled(model, fullgraph=True, **options):
    return torch.compile(model, backend="gdnfuse", fullgraph=fullgraph, options={"inner": "eager", "strict": True, **options})


def reports(phase):
    return [r for r in gdnfuse.reports() if r.phase == phase]


def continued(layer):
    return any(r.rule == "conv_context" and r.status == "fired" for r in layer.records)


def assert_fused(layers=zoo.GDN_LAYERS):
    for report in gdnfuse.reports():
        assert len(report.layers) == layers and report.note == ""
        for layer in report.layers:
            assert layer.fused, layer.why_not
            stages = [r.rule for r in layer.records if r.stage == "capture"]
            if report.phase == "decode":
                assert stages == ["causal_conv_update", "delta_rule"]
                assert zoo.ops_without_views(layer) in (zoo.ONE_ROW, zoo.MANY_ROWS)
            else:
                assert stages == ["causal_conv", "chunk_delta_rule"]
                made = [op for op in layer.ops_after if op not in VIEWS]
                conv = made.index("causal_conv")
                assert set(made[:conv]) <= BEFORE
                # In a continuation the cat is of the conv's window and its last columns, not of the prompt.
                rest = [op for op in made[conv:] if op != "cat" or not continued(layer)]
                assert rest == ["causal_conv", "fused_gating_chunk_delta_rule", "gated_rms_norm", "linear"]


@torch.no_grad()
def forward(call, cache, ids, mask=None):
    return call(input_ids=ids, attention_mask=mask, **zoo.held(cache)).logits.clone()


def assert_close(a, b, tolerance=1e-5):
    (found, cache), (wanted, other) = a, b
    assert zoo.relative(found, wanted) < tolerance
    for kind in ("recurrent", "conv"):
        assert zoo.relative(zoo.flat_states(cache, kind), zoo.flat_states(other, kind)) < tolerance


@pytest.mark.parametrize("kind", ["static", pytest.param("dynamic", marks=pytest.mark.sweep)])
def test_two_graphs_for_every_length_and_decode_goes_on_from_each(kind):
    model = zoo.causal_lm(**zoo.SMALL)
    ours = copy.deepcopy(model)
    run = compiled(ours)
    lengths = list(LENGTHS)
    random.Random(kind).shuffle(lengths)
    for length in lengths:
        ids, _ = zoo.prompt(1, length, seed=length)
        a, e = zoo.new_cache(model, kind, 4100), zoo.new_cache(model, kind, 4100)
        assert_close((forward(run, a, ids), a), (forward(model, e, ids), e))
        tokens = zoo.tokens_for(1, 3)
        assert_close((zoo.decode(run, a, None, tokens), a), (zoo.decode(model, e, None, tokens), e))
    # The first length as it is, then one for any length.
    assert len(reports("prefill")) <= 2
    assert len(reports("decode")) <= 2 and len(gdnfuse.reports()) <= 4
    assert_fused(layers=1)


HALVES = [("static", torch.bfloat16), ("dynamic", torch.float16)]


@pytest.mark.parametrize(("kind", "dtype"), HALVES if ALL else HALVES[:1])
def test_no_less_accurate_than_eager(kind, dtype):
    model = zoo.causal_lm().to(dtype)
    wide, oracle = zoo.in_float64(model)
    ours = copy.deepcopy(model)
    logits, caches = {}, {}
    # Many sequences in one figure: the error of a single one of a toy is a draw.
    for name, owner, call in (("ours", ours, compiled(ours)), ("eager", model, model), ("oracle", wide, oracle)):
        logits[name], caches[name] = [], []
        for seed, length in enumerate((5, 63, 64, 65, 70, 130, 200, 130, 70, 65)):
            cache = zoo.new_cache(owner, kind, 256)
            ids, _ = zoo.prompt(3, length, seed=seed)
            logits[name].append(forward(call, cache, ids).flatten().double())
            caches[name].append(cache)
    assert len(reports("prefill")) == len(gdnfuse.reports()) == 2
    assert_fused()
    a, e, o = (torch.cat(logits[n]) for n in ("ours", "eager", "oracle"))
    assert zoo.relative(a, o) <= 1.1 * zoo.relative(e, o)
    for state in ("recurrent", "conv"):
        a, e, o = (torch.cat([zoo.flat_states(c, state) for c in caches[n]]) for n in ("ours", "eager", "oracle"))
        assert zoo.relative(a, o) <= 1.1 * zoo.relative(e, o)
    for x, y in zip(zoo.states(caches["ours"][0])["recurrent"], zoo.states(caches["eager"][0])["recurrent"], strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape


@pytest.mark.parametrize("family", some(["causal_lm", "conditional_generation", "moe"], "moe"))
def test_families_left_padding_and_eight_sequences(family):
    model = zoo.FAMILIES[family](**zoo.SMALL)
    ours = copy.deepcopy(model)
    run = compiled(ours)
    for batch, length in ((2, 70), (8, 41)) if ALL else ((8, 41),):
        ids, mask = zoo.prompt(batch, length, padded=True)
        a, e = zoo.new_cache(model, "static", 96), zoo.new_cache(model, "static", 96)
        found, wanted = forward(run, a, ids, mask), forward(model, e, ids, mask)
        assert_close((found[mask.bool()], a), (wanted[mask.bool()], e))
        tokens = zoo.tokens_for(batch, 3)
        assert_close((zoo.decode(run, a, mask, tokens), a), (zoo.decode(model, e, mask, tokens), e))
    assert_fused(layers=1)


# Of a static cache a prompt in chunks is below.
@pytest.mark.parametrize("kind", some(["static", "dynamic"], "dynamic"))
def test_a_filled_cache_is_continued(kind):
    model = zoo.causal_lm(**zoo.SMALL)
    ours = copy.deepcopy(model)
    breaks = kind == "static" and zoo.FILLED_STATIC_CACHE_BREAKS
    run = compiled(ours, fullgraph=not breaks)
    a, e = zoo.new_cache(model, kind, 256), zoo.new_cache(model, kind, 256)
    for seed, length in enumerate((70, 3, 64, 2, 20)):
        ids, _ = zoo.prompt(2, length, seed=seed)
        assert_close((forward(run, a, ids), a), (forward(model, e, ids), e))
    tokens = zoo.tokens_for(2, 2)
    assert_close((zoo.decode(run, a, None, tokens), a), (zoo.decode(model, e, None, tokens), e))
    if breaks:
        assert len(reports("prefill")) > 1 and all(layer.fused for r in gdnfuse.reports() for layer in r.layers)
        return
    assert_fused(layers=1)
    first, *others = reports("prefill")
    assert not any(continued(layer) for layer in first.layers)
    assert others and all(continued(layer) for r in others for layer in r.layers)
    if kind == "dynamic":
        told = [[r.status for r in report.all_records if r.rule == "causal_attention" and r.stage == "lift"] for report in others]
        assert told == [["fired"] * (len(model.config.layer_types) - 1)] * len(others)


PADDED = [0, 5, 30]  # columns of padding of three sequences
CACHES = [("static", False), ("static", True), ("dynamic", True)]


@pytest.mark.parametrize(
    ("kind", "padded", "dtype"),
    [(*c, d) for c in CACHES for d in (torch.float32, torch.bfloat16)]
    if ALL
    else [(*c, torch.float32 if i == 2 else torch.bfloat16) for i, c in enumerate(CACHES)],
    ids=str,
)
def test_prompts_of_padded_batches_and_on_static_caches_make_no_mask(kind, padded, dtype, monkeypatch):
    """The static cache held another prompt before. Padding may differ: nobody sees it."""
    monkeypatch.setattr(prompt_attention, "KERNEL", True)
    model = zoo.causal_lm(**zoo.SMALL).to(dtype)
    wide, oracle = zoo.in_float64(model)
    ours = copy.deepcopy(model)
    found = {}
    for name, owner, call in (("ours", ours, compiled(ours)), ("eager", model, model), ("oracle", wide, oracle)):
        cache, found[name] = zoo.new_cache(owner, kind, 160), []
        for length in (70, 131):
            cache = zoo.new_cache(owner, kind, 160) if kind == "dynamic" else cache
            ids, _ = zoo.prompt(3, length, seed=length)
            mask = (torch.arange(length) >= torch.tensor(PADDED)[:, None]).long() if padded else torch.ones_like(ids)
            logits = forward(call, cache, ids, mask if padded else None)
            assert logits.isfinite().all()
            found[name].append(logits[mask.bool()].flatten().double())
            cache.reset()
        found[name] = torch.cat(found[name])
    floor = 2e-6 if dtype == torch.float32 else 0.0
    assert zoo.relative(found["ours"], found["oracle"]) <= 1.1 * zoo.relative(found["eager"], found["oracle"]) + floor
    for report in reports("prefill"):
        lowered = [(r.rule, r.chosen) for r in report.all_records if r.stage == "lower" and "attention" in r.rule]
        first = kind == "static" and not padded and report is reports("prefill")[0]
        assert first or lowered == [("prompt_attention", "reference inlined")]


def test_no_cache_at_all():
    model = zoo.causal_lm(**zoo.SMALL)
    run = compiled(copy.deepcopy(model))
    ids, _ = zoo.prompt(2, 70)
    with torch.no_grad():
        assert zoo.relative(run(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits) < 1e-5
    assert_fused(layers=1)


def test_a_prompt_of_one_token_and_of_fewer_than_the_conv_is_wide():
    model = zoo.causal_lm(**zoo.SMALL)
    ours = copy.deepcopy(model)
    run = compiled(ours)
    for length in (1, 2, 3):
        ids, _ = zoo.prompt(2, length)
        a, e = zoo.new_cache(model, "static"), zoo.new_cache(model, "static")
        assert_close((forward(run, a, ids), a), (forward(model, e, ids), e))
        tokens = zoo.tokens_for(2, 2)
        assert_close((zoo.decode(run, a, None, tokens), a), (zoo.decode(model, e, None, tokens), e))
    assert_fused(layers=1)


def test_grouped_heads_reach_the_rule_unrepeated():
    model = zoo.causal_lm(**zoo.HEADS_OF_27B, linear_key_head_dim=24, linear_value_head_dim=40)
    ours = copy.deepcopy(model)
    ids, _ = zoo.prompt(2, 70)
    a, e = zoo.new_cache(model, "static", 80), zoo.new_cache(model, "static", 80)
    assert_close((forward(compiled(ours), a, ids), a), (forward(model, e, ids), e))
    assert_fused()


def test_without_capture_the_report_says_what_is_missing():
    model = zoo.causal_lm(**zoo.SMALL)
    ids, _ = zoo.prompt(1, 5)
    run = compiled(model, capture=False)
    cache, other = zoo.new_cache(model, "static"), zoo.new_cache(model, "static")
    assert_close((forward(run, cache, ids), cache), (forward(model, other, ids), other))
    (report,) = gdnfuse.reports()
    for layer in report.layers:
        assert not layer.fused and "no causal conv" in layer.why_not
        assert not any(r.stage == "capture" for r in layer.records)


def test_aot_eager_with_a_symbolic_length():
    model = zoo.causal_lm(**zoo.SMALL)
    ours = copy.deepcopy(model)
    run = compiled(ours, inner="aot_eager")
    for length in (70, 5, 64):
        ids, _ = zoo.prompt(2, length)
        a, e = zoo.new_cache(model, "static", 80), zoo.new_cache(model, "static", 80)
        assert_close((forward(run, a, ids), a), (forward(model, e, ids), e))
    assert len(gdnfuse.reports()) == 2
    assert_fused(layers=1)
    for layer in gdnfuse.reports()[1].layers:
        chosen = {r.rule: r.chosen for r in layer.records if r.stage == "lower"}
        assert chosen["causal_conv"] == "reference inlined"
        assert chosen["fused_gating_chunk_delta_rule"] == "reference called"


STRATEGIES = {
    "static": {"cache_implementation": "static"},
    "chunked": {"cache_implementation": "static", "prefill_chunk_size": 16},
    "chunked, dynamic": {"cache_implementation": "dynamic", "prefill_chunk_size": 16},
    "beams": {"cache_implementation": "static", "num_beams": 3},
    "beams, dynamic": {"num_beams": 3},
}


CASES = [("beams", False), ("chunked", True)]  # beams of a cache that grows are in test_generate


@pytest.mark.parametrize(("strategy", "fullgraph"), [*((s, False) for s in STRATEGIES), ("chunked", True)] if ALL else CASES)
def test_generate(strategy, fullgraph):
    model = zoo.causal_lm(**zoo.SMALL)
    ours = gdnfuse.compile(copy.deepcopy(model), inner="eager", fullgraph=fullgraph, strict=True)
    ids, mask = zoo.prompt(2, 37, padded=True)
    kwargs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **STRATEGIES[strategy]}
    assert torch.equal(ours.generate(ids, **kwargs), model.generate(ids, **kwargs))
    assert reports("prefill") and reports("decode")
    assert all(r.fused_layers == 1 for r in reports("prefill") + reports("decode"))
