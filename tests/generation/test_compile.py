"""gdnfuse.compile and the reports of configs without weights."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
import transformers
from transformers import CompileConfig, DynamicCache, Qwen3_5Config, Qwen3_5ForCausalLM, Qwen3_5TextConfig, StaticCache

import gdnfuse
from gdnfuse import models
from gdnfuse.generation import compile
from tests.models import zoo
from tests.sweeps import ALL, some

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_key_value_heads": 1, "head_dim": 32, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
EAGER = {"inner": "eager"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SIZES)).eval().requires_grad_(False)
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    gdnfuse.clear_reports()


PROMPT = torch.arange(12).reshape(2, 6)


def generate(model, **kwargs):
    return model.generate(PROMPT, max_new_tokens=8, do_sample=False, **kwargs)


def decode_reports():
    return [r for r in gdnfuse.reports() if r.phase == "decode"]


@pytest.mark.parametrize("cache", ["static", pytest.param("dynamic", marks=pytest.mark.sweep)])
def test_generate_reaches_the_backend_once_and_agrees(model, cache):
    expected = generate(model, cache_implementation=cache)
    assert gdnfuse.compile(model, **EAGER) is model
    assert torch.equal(generate(model, cache_implementation=cache), expected)
    assert all(r.fused_layers == 1 for r in decode_reports())
    if cache == "static":
        assert [r.phase for r in gdnfuse.reports()] == ["prefill", "decode"]  # all steps share a graph
    else:
        assert decode_reports()  # a growing cache may be compiled again with a symbolic length


def test_with_dynamic_sizes_one_prompt_graph_does_and_all_is_fused():
    """Lengths and the number of sequences may change; heads that a state has, and floats that a norm has, are the model's."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "linear_num_key_heads": 2}
    model = zoo.causal_lm(**zoo.SMALL, **heads, linear_num_value_heads=2)
    other = copy.deepcopy(model)
    gdnfuse.compile(model, dynamic=True, strict=True, **EAGER)
    for cache in (None, "static") if ALL else (None,):
        gdnfuse.clear_reports()
        for rows, length in ((3, 7), (5, 71)):
            prompt = torch.randint(2, 128, (rows, length))
            kwargs = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
            assert torch.equal(model.generate(prompt, **kwargs), other.generate(prompt, **kwargs))
        assert [r.phase for r in gdnfuse.reports()] == ["prefill", "decode"]
        assert all(r.fused_layers == len(r.layers) == 1 and not r.note for r in gdnfuse.reports())


@torch.no_grad()
@pytest.mark.filterwarnings("error:Raw Sym")  # torch's, of a graph whose sizes are neither numbers nor nodes
def test_floats_of_the_model_are_numbers_with_dynamic_sizes_too(model):
    """torch.compile with dynamic=True makes inputs of floats; in a step traced as it stands, without capture, too."""
    for dynamic in (True, None):
        torch.compiler.reset()
        run = torch.compile(model, backend="gdnfuse", dynamic=dynamic, options={"capture": False, **EAGER})
        cache, _ = zoo.prefill(model, 2, "static")
        other = copy.deepcopy(cache)
        torch.testing.assert_close(run(PROMPT[:, :1], **zoo.held(cache)).logits, model(PROMPT[:, :1], **zoo.held(other)).logits)
    assert [(r.fused_layers, len(r.layers), r.note) for r in gdnfuse.reports()] == [(1, 1, "")] * 2


@pytest.mark.sweep
def test_beams_reach_the_backend(model):
    expected = generate(model, cache_implementation="static", num_beams=3)
    gdnfuse.compile(model, **EAGER)
    assert torch.equal(generate(model, cache_implementation="static", num_beams=3), expected)
    assert decode_reports()


