"""A prompt's graph leaves the states that it passes, to whoever collects them and to nobody else."""

import pytest
import torch

import gdnfuse
from gdnfuse.report.records import Status
from gdnfuse.runs import RUNS
from tests.models import zoo


@pytest.fixture
def collected():
    RUNS.checkpoints = []
    yield RUNS.checkpoints
    RUNS.checkpoints = None


def compiled(model, **options):
    return torch.compile(model, backend="gdnfuse", fullgraph=True, options={"inner": "eager", "checkpoint_every": 64, **options})


def prompt(length, rows=1):
    return torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(length))


def fired(report):
    return [r.status for r in report.all_records if r.rule == "checkpoints"]


def test_states_after_every_so_many_tokens_of_all_layers_and_lengths(collected):
    model = zoo.causal_lm(num_hidden_layers=2, layer_types=["linear_attention"] * 1 + ["full_attention"])
    run = compiled(model, strict=True)
    for length in (200, 263, 330):
        ids = prompt(length, 2)
        torch._dynamo.maybe_mark_dynamic(ids, 1)
        collected.clear()
        cache = zoo.new_cache(model, "dynamic")
        out = run(input_ids=ids, **zoo.held(cache))
        assert set(out) == {"logits", zoo.CACHE}
        ((states, windows),) = collected
        assert states.shape == (2, length // 64, 4, 16, 16) and windows.shape == (2, length // 64, 128, 4)
        for i in range(length // 64):
            eager = zoo.new_cache(model, "dynamic")
            model(input_ids=ids[:, : 64 * (i + 1)], **zoo.held(eager))
            (recurrent,), (conv,) = zoo.states(eager)["recurrent"], zoo.states(eager)["conv"]
            assert zoo.relative(states[:, i], recurrent) < 1e-5 and zoo.relative(windows[:, i], conv) < 1e-5
    assert [fired(r) for r in gdnfuse.reports()] == [[Status.FIRED]], "one graph, and a row of its report"


def test_nobody_has_to_collect_them():
    model = zoo.causal_lm(**zoo.SMALL)
    out = compiled(model)(input_ids=prompt(130), **zoo.held(zoo.new_cache(model, "dynamic")))
    assert zoo.relative(out.logits, model(input_ids=prompt(130)).logits) < 1e-5 and RUNS.checkpoints is None


def test_packed_sequences_leave_none(collected):
    model = zoo.causal_lm(**zoo.SMALL)
    bounds = torch.tensor([0, 70, 140])
    positions = torch.cat([torch.arange(70), torch.arange(70)])[None]
    compiled(model)(input_ids=prompt(140), position_ids=positions, cu_seq_lens_q=bounds, use_cache=False)
    (report,) = gdnfuse.reports()
    (record,) = [r for r in report.all_records if r.rule == "checkpoints"]
    assert not collected and report.fused_layers == 1
    assert record.reason == "States are handed back of rows that are one sequence each, found packed sequences."


def test_layers_without_a_rule_in_chunks_leave_none(collected):
    model = zoo.causal_lm(**zoo.SMALL)
    out = compiled(model, capture=False)(input_ids=prompt(70), **zoo.held(zoo.new_cache(model, "dynamic")))
    assert zoo.relative(out.logits, model(input_ids=prompt(70)).logits) < 1e-5
    lifted = [layer.fused for layer in gdnfuse.reports()[0].layers]
    assert len(collected) == sum(lifted)  # a prompt of two chunks that is lifted leaves its states as one that is captured does


def test_a_graph_that_is_verified_leaves_none(collected):
    model = zoo.causal_lm(**zoo.SMALL)
    compiled(model, verify=True, strict=True)(input_ids=prompt(130), **zoo.held(zoo.new_cache(model, "dynamic")))
    assert not collected and gdnfuse.reports()[0].comparisons and fired(gdnfuse.reports()[0]) == []
