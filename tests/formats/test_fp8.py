"""fp8 and int8: what data and scales mean, against transformers' own and a loop over blocks, at every value that e4m3 has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations import finegrained_fp8

from gdnfuse import formats
from gdnfuse.dialect import dequantize
from gdnfuse.errors import Refused
from tests.models.zoo import by_loop

BLOCK = formats.named("fp8_block128")
TENSOR = formats.named("fp8_tensor")
E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
sizes = st.integers(1, 300)


def every_value(M, N):
    """All 256 bytes over and over: zeros of both signs, subnormals, both NaNs."""
    return torch.arange(M * N).remainder(256).to(torch.uint8).view(E4M3).reshape(M, N)


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    finite = ~wanted.isnan()
    assert torch.equal(found.signbit()[finite], wanted.signbit()[finite])


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, st.sampled_from(DTYPES), st.sampled_from([0.0, 2.0**-60, 1.0, 2.0**60, float("nan"), float("inf")]))
def test_every_element_is_data_times_its_blocks_scale(M, N, dtype, special):
    data, scale = every_value(M, N), torch.rand(-(-M // 128), -(-N // 128)) + 0.5
    scale[-1, -1] = special
    found = dequantize.reference(data, scale, "fp8_block128", dtype)
    # One product of 4 and 24 bits in float32, rounded once more.
    wanted = by_loop(data, scale).to(torch.float64 if dtype == torch.float64 else torch.float32).to(dtype)
    assert found.dtype == dtype and found.shape == (M, N)
    same(found, wanted)


@pytest.mark.parametrize("shape", [(72, 136), (3, 300), (130, 72)])
def test_compiled_it_is_the_same(shape):
    """Inductor left the last columns of the first two out, when their blocks were an index of the loop over a row."""
    data, scale = BLOCK.quantize(torch.randn(shape))
    torch._dynamo.reset()
    found = torch.compile(lambda *given: dequantize.reference(*given, "fp8_block128", torch.float32))(data, scale)
    same(found, by_loop(data, scale).float())


@pytest.mark.parametrize("scale", [torch.tensor(0.37), torch.tensor([0.37]), torch.tensor([[2.0**60]])])
def test_one_scale(scale):
    data = every_value(16, 32)
    TENSOR.check(data, scale)
    same(dequantize.reference(data, scale, "fp8_tensor", torch.float32), by_loop(data, scale).float())


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("of_scale", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_is_what_transformers_makes_of_them(of_scale, lead):
    data = torch.randn(*lead, 256, 384).to(E4M3)
    scale = (torch.rand(*lead, 2, 3) + 0.5).to(of_scale)
    BLOCK.check(data, scale)
    converted = finegrained_fp8.Fp8Dequantize(None).convert({"w.weight": [data], "w.weight_scale_inv": [scale]})["w.weight"][0]
    assert torch.equal(dequantize.reference(data, scale, "fp8_block128", converted.dtype), converted)


@pytest.mark.parametrize("shape", [(256, 128), (130, 200), (1, 1), (2, 129, 127)])
@pytest.mark.parametrize("format", [BLOCK, TENSOR], ids=lambda f: f.name)
def test_quantised_values_are_near(format, shape):
    if format is TENSOR and len(shape) > 2:
        return
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[-1])
    weight[..., :1, :1] = 0
    data, scale = format.quantize(weight)
    format.check(data, scale)
    found = format.dequantize(data, scale, torch.float32)
    largest = weight.abs().max()
    # Three bits of mantissa; and steps of 2^-9 at a block's, or a tensor's, largest of 448.
    assert ((found - weight).abs() <= weight.abs() * 2**-4 + largest * 2**-9 / 448).all()
    zeros = format.quantize(torch.zeros(shape))
    assert format.dequantize(*zeros, torch.float32).count_nonzero() == 0


@pytest.mark.parametrize(("name", "dtype"), [("int8_channel", torch.int8), ("fp8_channel", E4M3)])
@pytest.mark.parametrize("special", [0.0, 2.0**-60, 2.0**60, float("nan")])
def test_a_scale_per_row(name, dtype, special):
    format, data = formats.named(name), every_value(6, 256).view(dtype)
    scale = torch.rand(6, 1) + 0.5
    scale[-1] = special
    format.check(data, scale)
    for made in DTYPES:
        wanted = torch.stack([row.double() * s.double() for row, s in zip(data, scale, strict=True)])
        same(dequantize.reference(data, scale, name, made), wanted.to(torch.promote_types(torch.float32, made)).to(made))
    weight = torch.randn(5, 33)
    weight[2] = 0
    found = format.dequantize(*format.quantize(weight), torch.float32)
    assert ((found - weight).abs() <= weight.abs().amax(-1, keepdim=True) * (0.51 / 127 if dtype == torch.int8 else 2**-4)).all()
    for wrong, of, sentence in (
        (data.float(), scale, f"Data of {name} must be {str(dtype).removeprefix('torch.')}, found float32."),
        (data, scale[:5], f"The scale of {name} must have the shape [6, 1] for data of [6, 256], found [5, 1]."),
        (data[0], scale, f"Data of {name} must be a matrix, found the shape [256]."),
    ):
        with pytest.raises(Refused) as e:
            format.check(wrong, of)
        assert e.value.reason == sentence


def fp8(*shape):
    return torch.zeros(shape, dtype=E4M3)


REFUSED = {
    "int8": (BLOCK, fp8(4, 4).view(torch.int8), torch.ones(1, 1), "Data of fp8_block128 must be float8_e4m3fn, found int8."),
    "e5m2": (
        TENSOR, fp8(4, 4).to(torch.float8_e5m2), torch.ones(()),
        "Data of fp8_tensor must be float8_e4m3fn, found float8_e5m2.",
    ),
    "scale's dtype": (
        BLOCK, fp8(4, 4), torch.ones(1, 1).int(),
        "The scale of fp8_block128 must be float32 or bfloat16 or float16 or float8_e8m0fnu, found int32.",
    ),
    "scale's shape": (
        BLOCK, fp8(256, 130), torch.ones(2, 1),
        "The scale of fp8_block128 must have the shape [2, 2] for data of [256, 130], found [2, 1].",
    ),
    "experts": (
        BLOCK, fp8(3, 256, 128), torch.ones(2, 1),
        "The scale of fp8_block128 must have the shape [3, 2, 1] for data of [3, 256, 128], found [2, 1].",
    ),
    "a vector": (BLOCK, fp8(4), torch.ones(1), "Data of fp8_block128 must be a matrix, found the shape [4]."),
    "scales": (TENSOR, fp8(4, 4), torch.ones(4, 1), "The scale of fp8_tensor must be one number, found the shape [4, 1]."),
    "3-D": (TENSOR, fp8(2, 4, 4), torch.ones(()), "Data of fp8_tensor must be a matrix, found the shape [2, 4, 4]."),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_such_weight_is_refused(what):
    format, data, scale, sentence = REFUSED[what]
    with pytest.raises(Refused) as e:
        format.check(data, scale)
    assert e.value.reason == sentence


def test_an_unknown_format_is_refused_with_those_that_are_known():
    with pytest.raises(Refused, match=r"^The format of a quantised weight must be one of .*fp8_block128.*, found 'fp7'\.$"):
        dequantize.reference(fp8(2, 2), torch.ones(1, 1), "fp7", torch.float32)