def test_direct_calls_reach_the_backend(model):
    gdnfuse.compile(model, fullgraph=True, **EAGER)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(PROMPT, **zoo.held(cache))
        for t in range(3):
            model(input_ids=PROMPT[:, t : t + 1], **zoo.held(cache))
    assert [r.phase for r in gdnfuse.reports()] == ["prefill", "decode"]
    for report in gdnfuse.reports():  # however many decorators the model's forward has
        assert [layer.path for layer in report.layers] == ["model.layers.0.linear_attn"]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_cache_is_found_by_what_it_is(model, kind):
    """Not by its keyword, of which there were three, nor by its place."""
    call = compile.by_phase(lambda *args, **kwargs: "decode", lambda *args, **kwargs: "first")
    filled, empty, token = zoo.prefill(model, 2, kind)[0], zoo.new_cache(model, kind), PROMPT[:, :1]
    for cache, phase in ((filled, "decode"), (empty, "first"), (None, "first")):
        assert call(token, None, None, cache) == phase
        for name in ("cache", "past_key_values", "cache_params"):
            assert call(token, **{name: cache}) == call(input_ids=token, use_cache=True, **{name: cache}) == phase
    assert call(PROMPT, cache=filled) == call(PROMPT, None, None, filled) == "first"
    phases = (lambda *args, phase=phase, **kwargs: phase for phase in ("decode", "first", "verify", "short"))
    decode, first, *few = phases
    call = compile.by_phase(decode, first, (), *few)
    assert call(PROMPT, cache=filled) == call(PROMPT.repeat(2, 1)[:, :2], cache=filled) == "short"
    for tokens in (PROMPT.repeat(3, 1), torch.cat([PROMPT, PROMPT], 1)):  # 36 rows, and 12 tokens
        assert call(tokens, cache=filled) == "first"
    # A cache of fixed length may be initialised before its first tokens.
    assert call(PROMPT, cache=empty) == "first" and call(PROMPT) == "first"


@torch.no_grad()
@pytest.mark.parametrize("kind", [pytest.param("static", marks=pytest.mark.sweep), "dynamic"])
def test_turns_of_a_few_tokens_are_short_steps(model, kind):
    """A graph for each number of tokens, however long the cache has become, and none more when a turn comes again."""
    plain = copy.deepcopy(model)
    gdnfuse.compile(model, strict=True, **EAGER)
    held = [zoo.new_cache(m, kind) for m in (model, plain)]
    for T in (6, 3, 1, 3, 5, 3):
        found, wanted = (m(PROMPT[:, :T], **zoo.held(cache)).logits for m, cache in zip((model, plain), held, strict=True))
        torch.testing.assert_close(found, wanted)
    phases = [r.phase for r in gdnfuse.reports() if r.layers]
    assert phases[:3] == ["prefill", "short", "decode"] and len(phases) == 4
    # Where masks break the graph, as with transformers 5.19, Dynamo takes the second number of tokens behind the break for any.
    assert phases[3] == ("short" if all(r.layers for r in gdnfuse.reports()) else "prefill")
    states = (zoo.flat_states(cache, "recurrent") for cache in held)
    torch.testing.assert_close(*states)


def test_a_cache_by_its_place_or_keyword_is_a_step_of_the_compiled_model(model):
    gdnfuse.compile(model, prefill=False, **EAGER)
    with torch.no_grad():
        for by_place in (True, False):
            gdnfuse.clear_reports()
            cache = StaticCache(config=model.config, max_cache_len=16)
            for ids in (PROMPT, PROMPT[:, :1]):
                model(ids, None, None, cache) if by_place else model(ids, **zoo.held(cache))
            assert [r.phase for r in gdnfuse.reports()] == ["decode"]


