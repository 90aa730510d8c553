"""int4 in groups of columns: what data and scales mean, against compressed-tensors' own and element by element."""

import pytest
import torch

from gdnfuse import formats
from gdnfuse.dialect import dequantize
from gdnfuse.errors import Refused
from gdnfuse.stored_linear import StoredLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GROUPS = formats.int4_group.GROUPS


def of(group, zeros=False):
    return formats.named(f"int4_group{group}" + "_zero" * zeros)


def data_of(M, N):
    """Every integer in every place, the last with the sign bit of an int32 set."""
    return torch.randint(-(2**31), 2**31, (M, N // 8), generator=torch.Generator().manual_seed(0)).to(torch.int32)


def one_by_one(data, scale, group, zero=None):
    rows = []
    for m, (words, scales) in enumerate(zip(data.tolist(), scale.double().tolist(), strict=True)):
        integers = [((word & 0xFFFFFFFF) >> 4 * i & 15) - 8 for word in words for i in range(8)]
        zeros = [0] * len(scales)
        if zero is not None:
            zeros = [((word & 0xFFFFFFFF) >> 4 * (m % 8) & 15) - 8 for word in zero[m // 8].tolist()]
        rows.append([(q - zeros[n // group]) * scales[n // group] for n, q in enumerate(integers)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("special", [0.0, 2.0**-60, 2.0**60, float("nan"), float("inf"), -0.5])
@pytest.mark.parametrize(("group", "zeros"), [*((group, False) for group in GROUPS), (32, True)])
def test_every_element_is_an_integer_times_its_groups_scale(group, zeros, special):
    data, scale = data_of(13, 2 * group), torch.rand(13, 2) + 0.5
    more = [data_of(2, 16)] if zeros else []  # of rows that do not fill the last
    scale[-1, -1] = special
    of(group, zeros).check(data, scale, *more)
    for dtype in DTYPES:
        found = dequantize.reference(data, scale, of(group, zeros).name, dtype, more or None)
        wanted = one_by_one(data, scale, group, *more).to(torch.promote_types(torch.float32, dtype)).to(dtype)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        finite = ~wanted.isnan()
        assert torch.equal(found.signbit()[finite], wanted.signbit()[finite])


def test_compiled_it_is_the_same():
    data, scale = of(32).quantize(torch.randn(5, 96))
    torch._dynamo.reset()
    found = torch.compile(lambda *given: dequantize.reference(*given, "int4_group32", torch.float32))(data, scale)
    assert torch.equal(found, one_by_one(data, scale, 32).float())


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("number", [6e-8, float("nan"), float("inf"), -float("inf")])
def test_a_number_that_has_no_scale_changes_no_other_group(number, zeros):
    """The first is float16's least, a fifteenth of which is zero. Eight rows have their zero points in one int32."""
    weight = torch.randn(8, 64, dtype=torch.float16)

    def meant():
        data, scale, *zero = of(32, zeros).quantize(weight)
        return dequantize.reference(data, scale, of(32, zeros).name, torch.float32, zero or None)

    wanted = meant()
    weight[0, :32] = 0
    weight[0, 0] = number
    found = meant()
    assert torch.equal(found[1:], wanted[1:]) and torch.equal(found[0, 32:], wanted[0, 32:])
    assert torch.equal(found[0, :32], torch.zeros(32)) if 0 < number < 1 else not found[0, :32].isfinite().any()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_is_what_compressed_tensors_makes_of_them(dtype, group, zeros):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle import forward
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = torch.randn(6, 256).to(dtype)
    weight[2, :group] = 0
    weight[3] = weight[3].abs() + 1
    data, scale, *more = of(group, zeros).quantize(weight)
    assert scale.dtype == dtype
    args = QuantizationArgs(num_bits=4, type="int", symmetric=not zeros, strategy="group", group_size=group)
    integers = unpack_from_int32(data, 4, weight.shape)
    assert torch.equal(pack_to_int32(integers, 4), data)
    zero = unpack_from_int32(*more, 4, scale.shape, packed_dim=0) if zeros else None
    if zeros:
        assert torch.equal(pack_to_int32(zero, 4, packed_dim=0), *more)
    found = dequantize.reference(data, scale, of(group, zeros).name, dtype, more or None)
    assert torch.equal(found, forward.dequantize(integers, scale, zero, args))
    groups = weight.unflatten(-1, (-1, group))
    wanted, wanted_zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    nonzero = groups.abs().amax(-1) > 0
    torch.testing.assert_close(scale[nonzero], wanted[nonzero].to(dtype), rtol=2**-8, atol=0)
    if zeros:  # which differ where the scale's last bit decides
        assert (zero - wanted_zero)[nonzero].abs().max() <= 1


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_quantised_values_are_near(group, zeros):
    weight = torch.randn(3, 7, 2 * group)
    weight[0, 0] = 0
    data, scale, *more = of(group, zeros).quantize(weight)
    of(group, zeros).check(data, scale, *more)
    assert of(group).shape(data) == weight.shape
    found = of(group).dequantize(data, scale, torch.float32, *more)
    # Half a step, and a whole one at the largest positive number, which would be 7.5 steps.
    step = scale.repeat_interleave(group, -1)
    assert ((found - weight).abs() <= 0.501 * step).all() and found[0, 0].count_nonzero() == 0


REFUSED = {
    "dtype": (torch.zeros(4, 16), torch.ones(4, 1), "Data of int4_group128 must be int32, found float32."),
    "scale's dtype": (
        torch.zeros(4, 16).int(), torch.ones(4, 1).double(),
        "The scale of int4_group128 must be float32 or bfloat16 or float16, found float64.",
    ),
    "ragged": (
        torch.zeros(4, 17).int(), torch.ones(4, 2),
        "Data of int4_group128 must have whole groups of 128 columns, found 136 columns.",
    ),
    "scale's shape": (
        torch.zeros(4, 16).int(), torch.ones(4, 2),
        "The scale of int4_group128 must have the shape [4, 1] for data of [4, 16], found [4, 2].",
    ),
    "a scale that would broadcast": (
        torch.zeros(4, 32).int(), torch.ones(4, 1),
        "The scale of int4_group128 must have the shape [4, 2] for data of [4, 32], found [4, 1].",
    ),
    "zero points": (
        torch.zeros(4, 16).int(), torch.ones(4, 1), "A weight of int4_group128 must have no zero points, found some.",
        torch.zeros(1, 1).int(),
    ),
    "no zero points": (torch.zeros(4, 16).int(), torch.ones(4, 1), "A weight of int4_group128_zero must have zero points."),
    "zero points' shape": (
        torch.zeros(9, 16).int(), torch.ones(9, 1),
        "The zero points of int4_group128_zero must be int32 [2, 1] for data of [9, 16], found int8 [9, 1].",
        torch.zeros(9, 1, dtype=torch.int8),
    ),
    "a vector": (torch.zeros(16).int(), torch.ones(1), "Data of int4_group128 must be a matrix, found the shape [16]."),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_such_weight_is_refused(what):
    data, scale, sentence, *more = REFUSED[what]
    with pytest.raises(Refused) as e:
        of(128, "_zero" in sentence).check(data, scale, *more)
    assert e.value.reason == sentence


def test_a_weight_of_parts_of_groups_is_not_quantised():
    with pytest.raises(Refused, match=r"^A weight in groups of 32 columns must have whole ones, found 40 columns\.$"):
        of(32).quantize(torch.randn(2, 40))


def test_a_linear_of_bitsandbytes_format_is_refused():
    with pytest.raises(Refused, match="found nf4 of bitsandbytes"):
        StoredLinear("nf4", torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4))
