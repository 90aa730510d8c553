"""Full-attention layers of a decode step on a static cache become one op each; what is not that is left alone with a sentence."""

import copy

import pytest
import torch

import gdnfuse
from gdnfuse.report.records import Status
from gdnfuse.rewrite import proof
from tests.models import zoo


def records(report, rule="attention_decode"):
    return [r for r in report.all_records if r.rule == rule and r.stage == "lift"]


def compiled(model, fullgraph=True, **options):
    return torch.compile(model, backend="gdnfuse", fullgraph=fullgraph, options={"inner": "eager", **options})


@pytest.mark.parametrize(("batch", "padded"), [(1, False), pytest.param(1, True, marks=pytest.mark.sweep), (3, True)])
@torch.no_grad()
def test_fires_and_writes_the_cache_as_eager_does(batch, padded):
    model = zoo.causal_lm(**zoo.SMALL)
    cache, mask = zoo.prefill(model, batch, "static", padded)
    other = copy.deepcopy(cache)
    tokens = zoo.tokens_for(batch, 6)
    found, wanted = zoo.decode(compiled(model), cache, mask, tokens), zoo.decode(model, other, mask, tokens)
    assert zoo.relative(found, wanted) < 1e-5
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        if hasattr(mine, "keys") and isinstance(mine.keys, torch.Tensor):
            assert zoo.relative(mine.keys, theirs.keys) < 1e-5 and zoo.relative(mine.values, theirs.values) < 1e-5
    (report,) = gdnfuse.reports()
    attention = [layer for layer in model.config.layer_types if layer == "full_attention"]
    assert [r.status for r in records(report)] == [Status.FIRED] * len(attention) and attention
    assert records(report, "attention_growing") == records(report, "attention_few_queries") == []
    assert "scaled_dot_product_attention" not in report_code(model, batch, padded)


def report_code(model, batch, padded):
    gdnfuse.clear_reports()
    torch._dynamo.reset()
    cache, mask = zoo.prefill(model, batch, "static", padded)
    zoo.decode(compiled(model, stop_after="lift"), cache, mask, zoo.tokens_for(batch, 1))
    return gdnfuse.reports()[0].stage_code


@torch.no_grad()
def test_a_cache_that_grows_is_left_to_another_rule():
    model = zoo.causal_lm(**zoo.SMALL)
    cache, mask = zoo.prefill(model, 1, "dynamic")
    zoo.decode(compiled(model), cache, mask, zoo.tokens_for(1, 1))
    found = records(gdnfuse.reports()[0])
    assert found and all(r.status is Status.UNMATCHED and "in a cache of fixed size" in r.reason for r in found)
    assert [r.status for r in records(gdnfuse.reports()[0], "attention_growing")] == [Status.FIRED] * len(found)


@pytest.mark.parametrize(("T", "batch"), [(5, 3), *(pytest.param(T, 1, marks=pytest.mark.sweep) for T in (2, 4, 8))])
@torch.no_grad()
def test_few_tokens_are_one_op_too_and_more_are_left_alone(T, batch):
    model = zoo.causal_lm(**zoo.SMALL)
    cache, _ = zoo.prefill(model, batch, "static")
    other = copy.deepcopy(cache)
    call = compiled(model, fullgraph=not zoo.FILLED_STATIC_CACHE_BREAKS)
    tokens = zoo.tokens_for(batch, T)
    found, wanted = (f(input_ids=tokens, **zoo.held(x)).logits for f, x in ((call, cache), (model, other)))
    assert zoo.relative(found, wanted) < 1e-5
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        if hasattr(mine, "keys") and isinstance(mine.keys, torch.Tensor):
            assert zoo.relative(mine.keys, theirs.keys) < 1e-5 and zoo.relative(mine.values, theirs.values) < 1e-5
    done = [r for report in gdnfuse.reports() for r in records(report)]
    assert [r.status for r in done] == [Status.FIRED] * model.config.layer_types.count("full_attention") and done
    gdnfuse.clear_reports()
    call(input_ids=zoo.tokens_for(batch, 9), **zoo.held(cache))
    assert all(records(report) == [] for report in gdnfuse.reports()) and gdnfuse.reports()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("the scale", {"scale": 1.0}),
        ("the eps of the norm", {"norm_eps": 1e-2}),
        ("no gate", {"gate": None}),
        ("cosine and sine exchanged", lambda given: {"cos": given["sin"], "sin": given["cos"]}),
        ("keys and values exchanged", lambda given: {"k": given["v"], "v": given["k"]}),
    ],
)
@torch.no_grad()
def test_the_proof_bites(name, wrong, monkeypatch):
    from gdnfuse.passes.lift import attention_decode

    proof.forget()
    right = attention_decode.call

    def changed(target, **given):
        return right(target, **{**given, **(wrong(given) if callable(wrong) else wrong)})

    monkeypatch.setattr(attention_decode, "call", changed)
    model = zoo.causal_lm(**zoo.SMALL)
    cache, mask = zoo.prefill(model, 1, "static")
    zoo.decode(compiled(model), cache, mask, zoo.tokens_for(1, 1))
    proof.forget()
    found = records(gdnfuse.reports()[0])
    assert found and all(r.status is Status.REFUSED and "proof" in r.reason for r in found), name
