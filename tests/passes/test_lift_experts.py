"""Experts traced as transformers' grouped_mm and batched_mm are lifted without capture, and what differs is not."""

import inspect
import textwrap

import pytest
import torch
from torch import nn
from transformers.integrations import moe

from gdnfuse import capture
from gdnfuse.passes.lift import experts
from gdnfuse.report.records import Status
from tests.rewrite.captured import Captured

E, H, K, I = 6, 16, 3, 8
GROUPED, BATCHED = moe.grouped_mm_experts_forward, moe.batched_mm_experts_forward


@pytest.fixture(autouse=True)
def uncaptured():
    capture.uninstall()
    yield
    capture.install()


class Experts(nn.Module):
    """As transformers' decorator leaves a class of experts, with what a function of its reads."""

    has_gate, has_bias, is_transposed, is_concatenated, has_post_expert_norm = True, False, False, True, False
    num_experts, _is_expert_parallel = E, False

    def __init__(self, function, dtype=torch.float32, **options):
        super().__init__()
        self.act_fn, self.function = nn.SiLU(), function
        for name, value in options.items():
            setattr(self, name, value)
        shapes = {"gate_up_proj": (E, 2 * I, H), "down_proj": (E, H, I)}
        for name, shape in shapes.items():
            shape = (shape[0], shape[2], shape[1]) if self.is_transposed else shape
            self.register_parameter(name, nn.Parameter(torch.randn(shape).to(dtype) * shape[-1] ** -0.5, requires_grad=False))
        if self.has_bias:
            self.gate_up_proj_bias, self.down_proj_bias = torch.randn(E, 2 * I).to(dtype), torch.randn(E, H).to(dtype)

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up

    def forward(self, x, indices, weights):
        return self.function(self, x, indices, weights)


def arguments(N=5, dtype=torch.float32):
    torch.manual_seed(N)
    indices = torch.rand(N, E).topk(K, -1).indices
    return torch.randn(N, H).to(dtype), indices, torch.rand(N, K).to(dtype)


def lifted(module, dtype=torch.float32, N=5, **options):
    graph = Captured(module, *arguments(N, dtype), **options).normalize().apply(experts.RULE)
    graph.compare(lambda a, b: torch.testing.assert_close(a, b, **({"rtol": 0.05, "atol": 0.05} if dtype.itemsize < 4 else {})))
    return graph


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [GROUPED, BATCHED])
def test_experts(function, dtype, parallel):
    """Under expert parallelism choices may be masked, by an index that no expert has."""
    graph = lifted(Experts(function, dtype, _is_expert_parallel=parallel), dtype)
    if parallel and "masked_fill" in graph.ops():
        assert graph.record.status is not Status.FIRED and graph.record.reason.endswith(".")
    else:
        assert graph.record.status is Status.FIRED, graph.record.reason
        assert graph.normalize().ops() == ["gdnfuse.experts"]


@pytest.mark.parametrize("function", [GROUPED, BATCHED])
def test_of_any_number_of_rows(function):
    graph = lifted(Experts(function), N=7, dynamic=True)
    assert graph.record.status is Status.FIRED, graph.record.reason


def test_of_one_row_and_of_too_many():
    assert lifted(Experts(BATCHED), N=1, dynamic=False).record.status is Status.FIRED
    record = lifted(Experts(BATCHED), N=513, dynamic=False).record
    assert record.reason == "Experts of at most 512 rows are proved where sizes are fixed, found 513."


class Swapped(Experts):
    def _apply_gate(self, gate_up):
        up, gate = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up


class Limited(Experts):
    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate.clamp(max=0.5)) * up


NEAR = {
    "another activation": (Experts, {"act_fn": nn.GELU()}),
    "biases": (Experts, {"has_bias": True}),
    "transposed": (Experts, {"is_transposed": True}),
    "gate and up swapped": (Swapped, {}),
    "a limit": (Limited, {}),
    "a norm behind": (Experts, {"has_post_expert_norm": True, "post_expert_norm": nn.LayerNorm(H)}),
}


@pytest.mark.parametrize("function", [GROUPED, BATCHED])
@pytest.mark.parametrize("name", NEAR)
def test_other_experts(name, function):
    cls, options = NEAR[name]
    if name == "a norm behind" and "has_post_expert_norm" not in inspect.getsource(function):
        pytest.skip("This transformers knows no such norm.")
    graph = lifted(cls(function, **options))
    assert all(r.status is not Status.FIRED and r.reason.endswith(".") for r in graph.outcome.records), graph.outcome.records


EDITS = (
    (GROUPED, "sample_weights[perm]", "sample_weights"),
    (GROUPED, "perm // num_top_k", "perm % num_tokens"),
    (GROUPED, "weighted_out = weighted_out[inv_perm]", "weighted_out = weighted_out[perm]"),
    (GROUPED, ".sum(dim=1)", ".mean(dim=1)"),
    (GROUPED, "torch.sort(expert_ids)", "torch.sort(expert_ids, descending=True)"),
    (BATCHED, "repeat_interleave(num_top_k, dim=0)", "repeat(num_top_k, 1)"),
    (BATCHED, ".sum(dim=1)", ".amax(dim=1)"),
    (BATCHED, "top_k_weights.reshape(-1)", "top_k_weights.square().reshape(-1)"),
    (BATCHED, "self.down_proj[expert_ids]", "self.down_proj[expert_ids.flip(0)]"),
)


@pytest.mark.parametrize(("function", "old", "new"), EDITS)
def test_edited_functions(function, old, new):
    """Whatever is lifted does what the edited function does; of these edits all but the squares are refused."""
    text = textwrap.dedent(inspect.getsource(function))
    assert text.count(old) == 1
    scope = {}
    exec(compile(text.replace(old, new), f"<{old}>", "exec"), moe.__dict__, scope)
    graph = lifted(Experts(scope[function.__name__]))
    assert ("square" in new) == any(r.status is Status.FIRED for r in graph.outcome.records)


def test_computed_weights_are_operands_as_they_are():
    """As with an adapter on the experts."""
    module, double = Experts(BATCHED), lambda module, weight: 2 * weight
    nn.utils.parametrize.register_parametrization(module, "down_proj", type("Double", (nn.Module,), {"forward": double})())
    assert lifted(module).record.status is Status.FIRED
