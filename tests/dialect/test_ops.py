"""Every dialect op: a well-formed custom op, float64 all the way for float64 inputs, references that agree with each other."""

import re
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st

import gdnfuse
from gdnfuse.dialect import (
    OPS,
    causal_conv,
    causal_conv_update,
    chunk_delta_rule,
    conv_windows,
    delta_rule,
    experts,
    fp8_linear,
    fused_gating_delta_rule,
    gated_rms_norm,
    gating,
    l2norm,
    mixer_decode,
    op_of,
    packed_decode,
    packed_linear,
    quantize_rows,
    record,
    rms_norm,
    route,
)

E4M3 = torch.float8_e4m3fn
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
EXAMPLES = [(name, i) for name, op in OPS.items() for i in range(len(op.examples()))]
quick = settings(max_examples=15, deadline=None)
heads = st.sampled_from([(1, 1), (1, 3), (2, 2), (2, 4)])
dims = st.tuples(st.sampled_from([1, 4, 8]), st.sampled_from([1, 5, 8]))
batches = st.integers(1, 3)


def double(x):
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, torch.dtype):
        return torch.float64
    return [double(t) for t in x] if isinstance(x, list) else x


def all_of(results):
    """Each result of an op, of which there may be none."""
    return results if isinstance(results, tuple) else () if results is None else (results,)


def close(found, wanted, tolerance=1e-12):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "i"), EXAMPLES)
def test_opcheck(name, i):
    args, kwargs = OPS[name].examples()[i]
    checks = list(OPCHECKS)
    if quantised := [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dtype == E4M3]:
        checks.remove("test_schema")  # which compares tensors before and after, and torch compares none of eight bits
    before = [x.view(torch.uint8).clone() for x in quantised]
    torch.library.opcheck(OPS[name].overload, args, kwargs, test_utils=checks)
    assert all(torch.equal(x.view(torch.uint8), was) for x, was in zip(quantised, before, strict=True))


@pytest.mark.parametrize(("name", "i"), EXAMPLES)
def test_float64_in_float64_out_and_states_alike(name, i):
    op = OPS[name]
    args, kwargs = op.examples()[i]
    bound = op.bind([double(a) for a in args], {k: double(v) for k, v in kwargs.items()})
    before = {k: v.clone() for k, v in bound.items() if isinstance(v, torch.Tensor)}
    results = op.overload(**bound)
    for r in all_of(results):
        assert r.dtype in (torch.float64, E4M3) or not r.is_floating_point()
        assert r.to(torch.float64).isfinite().all()
    for k, was in before.items():
        assert torch.equal(bound[k], was) == (k not in op.mutates), k
        assert bound[k].dtype == double(was).dtype