@torch.no_grad()
def test_no_warning_is_ours(model, monkeypatch, caplog):
    """Neither of a config that generate cannot use, nor, with what a cache is called since transformers 5.24, of its old names.

    FutureWarnings of these are errors in all tests; this is the log.
    """
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])
    transformers.utils.logging.warning_once.cache_clear()
    gdnfuse.compile(model, state_dtype=torch.bfloat16, **EAGER)
    for options in ({}, {"cache_implementation": "static"}) if ALL else ({"cache_implementation": "static"},):
        generate(model, **options)
    assert not [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    model(PROMPT, use_cache=True)
    models.verify(model, prompt=3)
    assert not [message for message in caplog.messages if "deprecated" in message]


@pytest.mark.parametrize(
    ("options", "compiled"),
    [
        ({}, True),
        ({"prefill": False}, False),
        ({"capture": False}, False),
        pytest.param({"capture": False, "prefill": True}, True, marks=pytest.mark.sweep),
    ],
)
def test_prefill_is_compiled_where_it_is_captured_or_on_request(model, options, compiled):
    gdnfuse.compile(model, **options, **EAGER)
    with torch.no_grad():
        model(PROMPT, **zoo.held(StaticCache(config=model.config, max_cache_len=16)))
    assert [r.phase for r in gdnfuse.reports()] == ["prefill"] * compiled


def test_a_prompt_is_compiled_without_cuda_graphs_in_every_mode():
    for mode, options in (("reduce-overhead", {}), ("max-autotune", {}), (None, {"inductor": {"triton.cudagraphs": True}})):
        settings = compile._no_cuda_graphs(mode, options)
        assert settings["mode"] is None and settings["options"]["inductor"]["triton.cudagraphs"] is False
    assert compile._no_cuda_graphs("max-autotune", {})["options"]["inductor"]["max_autotune"] is True
    assert compile._no_cuda_graphs(None, {}) == {"mode": None, "options": None}


def test_where_generate_compiles_prompts_itself_they_keep_their_own_compilation(model):
    """Its compilation is that of decode steps, with CUDA graphs."""
    graphs = []

    def generates(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    kwargs = {"cache_implementation": "static", "prefill_chunk_size": 4}
    wanted = generate(model, **kwargs)
    gdnfuse.compile(model, **EAGER)
    config = CompileConfig(backend=generates, mode=None, fullgraph=False)
    config._compile_all_devices = True
    assert torch.equal(generate(model, compile_config=config, **kwargs), wanted)
    assert {r.phase for r in gdnfuse.reports()} == {"prefill"}
    inputs = [n for gm in graphs for n in gm.graph.find_nodes(op="placeholder") if "input_ids" in n.name]
    assert inputs and all(n.meta["example_value"].shape[1] == 1 for n in inputs)


def marks(cache):
    names = ("keys", "values", "cumulative_length", "conv_states", "recurrent_states")
    states = [getattr(layer, n, None) for layer in cache.layers for n in names]
    flat = [t for s in states for t in (s.values() if isinstance(s, dict) else [s])]
    return [getattr(t, "_dynamo_static_input_type", None) for t in flat]


@pytest.mark.parametrize("chunk", [pytest.param(None, marks=pytest.mark.sweep), 4])
def test_a_cache_that_generate_made_has_the_marks_of_one_made_outside(model, chunk):
    kwargs = {"cache_implementation": "static", "return_dict_in_generate": True, "prefill_chunk_size": chunk}
    with torch.no_grad():
        wanted = StaticCache(config=model.config, max_cache_len=16)
        model(PROMPT, **zoo.held(wanted))
    gdnfuse.compile(model, **EAGER)
    found = generate(model, **kwargs)[zoo.CACHE]
    assert gdnfuse.reports() and "unguarded" in marks(wanted) and marks(found) == marks(wanted)


def test_a_cache_made_by_a_compiled_prompt_has_the_marks_of_one_made_outside(model):
    with torch.no_grad():
        wanted, found = (StaticCache(config=model.config, max_cache_len=16) for _ in range(2))
        model(PROMPT, **zoo.held(wanted))
        gdnfuse.compile(model, **EAGER)
        model(PROMPT, **zoo.held(found))
    assert gdnfuse.reports() and "unguarded" in marks(wanted) and marks(found) == marks(wanted)


def test_torch_compile_of_the_model_does_not_reach_generate(model):
    torch.compile(model, backend="gdnfuse", options=EAGER).generate(PROMPT, max_new_tokens=4)
    assert gdnfuse.reports() == []  # the trap that the README warns of; if this fails, the README is out of date


@pytest.mark.parametrize("spelling", ["model.compile", "model.forward", "compile_config"])
def test_other_spellings_reach_generate(model, spelling):
    kwargs = {"cache_implementation": "static"}
    if spelling == "model.compile":
        model.compile(backend="gdnfuse", options=EAGER)
    elif spelling == "model.forward":
        model.forward = torch.compile(model.forward, backend="gdnfuse", options=EAGER)
    else:
        kwargs["compile_config"] = CompileConfig(backend="gdnfuse", mode=None, options=EAGER)
        kwargs["compile_config"]._compile_all_devices = True
    generate(model, **kwargs)
    assert [r.fused_layers for r in decode_reports()] == [1]


@pytest.mark.parametrize(
    "bad, named",
    [
        ({"iner": "eager"}, "iner"),
        ({"inner": "tvm"}, "tvm"),
        ({"mode": "fastest"}, "fastest"),
        ({"mode": "max-autotune", "inner": "eager"}, "max-autotune"),
    ],
)
def test_bad_options_leave_the_model_alone(model, bad, named):
    before = copy.deepcopy(model.generation_config)
    with pytest.raises(gdnfuse.GdnfuseError, match=named):
        gdnfuse.compile(model, **bad)
    assert model._compiled_call_impl is None
    assert model.generation_config.to_dict() == before.to_dict()


@pytest.mark.parametrize(
    "given, mode, options",
    [
        ({}, "reduce-overhead", None),
        ({"mode": "max-autotune"}, "max-autotune", None),
        ({"strict": True}, None, {"strict": True, "inductor": {"triton.cudagraphs": True}}),
        ({"mode": "default", "strict": True}, None, {"strict": True}),
        (
            {"mode": "reduce-overhead", "inductor": {"triton.cudagraphs": False, "shape_padding": True}},
            None,
            {"inductor": {"triton.cudagraphs": False, "shape_padding": True}},
        ),
        ({"inner": "aot_eager"}, None, {"inner": "aot_eager"}),
    ],
)
def test_mode_and_options_are_never_both_set(model, given, mode, options, monkeypatch):
    made, own_graphs = [], []

    def compiled(call, **settings):
        of = own_graphs if getattr(getattr(call, "__code__", None), "co_name", "") == "uncaptured" else made
        of.append(settings)
        return call

    monkeypatch.setattr(torch, "compile", compiled)
    gdnfuse.compile(model, **given)
    assert all(s["backend"] == "gdnfuse" and (s["mode"] is None or s["options"] is None) for s in [*made, *own_graphs])
    assert (made[-1]["mode"], made[-1]["options"]) == (mode, options)  # of steps in generate
    # Steps of which gdnfuse makes the CUDA graphs itself have none of Inductor's, and are there if Inductor would make some.
    graphs = mode is not None or (options or {}).get("inductor", {}).get("triton.cudagraphs", False)
    assert [s["options"]["inductor"]["triton.cudagraphs"] for s in own_graphs] == [False] * graphs


class Plain(torch.nn.Module):
    def forward(self, x):
        return x.sin() + 1


def test_a_model_without_generate():
    plain = Plain()
    assert gdnfuse.compile(plain, prefill=True, **EAGER) is plain
    with torch.no_grad():
        plain(torch.ones(1, 2))
    assert [r.phase for r in gdnfuse.reports()] == ["other"]


def test_multimodal_config_gives_its_text_model():
    config = Qwen3_5Config(text_config=dict(SIZES))
    (report,) = models.trace(models.meta_model(config), target="cuda")
    assert report.fused_layers == 1


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"prompt": 0}, {"phase": "sideways"}, {"targt": "cuda"}])
def test_trace_refuses_bad_arguments(wrong):
    model = models.meta_model(Qwen3_5TextConfig(**SIZES))
    with pytest.raises(gdnfuse.GdnfuseError, match=next(iter(wrong))):
        models.trace(model, **wrong)


