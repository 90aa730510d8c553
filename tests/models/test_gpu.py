"""The main job on a GPU: Triton kernels under Inductor, with and without CUDA graphs."""

import copy

import pytest
import torch

import gdnfuse
from gdnfuse import kernels, models
from gdnfuse.passes.lift import prompt_attention
from tests.models import zoo

pytestmark = pytest.mark.gpu
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128}


def run(model, call, batch, padded, tokens, length=64, **drawn):
    cache = zoo.new_cache(model, "static", length)
    ids, mask = zoo.prompt(batch, padded=padded, **drawn)
    ids, mask = ids.cuda(), None if mask is None else mask.cuda()
    model(input_ids=ids, attention_mask=mask, **zoo.held(cache))

    def step(**kwargs):
        torch.compiler.cudagraph_mark_step_begin()
        return call(**kwargs)

    return zoo.decode(step, cache, mask, tokens), zoo.states(cache)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize(("batch", "padded"), [(1, False), (2, True), (5, False), (33, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_no_less_accurate_than_eager(dtype, batch, padded, mode):
    model = zoo.causal_lm(hidden_size=256, **HEADS).to(dtype).cuda()
    ours = copy.deepcopy(model)
    wide, oracle = zoo.in_float64(model)
    tokens = zoo.tokens_for(batch, 24).cuda()
    compiled = torch.compile(ours, backend="gdnfuse", mode=mode, fullgraph=True)
    found, found_states = run(ours, compiled, batch, padded, tokens)
    eager, eager_states = run(model, model, batch, padded, tokens)
    with zoo.Float64():
        wanted, wanted_states = run(wide, oracle, batch, padded, tokens)
    (report,) = gdnfuse.reports()
    assert report.fused_layers == zoo.GDN_LAYERS
    lowered = {r.rule: r.chosen for layer in report.layers for r in layer.records if r.stage == "lower"}
    wanted_ops = {1: {"in_proj_conv", "packed_decode"}, 33: {"mixer_decode"}}.get(batch, {"linear", "mixer_decode"})
    assert {op for op, chosen in lowered.items() if chosen == "triton"} == wanted_ops
    floor = 2e-6 if dtype == torch.float32 else 0.0
    assert zoo.relative(found, wanted) <= 1.1 * zoo.relative(eager, wanted) + floor
    for kind in ("recurrent", "conv"):
        ours_all, eager_all, wanted_all = (
            torch.cat([s.flatten().double() for s in states[kind]]) for states in (found_states, eager_states, wanted_states)
        )
        assert zoo.relative(ours_all, wanted_all) <= 1.1 * zoo.relative(eager_all, wanted_all) + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "padded"), [("static", False), ("static", True), ("dynamic", True)])
@torch.no_grad()
def test_prompts_of_padded_batches_and_on_static_caches(kind, padded, dtype, monkeypatch):
    """Of several lengths, with heads as wide as a 4B model's; the static cache held another prompt before."""
    monkeypatch.setattr(prompt_attention, "KERNEL", True)
    model = zoo.causal_lm(**zoo.SMALL, hidden_size=256, head_dim=256).to(dtype).cuda()
    ours = copy.deepcopy(model)
    wide, oracle = zoo.in_float64(model)
    compiled = torch.compile(ours, backend="gdnfuse", fullgraph=True)
    found = {}
    for name, owner, call in (("ours", ours, compiled), ("eager", model, model), ("wanted", wide, oracle)):
        cache, found[name] = zoo.new_cache(owner, kind, 1100), []
        for length in (70, 333, 1000, 129):
            cache = zoo.new_cache(owner, kind, 1100) if kind == "dynamic" else cache
            ids = zoo.prompt(3, length, seed=length)[0].cuda()
            mask = (torch.arange(length) >= torch.tensor([0, 5, length - 9])[:, None]).long().cuda()
            mask = mask if padded else torch.ones_like(mask)
            logits = call(input_ids=ids, attention_mask=mask if padded else None, **zoo.held(cache)).logits
            assert logits.isfinite().all()
            found[name].append(logits[mask.bool()].flatten().double())
            cache.reset()
        found[name] = torch.cat(found[name])
    floor = 2e-6 if dtype == torch.float32 else 0.0
    ours_error, eager_error = (zoo.relative(found[name], found["wanted"]) for name in ("ours", "eager"))
    assert ours_error <= 1.1 * eager_error + floor
    lowered = [(r.rule, r.chosen) for r in gdnfuse.reports()[-1].all_records if r.stage == "lower"]
    assert ("prompt_attention", "triton") in lowered, lowered


@pytest.mark.parametrize("batch", [1, 5, 33])
@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        ("nf4_block64", torch.bfloat16),
        ("nf4_block64", torch.float16),
        ("fp4_block128", torch.bfloat16),
        ("nf4_block64", torch.float32),
    ],
)
@torch.no_grad()
def test_steps_of_four_bits_are_no_less_accurate_than_of_dequantised_weights(format, dtype, batch):
    """What is dequantised here, for eager, is what kernels read; of more rows than they take it is dequantised at each step.

    Roundings of activations grow in such a model, so that eager's error of one prompt is two or three times that of another, or
    of its own on a CPU. Errors are taken over several prompts.
    """
    model = models.quantized(zoo.causal_lm(hidden_size=256, intermediate_size=128, **HEADS).to(dtype), format).cuda()
    plain = zoo.dequantized(model)
    wide, oracle = zoo.in_float64(zoo.dequantized(model, torch.float64))
    compiled = torch.compile(model, backend="gdnfuse", fullgraph=True)

    def steps(model, call):
        seeds = range(8 if batch < 33 else 2)
        return torch.cat([run(model, call, batch, False, zoo.tokens_for(batch, 24, seed=s).cuda(), seed=s)[0] for s in seeds])

    found, eager = steps(plain, compiled), steps(plain, plain)
    with zoo.Float64():
        wanted = steps(wide, oracle)
    (report,) = gdnfuse.reports()
    assert report.fused_layers == zoo.GDN_LAYERS
    stored = {p.format for p in report.projections if p.name in ("in_proj_qkv", "up_proj", "down_proj")}
    assert stored == {format}
    lowered = {(r.rule, r.chosen) for r in report.all_records if r.stage == "lower"}
    assert (("dequantize", "reference inlined") in lowered) == (batch == 33)
    assert batch > 1 or {("in_proj_conv", "triton"), ("fused_linear", "triton")} <= lowered
    floor = 2e-6 if dtype == torch.float32 else 0.0
    assert zoo.relative(found, wanted) <= 1.1 * zoo.relative(eager, wanted) + floor