@pytest.mark.parametrize("name", OPS)
def test_the_op_is_its_reference_and_its_fake_knows_the_result(name):
    op = OPS[name]
    assert op_of(op.overload) is op and op.equation
    args, kwargs = op.examples()[0]
    copies = pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, args)
    found, wanted, faked = op.overload(*args, **kwargs), op.reference(*copies, **kwargs), op.fake(*copies, **kwargs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    for x, f in zip(*map(all_of, (wanted, faked)), strict=True):
        assert (x.shape, x.dtype, x.device) == (f.shape, f.dtype, f.device)


@pytest.mark.parametrize("axes", [(-1, -2), (0, 1)])
@pytest.mark.parametrize(("name", "i"), EXAMPLES)
def test_results_lie_in_memory_as_the_fake_says_however_inputs_do(name, i, axes):
    """A compiler takes the fake's word for it."""
    args, kwargs = OPS[name].examples()[i]
    turned = lambda x: x.transpose(*axes).contiguous().transpose(*axes) if x.ndim > 2 else x  # noqa: E731
    args = pytree.tree_map_only(torch.Tensor, turned, args)
    found, wanted = OPS[name].reference(*args, **kwargs), OPS[name].fake(*args, **kwargs)
    for x, f in zip(*map(all_of, (found, wanted)), strict=True):
        steps = [[s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1] for t in (x, f)]
        assert x.shape == f.shape and steps[0] == steps[1]


def test_slots_that_cannot_be_are_a_sentence():
    (args, kwargs), *_ = OPS["delta_rule_slots"].examples()
    names = ("q", "k", "v", "a", "b", "A_log", "dt_bias", "states", "slots", "accepted")
    good = dict(zip(names, args, strict=True)) | kwargs
    was = good["states"].clone()
    for wrong, sentence in (
        ({"q": good["q"][:, :0], "v": good["v"][:, :0]}, "one token and HV a multiple of H, found [3, 0, 2, 8] and"),
        ({name: x[:0] for name, x in good.items() if name in ("q", "k", "v", "a", "b", "slots", "accepted")}, "one sequence"),
        ({"a": good["a"][:, 1:]}, "a must be [3, 3, 4], found [3, 2, 4]."),
        ({"states": was[:, :, :4]}, "states must be [7, 4, 8, 16], found [7, 4, 4, 16]."),
        ({"states": was[:1].expand(7, -1, -1, -1)}, "each in memory of its own, found the shape [7, 4, 8, 16] with strides [0, "),
        ({"states": was[:0], "slots": good["slots"].clamp(max=-1)}, "states must be at least one"),
        ({"states": was.int()}, "states must be float32, bfloat16, float16 or float64, found int32."),
        ({"A_log": good["A_log"][:1]}, "A_log must be [4], found [1]."),
        ({"dt_bias": good["dt_bias"].expand(3, 4)}, "dt_bias must be [4], found [3, 4]."),
        ({"k": good["k"].to("meta")}, "k must be on cpu, as v, found meta."),
        ({"accepted": [1, 1, 1]}, "accepted must be a tensor, found list."),
        ({"slots": good["slots"].float()}, "slots must be int32 or int64, found float32."),
        ({"slots": good["slots"] + 4}, "slots must be below 7, the number of states, found 8."),
        ({"slots": good["slots"].clamp(min=0)}, "No two tokens may have the same slot"),
        ({"accepted": good["accepted"] + 1}, "accepted must be from 0 to 3, found 2 to 4."),
    ):
        with pytest.raises(gdnfuse.GdnfuseError, match=re.escape(sentence)):
            gdnfuse.delta_rule_slots(**good | wrong)
    assert torch.equal(good["states"], was)


def test_op_of_other_things_is_none():
    assert op_of(torch.ops.aten.add.Tensor) is None and op_of(torch.add) is None


def rule_inputs(B, T, H, HV, K, V):
    return tuple(t.double() for t in delta_rule.example_tensors(B, T, H, HV, K, V))


@quick
@given(batches, st.integers(1, 4), heads, dims, st.sampled_from([None, 1e-6]))
def test_delta_rule_is_its_steps_one_by_one(B, T, heads, dims, eps):
    q, k, v, a, b, _, _, state = rule_inputs(B, T, *heads, *dims)
    g, beta, was = -a.exp(), b.sigmoid(), state.clone()
    o, last = delta_rule.reference(q, k, v, g, beta, state, 0.3, eps)
    s, steps = state, []
    for t in range(T):
        one = slice(t, t + 1)
        out, s = delta_rule.reference(q[:, one], k[:, one], v[:, one], g[:, one], beta[:, one], s, 0.3, eps)
        steps.append(out)
    close(o, torch.cat(steps, 1))
    close(last, s)
    assert torch.equal(state, was)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_slots_are_the_rule_token_by_token_and_what_does_not_stand_is_taken_back(dtype):
    """Two calls on one pool: of the first call's three tokens all, two, one and none stand."""
    B, T, H, HV, K, V = 4, 3, 1, 2, 4, 5
    q, k, v, a, b, A_log, dt_bias, _ = rule_inputs(B, 2 * T, H, HV, K, V)
    slots = torch.tensor([[7, 0, 9], [1, 8, 2], [10, -1, 3], [4, 5, 6]], dtype=torch.int32)
    states, accepted = torch.randn(13, HV, K, V).to(dtype), torch.tensor([3, 2, 1, 0], dtype=torch.int32)
    unused, read = states[11:].clone(), []

    def call(at, accepted):
        tokens = (x[:, at] for x in (q, k, v, a, b))
        return gdnfuse.delta_rule_slots(*tokens, A_log, dt_bias, states, slots, accepted, 0.3, 1e-6, 2.0)

    def step(state, i, t):
        one = [x[i : i + 1, t : t + 1] for x in (q, k, v, a, b)]
        return fused_gating_delta_rule.reference(*one, A_log, dt_bias, state, 0.3, 1e-6, 2.0)

    call(slice(0, T), torch.zeros_like(accepted))
    for i, n in enumerate(accepted.tolist()):
        state = torch.zeros(1, HV, K, V, dtype=torch.float64)
        for t in range(n):
            step(state, i, t)
        read.append(state.to(dtype).double())
        if n:
            close(states[slots[i, n - 1]].double(), state[0].to(dtype).double())
    out = call(slice(T, 2 * T), accepted)
    for i, state in enumerate(read):
        for t in range(T):
            close(out[i : i + 1, t : t + 1], step(state, i, T + t))
            if slots[i, t] >= 0:
                close(states[slots[i, t]].double(), state[0].to(dtype).double())
    assert torch.equal(states[11:], unused)  # nothing of a negative slot, which counts from the end


def test_delta_rule_is_the_equation():
    """One head, written with matrices: S ← e^g(I − β k kᵀ)S + β k vᵀ."""
    q, k, v, a, b, _, _, state = (x[0] for x in rule_inputs(1, 3, 1, 1, 4, 5))
    g, beta, S, wanted = -a.exp(), b.sigmoid(), state[0], []
    for t in range(3):
        kt, bt = k[t, 0], beta[t, 0]
        S = g[t, 0].exp() * (torch.eye(4, dtype=torch.float64) - bt * torch.outer(kt, kt)) @ S + bt * torch.outer(kt, v[t, 0])
        wanted.append(S.T @ (q[t, 0] * 0.5))
    o, last = delta_rule.reference(q[None], k[None], v[None], g[None], beta[None], state[None], 0.5)
    close(o[0, :, 0], torch.stack(wanted))
    close(last[0, 0], S)


def chunk_inputs(B, T, H, HV, K, V, hard=1.0):
    q, k, v, a, b, _, _, state = rule_inputs(B, T, H, HV, K, V)
    return q, k, v, -F.softplus(a * hard), (b * hard).sigmoid(), state


@pytest.mark.parametrize("T", range(1, 301))
def test_chunked_rule_is_the_rule_for_every_length(T):
    args = chunk_inputs(1, T, 1, 2, 4, 3)
    o, last, none = chunk_delta_rule.reference(*args, 0.3, 1e-6)
    wanted, state = delta_rule.reference(*args, 0.3, 1e-6)
    close(o, wanted, 1e-10)
    close(last, state, 1e-10)
    assert none.shape == (1, 0, 2, 4, 3)


@quick
@given(batches, st.integers(2, 200), st.data(), heads, dims, st.sampled_from([1.0, 40.0]))
def test_chunked_rule_may_be_cut_anywhere(B, T, data, heads, dims, hard):
    """Segments with the state handed on are the whole; gates saturate where they are hard: no decay, all gone, β of 0 and 1."""
    *tensors, state = chunk_inputs(B, T, *heads, *dims, hard)
    cut = data.draw(st.integers(1, T - 1))
    o, last, _ = chunk_delta_rule.reference(*tensors, state, 0.3, 1e-6)
    o1, s, _ = chunk_delta_rule.reference(*(x[:, :cut] for x in tensors), state, 0.3, 1e-6)
    o2, s, _ = chunk_delta_rule.reference(*(x[:, cut:] for x in tensors), s, 0.3, 1e-6)
    close(o, torch.cat([o1, o2], 1), 1e-9)
    close(last, s, 1e-9)


@quick
@given(st.integers(64, 300), st.integers(1, 3))
def test_checkpoints_are_the_states_on_the_way(T, every):
    *tensors, state = chunk_inputs(2, T, 1, 2, 4, 3)
    *_, kept = chunk_delta_rule.reference(*tensors, state, 0.3, 1e-6, checkpoint_every=every)
    assert kept.shape[1] == T // (64 * every)
    for i in range(kept.shape[1]):
        end = 64 * every * (i + 1)
        close(kept[:, i], chunk_delta_rule.reference(*(x[:, :end] for x in tensors), state, 0.3, 1e-6)[1], 1e-9)


@quick
@given(st.lists(st.integers(1, 90), min_size=1, max_size=4))
def test_packed_sequences_are_kept_apart(lengths):
    *tensors, _ = chunk_inputs(1, sum(lengths), 1, 2, 4, 3)
    states = torch.randn(len(lengths), 2, 4, 3, dtype=torch.float64)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    o, last, _ = chunk_delta_rule.reference(*tensors, states, 0.3, 1e-6, bounds)
    for n, (start, end) in enumerate(pairwise(bounds)):
        alone, state, _ = chunk_delta_rule.reference(*(x[:, start:end] for x in tensors), states[n : n + 1], 0.3, 1e-6)
        close(o[:, start:end], alone)
        close(last[n], state[0])


def test_chunked_rule_says_what_it_does_not_take():
    args = chunk_inputs(1, 5, 1, 1, 2, 2)
    empty = (*(x[:, :0] for x in args[:5]), args[5], 0.3)
    with pytest.raises(ValueError, match="at least one token, found T = 0"):
        chunk_delta_rule.reference(*empty)
    with pytest.raises(ValueError, match="must not be negative, found -1"):
        chunk_delta_rule.reference(*args, 0.3, checkpoint_every=-1)
    with pytest.raises(ValueError, match="a row for each of the 2 sequences, found 1"):
        chunk_delta_rule.reference(*args, 0.3, cu_seqlens=torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match="With cu_seqlens B must be 1 and checkpoint_every 0, found B = 1 and 2"):
        chunk_delta_rule.reference(*args, 0.3, cu_seqlens=torch.tensor([0, 5]), checkpoint_every=2)


@quick
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 5), st.integers(0, 5))
def test_prompt_conv_keeps_packed_sequences_apart(lengths, W, S):
    """Each as if alone; what lies before the first, context or columns of x, belongs to it."""
    T = sum(lengths)
    x, context = torch.randn(1, 3, T + S, dtype=torch.float64), torch.randn(1, 3, 4, dtype=torch.float64)
    weight, bounds = torch.randn(3, W, dtype=torch.float64), torch.tensor([0, *lengths]).cumsum(0)
    found = causal_conv.reference(x, weight, None, "silu", context, bounds)
    pieces = x.split([lengths[0] + S, *lengths[1:]], -1)
    alone = [causal_conv.reference(p, weight, None, "silu", None if i else context) for i, p in enumerate(pieces)]
    close(found, torch.cat(alone, -1))


