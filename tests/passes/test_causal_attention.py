"""Attention under a causal mask that the graph makes is causal_attention; any other mask stays, with a sentence."""

import pytest
import torch
import torch.nn.functional as F

from gdnfuse.passes.lift.causal_attention import RULE
from gdnfuse.report.records import Status
from gdnfuse.rewrite import proof
from gdnfuse.rewrite.graph import op_name
from tests.rewrite.captured import Captured

MASKS = {
    "le": lambda i, j: j <= i,
    "ge": lambda i, j: i >= j,
    "not later": lambda i, j: ~(j > i),
    "lt": lambda i, j: j < i + 1,
}
OTHERS = {
    "strict": lambda i, j: j <= i - 1 + (i == 0),
    "later": lambda i, j: j >= i,
    "window": lambda i, j: (j <= i) & (j > i - 8),
    "far window": lambda i, j: (j <= i) & (j > i - 33),
    "offset": lambda i, j: j <= i + 1,
    "all": lambda i, j: j >= i - i,
}


def attention(make, **options):
    def function(q, k, v):
        assert q.shape[2] == k.shape[2] == v.shape[2]  # one symbol for the three
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        mask = make(i, j)[None, None].expand(q.shape[0], -1, q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options) * 1.0

    return function


def inputs(T=40, heads=4, keys=4, dynamic=False):
    tensors = torch.randn(2, heads, T, 8), torch.randn(2, keys, T, 8), torch.randn(2, keys, T, 8)
    for t in tensors if dynamic else ():
        torch._dynamo.mark_dynamic(t, 2)
    return tensors


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_causal_masks_become_an_op(name, dynamic):
    g = Captured(attention(MASKS[name], scale=0.3), *inputs(dynamic=dynamic)).normalize().apply(RULE)
    assert g.record.status is Status.FIRED, g.record.reason
    g.close()
    assert 0.3 in _attention(g).args and not {"scaled_dot_product_attention", "arange"} & set(g.ops())


def _attention(g):
    (call,) = [n for n in g.gm.graph.nodes if op_name(n) == "gdnfuse.causal_attention"]
    return call


def test_with_five_axes_they_become_a_flag():
    def function(q, k, v):
        seen = torch.arange(9)[None, :] <= torch.arange(9)[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3) * 1.0

    g = Captured(function, *(torch.randn(2, 3, 2, 9, 8) for _ in "qkv")).normalize().apply(RULE)
    assert g.record.status is Status.FIRED, g.record.reason
    g.close()
    (call,) = [n for n in g.gm.graph.nodes if op_name(n) == "scaled_dot_product_attention"]
    assert call.kwargs == {"is_causal": True, "scale": 0.3}


def repeated(x):
    return x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(x.shape[0], 4, x.shape[2], 8)


@pytest.mark.parametrize("dynamic", [False, True])
def test_heads_are_shared_not_repeated(dynamic):
    """As transformers repeats them where there is a mask."""
    inner = attention(MASKS["le"])
    g = Captured(lambda q, k, v: inner(q, repeated(k), repeated(v)), *inputs(keys=2, dynamic=dynamic)).normalize().apply(RULE)
    assert g.record.status is Status.FIRED, g.record.reason
    g.close()
    assert [n.op for n in _attention(g).args[1:3]] == ["placeholder"] * 2 and "expand" not in g.ops()


def test_a_cast_behind_repeated_heads_stays():
    """Of a cache in another dtype than the queries'."""
    inner = attention(MASKS["le"])
    q, k, v = inputs(keys=2)
    cast = lambda q, k, v: inner(q, repeated(k).to(q.dtype), repeated(v).to(q.dtype))  # noqa: E731
    g = Captured(cast, q.bfloat16(), k, v).normalize().apply(RULE)
    assert g.record.status is Status.FIRED, g.record.reason
    g.compare(lambda found, wanted: torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2))
    assert [op_name(n) for n in _attention(g).args[1:3]] == ["to"] * 2


def test_a_cache_that_is_written_in_place_is_read_as_it_was_copied():
    """Whoever reads it before the heads are repeated may read it as it is later."""

    def function(q, k, v, keys, values):
        keys[:, :, 3:14], values[:, :, 3:14] = k, v
        seen = torch.arange(14)[None, :] <= torch.arange(11)[:, None] + 3
        return F.scaled_dot_product_attention(q, repeated(keys[:, :, :14]), repeated(values[:, :, :14]), attn_mask=seen) * 1.0

    g = Captured(function, *inputs(11, keys=2), *(torch.randn(2, 2, 20, 8) for _ in "kv")).normalize().apply(RULE)
    assert g.record.status is Status.FIRED, g.record.reason
    g.close()
    assert "gdnfuse.causal_attention" in g.ops() and "expand" in g.ops()


