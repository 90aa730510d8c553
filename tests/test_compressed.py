"""Which weights may stay compressed, by what compressed-tensors says of them; its checkpoints are in tests/models."""

from types import SimpleNamespace

import pytest
import torch

from gdnfuse import models
from gdnfuse.errors import GdnfuseError, Refused

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "block_structure": None, "symmetric": True}


INT8 = {**INT4, "num_bits": 8, "strategy": "channel", "group_size": None}


def compressed(weights, data, scale, status="compressed", weight_zero_point=None, **more):
    """A model of one linear [128, 128] as compressed-tensors leaves it."""
    linear = torch.nn.Linear(128, 128, bias=False)
    del linear.weight
    name = "weight_packed" if data.dtype == torch.int32 else "weight"
    stored = {name: data, "weight_scale": scale} | ({} if weight_zero_point is None else {"weight_zero_point": weight_zero_point})
    for attribute, tensor in stored.items():
        setattr(linear, attribute, torch.nn.Parameter(tensor, requires_grad=False))
    linear.quantization_scheme = SimpleNamespace(weights=SimpleNamespace(**weights), **more)
    linear.quantization_status = status
    return torch.nn.Sequential(linear)


def packed():
    return torch.zeros(128, 16, dtype=torch.int32), torch.ones(128, 2)


KNOWN = "FP8 by block of 128 × 128, channel or tensor, int8 by channel, or int4 by group of 32, 64 or 128"
REFUSED = {
    "NVFP4": (
        lambda: compressed(
            {**INT4, "type": "float", "strategy": "tensor_group"}, torch.zeros(128, 64, dtype=torch.uint8), torch.ones(128, 8)
        ),
        f"Compressed weights must be {KNOWN}, found float4 by tensor_group in uint8.",
    ),
    "zero points of int8": (
        lambda: compressed(
            {**INT8, "symmetric": False},
            torch.zeros(128, 128, dtype=torch.int8),
            torch.ones(128, 1),
            weight_zero_point=torch.zeros(128, 1, dtype=torch.int8),
        ),
        "Compressed weights must be symmetric or int4 in groups, found int8 by channel with zero points.",
    ),
    "no zero points": (
        lambda: compressed({**INT4, "symmetric": False}, *packed()),
        "A compressed linear must hold its weight, scale and zero points, found one without.",
    ),
    "zero points that were not loaded": (
        lambda: compressed({**INT4, "symmetric": False}, *packed(), weight_zero_point=torch.zeros(128, 2, dtype=torch.int8)),
        "Zero points must be read from the checkpoint, as transformers loads none: give its folder as checkpoint=…; found 0 of "
        "this linear in '.'.",
    ),
    "another group": (
        lambda: compressed({**INT4, "group_size": 128}, *packed()),
        "The scale of int4_group128 must have the shape [128, 1] for data of [128, 16], found [128, 2].",
    ),
    "another size": (
        lambda: compressed(INT4, torch.zeros(128, 8, dtype=torch.int32), torch.ones(128, 1)),
        "A compressed weight must have the sizes [128, 128], found [128, 64].",
    ),
    "results": (
        lambda: compressed(INT4, *packed(), output_activations=object()),
        "A linear must not quantise its result, found one that does.",
    ),
    "frozen": (
        lambda: compressed(INT4, *packed(), "frozen"),
        "Weights must still be compressed, found frozen ones: call keep_compressed before the model's first call.",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_stay_compressed_is_said_and_left_alone(what):
    make, sentence = REFUSED[what]
    model = make()
    with pytest.raises(GdnfuseError) as e:
        models.keep_compressed(model)
    assert str(e.value) == f"0 cannot stay compressed: load the model with CompressedTensorsConfig(dequantize=True). {sentence}"
    assert type(model[0]) is torch.nn.Linear


def test_a_linear_computes_with_what_is_stored():
    data, scale = torch.randint(-(2**31), 2**31, (128, 16)).to(torch.int32), torch.rand(128, 2)
    model = models.keep_compressed(compressed(INT4, data, scale))
    weight = torch.ops.gdnfuse.dequantize(data, scale, "int4_group64", torch.float32)
    x = torch.randn(3, 128)
    assert torch.equal(model(x), x @ weight.T) and model[0].weight_packed.data_ptr() == data.data_ptr()


def test_a_scale_that_was_set_by_hand_is_looked_at():
    """One of a column would broadcast over the groups: a wrong weight without an error."""
    model = models.keep_compressed(compressed(INT4, *packed()))
    model[0].weight_scale = torch.nn.Parameter(torch.ones(128, 1), requires_grad=False)
    sentence = r"The scale of int4_group64 must have the shape \[128, 2\] for data of \[128, 16\], found \[128, 1\]\."
    for call in (model, torch.compile(model, backend="gdnfuse", options={"inner": "eager"})):
        with pytest.raises((Refused, RuntimeError), match=sentence):
            call(torch.randn(1, 128))


@pytest.mark.parametrize("what", [None, 3, torch.nn.Linear])
@pytest.mark.parametrize("function", [models.keep_compressed, models.quantized])
def test_what_is_no_model_is_refused(function, what):
    found = "the class Linear" if isinstance(what, type) else type(what).__name__
    with pytest.raises(GdnfuseError, match=rf"must be a torch\.nn\.Module, found {found}\.$"):
        function(what)


@pytest.mark.parametrize("format", ["fp8_channel", "int8_channel", "int4_group64", "nf4_block64"])
def test_a_cast_of_the_model_leaves_what_is_stored(format):
    """Data of another dtype are none of the format, and a scale would be rounded."""
    model = models.quantized(torch.nn.Sequential(torch.nn.Linear(64, 8)), format)
    before = [x.clone() for x in model[0].stored()]
    model.half().to(torch.bfloat16)
    assert model[0].bias.dtype == model(torch.randn(1, 64).bfloat16()).dtype == torch.bfloat16
    for x, old in zip(model[0].stored(), before, strict=True):
        assert x.dtype == old.dtype and torch.equal(x.double(), old.double())
    assert all(x.device.type == "meta" for x in model.to("meta").state_dict().values())


@pytest.mark.parametrize("format", ["fp8_block128", "int8_channel"])
def test_a_model_is_quantised_once(format):
    """Its config could describe no more than one format."""
    model = models.quantized(torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU()), format)
    model.append(torch.nn.Linear(8, 8))
    kinds = [type(m) for m in model]
    with pytest.raises(GdnfuseError, match=r"^A model to quantise must have plain weights, found \w+ at 0: begin with "):
        models.quantized(model, "int8_channel")
    assert [type(m) for m in model] == kinds
