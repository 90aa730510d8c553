"""The main job: every GDN layer of every decode graph is fused, and the results are eager's."""

import copy

import pytest
import torch

import gdnfuse
from tests.models import zoo
from tests.sweeps import ALL, pairs, some

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [(1, False), (2, True), (5, False), (1, True), (2, False), (5, True)]
# Each family with each cache, and with and without capture; dtypes, and what pads and repeats, in turn. Or one of each.
CASES = [
    ("causal_lm", "dynamic", "bf16", 2, True, True), ("moe", "dynamic", "fp32", 5, False, False),
    ("moe", "static", "fp16", 1, True, True), ("conditional_generation", "dynamic", "fp16", 5, True, True),
]  # fmt: skip
if ALL:
    axes = pairs(family=list(zoo.FAMILIES), cache=["static", "dynamic"], dtype=list(DTYPES), capture=[False, True])[1]
    CASES = [(*case, *SHAPES[i % len(SHAPES)], capture) for i, (*case, capture) in enumerate(axes)]


def compiled(model, **options):
    return torch.compile(model, backend="gdnfuse", fullgraph=True, options={"inner": "eager", "strict": True, **options})


def decode_reports():
    return [r for r in gdnfuse.reports() if r.phase == "decode"]


def assert_all_fused(reports, layers=zoo.GDN_LAYERS, batch=2):
    assert reports
    for report in reports:
        assert report.phase == "decode" and len(report.layers) == layers
        for layer in report.layers:
            assert layer.fused, layer.why_not
            assert zoo.ops_without_views(layer) == (zoo.ONE_ROW if batch == 1 else zoo.MANY_ROWS)


@pytest.mark.parametrize(("family", "cache", "dtype", "batch", "padded", "capture"), CASES)
def test_fused_and_no_less_accurate_than_eager(family, cache, dtype, batch, padded, capture):
    # Of one family several layers; of the others one of a kind will do.
    sizes, layers = ({}, zoo.GDN_LAYERS) if family == "causal_lm" else (zoo.SMALL, 1)
    model = zoo.FAMILIES[family](**sizes).to(DTYPES[dtype])
    ours = copy.deepcopy(model)
    wide, oracle = zoo.in_float64(model)
    run = compiled(ours, capture=capture)
    # Many short sequences in one figure: the error of a single one of a toy is a draw, 0.5 to 1.6 times eager's.
    logits, caches = {}, {}
    for name, owner, call in (("ours", ours, run), ("eager", model, model), ("oracle", wide, oracle)):
        logits[name], caches[name] = [], []
        for seed in range(10):
            with zoo.Float64() if name == "oracle" else torch.no_grad():
                state, mask = zoo.prefill(owner, batch, cache, padded, seed=seed)
            logits[name].append(zoo.decode(call, state, mask, zoo.tokens_for(batch, 12, seed)))
            caches[name].append(state)
    assert_all_fused(gdnfuse.reports(), layers, batch)
    # A static cache is one graph for all steps; a dynamic one is traced once more when Dynamo makes its length symbolic.
    assert len(gdnfuse.reports()) == (1 if cache == "static" else 2)
    floor = 1e-6 if dtype == "fp32" else 0.0
    results = {name: torch.stack(logits[name]) for name in logits}
    assert results["ours"].dtype == results["eager"].dtype
    assert zoo.relative(results["ours"], results["oracle"]) <= 1.1 * zoo.relative(results["eager"], results["oracle"]) + floor
    for kind in ("recurrent", "conv"):
        for a, e in zip(zoo.states(caches["ours"][0])[kind], zoo.states(caches["eager"][0])[kind], strict=True):
            assert a.dtype == e.dtype and a.shape == e.shape
        a, e, o = (torch.stack([zoo.flat_states(c, kind) for c in caches[n]]) for n in ("ours", "eager", "oracle"))
        assert zoo.relative(a, o) <= 1.1 * zoo.relative(e, o) + floor


STEPS = pytest.mark.parametrize("steps", [96, pytest.param(512, marks=pytest.mark.sweep)])


@STEPS
def test_many_steps_in_fp32_equal_eager(steps):
    model = zoo.causal_lm(**({} if ALL else zoo.SMALL))
    ours = copy.deepcopy(model)
    tokens = zoo.tokens_for(2, steps)
    a, mask = zoo.prefill(ours, 2, "static", length=steps + 128)
    e, _ = zoo.prefill(model, 2, "static", length=steps + 128)
    found, wanted = zoo.decode(compiled(ours), a, mask, tokens), zoo.decode(model, e, mask, tokens)
    assert len(gdnfuse.reports()) == 1
    assert zoo.relative(found, wanted) < 1e-5
    for kind in ("recurrent", "conv"):
        for x, y in zip(zoo.states(a)[kind], zoo.states(e)[kind], strict=True):
            assert zoo.relative(x, y) < 1e-5


@STEPS
@pytest.mark.parametrize("dtype", some(["bf16", "fp16"], "bf16"))
def test_many_steps_in_half_precision_stay_within_eagers_error(dtype, steps):
    model = zoo.causal_lm(**({} if ALL else zoo.SMALL)).to(DTYPES[dtype])
    ours = copy.deepcopy(model)
    wide, oracle = zoo.in_float64(model)
    tokens = zoo.tokens_for(2, steps)
    results, caches = {}, {}
    for name, owner, call in (("ours", ours, compiled(ours)), ("eager", model, model), ("oracle", wide, oracle)):
        with zoo.Float64() if name == "oracle" else torch.no_grad():
            caches[name], mask = zoo.prefill(owner, 2, "static", length=steps + 128)
        results[name] = zoo.decode(call, caches[name], mask, tokens)
    assert zoo.relative(results["ours"], results["oracle"]) <= 1.1 * zoo.relative(results["eager"], results["oracle"])
    for kind in ("recurrent", "conv"):
        a, e, o = (zoo.flat_states(caches[n], kind) for n in ("ours", "eager", "oracle"))
        assert zoo.relative(a, o) <= 1.1 * zoo.relative(e, o)


