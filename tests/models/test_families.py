"""Every family of models with a gated delta rule: what each of its layers becomes, and the results are eager's."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import transformers

import gdnfuse
from tests.models import zoo
from tests.models.test_prefill import VIEWS
from tests.sweeps import some

# What a layer becomes; "more" is in some. A step of one sequence has its out_proj in the residual, which is the decoder layer's.
PROMPT = {"linear": 2, "causal_conv": 1, "fused_gating_chunk_delta_rule": 1, "gated_rms_norm": 1}
STEP = {"linear": 2, "mixer_decode": 1}
STEP_OF_ONE = {"in_proj_conv": 1, "packed_decode": 1}


@dataclass(frozen=True)
class Family:
    """A model, how a small one is built, and what its layers have beside the counts above.

    more_in_prompt: the conv of a prompt reads channels side by side, as qwen3_next's are not: one cat puts q, k, v together.
    more_in_step_of_one: qwen4_exp has no residual behind out_proj.
    by_layer: qwen4_exp's attention layers ask how many blocks of tokens there are, which ends a graph; what is compiled is each
        decoder layer with a gated delta rule.
    """

    model: str
    build: Callable[..., torch.nn.Module]
    more_in_prompt: tuple[str, ...] = ()
    more_in_step_of_one: tuple[str, ...] = ()
    by_layer: bool = False


FAMILIES = {
    "qwen3_5": Family("Qwen3_5ForCausalLM", partial(zoo.causal_lm, **zoo.SMALL)),
    "qwen3_5, 27B's heads": Family("Qwen3_5ForCausalLM", partial(zoo.causal_lm, **zoo.SMALL, **zoo.HEADS_OF_27B)),
    "qwen3_5_moe": Family("Qwen3_5MoeForCausalLM", partial(zoo.moe, **zoo.SMALL)),
    "qwen3_next": Family("Qwen3NextForCausalLM", partial(zoo.qwen3_next, **zoo.SMALL), more_in_prompt=("cat",)),
    "olmo_hybrid": Family("OlmoHybridForCausalLM", partial(zoo.olmo_hybrid, **zoo.SMALL)),
    "lara_mini": Family("LaraMiniForCausalLM", zoo.lara_mini),
    "qwen4_exp": Family("Qwen4ExpForCausalLM", zoo.qwen4_exp, more_in_step_of_one=("fused_linear",), by_layer=True),
    "qwen4_exp, sigmoid": Family(
        "Qwen4ExpForCausalLM",
        partial(zoo.qwen4_exp, output_gate_type="sigmoid"),
        more_in_step_of_one=("fused_linear",),
        by_layer=True,
    ),
}


# The first is in most other tests.
NAMES = [pytest.param(name, marks=pytest.mark.sweep) if name == "qwen3_5" else name for name in FAMILIES]


def family_of(name):
    family = FAMILIES[name]
    if not hasattr(transformers, family.model):
        pytest.skip(f"transformers {transformers.__version__} has no {family.model}.")
    return family


def compiled(family, model):
    options = {"backend": "gdnfuse", "fullgraph": True, "options": {"inner": "eager", "strict": True}}
    if not family.by_layer:
        return torch.compile(model, **options)
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            layer.compile(**options)
    return model


@torch.no_grad()
def run(call, model, batch, steps, length=70, seed=0, padded=False):
    """A prompt, and tokens one by one: all logits, and the cache."""
    cache = zoo.new_cache(model, "static", length + steps)
    ids, mask = zoo.prompt(batch, length, padded=padded, seed=seed)
    prompt = call(input_ids=ids, attention_mask=mask, **zoo.held(cache)).logits
    prompt = prompt if mask is None else prompt[mask.bool()]
    tokens = zoo.decode(call, cache, mask, zoo.tokens_for(batch, steps, seed))
    return torch.cat([x.flatten().double() for x in (prompt, tokens)]), cache


def assert_close(ours, eager):
    (found, cache), (wanted, other) = ours, eager
    assert zoo.relative(found, wanted) < 1e-5
    for kind in ("recurrent", "conv"):
        assert zoo.relative(zoo.flat_states(cache, kind), zoo.flat_states(other, kind)) < 1e-5


def assert_layers(phase, expected):
    layers = [layer for report in gdnfuse.reports() if report.phase == phase for layer in report.layers]
    assert layers
    for layer in layers:
        assert layer.fused, layer.why_not
        assert Counter(op for op in layer.ops_after if op not in VIEWS) == Counter(expected)


@pytest.mark.parametrize("name", some(NAMES, *(n for n in NAMES if n != "qwen3_5, 27B's heads")))
def test_a_prompt_and_its_steps(name):
    family = family_of(name)
    model = family.build()
    ours = copy.deepcopy(model)
    assert_close(run(compiled(family, ours), ours, 2, 3), run(model, model, 2, 3))
    assert_layers("prefill", Counter(PROMPT) + Counter(family.more_in_prompt))
    assert_layers("decode", STEP)


# Those of the first with experts are in test_experts.
@pytest.mark.parametrize("name", some(FAMILIES, *(n for n in FAMILIES if not n.startswith(("qwen3_5", "lara")))))
def test_steps_of_one_sequence(name):
    family = family_of(name)
    model = family.build()
    ours = copy.deepcopy(model)
    cache, mask = zoo.prefill(model, 1, "static")
    other, _ = zoo.prefill(model, 1, "static")
    call = compiled(family, ours)
    tokens = zoo.tokens_for(1, 3)
    assert_close((zoo.decode(call, cache, mask, tokens), cache), (zoo.decode(model, other, mask, tokens), other))
    assert_layers("decode", Counter(STEP_OF_ONE) + Counter(family.more_in_step_of_one))


@pytest.mark.parametrize("name", some(["qwen3_next", "olmo_hybrid"], "olmo_hybrid"))
def test_no_less_accurate_than_eager_in_bfloat16(name):
    """The families of FAMILIES in zoo are in test_decode and test_prefill."""
    family = family_of(name)
    model = family.build().bfloat16()
    ours = copy.deepcopy(model)
    wide, oracle = zoo.in_float64(model)
    results, caches = {}, {}
    for side, owner, call in (("ours", ours, compiled(family, ours)), ("eager", model, model), ("oracle", wide, oracle)):
        # Many sequences in one figure: the error of a single one of a toy is a draw.
        pairs = [run(call, owner, 3, 6, seed=seed, padded=True) for seed in range(8)]
        results[side] = torch.cat([logits for logits, _ in pairs])
        caches[side] = [cache for _, cache in pairs]
    assert all(layer.fused for report in gdnfuse.reports() for layer in report.layers)
    assert zoo.relative(results["ours"], results["oracle"]) <= 1.1 * zoo.relative(results["eager"], results["oracle"])
    for kind in ("recurrent", "conv"):
        a, e, o = (torch.cat([zoo.flat_states(c, kind) for c in caches[side]]) for side in ("ours", "eager", "oracle"))
        assert zoo.relative(a, o) <= 1.1 * zoo.relative(e, o)


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.sweep)])
def test_the_shapes_of_olmo_hybrid(batch):
    """Heads of 96 keys and 192 values, no powers of two, and a cache that is continued by several tokens."""
    heads = {"linear_key_head_dim": 96, "linear_value_head_dim": 192, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    model = zoo.olmo_hybrid(**zoo.SMALL, **heads)
    ours = copy.deepcopy(model)
    call = compiled(FAMILIES["olmo_hybrid"], ours)
    sides = []
    for side, owner in ((call, ours), (model, model)):
        # transformers 5.19 cannot trace a prompt on a filled static cache: it goes on in a dynamic one there.
        cache = zoo.new_cache(owner, "dynamic" if zoo.FILLED_STATIC_CACHE_BREAKS else "static", 96)
        with torch.no_grad():
            prompts = [side(input_ids=zoo.prompt(batch, n)[0], **zoo.held(cache)).logits for n in (66, 5)]
        sides.append((torch.cat([*prompts, zoo.decode(side, cache, None, zoo.tokens_for(batch, 2))], 1), cache))
    assert_close(*sides)
    assert_layers("decode", STEP if batch > 1 else {"fused_linear": 1, "mixer_decode": 1})
    reasons = {r.rule: r.reason for report in gdnfuse.reports() for r in report.all_records if r.status == "refused"}
    if not zoo.FILLED_STATIC_CACHE_BREAKS:
        assert reasons["attention_decode"] == "q must be normalised head by head, 16 columns each, found a norm of 64."
    if batch == 1:
        assert reasons["mixer_linears"] == "Heads must be a power of two wide for out_proj to normalise them, found 192."
