"""The rules around linears of one row or a few, on code written by hand: what fires, what is declined, what a proof refuses."""

import copy
import dataclasses
import operator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import gdnfuse
from gdnfuse.dialect import fused_linear, in_proj_conv, packed_decode
from gdnfuse.dialect import mixer_decode as mixer_op
from gdnfuse.passes.fuse import add_rms_norm, linears, mixer_linears, norm_linear, residual_linear, swiglu_linear
from gdnfuse.passes.lift import packed_linear, rms_norm
from gdnfuse.report.records import Status
from gdnfuse.rewrite import proof
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import op_name
from tests.models import zoo
from tests.rewrite.captured import Captured, copied

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
N, M = 10, 6
EPS = 1e-6
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
# In the pipeline's order.
LIFTS = (rms_norm, packed_linear)
FUSIONS = (norm_linear, mixer_linears, swiglu_linear, residual_linear, add_rms_norm)


def of(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def rewritten(f, *args):
    """The graph of f behind the lifts and fusions around linears."""
    graph = Captured(f, *args).normalize()
    for modules in (LIFTS, FUSIONS):
        graph.apply(*(module.RULE for module in modules)).normalize()
    return graph


def records(graph, rule):
    found = [r for r in graph.outcome.records if r.rule == rule.RULE.name]
    assert all(r.stage == rule.RULE.stage for r in found)
    return found


def right(graph):
    """In float64 f's values, those it writes included; in its own dtypes about as accurate as f: of so few, errors are a draw."""

    def exact(gm):
        args = [a.double() if isinstance(a, torch.Tensor) else a for a in copied(graph.args)]
        outputs = proof.evaluate(proof.in_float64(gm.graph), args)
        return [x for x in (*outputs, *args) if isinstance(x, torch.Tensor)]

    wanted = exact(graph.before)
    rows = zip(exact(graph.gm), wanted, graph.results(graph.gm), graph.results(graph.before), strict=True)
    for wide, want, found, eager in rows:
        assert zoo.relative(wide, want) < 1e-12
        assert (found.dtype, found.shape) == (eager.dtype, eager.shape)
        assert zoo.relative(found, want) <= 2 * zoo.relative(eager, want) + 2 * ROUNDING.get(found.dtype, 1e-6)
    return graph


def fires(rule, f, *args):
    """The rule fires wherever it has an anchor, and the values stay."""
    graph = right(rewritten(f, *args))
    found = records(graph, rule)
    assert found and all(r.status is Status.FIRED and r.proof_error < 1e-9 for r in found), found
    return graph


def declines(rule, f, *args):
    """The rule has one anchor and says in a sentence why it leaves it; the values stay."""
    (record,) = records(right(rewritten(f, *args)), rule)
    assert record.status in (Status.REFUSED, Status.UNMATCHED) and len(record.reason) > 20 and record.reason.endswith(".")
    return record


def silent(rule, f, *args):
    """The rule has no anchor; the values stay."""
    assert records(right(rewritten(f, *args)), rule) == []


def call_in(graph, op="fused_linear"):
    """The arguments by name of the only call of a dialect op."""
    (node,) = [n for n in graph.gm.graph.nodes if op_name(n) == f"gdnfuse.{op}"]
    return gdnfuse.dialect.OPS[op].bind(node.args, node.kwargs)


def normed(x, eps=EPS):
    y = x.float()
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)


def qwen(x, w, eps=EPS):
    return (normed(x, eps) * (1.0 + w.float())).type_as(x)


def llama(x, w, eps=EPS):
    return w * normed(x, eps).to(x.dtype)


NORMS = {
    "qwen": (qwen, EPS, 1.0),
    "llama": (llama, EPS, 0.0),
    "other eps": (lambda x, w: qwen(x, w, 1e-3), 1e-3, 1.0),
    "commuted": (lambda x, w: ((w.float() + 1) * (torch.rsqrt(1e-5 + x.float().square().mean(-1, True)) * x.float())).to(x.dtype),
                 1e-5, 1.0),
    "without casts": (lambda x, w: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * w, EPS, 0.0),
    "half an offset": (lambda x, w: (normed(x) * (0.5 + w.float())).to(x.dtype), EPS, 0.5),
    "computed weight": (lambda x, w: (normed(x) * (1 - w.float())).to(x.dtype), EPS, 0.0),
    "flattened": (lambda x, w: qwen(x.reshape(1, -1), w).reshape(x.shape), EPS, 1.0),
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("name", NORMS)
def test_rms_norm(name, dtype):
    f, eps, offset = NORMS[name]
    for lead in ((1, 1), (1,)):
        graph = fires(rms_norm, f, of(*lead, N, dtype=dtype), of(N, dtype=dtype))
        found = call_in(graph, "rms_norm")
        assert (found["eps"], found["offset"]) == (eps, offset) and "rsqrt" not in graph.ops()


def on_another_axis(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + EPS) * w


def scaled(x, w):
    return x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), EPS, alpha=2)) * w


@pytest.mark.parametrize(
    ("f", "status", "found"),
    [
        (on_another_axis, "refused", "float64 proof failed"),
        (scaled, "refused", "float64 proof failed"),
        (lambda x, w: normed(x) * torch.add(w, 1, alpha=2), "refused", "float64 proof failed"),
        (lambda x, w: x * torch.rsqrt((x * x * x).abs().mean(-1, True) + EPS) * w, "unmatched", "mul"),
        (lambda x, w: x.exp() * torch.rsqrt((x * x).mean(-1, True) + EPS) * w, "unmatched", "again"),
        (lambda x, w: x * torch.rsqrt((x * x).mean(-1, True) + w[0]) * w, "unmatched", "a constant number (eps)"),
        (lambda x, w: normed(x) + w, "unmatched", "one with a weight"),
        (lambda x, w: normed(x) * w.expand(2, N), "refused", "x must have the shape [1, 2, 10]"),
        (lambda x, w: normed(x) * w[:1], "refused", "weight must have the shape [10]"),
    ],
    ids=["axis", "scaled eps", "scaled offset", "cube", "other factor", "eps of a tensor", "no weight", "rows", "one weight"],
)
def test_rms_norm_declines(f, status, found):
    record = declines(rms_norm, f, of(1, 1, N), of(N))
    assert record.status == status and found in record.reason


@pytest.mark.parametrize(
    "f",
    [lambda x, w: normed(x) * (1 + w.float()), lambda x, w: ((y := normed(x) * (1 + w.float())).to(x.dtype), y)],
    ids=["not rounded", "read before it is rounded"],
)
def test_a_norm_that_is_not_rounded_to_the_dtype_of_its_input(f):
    record = declines(rms_norm, f, of(1, 1, N, dtype=torch.bfloat16), of(N, dtype=torch.bfloat16))
    assert "rounded to the dtype of its input, torch.bfloat16, found torch.float32" in record.reason


