"""Kernels inside traced graphs: fake outputs are the dialect's, launches are visible, a symbolic batch adds no guard."""

import kernel_cases
import pytest
import torch
import triton
from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, triton_kernel_wrapper_mutation
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton.backends.compiler import GPUTarget

from gdnfuse import dialect
from gdnfuse.kernels import implementations

CALLS = {
    "causal_conv_update": kernel_cases.conv(6, 12, 4, 4, bias=True),
    "fused_gating_delta_rule": kernel_cases.rule(6, 3, 2, 4, 24, 16),
    "packed_decode": kernel_cases.packed(6, 2, 4, 24, 16),
    "gated_rms_norm": kernel_cases.norm((6, 1, 4, 16), torch.float32, torch.bfloat16),
    "mixer_decode": kernel_cases.mixer(6, 2, 4, 24, 16, dtype=torch.bfloat16),
}


def faked(op, dynamic):
    """A call's arguments as fake tensors, the batch symbolic if `dynamic`, with their mode."""
    args, kwargs = CALLS[op]()
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(name, value):
        if not isinstance(value, torch.Tensor):
            return value
        sizes = [DimDynamic.STATIC] * value.dim()
        if dynamic and name in kernel_cases.BATCHED:
            sizes[0] = DimDynamic.DUCK
        return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    return mode, [fake(n, v) for n, v in zip(dialect.OPS[op].arg_names, args, strict=False)], kwargs


def launches(op, args, kwargs):
    graph = make_fx(lambda *a: implementations()[op].launch(*a, **kwargs))(*args).graph
    return graph, [n for n in graph.nodes if n.target is triton_kernel_wrapper_mutation]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", CALLS)
def test_fake_output_is_the_dialects(op, dynamic):
    mode, args, kwargs = faked(op, dynamic)
    with mode:
        got = implementations()[op].op(*args, **kwargs)
        want = dialect.OPS[op].overload(*args, **kwargs)
    assert (got.dtype, got.device, [str(n) for n in got.shape]) == (want.dtype, want.device, [str(n) for n in want.shape])


@pytest.mark.parametrize("op", CALLS)
def test_symbolic_batch_adds_no_guard(op):
    mode, args, kwargs = faked(op, dynamic=True)
    with mode:
        implementations()[op].supports(*args, **kwargs)
        graph, found = launches(op, args, kwargs)
    assert not mode.shape_env.guards
    assert len(found) == (2 if op == "mixer_decode" else 1)
    assert all(isinstance(n.kwargs["grid"][0][0], torch.fx.Node) for n in found)
    called = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert not [name for name in called if name.startswith(("aten.clone", "aten.copy", "aten._to"))]


class Hopper:
    """Stands for a device's driver where there is none."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.mark.parametrize("op", CALLS)
def test_torch_sees_exactly_what_is_written(op, monkeypatch):
    """torch analyses the kernels for mutated arguments, and falls back on "all of them" where it cannot follow."""
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper(), raising=False)
    mode, args, kwargs = faked(op, dynamic=False)
    with mode:
        _, found = launches(op, args, kwargs)
        for node in found:
            values = {n: v.meta["val"] if isinstance(v, torch.fx.Node) else v for n, v in node.kwargs["kwargs"].items()}
            where = (node.kwargs["kernel_idx"], node.kwargs["constant_args_idx"])
            written = set(get_mutated_tensors(*where, values, node.kwargs["tma_descriptor_metadata"]))
            assert written == ({"out_ptr"} if op == "gated_rms_norm" else {"out_ptr", "state_ptr"})


def test_mutations_are_the_dialects():
    for name, implementation in implementations().items():
        written = tuple(a.name for a in implementation.op._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
        assert written == dialect.OPS[name].mutates
        assert [a.name for a in implementation.op._schema.arguments] == list(dialect.OPS[name].arg_names)
