"""Reading a graph: names of ops, what a node is a view of, what writes where, module paths, dead code."""

import pytest
import torch
from torch.fx import Graph

from gdnfuse.dialect import OPS
from gdnfuse.rewrite.graph import (
    calls,
    chain,
    clean_path,
    foreign,
    held,
    is_plain,
    is_tensor,
    module_stack,
    op_name,
    peel,
    real_users,
    remove_dead,
    same,
    same_shape,
    source,
    storage,
    value,
    writes,
)
from tests.rewrite.captured import Captured

X = torch.rand(2, 3, 4)


def nodes(f, *args, **kwargs):
    graph = Captured(f, *(args or (X,)), **kwargs).gm.graph
    return list(graph.nodes), graph.output_node().args[0]


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda x: x * x, "mul"), (lambda x: torch.mul(x, x), "mul"), (lambda x: x.mul(x), "mul"),
        (lambda x: torch.multiply(x, x), "mul"), (lambda x: torch.ops.aten.mul.Tensor(x, x), "mul"),
        (lambda x: x / x, "div"), (lambda x: x.divide(x), "div"), (lambda x: -x, "neg"), (lambda x: torch.subtract(x, 1), "sub"),
        (lambda x: torch.concat([x, x]), "cat"), (lambda x: x.permute(2, 0, 1), "transpose"),
        (lambda x: torch.nn.functional.silu(x), "silu"), (lambda x: OPS["l2norm"].overload(x, 1e-6), "gdnfuse.l2norm"),
    ],
)  # fmt: skip
def test_op_name_is_one_name_for_every_spelling(f, name):
    _, (out,) = nodes(f)
    assert op_name(out) == name


def test_op_name_of_what_is_no_call():
    everything, _ = nodes(lambda x: x + 1)
    assert op_name(everything[0]) == "placeholder" and op_name(everything[-1]) == "output" and op_name(1.5) == "float"


def silu(x):
    """Of somebody else's, whatever it does."""


def by_hand(target, *args, method=False, **kwargs):
    """A call of which no trace was made, and its first argument, x; the second is y. Neither has the call a value."""
    graph = Graph()
    nodes = [graph.placeholder(name) for name in "xy"]
    for node in nodes:
        node.meta["example_value"] = torch.rand(2, 3)
    given = {"x": nodes[0], "y": nodes[1], "list": nodes, "held": graph.call_function(silu, (nodes[0],))}
    make = graph.call_method if method else graph.call_function
    return make(target, tuple(given.get(a, a) for a in args), {k: given.get(a, a) for k, a in kwargs.items()}), *nodes


COLLECTIVES = torch.ops._c10d_functional


@pytest.mark.parametrize(
    ("target", "name"),
    [(silu, "tests.silu"), (torch.ops.aten.silu, "silu"), (COLLECTIVES.all_reduce, "_c10d_functional.all_reduce")],
)
def test_op_name_of_what_is_not_torchs_is_none_of_torchs(target, name):
    node, *_ = by_hand(target, "x")
    assert op_name(node) == name and foreign(node) == (name != "silu")


@pytest.mark.parametrize(
    ("call", "written"),
    [
        (by_hand(torch.ops.aten.mul, "x", "y"), ""),
        (by_hand(torch.ops.aten.mul, "x", "y", out="y"), "y"),
        (by_hand(torch.ops.aten.add_, "x", "y"), "x"),
        (by_hand(COLLECTIVES.all_reduce, "x", "sum", "0"), ""),
        (by_hand(COLLECTIVES.all_reduce_, input="x", reduce_op="sum", group_name="0"), "x"),
        (by_hand(COLLECTIVES.all_reduce_coalesced_, "list", "sum", "0"), "xy"),
        (by_hand(torch.ops.gdnfuse.fused_linear, "x", "list"), ""),
        (by_hand(torch.ops.higher_order.cond, "x", silu, silu, "list"), "xy"),
        (by_hand(silu, "x", 3, other="y"), "xy"),
        (by_hand(silu, "held"), "x"),
        (by_hand("add", "held", "y", method=True), "xy"),
        (by_hand("requires_grad_", "x", method=True), ""),
        (by_hand(getattr, "x", "mT"), ""),
        (by_hand(torch._assert_async, "x"), ""),
    ],
    ids=lambda call: str(call[0]) if isinstance(call, tuple) else None,
)
def test_writes_of_what_is_registered_are_its_schemas_and_of_what_is_foreign_all_it_could_write(call, written):
    node, x, y = call
    assert writes(node) == {storage({"x": x, "y": y}[name]) for name in written}