@quick
@given(batches, st.integers(1, 6), st.integers(1, 5), st.integers(0, 6), st.booleans())
def test_prompt_conv_is_conv1d_with_its_context(B, T, W, S, biased):
    x, context = torch.randn(B, 3, T, dtype=torch.float64), torch.randn(B, 3, S, dtype=torch.float64)
    weight, bias = torch.randn(3, W, dtype=torch.float64), torch.randn(3, dtype=torch.float64) if biased else None
    window = F.pad(torch.cat([context, x], -1), (W - 1, 0))
    wanted = F.silu(F.conv1d(window, weight[:, None], bias, groups=3)[..., -T:])
    close(causal_conv.reference(x, weight, bias, "silu", context), wanted)
    if not S:
        close(causal_conv.reference(x, weight, bias, "silu"), wanted)


@quick
@given(batches, st.integers(1, 3), heads, dims, st.sampled_from([None, 1e-6]), st.sampled_from([1.0, 2.0]))
def test_fused_gating_is_gating_then_the_rule(B, T, heads, dims, eps, factor):
    q, k, v, a, b, A_log, dt_bias, state = rule_inputs(B, T, *heads, *dims)
    g = gating.reference(a, A_log, dt_bias)
    wanted, new = delta_rule.reference(q, k, v, g, factor * b.sigmoid(), state, 0.3, eps)
    found = fused_gating_delta_rule.reference(q, k, v, a, b, A_log, dt_bias, state, 0.3, eps, factor)
    close(found, wanted)
    close(state, new)


