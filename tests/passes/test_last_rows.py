"""What is computed row by row and read for the last rows alone is computed for those alone, and everything else as before."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers

import gdnfuse
from gdnfuse.passes import fuse, lift
from gdnfuse.passes.last_rows import NAME, keep_last_rows
from gdnfuse.report.records import Status
from gdnfuse.rewrite.edit import infer
from gdnfuse.rewrite.evaluate import hint
from gdnfuse.rewrite.graph import calls, is_tensor, op_name, value
from tests.models import zoo
from tests.rewrite.captured import Captured

B, T, N = 2, 11, 6


def of(*shape):
    return torch.randn(shape)


def moved(f, *args, dynamic=False, rules=()):
    """The graph behind the pass, which computes what it did."""
    for x in args if dynamic else ():
        if T in x.shape:
            torch._dynamo.mark_dynamic(x, x.shape.index(T))

    def function(*args):
        out = f(*args)
        return (out,) if isinstance(out, torch.Tensor) else out

    g = Captured(function, *args).normalize().apply(*rules)
    keep_last_rows(g.gm, g.outcome)
    g.gm.graph.lint()
    return g.close()


def records(g):
    return [r for r in g.outcome.records if r.rule == NAME]


def whole(g):
    """The ops that still have all rows."""
    return [op_name(n) for n in calls(g.gm) if is_tensor(n) and T in map(hint, value(n).shape)]


def mlp(x, w, v):
    return F.linear(F.silu(F.linear(x, w)) * F.linear(x, w), v)


FIRES = {
    "mlp and residual": lambda x, w, v: (x.exp().clone() + mlp(x.exp(), w, v))[:, -1:],
    "three rows": lambda x, w, v: (x + F.linear(x, w, v[0]))[:, -3:, :],
    "an ellipsis": lambda x, w, v: F.linear(x, w)[:, -2:, ...] * 1.0,
    "heads": lambda x, w, v: (F.linear(x, w).view(x.shape[0], x.shape[1], 2, 3).transpose(1, 2) * 2.0)[:, :, -1:],
    "heads and back": lambda x, w, v: (x.view(x.shape[0], -1, 3, 2).sigmoid().view(x.shape[0], x.shape[1], -1) + 1.0)[:, -1:],
    "a vector, a column and one row": lambda x, w, v: (x.exp() * v[0] + x[..., :1].neg() - w[:1] + x[:, :1].sigmoid())[:, -2:],
    "parts of a row": lambda x, w, v: (F.linear(x, w).narrow(-1, 0, 3) * F.linear(x, w).narrow(-1, 3, 3))[:, -1:],
    "another dtype": lambda x, w, v: x.double().to(torch.float32).mul(2.0)[:, -1:],
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", FIRES)
def test_moves_up(name, dynamic):
    g = moved(FIRES[name], of(B, T, N), of(N, N), of(N, N), dynamic=dynamic)
    assert [r.status for r in records(g)] == [Status.FIRED], records(g)
    done = {"exp", "silu", "mul", "linear", "add", "sub", "tanh", "sigmoid", "neg", "to"}
    left = set(whole(g)) & done
    assert left <= {"exp"}, left


def attended(q, k, v, w):
    y = F.scaled_dot_product_attention(q.tanh(), k, v, is_causal=True, scale=0.3, enable_gqa=True)
    return F.linear(y.transpose(1, 2).contiguous().reshape(q.shape[0], q.shape[2], -1), w)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_last_queries_of_causal_attention(count, dynamic):
    def f(q, k, v, w):
        assert q.shape[2] == k.shape[2] == v.shape[2]
        return attended(q, k, v, w)[:, -count:]

    g = moved(f, of(B, 4, T, 8), of(B, 2, T, 8), of(B, 2, T, 8), of(N, 32), dynamic=dynamic)
    assert [r.status for r in records(g)] == [Status.FIRED]
    (attention,) = [n for n in g.gm.graph.nodes if "attention" in op_name(n)]
    assert op_name(attention) == "gdnfuse.causal_attention" and list(value(attention).shape) == [B, 4, count, 8]
    assert op_name(attention.kwargs["q"]) == "tanh" and attention.kwargs["k"].op == "placeholder"


def test_the_last_queries_behind_a_cache():
    """Where the mask was proved."""

    def f(q, k, v, w):
        L, n = k.shape[2], q.shape[2]
        seen = torch.arange(L)[None, :] <= torch.arange(n)[:, None] + (L - n)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return F.linear(y.transpose(1, 2).reshape(q.shape[0], n, -1), w)[:, -1:]

    g = moved(f, of(B, 4, T, 8), of(B, 4, 30, 8), of(B, 4, 30, 8), of(N, 32), rules=[lift.causal_attention.RULE])
    (attention,) = [n for n in g.gm.graph.nodes if "attention" in op_name(n)]
    assert list(value(attention).shape) == [B, 4, 1, 8]


OTHER_ATTENTION = {
    "all keys": {},
    "a mask": {"attn_mask": torch.ones(T, T, dtype=torch.bool).tril()},
    "from the first": {"is_causal": True},
}


@pytest.mark.parametrize("name", OTHER_ATTENTION)
def test_other_attention_keeps_its_queries(name):
    L = T + 4 if name == "from the first" else T
    g = moved(
        lambda q, k, v: F.scaled_dot_product_attention(q.sin(), k, v, **OTHER_ATTENTION[name]).mul(2.0)[:, :, -1:],
        *(of(B, 4, n, 8) for n in (T, L, L)),
    )
    assert [r.status for r in records(g)] == [Status.FIRED]
    (attention,) = [n for n in g.gm.graph.nodes if "attention" in op_name(n)]
    assert op_name(attention) == "scaled_dot_product_attention" and value(attention).shape[2] == T


def norm(x, w):
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())).type_as(x)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_sums_and_their_norms(dynamic, both):
    """With the sum read elsewhere as well, it is computed for all rows."""

    def f(x, w, n):
        h = x + F.linear(x.tanh(), w)
        y = h + F.linear(norm(h, n), w)
        last = norm(y, n)[:, -1:] * 1.0
        return (last, y) if both else last

    rules = [lift.rms_norm.RULE, fuse.add_rms_norm.RULE]
    g = moved(f, of(B, T, N), of(N, N), of(N), dynamic=dynamic, rules=rules)
    assert g.ops().count("gdnfuse.add_rms_norm") == 2
    (record,) = records(g)
    if both:
        assert record.status is Status.REFUSED and record.reason.endswith("alone, found output.")
        assert [op_name(n) for n in g.gm.graph.nodes if op_name(n) == "linear" and value(n).shape[1] == 1] == []
    else:
        assert record.status is Status.FIRED and not {"linear", "tanh", "add"} & set(whole(g))


STAYS = {
    "nothing above": (lambda x, w: x[:, -1:] * 2, "found placeholder"),
    "read elsewhere": (lambda x, w: ((y := F.linear(x, w))[:, -1:] * 2, y), "alone, found output"),
    "a sum over rows": (lambda x, w: x.cumsum(1)[:, -1:] * 2, "found cumsum"),
    "rows in another order": (lambda x, w: F.linear(x, w).roll(1, 1)[:, -1:] * 2, "found roll"),
    "written": (lambda x, w: F.linear(x, w)[:, -1:].mul_(2), "must not be written in place"),
    "a view of an input": (lambda x, w: x.contiguous().view(x.shape[0], x.shape[1], 2, 3)[:, -1:], "a view of l_args_0_"),
    "weights as well": (lambda x, w: F.linear(y := w.exp(), y)[-1:, :] * 2, "found linear"),
    "queries, keys and values at once": (
        lambda x, w: F.scaled_dot_product_attention(y := x[:, None].exp(), y, y, is_causal=True)[:, :, -1:] * 2,
        "found scaled_dot_product_attention",
    ),
    "a bias of rows": (lambda x, w: F.linear(w.exp(), w, w.sin())[-1:, :] * 2, "found linear"),
    "axes that stay": (lambda x, w: w.exp().permute(0, 1)[-2:, :] * 2, "at permute"),
    "an axis by keyword": (lambda x, w: torch.narrow(x.exp(), dim=-1, start=0, length=3)[:, -1:] * 2, "found narrow"),
    "its input is written": (lambda x, w: ((y := x.sin()), z := y.exp(), y.mul_(2), z[:, -1:] + 1)[2:], "found exp"),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_stays(name):
    f, reason = STAYS[name]
    g = moved(f, of(B, T, N), of(N, N))
    (record,) = records(g)
    assert record.status is Status.REFUSED and reason in record.reason, record.reason


def test_what_mixes_rows_is_computed_in_full():
    g = moved(lambda x, w: F.linear(x.cumsum(1).exp(), w)[:, -1:] * 2, of(B, T, N), of(N, N))
    assert [r.status for r in records(g)] == [Status.FIRED] and whole(g) == ["cumsum"]
    g = moved(lambda x, w: F.linear(x.sin().transpose(1, 2), w).transpose(1, 2).exp()[:, -1:], of(B, T, N), of(T, T))
    assert [r.status for r in records(g)] == [Status.FIRED] and "linear" in whole(g) and "exp" not in whole(g)


def test_columns_are_no_rows_of_a_norm():
    """The axis of the slice is what the norm is taken over."""
    rules = [lift.rms_norm.RULE, fuse.add_rms_norm.RULE]
    f = lambda x, w, n: norm(x + F.linear(x.tanh(), w), n).transpose(1, 2).exp()[:, -2:]  # noqa: E731
    g = moved(f, of(B, T, N), of(N, N), of(N), rules=rules)
    (normed,) = [n for n in g.gm.graph.nodes if op_name(n) == "gdnfuse.add_rms_norm"]
    assert [r.status for r in records(g)] == [Status.FIRED] and value(normed.args[0]).shape == (B, T, N)


def test_rows_that_are_keys_as_well_are_kept():
    def f(q, k):
        k = k.exp()
        return (F.scaled_dot_product_attention(q.tanh(), k, k, is_causal=True) + k)[:, :, -2:]

    g = moved(f, of(B, 4, T, 8), of(B, 4, T, 8))
    assert [r.status for r in records(g)] == [Status.FIRED] and whole(g) == ["exp"]


def test_what_fails_half_way_leaves_all_rows(monkeypatch):
    def broken(node):
        if op_name(node) == "silu":
            raise ZeroDivisionError
        return infer(node)

    monkeypatch.setattr("gdnfuse.passes.last_rows.infer", broken)
    args = of(B, T, N), of(N, N), of(N, N)
    g = moved(FIRES["mlp and residual"], *args)
    (record,) = records(g)
    assert record.failed and record.reason == "The rule last_rows failed: ZeroDivisionError: no message."
    assert g.ops() == Captured(FIRES["mlp and residual"], *args).normalize().ops()


def test_a_copy_stays_a_copy():
    """Of one sequence the last row is contiguous without one; what is written later must not show in it."""

    def f(x):
        y = x.transpose(1, 2).contiguous()[:, :, -1:]
        x.mul_(2)
        return y

    g = moved(f, of(1, T, 3, 4))
    assert [r.status for r in records(g)] == [Status.FIRED]


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w: F.linear(x, w)[:, :1] * 2,
        lambda x, w: F.linear(x, w)[:, -3:-1] * 2,
        lambda x, w: F.linear(x, w)[:, -4::2] * 2,
        lambda x, w: F.linear(x, w)[..., -1:] * 2,
        lambda x, w: F.linear(x, w)[:, -1] * 2,
        lambda x, w: F.linear(x, w)[:, -T:] * 2,
        lambda x, w: F.linear(x, w)[:, -T - 5 :] * 2,
        lambda x, w: F.linear(x, w)[-1:, -2:] * 2,
    ],
)
def test_other_slices_are_not_looked_at(f):
    assert records(moved(f, of(B, T, N), of(N, N))) == []


def prompt(model, run, cache, ids, keep):
    with torch.no_grad():
        return run(input_ids=ids, **zoo.held(cache), logits_to_keep=keep).logits


@pytest.mark.parametrize(("cached", "keep"), [("dynamic", 1), pytest.param("static", 3, marks=pytest.mark.sweep)])
def test_prompts_of_a_model(cached, keep):
    """Lengths that make a fixed and a symbolic graph, then a second prompt and steps on the last one's cache."""
    model = zoo.causal_lm(**zoo.SMALL)
    ours = copy.deepcopy(model)
    run = torch.compile(ours, backend="gdnfuse", options={"inner": "eager"})
    for length in (70, 20):
        ids, _ = zoo.prompt(2, length, seed=length)
        a, e = zoo.new_cache(model, cached, 256), zoo.new_cache(model, cached, 256)
        assert zoo.relative(prompt(ours, run, a, ids, keep), prompt(model, model, e, ids, keep)) < 1e-5
    ids, _ = zoo.prompt(2, 9, seed=1)
    assert zoo.relative(prompt(ours, run, a, ids, keep), prompt(model, model, e, ids, keep)) < 1e-5
    tokens = zoo.tokens_for(2, 3)
    assert zoo.relative(zoo.decode(run, a, None, tokens), zoo.decode(model, e, None, tokens)) < 1e-5
    first = next(r for r in gdnfuse.reports() if r.phase == "prefill")
    assert [r.status for r in first.all_records if r.rule == NAME] == [Status.FIRED]


@pytest.mark.parametrize(("options", "keep", "wanted"), [({}, 0, []), ({"fuel": 0}, 1, ["refused"])])
def test_all_logits_and_no_fuel(options, keep, wanted):
    model = zoo.causal_lm(**zoo.SMALL)
    ids, _ = zoo.prompt(2, 20)
    run = torch.compile(copy.deepcopy(model), backend="gdnfuse", options={"inner": "eager", **options})
    prompt(model, run, transformers.DynamicCache(config=model.config), ids, keep)
    assert [str(r.status) for r in gdnfuse.reports()[-1].all_records if r.rule == NAME] == wanted
