"""Attention with one query becomes one op, whatever the length of the keys; what is not that stays, with a sentence."""

import pytest
import torch
import torch.nn.functional as F

from gdnfuse.passes import sdpa
from gdnfuse.passes.lift import attention_few_queries
from gdnfuse.passes.lift.attention_few_queries import RULE
from gdnfuse.report.records import Status
from gdnfuse.rewrite import proof
from tests.rewrite.captured import Captured

B, H, HKV, D = 3, 4, 2, 8


def repeated(x):
    """As transformers does."""
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, H // HKV, length, width).reshape(batch, heads * (H // HKV), length, width)


def tiled(x):
    batch, heads, length, width = x.shape
    return x[:, None].expand(batch, H // HKV, heads, length, width).reshape(batch, heads * (H // HKV), length, width)


def repeats(q, k, v, gate, mask):
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask, scale=0.3)


def groups(q, k, v, gate, mask):
    return F.scaled_dot_product_attention(query=q, key=k, value=v, dropout_p=0.0, is_causal=False, enable_gqa=True)


def one_head_each(q, k, v, gate, mask):
    return F.scaled_dot_product_attention(q[:, :HKV], k, v, mask) * 1.0


def gated(q, k, v, gate, mask):
    o = F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask)
    return o.transpose(1, 2).contiguous().reshape(B, 1, H * D) * torch.sigmoid(gate)


def gated_heads_first(q, k, v, gate, mask):
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return torch.sigmoid(gate.reshape(B, 1, H, D).transpose(1, 2)) * o


def cats(q, k, v, gate, mask):
    k, v = (torch.cat([x[:, :, :-1], x[:, :, -1:] * 2], 2) for x in (k, v))
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask), k, v


def one_mask(q, k, v, gate, mask):
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask[:1])


SPELLINGS = [repeats, groups, one_head_each, gated, gated_heads_first, cats, one_mask]


def arguments(L=21, dynamic=False, batch=B):
    torch.manual_seed(0)
    mask = torch.rand(batch, 1, 1, L) < 0.7
    mask[..., 0] = True
    tensors = torch.randn(batch, H, 1, D), torch.randn(batch, HKV, L, D), torch.randn(batch, HKV, L, D)
    if dynamic:
        for t, axis in ((tensors[1], 2), (tensors[2], 2), (mask, 3)):
            torch._dynamo.mark_dynamic(t, axis)
    return *tensors, torch.randn(batch, 1, H * D), mask


def several(function):
    """A result that is always a tuple."""

    def call(*args):
        found = function(*args)
        return found if isinstance(found, tuple) else (found,)

    return call


def applied(function, *args):
    return Captured(several(function), *args).normalize().apply(RULE)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_becomes_one_op(function, dynamic):
    """Where lengths are dynamic, those of keys, values and mask are symbols of their own until they meet in another op."""
    g = applied(function, *arguments(dynamic=dynamic))
    assert g.record.status is Status.FIRED, g.record.reason
    assert "gdnfuse.attention_few_queries" in g.ops() and "scaled_dot_product_attention" not in g.ops()
    assert not {"sigmoid", "expand"} & set(g.ops())
    g.close()


def test_a_mask_of_a_symbol_of_its_own_beside_keys_of_another_and_one():
    def function(q, k, v, gate, mask):
        k, v = (torch.cat([x, x[:, :, :1]], 2) for x in (k, v))
        return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask)

    *others, _ = arguments(dynamic=True)
    mask = torch.rand(B, 1, 1, 22) < 0.7
    torch._dynamo.mark_dynamic(mask, 3)
    g = applied(function, *others, mask)
    assert g.record.status is Status.FIRED, g.record.reason
    g.close()


def test_symbolic_numbers_of_sequences():
    def function(q, k, v, gate, mask):
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return o.transpose(1, 2).reshape(q.shape[0], 1, H * D) * torch.sigmoid(gate), o * 2.0

    args = arguments(dynamic=True)
    for t in args:
        torch._dynamo.mark_dynamic(t, 0)
    for keep in (0, 1):
        torch._dynamo.reset()
        g = applied(lambda *given, keep=keep: function(*given)[keep], *args)
        assert g.record.status is Status.FIRED, g.record.reason
        g.close()