@quick
@given(batches, heads, dims)
def test_packed_decode_is_the_rule_on_its_parts(B, heads, dims):
    q, k, v, a, b, A_log, dt_bias, state = rule_inputs(B, 1, *heads, *dims)
    row, other = torch.cat([x.flatten(2) for x in (q, k, v)], -1), state.clone()
    found = packed_decode.reference(row, a, b, A_log, dt_bias, state, 0.3, 1e-6, 1.5)
    wanted = fused_gating_delta_rule.reference(q, k, v, a, b, A_log, dt_bias, other, 0.3, 1e-6, 1.5)
    close(found, wanted)
    close(state, other)


@quick
@given(batches, heads, dims, st.booleans(), st.permutations("qkvzba,"), st.sampled_from(["silu", "sigmoid"]))
def test_mixer_decode_is_its_parts_in_any_order_of_the_row(B, heads, dims, bias, order, gate):
    """With a comma the parts before it stand head by head, and then those behind it."""
    H, HV, K, V = *heads, *dims
    args = [double(a) for a in mixer_decode.example_call(B, H, HV, K, V, bias=bias, order="".join(order), beta_scale=2.0)[0]]
    args[-1] = gate
    row, conv_state, w, conv_bias, A_log, dt_bias, state, norm, *_, act, scale, eps, norm_eps, factor, _ = args
    widths = {"q": K, "k": K, "v": HV // H * V, "z": HV // H * V, "b": HV // H, "a": HV // H}
    found_in, column = {part: [] for part in widths}, 0
    for group in "".join(order).split(","):
        for _ in range(H):
            for part in group:
                found_in[part].append(row[:, :, column : column + widths[part]])
                column += widths[part]
    parts = {part: torch.cat(pieces, -1) for part, pieces in found_in.items()}
    conv_was, state_was = conv_state.clone(), state.clone()
    found = mixer_decode.reference(*args)
    qkv = torch.cat([parts[part] for part in "qkv"], -1).transpose(1, 2)
    qkv = causal_conv_update.reference(qkv, conv_was, w, conv_bias, act)
    gates = (parts["a"], parts["b"], A_log, dt_bias)
    o = packed_decode.reference(qkv.transpose(1, 2), *gates, state_was, scale, eps, factor)
    close(found, gated_rms_norm.reference(o, parts["z"].unflatten(-1, (HV, V)), norm, norm_eps, gate).flatten(2))
    close(conv_state, conv_was)
    close(state, state_was)


@quick
@given(batches, st.integers(1, 6), st.integers(1, 5), st.integers(0, 2), st.booleans(), st.sampled_from(["silu", "none"]))
def test_conv_is_conv1d_and_its_tokens_one_by_one(B, T, W, spare, biased, activation):
    D, S = 3, max(1, W - 1 + spare)
    x, state = torch.randn(B, D, T, dtype=torch.float64), torch.randn(B, D, S, dtype=torch.float64)
    weight = torch.randn(D, 1, W, dtype=torch.float64)
    bias = torch.randn(D, dtype=torch.float64) if biased else None
    window, one = torch.cat([state, x], -1), state.clone()
    wanted = F.conv1d(window, weight, bias, groups=D)[..., -T:]
    wanted = F.silu(wanted) if activation == "silu" else wanted
    found = causal_conv_update.reference(x, state, weight, bias, activation)
    steps = [causal_conv_update.reference(x[..., t : t + 1], one, weight, bias, activation) for t in range(T)]
    close(found, wanted)
    close(found, torch.cat(steps, -1))
    assert torch.equal(state, one) and torch.equal(state, window[..., -S:])


@quick
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from([(2,), (2, 1), (1, 3)]))
def test_packed_linear_is_the_linears_side_by_side(widths, lead):
    x, weights = torch.randn(*lead, 6, dtype=torch.float64), [torch.randn(w, 6, dtype=torch.float64) for w in widths]
    row = packed_linear.reference(x, weights)
    for part, w in zip(row.split(widths, -1), weights, strict=True):
        close(part, F.linear(x, w))


