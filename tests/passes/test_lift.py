"""Every lift rule alone, on the motif written by hand: what it becomes, which spellings it sees through, what it declines."""

import pytest
import torch
import torch.nn.functional as F

from gdnfuse.passes.lift import causal_conv_update, delta_rule, gated_rms_norm, gating, l2norm, packed_linear
from gdnfuse.report.records import Status
from gdnfuse.rewrite.graph import op_name
from tests.rewrite.captured import Captured

X = torch.randn(2, 3, 4)
A_LOG, DT_BIAS = torch.randn(4), torch.randn(4)


def lifted(rule, f, *args, **kwargs):
    graph = Captured(f, *args, **kwargs).normalize().apply(rule.RULE).close()
    assert graph.outcome.records and all(r.rule == rule.RULE.name and r.stage == "lift" for r in graph.outcome.records)
    return graph


def fires(rule, f, *args, **kwargs):
    graph = lifted(rule, f, *args, **kwargs)
    assert all(r.status is Status.FIRED and r.proof_error < 1e-9 for r in graph.outcome.records), graph.outcome.records
    assert f"gdnfuse.{rule.RULE.name}" in graph.ops()
    return graph


def declines(rule, f, *args, **kwargs):
    record = lifted(rule, f, *args, **kwargs).record
    assert record.status in (Status.REFUSED, Status.UNMATCHED) and len(record.reason) > 20 and record.reason.endswith(".")
    return record


def silent(rule, f, *args):
    """No anchor at all: the rule has nothing to say about code that is not its motif."""
    assert Captured(f, *args).normalize().apply(rule.RULE).close().outcome.records == []


def norm(x, eps=1e-6):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


@pytest.mark.parametrize(
    "f",
    [
        norm, lambda x: torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) * x,
        lambda x: x * (1e-6 + x.square().sum(-1, True)).rsqrt(),
        lambda x: norm(x.float()).to(x.dtype), lambda x: norm(x.transpose(1, 2), 1e-5),
        lambda x: x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt(),
    ],
)  # fmt: skip
def test_l2norm(f):
    for x in (X, torch.randn(5, 8)[None], torch.randn(1, 1, 2, 2)):
        fires(l2norm, f, x)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * torch.rsqrt((x * x).sum(-2, keepdim=True) + 1e-6),
        lambda x: x * torch.rsqrt((x * x).sum((-1, -2), keepdim=True) + 1e-6),
        lambda x: x * torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6),
        lambda x: x / torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6),
        lambda x: torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) / x,
        lambda x: x * torch.rsqrt((x * x * x).sum(-1, keepdim=True) + 1e-6),
        lambda x: x.exp() * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6),
        lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + x),
    ],
)  # fmt: skip
def test_l2norm_declines(f):
    declines(l2norm, f, torch.randn(4, 4, 4).abs())


def test_l2norm_of_a_value_that_is_written_in_place():
    def f(x):
        y = x + 1
        z = norm(y)
        y.zero_()
        return z + y

    assert "written in place" in declines(l2norm, f, X).reason


@pytest.mark.parametrize(
    "f",
    [
        lambda a, A, b: -A.exp() * F.softplus(a + b), lambda a, A, b: F.softplus(b + a) * -A.exp(),
        lambda a, A, b: -(A.exp() * F.softplus(a + b)), lambda a, A, b: -A.float().exp() * F.softplus(a.float() + b),
        lambda a, A, b: -A.exp()[None] * F.softplus(a.transpose(0, 1) + b),
        lambda a, A, b: -F.softplus(a + b) * A.exp(), lambda a, A, b: A.exp() * -F.softplus(b + a),
    ],
)  # fmt: skip
def test_gating(f):
    for dtype in (torch.float32, torch.bfloat16):
        fires(gating, f, X.to(dtype).float(), A_LOG, DT_BIAS)


@pytest.mark.parametrize(
    "f",
    [
        lambda a, A, b: A.exp() * F.softplus(a + b), lambda a, A, b: -A.exp() * F.softplus(a - b),
        lambda a, A, b: -A * F.softplus(a + b), lambda a, A, b: -A.exp() * F.softplus(a + b, 2.0),
        lambda a, A, b: -A.exp2() * F.softplus(a + b), lambda a, A, b: F.softplus(a + b),
        lambda a, A, b: -A.exp() + F.softplus(a + b), lambda a, A, b: -F.softplus(a + b) * -A.exp(),
    ],
)  # fmt: skip
def test_gating_declines(f):
    declines(gating, f, X, A_LOG, DT_BIAS)


def test_gating_has_no_anchor_without_a_vector():
    silent(gating, lambda a, b: F.softplus(a + b), X, X)


def gated(o, z, w, eps=1e-6):
    return w * (o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + eps)) * F.silu(z)


