"""Proofs run with fewer sequences than the model was given: code that mixes sequences must not slip through."""

import pytest
import torch

import gdnfuse
from gdnfuse.dialect import fused_gating_delta_rule
from gdnfuse.report.records import Status
from gdnfuse.rewrite import columns

H, HV, K, V = 2, 4, 8, 8
RULE = fused_gating_delta_rule.op.overload


def paired(x, group):
    """Sequences i·group + j in the place of j·(B / group) + i: with `group` sequences in all nothing moves."""
    return x.view(-1, group, *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def step(B, mixed):
    """A packed decode step; q's sequences go through `mixed` first."""

    def f(row, a, b, A_log, dt_bias, state):
        q, k, v = torch.split(row, [H * K, H * K, HV * V], -1)
        q, k, v = mixed(q.reshape(B, 1, H, K)), k.reshape(B, 1, H, K), v.reshape(B, 1, HV, V)
        return RULE(q, k, v, a, b, A_log, dt_bias, state, K**-0.5, 1e-6)

    return f


def arguments(B):
    torch.manual_seed(0)
    gates = torch.randn(B, 1, HV), torch.randn(B, 1, HV), torch.randn(HV), torch.randn(HV)
    return torch.randn(B, 1, 2 * H * K + HV * V), *gates, torch.randn(B, HV, K, V)


def packed_decodes(f, B):
    """The records of the rule, after checking that the compiled f does what f does."""
    ours, wanted = arguments(B), arguments(B)
    with torch.no_grad():
        run = torch.compile(f, backend="gdnfuse", dynamic=False, fullgraph=True, options={"inner": "eager"})
        torch.testing.assert_close(run(*ours), f(*wanted))
    torch.testing.assert_close(ours[-1], wanted[-1])
    return [r for r in gdnfuse.reports()[-1].all_records if r.rule == "packed_decode" and r.stage == "fuse"]


@pytest.mark.parametrize("B", [1, 2, 4, 12])
def test_sequences_apart_are_fused(B):
    (record,) = packed_decodes(step(B, lambda q: q), B)
    assert record.status is Status.FIRED and record.proof_error < 1e-9


MIXED = {
    "pairs": (4, lambda q: paired(q, 2)),
    "threes": (12, lambda q: paired(q, 3)),
    "sixes": (12, lambda q: paired(q, 6)),
    "halves": (12, lambda q: q.view(2, 6, 1, H, K).transpose(0, 1).reshape(12, 1, H, K)),
}


@pytest.mark.parametrize("name", MIXED)
def test_sequences_that_are_mixed_do_not_match(name):
    B, mixed = MIXED[name]
    (record,) = packed_decodes(step(B, mixed), B)
    assert record.status is Status.UNMATCHED and "the same columns of every sequence, each in its place" in record.reason


@pytest.mark.parametrize("name", MIXED)
def test_sequences_that_are_mixed_are_refused(name, monkeypatch):
    """By the proof, where the match has not seen it."""
    monkeypatch.setattr(columns, "_sequences", lambda count: torch.zeros(count, 1, dtype=torch.int64))
    B, mixed = MIXED[name]
    (record,) = packed_decodes(step(B, mixed), B)
    assert record.status is Status.REFUSED and "proof" in record.reason
