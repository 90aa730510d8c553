"""Weights of bitsandbytes: those of four bits are read as they are stored; of what stays with the library a sentence tells."""

import copy
import operator

import pytest
import torch

import gdnfuse
from gdnfuse import formats, models
from gdnfuse.errors import Refused
from gdnfuse.generation import weights
from gdnfuse.report.records import OWN_LIBRARY
from tests.models import zoo
from tests.pages import ROOT, blocks, redirect_hub

bnb = pytest.importorskip("bitsandbytes")
PLAIN = ("lm_head", "in_proj_a", "in_proj_b")


def linear_of(linear, kind, nested=True, for_this_cpu=False):
    """A linear as transformers' BitsAndBytesConfig makes it."""
    size, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(*size, bias=linear.bias is not None, has_fp16_weights=False, threshold=6.0)
    else:
        new = bnb.nn.Linear4bit(
            *size, bias=linear.bias is not None, compute_dtype=dtype, quant_type=kind, compress_statistics=nested
        )
        new.support_avx512bf16_for_cpu = for_this_cpu
    new.load_state_dict(linear.state_dict())
    return new.to("cpu").eval().requires_grad_(False)


def quantized(kind, dtype=torch.bfloat16, **options):
    model = zoo.causal_lm(**zoo.FILLED).to(dtype)
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name.rpartition(".")[2] not in PLAIN:
            model.set_submodule(name, linear_of(module, kind, **options))
    return model.requires_grad_(False)


def weight_of(linear, dtype=torch.float32):
    return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(dtype)


def dequantized(model):
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            new = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            new.weight = torch.nn.Parameter(weight_of(module, module.compute_dtype), requires_grad=False)
            plain.set_submodule(name, new.eval())
    return plain


@torch.no_grad()
def outputs(model, call):
    cache = zoo.new_cache(model, "static")
    first = call(input_ids=zoo.prompt(1, length=9)[0], **zoo.held(cache)).logits
    return torch.cat([first.flatten(), zoo.decode(call, cache, None, zoo.tokens_for(1, 3)).flatten()])


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="gdnfuse", fullgraph=True, options={"inner": "eager", "strict": True})


@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), pytest.param("fp4", False, marks=pytest.mark.sweep)])
def test_a_model_is_fused_as_a_plain_one(kind, nested):
    model = quantized(kind, torch.float32, nested=nested)
    plain, run = dequantized(model), compiled(model)
    found = outputs(model, run)
    assert zoo.relative(found, outputs(plain, plain)) < 1e-5
    prefill, decode = gdnfuse.reports()[-2:]
    for report in (prefill, decode):
        assert report.fused_layers == 1 and not any(p.computed == OWN_LIBRARY for p in report.projections)
        kinds = {p.name: p for p in report.projections}
        assert {kinds[n].format for n in ("in_proj_qkv", "in_proj_z", "q_proj", "up_proj", "down_proj")} == {kind}
        blocks = 256 * 128 // 64
        magnitudes = blocks + 4 * (blocks // 256) + 4 * 256 + 4 if nested else 4 * blocks
        assert kinds["in_proj_qkv"].bytes == 256 * 128 // 2 + magnitudes and kinds["in_proj_a"].format == "float32"
    # Weights may change, and be exchanged, between calls.
    graphs, mlp = len(gdnfuse.reports()), model.model.layers[0].mlp
    mlp.down_proj.weight.quant_state.absmax.fill_(1)
    mlp.gate_proj.weight, mlp.up_proj.weight = mlp.up_proj.weight, mlp.gate_proj.weight
    changed, plain = outputs(model, run), dequantized(model)
    assert zoo.relative(changed, found) > 1e-2 and len(gdnfuse.reports()) == graphs
    assert zoo.relative(changed, outputs(plain, plain)) < 1e-5


def test_a_model_whose_weights_are_kept_for_kernels_is_packed_and_fused():
    model = quantized("nf4", torch.float32)
    plain, data = dequantized(model), model.model.layers[0].mlp.down_proj.weight.data_ptr()
    models.keep_four_bit(model)
    assert model.model.layers[0].mlp.down_proj.weight_packed.data_ptr() == data, "no copy of what is stored"
    run = compiled(model)
    assert zoo.relative(outputs(model, run), outputs(plain, plain)) < 1e-5
    for report in gdnfuse.reports()[-2:]:
        kinds = {p.name: p.format for p in report.projections}
        assert report.fused_layers == 1
        assert {kinds[n] for n in ("in_proj_qkv", "in_proj_z", "q_proj", "up_proj", "down_proj")} == {"nf4_block64"}
    gate, up = (getattr(model.model.layers[0].mlp, name).weight_packed for name in ("gate_proj", "up_proj"))
    assert up.data_ptr() == gate.data_ptr() + gate.nbytes, "one weight"


def test_the_page_loads_such_a_model(monkeypatch, tmp_path):
    redirect_hub(monkeypatch, tmp_path, **zoo.FILLED)
    (block,) = blocks(ROOT / "docs" / "quantised.md", "python bitsandbytes")
    exec(compile(block.replace('"cuda"', '"cpu"'), "quantised.md", "exec"), scope := {})
    assert scope["model"].model.layers[0].mlp.down_proj.format == "nf4_block64"


@pytest.mark.parametrize("of", ["absmax", "offset", "state2.absmax"])
def test_magnitudes_are_among_what_prefixes_are_kept_by(of):
    model = torch.nn.Sequential(linear_of(torch.nn.Linear(64, 64), "nf4"))
    before = weights._digest(model, [])
    assert weights._digest(model, []) == before
    operator.attrgetter(of)(model[0].weight.quant_state).add_(1)
    assert weights._digest(model, []) != before


@pytest.mark.parametrize(
    ("options", "called", "remedy"),
    [
        ({"kind": "int8"}, "int8_vectorwise_quant", "load a checkpoint in int8 of compressed-tensors."),
        pytest.param(
            {"kind": "nf4", "for_this_cpu": True},
            "gemv_4bit",
            "set support_avx512bf16_for_cpu = False on each Linear4bit",
            marks=pytest.mark.sweep,
        ),
    ],
)
def test_what_stays_bitsandbytes_is_told_beside_a_fused_mixer(options, called, remedy):
    model = quantized(**options)
    outputs(model, model)  # after which nothing of a weight changes its form any more
    if called == "gemv_4bit":
        weight = model.model.layers[0].mlp.up_proj.weight
        if not getattr(weight.quant_state, "packing_format_for_cpu", False):
            pytest.skip("this CPU has no such format")
    found = outputs(model, compiled(model))
    assert zoo.relative(found, outputs(model, model)) < 5e-2
    report = gdnfuse.reports()[-1]
    kinds = {p.name: p for p in report.projections}
    assert report.fused_layers == 1 and kinds["in_proj_a"].computed != OWN_LIBRARY
    own = [p for p in report.projections if p.computed == OWN_LIBRARY]
    assert {p.name for p in own} == {n for n in kinds if n not in PLAIN}
    for p in own:
        assert p.reason.startswith(f"A projection is bitsandbytes' {called}, a format ") and remedy in p.reason
    assert "linears left to their own library" in report.summary()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(192, 256), (130, 128), (3, 64)])