def eager_experts(x, indices, weights, gate_up, down):
    """transformers' loop (integrations/moe.py), the masked expert included."""
    y, E = torch.zeros_like(x), gate_up.shape[0]
    mask = F.one_hot(indices, num_classes=E + 1).permute(2, 1, 0)
    for e in mask.sum((-1, -2)).nonzero()[:, 0].tolist():
        if e < E:
            at, row = torch.where(mask[e])
            gate, up = F.linear(x[row], gate_up[e]).chunk(2, -1)
            y.index_add_(0, row, F.linear(F.silu(gate) * up, down[e]) * weights[row, at, None])
    return y


@quick
@given(st.integers(1, 7), st.integers(1, 6), st.integers(1, 5), st.data(), st.booleans())
def test_experts_are_transformers_loop_over_them(N, E, H, data, masked):
    """Twice the same expert for a row, all rows on one, none on most, and a masked choice are drawn too."""
    k = data.draw(st.integers(1, E))
    x, _, weights, gate_up, down = (double(t) for t in experts.example_call(N, H, E, k, 4)[0])
    indices = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, E if masked else E - 1), min_size=k, max_size=k), min_size=N, max_size=N))
    )
    wanted = eager_experts(x, indices, weights, gate_up, down)
    for most in (0, experts.FEW):  # choices that are computed one by one
        with mock.patch.object(experts, "FEW", most):
            close(experts.reference(x, indices, weights, gate_up, down), wanted)


