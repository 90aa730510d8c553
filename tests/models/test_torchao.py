"""Weights of torchao: subclasses of torch's tensor, read as the data and scales that they are made of."""

import copy
import gc

import pytest
import torch

import gdnfuse
from gdnfuse import packing
from gdnfuse.errors import Refused
from gdnfuse.formats import named
from gdnfuse.passes import subclasses
from gdnfuse.report.records import OWN_LIBRARY
from tests.models import zoo
from tests.sweeps import some

quantization = pytest.importorskip("torchao.quantization")
CONFIGS = {
    "int8": (lambda: quantization.Int8WeightOnlyConfig(version=2), "int8_channel"),
    "fp8": (lambda: quantization.Float8WeightOnlyConfig(), "fp8_channel"),
}
PLAIN = ("lm_head", "in_proj_a", "in_proj_b")


def quantized(config, dtype=torch.bfloat16, skip=PLAIN):
    model = zoo.causal_lm(**zoo.FILLED).to(dtype)
    of = lambda module, name: isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] not in skip  # noqa: E731
    quantization.quantize_(model, config, filter_fn=of)
    return model.requires_grad_(False)


def dequantized(model):
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, torch.nn.Linear) and hasattr(module.weight, "dequantize") and hasattr(module.weight, "qdata"):
            module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return plain


@torch.no_grad()
def outputs(model, call, batch=1):
    cache = zoo.new_cache(model, "static")
    first = call(input_ids=zoo.prompt(batch, length=9)[0], **zoo.held(cache)).logits
    return torch.cat([first.flatten(), zoo.decode(call, cache, None, zoo.tokens_for(batch, 3)).flatten()])


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="gdnfuse", fullgraph=True, options={"inner": "eager", "strict": True})


@pytest.mark.parametrize("format", some(CONFIGS, "fp8"))
def test_a_model_is_fused_as_a_plain_one(format):
    config, name = CONFIGS[format]
    model = quantized(config())
    plain = dequantized(model)
    wide, oracle = zoo.in_float64(plain)
    wanted, eager, run = outputs(wide, oracle), outputs(plain, plain), compiled(model)
    found = outputs(model, run)
    assert zoo.relative(found, wanted) <= 1.1 * zoo.relative(eager, wanted)
    prefill, decode = gdnfuse.reports()[-2:]
    for report in (prefill, decode):
        assert report.fused_layers == 1
        kinds = {p.name: p for p in report.projections}
        assert {kinds[n].format for n in ("in_proj_qkv", "in_proj_z", "q_proj", "up_proj", "down_proj")} == {name}
        assert kinds["in_proj_qkv"].bytes == 256 * 128 + 4 * 256 and kinds["in_proj_a"].format == "bfloat16"
        assert not any(p.computed == OWN_LIBRARY for p in report.projections)
    assert zoo.ops_without_views(decode.layers[0])[1:] == ["in_proj_conv", "packed_decode", "dequantize"]
    # Data and scales of siblings are parts of one buffer each: the subclass holds its part.
    linear = model.model.layers[0].linear_attn
    qkv, z = linear.in_proj_qkv.weight, linear.in_proj_z.weight
    assert z.qdata.data_ptr() == qkv.qdata.data_ptr() + qkv.qdata.nbytes
    assert z.scale.data_ptr() == qkv.scale.data_ptr() + qkv.scale.nbytes
    assert torch.equal(qkv.dequantize(), plain.model.layers[0].linear_attn.in_proj_qkv.weight)


def test_weights_may_be_exchanged():
    model = quantized(CONFIGS["int8"][0](), torch.float32)
    run = compiled(model)
    first = outputs(model, run)
    assert zoo.relative(first, outputs(dequantized(model), dequantized(model))) < 1e-5
    graphs = len(gdnfuse.reports())
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.gate_proj.weight, mlp.up_proj.weight = mlp.up_proj.weight, mlp.gate_proj.weight
    second = outputs(model, run)
    with torch.no_grad():
        model.model.layers[0].linear_attn.in_proj_z.weight.scale.mul_(1.5)
    third = outputs(model, run)
    for found, before in ((second, first), (third, second)):
        assert zoo.relative(found, before) > 1e-3
    assert zoo.relative(third, outputs(dequantized(model), dequantized(model))) < 1e-5
    assert len(gdnfuse.reports()) == graphs, "none of it needs another graph"
    del model, run, layer, mlp
    torch._dynamo.reset()
    gc.collect()
    assert not [b for b in packing._buffers.values() if b.dtype == torch.int8], "and nothing is kept"


@pytest.mark.parametrize(
    ("config", "tolerance", "sentence"),
    [
        (
            lambda: quantization.Int8DynamicActivationInt8WeightConfig(version=2),
            5e-2,  # activations that differ in the last bit fall to other integers
            "A weight of torchao must have no quantised activations, found Int8Tensor with act_quant_kwargs.",
        ),
        (
            lambda: quantization.Int8WeightOnlyConfig(granularity=quantization.PerGroup(32), version=2),
            1e-5,
            "A weight of torchao's Int8Tensor must have a scale per row, found one per block of [1, 32].",
        ),
    ],
)
def test_other_weights_are_torchaos_with_a_sentence(config, tolerance, sentence):
    model = quantized(config(), torch.float32, skip=(*PLAIN, "q_proj"))
    found = outputs(model, compiled(model))
    assert zoo.relative(found, outputs(model, model)) < tolerance
    report = gdnfuse.reports()[-1]
    assert report.fused_layers == 1 and sentence in {r.sentence for r in report.refusals}
    kinds = {p.name: p for p in report.projections}
    assert kinds["up_proj"].computed == OWN_LIBRARY and kinds["up_proj"].format == "Int8Tensor"
    assert kinds["q_proj"].computed != OWN_LIBRARY


def test_int4_is_refused_by_name():
    """Of torchao 0.18 none of its packings is made without a GPU; this is what the plain one holds."""
    int4 = pytest.importorskip("torchao.quantization.quantize_.workflows.int4.int4_tensor")
    qdata, scale = torch.zeros(128, 128, dtype=torch.int8), torch.ones(2, 128, dtype=torch.bfloat16)
    weight = int4.Int4Tensor(qdata, scale, torch.zeros_like(scale), [1, 128], torch.Size([128, 256]))
    with pytest.raises(Refused) as e:
        subclasses.format_of(weight)
    assert e.value.reason == (
        "A weight that is a subclass must be one of torchao's Int8Tensor and Float8Tensor, found "
        f"{int4.Int4Tensor.__module__}.Int4Tensor: each packing of torchao has the order of one of its "
        "kernels, so load int4 from a checkpoint of compressed-tensors (W4A16)."
    )


@pytest.mark.parametrize("format", CONFIGS)
def test_means_what_torchao_makes_of_it(format):
    config, name = CONFIGS[format]
    for dtype in (torch.bfloat16, torch.float32):
        linear = torch.nn.Sequential(torch.nn.Linear(136, 72, bias=False, dtype=dtype))
        quantization.quantize_(linear, config())
        weight = linear[0].weight
        named(name).check(weight.qdata, weight.scale)
        found = torch.ops.gdnfuse.dequantize(weight.qdata, weight.scale, name, dtype)
        assert torch.equal(found, weight.dequantize())
