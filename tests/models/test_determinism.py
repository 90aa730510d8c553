"""The same call gives the same bits, and what a sequence gets does not depend on what stands beside it."""

import copy

import pytest
import torch

import gdnfuse
from tests.models import zoo


@torch.no_grad()
def outputs(run, model, ids, tokens):
    """Logits of a prompt and of the steps behind it, and the states they leave."""
    cache = zoo.new_cache(model, "static", 80)
    prompt = run(input_ids=ids, **zoo.held(cache)).logits
    steps = zoo.decode(run, cache, None, tokens)
    return [prompt, steps, *zoo.states(cache)["recurrent"], *zoo.states(cache)["conv"]]


def equal(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("inner", "batch"), [("eager", 1), pytest.param("aot_eager", 3, marks=pytest.mark.sweep)])
def test_runs_are_bit_identical(inner, batch):
    """One compilation called twice, another compilation, and other memory: the weights of a copy are packed elsewhere."""
    model = zoo.causal_lm(**zoo.SMALL)
    ids, tokens = zoo.prompt(batch, 70)[0], zoo.tokens_for(batch, 4)
    run = torch.compile(model, backend="gdnfuse", options={"inner": inner})
    first = outputs(run, model, ids, tokens)
    assert equal(outputs(run, model, ids, tokens), first)
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    run = torch.compile(twin, backend="gdnfuse", options={"inner": inner})
    assert equal(outputs(run, twin, ids, tokens), first)
    assert {report.phase for report in gdnfuse.reports()} == {"decode", "prefill"}
    assert all(report.fused_layers == 1 for report in gdnfuse.reports())


def test_a_sequence_does_not_depend_on_its_neighbours():
    """At one batch size; another one may round otherwise."""
    model = zoo.causal_lm(**zoo.SMALL)
    run = torch.compile(model, backend="gdnfuse", options={"inner": "aot_eager"})
    (ids, others), tokens = (zoo.prompt(3, 70, seed=seed)[0] for seed in (1, 2)), zoo.tokens_for(3, 4)
    others[1] = ids[1]
    changed = tokens.flip(0).clone()
    changed[1] = tokens[1]
    first, second = outputs(run, model, ids, tokens), outputs(run, model, others, changed)
    assert all(torch.equal(a[1], b[1]) and not torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