def test_what_is_recorded_are_the_columns_and_gates_of_its_tokens():
    x, context, a, b, windows, recorded_a, recorded_b = record.example_tensors(2, 3, 5, 4, 2, more=2)
    was = windows.clone(), recorded_a.clone()
    record.reference(x, context, a, b, windows, recorded_a, recorded_b)
    for row in range(2):
        assert all(torch.equal(windows[row, i], context[row, :, i]) for i in range(4))
        for t in range(3):
            assert torch.equal(windows[row, 4 + t], x[row, :, t])
            assert torch.equal(recorded_a[row, t], a[row, t]) and torch.equal(recorded_b[row, t], b[row, t])
    assert torch.equal(windows[:, 7:], was[0][:, 7:]) and torch.equal(recorded_a[:, 3:], was[1][:, 3:])


def test_conv_windows_are_the_columns_before_each_place():
    x, v = torch.randn(2, 6, 3 + 70), torch.randn(2, 70, 1)
    found = conv_windows.reference(x, v, 16, 4)
    assert found.shape == (2, 4, 6, 4)
    for i in range(4):
        end = 3 + 16 * (i + 1)
        assert torch.equal(found[:, i], x[:, :, end - 4 : end])
    assert conv_windows.reference(x, v, 71, 4).shape == (2, 0, 6, 4)
    with pytest.raises(ValueError, match="Windows of 4 columns need as many tokens between them, found 3"):
        conv_windows.reference(x, v, 3, 4)


@pytest.mark.parametrize("gated", [True, False])
def test_experts_with_all_around_them_are_the_parts(gated):
    call, around = experts.example_call(3, 8, 5, 2, 4, shared=6, gated=gated, norm=True, residual=True)
    (x, *call), around = [double(t) for t in call], {k: double(v) for k, v in around.items()}
    normed = rms_norm.reference(x, around["norm_weight"], 1e-6, 1.0)
    shared = F.silu(F.linear(normed, around["shared_gate"])) * F.linear(normed, around["shared_up"])
    shared = F.linear(shared, around["shared_down"])
    shared = F.linear(normed, around["shared_expert_gate"]).sigmoid() * shared if gated else shared
    close(experts.reference(x, *call, **around), around["residual"] + eager_experts(normed, *call) + shared)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_route_is_transformers_router(normalize, dtype):
    """Qwen3NextTopKRouter's, and its variants: logits in float32 (Lara), weights in float32 (Mixtral)."""
    x, weight = (t.to(dtype) for t in route.example_call(4, 8, 6, 3)[0][:2])
    wide = torch.promote_types(dtype, torch.float32)
    for wide_logits in (True, False):
        logits = F.linear(x.to(wide), weight.to(wide)) if wide_logits else F.linear(x, weight)
        top, indices = torch.topk(F.softmax(logits, dtype=wide, dim=-1), 3, dim=-1)
        top = top / top.sum(-1, keepdim=True) if normalize else top
        for wide_weights in (True, False):
            found = route.reference(x, weight, 3, normalize, wide_logits, wide_weights)
            assert torch.equal(found[0], top if wide_weights else top.to(dtype)) and torch.equal(found[1], indices)