@pytest.mark.parametrize(
    "f",
    [
        gated, lambda o, z, w: gated(o, z, w, 1e-5),
        lambda o, z, w: F.silu(z) * (w * (o * torch.rsqrt(o.square().mean(-1, True) + 1e-5))),
        lambda o, z, w: gated(o.float(), z.float(), w).to(o.dtype),
        lambda o, z, w: gated(o.reshape(-1, 4), z.reshape(-1, 4), w).view(2, 3, 4),
        lambda o, z, w: o * torch.rsqrt(o.square().mean(-1, True) + 1e-5) * w * torch.sigmoid(z),
    ],
)  # fmt: skip
def test_gated_rms_norm(f):
    fires(gated_rms_norm, f, X, torch.randn(2, 3, 4), torch.randn(4))


@pytest.mark.parametrize(
    "f",
    [
        lambda o, z, w: w * (o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + 1e-6)) * torch.tanh(z),
        lambda o, z, w: w * (o * torch.rsqrt(o.pow(2).mean(-2, keepdim=True) + 1e-6)) * F.silu(z),
    ],
)
def test_gated_rms_norm_declines(f):
    declines(gated_rms_norm, f, torch.randn(4, 4, 4), torch.randn(4, 4, 4), torch.randn(4))


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", [F.silu, None])
def test_causal_conv_update(T, biased, activation):
    def f(x, state, weight, bias):
        window = torch.cat([state, x], -1).to(weight.dtype)
        state.copy_(window[:, :, -state.shape[-1] :])
        out = F.conv1d(window, weight.unsqueeze(1), bias if biased else None, padding=0, groups=5)
        out = out[:, :, -x.shape[-1] :]
        return (activation(out) if activation else out).to(x.dtype)

    graph = fires(causal_conv_update, f, torch.randn(2, 5, T), torch.randn(2, 5, 4), torch.randn(5, 4), torch.randn(5))
    (op,) = [n for n in graph.gm.graph.nodes if op_name(n) == "gdnfuse.causal_conv_update"]
    assert "conv1d" not in graph.ops() and op.args[4] == ("silu" if activation else "none")
    assert (op.args[3] is not None) == biased


def conv(keep, take, groups=5, act=F.silu):
    def f(x, state, weight):
        window = torch.cat([state, x], -1)
        state.copy_(window[:, :, keep])
        return act(F.conv1d(window, weight, None, groups=groups)[:, :, take])

    return f


@pytest.mark.parametrize(
    "f",
    [
        conv(slice(0, 4), slice(-2, None)),
        conv(slice(-4, None), slice(0, 2)),
        conv(slice(-4, None), slice(-2, None), act=lambda x: F.silu(x) + x),
    ],
    ids=["keeps the oldest", "reads the first window", "activation with a bypass"],
)
def test_causal_conv_update_declines_or_lifts_what_is_the_motif(f):
    graph = lifted(causal_conv_update, f, torch.randn(2, 5, 2), torch.randn(2, 5, 4), torch.randn(5, 1, 4))
    (op,) = [n.args[4] for n in graph.gm.graph.nodes if op_name(n) == "gdnfuse.causal_conv_update"] or [None]
    assert op in (None, "none")


def test_a_conv_that_is_not_depthwise_is_declined():
    f = conv(slice(-4, None), slice(-2, None), groups=1)
    declines(causal_conv_update, f, torch.randn(2, 4, 2), torch.randn(2, 4, 4), torch.randn(4, 4, 4))


def recurrence(q, k, v, g, beta, state, scale=0.5, mistake=None):
    """The rule as models write it: heads before time, T steps inlined, the outputs in a buffer."""
    s, q = state, q * scale
    out = torch.zeros_like(v)
    for t in range(q.shape[2]):
        s, k_t = s * g[:, :, t].exp()[..., None, None], k[:, :, t]
        memory = (s * k_t.unsqueeze(-1)).sum(-1 if mistake == "axis" else -2)
        delta = (v[:, :, t] - memory) * beta[:, :, t, None]
        s = s + k_t.unsqueeze(-1) * delta.unsqueeze(-2)
        out[:, :, t] = ((state if mistake == "old" else s) * q[:, :, t].unsqueeze(-1)).sum(-2)
    state.copy_(s)
    return out


def rule_inputs(B, HV, T, K, V):
    q, k, v = torch.randn(B, HV, T, K), torch.randn(B, HV, T, K), torch.randn(B, HV, T, V)
    return q, k, v, -torch.rand(B, HV, T), torch.rand(B, HV, T), torch.randn(B, HV, K, V)


@pytest.mark.parametrize("sizes", [(2, 3, 1, 4, 5), (2, 3, 2, 4, 5), (1, 2, 3, 4, 4), (4, 4, 3, 4, 4)])
def test_delta_rule_of_any_number_of_inlined_steps(sizes):
    graph = fires(delta_rule, recurrence, *rule_inputs(*sizes))
    ops = graph.ops()
    assert ops.count("gdnfuse.delta_rule") == 1 and ops.count("copy_") == 1 and "exp" not in ops and "stack" not in ops


