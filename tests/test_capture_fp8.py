"""transformers' fp8_linear becomes a linear on a dequantised weight: where, for which weights, after what proof."""

import contextlib
import inspect
import types

import pytest
import torch
import torch.nn.functional as F
from transformers.integrations import finegrained_fp8
from transformers.integrations.moe import use_experts_implementation

import gdnfuse.backend  # noqa: F401  captures at each compilation
from gdnfuse import Refused, capture, capture_fp8, formats
from gdnfuse.rewrite.graph import op_name

M, N = 130, 136


def fp8_linear(block=(128, 128), bias=None, columns=N):
    """A linear as a checkpoint gives it."""
    name = "fp8_tensor" if block is None else "fp8_block128"
    with torch.device("meta"):
        linear = finegrained_fp8.FP8Linear(columns, M, block, has_bias=bias is not None)
    data, scale = formats.named(name).quantize(torch.randn(M, columns) / columns**0.5)
    linear.weight, linear.weight_scale_inv = (torch.nn.Parameter(t, requires_grad=False) for t in (data, scale))
    if bias is not None:
        linear.bias = torch.nn.Parameter(torch.randn(M).to(bias), requires_grad=False)
    return linear, formats.named(name).dequantize(data, scale, torch.float32)


def traced(f, *args):
    """What f gives and which ops its graph has, traced for a backend that is not torch's."""
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(f, backend=backend, fullgraph=True)(*args)
    (gm,) = graphs
    return found, [op_name(n) for n in gm.graph.nodes if n.op in ("call_function", "call_method")]


@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [(128, 128), [128, 128], None])
@pytest.mark.parametrize("rows", [1, 40])
def test_is_a_linear_on_a_dequantised_weight(block, bias, rows):
    linear, weight = fp8_linear(block, bias)
    x = torch.randn(rows, 1, N).bfloat16()
    found, ops = traced(linear, x)
    assert ops[:2] == ["gdnfuse.dequantize", "linear"]
    wanted = F.linear(x, weight.bfloat16(), None if bias is None else linear.bias.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-7)


def arguments(**others):
    data, scale = formats.named("fp8_block128").quantize(torch.randn(M, N))
    given = {"input": torch.randn(2, N), "weight": data, "weight_scale_inv": scale, "block_size": [128, 128]}
    return given | others


class Subclass(torch.Tensor):
    pass


