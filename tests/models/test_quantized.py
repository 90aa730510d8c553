"""Models of FP8 weights: prompts and steps, fused as plain ones are, as near to the dequantised float64 model as eager is."""

import copy
import dataclasses
import gc
import io
import itertools

import pytest
import torch
import transformers
from transformers.integrations import finegrained_fp8

import gdnfuse
from gdnfuse import formats, models, packing
from gdnfuse.capture_fp8 import dequantized_calls
from gdnfuse.errors import GdnfuseError
from gdnfuse.report.page import page
from gdnfuse.report.records import OWN_LIBRARY
from gdnfuse.report.text import render
from tests.models import zoo

TOKENS, STEPS = 21, 10  # logits of few tokens are a draw
SEEDS = itertools.count(1)
SIZES = {"filled": zoo.FILLED, "ragged": zoo.RAGGED, "mixed": zoo.FILLED | {"intermediate_size": 136}}
EXPERTS = {"moe_intermediate_size": 136, "shared_expert_intermediate_size": 128}  # gate and up in one weight share blocks


def quantized(sizes, dtype=torch.bfloat16, format="fp8_block128"):
    return models.quantized(zoo.causal_lm(**sizes).to(dtype), format)


@torch.no_grad()
def outputs(model, call, kind, batch=1):
    """Logits of a prompt and of the steps behind it."""
    cache = zoo.new_cache(model, kind)
    ids = zoo.prompt(batch, length=TOKENS)[0]
    first = call(input_ids=ids, **zoo.held(cache)).logits
    return first.flatten(), zoo.decode(call, cache, None, zoo.tokens_for(batch, STEPS)).flatten()


def compiled(model, **options):
    torch._dynamo.reset()
    options = {"inner": "eager", "strict": True, **options}
    return torch.compile(model, backend="gdnfuse", fullgraph=True, options=options)


def new_reports(since):
    return [r for r in gdnfuse.reports() if r.graph_id >= since]


def next_report():
    return max((r.graph_id for r in gdnfuse.reports()), default=-1) + 1


@pytest.mark.parametrize(
    ("sizes", "batch", "kind", "format"),
    [
        ("filled", 1, "static", "fp8_block128"),
        ("ragged", 2, "dynamic", "fp8_block128"),
        pytest.param("ragged", 1, "static", "fp8_block128", marks=pytest.mark.sweep),
        pytest.param("filled", 2, "static", "fp8_block128", marks=pytest.mark.sweep),
        pytest.param("filled", 1, "static", "int4_group32", marks=pytest.mark.sweep),
        ("mixed", 2, "dynamic", "int4_group64"),
        ("filled", 1, "static", "nf4_block64"),
    ],
)
def test_prompts_and_steps_are_fused_and_as_near_as_eager(sizes, batch, kind, format):
    model = quantized(SIZES[sizes], format=format)
    plain = zoo.dequantized(model)
    wide, oracle = zoo.in_float64(zoo.dequantized(model, torch.float64))
    wanted = outputs(wide, oracle, kind, batch)
    eager = outputs(plain, plain, kind, batch)
    since = next_report()
    found = outputs(model, compiled(model), kind, batch)
    errors = [(zoo.relative(f, w), zoo.relative(e, w)) for f, e, w in zip(found, eager, wanted, strict=True)]
    assert all(e > 1e-4 for _, e in errors), "eager's error must show, or nothing is compared"
    assert all(ours <= 1.1 * e for ours, e in errors), errors
    done = new_reports(since)
    assert [r.phase for r in done] == ["prefill", "decode"], "one graph for each, whatever the number of steps"
    for r in done:
        assert r.fused_layers == len(r.layers) == zoo.SMALL["num_hidden_layers"] - 1
        kinds = {p.name: p for p in r.projections}
        assert kinds["in_proj_qkv"].format == kinds["up_proj"].format == format
        assert (kinds["down_proj"].format == format) == (sizes != "mixed"), "whose columns are no whole groups"
        assert kinds["up_proj"].columns == SIZES[sizes]["hidden_size"]
        ops = [o.op for o in r.structures for o in o]
        assert not any("fp8" in op or "." in op for op in ops), "neither the hub's kernel nor DeepGEMM is in the graph"
    (layer,) = done[1].layers
    expected = ["in_proj_conv", "packed_decode"] if batch == 1 else zoo.MANY_ROWS
    assert [op for op in zoo.ops_without_views(layer) if op in ("in_proj_conv", "packed_decode", "mixer_decode")] == [
        op for op in expected if op != "linear"
    ]


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.sweep)])
def test_experts_are_dequantised_as_far_as_they_are_needed(batch, monkeypatch):
    """transformers would need kernels of the hub for them."""
    model = models.quantized(zoo.moe(**zoo.FILLED, **EXPERTS).bfloat16())
    plain = zoo.dequantized(model)
    wide, oracle = zoo.in_float64(zoo.dequantized(model, torch.float64))
    wanted, eager = outputs(wide, oracle, "static", batch), outputs(plain, plain, "static", batch)
    since, asked = next_report(), []
    of = formats.named("fp8_block128")
    counting = dataclasses.replace(of, dequantize=lambda data, *args: asked.append(data.shape) or of.dequantize(data, *args))
    run = compiled(model)
    with monkeypatch.context() as m:
        m.setitem(formats.FORMATS, "fp8_block128", counting)
        found = outputs(model, run, "static", batch)
    errors = [(zoo.relative(f, w), zoo.relative(e, w)) for f, e, w in zip(found, eager, wanted, strict=True)]
    assert all(ours <= 1.1 * theirs for ours, theirs in errors), errors
    of_experts = [shape for shape in asked if (2 * 136 in shape[-2:]) or shape[-1] == 136]
    assert of_experts and not any(len(s) == 3 and s[0] == 4 for s in of_experts), "never those of all experts at once"
    for report in new_reports(since):
        assert report.fused_layers == 1
        kinds = {p.name: p for p in report.projections}
        assert kinds["gate_up"].format == kinds["down"].format == "fp8_block128" and len(kinds["down"].paths) == 2
        assert kinds["gate_up"].bytes == 4 * (272 * 128 + 4 * 3)
        chosen = [r.rule for r in report.all_records if r.stage == "lower" and "experts" in r.rule]
        assert chosen == ["routed_experts" if batch == 1 and report.phase == "decode" else "experts"] * 2
        shared = [r.status.value for r in report.all_records if r.rule == "shared_expert"]
        assert shared == ["fired"] * 2 or not shared and report.phase == "prefill"