def test_means_what_bitsandbytes_makes_of_it(shape, nested, kind):
    for dtype in (torch.bfloat16, torch.float32):
        made = linear_of(torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype), kind, nested)
        data, scale, *more = stored(made)
        formats.named(kind).check(data, scale, *more)
        found = torch.ops.gdnfuse.dequantize(data, scale, kind, dtype, more)
        assert torch.equal(found, weight_of(made, dtype))


def test_blocks_may_begin_within_a_row():
    """Which bitsandbytes 0.50.2's kernel for CPUs gets wrong: its other code, as ours, is nearer to what was quantised."""
    data, scale, *more = stored(made := linear_of(linear := torch.nn.Linear(96, 130, bias=False), "nf4", nested=False))
    formats.named("nf4").check(data, scale, *more)
    found = formats.named("nf4").dequantize(data, scale, torch.float32, *more)
    places = [place for byte in made.weight.data.flatten().tolist() for place in (byte >> 4, byte & 15)]
    assert torch.equal(made.weight.quant_state.code, torch.tensor(formats.four_bit.TABLES["nf4"]))
    wanted = [made.weight.quant_state.code[place] * scale[i // 64] for i, place in enumerate(places)]
    assert torch.equal(found, torch.stack(wanted).view(130, 96))
    assert zoo.relative(found, linear.weight) <= zoo.relative(weight_of(made), linear.weight)


def stored(linear):
    state, N = linear.weight.quant_state, linear.in_features
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [linear.weight.data.view(-1, N // 2), state.absmax, *nested]


WRONG = {
    "data": (0, lambda x: x.int(), r"^Data of nf4 must be a matrix of uint8, found int32 \[192, 128\]\.$"),
    "magnitudes": (1, lambda x: x[:-1], r"^The scale of nf4 must be one number for each block .* found uint8 \[767\]\.$"),
    "their dtype": (1, lambda x: x.float(), r"^The scale of nf4 must be uint8 here, found float32 \[768\]\.$"),
    "table": (3, lambda x: x[:8], r"^Besides data and scale nf4 must have nothing, or .* found float32 \[3\], float32 \[8\], "),
    "scale of scales": (2, lambda x: x[:1], r"quantised 3 numbers, a table of 256 and an offset, in float32, found "),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_such_weight_is_refused(what):
    place, change, sentence = WRONG[what]
    tensors = stored(linear_of(torch.nn.Linear(256, 192, bias=False), "nf4"))
    tensors[place] = change(tensors[place])
    with pytest.raises(Refused, match=sentence):
        formats.named("nf4").check(*tensors)
