"""Attention of a prompt on a static cache, or under padding, is one op whose mask is never made; any other mask stays."""

import pytest
import torch
import torch.nn.functional as F

from gdnfuse.passes import last_rows
from gdnfuse.passes.lift import prompt_attention
from gdnfuse.passes.lift.prompt_attention import RULE
from gdnfuse.report.records import Status
from gdnfuse.rewrite import proof
from gdnfuse.rewrite.graph import op_name, value
from tests.rewrite.captured import Captured

B, H, HKV, D, T, L = 3, 4, 2, 8, 11, 40


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    monkeypatch.setattr(prompt_attention, "KERNEL", True)
    proof.forget()


def repeated(x):
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, H // HKV, length, width).reshape(batch, heads * (H // HKV), length, width)


def seen(start, columns, queries, keys, causal=lambda j, i: j <= i):
    """As transformers makes it."""
    i, j = (torch.arange(queries) + start)[None, None, :, None], (torch.arange(keys) + 0)[None, None, None, :]
    mask = causal(j, i)
    if columns is not None:
        mask = i.new_ones((), dtype=torch.bool) & mask & columns.to(torch.bool)[torch.arange(B)[:, None, None, None], j]
    return mask.expand(B, -1, queries, keys)


def attended(q, k, v, mask):
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask, scale=0.3, is_causal=False) * 1.0


def on_a_cache(padded=False, causal=lambda j, i: j <= i, first=False):
    """On a cache of fixed length, which is written first; `first` knows that it was empty."""

    def function(q, k, v, keys, values, start, columns):
        at = torch.arange(q.shape[2]) + start
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        columns = F.pad(columns.to(torch.bool), (0, L - columns.shape[1])) if padded else None
        return attended(q, keys, values, seen(0 if first else start, columns, q.shape[2], L, causal))

    return function


def tensors(start=5, tokens=T, dynamic=False, dtype=torch.float32):
    q, k, v = (torch.randn(B, n, tokens, D).to(dtype) for n in (H, HKV, HKV))
    columns = torch.ones(B, start + tokens, dtype=torch.int64)
    columns[0, :3] = columns[1, : start + tokens - 1] = 0
    for t, axis in ((q, 2), (k, 2), (v, 2), (columns, 1)) if dynamic else ():
        torch._dynamo.mark_dynamic(t, axis)
    keys, values = (torch.randn(B, HKV, L, D).to(dtype) for _ in range(2))
    return q, k, v, keys, values, torch.tensor(start), columns


def lifted(function, *args, close=True):
    g = Captured(function, *args).normalize().apply(RULE)
    assert g.record.status is Status.FIRED, g.record.reason
    g.close() if close else g.results(g.gm)
    return g


def attention(g):
    (call,) = [n for n in g.gm.graph.nodes if "attention" in op_name(n)]
    return call


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_on_a_static_cache(padded, dynamic):
    g = lifted(on_a_cache(padded), *tensors(dynamic=dynamic))
    assert op_name(attention(g)) == "gdnfuse.prompt_attention"
    assert attention(g).args[1].op == "placeholder"  # heads are not repeated
    assert {"le", "expand"}.isdisjoint(g.ops()) and g.ops().count("index_copy_") == 2
    assert (attention(g).args[4] is not None) == padded


@pytest.mark.parametrize("past", [0, 9])
@pytest.mark.parametrize("dynamic", [False, True])
def test_padding_on_keys_that_grow(past, dynamic):
    """Also of a continuation; the second sequence is all padding but its last token."""

    def function(q, k, v, keys, values, start, columns):
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return attended(q, k, v, seen(past, columns, q.shape[2], q.shape[2] + past))

    q, k, v, keys, values, *rest = tensors(start=past, dynamic=dynamic)
    g = lifted(function, q, k, v, keys[:, :, :past], values[:, :, :past], *rest)
    assert op_name(attention(g)) == "gdnfuse.prompt_attention" and "le" not in g.ops()


def test_in_bfloat16_with_position_at_least_key():
    g = lifted(on_a_cache(True, lambda j, i: i >= j), *tensors(dtype=torch.bfloat16), close=False)
    assert op_name(attention(g)) == "gdnfuse.prompt_attention"


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_first_prompt_of_a_new_cache_sees_its_own_keys_and_needs_no_kernel(dynamic, monkeypatch):
    monkeypatch.setattr(prompt_attention, "KERNEL", False)
    g = lifted(on_a_cache(first=True), *tensors(start=0, dynamic=dynamic))
    call = attention(g)
    assert op_name(call) == "gdnfuse.causal_attention"
    assert value(call.args[1]).shape[2] == value(call.args[0]).shape[2]


@pytest.mark.parametrize("padded", [False, True])
def test_without_a_measured_kernel_it_stays(padded, monkeypatch):
    monkeypatch.setattr(prompt_attention, "KERNEL", False)
    g = Captured(on_a_cache(padded), *tensors()).normalize().apply(RULE)
    found = "padding" if padded else "a cache that may be filled"
    assert g.record.status is Status.REFUSED and f"until a kernel for others is measured, found {found}" in g.record.reason
    g.equal()


