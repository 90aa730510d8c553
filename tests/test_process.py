"""What a process may hold at once: several models and threads, recompilations, resets, nested compilers, failing passes."""

import copy
import logging
import threading

import pytest
import torch

import gdnfuse
from gdnfuse.rewrite.proof import forget
from tests.models import zoo


def compiled(model, **options):
    return torch.compile(model, backend="gdnfuse", options={"inner": "eager", **options})


def decoded(model, call, batch=1, tokens=2, seed=1):
    """Logits of some steps behind the model's own prompt."""
    cache, mask = zoo.prefill(model, batch, "static", seed=seed)
    return zoo.decode(call, cache, mask, zoo.tokens_for(batch, tokens, seed))


def right(model, run, **kwargs):
    return zoo.relative(decoded(model, run, **kwargs), decoded(model, model, **kwargs)) < 1e-5


def test_several_models_in_turn():
    """Two of one class and size share graphs, a third of another size has its own, and each keeps to its weights."""
    first, other = zoo.causal_lm(**zoo.SMALL), zoo.causal_lm(**zoo.SMALL, hidden_size=48)
    second = copy.deepcopy(first)
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(1.1)
    runs = [(model, compiled(model)) for model in (first, second, other)]
    for _ in range(2):
        for model, run in runs:
            assert right(model, run)
    assert zoo.relative(decoded(first, first), decoded(second, second)) > 1e-3
    assert all(report.fused_layers == 1 for report in gdnfuse.reports())


def in_threads(*work):
    """Run callables at once; the first exception of any."""
    failed, gate = [], threading.Barrier(len(work))

    def run(f):
        try:
            gate.wait()
            f()
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=run, args=(f,)) for f in work]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failed:
        raise failed[0]


def test_models_compiled_in_threads_at_once():
    models = [zoo.causal_lm(**zoo.SMALL, hidden_size=size) for size in (48, 64, 80)]
    found = {}

    def work(i):
        found[i] = decoded(models[i], compiled(models[i]))

    in_threads(*(lambda i=i: work(i) for i in range(len(models))))
    for i, model in enumerate(models):
        assert zoo.relative(found[i], decoded(model, model)) < 1e-5
    assert [report.fused_layers for report in gdnfuse.reports()] == [1] * len(models)


def test_one_compiled_model_in_several_threads():
    """After its first call, each thread with a cache of its own."""
    model = zoo.causal_lm(**zoo.SMALL)
    run = compiled(model)
    assert right(model, run)
    wanted = [decoded(model, model, tokens=5, seed=seed) for seed in range(3)]
    found = {}

    def work(seed):
        found[seed] = decoded(model, run, tokens=5, seed=seed)

    in_threads(*(lambda seed=seed: work(seed) for seed in range(3)))
    assert all(zoo.relative(found[seed], wanted[seed]) < 1e-5 for seed in range(3))
    assert zoo.relative(wanted[0], wanted[1]) > 1e-3


def test_recompilations_up_to_the_limit_and_beyond():
    """Where torch gives up and runs eager, tokens stay right."""
    model = zoo.causal_lm(**zoo.SMALL)
    with torch._dynamo.config.patch(recompile_limit=2, automatic_dynamic_shapes=False):
        run = compiled(model)
        for batch in (1, 2, 3, 1):
            assert right(model, run, batch=batch)
    assert len(gdnfuse.reports()) == 2 and all(report.fused_layers == 1 for report in gdnfuse.reports())


@torch.no_grad()
def test_a_reset_in_the_middle_of_a_sequence():
    model = zoo.causal_lm(**zoo.SMALL)
    wanted = decoded(model, model, tokens=6)
    run, tokens = compiled(model), zoo.tokens_for(1, 6, 1)
    cache, _ = zoo.prefill(model, 1, "static")
    found = []
    for part in tokens.split(2, dim=1):
        found.append(zoo.decode(run, cache, None, part))
        torch._dynamo.reset()
    assert zoo.relative(torch.cat(found, 1), wanted) < 1e-5
    assert [report.fused_layers for report in gdnfuse.reports()] == [1, 1, 1]


@pytest.mark.parametrize("outer", ["gdnfuse", "eager"])
def test_a_compiled_model_inside_a_compiled_function(outer):
    """The outer compiler takes in what the inner one would have compiled; its options decide."""
    model = zoo.causal_lm(**zoo.SMALL)
    inner = compiled(model)
    options = {"options": {"inner": "eager"}} if outer == "gdnfuse" else {}

    @torch.compile(backend=outer, fullgraph=True, **options)
    def run(**kwargs):
        return inner(**kwargs)

    assert right(model, run)
    assert [report.fused_layers for report in gdnfuse.reports()] == ([1] if outer == "gdnfuse" else [])
    assert right(model, inner) and gdnfuse.reports()[-1].fused_layers == 1


def test_layers_compiled_one_by_one_inside_a_model_that_is_not():
    model = zoo.causal_lm(**zoo.SMALL)
    twin = copy.deepcopy(model)
    for layer in twin.model.layers:
        layer.compile(backend="gdnfuse", options={"inner": "eager"})
    assert zoo.relative(decoded(twin, twin), decoded(model, model)) < 1e-5
    assert any(report.phase == "decode" and report.fused_layers for report in gdnfuse.reports())