def generated(model, ids, tokens):
    """Logits of a prompt and of the steps behind it under gdnfuse.compile, and the states they leave."""
    cache = zoo.new_cache(model, "static", 96)
    prompt = model(input_ids=ids, **zoo.held(cache)).logits.clone()

    def step(**kwargs):
        torch.compiler.cudagraph_mark_step_begin()
        return model(**kwargs)

    steps = zoo.decode(step, cache, None, tokens)
    return [prompt, steps, *(s.clone() for kind in ("recurrent", "conv") for s in zoo.states(cache)[kind])]


@pytest.mark.parametrize("batch", [1, 2, 5, 33])
@torch.no_grad()
def test_runs_are_bit_identical(batch):
    """The same call twice; and for a sequence, other ones beside it."""
    model = zoo.causal_lm(hidden_size=256, **HEADS).bfloat16().cuda()
    gdnfuse.compile(model, mode="reduce-overhead")
    ids, tokens = zoo.prompt(batch, 70)[0].cuda(), zoo.tokens_for(batch, 16).cuda()
    first, again = generated(model, ids, tokens), generated(model, ids, tokens)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if batch > 1:
        other_ids, other_tokens = zoo.prompt(batch, 70, seed=3)[0].cuda(), zoo.tokens_for(batch, 16, seed=4).cuda()
        other_ids[1], other_tokens[1] = ids[1], tokens[1]
        beside = generated(model, other_ids, other_tokens)
        assert all(torch.equal(a[1], b[1]) and not torch.equal(a[0], b[0]) for a, b in zip(first, beside, strict=True))
    assert all(report.fused_layers == zoo.GDN_LAYERS for report in gdnfuse.reports())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_prefill_is_no_less_accurate_than_eager(dtype, batch):
    """Prompts of many lengths through two graphs; logits and states of all of them are one figure each."""
    model = zoo.causal_lm(hidden_size=256, **HEADS).to(dtype).cuda()
    ours = copy.deepcopy(model)
    wide, oracle = zoo.in_float64(model)
    compiled = torch.compile(ours, backend="gdnfuse", fullgraph=True)
    logits, states = {}, {}
    for name, owner, call in (("ours", ours, compiled), ("eager", model, model), ("oracle", wide, oracle)):
        logits[name], states[name] = [], {"recurrent": [], "conv": []}
        for length in (70, 5, 515, 64, 130, 63, 300, 1030):
            cache = zoo.new_cache(owner, "dynamic")
            ids, _ = zoo.prompt(batch, length, seed=length)
            logits[name].append(call(input_ids=ids.cuda(), **zoo.held(cache)).logits.flatten().double())
            for kind in states[name]:
                states[name][kind].append(zoo.flat_states(cache, kind))
    assert [report.phase for report in gdnfuse.reports()] == ["prefill", "prefill"]
    chosen = {r.chosen for r in gdnfuse.reports()[-1].layers[0].records if "chunk_delta_rule" in r.rule and r.stage == "lower"}
    assert chosen == {"triton"}
    floor = 2e-6 if dtype == torch.float32 else 0.0
    for kind, found in (("logits", logits), *((k, {n: states[n][k] for n in states}) for k in ("recurrent", "conv"))):
        ours_all, eager_all, wanted = (torch.cat(found[name]) for name in ("ours", "eager", "oracle"))
        error, eager_error = zoo.relative(ours_all, wanted), zoo.relative(eager_all, wanted)
        assert error <= 1.1 * eager_error + floor, f"{kind}: {error:.2e} against eager's {eager_error:.2e}"


@torch.no_grad()
def test_no_kernel_is_compiled_after_the_warmup():
    """Prompts of any length, and the decode steps behind them, find every machine code there."""
    # As in published models, gates have a multiple of 8 heads: rows of any number of tokens then start at 16 bytes.
    heads = HEADS | {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
    model = gdnfuse.compile(zoo.causal_lm(hidden_size=256, **heads).bfloat16().cuda(), mode="default")
    before = kernels.loaded()  # by other tests of this process
    warm = gdnfuse.warmup(model, batch=2)
    added = {name: count - before.get(name, 0) for name, count in warm.kernels.items()}
    # A process that has compiled nothing yet needs the 12 that a step of two sequences is lowered to, and 4 for prompts.
    assert warm.kernels["chunk_prepare_kernel"] >= 1 and sum(added.values()) <= 16, added
    for length in (5, 16, 63, 64, 65, 128, 515):
        ids = zoo.prompt(2, length)[0].cuda()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3)
    assert kernels.loaded() == warm.kernels


if not torch.cuda.is_available():  # here, behind all parameters, so that these are evaluated without a GPU too
    pytest.skip("needs a CUDA device", allow_module_level=True)