def test_the_last_queries_of_a_prompt():
    def function(*args):
        q, *rest = args
        o = on_a_cache(True)(q.tanh(), *rest)
        return o.transpose(1, 2).reshape(B, -1, H * D)[:, -2:].sin()

    g = Captured(function, *tensors(dynamic=True)).normalize().apply(RULE)
    last_rows.keep_last_rows(g.gm, g.outcome)
    assert [r.status for r in g.outcome.records] == [Status.FIRED] * 2, g.outcome.records[-1].reason
    g.close()
    assert value(attention(g)).shape[2] == 2


OTHERS = {
    "a window": (lambda j, i: (j <= i) & (j > i - 4), "found gt at"),
    "a strict mask": (lambda j, i: j < i, "found lt at"),
    "no later key hidden": (lambda j, i: j >= i, "found ge at"),
    "keys from one on": (lambda j, i: j + 1 <= i, "found le at"),
    "every second key": (lambda j, i: 2 * j <= i, "found le at"),
    "blocks": (lambda j, i: (j <= i) & (j // 4 == i // 4), "found eq at"),
    "either": (lambda j, i: (j <= i) | (j == 0), "found or at"),
    "not": (lambda j, i: ~(j > i), "found invert at"),
    "causal twice": (lambda j, i: (j <= i) & (j <= i), "found 2 such comparisons and 0 masks of columns"),
    "columns alone": (lambda j, i: (j < 9) & (j.new_ones((), dtype=torch.bool)), "found 0 such comparisons and 1 masks"),
    "two masks of columns": (lambda j, i: (j <= i) & (j < 30) & (j > 1), "found 1 such comparisons and 2 masks of columns"),
    "floats": (lambda j, i: torch.where(j <= i, 0.0, float("-inf")), "A mask must be of bool, found torch.float32"),
    "positions that are floats": (lambda j, i: j <= i.float(), "found le at"),
    "positions of each sequence": (lambda j, i: j <= i - torch.arange(B)[:, None, None, None], "found le at"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_stay(name):
    make, reason = OTHERS[name]
    g = Captured(on_a_cache(causal=make), *tensors()).normalize().apply(RULE)
    assert g.record.status is Status.REFUSED and reason in g.record.reason, g.record.reason
    g.equal()


def test_packed_sequences_and_a_mask_of_the_callers_stay():
    def packed(q, k, v, *rest):
        sequence = rest[-1][:, 5:].cumsum(1)  # which each token is of
        apart = sequence[:, None, :, None] == sequence[:, None, None, :]
        return attended(q, k, v, seen(0, None, T, T) & apart)

    g = Captured(packed, *tensors()).normalize().apply(RULE)
    assert "A mask must be key ≤ position and may hide columns for all queries, found eq at" in g.record.reason, g.record.reason
    g.equal()
    q, k, v, *_ = tensors()
    g = Captured(attended, q, k, v, torch.rand(B, 1, T, T) < 0.8).normalize().apply(RULE)
    assert "found placeholder at l_mask_ of [3, 1, 11, 11]" in g.record.reason, g.record.reason
    g.equal()


def test_a_mask_of_heads_stays():
    def function(q, k, v, *rest):
        heads = torch.arange(H)[None, :, None, None] < torch.arange(T)[None, None, None, :] + 2
        return attended(q, k, v, seen(0, None, T, T) & heads)

    g = Captured(function, *tensors()).normalize().apply(RULE)
    assert "found lt at" in g.record.reason, g.record.reason
    g.equal()


def test_a_cache_must_be_written_as_a_whole_and_read_once():
    def half(q, k, v, keys, values, start, columns):
        keys.index_copy_(2, torch.arange(T) + start, k)
        return attended(q, keys, values, seen(start, None, T, L))

    def elsewhere(q, k, v, keys, values, start, columns):
        keys.index_copy_(2, torch.arange(T) + start, k)
        values.index_copy_(2, torch.arange(T) + start + 1, v)
        return attended(q, keys, values, seen(start, None, T, L))

    def read(q, k, v, keys, values, start, columns):
        return on_a_cache()(q, k, v, keys, values, start, columns), keys.sum()

    for function, reason in (
        (half, "must both be written, or neither, found one."),
        (elsewhere, "Values must be written where keys are"),
        (read, "keys must be read and written here alone"),
    ):
        g = Captured(function, *tensors()).normalize().apply(RULE)
        assert g.record.status is Status.REFUSED and reason in g.record.reason, g.record.reason
        g.equal()


def test_long_caches_and_prompts_are_too_much_to_prove(monkeypatch):
    monkeypatch.setattr(prompt_attention, "SCORES", B * H * D * T * L - 1)
    g = Captured(on_a_cache(), *tensors()).normalize().apply(RULE)
    assert "Scores must take at most" in g.record.reason
    monkeypatch.setattr(prompt_attention, "PROVED", B * HKV * D * L - 1)
    g = Captured(on_a_cache(), *tensors()).normalize().apply(RULE)
    assert "The keys must have at most" in g.record.reason