REFUSED = {
    "tiled": (
        lambda q, k, v, gate, mask: F.scaled_dot_product_attention(q, tiled(k), tiled(v), attn_mask=mask),
        "The float64 proof failed: output 0 differs",
    ),
    "a mask of numbers": (
        lambda q, k, v, gate, mask: F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask * 1.0),
        "The mask must be [3, 1, 1, 21] or [1, 1, 1, 21] of bool, found [3, 1, 1, 21] of torch.float32.",
    ),
    "a mask for each head": (
        lambda q, k, v, gate, mask: F.scaled_dot_product_attention(
            q, repeated(k), repeated(v), attn_mask=mask.expand(B, H, 1, -1)
        ),
        "The mask must be [3, 1, 1, 21] or [1, 1, 1, 21] of bool, found [3, 4, 1, 21] of torch.bool.",
    ),
    "dropout": (
        lambda q, k, v, gate, mask: F.scaled_dot_product_attention(q, repeated(k), repeated(v), dropout_p=0.5),
        "Attention must have no dropout, found 0.5.",
    ),
    "dropout by its place": (
        lambda q, k, v, gate, mask: F.scaled_dot_product_attention(q, repeated(k), repeated(v), mask, 0.5),
        "Attention must have no dropout, found 0.5.",
    ),
    "causal": (
        lambda q, k, v, gate, mask: F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True),
        "Attention of few queries must not have is_causal",
    ),
    "wider values": (
        lambda q, k, v, gate, mask: F.scaled_dot_product_attention(q, repeated(k), repeated(torch.cat([v, v], -1))),
        "values must have the shape [3, 2, 21, 8], found [3, 2, 21, 16].",
    ),
    "keys for all sequences": (
        lambda q, k, v, gate, mask: F.scaled_dot_product_attention(q, k[:1, :1].expand(B, H, -1, -1), repeated(v)),
        "keys must have the shape [3, 1, 21, 8], found [1, 1, 21, 8].",
    ),
    "keys without sequences": (
        lambda q, k, v, gate, mask: F.scaled_dot_product_attention(q, repeated(k)[0], repeated(v)[0]),
        "keys must have the shape [3, HKV, 21, 8], found [4, 21, 8].",
    ),
    "a result in another dtype": (
        lambda q, k, v, gate, mask: (
            F.scaled_dot_product_attention(q, repeated(k), repeated(v)).reshape(B, 1, H * D) * torch.sigmoid(gate.double())
        ),
        "The result must have the dtype of q, torch.float32, found torch.float64.",
    ),
    "a written cache": (
        lambda q, k, v, gate, mask: F.scaled_dot_product_attention(q, k.mul_(2.0), v, enable_gqa=True),
        "must not be written in place",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_that_stays(name):
    function, reason = REFUSED[name]
    g = applied(function, *arguments())
    assert g.record.status is Status.REFUSED and reason in g.record.reason, g.record.reason
    if "dropout" not in name:
        g.equal()


@pytest.mark.parametrize("T", [2, 8])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("behind", ["nothing", "a gate", "a gate, heads first"])
def test_a_few_queries_each_with_a_mask_of_its_own(T, dynamic, behind):
    def function(q, k, v, gate, mask):
        o = F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask)
        if behind == "a gate":
            return o.transpose(1, 2).contiguous().reshape(B, T, H * D) * torch.sigmoid(gate)
        return o if behind == "nothing" else o * torch.sigmoid(gate.reshape(B, T, H, D).transpose(1, 2))

    _, k, v, _, _ = arguments(dynamic=dynamic)
    mask = (torch.rand(B, 1, T, 21) < 0.7) | (torch.arange(21) == 0)
    if dynamic:
        torch._dynamo.mark_dynamic(mask, 3)
    g = applied(function, torch.randn(B, H, T, D), k, v, torch.randn(B, T, H * D), mask)
    assert g.record.status is Status.FIRED, g.record.reason
    assert "gdnfuse.attention_few_queries" in g.ops() and "scaled_dot_product_attention" not in g.ops()
    g.close()


