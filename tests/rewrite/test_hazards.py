"""Writes, modes and spellings that a rewrite must not step across, drop or stumble over; each was a defect once."""

import copy

import pytest
import torch
import torch.nn.functional as F

import gdnfuse
from gdnfuse import Status, versions
from gdnfuse.passes.lift import l2norm as lift_l2norm
from tests.models import zoo
from tests.rewrite.captured import Captured

A_LOG, DT_BIAS = torch.randn(4), torch.randn(4)
W6, W8 = torch.randn(6, 4), torch.randn(8, 4)


def gate(a):
    """Makes a graph one with a GDN layer, so that the rewritten graph is the one that runs."""
    return -A_LOG.exp() * F.softplus(a + DT_BIAS)


def l2norm(x):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


@torch.no_grad()
def same_as_eager(f, *args, **kwargs):
    ours, theirs = [a.clone() for a in args], [a.clone() for a in args]
    wanted = f(*theirs)
    found = torch.compile(f, backend="gdnfuse", fullgraph=True, options={"inner": "eager"}, **kwargs)(*ours)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for r in gdnfuse.reports():
        assert r.rewritten or "autocast" in r.note, r.note


# Writes that a replacement must not move across, and that must not be dropped.


def partial_view_of_operand_written(x):
    y = x * 1.5
    y[0].add_(1.0)
    return l2norm(y), gate(x)


def operand_is_partial_view_of_what_is_written(x):
    y = x * 1.5
    part = y[0]
    y.add_(1.0)
    return l2norm(part), gate(x)


def operand_written_by_inplace_keyword(x):
    y = x * 1.5
    F.relu(y, inplace=True)
    return l2norm(y), gate(x)


def unread_silu_with_inplace_keyword(x):
    F.silu(x, inplace=True)
    return gate(x)


def unread_result_of_out_keyword(x, o):
    torch.add(x, 1.0, out=o)
    return gate(x)


def operand_written_by_out_keyword(x, o):
    torch.mul(x, 1.0, out=o)
    return l2norm(o), gate(x)


def piece_written_between_the_slices_of_a_buffer(x):
    y, buffer = x.clone(), torch.zeros(2, 2, 3, 4)
    buffer[0] = y
    y.add_(1.0)
    buffer[1] = y
    return buffer, gate(x)


def positional_copy_flag_of_to(x):
    y = x.to(torch.float32, False, True)
    y.add_(1.0)
    return y, gate(x)


WRITES = [
    partial_view_of_operand_written, operand_is_partial_view_of_what_is_written, operand_written_by_inplace_keyword,
    unread_silu_with_inplace_keyword, piece_written_between_the_slices_of_a_buffer, positional_copy_flag_of_to,
]  # fmt: skip


@pytest.mark.parametrize("f", WRITES, ids=lambda f: f.__name__)
def test_writes_are_seen(f):
    same_as_eager(f, torch.randn(2, 3, 4))


@pytest.mark.parametrize("f", [unread_result_of_out_keyword, operand_written_by_out_keyword], ids=lambda f: f.__name__)
def test_out_arguments(f):
    same_as_eager(f, torch.randn(2, 3, 4), torch.zeros(2, 3, 4))


# Valid models that passes have to get through.


def operands_by_keyword_linear(x):
    return F.linear(input=x, weight=W6), F.linear(x, W8), gate(x)


def operands_by_keyword_softplus(x):
    return -A_LOG.exp() * F.softplus(input=x + DT_BIAS)


def operands_by_keyword_view(x):
    return gate(torch.reshape(input=x, shape=(2, 3, 4)))


def operands_by_keyword_rsqrt(x):
    return x * torch.rsqrt(input=(x * x).sum(-1, keepdim=True) + 1e-6) + gate(x)


def grad_mode_inside(x):
    with torch.enable_grad():
        y = x * 2
    return gate(y)