def test_what_is_reached_through_a_value_that_nobody_knows_is_what_it_was_made_of():
    node, x, y = by_hand(silu, "held", "y")
    assert held(node) == {storage(x), storage(y)} and storage(node) is None
    node.meta["example_value"] = [value(y), None, 3]
    assert held(node) == {storage(y)}
    node.meta["example_value"] = value(y).to_sparse()  # which has no memory of the kind that is known
    assert held(node) == {storage(x), storage(y)} and storage(node) is None and not is_plain(value(node))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.transpose(0, 1), lambda x: x.reshape(6, 4), lambda x: x.view(-1), lambda x: x.unsqueeze(1),
        lambda x: x.permute(2, 0, 1), lambda x: x.double(), lambda x: x.to(torch.bfloat16), lambda x: x[None],
        lambda x: x[:, :, :], lambda x: torch.stack([x], 1),
        lambda x: x.contiguous(), lambda x: x.flatten(1), lambda x: x.expand(2, 3, 4), lambda x: x.clone(),
    ],
)  # fmt: skip
def test_source_is_seen_through_views_and_casts(f):
    everything, (out,) = nodes(f)
    assert peel(out) is everything[0]
    if out is not everything[0]:
        assert source(out) is everything[0] and chain(out) == [out, everything[0]]


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x[0], lambda x: x[..., :2], lambda x: x.narrow(0, 0, 1), lambda x: x.unsqueeze(0).expand(5, 2, 3, 4),
        lambda x: x + 0, lambda x: torch.stack([x, x]), lambda x: x.sum(), lambda x: x.select(0, 1),
    ],
)  # fmt: skip
def test_source_holds_all_elements_and_no_others(f):
    _, (out,) = nodes(f)
    assert source(out) is None and chain(out) == [out] and peel(out) is out


def test_chain_goes_on_to_the_node_that_computes_the_elements():
    _, (out,) = nodes(lambda x: (x + 1).double().transpose(0, 1).unsqueeze(0))
    assert [op_name(n) for n in chain(out)] == ["unsqueeze", "transpose", "double", "add"]


def test_a_size_that_is_only_known_at_run_time_is_still_seen_through():
    _, (out,) = nodes(lambda x: x.reshape(x.shape[0], -1), torch.rand(3, 4, 5), dynamic=True)
    assert peel(out).op == "placeholder"


def test_same_needs_no_guard_and_claims_only_what_is_known():
    everything, _ = nodes(lambda x, y: (x + 1, y + 1), torch.rand(3, 4), torch.rand(5, 4), dynamic=True)
    a, b = [value(n) for n in everything if n.op == "placeholder" and is_tensor(n)]
    env = a.fake_mode.shape_env
    guards = len(env.guards)
    assert same(a.shape[0], a.shape[0]) and not same(a.shape[0], b.shape[0]) and not same(a.shape[0], 3)
    assert same_shape(a.shape, a.shape) and not same_shape(a.shape, b.shape) and not same_shape(a.shape, a.shape[:1])
    assert len(env.guards) == guards


