"""The option verify: a rewritten graph that is worse than the graph as it came is not used, and the report says why."""

import copy
import dataclasses

import pytest
import torch

import gdnfuse
from gdnfuse import models
from gdnfuse.dialect import OPS
from gdnfuse.passes import verify
from gdnfuse.report.records import Status
from tests.models import zoo
from tests.sweeps import ALL, some

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compiled(model, **options):
    return torch.compile(model, backend="gdnfuse", fullgraph=True, options={"inner": "eager", **options})


def decoded(model, call, batch=2, kind="static"):
    cache, mask = zoo.prefill(model, batch, kind)
    return zoo.decode(call, cache, mask, zoo.tokens_for(batch, 3)), cache


def spoil(monkeypatch, name, how):
    """Let the reference that an op is lowered to on the CPU give something else; proofs take the op itself, which stays."""
    op = OPS[name]
    monkeypatch.setitem(OPS, name, dataclasses.replace(op, reference=lambda *args, **kwargs: how(op.reference(*args, **kwargs))))


@pytest.mark.parametrize(("dtype", "batch"), [(d, b) for d in DTYPES for b in (1, 2)] if ALL else [(torch.bfloat16, 1)])
def test_a_decode_step_is_verified_and_changes_nothing(dtype, batch):
    model = zoo.causal_lm(**zoo.SMALL).to(dtype)
    logits, cache = decoded(model, compiled(copy.deepcopy(model), verify=True, strict=True), batch)
    (report,) = gdnfuse.reports()
    assert report.fused_layers == 1 and not report.note
    assert all(c.passed for c in report.comparisons)
    written = [c.name for c in report.comparisons if not c.name.startswith("output")]
    assert sum("recurrent" in name for name in written) == sum("conv" in name for name in written) == 1
    assert any(c.error > 0 for c in report.comparisons)

    gdnfuse.clear_reports()
    torch._dynamo.reset()
    without, plain = decoded(model, compiled(copy.deepcopy(model)), batch)
    assert torch.equal(logits, without)
    assert all(torch.equal(zoo.flat_states(cache, kind), zoo.flat_states(plain, kind)) for kind in ("recurrent", "conv"))
    assert gdnfuse.reports()[0].comparisons == []


def test_prompts_are_verified():
    model = zoo.causal_lm(**zoo.SMALL)
    call = compiled(model, verify=True, strict=True)
    with torch.no_grad():
        for length in (70, 83):
            ids, _ = zoo.prompt(2, length)
            call(ids, **zoo.held(zoo.new_cache(model, "dynamic")))
    assert [r.phase for r in gdnfuse.reports()] == ["prefill", "prefill"]
    assert all(r.comparisons and all(c.passed for c in r.comparisons) for r in gdnfuse.reports())


SPOILT = {
    "another output": ("mixer_decode", lambda y: 1.02 * y, "mixer_decode"),
    "not finite": ("mixer_decode", lambda y: y / 0, "mixer_decode"),
    "another norm": ("rms_norm", lambda y: y.roll(1, -1), "rms_norm"),
}


@pytest.mark.parametrize("name", some(SPOILT, "not finite", "another norm"))
def test_a_wrong_kernel_is_found_named_and_not_used(name, monkeypatch, caplog):
    op, how, rule = SPOILT[name]
    model = zoo.causal_lm(**zoo.SMALL)
    wanted, _ = decoded(model, model)
    spoil(monkeypatch, op, how)
    found, _ = decoded(model, compiled(copy.deepcopy(model), verify=True))
    assert zoo.relative(found, wanted) < 2e-6
    (report,) = gdnfuse.reports()
    assert not report.rewritten and report.fused_layers == 0
    assert not all(c.passed for c in report.comparisons)
    assert report.note.startswith("Not verified: ") and f", {rule} at " in report.note and report.note.endswith(".")
    assert report.note in caplog.text
    assert all(layer.why_not for layer in report.layers)


