"""Linears of bitsandbytes that are kept for kernels. Others stand in for them, with what is read of one, in plain torch."""

from types import SimpleNamespace

import pytest
import torch

from gdnfuse import formats, models
from gdnfuse.errors import GdnfuseError
from tests.models import zoo


class Linear4bit(torch.nn.Linear):
    """What bitsandbytes stores of a linear, two columns in a byte, with double quantisation or without."""

    def __init__(self, M=6, N=128, nested=True, kind="nf4", block=64, bias=False):
        super().__init__(N, M, bias=bias)
        data, scale = formats.named(f"{kind}_block64").quantize(self.weight.detach())
        self.weight = torch.nn.Parameter(data.view(-1, 1), requires_grad=False)
        state = {"shape": torch.Size([M, N]), "blocksize": block, "quant_type": kind, "absmax": scale.flatten(), "nested": nested}
        if nested:
            own, table = torch.rand(-(-scale.numel() // 256)), torch.linspace(-1, 1, 256)
            state |= {"absmax": torch.randint(0, 256, (scale.numel(),)).byte(), "offset": torch.tensor(0.5)}
            state["state2"] = SimpleNamespace(absmax=own, code=table, blocksize=256)
        self.weight.quant_state = SimpleNamespace(**state)

    def stored(self):
        """The weight as the format of bitsandbytes itself says."""
        state = self.weight.quant_state
        more = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        data = self.weight.view(self.out_features, -1)
        return formats.named(state.quant_type).dequantize(data, state.absmax, torch.float32, *more)


@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("fp4", False)])
def test_a_linear_means_the_same_over_the_same_bytes(kind, nested):
    model = torch.nn.Sequential(Linear4bit(kind=kind, nested=nested, bias=True))
    wanted, data, bias = model[0].stored(), model[0].weight.data_ptr(), model[0].bias
    assert models.keep_four_bit(model) is model
    assert model[0].format == f"{kind}_block64" and model[0].weight_packed.data_ptr() == data and model[0].bias is bias
    x = torch.randn(3, 128)
    assert torch.equal(model(x), torch.nn.functional.linear(x, wanted, bias))
    assert model[0].weight_scale.dtype == torch.float32 and list(model[0].weight_scale.shape) == [6, 2]


class Adapted(torch.nn.Module):
    """What peft puts around a linear has its weight, and the same class's name."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.scale = base, 2.0

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.scale * self.base_layer(x)


Adapted.__name__ = "Linear4bit"


def test_an_adapter_around_a_linear_stays():
    model = torch.nn.Sequential(Adapted(Linear4bit()))
    wanted, x = model[0].base_layer.stored(), torch.randn(3, 128)
    models.keep_four_bit(model)
    assert torch.equal(model(x), 2 * x @ wanted.T)


def of_a_cpu(linear):
    linear.weight.quant_state.packing_format_for_cpu = True
    return linear


WRONG = {
    "order": (lambda: of_a_cpu(Linear4bit()), "Weights must be in bitsandbytes' own order, found that of a CPU: set support_avx"),
    "blocks": (
        lambda: Linear4bit(block=32), "Weights must be nf4 or fp4 in blocks of 64 or 128 elements, found nf4 in blocks of 32."
    ),
    "rows": (
        lambda: Linear4bit(M=6, N=192, block=128), "Rows of a weight must have whole blocks of 128 columns, found 192 columns."
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_kernels_cannot_read_is_refused_and_the_model_stays(what):
    make, sentence = WRONG[what]
    model = torch.nn.Sequential(Linear4bit(), make())
    with pytest.raises(GdnfuseError) as e:
        models.keep_four_bit(model)
    assert str(e.value).startswith(f"1 cannot be read by kernels: leave the model as bitsandbytes has it. {sentence}")
    assert all(type(m) is Linear4bit for m in model)


def test_a_model_without_such_linears_is_refused():
    with pytest.raises(GdnfuseError, match="must be one that bitsandbytes quantised .* found Sequential without such weights"):
        models.keep_four_bit(torch.nn.Sequential(torch.nn.Linear(64, 2)))


def test_a_model_that_is_kept_is_not_saved(tmp_path):
    model = zoo.causal_lm(**zoo.FILLED)
    model.model.layers[0].mlp.down_proj = Linear4bit(128, 128)
    with pytest.raises(GdnfuseError, match="found nf4 or fp4 in linears of gdnfuse"):
        models.keep_four_bit(model).save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
