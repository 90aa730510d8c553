"""Any stage can be the last one: its graph runs and gives the same."""

import copy

import pytest
import torch

import gdnfuse
from gdnfuse import pipeline
from gdnfuse.options import STAGES
from gdnfuse.passes import growing_keys
from tests.models import zoo
from tests.sweeps import ALL


@pytest.fixture(scope="module")
def eager():
    torch.manual_seed(0)
    model = zoo.causal_lm(**zoo.SMALL)
    tokens = zoo.tokens_for(2, 2)
    cache, mask = zoo.prefill(model, 2, "static")
    return model, tokens, zoo.decode(model, cache, mask, tokens), zoo.states(cache)


CASES = [("normalize", "eager", True), ("lift", "aot_eager", False), ("fuse", "eager", True), ("lay_out", "eager", False)]
CASES += [("lower", "eager", False)]
OTHERS = [("normalize", "eager", False), ("lift", "eager", True), ("fuse", "aot_eager", False), ("lower", "eager", True)]


@pytest.mark.parametrize(("stage", "inner", "capture"), [*CASES, *OTHERS] if ALL else CASES)
def test_the_graph_after_every_stage_runs(eager, stage, inner, capture):
    model, tokens, wanted, states = eager
    ours = copy.deepcopy(model)
    cache, mask = zoo.prefill(ours, 2, "static")
    options = {"inner": inner, "stop_after": stage, "capture": capture}
    run = torch.compile(ours, backend="gdnfuse", fullgraph=True, options=options)
    assert zoo.relative(zoo.decode(run, cache, mask, tokens), wanted) < 1e-5
    for kind in ("recurrent", "conv"):
        for x, y in zip(zoo.states(cache)[kind], states[kind], strict=True):
            assert zoo.relative(x, y) < 1e-5
    (report,) = gdnfuse.reports()
    assert report.rewritten and report.stage_code
    assert ("gdnfuse.mixer_decode" in report.stage_code) == (stage in ("fuse", "lay_out"))
    assert ("gdnfuse.delta_rule" in report.stage_code) == (stage == "lift" or capture and stage == "normalize")
    assert {r.stage for r in report.all_records} - {"capture"} == set(STAGES[1 : STAGES.index(stage) + 1]) - {"lay_out"}
    assert any(r.stage == "capture" for r in report.all_records) == capture
    assert report.fused_layers == (1 if stage in ("fuse", "lay_out", "lower") else 0)


def test_without_stop_after_no_graph_is_kept(eager, monkeypatch):
    """And the stages are those that it may name, in their order."""
    seen, stages = [], pipeline._stages
    monkeypatch.setattr(pipeline, "_stages", lambda c: (seen.append(done[0]) or done for done in stages(c)))
    model, tokens, _, _ = eager
    ours = copy.deepcopy(model)
    cache, mask = zoo.prefill(ours, 2, "static")
    zoo.decode(torch.compile(ours, backend="gdnfuse", options={"inner": "eager"}), cache, mask, tokens)
    assert gdnfuse.reports()[0].stage_code == "" and tuple(seen) == STAGES


@pytest.mark.parametrize("broken", [None, "growing_keys", "lay_out"])
def test_keys_and_values_of_a_prompt_are_laid_out_and_marked_and_if_that_fails_it_is_fused_all_the_same(
    eager, broken, monkeypatch, caplog
):
    if broken:
        monkeypatch.setattr(f"gdnfuse.pipeline.growing_keys.{broken}", lambda *args: 1 / 0)
    ours, (ids, _) = copy.deepcopy(eager[0]), zoo.prompt(2)
    run = torch.compile(ours, backend="gdnfuse", options={"inner": "eager", "stop_after": "lay_out"})
    cache, theirs = (zoo.new_cache(ours, "dynamic") for _ in range(2))
    with torch.no_grad():
        assert zoo.relative(run(ids, **zoo.held(cache)).logits, ours(ids, **zoo.held(theirs)).logits) < 1e-5
    (report,) = gdnfuse.reports()
    grown = [x for layer in cache.layers for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None]
    assert len(grown) == 2 and report.rewritten and report.fused_layers == 1
    assert report.stage_code.count("memory_format: torch.contiguous_format") == (0 if broken else 2)
    assert all(growing_keys.LENGTH in getattr(x, "_dynamo_weak_dynamic_indices", ()) for x in grown) == (broken != "growing_keys")
    assert ("its first step may be compiled twice" in caplog.text) == bool(broken)