def test_the_norm_of_a_row_that_is_written_in_place():
    def f(x, w):
        x = x + 1
        y = qwen(x, w)
        x.zero_()
        return y + x

    assert "written in place" in declines(rms_norm, f, of(1, 1, N), of(N)).reason


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w: x * (torch.rsqrt((x * x).mean(-1, True)) + EPS) * w,
        lambda x, w: x / (torch.sqrt((x * x).mean(-1, True)) + EPS) * w,
        lambda x, w: x * torch.rsqrt((x * x + EPS).mean(-1, True)) * w,
        lambda x, w: x * torch.rsqrt((x * x).sum(-1, True) + EPS) * w,
        lambda x, w: x * torch.rsqrt((x - x.mean(-1, True)).square().sum(-1, True) / N + EPS) * w,
    ],
    ids=["eps outside", "eps in a quotient", "eps in the mean", "sum", "layer norm"],
)
def test_rms_norm_has_no_anchor_in_another_norm(f):
    silent(rms_norm, f, of(1, 1, N), of(N))


def symbolic(*shape, axis=0):
    x = of(*shape)
    torch._dynamo.mark_dynamic(x, axis)
    return x


def mlp(x, w, gate, up, down):
    h = qwen(x, w)
    return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)


def mlp_inputs(x, dtype=torch.float32):
    return x, of(N, dtype=dtype), of(M, N, dtype=dtype), of(M, N, dtype=dtype), of(N, M, dtype=dtype)


@DTYPES
def test_an_mlp_of_one_row_becomes_two_calls(dtype):
    graph = fires(norm_linear, mlp, *mlp_inputs(of(1, 1, N, dtype=dtype), dtype))
    assert graph.ops() == ["gdnfuse.fused_linear"] * 2
    fired = [r.rule for r in graph.outcome.records if r.status is Status.FIRED]
    assert fired == ["rms_norm", "packed_linear", "norm_linear", "swiglu_linear", "residual_linear"]


@DTYPES
@pytest.mark.parametrize("lead", [(2, 1), (32, 1), (1, 2), (5,)], ids=str)
def test_an_mlp_of_a_few_rows_keeps_its_norm_and_its_residual(lead, dtype):
    """Its norm is one of ours only where there is one token."""
    graph = fires(swiglu_linear, mlp, *mlp_inputs(of(*lead, N, dtype=dtype), dtype))
    fired = [r.rule for r in graph.outcome.records]
    assert fired == [*(["rms_norm"] if lead[-1] == 1 else []), "packed_linear", "swiglu_linear"]
    assert graph.ops()[-3:] == ["gdnfuse.fused_linear", "linear", "add"]
    assert call_in(graph)["norm_weight"] is None and call_in(graph)["residual"] is None


@pytest.mark.parametrize("x", [(33, 1, N), (3, 11, N), (33, N), "symbolic"], ids=str)
def test_the_linears_of_more_rows_are_left_alone(x):
    """The controls are the tests above: the same code of one row and of a few."""
    graph = right(rewritten(mlp, *mlp_inputs(symbolic(3, 1, N) if x == "symbolic" else of(*x))))
    assert not [r for r in graph.outcome.records if r.stage == "fuse"] and "gdnfuse.fused_linear" not in graph.ops()


@pytest.mark.parametrize("x", [(1, 3, N), (2, 5, N), "symbolic"], ids=str)
def test_the_norm_of_a_prompt_is_left_alone(x):
    x = symbolic(1, 3, N, axis=1) if x == "symbolic" else of(*x)
    graph = Captured(qwen, x, of(N)).normalize().apply(rms_norm.RULE).close()
    assert graph.outcome.records == []


@DTYPES
@pytest.mark.parametrize(("norm", "eps"), [(qwen, 1e-6), (llama, 1e-5)])
@pytest.mark.parametrize("lead", [(1, 1), (1,)], ids=str)
def test_norm_linear(norm, eps, lead, dtype):
    args = [of(*s, dtype=dtype) for s in ((*lead, N), (N,), (M, N))]
    graph = fires(norm_linear, lambda x, w, v: F.linear(norm(x, w, eps), v), *args)
    found = call_in(graph)
    assert graph.ops() == ["gdnfuse.fused_linear"]
    assert (found["norm_eps"], found["norm_offset"]) == (eps, 1.0 if norm is qwen else 0.0)


@DTYPES
def test_norm_linear_of_siblings(dtype):
    def f(x, w, *weights):
        h = qwen(x, w)
        return tuple(F.linear(h, v) for v in weights)

    graph = fires(norm_linear, f, *(of(*s, dtype=dtype) for s in ((1, 1, N), (N,), (M, N), (3, N), (1, N))))
    assert graph.ops() == ["gdnfuse.fused_linear", "narrow", "narrow", "narrow"] and len(call_in(graph)["weights"]) == 3


def test_norm_linear_through_views_and_casts():
    bf16 = torch.bfloat16
    fires(norm_linear, lambda x, w, v: F.linear(qwen(x, w).reshape(1, -1), v), of(1, 1, N), of(N), of(M, N))
    fires(norm_linear, lambda x, w, v: F.linear(qwen(x, w)[0], v), of(1, 1, N), of(N), of(M, N))
    fires(norm_linear, lambda x, w, v: F.linear(qwen(x, w).to(v.dtype), v), of(1, 1, N), of(N), of(M, N, dtype=bf16))
    fires(norm_linear, lambda x, w, v: F.linear(input=qwen(x, w), weight=v), of(1, 1, N), of(N), of(M, N))


@pytest.mark.parametrize(
    ("f", "reader"),
    [
        (lambda x, w, v, b: (F.linear(h := qwen(x, w), v), h), "output"),
        (lambda x, w, v, b: F.linear(h := qwen(x, w), v) + h.sum(), "sum"),
        (lambda x, w, v, b: (F.linear(h := qwen(x, w), v), F.linear(h, v, b)), "linear"),
        (lambda x, w, v, b: (F.linear(h := qwen(x, w), v), F.linear(h.expand(2, 1, N), v)), "expand"),
    ],
    ids=["returned", "sum", "biased linear", "more rows"],
)
def test_norm_linear_declines_a_norm_that_is_read_elsewhere(f, reader):
    record = declines(norm_linear, f, of(1, 1, N), of(N), of(M, N), of(M))
    assert record.status == "refused" and "alone, found that" in record.reason and reader in record.reason


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w, v, b: F.linear(qwen(x, w), v, b),
        lambda x, w, v, b: F.linear(qwen(x, w), v, bias=b),
        lambda x, w, v, b: F.linear(qwen(x, w).expand(3, 1, N), v),
        lambda x, w, v, b: F.linear(qwen(x, w) * 2, v),
        lambda x, w, v, b: qwen(x, w) @ v.T,
    ],
    ids=["bias", "bias by name", "rows", "something between", "matmul"],
)
def test_norm_linear_has_no_anchor(f):
    silent(norm_linear, f, of(1, 1, N), of(N), of(M, N), of(M))


