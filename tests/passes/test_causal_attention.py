"""Attention under a causal mask that the graph makes is told so; any other mask stays, with a sentence."""

import pytest
import torch
import torch.nn.functional as F

from gdnfuse.passes.fuse.causal_attention import RULE
from gdnfuse.report import Status
from tests.rewrite.captured import Captured

MASKS = {
    "le": lambda i, j: j <= i,
    "ge": lambda i, j: i >= j,
    "not later": lambda i, j: ~(j > i),
}
OTHERS = {
    "strict": lambda i, j: j <= i - 1 + (i == 0),
    "later": lambda i, j: j >= i,
    "window": lambda i, j: (j <= i) & (j > i - 8),
    "far window": lambda i, j: (j <= i) & (j > i - 33),
    "offset": lambda i, j: j <= i + 1,
    "all": lambda i, j: j >= 0 * i,
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
def test_causal_masks_become_a_flag(name, dynamic):
    options = {"scale": 0.3}
    g = Captured(attention(MASKS[name], **options), *inputs(dynamic=dynamic)).normalize().apply(RULE)
    assert g.record.status is Status.FIRED, g.record.reason
    g.close()
    (call,) = [n for n in g.gm.graph.nodes if "scaled_dot" in str(n.target)]
    assert call.kwargs["is_causal"] is True and options.items() <= call.kwargs.items() and "attn_mask" not in call.kwargs
    assert not [n for n in g.gm.graph.nodes if "arange" in str(n.target)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_stay(name, dynamic):
    g = Captured(attention(OTHERS[name]), *inputs(dynamic=dynamic)).normalize().apply(RULE)
    assert g.record.status is Status.REFUSED and "The float64 proof failed" in g.record.reason
    g.equal()


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
    assert g.record.status is Status.REFUSED and "The float64 proof failed" in g.record.reason, g.record.reason
    g.equal()


def test_the_last_tokens_need_four_axes():
    def function(q, k, v):
        seen = torch.arange(9)[None, :] <= torch.arange(4)[:, None] + 5
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    g = Captured(function, torch.randn(3, 4, 8), torch.randn(3, 9, 8), torch.randn(3, 9, 8)).normalize().apply(RULE)
    assert "must have four axes and no more options, found [3, 4, 8], [3, 9, 8], [3, 9, 8]." in g.record.reason
    g.equal()


WINDOWS = {
    "The float64 proof failed": lambda i, j: (j <= i) & (j > i - 60),
    "no number above 509 in it to be proved, found 4096": lambda i, j: (j <= i) & (j > i - 4096),
}


@pytest.mark.parametrize("reason", WINDOWS)
def test_a_window_wider_than_the_traced_prompt_stays(reason):
    """All of its mask is causal at the traced length, and not at a later one."""
    g = Captured(attention(WINDOWS[reason]), *inputs(dynamic=True)).normalize().apply(RULE)
    assert g.record.status is Status.REFUSED and reason in g.record.reason, g.record.reason
    g.equal()


def test_a_width_that_is_a_symbol_is_refused():
    width = 60
    g = Captured(attention(lambda i, j: (j <= i) & (j > i - width)), *inputs(), dynamic=True).normalize().apply(RULE)
    assert g.record.status is Status.REFUSED and "found that it reads the number" in g.record.reason, g.record.reason
    g.equal()


def test_grouped_queries_keep_their_option():
    g = Captured(attention(MASKS["le"], enable_gqa=True), *inputs(keys=2)).normalize().apply(RULE)
    assert g.record.status is Status.FIRED, g.record.reason
    g.close()


def test_a_mask_that_is_given_is_not_guessed_at():
    def function(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask * 1.0 > 0)

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