PASSES = ["normalize.normalize", "run_rules", "Spec.check", "lower.pack_weights", "lower.lower", "lower.check"]


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_that_fails_costs_no_model(name, monkeypatch, caplog):
    """Whatever was done before it, packed weights included."""
    model = zoo.causal_lm(**zoo.SMALL)
    monkeypatch.setattr(f"gdnfuse.pipeline.{name}", broken)
    assert right(model, compiled(model))
    (report,) = gdnfuse.reports()
    assert not report.rewritten and report.note == "A pass failed: ZeroDivisionError: broken on purpose."
    loud = [r for r in caplog.records if r.levelno == logging.ERROR and r.name == "gdnfuse.backend"]
    assert len(loud) == 1 and loud[0].exc_info and "as it came" in loud[0].getMessage()


def broken(*args, **kwargs):
    raise ZeroDivisionError("broken on purpose")


def test_a_pass_that_fails_under_strict_raises_and_the_next_compilation_is_whole(monkeypatch):
    model = zoo.causal_lm(**zoo.SMALL)
    with monkeypatch.context() as patched:
        patched.setattr("gdnfuse.pipeline.lower.lower", broken)
        with pytest.raises(Exception, match="strict: the graph was not rewritten. A pass failed: ZeroDivisionError"):
            decoded(model, compiled(model, strict=True))
    torch._dynamo.reset()
    assert right(model, compiled(model, strict=True))


def test_a_rule_that_fails_costs_what_it_would_have_rewritten_and_strict_raises(monkeypatch):
    model = zoo.causal_lm(**zoo.SMALL)
    monkeypatch.setattr("gdnfuse.passes.lift.packed_linear.LiftPackedLinear.check", broken)
    assert right(model, compiled(model))
    (report,) = gdnfuse.reports()
    fired = {r.rule for r in report.all_records if r.status is gdnfuse.Status.FIRED and r.stage in ("lift", "fuse")}
    failed = {(r.rule, r.reason) for r in report.all_records if r.failed}
    assert report.rewritten and "mixer_decode" in fired and "packed_linear" not in fired
    assert failed == {("packed_linear", "The rule packed_linear failed: ZeroDivisionError: broken on purpose.")}
    torch._dynamo.reset()
    with pytest.raises(Exception, match="strict: The rule packed_linear failed: ZeroDivisionError: broken on purpose."):
        decoded(model, compiled(model, strict=True))


def test_an_interrupt_is_the_users():
    """It is no failure of a pass: it ends the call, and the next one compiles."""
    model = zoo.causal_lm(**zoo.SMALL)
    run = compiled(model)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("gdnfuse.rewrite.driver.prove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoded(model, run)
    assert gdnfuse.reports() == []
    assert right(model, run) and gdnfuse.reports()[-1].fused_layers == 1


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_compilation_changes_nothing_global():
    model = zoo.causal_lm(**zoo.SMALL)
    cache, _ = zoo.prefill(model, 1, "static")
    forget()
    torch.set_num_threads(2)
    try:
        before = settings()
        zoo.decode(compiled(model), cache, None, zoo.tokens_for(1, 1))
        assert gdnfuse.reports()[-1].proofs > 0 and settings() == before
    finally:
        torch.set_num_threads(1)


def settings():
    random = torch.get_rng_state().tolist()
    return (
        random,
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
    )


def test_a_training_step_between_two_generations():
    """With gradients the compiled model runs as it came, on packed weights; afterwards it decodes with the new ones."""
    model = zoo.causal_lm(**zoo.SMALL)
    theirs, run = copy.deepcopy(model), compiled(model)
    assert right(model, run)
    ids = zoo.prompt(2)[0]
    for ours, call in ((model, run), (theirs, theirs)):
        ours.requires_grad_(True).train()
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
        call(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        ours.zero_grad()
        ours.eval()
    assert "without gradients" in gdnfuse.reports()[-1].note
    for a, b in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert zoo.relative(decoded(model, run), decoded(theirs, theirs)) < 1e-4
    assert right(model, run) and [r for r in gdnfuse.reports() if r.phase == "decode"][-1].fused_layers == 1


def test_inference_mode_and_no_grad_in_turn():
    """Weights are packed in the one or the other and read in both."""
    model = zoo.causal_lm(**zoo.SMALL)
    run = compiled(model)
    for _ in range(2):
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                assert right(model, run)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.01)
    assert all(not p.is_inference() for p in model.parameters())


def test_export_of_a_model_that_was_compiled():
    """It sees the functions' own code and the packed weights, and gives what the model gives."""
    model = zoo.causal_lm(**zoo.SMALL)
    assert right(model, compiled(model))
    ids = zoo.prompt(2)[0]
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
        found, wanted = program.module()(input_ids=ids, use_cache=False), model(input_ids=ids, use_cache=False)
    assert not [n for n in program.graph.nodes if "gdnfuse" in str(n.target)]
    torch.testing.assert_close(found.logits, wanted.logits)