def right(model, run, batch=1):
    """What a compiled model gives is what its weights, dequantised, give now."""
    plain = zoo.dequantized(model)
    wanted = torch.cat(outputs(plain, plain, "static", batch))
    found = torch.cat(outputs(model, run, "static", batch))
    assert zoo.relative(found, wanted) < 1e-5
    return wanted


def weights(model):
    return [m for m in model.modules() if isinstance(m, finegrained_fp8.FP8Linear)]


def other(model):
    """A model of the same kind with other values, new ones at each call."""
    new = quantized(zoo.FILLED, torch.float32)
    torch.manual_seed(next(SEEDS))
    with torch.no_grad():
        for m in weights(new):
            m.weight_scale_inv.mul_(1.0 + torch.rand(m.weight_scale_inv.shape))
            m.weight.copy_(m.weight.float().roll(1, 0).to(m.weight.dtype))
    return new


def loaded(model):
    model.load_state_dict(other(model).state_dict())


def assigned(model):
    model.load_state_dict(other(model).state_dict(), assign=True)


def data(model):
    for mine, new in zip(weights(model), weights(other(model)), strict=True):
        mine.weight.data, mine.weight_scale_inv.data = new.weight.data, new.weight_scale_inv.data


def scale_alone(model):
    for m in weights(model):
        m.weight_scale_inv.data = m.weight_scale_inv.data * 1.5


def in_place(model):
    with torch.no_grad():
        for m in weights(model):
            m.weight_scale_inv.mul_(0.7)


def parameter(model):
    for mine, new in zip(weights(model), weights(other(model)), strict=True):
        mine.weight, mine.weight_scale_inv = new.weight, new.weight_scale_inv


def bytes_of(model):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}.values())


def live(least):
    """Memory of tensors of at least so many elements, by its address."""
    gc.collect()
    found = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_meta and type(t).__name__ != "FakeTensor"]
    return {t.untyped_storage().data_ptr() for t in found if t.numel() >= least}