def test_real_users_are_found_behind_views():
    everything, _ = nodes(lambda x: (x.unsqueeze(0).exp(), x.double().sin(), x.cos(), x[0].tan()))
    assert sorted(op_name(u) for u in real_users(everything[0])) == ["cos", "exp", "getitem", "sin"]


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: x.copy_(y), lambda x, y: x.add_(y), lambda x, y: torch.relu_(x), lambda x, y: x.view(-1).zero_(),
        lambda x, y: x[0].add_(1), lambda x, y: torch.relu(y) + torch.nn.functional.relu(x, True),
        lambda x, y: torch.nn.functional.relu(x, inplace=True), lambda x, y: torch.add(y, 1, out=x),
        lambda x, y: OPS["causal_conv_update"].overload(y, x, torch.rand(3, 1, 2), None, "none"),
    ],
)  # fmt: skip
def test_writes_are_the_memory_a_node_writes(f):
    args = torch.rand(2, 3, 4), torch.rand(2, 3, 4)
    everything, _ = nodes(lambda x, y: (f(x, y).sum(), x.sum(), y.sum()), *args)
    x_node = next(n for n in everything if n.op == "placeholder" and "x" in n.name)
    assert [writes(n) for n in everything if writes(n)] == [{storage(x_node)}]


def test_setitem_writes_and_pure_ops_do_not():
    def f(x):
        y = x.exp()
        y[0] = 1.0
        return y.__add__(1) * torch.nn.functional.silu(x)

    everything, _ = nodes(f)
    (exp,) = [n for n in everything if op_name(n) == "exp"]
    assert [(op_name(n), writes(n)) for n in everything if writes(n)] == [("setitem", {storage(exp)})]


@pytest.mark.parametrize(
    ("path", "clean"),
    [
        ("L['self']._modules['model']._modules['layers']._modules['0']._modules['linear_attn']", "model.layers.0.linear_attn"),
        ("L['self'].model.layers[0].linear_attn", "model.layers.0.linear_attn"),
        ("L['fn'].__self__.model.norm", "model.norm"),
        ("L['decode']._torchdynamo_inline.__self__.model.norm", "model.norm"),
        ("G['model'].layers[11]", "model.layers.11"),
        ("L['self']._orig_mod.a._parameters['weight']", "a.weight"),
        ("L['args'][0].model.layers.0.linear_attn", "model.layers.0.linear_attn"),
        ("L['args'][0]._modules['layers']._modules['0']", "layers.0"),
        ("L['args'][1].norm", "1.norm"),
        ("L['self'][0].norm", "0.norm"),
        ("L['self']", "(root)"),
        ("L['args'][0]", "(root)"),
    ],
)
def test_clean_path(path, clean):
    assert clean_path(path) == clean


def test_module_stack_is_outermost_first():
    class Inner(torch.nn.Module):
        def forward(self, x):
            return x.exp()

    model = torch.nn.Sequential(Inner(), torch.nn.Sequential(Inner()))
    everything, _ = nodes(model, X)
    stacks = [module_stack(n)[-1] for n in everything if op_name(n) == "exp"]
    assert stacks == ["0", "1.0"]


def test_remove_dead_drops_pure_nodes_and_keeps_writes():
    def f(x):
        x.exp().unsqueeze(0).sum()
        x.mul_(2.0)
        x.sin()
        return x.cos()

    graph = Captured(f, X)
    remove_dead(graph.gm.graph)
    names = [op_name(n) for n in calls(graph.gm)]
    assert "sum" not in names and "exp" not in names and "unsqueeze" not in names
    assert "mul_" in names and "cos" in names
    graph.equal()


def test_remove_dead_keeps_dialect_ops_that_write():
    def f(x, state):
        OPS["l2norm"].overload(x, 1e-6)
        OPS["causal_conv_update"].overload(x, state, torch.ones(3, 1, 2), None, "none")
        return x + 1

    graph = Captured(f, X, torch.rand(2, 3, 2))
    remove_dead(graph.gm.graph)
    names = graph.ops()
    assert "gdnfuse.causal_conv_update" in names and "gdnfuse.l2norm" not in names
    graph.equal()
