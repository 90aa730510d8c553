"""Steps of a few tokens, that check drafts or go on: what their rule and conv become, and what looks alike and is left."""

import pytest
import torch

import gdnfuse
from gdnfuse.backend import rewritten_copy
from gdnfuse.dialect import delta_rule, record
from gdnfuse.options import Options
from gdnfuse.passes.fuse import conv_context, record_conv, short_delta_rule, verify_delta_rule
from gdnfuse.report.records import GraphReport, Status
from tests.models import zoo
from tests.rewrite.captured import Captured

ops = torch.ops.gdnfuse
B, H, HV, K, V = 2, 2, 4, 8, 6
CHUNKED, VERIFY = "gdnfuse.fused_gating_chunk_delta_rule", "gdnfuse.delta_rule_verify"


def step(*tensors, taken=(0,), every=0, bounds=None):
    results = ops.fused_gating_chunk_delta_rule.default(*tensors, K**-0.5, 1e-6, bounds, every, 2.0)
    return tuple(results[i] for i in taken)


def written(*tensors):
    o, state = step(*tensors, taken=(0, 1))
    tensors[-1].copy_(state)
    return o


def fused(f, *args, rule=verify_delta_rule.RULE):
    return Captured(f, *args).normalize().apply(rule).normalize().close()


@pytest.mark.parametrize("T", [2, 5, 8])
def test_a_rule_of_few_tokens_on_a_state_that_stays_is_the_recurrent_one(T):
    found = fused(step, *delta_rule.example_tensors(B, T, H, HV, K, V))
    assert found.record.status is Status.FIRED and found.ops() == [VERIFY]


@pytest.mark.parametrize("T", [2, 8])
def test_a_rule_of_few_tokens_on_a_state_that_goes_on_is_the_recurrent_one_in_place(T):
    found = fused(written, *delta_rule.example_tensors(B, T, H, HV, K, V), rule=short_delta_rule.RULE)
    assert found.record.status is Status.FIRED and found.ops() == ["gdnfuse.fused_gating_delta_rule"]


def test_rules_whose_new_state_goes_elsewhere_or_is_read_are_left():
    tensors = delta_rule.example_tensors(B, 5, H, HV, K, V)

    def elsewhere(*tensors):
        o, state = step(*tensors[:-1], taken=(0, 1))
        tensors[-1].copy_(state)
        return o

    def returned(*tensors):
        o, state = step(*tensors, taken=(0, 1))
        tensors[-1].copy_(state)
        return o, state

    def read_later(*tensors):
        return written(*tensors), tensors[-1] * 2

    for f, args in (
        (elsewhere, (*tensors, torch.zeros_like(tensors[-1]))),
        (returned, tensors),
        (step, tensors),
        (written, delta_rule.example_tensors(B, 9, H, HV, K, V)),
    ):
        found = fused(f, *args, rule=short_delta_rule.RULE)
        assert not found.outcome.records and CHUNKED in found.ops()
    assert fused(read_later, *tensors, rule=short_delta_rule.RULE).record.status is Status.REFUSED


def test_other_rules_are_left_as_they_are():
    tensors = delta_rule.example_tensors(B, 5, H, HV, K, V)

    def packed(*tensors):
        return step(*(x[:1] for x in tensors[:5]), *tensors[5:], bounds=torch.tensor([0, 2, 5]))

    for f, args in (
        (step, delta_rule.example_tensors(B, 9, H, HV, K, V)),  # a prompt
        (step, delta_rule.example_tensors(B, 1, H, HV, K, V)),
        (lambda *t: step(*t, taken=(0, 1)), tensors),
        (lambda *t: step(*t, taken=(0, 2), every=1), tensors),
        (written, tensors),
        (lambda *t: step(*t, None), tensors[:-1]),
        (packed, tensors),
    ):
        found = fused(f, *args)
        assert not found.outcome.records and CHUNKED in found.ops() and VERIFY not in found.ops()


