"""The rules that make one mixer of conv, rule and norm: where its parts may stand, and what is declined."""

import dataclasses
import itertools

import pytest
import torch

from gdnfuse.dialect import mixer_decode as mixer_op
from gdnfuse.passes.fuse import mixer_decode, packed_decode
from gdnfuse.report.records import Status
from gdnfuse.rewrite import proof
from tests.passes.test_fuse_linears import call_in
from tests.rewrite.captured import Captured

H, HV, K, V, B = 2, 4, 3, 5, 2
WIDTHS = dict(zip("qkvzba", (K, K, HV // H * V, HV // H * V, HV // H, HV // H), strict=True))
D = H * sum(WIDTHS[part] for part in "qkv")
ops = torch.ops.gdnfuse


def fused(f, *args, rules=(packed_decode.RULE, mixer_decode.RULE)):
    return Captured(f, *args).normalize().apply(*rules).normalize().close()


def arguments(*rows):
    args, _ = mixer_op.example_call(B, H, HV, K, V)
    return *rows, *args[1:3], *args[4:8]


def layer(q, k, v, z, b, a, conv_state, conv_weight, A_log, dt_bias, state, norm_weight, order="qkv"):
    """Conv, rule and norm on parts [B, 1, ·] of all heads; `order` of what the rule takes for q, k and v."""
    mixed = torch.cat([q, k, v], -1).transpose(1, 2)
    mixed = ops.causal_conv_update.default(mixed, conv_state, conv_weight, None, "silu").transpose(1, 2)
    parts = dict(zip("qkv", mixed.split([H * K, H * K, HV * V], -1), strict=True))
    q, k, v = (parts[part].unflatten(-1, (-1, n)) for part, n in zip(order, (K, K, V), strict=True))
    o = ops.fused_gating_delta_rule.default(q, k, v, a, b, A_log, dt_bias, state, 0.5, 1e-6, 2.0)
    return ops.gated_rms_norm.default(o, z.reshape(B, 1, HV, V), norm_weight, 1e-6).flatten(2)


def parts_of(row, order):
    """q, k, v, z, b, a of a row in which groups of parts between commas stand head by head."""
    found, start = {}, 0
    for group in order.split(","):
        width = sum(WIDTHS[part] for part in group)
        heads = row.narrow(-1, start, H * width).unflatten(-1, (H, width))
        for part, piece in zip(group, heads.split([WIDTHS[part] for part in group], -1), strict=True):
            found[part] = piece.reshape(B, 1, -1)
        start += H * width
    return [found[part] for part in "qkvzba"]


N = H * sum(WIDTHS.values())
ORDERS = ["q,k,v,z,b,a", "a,z,q,k,v,b", "v,k,z,q,a,b", "qkvz,ba", "bqavkz", "q,kv,z,ba"]


@pytest.mark.parametrize("order", ORDERS)
def test_parts_may_stand_anywhere_in_a_row(order):
    graph = fused(lambda row, *rest: layer(*parts_of(row.exp(), order), *rest), *arguments(torch.randn(B, 1, N)))
    assert [r.status for r in graph.outcome.records] == [Status.FIRED] * 2, graph.outcome.records
    assert graph.ops() == ["exp", "gdnfuse.mixer_decode"]
    found = call_in(graph, "mixer_decode")
    assert found["beta_scale"] == 2.0 and (found["strides"] == list(WIDTHS.values())) == (len(order.split(",")) == 6)
    if order == "qkvz,ba":
        assert (found["offsets"], found["strides"]) == mixer_op.layout(order, H, HV, K, V)[:2]


def test_parts_of_several_rows_are_put_together():
    """What an adapter adds to some of the parts makes tensors of their own of them."""

    def f(row, more, *rest):
        q, k, v, z, b, a = parts_of(row.exp(), ORDERS[0])
        return layer(q + more[..., : H * K], k, v, z * 2, b, a, *rest)

    graph = fused(f, *arguments(torch.randn(B, 1, N), torch.randn(B, 1, N)))
    assert [r.status for r in graph.outcome.records] == [Status.FIRED] * 2, graph.outcome.records
    computed = [op for op in graph.ops() if op not in ("narrow", "getitem", "unflatten", "split", "reshape")]
    assert computed == ["exp", "add", "mul", "cat", "gdnfuse.mixer_decode"]


@pytest.mark.parametrize("order", ["kqv", "qqv", "qkv"])
def test_the_rule_takes_q_k_and_v_as_the_conv_leaves_them(order):
    graph = fused(lambda row, *rest: layer(*parts_of(row, ORDERS[0]), *rest, order=order), *arguments(torch.randn(B, 1, N)))
    record = graph.outcome.records[0]
    assert record.rule == "packed_decode" and (record.status == Status.FIRED) == (order == "qkv")
    assert order == "qkv" or "q, k and v in order as all 32 columns of one row" in record.reason


def test_heads_that_are_not_equally_far_apart():
    """Of two key heads any two columns are a distance, but it must not be less than a head."""

    def swapped(row, *rest):
        q, *others = parts_of(row, ORDERS[0])
        return layer(torch.cat([q[..., K:], q[..., :K]], -1), *others, *rest)

    record = fused(swapped, *arguments(torch.randn(B, 1, N))).outcome.records[-1]
    assert record.rule == "mixer_decode" and record.status == Status.UNMATCHED
    assert "3 columns of q for each of 2 key heads, equally far apart" in record.reason


@pytest.mark.parametrize("part", range(6))
def test_the_proof_refuses_another_place(part, monkeypatch):
    proof.forget()
    honest = mixer_decode.RULE.rewrite
    for change, i in itertools.product((-1, 1), (0, 1)):

        def rewrite(m, t, change=change, i=i):
            where = [[*m.facts.offsets], [*m.facts.strides]]
            where[i][part] += change
            facts = dataclasses.replace(m.facts, offsets=where[0], strides=where[1])
            return honest(dataclasses.replace(m, facts=facts), t)

        monkeypatch.setattr(mixer_decode.RULE, "rewrite", rewrite)
        inputs = arguments(torch.randn(B, 1, N + 2))
        graph = fused(lambda row, *rest: layer(*parts_of(row[..., 1:], "qkvz,ba"), *rest), *inputs)
        record = graph.outcome.records[-1]
        assert record.rule == "mixer_decode" and record.status == Status.REFUSED and "proof" in record.reason, record
    proof.forget()