def swiglu(x, gate, up):
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def halves(x, row):
    y = F.linear(x, row)
    return F.silu(y.narrow(-1, 0, M)) * y.narrow(-1, M, M)


def commuted(x, gate, up):
    g = F.linear(x, gate)
    return F.linear(x, up) * F.silu(input=g)


def reshaped(x, gate, up):
    return F.silu(F.linear(x, gate).view(-1, M)) * F.linear(x, up).view(-1, M)


@DTYPES
@pytest.mark.parametrize("lead", [(1, 1), (1,), (), (2, 1), (8, 1), (4, 2), (32,)], ids=str)
@pytest.mark.parametrize("f", [swiglu, commuted, reshaped, halves])
def test_swiglu_linear(f, lead, dtype):
    weights = [(2 * M, N)] if f is halves else [(M, N), (M, N)]
    graph = fires(swiglu_linear, f, *(of(*s, dtype=dtype) for s in ((*lead, N), *weights)))
    found = call_in(graph)
    assert found["swiglu"] and found["norm_weight"] is None and len(found["weights"]) == len(weights)
    assert not {"silu", "mul", "narrow", "linear", "gdnfuse.packed_linear"} & {*graph.ops()}


@DTYPES
@pytest.mark.parametrize("norm", [qwen, llama])
def test_swiglu_linear_between_a_norm_and_a_residual(norm, dtype):
    def f(x, w, gate, up):
        return x + swiglu(norm(x, w), gate, up)

    graph = fires(swiglu_linear, f, *(of(*s, dtype=dtype) for s in ((1, 1, N), (N,), (N, N), (N, N))))
    found = call_in(graph)
    assert graph.ops() == ["gdnfuse.fused_linear"] and found["residual"] is found["x"]
    assert found["swiglu"] and found["norm_offset"] == (1.0 if norm is qwen else 0.0)


def square(x, a, b):
    s = F.silu(F.linear(x, a))
    return s * s + F.linear(x, b)


@pytest.mark.parametrize(
    ("f", "found"),
    [
        (lambda x, a, b: F.linear(x, a) * F.silu(F.linear(x, b)), "halves of 6 columns"),
        (lambda x, a, b: F.silu(F.linear(x, a)) + F.linear(x, b), "a product with the other half"),
        (lambda x, a, b: F.silu(F.linear(x, a)) * x[..., :M] + F.linear(x, b), "the other part"),
        (lambda x, a, b: F.silu(F.linear(x, a)) * F.linear(x, b).exp(), "the other part"),
        (square, "the other part"),
        (lambda x, a, b: F.silu(F.linear(x, a))[..., None] * F.linear(x, b)[..., None, :], "[1, 1, 6] of torch.float32"),
        (lambda x, a, b: F.silu(F.linear(x, a)) * F.linear(x, b).transpose(-1, -2), "[1, 1, 6] of torch.float32"),
        (lambda x, a, b: F.silu(F.linear(x, a)) * F.linear(x, b).double(), "[1, 1, 6] of torch.float32"),
    ],
    ids=["gate second", "sum", "other factor", "something between", "square", "outer", "column", "float64"],
)
def test_swiglu_linear_declines(f, found):
    record = declines(swiglu_linear, f, of(1, 1, N), of(M, N), of(M, N))
    assert record.status == "unmatched" and found in record.reason


def test_swiglu_linear_declines_what_are_not_halves():
    x, a, b = of(1, 1, N), of(M, N), of(M, N)
    third = declines(swiglu_linear, lambda x, a, b, c: (swiglu(x, a, b), F.linear(x, c)), x, a, b, of(4, N))
    assert "halves of 8 columns" in third.reason
    # One column against many: the product broadcasts.
    assert "halves of 3 columns" in declines(swiglu_linear, swiglu, x, of(1, N), b).reason

    def overlapping(x, row):
        y = F.linear(x, row)
        return F.silu(y.narrow(-1, 0, M)) * y.narrow(-1, M - 1, M)

    assert "halves of 6 columns" in declines(swiglu_linear, overlapping, x, of(2 * M, N)).reason


def test_swiglu_linear_declines_a_row_that_is_read_elsewhere():
    def f(x, row):
        y = F.linear(x, row)
        return F.silu(y.narrow(-1, 0, M)) * y.narrow(-1, M, M), y.narrow(-1, 0, 2)

    record = declines(swiglu_linear, f, of(1, 1, N), of(2 * M, N))
    assert record.status == "refused" and "by its halves alone" in record.reason


@pytest.mark.parametrize("again", ["gate", "up", "silu"])
def test_swiglu_linear_declines_halves_that_are_read_elsewhere(again):
    """What is fused away must not be computed twice."""

    def f(x, a, b):
        parts = {"gate": F.linear(x, a), "up": F.linear(x, b)}
        parts["silu"] = F.silu(parts["gate"])
        return parts["silu"] * parts["up"], parts[again]

    assert "alone" in declines(swiglu_linear, f, of(1, 1, N), of(M, N), of(M, N)).reason


def test_swiglu_linear_declines_a_gate_that_is_written_in_place():
    def f(x, row):
        y = F.linear(x, row)
        return F.silu(y.narrow(-1, 0, M), inplace=True) * y.narrow(-1, M, M)

    assert "written in place" in declines(swiglu_linear, f, of(1, 1, N), of(2 * M, N)).reason


@pytest.mark.parametrize(
    "f",
    [
        lambda x, a, b, c: F.gelu(F.linear(x, a)) * F.linear(x, b),
        lambda x, a, b, c: F.linear(x, a).sigmoid() * F.linear(x, b),
        lambda x, a, b, c: F.silu(F.linear(x, a)) * F.linear(x.exp(), b),
        lambda x, a, b, c: F.silu(F.linear(x, a, c)) * F.linear(x, b, c),
        lambda x, a, b, c: swiglu(x.expand(33, 1, N), a, b),
        lambda x, a, b, c: F.silu(F.linear(x, a)[..., :3]) * F.linear(x, a)[..., 3:],
    ],
    ids=["gelu", "sigmoid", "two inputs", "bias", "rows", "slices"],
)
def test_swiglu_linear_has_no_anchor(f):
    silent(swiglu_linear, f, of(1, 1, N), of(M, N), of(M, N), of(M))


def test_swiglu_linear_has_no_anchor_at_any_number_of_rows():
    silent(swiglu_linear, swiglu, symbolic(3, 1, N), of(M, N), of(M, N))


