"""Kernels inside traced graphs: fake outputs are the dialect's, an op is one node, a symbolic batch adds no guard."""

import operator

import kernel_cases
import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from gdnfuse.kernels import implementations

CALLS = {
    "attention_decode": kernel_cases.attention(6, 4, 2, 16, 40, filled=20),
    "attention_growing": kernel_cases.growing(6, 4, 2, 16, 40),
    "attention_few_queries": kernel_cases.few_queries(6, 4, 2, 16, 40),
    "causal_attention": lambda: (
        tuple(torch.randn(6, n, T, 136).bfloat16() for n, T in ((4, 5), (2, 9), (2, 9))),
        {"scale": 0.3},
    ),
    "prompt_attention": kernel_cases.of_prompt(6, 4, 2, 5, 9, 16, start=2, padded=[0, 1, 2, 3, 4, 5]),
    "causal_conv": kernel_cases.prompt_conv(6, 12, 7, 4, bias=True),
    "causal_conv_record": kernel_cases.recording_conv(6, 12, 3, 4, 5, more=2),
    "chunk_delta_rule": kernel_cases.chunked(6, 70, 2, 4, 24, 16),
    "fused_gating_chunk_delta_rule": kernel_cases.chunked(6, 70, 2, 4, 24, 16, gated=True),
    "causal_conv_update": kernel_cases.conv(6, 12, 4, 4, bias=True),
    "fused_gating_delta_rule": kernel_cases.rule(6, 3, 2, 4, 24, 16),
    "delta_rule_commit": kernel_cases.commit(2, 6, 3, 4, 2, 4, 24, 16, [0, 1, 2, 3, 2, 1]),
    "delta_rule_slots": kernel_cases.slotted(3, 2, 4, 24, 16, [[2 * i, -1, 2 * i + 1] for i in range(6)], [1, 2, 3, 0, 1, 2]),
    "delta_rule_verify": kernel_cases.rule(6, 3, 2, 4, 24, 16),
    "packed_decode": kernel_cases.packed(6, 2, 4, 24, 16),
    "gated_rms_norm": kernel_cases.norm((6, 1, 4, 16), torch.float32, torch.bfloat16),
    "mixer_decode": kernel_cases.mixer(6, 2, 4, 24, 16, dtype=torch.bfloat16),
    "fused_linear": kernel_cases.linear(7, 100, torch.bfloat16, norm=True, residual=True),
    "in_proj_conv": kernel_cases.in_proj(7, 100, 5, torch.bfloat16),
    "fp8_linear": kernel_cases.fp8(160, 384, "fp8_block128", torch.bfloat16, (36,)),
    "split_linear": kernel_cases.split(7, 512, 2, torch.bfloat16, (3, 1)),
    "add_rms_norm": kernel_cases.added(100, torch.bfloat16, parts=3),
    "route": kernel_cases.routed(3, 64, 6, 2, torch.bfloat16),
    "experts": kernel_cases.chosen(3, 32, 6, 2, 16, torch.bfloat16, shared=16, gated=True, residual=True),
    "routed_experts": kernel_cases.routed_experts(64, 6, 2, 16, torch.bfloat16, norm=True),
}
STATIC = ("delta_rule_commit", "fused_linear", "in_proj_conv", "split_linear", "add_rms_norm", "routed_experts")
BATCHED = [op for op in CALLS if op not in STATIC]
# The axis of time of what a prompt, or the keys of all tokens, is made of, by the ops that take any length.
TIME = dict.fromkeys(("q", "k", "v", "g", "beta", "a", "b"), 1)
KEYS = {"keys": 2, "values": 2, "mask": 3}
TIMES = {
    "attention_growing": KEYS,
    "attention_few_queries": KEYS,
    "causal_attention": {"q": 2, "k": 2, "v": 2},
    "prompt_attention": {"q": 2, "k": 2, "v": 2, "positions": 0, "mask": 1},
    "causal_conv": {"x": 2},
    "chunk_delta_rule": TIME,
    "fused_gating_chunk_delta_rule": TIME,
    "experts": dict.fromkeys(("x", "indices", "routing_weights", "residual"), 0),
    "fp8_linear": {"x": 0, "x_scale": 1},
}