def test_whatever_is_done_to_weights_results_are_theirs_and_nothing_is_kept(tmp_path, set_aside):
    model = quantized(zoo.FILLED, torch.float32)
    size, least = bytes_of(model), min(m.weight.numel() for m in weights(model))
    run = compiled(model)
    before, seen = live(least), []
    since = next_report()
    for event in (None, loaded, assigned, data, scale_alone, in_place, parameter):
        if event is not None:
            event(model)
        seen.append(right(model, run))
        assert event is None or zoo.relative(seen[-1], seen[-2]) > 1e-3, f"{event.__name__} must show in the results"
        assert bytes_of(model) == size
        # Buffers hold what weights are parts of; no dequantised weight is among what lives.
        ranges = [(b.data_ptr(), b.data_ptr() + b.nbytes) for b in packing._buffers.values()]
        mine = {p.data_ptr() for p in model.parameters()}
        more = {a for a in live(least) - before - mine if not any(first <= a < end for first, end in ranges)}
        assert not more, f"{len(more)} tensors as large as a weight stay alive"
    assert len(new_reports(since)) == 2, "none of it needs another graph"
    packed = [m.weight for m in weights(model) if m.weight.untyped_storage() in packing._ranges]
    assert len(packed) == 2 + 3 + 2 + 2, "qkv and z, q, k and v, and gate and up of each layer"

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert len(file.getvalue()) < size + 2**16, "each weight is saved as its own bytes"
    file.seek(0)
    new = quantized(zoo.FILLED, torch.float32)
    new.load_state_dict(torch.load(file))
    assert torch.equal(right(new, compiled(new)), seen[-1])
    copied = copy.deepcopy(model)
    assert torch.equal(right(copied, compiled(copied)), seen[-1])
    model.to("meta")
    gc.collect()