RESIDUALS = {
    "right": lambda x, w, v, r: F.linear(x, w) + r,
    "left": lambda x, w, v, r: r + F.linear(x, w),
    "torch.add": lambda x, w, v, r: torch.add(r, F.linear(x, w)),
    "computed later": lambda x, w, v, r: F.linear(x, w) + r.exp(),
    "views": lambda x, w, v, r: (F.linear(x, w).view(-1) + r.view(-1)).view(1, 1, -1),
    "vector": lambda x, w, v, r: F.linear(x, w) + r[0, 0],
    "transposed": lambda x, w, v, r: F.linear(x, w) + r.reshape(1, -1, 1).transpose(1, 2),
    "x itself": lambda x, w, v, r: x + F.linear(x, w),
    "x computed": lambda x, w, v, r: (y := x.exp()) + F.linear(y, w),
    "another linear": lambda x, w, v, r: F.linear(x, w) + F.linear(r, v),
    "the linear before": lambda x, w, v, r: (y := F.linear(x, w)) + F.linear(y, v),
    "one weight twice": lambda x, w, v, r: F.linear(x, w) + F.linear(r, w),
}


@DTYPES
@pytest.mark.parametrize("name", RESIDUALS)
def test_residual_linear(name, dtype):
    graph = fires(residual_linear, RESIDUALS[name], *(of(*s, dtype=dtype) for s in ((1, 1, N), (N, N), (N, N), (1, 1, N))))
    assert call_in(graph)["residual"] is not None and not {"add", "mul"} & {*graph.ops()}


def test_a_residual_of_two_linears_is_the_earlier_one():
    graph = fires(residual_linear, RESIDUALS["another linear"], of(1, 1, N), of(N, N), of(N, N), of(1, 1, N))
    found = call_in(graph)
    assert op_name(found["residual"]) == "linear" and found["residual"].args[0] is not found["x"]


def test_a_linear_takes_one_residual():
    def once(x, w, v, r):
        return F.linear(x, w) + r + x, F.linear(r, v)

    def in_turn(x, w, v, r):
        """The later linear has a residual already when the second sum is looked at."""
        y = F.linear(r, v)
        z = x.exp()
        return (F.linear(z, w) + z) + y

    args = of(1, 1, N), of(N, N), of(N, N), of(1, 1, N)
    graph = fires(residual_linear, once, *args)
    assert len(records(graph, residual_linear)) == 1 and graph.ops().count("add") == 1
    graph = fires(residual_linear, in_turn, *args)
    assert graph.ops().count("gdnfuse.fused_linear") == 2 and "add" not in graph.ops()


@DTYPES
def test_residual_linear_behind_a_norm(dtype):
    args = [of(*s, dtype=dtype) for s in ((1, 1, N), (N,), (N, N))]
    graph = fires(residual_linear, lambda x, w, v: F.linear(qwen(x, w), v) + x, *args)
    found = call_in(graph)
    assert graph.ops() == ["gdnfuse.fused_linear"] and found["norm_offset"] == 1.0 and found["residual"] is found["x"]


def test_a_residual_that_is_cast_leaves_the_sum_its_dtype():
    x, w, r = of(1, 1, N, dtype=torch.bfloat16), of(M, N, dtype=torch.bfloat16), of(1, 1, M)
    right(rewritten(lambda x, w, r: F.linear(x, w) + r.to(x.dtype), x, w, r))


def residual(x, w, r):
    return F.linear(x, w) + r


@pytest.mark.parametrize(
    ("r", "found"),
    [
        (torch.ones(2, 1, M), "a residual of the linear's shape, [1, 1, 6]"),
        (torch.ones(1), "a residual of the linear's shape, [1, 1, 6]"),
        (torch.tensor(2.0), "a residual of the linear's shape, [1, 1, 6]"),
        (2.0, "a residual of the linear's shape, [1, 1, 6]"),
        (torch.ones(M, 1), "could not be run"),
        (torch.ones(1, 1, M, dtype=torch.bfloat16), "a residual of torch.float32"),
        (torch.ones(1, 1, M, dtype=torch.float64), "a residual of torch.float32"),
        (torch.arange(M), "a residual of torch.float32"),
    ],
    ids=["rows", "one element", "scalar", "number", "outer sum", "bf16", "fp64", "int64"],
)
def test_residual_linear_declines_another_shape_or_dtype(r, found):
    assert found in declines(residual_linear, residual, of(1, 1, N), of(M, N), r).reason


def test_residual_linear_declines_a_symbolic_residual():
    assert "the linear's shape" in declines(residual_linear, residual, of(1, 1, N), of(M, N), symbolic(3, 1, M)).reason


@pytest.mark.parametrize(
    ("f", "found"),
    [
        (lambda x, w, r: ((y := F.linear(x, w)) + r, y), "alone, found that output"),
        (lambda x, w, r: ((y := F.linear(x, w)) + r) * y, "alone, found that mul"),
        (lambda x, w, r: (y := F.linear(x, w)) + y, "a residual of the linear's shape"),
        (lambda x, w, r: F.linear(x, w) + r.add_(1) - r.mul_(2), "written in place"),
    ],
    ids=["returned", "read twice", "itself", "written residual"],
)
def test_residual_linear_declines_other_readers_and_writers(f, found):
    assert found in declines(residual_linear, f, of(1, 1, N), of(M, N), of(1, 1, M)).reason


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w, r, b: torch.add(r, F.linear(x, w), alpha=2),
        lambda x, w, r, b: F.linear(x, w).add_(r),
        lambda x, w, r, b: r.add_(F.linear(x, w)) * 2,
        lambda x, w, r, b: F.linear(x, w) - r,
        lambda x, w, r, b: F.linear(x, w, b) + r,
        lambda x, w, r, b: F.linear(x.expand(2, 1, N), w) + r,
        lambda x, w, r, b: F.linear(x, w) * 2 + r,
    ],
    ids=["alpha", "add_", "add_ of the linear", "sub", "bias", "rows", "scaled"],
)
def test_residual_linear_has_no_anchor(f):
    silent(residual_linear, f, of(1, 1, N), of(M, N), of(1, 1, M), of(M))


def test_residual_linear_of_a_sum_in_memory_of_the_graphs_own():
    """Nobody else sees that memory, so normalize writes the sum elsewhere."""
    g = Captured(lambda x, w, r: operator.iadd(F.linear(x, w), r), of(1, 1, N), of(M, N), of(1, 1, M)).normalize()
    assert g.apply(residual_linear.RULE).close().record.status is Status.FIRED