def test_a_cache_of_fixed_length_is_written_before_and_read_once():
    """Keys and values at one place each; written at another place, attention stays as it came."""

    def function(q, keys, values, k, v, position, mask, other=0):
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position + other if other else position, v)
        return F.scaled_dot_product_attention(q, repeated(keys), repeated(values), attn_mask=mask)

    T, (_, keys, values, _, _) = 3, arguments()
    mask = torch.arange(21) <= torch.tensor([4, 5, 6])[:, None]
    args = torch.randn(B, H, T, D), keys, values, *torch.randn(2, B, HKV, T, D), torch.tensor([4, 5, 6]), mask.expand(B, 1, T, 21)
    g = applied(function, *args)
    assert g.record.status is Status.FIRED and g.ops().count("index_copy_") == 2, g.record.reason
    g.close()
    g = applied(lambda *given: function(*given, other=1), *args)
    assert g.record.status is Status.UNMATCHED and "gdnfuse.attention_few_queries" not in g.ops()
    g.equal()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("T", [3, 64, 65])
def test_up_to_64_queries_on_a_cache_of_fixed_length(T, dynamic):
    """Of those that repeat a position, as rows behind a prompt's end do, all write the same."""

    def function(q, keys, values, k, v, position, mask):
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        return F.scaled_dot_product_attention(q, repeated(keys), repeated(values), attn_mask=mask)

    L = 90
    q, keys, values = torch.randn(B, H, T, D), *torch.randn(2, B, HKV, L, D)
    row = torch.arange(T).clamp(max=T - 2)
    mask = (torch.arange(L) <= 10 + row[:, None]).expand(B, 1, T, L)
    if dynamic:
        for x, axis in ((keys, 2), (values, 2), (mask, 3)):
            torch._dynamo.mark_dynamic(x, axis)
    k, v = torch.randn(2, B, HKV, T, D)[..., row, :]
    g = applied(function, q, keys, values, k, v, 10 + row, mask)
    assert [r.status for r in g.outcome.records] == [Status.FIRED] * (T < 65), [r.reason for r in g.outcome.records]
    g.close()


def test_many_queries_and_attention_without_an_axis_of_heads_need_no_record():
    def function(q, k, v, gate, mask):
        many = F.scaled_dot_product_attention(torch.cat([q] * 9, 2), repeated(k), repeated(v))
        return many, F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0])

    g = applied(function, *arguments())
    assert g.outcome.records == []


@pytest.mark.parametrize("dynamic", [False, True])
def test_long_keys_are_proved_where_their_length_is_symbolic(dynamic, monkeypatch):
    monkeypatch.setattr(sdpa, "PROVED", B * HKV * 40 * D)
    g = applied(repeats, *arguments(50, dynamic))
    if dynamic:
        assert g.record.status is Status.FIRED, g.record.reason
    else:
        assert g.record.reason == "The keys must have at most 1920 elements to be proved, found 2400."
    g.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0.31},
        {"gate": None},
        {"mask": None},
        lambda given: {"keys": given["values"], "values": given["keys"]},
        lambda given: {"q": given["q"].flip(1)},
    ],
    ids=["scale", "no gate", "no mask", "keys and values exchanged", "heads in another order"],
)
def test_the_proof_bites(wrong, monkeypatch):
    proof.forget()
    right = attention_few_queries.call

    def changed(target, **given):
        return right(target, **{**given, **(wrong(given) if callable(wrong) else wrong)})

    monkeypatch.setattr(attention_few_queries, "call", changed)
    g = applied(gated, *arguments(dynamic=True))
    proof.forget()
    assert g.record.status is Status.REFUSED and "The float64 proof failed" in g.record.reason
    g.equal()