def test_what_stays_with_its_own_library_is_told_beside_what_is_fused(monkeypatch):
    def kernel(input, weight, *others, **more):
        return input.new_zeros(*input.shape[:-1], weight.shape[0])

    monkeypatch.setattr(finegrained_fp8, "finegrained_fp8_linear", torch.compiler.allow_in_graph(kernel))
    monkeypatch.setattr(finegrained_fp8, "is_deepgemm_loadable", lambda: False)
    model = quantized(zoo.FILLED)
    for layer in model.model.layers:
        layer.mlp.down_proj.block_size = (64, 64)
    outputs(model, compiled(model), "static")
    for report in gdnfuse.reports()[-2:]:
        found = {p.name: p for p in report.projections}
        own = found["down_proj"]
        assert (own.format, own.computed, own.paths) == (
            "FP8Linear",
            OWN_LIBRARY,
            [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)],
        )
        assert own.reason.startswith(
            "A projection must be torch's linear on a weight of a known format, found FP8Linear, which calls "
        )
        assert own.bytes == 128 * 256 + 4 * 2
        assert ", 2 of 16 linears left to their own library" in report.summary() and report.fused_layers == 1
        assert {p.computed for p in found.values() if p is not own} <= {"reference inlined", "library"}
        qkv, head = found["in_proj_qkv"], found["lm_head"]
        assert (qkv.format, qkv.rows, qkv.columns, qkv.bytes) == ("fp8_block128", 256, 128, 256 * 128 + 4 * 2)
        assert (head.format, head.bytes, head.reason) == ("bfloat16", 2 * 128 * 128, "")
        text = render(report)
        assert "FP8Linear" in text and "its own library" in text and "FP8Linear" in page([report], {"model": "one"})
        assert sum(len(p.paths) for p in report.projections) == 16
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("format", "found"),
    [
        ("fp8_block128", "Float8"),
        pytest.param("int4_group64", "'NoneType' object has no attribute 'data'", marks=pytest.mark.sweep),
    ],
)
def test_adapters_on_quantised_weights_keep_working(format, found):
    peft = pytest.importorskip("peft")
    model = quantized(zoo.FILLED, torch.float32, format)
    config = peft.LoraConfig(r=4, target_modules=["in_proj_qkv", "out_proj", "gate_proj", "q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval().requires_grad_(False)
    run = compiled(adapted.base_model.model, strict=False)
    with_adapter = right(adapted.base_model.model, run)
    with adapted.disable_adapter():
        without = right(adapted.base_model.model, run)
    assert zoo.relative(with_adapter, without) > 1e-3
    # A few bits do not hold what merging makes; torch, or peft that finds no weight, raises before anything has changed.
    with pytest.raises((RuntimeError, NotImplementedError, AttributeError), match=found):
        adapted.merge_adapter()
    assert torch.equal(right(adapted.base_model.model, run), with_adapter)
    assert all(r.fused_layers == len(r.layers) for r in gdnfuse.reports()[-2:])


def test_one_scale_a_weight_and_half_a_model():
    model = quantized(zoo.RAGGED, torch.float32, "fp8_tensor")
    right(model, compiled(model))
    half = zoo.causal_lm(**zoo.FILLED)
    mlp = half.model.layers[0].mlp
    mlp.up_proj = models.quantized(torch.nn.ModuleDict({"up_proj": mlp.up_proj}))["up_proj"]
    right(half, compiled(half))
    assert len(weights(half)) == 1


@pytest.mark.parametrize("format", ["fp8_block128", "fp8_tensor"])
def test_a_saved_model_is_a_checkpoint_of_its_format(format, tmp_path):
    model = quantized(zoo.FILLED, format=format)
    plain = zoo.dequantized(model).state_dict()
    model.save_pretrained(tmp_path)
    how = transformers.FineGrainedFP8Config(dequantize=True)  # the default where there is no GPU
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=how)
    assert found.state_dict().keys() == plain.keys()
    assert all(torch.equal(p, plain[name]) for name, p in found.state_dict().items())


@pytest.mark.sweep
def test_static_activation_scales_are_not_needed():
    """They say how activations are quantised, which ours are not."""
    model = quantized(zoo.FILLED, torch.float32)
    plain = right(model, compiled(model))
    for m in weights(model):
        m.activation_scale = torch.nn.Parameter(torch.tensor(1e-3), requires_grad=False)
    assert torch.equal(right(model, compiled(model)), plain)


@pytest.mark.parametrize("format", ["int9", "dequantize"])
def test_a_model_is_quantised_to_known_formats(format):
    known = "fp8_block128, fp8_tensor, .*int4_group32.*"
    with pytest.raises(GdnfuseError, match=rf"^A model can be quantised to .*{known}, found '{format}'\.$"):
        models.quantized(torch.nn.Sequential(torch.nn.Linear(2, 2)), format)


def test_a_model_without_linears_has_nothing_to_quantise():
    with pytest.raises(GdnfuseError, match="must have linears other than its head with whole groups of columns, found none"):
        models.quantized(torch.nn.Sequential(torch.nn.LayerNorm(2)))


@torch.no_grad()
def test_prompts_quantise_their_activations_if_asked_to_and_steps_do_not():
    """In float32 they do what eager does whose linears quantise; a number that is rounded the other way shows a little."""
    model, ids, tokens = quantized(zoo.FILLED, torch.float32), zoo.prompt(1, length=40)[0], zoo.tokens_for(1, 3)
    run = lambda call, cache: call(input_ids=ids, **zoo.held(cache)).logits  # noqa: E731
    caches = [zoo.new_cache(model, "static", length=48) for _ in range(3)]
    with dequantized_calls(model, activations="fp8"):
        wanted = run(model, caches[0])
    with dequantized_calls(model):
        exact, steps = run(model, caches[1]), zoo.decode(model, caches[0], None, tokens)
    since, call = next_report(), compiled(model, activations="fp8")
    found = run(call, caches[2])
    assert zoo.relative(found, wanted) < 1e-2 and zoo.relative(wanted, exact) > 5e-2
    assert zoo.relative(zoo.decode(call, caches[2], None, tokens), steps) < 1e-2
    prefill, decode = new_reports(since)
    assert [r.fused_layers for r in (prefill, decode)] == [1, 1]
    of_linears = {p.computed for p in prefill.projections if p.format == "fp8_block128"}
    assert of_linears == {"reference inlined (activations in e4m3)"}
    assert {p.computed for p in decode.projections if p.format == "fp8_block128"} <= {"reference inlined", "library"}
    (said,) = [r.reason for r in decode.all_records if r.rule == "activations"]
    assert said.startswith("A step of few rows is as fast as its weights are read")


def test_a_model_without_weights_in_e4m3_cannot_quantise_activations():
    sentence = (
        r"^activations='fp8' needs weights in e4m3, found none in the model: load an FP8 checkpoint, or leave the option out\.$"
    )
    for model in (zoo.causal_lm(**zoo.FILLED), quantized(zoo.FILLED, format="int8_channel")):
        with pytest.raises(GdnfuseError, match=sentence):
            gdnfuse.compile(model, activations="fp8")