def test_a_scale_that_the_graph_computes_is_refused():
    tensors = inputs()
    for t in tensors:
        torch._dynamo.mark_dynamic(t, 0)
    function = lambda q, k, v: attention(MASKS["le"], scale=1.0 / q.shape[0])(q, k, v)  # noqa: E731
    g = Captured(function, *tensors).normalize().apply(RULE)
    assert g.record.status is Status.REFUSED and "The scale must be a number, found " in g.record.reason
    g.equal()


def test_heads_that_are_repeated_in_another_order_stay():
    other = lambda x: x[:, None].expand(-1, 2, -1, -1, -1).reshape(2, 4, 40, 8)  # noqa: E731
    inner = attention(MASKS["le"])
    g = Captured(lambda q, k, v: inner(q, other(k), other(v)), *inputs(keys=2)).normalize().apply(RULE)
    assert g.record.status is Status.REFUSED and "The float64 proof failed" in g.record.reason, g.record.reason
    g.equal()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_stay(name, dynamic):
    g = Captured(attention(OTHERS[name]), *inputs(dynamic=dynamic)).normalize().apply(RULE)
    assert g.record.status is Status.REFUSED and _unlike(g, dynamic), g.record.reason
    g.equal()


def _unlike(g, dynamic):
    """Whether the reason is what the proof found, or with symbolic lengths numbers that it could not see behind."""
    return "The float64 proof failed" in g.record.reason or dynamic and "must add up to at most 2" in g.record.reason


def continued(make, **options):
    """The last tokens of a sequence, behind those of a cache."""

    def function(q, k, v, past):
        keys, values = (torch.cat([past, x], 2) for x in (k, v))
        assert q.shape[2] == k.shape[2] == v.shape[2]
        i, j = past.shape[2] + torch.arange(q.shape[2])[:, None], torch.arange(keys.shape[2])[None, :]
        mask = make(i, j)[None, None].expand(q.shape[0], -1, q.shape[2], keys.shape[2])
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, **options) * 1.0

    return function


def pieces(T=11, past=40, dynamic=False, keys=4):
    tensors = (*inputs(T, keys=keys), torch.randn(2, keys, past, 8))
    for t in tensors if dynamic else ():
        torch._dynamo.mark_dynamic(t, 2)
    return tensors


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("name", "keys"), [("le", 4), ("ge", 4), ("not later", 2)])
def test_the_last_tokens_of_a_sequence_are_an_op(name, keys, dynamic):
    options = {"scale": 0.3} | ({"enable_gqa": True} if keys < 4 else {})
    g = Captured(continued(MASKS[name], **options), *pieces(dynamic=dynamic, keys=keys)).normalize().apply(RULE)
    assert g.record.status is Status.FIRED, g.record.reason
    g.close()
    assert "gdnfuse.causal_attention" in g.ops() and not {"scaled_dot_product_attention", "arange"} & set(g.ops())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", [*OTHERS, "from the first"])
def test_other_masks_of_the_last_tokens_stay(name, dynamic):
    make = OTHERS.get(name) or (lambda i, j: j <= i - 40)
    g = Captured(continued(make), *pieces(dynamic=dynamic)).normalize().apply(RULE)
    assert g.record.status is Status.REFUSED and _unlike(g, dynamic), g.record.reason
    g.equal()


@pytest.mark.parametrize(
    "shapes",
    [
        ([3, 4, 8], [3, 9, 8], [3, 9, 8]),
        ([2, 3, 4, 8], [2, 3, 9, 8], [2, 3, 9, 16]),
        ([1, 3, 4, 8], [2, 3, 9, 8], [2, 3, 9, 8]),
    ],
)
def test_the_last_tokens_need_four_axes_and_the_same_sizes(shapes):
    def function(q, k, v):
        seen = torch.arange(9)[None, :] <= torch.arange(4)[:, None] + 5
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    g = Captured(function, *map(torch.randn, shapes)).normalize().apply(RULE)
    found = ", ".join(map(str, shapes))
    assert f"four axes, the same sequences, heads and columns, and no more options, found {found}." in g.record.reason
    g.equal()


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_queries_that_are_not_the_last_of_the_keys(offset):
    """Where lengths have nothing to do with each other, no number is their difference."""

    def function(q, k, v):
        assert k.shape[2] == v.shape[2]
        mask = torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[2])[:, None] + offset
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask) * 1.0

    tensors = torch.randn(2, 4, 40, 8), torch.randn(2, 4, 50, 8), torch.randn(2, 4, 50, 8)
    for t in tensors:
        torch._dynamo.mark_dynamic(t, 2)
    g = Captured(function, *tensors).normalize().apply(RULE)
    assert g.record.status is Status.REFUSED and "The float64 proof failed" in g.record.reason, g.record.reason
    g.equal()