@pytest.mark.parametrize("batch, prompt, dtype", [(1, 1, torch.bfloat16), (5, 3, torch.float16), (2, 64, torch.float32)])
def test_trace_decode(batch, prompt, dtype):
    model = models.meta_model(Qwen3_5TextConfig(**SIZES), dtype)
    (report,) = models.trace(model, batch=batch, prompt=prompt, target="cpu")
    assert (report.phase, report.fused_layers) == ("decode", 1)


@pytest.mark.parametrize("name", some(models.presets(), "qwen3.5-4b", "qwen3.5-35b-a3b"))
def test_every_preset_is_fused_in_every_layer(name):
    """Layers come in equal turns: the last two of one, and the first layer of the next. test_examples has a preset whole."""
    config = models.load_config(name.removeprefix("qwen3.5-"))
    turn = ["linear_attention"] * 3 + ["full_attention"]
    assert config.layer_types == turn * (config.num_hidden_layers // 4)
    config.num_hidden_layers, config.layer_types = 3, config.layer_types[2:5]
    model = models.meta_model(config)
    (report,) = models.trace(model, target="cuda")
    linear = model.config.layer_types.count("linear_attention")
    assert (report.fused_layers, len(report.layers)) == (linear, linear)


def test_warmup_compiles_all_that_generate_needs():
    model = gdnfuse.compile(zoo.causal_lm(**zoo.SMALL), inner="eager")
    warm = gdnfuse.warmup(model, batch=2)
    assert warm.graphs == {"prefill": 1, "decode": 1} and warm.seconds > 0 and warm.kernels == {} == warm.unfused
    known = len(gdnfuse.reports())
    for length in (5, 64, 130):
        ids = zoo.prompt(2, length)[0]
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3)
    assert len(gdnfuse.reports()) == known


