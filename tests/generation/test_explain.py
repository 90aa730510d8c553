"""gdnfuse.explain: the data of a real compilation, causes with a fix, and everything of the user's as it was."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import StaticCache

import gdnfuse
from gdnfuse.generation import causes
from tests.models import zoo
from tests.pages import check_reference
from tests.sweeps import ALL

IDS = torch.tensor([[5, 6, 7, 8, 9]])
GENERATE = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return zoo.causal_lm(**zoo.SMALL)


def plain(reports):
    """What a report says of its graph, without what differs from run to run."""
    return [(r.phase, r.rewritten, [(x.path, x.fused, x.ops_after, x.launches_after) for x in r.layers]) for r in reports]


def test_says_what_the_compilation_says_and_leaves_a_compiled_model_compiled(model):
    found = gdnfuse.explain(model.generate, IDS, cache_implementation="static", **GENERATE)
    assert gdnfuse.reports() == []
    gdnfuse.compile(ours := zoo.causal_lm(**zoo.SMALL), inner="eager")
    tokens = ours.generate(IDS, cache_implementation="static", **GENERATE)
    assert plain(found.reports) == plain(gdnfuse.reports())
    assert [r.fused_layers for r in found.reports] == [1] * 2
    assert not found.breaks and not found.recompiles
    assert found.summary().startswith("2 graphs, 2/2 GDN layers fused, 0 graph breaks, 0 recompilations.\n")
    call, compiled = ours._compiled_call_impl, len(gdnfuse.reports())
    again = gdnfuse.explain(ours.generate, IDS, cache_implementation="static", **GENERATE)
    assert plain(again.reports) == plain(found.reports) and again.findings == []
    assert ours._compiled_call_impl is call
    assert torch.equal(ours.generate(IDS, cache_implementation="static", **GENERATE), tokens)
    assert len(gdnfuse.reports()) == compiled


def test_leaves_everything_as_it_was(model):
    before = {k: (v.data_ptr(), v._version, v.clone()) for k, v in model.state_dict().items()}
    attributes, config, random = dict(vars(model)), model.generation_config.to_dict(), torch.get_rng_state()
    gdnfuse.explain(model.generate, IDS, cache_implementation="static", **{**GENERATE, "do_sample": True})
    assert vars(model) == attributes and model.generation_config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random)
    for k, v in model.state_dict().items():
        pointer, version, value = before[k]
        assert (v.data_ptr(), v._version) == (pointer, version) and torch.equal(v, value)


def states(cache):
    held = [x for layer in cache.layers for x in vars(layer).values()]
    return [t.clone() for t in torch.utils._pytree.tree_leaves(held) if isinstance(t, torch.Tensor)]


def test_a_cache_that_is_given_stays_as_it_was(model):
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(IDS, **zoo.held(cache))
    before = states(cache)
    (report,) = gdnfuse.explain(model, IDS[:, :1], **zoo.held(cache)).reports
    assert report.phase == "decode" and report.fused_layers == 1
    assert len(before) > 4 and all(torch.equal(a, b) for a, b in zip(before, states(cache), strict=True))


def test_leaves_packed_weights_where_they_are_after_one_has_left():
    model = gdnfuse.compile(zoo.causal_lm(**zoo.SMALL), inner="eager")
    model(IDS)
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.weight = torch.nn.Parameter(mlp.gate_proj.weight.clone(), requires_grad=False)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    gdnfuse.explain(model, IDS)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def test_generate_of_a_model_that_is_not_compiled(model):
    (finding,) = gdnfuse.explain(torch.compile(model).generate, IDS, cache_implementation="static", **GENERATE).findings
    assert finding.kind == "not compiled" and "gdnfuse.compile(model)" in finding.fix


def test_a_cache_that_grows(model):
    found = gdnfuse.explain(model.generate, IDS, **GENERATE)
    assert not found.recompiles and [r.phase for r in found.reports] == ["prefill", "decode"]


BEAMS = {**GENERATE, "num_beams": 2}  # puts keys and values into other tensors between two steps


def test_a_cache_that_grows_in_other_tensors(model):
    found = gdnfuse.explain(model.generate, IDS, **BEAMS)
    (again,) = found.recompiles
    assert again.where == "decode steps" and "expected 5, actual 6" in again.cause
    assert "static" in again.fix
    if ALL:  # what the first explanation learned of changing sizes is not there for the second
        assert gdnfuse.explain(model.generate, IDS, **BEAMS).recompiles == [again]


def test_torch_gives_up(model):
    with torch._dynamo.config.patch(recompile_limit=1):
        found = gdnfuse.explain(model.generate, IDS, **BEAMS)
    (limit,) = found.recompiles
    assert limit.kind == "recompilation limit" and "recompile_limit" in limit.fix and "size mismatch" in limit.cause
    assert not found.breaks


def branching(model, ids):
    logits = model(ids).logits
    if logits.sum() > 0:
        logits = logits + 1
    print("a line", end="")
    return logits.argmax(-1).item() if logits.shape[1] == 1 else logits


@pytest.fixture(scope="module")
def broken(model):
    return gdnfuse.explain(branching, model, IDS)


def test_graph_breaks_have_place_cause_and_fix(broken):
    found = broken
    assert [b.kind for b in found.breaks] == ["graph break"] * 2
    line = branching.__code__.co_firstlineno
    assert [b.where for b in found.breaks] == [f"{__file__}:{line + n} in branching" for n in (2, 4)]
    assert "torch.where" in found.breaks[0].fix and "reorderable_logging_functions" in found.breaks[1].fix
    assert "print" in found.breaks[1].cause
    assert "2 graph breaks" in str(found) and "  → Make the decision outside" in str(found)


def test_gradients_leave_a_graph_as_it_came():
    found = gdnfuse.explain(zoo.causal_lm(**zoo.SMALL).requires_grad_(True), IDS)
    unfused, left = found.findings
    assert (unfused.kind, unfused.where) == ("layers not fused", "prompts") and "torch.no_grad()" in unfused.fix
    assert unfused.cause.startswith("0 of 1 in a prompt (not model.layers.0.linear_attn) run fused. ")
    assert (left.kind, left.where) == ("graph left unchanged", "graph 0") and "torch.no_grad()" in left.fix


def calls_of(function, *calls):
    """What is found when a compiled function is called with each of these in turn."""
    step = torch.compile(function, backend="eager")
    with causes.noted() as found:
        for call in calls:
            call(step)
    return found.recompilations({})


X = torch.ones(3)
RECOMPILED = {
    "torch.no_grad()": [lambda step: step(X, 0), torch.no_grad()(lambda step: step(X, 0))],
    "With dynamic=True that happens": [lambda step: step(X, 0), lambda step: step(torch.ones(4), 0)],
    "inputs of the same kinds": [lambda step: step(X, 0), lambda step: step(X.double(), 0)],
    "A Python number": [lambda step: step(X, 0), lambda step: step(X, 1)],
    "torch.inference_mode()": [torch.no_grad()(lambda step, x=x: step(x, 0)) for x in (X, torch.inference_mode()(torch.ones)(3))],
}


@pytest.mark.parametrize("fix", RECOMPILED)
def test_recompilations_have_a_fix(fix):
    found = calls_of(lambda x, n: x.sin() * n, *RECOMPILED[fix])
    assert len(found) == 1 and fix in found[0].fix and found[0].kind == "recompilation", found
    assert "test_explain.py" in found[0].where


def test_to_dict_is_json_with_a_version(broken):
    data = json.loads(json.dumps(broken.to_dict()))
    assert data["schema"] == "gdnfuse.explanation/2"
    assert data["graphs"][0]["layers"][0]["fused"] is True
    assert {f["kind"] for f in data["findings"]} == {"graph break"}
    check_reference(data, "explanation")


def test_a_call_that_fails_leaves_the_model_as_it_was(model):
    attributes = dict(vars(model))
    with pytest.raises(Exception, match="no_such"):
        gdnfuse.explain(model.generate, IDS, no_such_argument=1)
    assert vars(model) == attributes


@pytest.mark.parametrize("given", [(3,), (print, threading.Lock())])
def test_bad_input_is_one_sentence(given):
    with pytest.raises(gdnfuse.GdnfuseError, match=r"^explain needs .*, found \w+[^\n]*$"):
        gdnfuse.explain(*given)


TRACED = """
import torch
step = torch.compile(lambda x: x.sin(), backend="gdnfuse", options={"inner": "eager"})
step(torch.ones(3))
"""


def test_the_report_is_in_torchs_trace(tmp_path):
    env = {**os.environ, "TORCH_TRACE": str(tmp_path)}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", TRACED], env=env, cwd=root, check=True, timeout=300, capture_output=True)
    (log,) = tmp_path.iterdir()
    artifacts = {}
    for entry in re.split(r"^(?=V\d{4} )", log.read_text(), flags=re.MULTILINE):
        head, _, payload = entry.partition("\n")
        if '"name": "gdnfuse_' in head:
            metadata = json.loads(head[head.index("{") :])
            assert metadata["frame_id"] == 0 and metadata["has_payload"]
            artifacts[metadata["artifact"]["name"]] = metadata["artifact"]["encoding"], payload.replace("\n\t", "\n").strip()
    assert artifacts.keys() == {"gdnfuse_report", "gdnfuse_summary"}
    encoding, report = artifacts["gdnfuse_report"]
    assert encoding == "json" and json.loads(report)["phase"] == "other"
    assert artifacts["gdnfuse_summary"] == ("string", "graph 0 (other): no GDN layer found; compiled by eager unchanged.")