def test_residual_linear_has_no_anchor_in_a_part_of_a_packed_row():
    silent(residual_linear, lambda x, w, v, r: (F.linear(x, w) + r, F.linear(x, v)), of(1, 1, N), of(M, N), of(3, N), of(1, 1, M))


def test_siblings_are_proved_with_a_few_rows():
    """As a first prompt is of a fixed length, however long."""
    g = Captured(lambda x, w, v: (F.linear(x, w), F.linear(x, v)), of(3, 500, N), of(M, N), of(M, N)).normalize()
    (anchor,) = packed_linear.RULE.anchors(g.gm.graph)
    assert packed_linear.RULE.match(anchor).shapes["x"] == (2, 2, 8)
    assert g.apply(packed_linear.RULE).close().record.status is Status.FIRED


def added(norm):
    """The norm of a sum, and the sum itself: the residual stream."""
    return lambda x, w, r, n: (norm(h := r + F.linear(x, w), n), h)


def sum_inputs(rows, dtype=torch.float32):
    return [of(*s, dtype=dtype) for s in ((rows, 1, N), (M, N), (rows, 1, M), (M,))]


@DTYPES
@pytest.mark.parametrize("rows", [2, 32, 33, 100])
@pytest.mark.parametrize(("norm", "offset"), [(qwen, 1.0), (llama, 0.0)])
def test_add_rms_norm(norm, offset, rows, dtype):
    graph = fires(add_rms_norm, added(norm), *sum_inputs(rows, dtype))
    found = call_in(graph, "add_rms_norm")
    assert graph.ops() == ["linear", "gdnfuse.add_rms_norm", "getitem", "getitem"]
    assert op_name(found["x"]) == "linear" and found["residual"].op == found["weight"].op == "placeholder"
    assert (found["eps"], found["offset"]) == (EPS, offset)


SUMS = {
    "left": lambda x, w, r, n: qwen(r + F.linear(x, w), n),
    "right": lambda x, w, r, n: qwen(F.linear(x, w) + r, n),
    "torch.add": lambda x, w, r, n: qwen(torch.add(F.linear(x, w), r), n),
    "other eps": lambda x, w, r, n: qwen(F.linear(x, w) + r, n, 1e-3),
    "computed later": lambda x, w, r, n: qwen(F.linear(x, w) + r.exp(), n),
    "read later": lambda x, w, r, n: ((h := F.linear(x, w) + r) * 2, qwen(h, n), h.exp()),
    "another linear": lambda x, w, r, n: qwen(F.linear(x, w) + F.linear(x.exp(), w), n),
    "swiglu": lambda x, w, r, n: qwen(F.silu((y := F.linear(x, w)).narrow(-1, 0, 3)) * y.narrow(-1, 3, 3) + r[..., :3], n[:3]),
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("name", SUMS)
def test_add_rms_norm_of_every_sum(name, dtype):
    graph = fires(add_rms_norm, SUMS[name], *sum_inputs(3, dtype))
    found = call_in(graph, "add_rms_norm")
    assert op_name(found["x"]) == ("gdnfuse.fused_linear" if name == "swiglu" else "linear") and "add" not in graph.ops()


def test_add_rms_norm_takes_the_later_linear_and_leaves_the_earlier_one_as_residual():
    found = call_in(fires(add_rms_norm, SUMS["another linear"], *sum_inputs(2)), "add_rms_norm")
    assert op_name(found["x"].args[0]) == "exp" and found["residual"].args[0].op == "placeholder"


@DTYPES
def test_add_rms_norm_along_the_residual_stream(dtype):
    def f(x, o, w, gate, up, down, v):
        h = x + F.linear(x.sin(), o)
        h = h + F.linear(swiglu(qwen(h, w), gate, up), down)
        return llama(h, v)

    shapes = ((2, 1, N), (N, N), (N,), (M, N), (M, N), (N, M), (N,))
    graph = fires(add_rms_norm, f, *(of(*s, dtype=dtype) for s in shapes))
    ops = ["sin", "linear", "gdnfuse.add_rms_norm", "gdnfuse.fused_linear", "linear", "gdnfuse.add_rms_norm"]
    assert [op for op in graph.ops() if op != "getitem"] == ops
    first, second = [n for n in graph.gm.graph.nodes if op_name(n) == "gdnfuse.add_rms_norm"]
    assert second.args[1].args == (first, 0)


@pytest.mark.parametrize(
    ("f", "status", "found"),
    [
        (lambda x, w, r, n: qwen(x[..., :M] + r, n), "unmatched", "a sum with a linear without bias"),
        (lambda x, w, r, n: qwen(F.linear(x, w, n) + r, n), "unmatched", "a sum with a linear without bias"),
        (lambda x, w, r, n: qwen(F.linear(x, w).exp() + r, n), "unmatched", "a sum with a linear without bias"),
        (lambda x, w, r, n: qwen(torch.add(r, F.linear(x, w), alpha=2), n), "unmatched", "a sum with a linear without bias"),
        (lambda x, w, r, n: qwen(F.linear(x, w) + 2.0, n), "unmatched", "[2, 1, 6] of torch.float32 throughout"),
        (lambda x, w, r, n: qwen(F.linear(x, w) + r[:1], n), "unmatched", "[2, 1, 6] of torch.float32 throughout"),
        (lambda x, w, r, n: qwen(F.linear(x, w) + n, n), "unmatched", "[2, 1, 6] of torch.float32 throughout"),
        (lambda x, w, r, n: qwen(F.linear(x[:1], w) + r, n), "unmatched", "[2, 1, 6] of torch.float32 throughout"),
        (lambda x, w, r, n: qwen(F.linear(x, w) + r.double(), n), "unmatched", "[2, 1, 6] of torch.float64 throughout"),
        (lambda x, w, r, n: qwen(F.linear(x, w) + r.bfloat16(), n), "unmatched", "[2, 1, 6] of torch.float32 throughout"),
        (lambda x, w, r, n: qwen(F.linear(x.bfloat16(), w.bfloat16()) + r, n), "unmatched", "[2, 1, 6] of torch.float32"),
        (lambda x, w, r, n: ((y := F.linear(x, w)).exp(), qwen(y + r, n)), "refused", "alone, found that exp"),
        (lambda x, w, r, n: (qwen((y := F.linear(x, w)) + r, n), y), "refused", "alone, found that output"),
        (lambda x, w, r, n: qwen((y := F.linear(x, w)) + y, n), "refused", "found y twice"),
        (lambda x, w, r, n: (qwen(F.linear(x, w) + r, n), r.mul_(2)), "refused", "written in place"),
    ],
    ids=["no linear", "bias", "something between", "alpha", "number", "one row of residual", "vector", "one row of the linear",
         "float64", "bf16", "bf16 linear", "read", "returned", "itself", "written residual"],
)  # fmt: skip
def test_add_rms_norm_declines(f, status, found):
    record = declines(add_rms_norm, f, *sum_inputs(2))
    assert record.status == status and found in record.reason


def test_add_rms_norm_has_no_anchor_at_one_row():
    silent(add_rms_norm, added(qwen), *sum_inputs(1))


@DTYPES
@pytest.mark.parametrize("axis", [0, 1])
def test_add_rms_norm_at_any_number_of_rows(axis, dtype):
    """Of sequences, or of tokens."""
    _, w, _, n = sum_inputs(3, dtype)
    x = symbolic(5, 7, N, axis=axis).to(dtype)
    torch._dynamo.mark_dynamic(x, axis)
    graph = fires(add_rms_norm, lambda x, w, n: (qwen(h := F.linear(x, w) + F.linear(x.exp(), w), n), h), x, w, n)
    assert "add" not in graph.ops()


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w, r, n: qwen(F.linear(x, w), n) + r,
        lambda x, w, r, n: qwen(F.linear(x, w) - r, n),
        lambda x, w, r, n: qwen((F.linear(x, w) + r) * 2, n),
        lambda x, w, r, n: qwen((F.linear(x, w) + r).reshape(1, 2, M), n),
    ],
    ids=["norm before the sum", "difference", "something between", "two tokens"],
)
def test_add_rms_norm_has_no_anchor(f):
    silent(add_rms_norm, f, *sum_inputs(2))