def autocast_inside(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = F.linear(x, W6), F.linear(x, W8)
    return y, z, gate(x)


def autocast_without_gdn(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.linear(x, W6)


def view_of_a_sibling_that_needs_contiguity(x):
    return F.linear(x, W6).view(-1), F.linear(x, W8), gate(x)


VALID = [
    operands_by_keyword_linear, operands_by_keyword_softplus, operands_by_keyword_view, operands_by_keyword_rsqrt,
    grad_mode_inside, autocast_inside, autocast_without_gdn, view_of_a_sibling_that_needs_contiguity,
]  # fmt: skip


@pytest.mark.parametrize("f", VALID, ids=lambda f: f.__name__)
def test_passes_get_through(f):
    same_as_eager(f, torch.randn(2, 3, 4))


def test_softplus_of_a_symbolic_size():
    same_as_eager(lambda x: F.softplus(x + x.shape[0]) + gate(x), torch.randn(2, 3, 4), dynamic=True)


def test_siblings_whose_weights_have_symbolic_sizes():
    """Weights that are arguments under dynamic=True are refused."""
    same_as_eager(lambda x, v, w: (F.linear(x, v), F.linear(x, w), gate(x)), torch.randn(3, 1, 4), W6, W8, dynamic=True)


# Nodes that nobody knows: passed over, and what touches them is refused.


@torch._dynamo.allow_in_graph
def loads():
    """As a kernel is fetched: no argument, no result."""


@torch._dynamo.allow_in_graph
def doubles(x):
    x.mul_(2)


@torch._dynamo.allow_in_graph
def several(x):
    return [x + 1, None, 3, x.view(-1)]


@torch._dynamo.allow_in_graph
def linear(x, weight):
    """Has the name of torch's, and no more."""
    return x.new_ones(*x.shape[:-1], weight.shape[0])


@torch._dynamo.allow_in_graph
def keyword(weight, *, input):
    return input @ weight.T


@torch.library.custom_op("gdnfuse_tests::bump", mutates_args=("x",))
def bump(x: torch.Tensor) -> None:
    x.add_(1)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


def bumped(x):
    y = x * 1.5
    torch.ops.gdnfuse_tests.bump(y)
    return l2norm(y), gate(x)


def of_several(x):
    first, _, number, flat = several(x)
    return gate(first), l2norm(flat.view(2, 3, 4)), number


def of_a_branch(x):
    y = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))
    return gate(y), l2norm(y)


def requires_grad(x):
    y = x.clone()
    y.requires_grad_()
    return gate(y), l2norm(y)


def vmapped(x):
    return torch.vmap(lambda y: gate(y) + l2norm(y))(x), gate(x), l2norm(x)


FIRED, WRITTEN, BATCHED = "", "must not be written in place, found that", "must be a plain tensor, found one without memory"
NOT_TRACED = pytest.mark.skipif(bool(versions.older("torch", (2, 12))), reason="torch 2.11 breaks the graph at requires_grad_")
FOREIGN = [
    (lambda x: (torch._assert_async((x * x).sum() >= 0), gate(x), l2norm(x)), [FIRED], [FIRED]),
    (lambda x: (loads(), gate(x), l2norm(x)), [FIRED], [FIRED]),
    (lambda x: (doubles(x), gate(x), l2norm(x)), [WRITTEN], [WRITTEN]),
    (of_several, [FIRED], [WRITTEN]),
    (lambda x: (linear(x + 1, W6), linear(x + 2, W8), gate(x)), [FIRED], []),
    (lambda x: (keyword(input=x + 1, weight=W6), gate(x)), [FIRED], []),
    (bumped, [FIRED], [WRITTEN]),
    (of_a_branch, [FIRED], [FIRED]),
    (lambda x: gate(Twice.apply(x)), [FIRED], []),
    pytest.param(requires_grad, [FIRED], [FIRED], marks=NOT_TRACED),
    (lambda x: (gate(torch.as_tensor(x.numpy() * 2)), l2norm(x)), [FIRED], [FIRED]),
    (vmapped, [BATCHED, FIRED], [BATCHED, FIRED]),
]


@pytest.mark.parametrize(("f", "gates", "norms"), FOREIGN)
def test_what_nobody_knows_is_passed_over(f, gates, norms):
    same_as_eager(f, torch.randn(2, 3, 4))
    found = [r for r in gdnfuse.reports()[0].all_records if r.stage == "lift"]
    for rule, wanted in (("gating", gates), ("l2norm", norms)):
        reasons = [r.reason for r in found if r.rule == rule]
        assert len(reasons) == len(wanted) and all(w in r if w else not r for w, r in zip(wanted, reasons, strict=True))


def inside(x):
    return gate(x) * 2


IN_FUNCTIONS = {
    "tag_activation_checkpoint": lambda x: torch.utils.checkpoint.checkpoint(inside, x, use_reentrant=False) + 1,
    "invoke_subgraph": lambda x: nested(nested(x)) + 1,
    "cond": lambda x: torch.cond(x.sum() > 0, inside, lambda x: x * 3, (x,)) + 1,
}
nested = torch.compiler.nested_compile_region(inside)