def test_a_window_that_stays_is_the_convs_context():
    def conv(state, x, weight):
        return ops.causal_conv.default(torch.cat([state, x], -1), weight, None, "silu", None, None)[:, :, -x.shape[-1] :]

    def kept(state, x, weight, row):
        window = torch.cat([state, x], -1)
        row.copy_(window.mT)
        return ops.causal_conv.default(window, weight, None, "silu", None, None)[:, :, -x.shape[-1] :]

    def written_later(state, x, weight):
        y = conv(state, x, weight)
        state.add_(1)
        return y

    args = torch.randn(B, 12, 4), torch.randn(B, 12, 5), torch.randn(12, 4)
    for f, more in ((conv, ()), (kept, (torch.zeros(B, 9, 12),))):
        found = Captured(f, *args, *more).normalize().apply(conv_context.RULE).normalize().close()
        assert found.record.status is Status.FIRED, found.record.reason
        assert ("cat" in found.ops()) == (f is kept)  # which is recorded
    found = Captured(written_later, *args).normalize().apply(conv_context.RULE).normalize().close()
    assert found.record.status is Status.REFUSED and "must not be written in place" in found.record.reason


def test_what_enters_a_conv_and_is_recorded_is_read_once():
    tensors = record.example_tensors(B, 5, 12, 4, HV, more=3)
    weight = torch.randn(12, 4)

    def conv(x, context, weight, **more):
        return ops.causal_conv.default(x, weight, None, "silu", context, **more)

    def step(x, context, a, b, *room_and_weight):
        *room, weight = room_and_weight
        y = conv(x, context, weight)
        ops.record.default(x, context, a.mul(2), b, *room)
        return y

    def read(*tensors):
        y = step(*tensors)
        return y, tensors[4] + 1

    def another_window(x, context, a, b, *room_and_weight):
        *room, weight = room_and_weight
        ops.record.default(x, context, a, b, *room)
        return conv(x, context * 2, weight)

    def no_conv(x, context, a, b, *room_and_weight):
        ops.record.default(x, context, a, b, *room_and_weight[:3])
        return x + 1

    def gates_after(x, context, a, b, *room_and_weight):
        *room, weight = room_and_weight
        y = conv(x, context, weight).mul(2)
        ops.record.default(x, context, a + y[:, :1, :1], b, *room)
        return y

    found = fused(step, *tensors, weight, rule=record_conv.RULE)
    assert found.record.status is Status.FIRED and found.ops() == ["mul", "gdnfuse.causal_conv_record"]
    for f, sentence in (
        (read, "windows must be read and written here alone, found that add uses it too"),
        (another_window, "must have the recorded window as its context, found another"),
        (no_conv, "must enter one causal conv, found 0"),
        (gates_after, "causal_conv_default must not be read before all operands exist"),
    ):
        found = fused(f, *tensors, weight, rule=record_conv.RULE)
        assert found.record.status is Status.REFUSED and sentence in found.record.reason, found.record.reason
        assert "gdnfuse.record" in found.ops()


def traced(model, cache, tokens):
    """The report of a call's graph as a GPU would have it. With some versions of transformers masks are a graph before it."""
    reports = []

    def backend(gm, inputs):
        reports.append(GraphReport(0, inner="eager"))
        rewritten_copy(gm, inputs, Options(inner="eager", target="cuda"), reports[-1], plan=True)
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(tokens, **zoo.held(cache))
    (report,) = [r for r in reports if r.layers]
    return report


def test_what_a_layer_of_a_verify_and_of_a_short_step_becomes():
    """Few rows' linears, the conv on the cached window, the rule that leaves its state or not, the gated norm; a kernel each."""
    gdnfuse.capture.install()
    model = zoo.causal_lm(**zoo.SMALL, hidden_size=128, linear_value_head_dim=32).bfloat16()
    cache = gdnfuse.RollbackCache(model, 32)
    with torch.no_grad():
        model(zoo.prompt(1, 6)[0], **zoo.held(cache))
    for phase, rule in (("verify", "delta_rule_verify"), ("short", "fused_gating_delta_rule")):
        if phase == "verify":
            cache.activate_past_recording()
        report = traced(model, cache, zoo.tokens_for(1, 5))
        assert report.phase == phase and report.fused_layers == 1
        chosen = [(r.rule, r.chosen) for r in report.all_records if r.stage == "lower"]
        conv = "causal_conv_record" if phase == "verify" else "causal_conv"
        assert {(conv, "triton"), (rule, "triton"), ("gated_rms_norm", "triton")} <= {*chosen}
        assert ("attention_decode", "triton") in chosen
        linears = [how for what, how in chosen if what in ("linear", "packed_linear", "fused_linear")]
        assert linears.count("triton") == len(linears) >= 6
        assert ("add_rms_norm", "triton") in chosen
        if phase == "verify":
            cache.abandon(6)
            cache.stop_past_recording()
    assert traced(model, cache, zoo.tokens_for(1, 9)).phase == "prefill"
