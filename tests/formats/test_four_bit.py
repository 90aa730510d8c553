"""nf4 and fp4 whose rows have blocks of their own: what data and scales mean, element by element, and what is refused."""

import pytest
import torch

from gdnfuse import formats, models
from gdnfuse.errors import GdnfuseError, Refused
from tests.models import zoo

TABLES = formats.four_bit.TABLES


@pytest.mark.parametrize("kind", TABLES)
def test_means_the_entry_of_each_code_times_the_scale_of_its_block(kind):
    data, scale = torch.randint(0, 256, (3, 64)).byte(), torch.tensor([[1.0, -0.5], [0.0, 2.0**-60], [2.0**60, 3.0]])
    formats.named(f"{kind}_block64").check(data, scale)
    for dtype in (torch.float32, torch.float64):
        found = formats.named(f"{kind}_block64").dequantize(data, scale, dtype)
        for m in range(3):
            codes = [place for byte in data[m].tolist() for place in (byte >> 4, byte & 15)]
            wanted = torch.tensor([TABLES[kind][code] for code in codes], dtype=torch.float32).to(dtype)
            assert torch.equal(found[m], wanted * scale[m].to(dtype).repeat_interleave(64)) and found.dtype == dtype
    # Of all elements in one row of blocks, as bitsandbytes has them.
    assert torch.equal(formats.named(kind).dequantize(data, scale.flatten(), dtype), found)


@pytest.mark.parametrize("kind", TABLES)
def test_quantises_to_the_nearest_entry(kind):
    weight = torch.randn(5, 256).bfloat16()
    weight[1, :128] = 0
    data, scale = formats.named(f"{kind}_block128").quantize(weight)
    formats.named(f"{kind}_block128").check(data, scale)
    found = formats.named(f"{kind}_block128").dequantize(data, scale, torch.float32)
    entries = torch.tensor(TABLES[kind]) * scale.repeat_interleave(128, 1)[..., None]
    nearest = (entries - weight.float()[..., None]).abs().amin(-1)
    assert torch.allclose((found - weight.float()).abs(), nearest, rtol=0, atol=1e-6) and (found[1, :128] == 0).all()


def test_a_magnitude_that_is_quantised_is_an_entry_times_its_own_scale_and_an_offset():
    scale, own, table, offset = torch.randint(0, 256, (600,)).byte(), torch.rand(3), torch.randn(256), torch.tensor(0.25)
    found = formats.four_bit.magnitudes(scale, own, table, offset)
    assert torch.equal(found, torch.stack([table[n] * own[i // 256] + offset for i, n in enumerate(scale.tolist())]))


WRONG = {
    "dtype": (torch.zeros(4, 64), torch.ones(4, 2), "Data of nf4_block64 must be uint8, found float32."),
    "scale's dtype": (
        torch.zeros(4, 64).byte(), torch.ones(4, 2).half(), "The scale of nf4_block64 must be float32, found float16.",
    ),
    "a vector": (torch.zeros(64).byte(), torch.ones(2), "Data of nf4_block64 must be a matrix, found the shape [64]."),
    "columns": (
        torch.zeros(4, 48).byte(), torch.ones(4, 2),
        "Data of nf4_block64 must have whole blocks of 64 columns in each row, found 96 columns.",
    ),
    "scale": (
        torch.zeros(4, 64).byte(), torch.ones(8),
        "The scale of nf4_block64 must have the shape [4, 2] for data of [4, 64], found [8].",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_such_weight_is_refused(what):
    *stored, sentence = WRONG[what]
    with pytest.raises(Refused) as e:
        formats.named("nf4_block64").check(*stored)
    assert str(e.value) == sentence


def test_rows_without_whole_blocks_are_not_quantised():
    with pytest.raises(Refused, match=r"^A weight in blocks of 64 columns must have whole ones in each row, found 96 columns\.$"):
        formats.named("nf4_block64").quantize(torch.zeros(4, 96))


def test_a_model_of_them_is_not_saved(tmp_path):
    """No checkpoint that transformers loads has these tensors: it would begin with other weights, and a warning."""
    model = models.quantized(zoo.causal_lm(**zoo.FILLED), "nf4_block64")
    with pytest.raises(GdnfuseError, match=r"found nf4 or fp4 in linears of gdnfuse: save it before"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir()) and not hasattr(model.config, "quantization_config")