def mixer(
    *,
    dtype=torch.float32,
    batch=1,
    order="qkvzba",
    heads=(1, 2),
    V=4,
    bias=False,
    before=lambda x: x,
    first=F.linear,
    last=F.linear,
):
    """A mixer between two linears, and its arguments; `before`, `first` and `last` stand for what is around it."""
    K = 3
    args, _ = mixer_op.example_call(batch, *heads, K, V, dtype, bias=bias, order=order)
    row, tensors, constants = args[0], args[1:8], args[8:]

    def f(x, w_in, w_out, *tensors):
        y = torch.ops.gdnfuse.mixer_decode.default(first(before(x), w_in), *tensors, *constants)
        return last(y, w_out)

    weights = of(row.shape[-1], N, dtype=dtype) / N**0.5, of(N, heads[1] * V, dtype=dtype)
    return f, of(batch, 1, N, dtype=dtype), *weights, *tensors


W = torch.linspace(-1, 1, N)


@DTYPES
@pytest.mark.parametrize(("order", "grouped"), [("qkvzba", False), ("azqkvb", False), ("vkzqab", True), ("qkvz,ba", True)])
@pytest.mark.parametrize("bias", [False, True])
def test_mixer_linears(bias, order, grouped, dtype):
    graph = fires(mixer_linears, *mixer(dtype=dtype, order=order, heads=(2, 6), bias=bias))
    assert [op for op in graph.ops() if op != "narrow"] == [
        "gdnfuse.in_proj_conv", "gdnfuse.packed_decode", "reshape", "gdnfuse.fused_linear"
    ]  # fmt: skip
    row, out = call_in(graph, "in_proj_conv"), call_in(graph)
    assert row["norm_weight"] is None and (row["conv_bias"] is not None) == bias and (row["parts"] is not None) == grouped
    assert out["gate"] is not None and out["norm_eps"] == EPS and out["residual"] is None


@DTYPES
@pytest.mark.parametrize("norm", [qwen, llama])
def test_mixer_linears_between_a_norm_and_a_residual(norm, dtype):
    f, x, *rest = mixer(dtype=dtype, before=lambda x: norm(x, W.to(x.dtype)))
    graph = fires(mixer_linears, lambda x, *rest: x + f(x, *rest), x, *rest)
    row, out = call_in(graph, "in_proj_conv"), call_in(graph)
    assert (row["norm_eps"], row["norm_offset"]) == (EPS, 1.0 if norm is qwen else 0.0)
    assert out["residual"] is row["x"] and not {"add", "gdnfuse.rms_norm"} & {*graph.ops()}


def test_mixer_linears_of_flat_rows():
    def flat(y, w):
        return F.linear(y.reshape(1, -1), w)

    fires(mixer_linears, *mixer(before=lambda x: x[0], first=lambda x, w: F.linear(x, w)[None], last=flat))


@pytest.mark.parametrize("batch", [2, 5])
def test_mixer_linears_has_no_anchor_at_more_rows(batch):
    """Nor has any other fusion."""
    graph = right(rewritten(*mixer(batch=batch, before=lambda x: qwen(x, W))))
    assert not [r for r in graph.outcome.records if r.stage == "fuse"]


@pytest.mark.parametrize(
    ("options", "status", "found"),
    [
        ({"first": lambda x, w: F.linear(x, w, w[:, 0])}, "unmatched", "a linear without bias as the mixer's row"),
        ({"first": lambda x, w: F.linear(x, w).exp()}, "unmatched", "a linear without bias as the mixer's row"),
        ({"first": lambda x, w: torch.cat([F.linear(x, w[:5]), F.linear(x, w[5:])], -1)}, "unmatched", "the mixer's row"),
        ({"last": lambda y, w: F.linear(y, w, w[:, 0])}, "unmatched", "as the one reader of the mixer"),
        ({"last": lambda y, w: y}, "unmatched", "as the one reader of the mixer"),
        ({"last": lambda y, w: (F.linear(y, w), y)}, "unmatched", "as the one reader of the mixer"),
        ({"last": lambda y, w: F.linear(y.expand(2, 1, 8), w)}, "unmatched", "as the one reader of the mixer"),
        ({"last": lambda y, w: F.linear(qwen(y, w[0]), w)}, "refused", "out_proj must be one linear without a norm"),
        ({"V": 6}, "refused", "Heads must be a power of two wide for out_proj to normalise them, found 6."),
    ],
    ids=["bias", "exp", "cat", "bias behind", "no linear", "returned", "more rows", "norm behind", "odd heads"],
)
def test_mixer_linears_declines(options, status, found):
    record = declines(mixer_linears, *mixer(**options))
    assert record.status == status and found in record.reason


def test_mixer_linears_declines_two_linears_behind():
    """Two that may be packed are one linear of two weights, two on one weight are two."""
    f, x, w_in, w_out, *rest = mixer(last=lambda y, w: y)

    def g(x, w_in, one, other, *rest):
        y = f(x, w_in, one, *rest)
        return F.linear(y, one), F.linear(y, other)

    assert "out_proj must be one linear" in declines(mixer_linears, g, x, w_in, w_out, of(3, 8), *rest).reason
    assert "as the one reader" in declines(mixer_linears, g, x, w_in, w_out, w_out, *rest).reason