def test_delta_rule_with_time_before_heads():
    def f(q, k, v, g, beta, state):
        q, k, v, g, beta = (x.transpose(1, 2).contiguous().float() for x in (q, k, v, g, beta))
        return recurrence(q, k, v, g, beta, state).transpose(1, 2).contiguous()

    inputs = [x.transpose(1, 2).contiguous() for x in rule_inputs(2, 3, 2, 4, 5)[:5]]
    fires(delta_rule, f, *inputs, torch.randn(2, 3, 4, 5))


def test_delta_rule_knows_the_scale():
    for scale in (1.0, 0.25, 3):
        fires(delta_rule, lambda *x, s=scale: recurrence(*x, scale=s), *rule_inputs(2, 2, 1, 4, 4))
    fires(delta_rule, lambda q, *x: recurrence(q / 4, *x, scale=1), *rule_inputs(2, 2, 1, 4, 4))


@pytest.mark.parametrize("mistake", ["axis", "old"])
@pytest.mark.parametrize("T", [1, 3])
def test_delta_rule_declines_a_mistake_that_keeps_every_shape(mistake, T):
    declines(delta_rule, lambda *x: recurrence(*x, mistake=mistake), *rule_inputs(4, 4, T, 4, 4))


def test_delta_rule_declines_a_state_that_is_just_copied():
    record = declines(delta_rule, lambda s, x: s.copy_(x * 2) + 1, torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))
    assert record.status is Status.UNMATCHED and record.expected and record.got


def test_delta_rule_declines_when_the_state_is_read_elsewhere():
    record = declines(delta_rule, lambda *x: recurrence(*x) + x[5].sum(), *rule_inputs(2, 3, 2, 4, 5))
    assert record.status is Status.REFUSED and "state" in record.reason


W = [torch.randn(n, 4) for n in (6, 8, 3)]


def siblings(x, *weights):
    return tuple(F.linear(x, w) for w in weights)


@pytest.mark.parametrize("lead", [(1,), (2, 1), (3, 5), (1024,)])
def test_siblings_become_one_packed_linear(lead):
    graph = fires(packed_linear, siblings, torch.randn(*lead, 4), *W)
    assert graph.ops().count("gdnfuse.packed_linear") == 1 and "linear" not in graph.ops() and len(graph.outcome.records) == 1


def test_siblings_of_several_inputs_are_packed_apart():
    def f(x, y, *w):
        return *siblings(x, *w[:2]), *siblings(y, *w[:2]), F.linear(x + y, w[2])

    graph = fires(packed_linear, f, X, X + 1, *W)
    assert graph.ops().count("gdnfuse.packed_linear") == 2 and graph.ops().count("linear") == 1


def test_an_only_child_is_no_anchor():
    silent(packed_linear, lambda x, w: F.linear(x, w), X, W[0])


@pytest.mark.parametrize(
    ("f", "args", "found"),
    [
        (lambda x, v, w: (F.linear(x, v, v[:, 0]), F.linear(x, w)), (X, W[0], W[1]), "no bias"),
        (lambda x, v, w: (F.linear(x, v), F.linear(x, w, bias=w[:, 0])), (X, W[0], W[1]), "no bias"),
        (lambda x, v, w: (F.linear(x, v), F.linear(x, w * 2)), (X, W[0], W[1]), "must be a parameter"),
        (siblings, (X, W[0], torch.randn(4, 5).T), "contiguous"),
        (lambda x, v: (F.linear(x, v), F.linear(x, v)), (X, W[0]), "own, found"),
    ],
    ids=["bias", "bias by name", "computed weight", "strides", "shared weight"],
)
def test_siblings_are_refused(f, args, found):
    record = declines(packed_linear, f, *args)
    assert record.status is Status.REFUSED and found in record.reason


def test_siblings_of_another_dtype_are_refused():
    """Under autocast a float32 weight meets a bfloat16 input."""

    def f(x, v, w):
        return F.linear(x, v), F.linear(x, w.to(x.dtype))

    assert declines(packed_linear, f, X.bfloat16(), W[0].bfloat16(), W[1]).status is Status.REFUSED


def test_a_batch_known_at_run_time_only():
    """Siblings are packed whatever the number of rows."""

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(4, 8, bias=False)

        def forward(self, x):
            return self.a(x), self.b(x)

    small, large = torch.randn(3, 1, 4), torch.randn(2000, 1, 4)
    for x in (small, large):
        torch._dynamo.mark_dynamic(x, 0)
    fires(packed_linear, Pair(), small)
    torch._dynamo.reset()
    fires(packed_linear, Pair(), large)