LEFT = {
    "blocks of another size": {"block_size": [64, 64]},
    "fp4, two in a byte": {"weight": torch.zeros(M, N // 2, dtype=torch.int8)},
    "another fp8": {"weight": torch.zeros(M, N).to(torch.float8_e5m2)},
    "a scale too many": {"weight_scale_inv": torch.ones(3, 2)},
    "many scales where there is to be one": {"block_size": None},
    "integers": {"input": torch.ones(2, N, dtype=torch.int64)},
    "a subclass": {"weight": torch.zeros(M, N, dtype=torch.float8_e4m3fn).as_subclass(Subclass)},
    "on two devices": {"weight_scale_inv": torch.ones(2, 2, device="meta")},
}


def test_known_weights_are_taken():
    assert capture_fp8.accepts(**arguments())
    assert capture_fp8.accepts(**arguments(block_size=None, weight_scale_inv=torch.tensor(1.0), activation_scale=torch.ones(())))


@pytest.mark.parametrize("what", LEFT)
def test_other_weights_are_left_to_transformers(what):
    assert not capture_fp8.accepts(**arguments(**LEFT[what]))


def test_it_is_captured_after_its_weights_were_proved():
    capture.scan()
    (status,) = [c for c in capture.status() if c.function == f"{capture_fp8.MODULE}.{capture_fp8.FUNCTION}"]
    assert status.captured and status.op == "dequantize" and not status.reason and status.proof_error is None
    assert tuple(inspect.signature(finegrained_fp8.fp8_linear).parameters) == capture_fp8.PARAMETERS


def test_weights_that_mean_something_else_are_refused(monkeypatch):
    class Transposed(finegrained_fp8.Fp8Dequantize):
        def convert(self, given):
            return super().convert({**given, "w.weight_scale_inv": [s.flip(-1) for s in given["w.weight_scale_inv"]]})

    monkeypatch.setattr(finegrained_fp8, "Fp8Dequantize", Transposed)
    with pytest.raises(Refused, match="Weights of fp8_block128 must dequantise as by transformers' Fp8Dequantize"):
        capture_fp8.keep(finegrained_fp8.fp8_linear)


def test_a_function_of_other_parameters_is_refused():
    with pytest.raises(Refused, match="fp8_linear must have the parameters input, weight, .*, found x, weight"):
        capture_fp8.keep(lambda x, weight: x)


def test_under_torchs_own_backends_and_eager_it_is_transformers(monkeypatch):
    """Whose kernel is stood in for here, because it comes from the hub."""
    called = []

    def kernel(input, weight, *others, **more):
        called.append(weight.shape)
        return input.new_zeros(*input.shape[:-1], weight.shape[0])

    monkeypatch.setattr(finegrained_fp8, "finegrained_fp8_linear", torch.compiler.allow_in_graph(kernel))
    monkeypatch.setattr(finegrained_fp8, "is_deepgemm_loadable", lambda: False)
    linear, _ = fp8_linear()
    x = torch.randn(2, N)
    torch._dynamo.reset()
    with torch.no_grad():
        assert not linear(x).any() and not torch.compile(linear, backend="eager", fullgraph=True)(x).any()
        assert len(called) >= 2
        assert torch.compile(linear, backend="gdnfuse", options={"inner": "eager"})(x).any()
    torch._dynamo.reset()


def fp8_experts(**others):
    """Experts as a checkpoint gives them, without what only a config says."""
    cls = type("FP8Experts", (finegrained_fp8.FP8Experts,), {})
    cls = use_experts_implementation(
        experts_class=cls, experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS, has_bias=False, has_gate=True
    )
    ((self, *args), _), *_ = capture_fp8.calls()
    self.__class__ = cls
    for name in ("gate_up_proj", "down_proj"):
        for attribute, t in zip(
            (name, f"{name}_scale_inv"), formats.named("fp8_block128").quantize(getattr(self, name)), strict=True
        ):
            setattr(self, attribute, torch.nn.Parameter(t, requires_grad=False))
    self.config = types.SimpleNamespace(_experts_implementation=others.pop("implementation", "grouped_mm"))
    for name, value in others.items():
        setattr(self, name, value)
    return self, [a.float() if a.is_floating_point() else a for a in args]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "deepgemm", "ours, also uncompiled"])
def test_experts_are_one_op_on_dequantised_weights_whatever_computes_them(implementation):
    ours = "ours" in implementation
    self, args = fp8_experts(implementation="eager" if ours else implementation)
    with capture_fp8.dequantized_calls(self) if ours else contextlib.nullcontext():
        found, ops = traced(self, *args)
    assert ops == ["gdnfuse.dequantize", "gdnfuse.dequantize", "gdnfuse.experts"]
    stored = [(self.gate_up_proj, self.gate_up_proj_scale_inv), (self.down_proj, self.down_proj_scale_inv)]
    weights = [formats.named("fp8_block128").dequantize(*w, torch.float32) for w in stored]
    torch.testing.assert_close(found, torch.ops.gdnfuse.experts.default(*args, *weights))


OTHERS = {
    "a limit": {"limit": 7.0},
    "a gate of its own": {"swiglu_alpha": 1.7},
    "no gate": {"has_gate": False},
    "another activation": {"act_fn": torch.nn.GELU()},
    "one scale for all": {"block_size": None},
    "another number of experts": {"num_experts": 3},
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_experts_are_left_to_transformers(what):
    capture.scan()
    self, args = fp8_experts()
    assert capture_fp8.accepts_experts(self, *args)
    for name, value in OTHERS[what].items():
        setattr(self, name, value)
    assert not capture_fp8.accepts_experts(self, *args)


def test_the_loop_over_experts_is_proved_with_weights_that_it_multiplies_with_as_they_are():
    capture.scan()
    found = {c.function.removeprefix(f"{capture_fp8.MODULE}."): c for c in capture.status()}
    assert found[capture_fp8.LOOP].captured and found[capture_fp8.LOOP].proof_error < 1e-9
    loop = capture_fp8.loop(finegrained_fp8.FP8Experts)
    with pytest.raises(Refused, match="float64 proof failed"):
        capture.prove(lambda self, x, *others: loop(self, x, *others) * 1.001, capture.CAPTURABLE[capture_fp8.LOOP])
