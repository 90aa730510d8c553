"""Linears that stay with their own library are counted, whatever it calls, with the bytes that they have."""

import re

import pytest
import torch
from transformers.integrations import compressed_tensors

import gdnfuse
from gdnfuse import formats, versions
from gdnfuse.report.records import OWN_LIBRARY
from tests.models import zoo


def test_linears_of_gptq_and_awq_are_told(monkeypatch):
    """gptqmodel's, which transformers loads both with, are no subclasses of torch's."""

    class TorchQuantLinear(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.qweight = torch.nn.Parameter(weight, requires_grad=False)

        def forward(self, x):
            return torch.matmul(x, self.qweight.to(x.dtype))

    monkeypatch.setattr(TorchQuantLinear, "__module__", "gptqmodel.nn_modules.qlinear.torch")
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), TorchQuantLinear(torch.ones(8, 4, dtype=torch.int8)))
    with torch.no_grad():
        torch.compile(model, backend="gdnfuse", options={"inner": "eager"})(torch.ones(1, 8))
    (own,) = [p for p in gdnfuse.reports()[-1].projections if p.computed == OWN_LIBRARY]
    assert (own.format, own.bytes) == ("TorchQuantLinear", 32) and own.reason == (
        "A projection must be torch's linear on a weight of a known format, found TorchQuantLinear, which calls matmul: load a "
        "checkpoint of compressed-tensors (W4A16)."
    )


@pytest.mark.skipif(bool(versions.older("torch", (2, 12))), reason="torch 2.11 breaks the graph at its scaled product")
@pytest.mark.parametrize("layers", [1, 2])
def test_linears_of_compressed_tensors_are_told_beside_a_fused_mixer(layers):
    """transformers computes them by torch's scaled product, for which it quantises activations."""
    torch._dynamo.reset()
    model = zoo.causal_lm(**zoo.FILLED).bfloat16()
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(layers)]
    for name in names:
        linear = model.get_submodule(name)
        with torch.device("meta"):
            new = compressed_tensors.CompressedTensorsFP8Linear(linear.in_features, linear.out_features)
        data, scale = formats.named("fp8_channel").quantize(linear.weight)
        new.weight = torch.nn.Parameter(data, requires_grad=False)
        new.weight_scale = torch.nn.Parameter(scale.float().reshape(1, -1), requires_grad=False)
        model.set_submodule(name, new.eval())
    cache = zoo.new_cache(model, "static")
    run = torch.compile(model, backend="gdnfuse", fullgraph=True, options={"inner": "eager", "strict": True})
    with torch.no_grad():
        run(input_ids=zoo.prompt(1, length=9)[0], **zoo.held(cache))
        zoo.decode(run, cache, None, zoo.tokens_for(1, 1))
    for report in gdnfuse.reports()[-2:]:
        (own,) = [p for p in report.projections if p.computed == OWN_LIBRARY]
        assert (own.name, own.format, own.paths, own.bytes) == (
            "down_proj",
            "CompressedTensorsFP8Linear",
            names,
            128 * 256 + 4 * 128,
        )
        assert re.fullmatch(
            r"A projection must be torch's linear on a weight of a known format, found CompressedTensorsFP8Linear, which calls "
            r"_?scaled_mm(_v2)?: load the model in such a format, or dequantised\.",
            own.reason,
        )
        assert f", {layers} of 16 linears left to their own library" in report.summary() and report.fused_layers == 1