def test_packing_is_invisible_to_eager_calls_before_between_and_after():
    model = zoo.causal_lm(**zoo.SMALL)
    reference = copy.deepcopy(model)
    tokens = zoo.tokens_for(2, 3)

    def eager(m):
        cache, mask = zoo.prefill(m, 2, "static")
        return zoo.decode(m, cache, mask, tokens)

    wanted = eager(reference)
    assert torch.equal(eager(model), wanted)
    run = compiled(model)
    for _ in range(2):
        cache, mask = zoo.prefill(model, 2, "static")
        assert zoo.relative(zoo.decode(run, cache, mask, tokens), wanted) < 1e-5
        assert torch.equal(eager(model), wanted)
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), reference.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name


def test_changing_batch_sizes_stay_fused_when_the_batch_turns_symbolic():
    model = zoo.causal_lm(**zoo.SMALL)
    ours = copy.deepcopy(model)
    run = compiled(ours)
    for batch in (2, 3, 5, 7):
        tokens = zoo.tokens_for(batch, 2)
        cache, mask = zoo.prefill(ours, batch, "static")
        other, _ = zoo.prefill(model, batch, "static")
        assert zoo.relative(zoo.decode(run, cache, mask, tokens), zoo.decode(model, other, mask, tokens)) < 1e-5
    assert_all_fused(gdnfuse.reports(), layers=1)
    assert len(gdnfuse.reports()) == 2


HEADS = [(1, 3, 24, 40), (4, 4, 16, 8), (2, 16, 8, 8)]


@pytest.mark.parametrize(
    ("heads", "capture"),
    [(h, c) for h in HEADS for c in (False, True)] if ALL else [(HEADS[0], False), (HEADS[1], True)],
)
def test_head_counts_and_dims(heads, capture):
    H, HV, K, V = heads
    model = zoo.causal_lm(
        **zoo.SMALL, linear_num_key_heads=H, linear_num_value_heads=HV, linear_key_head_dim=K, linear_value_head_dim=V
    )
    ours = copy.deepcopy(model)
    tokens = zoo.tokens_for(2, 3)
    a, mask = zoo.prefill(ours, 2, "static")
    e, _ = zoo.prefill(model, 2, "static")
    run = compiled(ours, capture=capture)
    assert zoo.relative(zoo.decode(run, a, mask, tokens), zoo.decode(model, e, mask, tokens)) < 1e-5
    assert_all_fused(gdnfuse.reports(), layers=1)


@pytest.mark.parametrize(("batch", "padded"), [(1, False), (2, True), (3, False)] if ALL else [(1, False), (2, True)])
def test_attention_on_a_cache_that_grows_is_one_op_in_a_graph_for_all_lengths(batch, padded):
    model = zoo.causal_lm(**zoo.SMALL, num_attention_heads=6, num_key_value_heads=2, head_dim=24)
    ours = copy.deepcopy(model)
    tokens = zoo.tokens_for(batch, 40)
    a, mask = zoo.prefill(ours, batch, "dynamic", padded)
    e, _ = zoo.prefill(model, batch, "dynamic", padded)
    assert zoo.relative(zoo.decode(compiled(ours), a, mask, tokens), zoo.decode(model, e, mask, tokens)) < 1e-5
    for mine, theirs in zip(a.layers, e.layers, strict=True):
        if isinstance(getattr(mine, "keys", None), torch.Tensor):
            assert mine.keys.shape[-2] == mine.values.shape[-2] == 45
            assert zoo.relative(mine.keys, theirs.keys) < 1e-5 and zoo.relative(mine.values, theirs.values) < 1e-5
    assert len(decode_reports()) == 2  # one for the first length, and one for all others
    for report in decode_reports():
        lifted = [r for r in report.all_records if r.rule == "attention_growing" and r.stage == "lift"]
        assert [r.status for r in lifted] == ["fired"]
        assert not [r for r in report.all_records if r.rule == "attention_few_queries"]
        (attention,) = [b for b in report.blocks if b.kind == "full attention"]
        after = [o.op for o in report.structures[attention.after]]
        assert "attention_growing" in after and not {"scaled_dot_product_attention", "cat"} & set(after)


@pytest.mark.sweep
def test_inductor_on_cpu():
    """As `make demo` does, which .ci/run runs too."""
    model = zoo.causal_lm(**zoo.SMALL)
    ours = copy.deepcopy(model)
    tokens = zoo.tokens_for(2, 4)
    a, mask = zoo.prefill(ours, 2, "static")
    e, _ = zoo.prefill(model, 2, "static")
    run = torch.compile(ours, backend="gdnfuse", fullgraph=True, options={"strict": True})
    assert zoo.relative(zoo.decode(run, a, mask, tokens), zoo.decode(model, e, mask, tokens)) < 1e-5
    assert_all_fused(gdnfuse.reports(), layers=1)
    for kind in ("recurrent", "conv"):
        for x, y in zip(zoo.states(a)[kind], zoo.states(e)[kind], strict=True):
            assert zoo.relative(x, y) < 1e-5
