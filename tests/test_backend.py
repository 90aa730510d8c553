"""The entry point: what is rewritten and what is left, and that the report and the log say so."""

import copy
import json
import logging
import threading

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import gdnfuse
from gdnfuse import backend, kernels, versions
from gdnfuse.report.records import new_report
from tests.models import zoo


def compiled(model, **options):
    return torch.compile(model, backend="gdnfuse", fullgraph=True, options={"inner": "eager", **options})


@pytest.fixture(scope="module")
def small():
    return zoo.causal_lm(**zoo.SMALL)


def step(model, run, **kwargs):
    """One decode step of `run` after an eager prefill of `model`."""
    cache, mask = zoo.prefill(model, 2, "static")
    return zoo.decode(run, cache, mask, zoo.tokens_for(2, 1))


def test_the_entry_point_is_listed():
    assert "gdnfuse" in torch.compiler.list_backends()


def mlp():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2)).requires_grad_(False)


def test_a_model_without_gdn_runs_as_under_the_inner_backend():
    model, x = mlp(), torch.randn(3, 4)
    assert torch.equal(compiled(model, strict=True)(x), model(x))
    (report,) = gdnfuse.reports()
    assert (report.phase, report.layers, report.inner) == ("other", [], "eager")
    assert "no GDN layer" in report.summary() and "eager" in report.summary()


