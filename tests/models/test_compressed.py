"""Checkpoints of compressed-tensors whose weights stay compressed, against the same checkpoints loaded dequantised."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import gdnfuse
from gdnfuse import models
from gdnfuse.errors import GdnfuseError
from gdnfuse.report.records import OWN_LIBRARY
from gdnfuse.stored_linear import StoredLinear
from tests.models import zoo
from tests.pages import ROOT, blocks

pytest.importorskip("compressed_tensors")
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
ZERO = {**INT4, "symmetric": False}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
# Weights, activations, how they are stored, and what the format is called here.
CHECKPOINTS = {
    "w4a16": (INT4, None, "pack-quantized", "int4_group32"),
    "w4a16-zero": (ZERO, None, "pack-quantized", "int4_group32_zero"),
    "fp8-dynamic": (FP8, {**FP8, "strategy": "token", "dynamic": True}, "float-quantized", "fp8_channel"),
    "fp8-block": ({**FP8, "strategy": "block", "block_structure": [128, 128]}, None, "float-quantized", "fp8_block128"),
    "fp8-tensor": ({**FP8, "strategy": "tensor"}, None, "float-quantized", "fp8_tensor"),
    "w8a8": (INT8, {**INT8, "strategy": "token", "dynamic": True}, "int-quantized", "int8_channel"),
}
REFUSED = {
    "w8a16": (INT8, "pack-quantized", "int8 by channel in int32"),
    "group 16": ({**INT4, "group_size": 16}, "pack-quantized", "int4 by group of 16 in int32"),
}


def checkpoint(folder, weights, activations, stored):
    """A folder as llm-compressor writes it, of a small random model."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = zoo.causal_lm(**zoo.FILLED)
    given = QuantizationArgs(**weights)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=given, input_activations=QuantizationArgs(**activations) if activations else None
    )
    ignore = ["lm_head", "re:.*in_proj_[ab]$"]
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignore, format=stored))
    for module in model.modules():
        if not hasattr(module, "quantization_scheme"):
            continue
        weight = module.weight.detach()
        groups = {
            "group": lambda w: w.unflatten(-1, (-1, given.group_size)).flatten(0, -2),
            "channel": lambda w: w,
            "tensor": lambda w: w.flatten()[None],
            "block": lambda w: torch.cat([b.reshape(1, -1) for rows in w.split(128) for b in rows.split(128, -1)]),
        }[weights["strategy"]](weight)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), given)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        if not given.symmetric:
            module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def load(folder, **options):
    options = {
        "ignore_mismatched_sizes": True
    } | options  # for zero points, of which transformers has no idea how they are packed
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval().requires_grad_(False)


def dequantized(folder):
    model = load(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    for module in model.modules():
        module.quantization_enabled = False  # older transformers quantise activations of such a model too
    return model


@torch.no_grad()
def outputs(model, call):
    cache = zoo.new_cache(model, "static")
    first = call(input_ids=zoo.prompt(1, length=9)[0], **zoo.held(cache)).logits
    return torch.cat([first.flatten(), zoo.decode(call, cache, None, zoo.tokens_for(1, 3)).flatten()])


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_weights_stay_as_they_are_stored(kind, tmp_path):
    *made, format = CHECKPOINTS[kind]
    checkpoint(tmp_path / "first", *made)
    plain, model = dequantized(tmp_path / "first"), load(tmp_path / "first")
    before = dict(model.state_dict(keep_vars=True))
    assert models.keep_compressed(model) is model
    after = model.state_dict(keep_vars=True)
    own = {name for name in before if kind == "w4a16-zero" and name.endswith("zero_point")}  # read from the checkpoint
    assert after.keys() == before.keys() and all(after[name] is p for name, p in before.items() if name not in own), "none copied"
    stored = [m for m in model.modules() if isinstance(m, StoredLinear)]
    assert len(stored) == 3 + 4 + 2 * 3 and {m.format for m in stored} == {format}
    # Uncompiled they compute the same; of activations that are quantised in 8 bits nothing is left.
    assert zoo.relative(outputs(model, model), outputs(plain, plain)) < 1e-5
    model.save_pretrained(tmp_path / "second")
    again = dequantized(tmp_path / "second")
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in plain.state_dict().items())

    if kind not in ("w4a16", "w4a16-zero", "fp8-dynamic"):
        return
    torch._dynamo.reset()
    run = torch.compile(model, backend="gdnfuse", fullgraph=True, options={"inner": "eager", "strict": True})
    assert zoo.relative(outputs(model, run), outputs(plain, plain)) < 1e-5
    for report in gdnfuse.reports()[-2:]:
        assert report.fused_layers == 1 and not any(p.computed == OWN_LIBRARY for p in report.projections)
        kinds = {p.name: p.format for p in report.projections}
        assert kinds["in_proj_qkv"] == kinds["down_proj"] == format and kinds["in_proj_a"] == "float32"


@pytest.mark.parametrize("format", ["int4_group64", "int4_group32_zero", "int8_channel", "fp8_channel"])
def test_a_model_that_was_quantised_here_is_saved_as_such_a_checkpoint(format, tmp_path, monkeypatch):
    model = models.quantized(zoo.causal_lm(**zoo.FILLED).bfloat16(), format)
    model.save_pretrained(tmp_path)
    options = {"dtype": torch.bfloat16, "ignore_mismatched_sizes": format.endswith("zero")}
    # Loaded by the code of the page, with this folder in place of the names of the hub.
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, **given: load(tmp_path, **given))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: tmp_path)
    (block,) = blocks(ROOT / "docs" / "quantised.md", f"python {'zero-points' if format.endswith('zero') else 'checkpoint'}")
    exec(compile(block, "quantised.md", "exec"), scope := {})
    found = scope["model"].state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].double(), tensor.double()), name
    options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    found, plain = AutoModelForCausalLM.from_pretrained(tmp_path, **options).state_dict(), zoo.dequantized(model).state_dict()
    assert found.keys() >= plain.keys() and all(torch.equal(found[name], p) for name, p in plain.items())


@pytest.mark.parametrize("kind", REFUSED)
def test_other_weights_are_refused_by_name_and_left_alone(kind, tmp_path):
    weights, stored, found = REFUSED[kind]
    checkpoint(tmp_path, weights, None, stored)
    model = load(tmp_path)
    modules, names = [type(m) for m in model.modules()], list(model.state_dict())
    with pytest.raises(GdnfuseError) as e:
        models.keep_compressed(model)
    assert str(e.value).startswith("model.layers.0.linear_attn.") and " cannot stay compressed: load the model with " in str(
        e.value
    )
    assert str(e.value).endswith(f", found {found}.")
    assert [type(m) for m in model.modules()] == modules and list(model.state_dict()) == names and model.ct_decompress_hook
    outputs(model, model)  # which decompresses
    with pytest.raises(
        GdnfuseError, match=r"Weights must still be compressed, found decompressed ones: call keep_compressed before"
    ):
        models.keep_compressed(model)


def test_a_model_without_compressed_weights_is_refused():
    with pytest.raises(
        GdnfuseError, match=r"^A model whose weights stay compressed must be one .* found Linear without such weights\.$"
    ):
        models.keep_compressed(torch.nn.Linear(2, 2))