def test_a_window_that_is_a_multiple_of_the_prompt_stays():
    make = lambda i, j: (j <= i) & (j > i - 3 * i.shape[0])  # noqa: E731
    g = Captured(continued(make), *pieces(past=10, dynamic=True)).normalize().apply(RULE)
    assert g.record.status is Status.REFUSED and "found that it reads the number 3*s" in g.record.reason, g.record.reason
    g.equal()


@pytest.mark.parametrize("past", [600, 1100])
def test_the_first_prompt_may_be_a_number(past):
    """Until a second length was seen it is one, and is known to be how much longer the keys are."""
    *tensors, cached = pieces(past=past)
    for t in tensors:
        torch._dynamo.mark_dynamic(t, 2)
    g = Captured(continued(MASKS["le"]), *tensors, cached).normalize().apply(RULE)
    if past < 1024:
        assert g.record.status is Status.FIRED, g.record.reason
    else:
        assert "at most 1024 columns to be proved, found 1100" in g.record.reason
    g.close()


def test_symbolic_numbers_of_sequences_are_proved_with_a_few(monkeypatch):
    bound = []
    real = proof._bound
    monkeypatch.setattr(proof, "_bound", lambda *args: bound.append(real(*args)) or bound[-1])
    proof.forget()
    tensors = pieces(dynamic=True)
    for t in tensors:
        torch._dynamo.mark_dynamic(t, 0)
    g = Captured(continued(MASKS["le"]), *tensors).normalize().apply(RULE)
    assert g.record.status is Status.FIRED, g.record.reason
    assert sorted(bound[0].values())[:2] == [proof.SEQUENCES, 37]
    g.close()


WINDOWS = [
    ("must add up to at most 2 to be proved, found 60", lambda i, j: (j <= i) & (j > i - 60)),
    ("must add up to at most 2 to be proved, found 4", lambda i, j: (j <= i) & (j > i - 2 - 2)),
    ("must add up to at most 2 to be proved, found 38", lambda i, j: (j <= i) | (j >= i + j.shape[-1] - 38)),
    ("found that it reads floordiv", lambda i, j: (j <= i) & ((i - j) // 16 < 16)),
    ("found that it reads mul", lambda i, j: (j <= i) & ((i - j) * 0.01 < 1)),
    ("found that it reads sub", lambda i, j: (j <= i) & (torch.sub(j, 30, alpha=-10) > i)),
]


@pytest.mark.parametrize(("reason", "make"), WINDOWS)
def test_a_window_wider_than_the_traced_prompt_stays(reason, make):
    """All of its mask is causal at the traced length, and not at a later one."""
    g = Captured(attention(make), *inputs(dynamic=True)).normalize().apply(RULE)
    assert g.record.status is Status.REFUSED and reason in g.record.reason, g.record.reason
    g.equal()


def test_a_width_that_is_a_symbol_is_refused():
    width = 60
    g = Captured(attention(lambda i, j: (j <= i) & (j > i - width)), *inputs(), dynamic=True).normalize().apply(RULE)
    assert g.record.status is Status.REFUSED and "found that it reads the number" in g.record.reason, g.record.reason
    g.equal()


@pytest.mark.parametrize(("keys", "options"), [(2, {"enable_gqa": True}), (1, {})])
def test_grouped_queries(keys, options):
    """Or one head of keys for all queries, without a word."""
    g = Captured(attention(MASKS["le"], **options), *inputs(keys=keys)).normalize().apply(RULE)
    assert g.record.status is Status.FIRED, g.record.reason
    g.close()
    assert _attention(g)


def test_a_mask_that_is_given_is_not_guessed_at():
    def function(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask > 0)

    g = Captured(function, *inputs(), torch.ones(40, 40).tril()).normalize().apply(RULE)
    assert g.record.status is Status.REFUSED
    assert "must depend on q, k, v alone, found that it reads" in g.record.reason
    g.equal()


def test_dropout_and_long_fixed_masks_are_refused():
    g = Captured(attention(MASKS["le"], dropout_p=0.5), *inputs()).normalize().apply(RULE)
    assert "must have no dropout" in g.record.reason
    g = Captured(attention(MASKS["le"]), *inputs(T=1100, heads=1, keys=1), dynamic=False).normalize().apply(RULE)
    assert "at most 1024 columns to be proved, found 1100" in g.record.reason
    g.equal()


def test_one_query_needs_no_record():
    def function(q, k, v):
        mask = torch.arange(k.shape[2])[None, None, None] <= 7
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    q, k, v = inputs()
    g = Captured(function, q[:, :, :1], k, v).normalize().apply(RULE)
    assert g.outcome.records == []
