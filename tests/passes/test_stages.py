"""Any stage can be the last one: its graph runs and gives the same."""

import copy

import pytest
import torch

import gdnfuse
from gdnfuse.options import STAGES
from tests.models import zoo


@pytest.fixture(scope="module")
def eager():
    torch.manual_seed(0)
    model = zoo.causal_lm(**zoo.SMALL)
    tokens = zoo.tokens_for(2, 2)
    cache, mask = zoo.prefill(model, 2, "static")
    return model, tokens, zoo.decode(model, cache, mask, tokens), zoo.states(cache)


CASES = [*((s, "eager") for s in STAGES), ("lift", "aot_eager"), ("fuse", "aot_eager")]


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize(("stage", "inner"), CASES)
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
    assert ("gdnfuse.mixer_decode" in report.stage_code) == (stage == "fuse")
    assert ("gdnfuse.delta_rule" in report.stage_code) == (stage == "lift" or capture and stage == "normalize")
    assert {r.stage for r in report.all_records} - {"capture"} == set(STAGES[1 : STAGES.index(stage) + 1])
    assert any(r.stage == "capture" for r in report.all_records) == capture
    assert report.fused_layers == (1 if stage in ("fuse", "lower") else 0)


def test_without_stop_after_no_graph_is_kept(eager):
    model, tokens, _, _ = eager
    ours = copy.deepcopy(model)
    cache, mask = zoo.prefill(ours, 2, "static")
    zoo.decode(torch.compile(ours, backend="gdnfuse", options={"inner": "eager"}), cache, mask, tokens)
    assert gdnfuse.reports()[0].stage_code == ""
