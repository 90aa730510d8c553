"""The main job on a GPU: Triton kernels under Inductor, with and without CUDA graphs."""

import copy

import pytest
import torch

import gdnfuse
from tests.models import zoo

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128}


def run(model, call, batch, padded, tokens, length=64):
    cache = zoo.new_cache(model, "static", length)
    ids, mask = zoo.prompt(batch, padded=padded)
    ids, mask = ids.cuda(), None if mask is None else mask.cuda()
    model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)

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
    chosen = {r.chosen for layer in report.layers for r in layer.records if r.rule == "mixer_decode" and r.stage == "lower"}
    assert chosen == {"triton"}
    floor = 2e-6 if dtype == torch.float32 else 0.0
    assert zoo.relative(found, wanted) <= 1.1 * zoo.relative(eager, wanted) + floor
    for kind in ("recurrent", "conv"):
        ours_all, eager_all, wanted_all = (
            torch.cat([s.flatten().double() for s in states[kind]]) for states in (found_states, eager_states, wanted_states)
        )
        assert zoo.relative(ours_all, wanted_all) <= 1.1 * zoo.relative(eager_all, wanted_all) + floor


@torch.no_grad()
def test_runs_are_bit_identical():
    model = zoo.causal_lm(hidden_size=256, **HEADS).bfloat16().cuda()
    tokens = zoo.tokens_for(2, 16).cuda()
    compiled = torch.compile(model, backend="gdnfuse", mode="reduce-overhead", fullgraph=True)
    first, first_states = run(model, compiled, 2, False, tokens)
    second, second_states = run(model, compiled, 2, False, tokens)
    assert torch.equal(first, second)
    for kind in ("recurrent", "conv"):
        assert all(torch.equal(a, b) for a, b in zip(first_states[kind], second_states[kind], strict=True))