def faked(op, dynamic):
    """A call's arguments as fake tensors, the batch and a prompt's length symbolic if `dynamic`, with their mode."""
    args, kwargs = CALLS[op]()
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(name, value):
        if isinstance(value, list):
            return [fake(name, v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        sizes = [DimDynamic.STATIC] * value.dim()
        if dynamic and name in kernel_cases.BATCHED:
            sizes[0] = DimDynamic.DUCK
        if dynamic and name in TIMES.get(op, ()):
            sizes[TIMES[op][name]] = DimDynamic.DUCK
        return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    return mode, [fake(n, v) for n, v in zip(kernel_cases.meaning(op).arg_names, args, strict=False)], kwargs


def nodes_of(op, graph):
    return [n for n in graph.nodes if n.target is implementations()[op].op]


def calls(graph):
    return [n for n in graph.nodes if n.op == "call_function" and n.target is not operator.getitem]


@pytest.mark.parametrize(("op", "dynamic"), [(op, False) for op in CALLS] + [(op, True) for op in BATCHED])
def test_fake_output_is_the_references(op, dynamic):
    (mode, args, kwargs), kernel = faked(op, dynamic), implementations()[op]
    with mode:
        got = kernel.op(*args, **kwargs)
        want = kernel_cases.meaning(op).overload(*args, **kwargs)
    for mine, theirs in zip(kernel_cases.tensors(got), kernel_cases.tensors(want), strict=True):
        assert (mine.dtype, mine.device) == (theirs.dtype, theirs.device)
        assert [str(n) for n in (*mine.shape, *mine.stride())] == [str(n) for n in (*theirs.shape, *theirs.stride())]


@pytest.mark.parametrize("op", BATCHED)
def test_symbolic_sizes_add_no_guard(op):
    (mode, args, kwargs), kernel = faked(op, dynamic=True), implementations()[op]
    with mode:
        kernel.supports(*args, **kwargs)
        graph = make_fx(lambda *a: kernel.op(*a, **kwargs))(*args).graph
    assert not mode.shape_env.guards
    assert len(calls(graph)) == len(nodes_of(op, graph)) == 1


@pytest.mark.parametrize("op", CALLS)
def test_op_is_one_node_for_compilers(op):
    """Through Dynamo, functionalisation and decompositions on fakes; nothing runs."""
    args, kwargs = CALLS[op]()
    graphs = []

    def keep(gm, example_inputs):
        graphs.append(gm.graph)
        return make_boxed_func(not_run)

    def not_run(*args):
        raise NotImplementedError

    torch._dynamo.reset()
    call = implementations()[op].op
    with torch.no_grad(), pytest.raises(NotImplementedError):
        torch.compile(lambda *a: call(*a, **kwargs), backend=aot_autograd(fw_compiler=keep), fullgraph=True)(*args)
    (graph,) = graphs
    hidden = [n for n in calls(graph) if n.target is torch.ops.higher_order.auto_functionalized_v2]
    if kernel_cases.meaning(op).mutates:
        assert len(hidden) == 1 and hidden[0].args[0] is call
    else:
        assert len(calls(graph)) == len(nodes_of(op, graph)) == 1


@pytest.mark.parametrize("op", CALLS)
def test_schema_is_the_dialects(op):
    arguments = implementations()[op].op._schema.arguments
    written = tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    assert written == kernel_cases.meaning(op).mutates
    assert tuple(a.name for a in arguments if a.name != "overlap") == kernel_cases.meaning(op).arg_names


def test_every_kernel_is_traced_here():
    assert set(CALLS) == set(implementations())