def test_mixer_linears_declines_a_row_that_is_read_elsewhere():
    rows = []

    def first(x, w):
        rows.append(F.linear(x, w))
        return rows[-1]

    f, *args = mixer(first=first)
    record = declines(mixer_linears, lambda *args: (f(*args), rows.pop() + 1), *args)
    assert record.status == "refused" and "alone, found that" in record.reason


@pytest.mark.parametrize(("index", "state"), [(3, "conv_state"), (8, "recurrent_state")])
def test_mixer_linears_declines_a_state_that_is_read_elsewhere(index, state):
    f, *args = mixer()
    for g in (lambda *a: (f(*a), a[index].sum()), lambda *a: a[index].sum() + f(*a)):
        record = declines(mixer_linears, g, *args)
        assert record.status == "refused" and f"{state} must be read and written here alone" in record.reason


@pytest.fixture
def no_cached_proofs():
    proof.forget()
    yield
    proof.forget()


def with_facts(m, **changes):
    return dataclasses.replace(m, facts=dataclasses.replace(m.facts, **changes))


def spoiled(monkeypatch, rule, op=fused_linear, **changes):
    """The rule's rewrite with other arguments in its call of an op; a function gets all arguments and returns the one."""
    honest = rule.RULE.rewrite

    def spoiling(target, **arguments):
        if target is op.op.overload:
            new = {name: change(arguments) if callable(change) else change for name, change in changes.items()}
            assert any(new[name] is not arguments.get(name) for name in new)
            arguments |= new
        return call(target, **arguments)

    def rewrite(m, t):
        with monkeypatch.context() as patch:
            for module in (linears, rule):
                patch.setattr(module, "call", spoiling, raising=False)
            return honest(m, t)

    monkeypatch.setattr(rule.RULE, "rewrite", rewrite)


def refused(rule, f, *args):
    record = declines(rule, f, *args)
    assert record.status == "refused" and "proof" in record.reason
    return record


OTHER_NORMS = pytest.mark.parametrize("changes", [{"eps": 2e-6}, {"eps": 0.0}, {"offset": 0.0}, {"offset": 1.001}], ids=str)


@OTHER_NORMS
def test_the_proof_refuses_another_norm(changes, monkeypatch, no_cached_proofs):
    honest = rms_norm.RULE.rewrite
    monkeypatch.setattr(rms_norm.RULE, "rewrite", lambda m, t: honest(with_facts(m, **changes), t))
    refused(rms_norm, qwen, of(1, 1, N), of(N))


@OTHER_NORMS
@pytest.mark.parametrize("rows", [2, 32])
def test_the_proof_refuses_another_norm_of_a_sum(rows, changes, monkeypatch, no_cached_proofs):
    honest = add_rms_norm.RULE.rewrite
    monkeypatch.setattr(add_rms_norm.RULE, "rewrite", lambda m, t: honest(with_facts(m, **changes), t))
    refused(add_rms_norm, added(qwen), *sum_inputs(rows))


OTHER_SUMS = {
    "x twice": {"residual": "x"},
    "residual twice": {"x": "residual"},
    "weight as residual": {"residual": "weight"},
}


@pytest.mark.parametrize("name", OTHER_SUMS)
def test_the_proof_refuses_the_norm_of_another_sum(name, monkeypatch, no_cached_proofs):
    honest, swapped = add_rms_norm.RULE.rewrite, OTHER_SUMS[name]

    def rewrite(m, t):
        return honest(m, SimpleNamespace(**{n: getattr(t, swapped.get(n, n)) for n in ("x", "residual", "weight")}))

    monkeypatch.setattr(add_rms_norm.RULE, "rewrite", rewrite)
    refused(add_rms_norm, added(qwen), *sum_inputs(2))


def test_the_proof_refuses_the_sum_in_the_place_of_its_norm(monkeypatch, no_cached_proofs):
    honest = add_rms_norm.RULE.rewrite
    monkeypatch.setattr(add_rms_norm.RULE, "rewrite", lambda m, t: honest(m, t)[::-1])
    refused(add_rms_norm, added(qwen), *sum_inputs(2))


WRONG = {
    "other eps": (norm_linear, {"norm_eps": 1e-5}),
    "no eps": (norm_linear, {"norm_eps": 0.0}),
    "offset": (norm_linear, {"norm_offset": 0.0}),
    "no norm": (norm_linear, {"norm_weight": None}),
    "swiglu of a norm": (norm_linear, {"swiglu": True}),
    "siblings swapped": (norm_linear, {"weights": lambda a: a["weights"][::-1]}),
    "halves swapped": (swiglu_linear, {"weights": lambda a: a["weights"][::-1]}),
    "one half twice": (swiglu_linear, {"weights": lambda a: a["weights"][:1] * 2}),
    "no swiglu": (swiglu_linear, {"swiglu": False}),
    "norm lost": (swiglu_linear, {"norm_weight": None}),
    "no residual": (residual_linear, {"residual": None}),
    "residual swiglu": (residual_linear, {"swiglu": True}),
    "x twice": (residual_linear, {"residual": lambda a: a["x"]}),
}


def square_mlp(x, w, gate, up, down):
    """Every width is N, so that no shape gives a mistake away."""
    h = qwen(x, w)
    z = F.silu(F.linear(h, gate)) * F.linear(h, up)
    return x.sin() + F.linear(z, down)


@pytest.mark.parametrize("name", WRONG)
def test_the_proof_refuses_another_call(name, monkeypatch, no_cached_proofs):
    rule, changes = WRONG[name]
    spoiled(monkeypatch, rule, **changes)
    refused(rule, square_mlp, of(1, 1, N), of(N), *(of(N, N) for _ in range(3)))


@pytest.mark.parametrize("name", ["halves swapped", "one half twice", "no swiglu"])
def test_the_proof_refuses_another_call_of_a_few_rows(name, monkeypatch, no_cached_proofs):
    rule, changes = WRONG[name]
    spoiled(monkeypatch, rule, **changes)
    refused(rule, square_mlp, of(8, 1, N), of(N), *(of(N, N) for _ in range(3)))


def test_the_proof_refuses_a_residual_of_the_wrong_node(monkeypatch, no_cached_proofs):
    """A node in two roles keeps its size in the proof."""
    for changes in ({"residual": None}, {"swiglu": True}):
        with monkeypatch.context() as patch:
            spoiled(patch, residual_linear, **changes)
            refused(residual_linear, lambda x, w: x + F.linear(x, w), of(1, 1, N), of(N, N))
    fires(residual_linear, lambda x, w: x + F.linear(x, w), of(1, 1, N), of(N, N))


