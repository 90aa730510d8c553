"""Writes, modes and spellings that a rewrite must not step across, drop or stumble over; each was a defect once."""

import copy

import pytest
import torch
import torch.nn.functional as F

import gdnfuse
from gdnfuse import Status
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