@pytest.mark.parametrize(
    "cache", ["dynamic", *(pytest.param(kind, marks=pytest.mark.sweep) for kind in ("static", "rollback", "store"))]
)
def test_after_a_warmup_of_short_turns_none_is_compiled(cache):
    """Of three tokens, behind a prompt of another length; those of two were not asked for."""
    model, options = zoo.causal_lm(**zoo.SMALL), {}
    if cache == "rollback":
        options["speculate"] = gdnfuse.PromptLookup(2)
    if cache == "store":
        options["prefixes"] = gdnfuse.PrefixStore(model)
    gdnfuse.compile(model, **EAGER, **options)
    static = {"cache_implementation": "static"} if cache == "static" else {}
    warm = gdnfuse.warmup(model, short=[3], **static)
    if all(r.layers for r in gdnfuse.reports() if r.phase != "draft"):  # else masks break the graph, as with transformers 5.19
        assert warm.graphs["short"] == 1 + bool(static)
    assert warm.short == (3,)

    ids, turn = zoo.prompt(1, 100)[0], {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    kinds = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=99),
        "rollback": lambda: gdnfuse.RollbackCache(model, tokens=3),
        "store": lambda: None,
    }
    for T in (3, 2):
        made = kinds[cache]()
        held = {} if made is None else zoo.held(made)
        n = 64 if made is None else 40
        out = model.generate(ids[:, : n + (made is None)], **turn, **held)
        known = len(gdnfuse.reports())
        new = ids[:, : n + T] if made is None else torch.cat([out, ids[:, : T - 1]], 1)
        model.generate(new, **turn, **held)
        new = gdnfuse.reports()[known:]
        assert not new if T == 3 else any(r.phase == "short" for r in new) or not all(r.layers for r in gdnfuse.reports())


def test_short_turns_that_cannot_be_warmed_up_are_a_sentence(model):
    gdnfuse.compile(model, **EAGER)
    for how, sentence in (
        ({"short": [1]}, "from 2 to 8, found [1]."),
        ({"short": 3}, "from 2 to 8, found 3."),
        ({"short": range(2, 9), "batch": 8}, "short must have numbers of tokens of 8 rows from 2 to 4, found range(2, 9)."),
        ({"short": [3], "num_beams": 2}, "short turns need one sequence per row, found num_beams=2"),
        ({"short": [3], "cache_implementation": "offloaded"}, "found cache_implementation='offloaded': "),
    ):
        with pytest.raises(gdnfuse.GdnfuseError, match=re.escape(sentence)):
            gdnfuse.warmup(model, **how)
    gdnfuse.compile(model, prefill=False, **EAGER)
    with pytest.raises(
        gdnfuse.GdnfuseError, match="prompts that are compiled and captured, found prefill=False or capture=False"
    ):
        gdnfuse.warmup(model, short=[3])


def test_warmup_needs_a_compiled_model_that_generates(model):
    with pytest.raises(gdnfuse.GdnfuseError, match="a model with generate, found Linear"):
        gdnfuse.warmup(torch.nn.Linear(2, 2))
    with pytest.raises(gdnfuse.GdnfuseError, match="a compiled model, found Qwen3_5ForCausalLM uncompiled: call gdnfuse.compile"):
        gdnfuse.warmup(model)