def test_experts_and_route_say_what_they_do_not_take():
    for top_k in (0, 7):
        args, kwargs = route.example_call(2, 8, 6, top_k)
        for call in (route.reference, route.fake):
            with pytest.raises(ValueError, match=f"between 1 and the number of experts, 6, found {top_k}"):
                call(*args, **kwargs)
    args, kwargs = experts.example_call(2, 8, 6, 2, 4)
    for call in (experts.reference, experts.fake):
        with pytest.raises(ValueError, match="one of the activations silu, found relu"):
            call(*args, "relu", **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32_with_one_rounding_at_most(dtype):
    x = torch.randn(4, 8).to(dtype)
    close(l2norm.reference(x, 1e-6), F.normalize(x.float(), dim=-1), 1e-6)
    o, z, w = torch.randn(4, 8), torch.randn(4, 8).to(dtype), torch.randn(8).to(dtype)
    y = gated_rms_norm.reference(o, z, w, 1e-6)
    wide = F.rms_norm(o.double(), (8,), w.double(), 1e-6) * F.silu(z.double())
    assert y.dtype == dtype
    close(y.double(), wide, torch.finfo(dtype).eps)
    # Above 20 softplus is the identity, and float16 would overflow if the sum were taken in it.
    a = torch.tensor([60000.0, 0.0, -60000.0]).to(dtype)
    g = gating.reference(a, torch.zeros(3), torch.full((3,), 1e4))
    assert g.dtype == torch.float32 and g.isfinite().all() and g[0] == -(a[0].float() + 1e4)


def test_references_never_alias_an_input():
    """A custom op may not return what it was given; l2norm in float32 and an activation of nothing are where it could happen."""
    x = torch.zeros(2, 4)
    assert l2norm.reference(x, 1.0).data_ptr() != x.data_ptr()
    row = packed_linear.reference(x, [torch.eye(4)])
    assert row.data_ptr() != x.data_ptr()


def test_rows_are_quantised_as_by_hand():
    """Scales per group of columns; ties to even; groups of zeros and of tiny numbers; NaN and infinity stay in their group."""
    x = torch.randn(4, 256).bfloat16()
    x[0, :128], x[1, 128:], x[2, 5], x[3, 200] = 0, 1e-38, float("nan"), float("inf")
    x[0, 128:131] = torch.tensor([448.0, 17.0, 19.0])  # with a scale of 1, e4m3 has 16, 18 and 20 there
    x[0, 131:] = 0.25
    data, scale = quantize_rows.reference(x, 128)
    assert data.dtype == E4M3 and scale.shape == (2, 4) and scale.dtype == torch.float32
    for row, group in ((r, g) for r in range(4) for g in range(2)):
        part = x[row, 128 * group : 128 * (group + 1)].float()
        of, s = data[row, 128 * group : 128 * (group + 1)].float(), scale[group, row]
        if (row, group) in ((2, 0), (3, 1)):
            assert not of.isfinite().all()
            continue
        s_by_hand = max(part.abs().max().item() / 448, 2.0**-126)
        assert s.item() == pytest.approx(s_by_hand, rel=1e-6)
        spacing = 2.0 ** (torch.frexp(part / s).exponent - 4).clamp(min=-9)  # three bits of fraction, or the smallest number
        assert ((of - part / s).abs() <= spacing / 2 * (1 + 1e-5)).all()
    assert not data[0, :128].float().any() and data[0, 128:132].tolist() == [448.0, 16.0, 20.0, 0.25]
    assert data.float().isfinite().sum() >= 4 * 256 - 256 and data[2, 128:].float().isfinite().all()


@pytest.mark.parametrize(("format", "columns"), [("fp8_block128", 128), ("fp8_channel", 256), ("fp8_tensor", 256)])
def test_an_fp8_linear_is_the_loop_over_groups(format, columns):
    """Integer sums of products are exact, so the loop differs by the scales' roundings alone."""
    (x, x_scale, data, scale, *_), _ = fp8_linear.example_call(140, 256, format, lead=(3,))
    found = fp8_linear.reference(x, x_scale, data, scale, format, torch.float32)
    wanted = torch.zeros(3, 140, dtype=torch.float64)
    for g in range(256 // columns):
        part = slice(g * columns, (g + 1) * columns)
        products = x[:, part].double() @ data[:, part].double().T
        of_weight = {"fp8_block128": lambda g: scale[:, g].repeat_interleave(128)[:140], "fp8_channel": lambda g: scale[:, 0]}
        wanted += products * x_scale[g, :, None].double() * of_weight.get(format, lambda g: scale)(g).double()
    close(found.double(), wanted, 1e-5)