def test_a_wrong_state_is_found(monkeypatch):
    model = zoo.causal_lm(**zoo.SMALL)
    wanted, _ = decoded(model, model)
    op = OPS["mixer_decode"]

    def spoilt(*args, **kwargs):
        y = op.reference(*args, **kwargs)
        op.bind(args, kwargs)["recurrent_state"].mul_(0.99)
        return y

    monkeypatch.setitem(OPS, "mixer_decode", dataclasses.replace(op, reference=spoilt))
    found, _ = decoded(model, compiled(copy.deepcopy(model), verify=True))
    assert zoo.relative(found, wanted) < 2e-6
    failed = [c.name for c in gdnfuse.reports()[0].comparisons if not c.passed]
    assert len(failed) == 1 and all("recurrent" in name for name in failed)


def test_strict_raises_where_verifying_fails(monkeypatch):
    spoil(monkeypatch, "mixer_decode", lambda y: -y)
    model = zoo.causal_lm(**zoo.SMALL)
    with pytest.raises(Exception, match="strict: the graph was not rewritten. Not verified: "):
        decoded(model, compiled(model, verify=True, strict=True))


def test_without_data_a_graph_is_not_verified():
    (report,) = models.trace(models.meta_model(zoo.causal_lm(**zoo.SMALL).config), verify=True)
    assert report.rewritten and report.comparisons == []
    assert report.note == "Not verified. Verifying needs the tensors of a real call, found one without data."


@pytest.mark.parametrize("fuel", [0, 1, 7] if ALL else [1])
def test_fuel_is_how_many_rewrites_are_made(fuel):
    model = zoo.causal_lm(**zoo.SMALL)
    wanted, _ = decoded(model, model)
    found, _ = decoded(model, compiled(copy.deepcopy(model), fuel=fuel, capture=False))
    assert zoo.relative(found, wanted) < 1e-5
    (report,) = gdnfuse.reports()
    records = [r for r in report.all_records if r.stage in ("lift", "fuse")]
    assert sum(r.status is Status.FIRED for r in records) == fuel
    refused = [r.reason for r in records if r.status is Status.REFUSED]
    assert f"The option fuel must leave a rewrite, found that all {fuel} are made." in refused


def test_a_rewritten_graph_that_raises_is_not_used(monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("no such kernel")

    model = zoo.causal_lm(**zoo.SMALL)
    wanted, _ = decoded(model, model)
    monkeypatch.setitem(OPS, "mixer_decode", dataclasses.replace(OPS["mixer_decode"], reference=broken))
    found, _ = decoded(model, compiled(copy.deepcopy(model), verify=True))
    assert zoo.relative(found, wanted) < 2e-6
    (report,) = gdnfuse.reports()
    assert not report.rewritten and "no such kernel" in report.note and ", mixer_decode at " in report.note


def test_what_cannot_be_verified_for_want_of_memory_still_runs(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(verify, "_copies", full)
    model = zoo.causal_lm(**zoo.SMALL)
    decoded(model, compiled(model, verify=True))
    (report,) = gdnfuse.reports()
    assert report.rewritten and report.note == "Not verified. OutOfMemoryError: out of memory."
    torch._dynamo.reset()
    with pytest.raises(Exception, match="strict: the graph was not verified. Not verified. OutOfMemoryError: out of memory."):
        decoded(model, compiled(model, verify=True, strict=True))


INF, NAN = float("inf"), float("nan")
UNEVEN = {
    "as eager": ([INF, 1.0, 2.0], True),
    "finite where eager overflows": ([7.0, 1.0, 2.0], True),
    "wrong beside it": ([INF, 1.5, 2.0], False),
    "not finite beside it": ([INF, NAN, 2.0], False),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_one_overflow_of_eagers_hides_nothing_else(name):
    ours, passed = UNEVEN[name]
    theirs, exact = torch.tensor([INF, 1.0, 2.0]).half(), torch.tensor([7e4, 1.0, 2.0])
    assert verify._compare("output 0", torch.tensor(ours).half(), theirs, exact).passed is passed


def test_what_is_never_finite_must_not_become_so():
    theirs, exact = torch.tensor([-INF, 1.0]), torch.tensor([-INF, 1.0]).double()
    assert verify._compare("output 0", theirs.clone(), theirs, exact).passed
    assert not verify._compare("output 0", torch.tensor([0.0, 1.0]), theirs, exact).passed