def test_with_gradients_nothing_is_rewritten_and_they_flow(caplog):
    model = zoo.causal_lm(**zoo.SMALL).requires_grad_(True)
    ours, ids = copy.deepcopy(model), zoo.tokens_for(2, 5)
    found, wanted = compiled(ours)(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    found.square().mean().backward()
    wanted.square().mean().backward()
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    (report,) = gdnfuse.reports()
    assert not report.rewritten and "gradients" in report.note and report.note in report.summary()
    torch._dynamo.reset()
    with pytest.raises(Exception, match="strict.*not rewritten.*gradients"):
        compiled(ours, strict=True)(input_ids=ids, use_cache=False)


@torch._dynamo.allow_in_graph
def loads():
    """As a kernel is fetched: its node has no value."""


def replaces_weight(module, args):
    loads()
    torch._assert_async(module.weight.isfinite().all())
    module.weight.data = module.weight * 1.0


@pytest.mark.skipif(bool(versions.older("torch", (2, 12))), reason="torch 2.11 breaks the graph at requires_grad_")
def test_what_nobody_knows_in_a_model_costs_no_fusion():
    """A hook that marks embeddings for gradients, a kernel that is fetched, an assertion, and weights that a forward replaces."""
    model = zoo.causal_lm(**zoo.SMALL)
    wanted = step(model, copy.deepcopy(model))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    for module in (model.model.layers[0].mlp.up_proj, model.lm_head):
        module.register_forward_pre_hook(replaces_weight)
    assert zoo.relative(step(model, compiled(model, strict=True)), wanted) < 1e-5
    (report,) = gdnfuse.reports()
    (refused,) = {r.reason for r in report.all_records if r.rule == "packed_linear" and r.status is gdnfuse.Status.REFUSED}
    assert report.fused_layers == 1 and "up_proj_parameters_weight_ must not be written in place" in refused


def test_strict_names_the_layer_and_the_reason(small):
    run = compiled(small, strict=True, stop_after="lift")
    with pytest.raises(Exception, match=r"strict: the GDN layer model\.layers\.0\.linear_attn is not fused\. .+\."):
        step(small, run)


def test_one_info_line_per_graph(small, caplog):
    with caplog.at_level(logging.INFO, "gdnfuse.backend"):
        step(small, compiled(small))
    lines = [r.getMessage() for r in caplog.records if r.name == "gdnfuse.backend" and r.levelno == logging.INFO]
    assert len(lines) == len(gdnfuse.reports()) == 1 and "1/1 GDN layers fused" in lines[0]


def test_the_report_is_plain_data(small):
    step(small, compiled(small))
    (report,) = gdnfuse.reports()
    data = json.loads(json.dumps(report.to_dict()))
    assert data["phase"] == "decode" and data["fused_layers"] == 1 and data["layers"][0]["why_not"] == ""
    assert {r["status"] for r in data["layers"][0]["records"]} <= {"fired", "refused", "unmatched", "shadowed"}
    assert report.nodes_after < report.nodes_before and sum(r["count"] for r in report.rows()) == len(report.all_records)


def test_a_prefill_is_reported_as_one(small):
    ids = zoo.tokens_for(2, 5)
    with torch.no_grad():
        found = compiled(small)(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, small(input_ids=ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)
    (report,) = gdnfuse.reports()
    assert report.phase == "prefill" and len(report.layers) == 1 and report.layers[0].records
    assert report.layers[0].fused and report.layers[0].why_not == ""


@pytest.mark.filterwarnings("ignore:.*inline_inbuilt_nn_modules is deprecated")
def test_modules_that_are_not_inlined_still_give_the_right_result(small):
    wanted = step(small, small)
    with torch._dynamo.config.patch(inline_inbuilt_nn_modules=False):
        assert zoo.relative(step(small, compiled(small)), wanted) < 1e-5


def test_compiling_again_after_a_reset(small):
    wanted = step(small, small)
    for n in (1, 2):
        assert zoo.relative(step(small, compiled(small, strict=True)), wanted) < 1e-5
        assert len(gdnfuse.reports()) == n
        torch._dynamo.reset()
    assert gdnfuse.reports()[0].graph_id < gdnfuse.reports()[1].graph_id
    gdnfuse.clear_reports()
    assert gdnfuse.reports() == []


def test_report_ids_are_unique_among_threads():
    ids = []
    threads = [threading.Thread(target=lambda: ids.extend(new_report().graph_id for _ in range(200))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(ids)) == 1600


def test_a_failing_pass_leaves_the_graph_as_it_came(monkeypatch):
    def broken(*args):
        raise ValueError("broken on purpose")

    monkeypatch.setattr("gdnfuse.pipeline.run_rules", broken)
    x, A, b = torch.randn(2, 3, 4), torch.randn(4), torch.randn(4)
    f = lambda x: -A.exp() * F.softplus(x + b)  # noqa: E731
    assert torch.equal(compiled(f)(x), f(x))
    assert "broken on purpose" in gdnfuse.reports()[0].note and not gdnfuse.reports()[0].rewritten


@pytest.mark.parametrize("setting", ["1", pytest.param("true", marks=pytest.mark.sweep)])
def test_the_environment_can_switch_all_of_it_off(small, setting, monkeypatch):
    wanted = step(small, torch.compile(copy.deepcopy(small), backend="eager", fullgraph=True))
    monkeypatch.setenv("GDNFUSE_DISABLE", setting)
    assert torch.equal(step(small, compiled(copy.deepcopy(small))), wanted)
    (report,) = gdnfuse.reports()
    assert not report.rewritten and report.all_records == []
    assert report.note == "The environment must not ask to leave graphs alone, found GDNFUSE_DISABLE set."


@pytest.mark.parametrize("setting", [pytest.param("", marks=pytest.mark.sweep), "0"])
def test_the_environment_may_say_that_it_is_on(small, setting, monkeypatch):
    monkeypatch.setenv("GDNFUSE_DISABLE", setting)
    step(small, compiled(copy.deepcopy(small)))
    assert gdnfuse.reports()[0].fused_layers == 1


def test_triton_is_read_by_a_thread_while_passes_run_and_only_for_a_gpu(monkeypatch):
    order = []
    monkeypatch.setattr(kernels, "read_triton", lambda: order.append("read"))
    monkeypatch.setattr(backend, "rewritten_copy", lambda *_: order.append("rewrite"))
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    for device in ("cpu", "cuda"):
        with FakeTensorMode():
            backend.gdnfuse(gm, [torch.empty(2, device=device)], options={"inner": "eager"})
    assert order == ["rewrite", "read", "rewrite"]


def test_the_key_of_triton_is_made_once():
    pytest.importorskip("triton")
    from torch._inductor.runtime.triton_compat import triton_key

    kernels.read_triton()
    kernels.read_triton()
    assert kernels.read_triton.cache_info().misses == 1
    kernels._pool().submit(lambda: None).result()
    assert isinstance(triton_key(), str)