@pytest.mark.parametrize("op", IN_FUNCTIONS)
def test_a_layer_in_a_function_that_is_given_to_an_op_is_not_fused_and_that_is_said(op):
    same_as_eager(IN_FUNCTIONS[op], torch.randn(2, 3, 4))
    (layer,) = gdnfuse.reports()[0].layers
    sentence = f"A layer must be in the graph itself, found it in a function that is an argument of {op}."
    assert not layer.fused and layer.why_not.startswith(sentence) and ("eval()" in layer.why_not) == ("checkpoint" in op)
    with pytest.raises(Exception, match=f"strict: the GDN layer .* is not fused. {sentence}"), torch.no_grad():
        torch._dynamo.reset()
        torch.compile(IN_FUNCTIONS[op], backend="gdnfuse", options={"inner": "eager", "strict": True})(torch.randn(2, 3, 4))


def test_gradients_of_a_graph_s_own_leave_it_as_it_came():
    """Our ops have no gradient, whoever asks for it."""
    f = lambda x: gate(torch.func.grad(lambda y: l2norm(y).sum())(x))  # noqa: E731
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(f, backend="gdnfuse", options={"inner": "eager"})(x), f(x))
    (report,) = gdnfuse.reports()
    assert not report.rewritten and "without gradients in the graph too" in report.note


# The report and side effects.


class Siblings(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.a(x) + self.b(x)


@torch.no_grad()
def test_a_model_without_gdn_is_left_alone():
    """Its graph is handed on as it came: no weight is packed, and the report says so."""
    model = Siblings()
    before = [p.data_ptr() for p in model.parameters()]
    torch.compile(model, backend="gdnfuse", options={"inner": "eager"})(torch.randn(2, 8))
    (report,) = gdnfuse.reports()
    assert [p.data_ptr() for p in model.parameters()] == before
    assert not [r for r in report.all_records if r.status is Status.FIRED]
    assert report.nodes_after == report.nodes_before


@torch.no_grad()
def test_a_bare_layer_is_reported_as_fused():
    """The layer as the compiled module itself."""
    model = zoo.causal_lm()
    layer = model.model.layers[0].linear_attn
    cache, _ = zoo.prefill(model, 2, "static")
    torch.compile(layer, backend="gdnfuse", options={"inner": "eager"})(torch.randn(2, 1, 64), copy.deepcopy(cache))
    (report,) = gdnfuse.reports()
    assert report.fused_layers == len(report.layers) == 1
    assert report.layers[0].records and report.layers[0].ops_after == ["linear", "mixer_decode", "linear"]


@torch.no_grad()
def test_one_record_per_anchor_also_for_shadowed_ones():
    """An anchor that an earlier match of the same rule swallowed is on record too."""

    def nested(x):
        return torch.rsqrt(torch.rsqrt(x))

    class Twice(type(lift_l2norm.RULE)):
        def anchors(self, graph):
            return [n for n in reversed(graph.nodes) if "rsqrt" in n.name]

        def match(self, anchor):
            from gdnfuse.rewrite.pattern import Op, Var
            from gdnfuse.rewrite.rule import Match

            return Match({"x": Op("rsqrt", Op("rsqrt", Var("x"))).match(anchor)["x"]}, [anchor])

        def rewrite(self, m, t):
            return t.x.rsqrt().rsqrt()

    graph = Captured(nested, torch.rand(3) + 1).normalize()

    class Positive(Twice):
        def match(self, anchor):
            m = super().match(anchor)
            m.samplers["x"] = lambda shape, g: torch.rand(shape, dtype=torch.float64, generator=g) + 1
            return m

    graph.apply(Positive())
    assert [r.status for r in graph.outcome.records] == [Status.FIRED, Status.SHADOWED]


# Motifs missed, safely: the proof or the pattern declines what is the same maths.


def test_gated_rms_norm_with_the_weight_last():
    """The rule's second spelling."""
    from gdnfuse.passes.lift import gated_rms_norm
    from tests.passes.test_lift import fires

    def f(o, z, w):
        return (o * torch.rsqrt((o * o).mean(-1, keepdim=True) + 1e-6) * F.silu(z)) * w

    fires(gated_rms_norm, f, torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(4))


@pytest.mark.parametrize("threshold", [8.0, 12.0, 15.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_proof_sees_every_threshold_of_softplus(batch, threshold):
    """With few heads, general samples alone would leave the span below the threshold empty."""
    from gdnfuse.passes.lift import gating

    graph = Captured(lambda a, A, b: -A.exp() * F.softplus(a + b, threshold=threshold), torch.randn(batch, 1, 4), A_LOG, DT_BIAS)
    assert graph.normalize().apply(gating.RULE).record.status is Status.REFUSED