WRONG_MIXERS = {
    "conv one column on": (in_proj_conv, {"conv_offset": lambda a: a["conv_offset"] + 1}),
    "no silu": (in_proj_conv, {"activation": "none"}),
    "no norm before": (in_proj_conv, {"norm_weight": None}),
    "other eps before": (in_proj_conv, {"norm_eps": 1e-5}),
    "offset before": (in_proj_conv, {"norm_offset": 0.0}),
    "scale": (packed_decode, {"scale": 1.0}),
    "l2norm eps": (packed_decode, {"l2norm_eps": 1e-4}),
    "gate parameters swapped": (packed_decode, {"A_log": lambda a: a["dt_bias"], "dt_bias": lambda a: a["A_log"]}),
    "other eps behind": (fused_linear, {"norm_eps": 1e-5}),
}


@pytest.mark.parametrize("name", WRONG_MIXERS)
def test_the_proof_refuses_another_mixer(name, monkeypatch, no_cached_proofs):
    op, changes = WRONG_MIXERS[name]
    spoiled(monkeypatch, mixer_linears, op, **changes)
    refused(mixer_linears, *mixer(before=lambda x: qwen(x, W)))


OTHER_PARTS = {
    "a and b swapped": lambda parts: {"a": parts["b"], "b": parts["a"]},
    "z one column early": lambda parts: {"gate": (parts["gate"][0] - 1, parts["gate"][1])},
}


@pytest.mark.parametrize("name", OTHER_PARTS)
def test_the_proof_refuses_other_parts_of_the_row(name, monkeypatch, no_cached_proofs):
    honest = mixer_linears.RULE.rewrite

    def rewrite(m, t):
        return honest(with_facts(m, parts=m.facts.parts | OTHER_PARTS[name](m.facts.parts)), t)

    monkeypatch.setattr(mixer_linears.RULE, "rewrite", rewrite)
    refused(mixer_linears, *mixer())


def step(model, batch, **options):
    """One decode step of a model compiled by us and of itself; the report, and the relative errors of logits and states."""
    run = torch.compile(model, backend="gdnfuse", fullgraph=True, options={"inner": "eager", **options})
    reference, tokens = copy.deepcopy(model), zoo.tokens_for(batch, 3)
    ours, mask = zoo.prefill(model, batch, "static")
    eager, _ = zoo.prefill(reference, batch, "static")
    errors = [zoo.relative(zoo.decode(run, ours, mask, tokens), zoo.decode(reference, eager, mask, tokens))]
    for kind in ("recurrent", "conv"):
        errors.append(zoo.relative(zoo.flat_states(ours, kind), zoo.flat_states(eager, kind)))
    (report,) = gdnfuse.reports()
    return report, errors


def statuses(report, rule):
    return [r.status for r in report.all_records if (r.rule, r.stage) == (rule.RULE.name, rule.RULE.stage)]


@pytest.mark.parametrize("capture", [pytest.param(False, marks=pytest.mark.sweep), True])
def test_a_model_of_one_sequence(capture):
    """Layers: gated delta rule, the same, attention; each with an MLP. The head reads a norm too."""
    report, errors = step(zoo.causal_lm(), 1, capture=capture)
    assert max(errors) < 1e-5 and report.fused_layers == zoo.GDN_LAYERS
    counts = {"norm_linear": 3 + 3 + 1, "mixer_linears": zoo.GDN_LAYERS, "swiglu_linear": 3, "residual_linear": 3 + 3}
    for rule in FUSIONS:
        assert statuses(report, rule) == [Status.FIRED] * counts.get(rule.RULE.name, 0), rule.RULE.name
    for layer in report.layers:
        assert zoo.ops_without_views(layer) == zoo.ONE_ROW
        assert [r.rule for r in layer.records if r.status is Status.FIRED].count("mixer_linears") == 1


def test_a_sum_of_rows_that_a_mask_selects_stays():
    x, w, n = of(7, N), of(N, N), of(N)
    selected = lambda x, w, n: qwen((y := x[x[:, 0] > 0]) + F.linear(y, w), n)  # noqa: E731
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        graph = right(rewritten(selected, x, w, n))
    (record,) = records(graph, rms_norm)
    assert record.status is Status.REFUSED and "Sizes must be known before the graph runs, found u" in record.reason


@pytest.mark.parametrize("batch", [2, pytest.param(32, marks=pytest.mark.sweep), 33])
def test_a_model_of_several_sequences(batch):
    """Every residual sum is read by a norm. Beyond 32 sequences nothing else is fused around linears."""
    report, errors = step(zoo.causal_lm(**zoo.SMALL), batch)
    assert max(errors) < 1e-5 and report.fused_layers == 1
    counts = {"swiglu_linear": 2 if batch <= 32 else 0, "add_rms_norm": 2 + 2}
    for rule in FUSIONS:
        assert statuses(report, rule) == [Status.FIRED] * counts.get(rule.RULE.name, 0), rule.RULE.name
    for layer in report.layers:
        assert zoo.ops_without_views(layer) == zoo.MANY_ROWS


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_model_with_a_prompt(dynamic):
    """Every residual sum is read by a norm; the embedding is no sum."""
    model = zoo.causal_lm(**zoo.SMALL)
    run = torch.compile(copy.deepcopy(model), backend="gdnfuse", fullgraph=True, options={"inner": "eager"})
    ids, _ = zoo.prompt(2, 70)
    if dynamic:
        torch._dynamo.mark_dynamic(ids, 1)
    with torch.no_grad():
        assert zoo.relative(run(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits) < 1e-5
    (report,) = gdnfuse.reports()
    assert report.fused_layers == 1
    assert {rule: statuses(report, rule) for rule in FUSIONS if statuses(report, rule)} == {add_rms_norm: [Status.FIRED] * 4}


def test_a_model_whose_sums_are_refused_keeps_its_result(monkeypatch, no_cached_proofs):
    honest = add_rms_norm.RULE.rewrite
    monkeypatch.setattr(add_rms_norm.RULE, "rewrite", lambda m, t: honest(with_facts(m, eps=1e-5), t))
    report, errors = step(zoo.causal_lm(**zoo.SMALL), 2)
    assert max(errors) < 1e-5 and report.fused_layers == 1
    assert statuses(report, add_rms_norm) == [Status.REFUSED] * 4


def test_a_model_whose_mixers_are_refused_keeps_its_result(monkeypatch, no_cached_proofs):
    spoiled(monkeypatch, mixer_linears, norm_eps=1e-5)
    report, errors = step(zoo.causal_lm(), 1)
    assert max(errors) < 1e-5 and report.fused_layers == zoo.GDN_LAYERS
    found = [r for r in report.all_records if r.rule == "mixer_linears"]
    assert [r.status for r in found] == [Status.REFUSED] * zoo.GDN_LAYERS
    assert all(r.reason.startswith("The float64 proof failed: output 0") for r in found)
    for layer in report.layers:
        assert "mixer_decode" in layer.ops_after and "in_proj_conv" not in layer.ops_after
