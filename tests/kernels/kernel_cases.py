"""Calls of every kernel, and the comparison with the dialect's reference in float64; for interpreter and GPU tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree

from gdnfuse import dialect
from gdnfuse.dialect import (
    add_rms_norm,
    attention_decode,
    attention_few_queries,
    attention_growing,
    delta_rule,
    delta_rule_commit,
    delta_rule_slots,
    experts,
    fp8_linear,
    fused_linear,
    in_proj_conv,
    mixer_decode,
    packed_decode,
    prompt_attention,
    record,
)

# Largest error relative to the largest value: a few roundings of float32 maths, and one more where the result is stored narrower.
MATHS = 2e-6
TOLERANCE = {torch.float32: MATHS, torch.bfloat16: 2.0**-8 + MATHS, torch.float16: 2.0**-11 + MATHS}
# The chunked rule multiplies bfloat16 operands, four products deep, or takes three tf32 products for one of float32.
CHUNKED = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2.0**-10}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# Arguments that have the batch in front.
STATES = {"context", "state", "conv_state", "recurrent_state", "keys", "values"}
BATCHED = STATES | {"x", "q", "k", "v", "g", "beta", "a", "b", "mixed_qkv", "o", "z", "row", "gate", "slots", "accepted"}


@dataclass(frozen=True)
class Case:
    op: str
    label: str
    make: Callable[[], tuple[tuple, dict]]

    def __str__(self):
        return f"{self.op}-{self.label}"

    def call(self):
        torch.manual_seed(0)
        return self.make()


def strided(t, step=1, pad=3):
    """t's values, every `step`-th element of rows that are `pad` elements longer; what lies between is NaN."""
    parent = torch.full((*t.shape[:-1], t.shape[-1] * step + pad), float("nan"), dtype=t.dtype)
    view = parent[..., pad::step]
    view.copy_(t)
    return view


def every_second(t):
    return strided(t, 2)


def padded(t):
    """Strided in such a way that every row starts at a multiple of 16 elements."""
    return strided(t, pad=16)


def name(dtype):
    return str(dtype).removeprefix("torch.")


def conv(B, D, S, W, dtype=F32, state_dtype=None, bias=False, act="silu", wrap=lambda x: x, wrap_state=lambda s: s):
    def make():
        x = wrap(torch.randn(B, D, 1).to(dtype))
        state = wrap_state(torch.randn(B, D, S).to(state_dtype or dtype))
        return (x, state, torch.randn(D, 1, W).to(dtype), torch.randn(D).to(dtype) if bias else None, act), {}

    return make


def prompt_conv(B, D, T, W, dtype=F32, S=0, bias=False, act="silu", wrap=lambda x: x, bounds=None, context_dtype=None):
    def make():
        x, context = wrap(torch.randn(B, D, T).to(dtype)), torch.randn(B, D, S).to(context_dtype or dtype) if S else None
        return (x, torch.randn(D, W).to(dtype), torch.randn(D).to(dtype) if bias else None, act, context, bounds), {}

    return make


def recording_conv(B, D, T, S, HV, dtype=F32, recorded_dtype=None, bias=False, more=0, act="silu", wrap=lambda x: x):
    """`wrap` lays out x and the gates, and what is recorded by channel."""

    def make():
        x, context, a, b, *room = record.example_tensors(B, T, D, S, HV, more, dtype)
        weight, bias_ = torch.randn(D, 4).to(dtype), torch.randn(D).to(dtype) if bias else None
        room = [wrap(r.to(recorded_dtype or dtype)) for r in room]
        return (wrap(x.mT).mT, weight, bias_, act, context.to(recorded_dtype or dtype), wrap(a), wrap(b), *room), {}

    return make


def row_slice(x):
    """x [B, D, T] as columns of packed rows [B, T, D + 9]."""
    return strided(x.transpose(1, 2), pad=9).transpose(1, 2)


def rule(
    B,
    T,
    H,
    HV,
    K,
    V,
    dtype=F32,
    state_dtype=F32,
    eps=1e-6,
    gate_scale=1.0,
    beta_scale=1.0,
    wrap=lambda x: x,
    wrap_state=lambda s: s,
):
    def make():
        q, k, v, a, b, A_log, dt_bias, s = delta_rule.example_tensors(B, T, H, HV, K, V, dtype, state_dtype)
        q, k = (q, k) if eps is not None else (q / K**0.5, k / K**0.5)
        q, k, v, a, b = (wrap(x) for x in (q, k, v, a * gate_scale, b * gate_scale))
        options = {"scale": K**-0.5, "l2norm_eps": eps, "beta_scale": beta_scale}
        return (q, k, v, a, b, A_log, dt_bias, wrap_state(s)), options

    return make


def commit(
    L, B, T, W, H, HV, K, V, accepted, dtype=F32, state_dtype=F32, beta_scale=1.0, wrap=lambda x: x, wrap_state=lambda s: s
):
    """A call of delta_rule_commit; what was not accepted is NaN."""

    def make():
        windows, a, b, accepted_, weight, *gates, conv_state, state = delta_rule_commit.example_tensors(
            L, B, T, W, H, HV, K, V, accepted, dtype, state_dtype
        )
        for i, n in enumerate(accepted):
            for rejected in (windows[:, i, W + n :], a[:, i, n:], b[:, i, n:]):
                rejected.fill_(float("nan"))
        args = (wrap(windows), wrap(a), wrap(b), accepted_, weight, *gates, wrap_state(conv_state), wrap_state(state))
        return args, {"l2norm_eps": 1e-6, "beta_scale": beta_scale}

    return make


def slotted(
    T, H, HV, K, V, slots, accepted, dtype=F32, state_dtype=F32, eps=1e-6, beta_scale=1.0, index=torch.int32,
    wrap=lambda x: x, wrap_state=lambda s: s,
):  # fmt: skip
    """A call of delta_rule_slots; what the pool has besides the slots is NaN."""

    def make():
        made = delta_rule_slots.slot_tensors(T, H, HV, K, V, slots, accepted, dtype, state_dtype)
        *tokens, A_log, dt_bias, states, at, n = made
        unused = sorted({*range(len(states))} - {s for row in slots for s in row})
        states[unused] = float("nan")
        options = {"scale": K**-0.5, "l2norm_eps": eps, "beta_scale": beta_scale}
        return (*map(wrap, tokens), A_log, dt_bias, wrap_state(states), at.to(index), n.to(index)), options

    return make


def chunked(
    B, T, H, HV, K, V, dtype=F32, eps=1e-6, state=True, every=0, lengths=None, gated=False, wrap=lambda x: x, hard=1.0,
    beta_scale=1.0, alike=False,
):  # fmt: skip
    """A call of chunk_delta_rule, or of the one with its gates inside; `hard` scales the gates before their nonlinearities; with
    keys `alike` and gates that keep the state, every step turns it about the same axis."""

    def make():
        q, k, v, a, b, A_log, dt_bias, s = delta_rule.example_tensors(B, T, H, HV, K, V, dtype)
        q, k = (q, k) if eps is not None else (q / K**0.5, k / K**0.5)
        if alike:
            k, a = k[:, :1] + k / 64, a - 20
        q, k, v, a, b = (wrap(x) for x in (q, k, v, a * hard, b * hard))
        gates = (a, b, A_log, dt_bias) if gated else (-F.softplus(a.float()), (beta_scale * b.float().sigmoid()).to(dtype))
        bounds = None if lengths is None else torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        s = s if lengths is None else torch.randn(len(lengths), HV, K, V)
        options = {"scale": K**-0.5, "l2norm_eps": eps, "cu_seqlens": bounds, "checkpoint_every": every}
        options["beta_scale" if gated else "beta_max"] = beta_scale
        return (q, k, v, *gates, s if state else None), options

    return make


def beta_to_2(K, dtype, **options):
    return chunked(1, 130, 1, 2, K, 24, dtype, gated=True, beta_scale=2.0, **options)


FIVE = [[9, 0, 4, 7, 1], [2, 11, -1, 5, 3], [-1, 6, -1, -1, 8]]
BETAS = ((F32, 24), (BF16, 16), (BF16, 96))


def packed(B, H, HV, K, V, dtype=F32, state_dtype=F32, wrap=lambda x: x):
    def make():
        mixed, a, b, A_log, dt_bias, s = packed_decode.example_tensors(B, H, HV, K, V, dtype, state_dtype)
        return (wrap(mixed), wrap(a), wrap(b), A_log, dt_bias, s), {"scale": K**-0.5, "l2norm_eps": 1e-6}

    return make


def norm(shape, o_dtype, z_dtype, wrap=lambda x: x, act="silu"):
    def make():
        o, z = torch.randn(shape).to(o_dtype), torch.randn(shape).to(z_dtype)
        return (wrap(o), wrap(z), torch.randn(shape[-1]).to(z_dtype), 1e-6, act), {}

    return make


def head_by_head(H, HV, K, V):
    """Offset, stride and width of q, k, v, z, b, a that stand in a row head by head, with some columns of nothing before them."""
    offsets, strides, _ = mixer_decode.layout("qkvz,ba", H, HV, K, V)
    widths = (K, K, HV // H * V, HV // H * V, HV // H, HV // H)
    return [n for offset, *rest in zip(offsets, strides, widths, strict=True) for n in (offset + 3, *rest)]


def mixer(*sizes, wrap_state=lambda s: s, **options):
    def make():
        args, kwargs = mixer_decode.example_call(*sizes, **options)
        return (*args[:6], wrap_state(args[6]), *args[7:]), kwargs

    return make


def linear(n_out, n_in, dtype=F32, lead=(1, 1), wrap=lambda x: x, wrap_weight=lambda w: w, **extras):
    def make():
        (x, (weight, *rest)), options = fused_linear.example_call(n_out, n_in, dtype, lead, **extras)
        names = ("norm_weight", "norm_eps", "norm_offset", "gate", "swiglu", "residual", "gate_activation")
        more = [options.pop(name) for name in names]
        if "lora_A" in options:
            weight, rest = torch.cat([weight, *rest]), []
        return (wrap(x), [wrap_weight(weight), *rest], *more, *adapters(options)), options

    return make


def adapters(options):
    """The arguments of adapters by their place, taken out of a call's options, so that references have wide ones."""
    names = ("lora_A", "lora_B", "lora_parts", "lora_scaling")
    return (None, "", None, *(options.pop(name) for name in names)) if names[0] in options else ()


def split(n_out, n_in, parts, dtype, lead, wrap=lambda x: x, **extras):
    def make():
        (x, weights), options = fused_linear.example_call(n_out, n_in, dtype, lead, **extras)
        stored = {name: options[name] for name in ("scales", "format", "zeros") if name in options}
        return (wrap(x), weights, parts, *adapters(options)), stored

    return make


FORMATS = (FP8, *_) = ("fp8_block128", "fp8_channel", "int8_channel", "int4_group32", "int4_group128")
ZERO = "int4_group32_zero"  # differs from int4_group32 where zero points are read alone
NF4, FP4 = "nf4_block64", "fp4_block128"  # differ from int4 in what is made of four bits alone
# Columns, of whole groups.
WIDTHS = dict.fromkeys(FORMATS, 272) | {"int4_group32": 288, ZERO: 288, NF4: 320, "int4_group128": 384, FP4: 384}


def of(format, plain=0):
    """Options of a linear whose weight is quantised, the last of two being plain or not."""
    return {"format": format, "plain": plain, "parts": 1 + plain}


def fp8(M, N, format, dtype, lead, scale_dtype=F32):
    def make():
        (x, x_scale, data, scale, *_), _ = fp8_linear.example_call(M, N, format, dtype, lead)
        return (x, x_scale, data, scale.to(scale_dtype), format, dtype), {}

    return make


def routed(N, H, E, k, dtype=F32, normalize=True, wide_logits=False, wide_weights=False, norm=False, wrap=lambda x: x):
    """A call of route whose logits are eighths that every dtype has, in each row different where they matter."""

    def make():
        weight, rows = torch.randint(-1, 2, (E, H)) / 8, []
        scale = torch.randint(1, 3, (H,)).float() if norm else torch.ones(H)
        while len(rows) < N:
            x = torch.randint(0, 2, (H,)) * 2.0 - 1
            first = ((x * scale) @ weight.T).sort(descending=True).values[: k + 1]
            if (first.diff() < 0).all() and first.abs().max() < 32:
                rows.append(x)
        norms = ((scale - 1).to(dtype), 1e-6, 1.0) if norm else (None, 0.0, 0.0)
        return (wrap(torch.stack(rows).to(dtype)), wrap(weight.to(dtype)), k, normalize, wide_logits, wide_weights, *norms), {}

    return make


def chosen(N, H, E, k, width, dtype=F32, choose=lambda i: i, wrap=lambda x: x, wrap_weight=lambda w: w, **options):
    """A call of experts; `choose` makes other indices of the random ones."""

    def make():
        (x, indices, weights, gate_up, down), named = experts.example_call(N, H, E, k, width, dtype, **options)
        stored = {name: named.pop(name) for name in ("scales", "format") if name in named}
        *more, residual = named.values()
        more = (wrap_weight(t) if isinstance(t, torch.Tensor) and t.dim() == 2 and len(t) > 1 else t for t in more)
        residual = None if residual is None else wrap(residual)
        return (wrap(x), choose(indices), weights, wrap_weight(gate_up), wrap_weight(down), "silu", *more, residual), stored

    return make


def routed_experts(H, E, k, width, dtype=F32, norm=False, normalize=True, wide_logits=False, wrap_weight=lambda w: w, **options):
    def make():
        (x, router, *_, norm_weight, eps, offset), _ = routed(1, H, E, k, dtype, norm=norm)()
        (*_, gate_up, down, activation, _, _, _, a, b, c, d, residual), stored = chosen(
            1, H, E, k, width, dtype, wrap_weight=wrap_weight, **options
        )()
        norms = (norm_weight, eps, offset)
        return (x, router, k, normalize, gate_up, down, activation, wide_logits, False, *norms, a, b, c, d, residual), stored

    return make


def added(*sizes, **options):
    return lambda: add_rms_norm.example_call(*sizes, **options)


def in_proj(*sizes, wrap_state=lambda s: s, **options):
    def make():
        (x, weights, *args), kwargs = in_proj_conv.example_call(*sizes, **options)
        weights = [torch.cat(weights)] if "lora_A" in kwargs else weights
        return (x, weights, *args[:3], wrap_state(args[3]), *args[4:], *adapters(kwargs)), kwargs

    return make


def attention(*sizes, **options):
    return lambda: attention_decode.example_call(*sizes, **options)


def growing(*sizes, **options):
    return lambda: attention_growing.example_call(*sizes, **options)


def few_queries(*sizes, **options):
    return lambda: attention_few_queries.example_call(*sizes, **options)


def of_prompt(*sizes, shared=False, **options):
    """A call of prompt_attention; with `shared` the mask is the first sequence's for all."""

    def make():
        (*args, mask, scale), _ = prompt_attention.example_call(*sizes, **options)
        return (*args, mask[:1] if shared else mask, scale), {}

    return make


def v_major(s):
    """The same state with K innermost in memory."""
    return s.transpose(-1, -2).contiguous().transpose(-1, -2)


def gate_of_row(t):
    """[B, T, HV, V] whose batch and head axes do not merge, as in columns of a packed row."""
    return strided(t.flatten(-2), pad=5).unflatten(-1, t.shape[-2:])


CASES = [
    Case("causal_conv_update", "fp32", conv(2, 12, 4, 4)),
    Case("causal_conv_update", "bf16", conv(3, 300, 4, 4, BF16)),
    Case("causal_conv_update", "fp16-bias-none", conv(2, 40, 4, 4, F16, bias=True, act="none")),
    Case("causal_conv_update", "short-window", conv(1, 5, 3, 4, bias=True)),
    Case("causal_conv_update", "long-window", conv(2, 130, 7, 3)),
    Case("causal_conv_update", "one-column", conv(2, 6, 1, 2)),
    Case("causal_conv_update", "row-slice", conv(3, 200, 4, 4, BF16, F32, bias=True, wrap=row_slice)),
    Case("causal_conv_update", "strided-state", conv(2, 50, 4, 4, wrap_state=lambda s: strided(s, 2))),
    Case("causal_conv_update", "channel-last-state", conv(2, 50, 4, 4, wrap_state=v_major)),
    Case("causal_conv", "fp32", prompt_conv(2, 12, 37, 4)),
    Case("causal_conv", "bf16-rows", prompt_conv(2, 300, 19, 4, BF16, wrap=row_slice)),
    Case("causal_conv", "context", prompt_conv(2, 40, 33, 4, F16, S=4, bias=True, act="none")),
    Case("causal_conv", "shorter-than-the-window", prompt_conv(1, 5, 2, 4, bias=True)),
    Case("causal_conv", "sequences", prompt_conv(1, 40, 37, 4, S=4, bounds=torch.tensor([0, 1, 3, 20, 21, 37]))),
    Case("causal_conv", "sequences-at-end", prompt_conv(2, 40, 9, 4, BF16, bounds=torch.tensor([0, 2, 5], dtype=torch.int32))),
    Case("causal_conv", "wider-context", prompt_conv(1, 24, 5, 4, BF16, S=4, context_dtype=F32)),
    Case("causal_conv", "short-context", prompt_conv(3, 5, 1, 4, S=2)),
    Case("causal_conv", "long-context", prompt_conv(1, 5, 3, 4, S=9)),
    Case("causal_conv_record", "fp32", recording_conv(2, 70, 5, 4, 3)),
    Case("causal_conv_record", "bf16-more", recording_conv(2, 130, 8, 4, 66, BF16, more=3, wrap=lambda x: strided(x, pad=9))),
    Case("causal_conv_record", "fp16-bias-none", recording_conv(1, 40, 2, 2, 6, F16, bias=True, act="none", wrap=every_second)),
    Case("causal_conv_record", "wider-records", recording_conv(1, 24, 3, 4, 70, BF16, F32)),
    *(Case("chunk_delta_rule", f"{name(d)}-{T}", chunked(2, T, 1, 2, 16, 16, d)) for d in (F32, BF16, F16) for T in (1, 63, 130)),
    Case("chunk_delta_rule", "no-state", chunked(1, 65, 2, 2, 16, 24, state=False)),
    Case("chunk_delta_rule", "no-l2norm", chunked(1, 70, 2, 4, 24, 16, BF16, eps=None)),
    Case("chunk_delta_rule", "checkpoints", chunked(2, 200, 1, 2, 16, 16, every=1)),
    Case("chunk_delta_rule", "every-second", chunked(1, 260, 1, 1, 16, 16, BF16, every=2)),
    Case("chunk_delta_rule", "sequences", chunked(1, 150, 1, 3, 16, 16, lengths=(1, 70, 64, 15))),
    Case("chunk_delta_rule", "sequences-bf16", chunked(1, 150, 2, 2, 16, 16, BF16, lengths=(149, 1))),
    Case("chunk_delta_rule", "strided", chunked(2, 70, 1, 2, 16, 16, BF16, wrap=lambda x: strided(x, 2))),
    Case("chunk_delta_rule", "rows", chunked(2, 70, 1, 2, 16, 16, wrap=padded)),
    Case("chunk_delta_rule", "hard-gates", chunked(1, 130, 1, 4, 16, 16, hard=30.0)),
    Case("chunk_delta_rule", "odd-head-dims", chunked(1, 66, 1, 3, 24, 40, BF16)),
    Case("fused_gating_chunk_delta_rule", "fp32", chunked(2, 70, 1, 2, 16, 16, gated=True)),
    Case("fused_gating_chunk_delta_rule", "bf16", chunked(1, 130, 2, 4, 16, 16, BF16, gated=True)),
    *(Case("fused_gating_chunk_delta_rule", f"soft-beta-to-2-{name(d)}-{K}", beta_to_2(K, d)) for d, K in BETAS),
    *(Case("fused_gating_chunk_delta_rule", f"hard-beta-to-2-{name(d)}-{K}", beta_to_2(K, d, hard=30.0)) for d, K in BETAS),
    *(Case("fused_gating_chunk_delta_rule", f"like-keys-{name(d)}-{K}", beta_to_2(K, d, hard=3.0, alike=True)) for d, K in BETAS),
    Case("chunk_delta_rule", "beta-to-2", chunked(1, 130, 1, 2, 16, 16, BF16, beta_scale=2.0)),
    Case("fused_gating_chunk_delta_rule", "hard-gates", chunked(1, 70, 1, 4, 16, 16, gated=True, hard=30.0)),
    *(Case("delta_rule_verify", f"{name(d)}-T{T}", rule(2, T, 2, 4, 16, 16, d)) for d in (F32, BF16, F16) for T in (2, 5, 8)),
    Case("delta_rule_verify", "odd-head-dims", rule(3, 3, 1, 3, 24, 40)),
    Case("delta_rule_verify", "no-l2norm", rule(1, 3, 2, 2, 40, 24, BF16, eps=None)),
    Case("delta_rule_verify", "bf16-state", rule(2, 2, 2, 6, 24, 24, BF16, BF16)),
    Case("delta_rule_verify", "extreme-gates", rule(2, 3, 1, 8, 16, 16, gate_scale=40.0)),
    Case("delta_rule_verify", "beta-to-2", rule(2, 5, 1, 8, 16, 16, gate_scale=4.0, beta_scale=2.0)),
    Case("delta_rule_verify", "strided", rule(2, 3, 2, 4, 16, 24, BF16, wrap=lambda x: strided(x, 2), wrap_state=strided)),
    *(Case("delta_rule_slots", name(d), slotted(5, 2, 4, 16, 16, FIVE, [4, 0, 1], d)) for d in (F32, BF16, F16)),
    Case("delta_rule_slots", "bf16-states", slotted(2, 2, 6, 24, 24, [[3, 1], [0, -1]], [2, 1], BF16, BF16)),
    Case("delta_rule_slots", "one-token", slotted(1, 1, 3, 24, 40, [[2], [-1]], [1, 1], beta_scale=2.0, index=torch.int64)),
    Case("delta_rule_slots", "many-tokens", slotted(9, 1, 2, 16, 24, [[*range(9)], [*range(9, 17), -1]], [9, 3], eps=None)),
    Case("delta_rule_slots", "strided", slotted(3, 2, 4, 16, 24, [[5, 0, 2]], [3], BF16, wrap=every_second, wrap_state=strided)),
    *(Case("delta_rule_commit", f"{name(d)}", commit(2, 3, 5, 4, 2, 4, 16, 16, [0, 2, 5], d)) for d in (F32, BF16, F16)),
    Case("delta_rule_commit", "odd-head-dims", commit(3, 1, 3, 3, 1, 3, 24, 40, [2])),
    Case("delta_rule_commit", "bf16-state", commit(1, 2, 2, 4, 2, 6, 24, 24, [2, 1], BF16, BF16)),
    Case("delta_rule_commit", "beta-to-2", commit(1, 2, 8, 4, 1, 8, 16, 16, [8, 0], beta_scale=2.0)),
    Case("delta_rule_commit", "many-tokens", commit(1, 2, 11, 4, 1, 2, 16, 16, [10, 3])),
    Case("delta_rule_commit", "strided", commit(2, 2, 3, 4, 2, 4, 16, 24, [3, 1], BF16, wrap=every_second, wrap_state=strided)),
    *(Case("fused_gating_delta_rule", f"{name(d)}-T{T}", rule(2, T, 2, 4, 16, 16, d)) for d in (F32, BF16, F16) for T in (1, 3)),
    Case("fused_gating_delta_rule", "many-tokens", rule(1, 9, 1, 2, 16, 16)),
    Case("fused_gating_delta_rule", "odd-head-dims", rule(3, 2, 1, 3, 24, 40)),
    Case("fused_gating_delta_rule", "no-l2norm", rule(1, 3, 2, 2, 40, 24, BF16, eps=None)),
    Case("fused_gating_delta_rule", "bf16-state", rule(2, 2, 2, 6, 24, 24, BF16, BF16)),
    Case("fused_gating_delta_rule", "fp16-state", rule(1, 1, 1, 2, 16, 64, F16, F16)),
    Case("fused_gating_delta_rule", "extreme-gates", rule(2, 3, 1, 8, 16, 16, gate_scale=40.0)),
    Case("fused_gating_delta_rule", "beta-to-2", rule(2, 3, 1, 8, 16, 16, gate_scale=4.0, beta_scale=2.0)),
    Case("fused_gating_delta_rule", "many-heads", rule(2, 2, 11, 33, 16, 40)),
    Case("fused_gating_delta_rule", "strided", rule(2, 3, 2, 4, 16, 24, BF16, wrap=lambda x: strided(x, 2))),
    Case("fused_gating_delta_rule", "strided-state", rule(2, 2, 2, 4, 24, 16, wrap_state=strided)),
    Case("fused_gating_delta_rule", "v-major-state", rule(2, 2, 2, 4, 24, 40, wrap_state=v_major)),
    Case("fused_gating_delta_rule", "large-heads", rule(1, 1, 1, 1, 256, 256)),
    Case("packed_decode", "fp32", packed(2, 2, 4, 8, 16)),
    Case("packed_decode", "bf16-odd-head-dims", packed(3, 1, 3, 24, 40, BF16)),
    Case("packed_decode", "fp16-state", packed(1, 2, 2, 40, 24, F16, F16)),
    Case("packed_decode", "row-slice", packed(2, 2, 4, 16, 16, BF16, wrap=lambda x: strided(x, 2))),
    Case("gated_rms_norm", "fp32", norm((6, 8), F32, F32)),
    Case("gated_rms_norm", "bf16-gate", norm((2, 1, 4, 16), F32, BF16)),
    Case("gated_rms_norm", "sigmoid", norm((3, 5, 24), F32, BF16, act="sigmoid")),
    Case("gated_rms_norm", "bf16-odd", norm((3, 2, 5, 24), BF16, BF16)),
    Case("gated_rms_norm", "fp16-vector", norm((40,), F16, F16)),
    Case("gated_rms_norm", "strided", norm((3, 7, 40), F32, F16, wrap=lambda x: strided(x, 2))),
    Case("gated_rms_norm", "row-slice", norm((3, 1, 4, 24), F32, BF16, wrap=gate_of_row)),
    Case("mixer_decode", "fp32", mixer(2, 2, 4, 8, 16)),
    Case("mixer_decode", "parts-reordered", mixer(1, 1, 3, 16, 8, bias=True, order="azqkvb")),
    Case("mixer_decode", "head-by-head", mixer(2, 2, 4, 24, 16, order="qkvz,ba")),
    Case("mixer_decode", "head-by-head-bf16", mixer(3, 3, 3, 16, 40, dtype=BF16, order="bvqa,zk", bias=True)),
    Case("mixer_decode", "published-96-192", mixer(2, 3, 3, 96, 192, dtype=BF16, order="qkvbaz", beta_scale=2.0)),
    Case("mixer_decode", "sigmoid", mixer(2, 2, 4, 16, 24, gate_activation="sigmoid")),
    Case("mixer_decode", "bf16", mixer(3, 2, 4, 24, 40, dtype=BF16, order="baqkvz")),
    Case("mixer_decode", "fp16", mixer(2, 2, 2, 40, 24, dtype=F16, bias=True)),
    Case("mixer_decode", "bf16-state", mixer(2, 1, 2, 16, 16, dtype=BF16, state_dtype=BF16)),
    Case("mixer_decode", "strided-state", mixer(2, 1, 2, 24, 16, dtype=BF16, wrap_state=strided)),
    Case("mixer_decode", "tiles", mixer(1, 1, 2, 160, 72, dtype=BF16)),
    Case("mixer_decode", "tiles-ahead", mixer(2, 13, 78, 16, 168, dtype=BF16)),
    Case("mixer_decode", "many-heads", mixer(3, 58, 174, 16, 24, dtype=BF16)),
    *(Case("fused_linear", f"{n_out}x{n_in}", linear(n_out, n_in)) for n_out in (1, 7, 33) for n_in in (24, 100, 4096)),
    *(Case("fused_linear", f"{name(d)}-{n_in}", linear(33, n_in, d)) for d in (BF16, F16) for n_in in (1, 100, 2560)),
    Case("fused_linear", "vector", linear(7, 100, BF16, lead=())),
    Case("fused_linear", "many-axes", linear(7, 100, BF16, lead=(1, 1, 1))),
    Case("fused_linear", "row-slice", linear(7, 100, BF16, wrap=strided)),
    Case("fused_linear", "strided-weight", linear(7, 2560, BF16, wrap_weight=strided)),
    Case("fused_linear", "aligned-strided", linear(8, 48, wrap=padded, wrap_weight=padded)),
    Case("fused_linear", "large", linear(77, 28000, F16)),
    *(Case("fused_linear", f"norm-{name(d)}", linear(33, 100, d, norm=True)) for d in (F32, BF16, F16)),
    Case("fused_linear", "swiglu", linear(33, 600, BF16, swiglu=True)),
    Case("fused_linear", "norm-swiglu-residual", linear(33, 600, BF16, norm=True, swiglu=True, residual=True)),
    Case("fused_linear", "residual", linear(33, 1100, residual=True)),
    *(Case("fused_linear", f"gated-{name(d)}", linear(17, 512, d, head=16, residual=True)) for d in (F32, BF16)),
    Case("fused_linear", "gated-by-sigmoid", linear(17, 512, BF16, head=16, gate_activation="sigmoid")),
    Case("fused_linear", "gated-heads-of-128", linear(17, 3072, BF16, head=128)),
    Case("fused_linear", "lora", linear(33, 100, BF16, lora=(16,))),
    Case("fused_linear", "lora-norm-swiglu", linear(33, 600, BF16, norm=True, swiglu=True, residual=True, parts=2, lora=(3, 8))),
    Case("fused_linear", "lora-F32-gated", linear(17, 512, BF16, head=16, residual=True, lora=(4,), lora_dtype=F32)),
    *(Case("fused_linear", f"{b}-rows-{name(d)}", linear(70, 512, d, (b, 1))) for b in (2, 3, 32) for d in (F32, BF16, F16)),
    Case("fused_linear", "9-rows-swiglu", linear(70, 256, BF16, (3, 3), swiglu=True)),
    Case("fused_linear", "2-rows-swiglu", linear(33, 512, swiglu=True, lead=(2, 1), wrap=padded, wrap_weight=padded)),
    # One adapter whose B fills no product, two of different ranks on each of three projections, and beside a wider B.
    Case("fused_linear", "lora-3-rows", linear(70, 256, BF16, (3, 1), lora=(8,), lora_dtype=F32)),
    Case("fused_linear", "lora-F32-5-rows", linear(70, 256, F32, (5, 1), parts=3, lora=(40, 3, 3))),
    Case("fused_linear", "lora-F16-32-rows", linear(97, 512, F16, (32, 1), wrap=padded, lora=(16, 4))),
    Case("fused_linear", "lora-2-rows-swiglu", linear(33, 512, BF16, (2, 1), swiglu=True, parts=2, lora=(16, 4), lora_dtype=F32)),
    Case("split_linear", "lora-9-rows", split(70, 1536, 3, BF16, (3, 3), lora=(8, 20), lora_dtype=F32)),
    *(Case("split_linear", f"{b}-rows-{n}", split(40, 1536, n, BF16, (b, 1))) for b in (2, 17) for n in (2, 3)),
    *(Case("add_rms_norm", f"{name(d)}-{p}", added(300, d, (3, 1), parts=p)) for d in (F32, BF16, F16) for p in (1, 8)),
    Case("add_rms_norm", "one-row", added(16, BF16, (1,), parts=2)),
    Case("split_linear", "fp32", split(70, 768, 6, F32, (5, 1), wrap=padded)),
    Case("attention_decode", "fp32", attention(2, 4, 2, 16, 70, R=8, filled=33, padded=3)),
    Case("attention_decode", "bf16", attention(1, 8, 2, 32, 200, BF16, filled=200)),
    Case("attention_decode", "fp16-no-gate", attention(3, 3, 3, 24, 40, F16, R=24, gate=False, filled=9, padded=2)),
    Case("attention_decode", "no-norm-no-mask", attention(1, 6, 2, 20, 65, R=6, norm=False, mask=False)),
    Case("attention_decode", "first-token", attention(2, 2, 1, 16, 1100, filled=1)),
    Case("attention_decode", "five-queries", attention(2, 5, 1, 16, 40, BF16, R=8, filled=38, padded=1)),
    Case("attention_decode", "nine-queries", attention(1, 18, 2, 24, 30, R=6, filled=17)),
    Case("attention_decode", "far-blocks", attention(1, 4, 1, 16, 3000, filled=2990, padded=2800)),
    Case("attention_decode", "T5", attention(2, 4, 2, 16, 70, T=5, R=8, filled=33, padded=3)),
    Case("attention_decode", "T8-bf16-strided", attention(1, 8, 2, 32, 100, BF16, T=8, filled=100, wrap=every_second)),
    Case("attention_decode", "T3-fp16-no-gate", attention(3, 3, 3, 24, 40, F16, T=3, R=24, gate=False, filled=9, padded=2)),
    Case("attention_decode", "T2-no-norm-no-mask", attention(1, 6, 2, 20, 65, T=2, R=6, norm=False, mask=False)),
    *(Case("attention_growing", f"{name(d)}-{L}", growing(2, 4, 2, 16, L, d, R=8)) for d in (F32, BF16, F16) for L in (1, 4, 33)),
    *(Case("attention_growing", f"no-mask-{L}", growing(1, 6, 2, 20, L, BF16, mask=False, R=6)) for L in (0, 15, 16, 17, 230)),
    Case("attention_growing", "no-gate-no-norm", growing(3, 3, 3, 24, 40, F16, gate=False, norm=False, hidden=3)),
    Case("attention_growing", "nothing-shown", growing(2, 4, 2, 16, 40, hidden=41)),
    Case("attention_growing", "only-the-new-token-shown", growing(2, 4, 2, 16, 40, hidden=40)),
    Case("attention_growing", "seven-queries", growing(2, 14, 2, 16, 30, F16, R=8, hidden=4)),
    Case("attention_growing", "one-split", growing(2, 20, 4, 24, 37, BF16, R=6)),
    Case("attention_growing", "one-mask", growing(3, 2, 2, 16, 70, shared=True, hidden=3)),
    Case("attention_growing", "far-blocks", growing(1, 4, 1, 16, 400, R=8, hidden=360)),
    Case("attention_growing", "strided", growing(2, 4, 2, 24, 70, BF16, wrap=lambda x: strided(x, 2))),
    Case("attention_growing", "tokens-first", growing(2, 4, 2, 16, 70, wrap=lambda x: x.mT.contiguous().mT)),
    *(Case("attention_few_queries", f"float32-{L}", few_queries(2, 4, 2, 16, L)) for L in (1, 270)),
    Case("attention_few_queries", "float16-1", few_queries(2, 4, 2, 16, 1, F16)),
    Case("attention_few_queries", "bfloat16-270", few_queries(2, 4, 2, 16, 270, BF16)),
    *(Case("attention_few_queries", f"no-mask-{L}", few_queries(1, 6, 2, 20, L, BF16, mask=False)) for L in (1, 17, 600)),
    Case("attention_few_queries", "no-gate", few_queries(3, 3, 3, 24, 40, F16, gate=False)),
    Case("attention_few_queries", "padded", few_queries(1, 4, 1, 16, 400, hidden=350)),
    Case("attention_few_queries", "nothing-shown", few_queries(2, 4, 2, 16, 40, hidden=40)),
    Case("attention_few_queries", "seven-queries", few_queries(2, 14, 2, 16, 30, F16, hidden=4)),
    Case("attention_few_queries", "one-mask", few_queries(3, 2, 2, 16, 70, shared=True, hidden=3)),
    Case("attention_few_queries", "strided", few_queries(2, 4, 2, 24, 70, BF16, wrap=lambda x: strided(x, 2))),
    Case("attention_few_queries", "tokens-first", few_queries(2, 4, 2, 16, 70, wrap=lambda x: x.mT.contiguous().mT)),
    *(Case("attention_few_queries", f"{name(d)}-T{T}", few_queries(2, 4, 2, 16, 70, d, T=T)) for d, T in ((F32, 2), (BF16, 8))),
    Case("attention_few_queries", "T64", few_queries(1, 6, 2, 16, 100, F16, T=64, hidden=5)),
    Case("attention_few_queries", "T3-one-split", few_queries(40, 10, 10, 8, 37, F16, T=3)),
    Case("attention_few_queries", "T5-no-mask-no-gate", few_queries(1, 6, 2, 20, 65, T=5, mask=False, gate=False)),
    Case("attention_few_queries", "T8-two-tiles", few_queries(1, 5, 1, 8, 40, T=8)),
    Case("attention_few_queries", "T4-strided", few_queries(3, 2, 2, 24, 70, BF16, T=4, shared=True, wrap=every_second)),
    Case("attention_few_queries", "T2-nothing-shown", few_queries(2, 2, 1, 16, 300, T=2, hidden=300)),
    Case("prompt_attention", "on-a-cache", of_prompt(2, 4, 2, 37, 70, 16, start=5)),
    Case("prompt_attention", "first-of-a-cache", of_prompt(1, 6, 2, 20, 100, 20, BF16)),
    Case("prompt_attention", "padded", of_prompt(3, 2, 1, 40, 40, 16, BF16, padded=[0, 9, 40])),
    Case("prompt_attention", "padded-on-a-cache", of_prompt(2, 2, 2, 9, 80, 8, F16, start=60, padded=[3, 50])),
    Case("prompt_attention", "holes", of_prompt(2, 2, 1, 33, 45, 24, F16, start=12, padded=[3, 20], holes=True, wrap=padded)),
    Case("prompt_attention", "mostly-padding", of_prompt(1, 2, 1, 3, 1100, 16, start=1090, padded=[1070])),
    Case("prompt_attention", "one-mask", of_prompt(2, 2, 2, 20, 30, 16, start=4, padded=[5, 0], shared=True, wrap=every_second)),
    Case("attention_few_queries", "masks-in-turns", few_queries(1, 2, 1, 16, 2**15 + 1000, hidden=2**15 + 900)),
    *(Case("fused_linear", f"{f}-F32", linear(200, WIDTHS[f], F32, norm=True, **of(f))) for f in (*FORMATS, ZERO, NF4, FP4)),
    *(Case("fused_linear", f"{f}-BF16", linear(200, WIDTHS[f], BF16, norm=True, **of(f))) for f in FORMATS),
    *(
        Case("fused_linear", f"{f}-swiglu", linear(136, 512, BF16, norm=True, swiglu=True, **of(f)))
        for f in (*FORMATS, ZERO, NF4)
    ),
    *(Case("fused_linear", f"{f}-gated", linear(17, 512, BF16, head=16, residual=True, **of(f))) for f in FORMATS),
    *(Case("fused_linear", f"{f}-and-plain", linear(416, WIDTHS[f], BF16, norm=True, **of(f, plain=1))) for f in FORMATS),
    *(Case("fused_linear", f"{f}-3-rows", linear(200, 256, BF16, (3, 1), **of(f))) for f in FORMATS),
    *(Case("fused_linear", f"{f}-9-rows", linear(136, 256, dtype, (9, 1), **of(f))) for f, dtype in ((NF4, F16), (FP4, BF16))),
    *(
        Case("fused_linear", f"{f}-9-rows-swiglu", linear(136, 256, BF16, (9, 1), swiglu=True, **of(f)))
        for f in (*FORMATS, ZERO, NF4)
    ),
    *(Case("fused_linear", f"{f}-2-rows-and-plain", linear(416, 256, BF16, (2, 1), **of(f, plain=1))) for f in FORMATS),
    *(Case("split_linear", f"{f}-4-rows", split(140, 512, 2, BF16, (4, 1), format=f)) for f in (*FORMATS, ZERO, NF4)),
    Case("fused_linear", "int4-no-pairs", linear(40, 64, BF16, (3, 1), wrap=lambda x: strided(x, pad=1), **of("int4_group32"))),
    Case("fused_linear", "int4-F32-rows", linear(40, 96, F32, (3, 1), wrap=padded, **of("int4_group32"))),
    *(Case("in_proj_conv", f, in_proj(416, WIDTHS[f], 128, BF16, weights=2, format=f, plain=1)) for f in (*FORMATS, ZERO, NF4)),
    Case("in_proj_conv", "fp32", in_proj(70, 100, 40, offset=9)),
    Case("in_proj_conv", "bf16-all", in_proj(64, 128, 64, BF16, bias=True)),
    Case("in_proj_conv", "no-norm-windows", in_proj(33, 24, 20, norm=False, S=5, W=3, offset=13)),
    Case("in_proj_conv", "short-window", in_proj(33, 24, 20, F16, S=3, W=4, state_dtype=F32)),
    Case("in_proj_conv", "head-by-head", in_proj(97, 24, 52, parts=head_by_head(2, 4, 5, 8), heads=2)),
    Case("in_proj_conv", "head-by-head-bf16", in_proj(200, 100, 88, BF16, parts=head_by_head(4, 4, 8, 6), heads=4, bias=True)),
    Case("in_proj_conv", "lora", in_proj(97, 24, 52, BF16, parts=head_by_head(2, 4, 5, 8), heads=2, weights=3, lora=(5, 2, 5))),
    Case("in_proj_conv", "strided-state", in_proj(33, 24, 20, wrap_state=v_major)),
    *(Case("route", f"{name(d)}-{n}", routed(n, 64, 12, 3, d, normalize=n == 1)) for d in (F32, BF16, F16) for n in (1, 3)),
    Case("route", "norm", routed(1, 100, 7, 7, BF16, norm=True)),
    Case("route", "wide", routed(5, 512, 33, 4, BF16, wide_logits=True, wide_weights=True)),
    Case("route", "wide-strided", routed(2, 64, 5, 2, F16, wide_logits=True, wrap=padded)),
    Case("experts", "one-row", chosen(1, 24, 6, 3, 8)),
    Case("experts", "one-row-all", chosen(1, 50, 6, 3, 10, BF16, shared=18, gated=True, norm=True, residual=True, masked=True)),
    Case("experts", "one-row-strided", chosen(1, 40, 3, 2, 33, F16, shared=70, wrap=strided, wrap_weight=strided)),
    *(Case("experts", f"{name(d)}-5", chosen(5, 32, 16, 3, 16, d, shared=48, gated=True, masked=True)) for d in (F32, BF16, F16)),
    Case("experts", "more-choices-than-experts", chosen(9, 32, 4, 3, 32, residual=True, masked=True)),
    Case("experts", "few-choices-of-many", chosen(2, 64, 40, 2, 96, BF16, shared=32, wrap=padded, wrap_weight=padded)),
    Case("experts", "one-expert-of-all", chosen(20, 32, 3, 2, 16, choose=lambda i: torch.tensor([[1, 2]]).repeat(20, 1))),
    Case("experts", "one-expert-twice", chosen(3, 32, 12, 2, 16, choose=lambda i: i * 0 + 5, residual=True)),
    Case("experts", "one-row-twice", chosen(1, 32, 12, 3, 16, choose=lambda i: i * 0 + 5)),
    Case("experts", "none", chosen(3, 32, 12, 2, 16, choose=lambda i: i * 0 + 12, shared=16, gated=True)),
    Case("experts", "one-row-none", chosen(1, 32, 12, 2, 16, choose=lambda i: i * 0 + 12, residual=True)),
    Case("experts", "prompt", chosen(65, 32, 4, 2, 48, shared=32, gated=True, residual=True, masked=True)),
    Case("experts", "prompt-of-few-choices", chosen(66, 48, 20, 3, 16, BF16, wrap=padded, wrap_weight=padded)),
    Case("experts", "prompt-one-expert-of-all", chosen(70, 16, 3, 2, 16, F16, lambda i: torch.tensor([[1, 2]]).repeat(70, 1))),
    Case("experts", "prompt-none", chosen(65, 16, 3, 1, 16, choose=lambda i: i * 0 + 3, shared=16)),
    Case("fp8_linear", "blocks", fp8(160, 384, "fp8_block128", BF16, (1, 150))),
    Case("fp8_linear", "blocks-ragged-rows", fp8(135, 128, "fp8_block128", F16, (2, 33), BF16)),
    Case("fp8_linear", "rows", fp8(144, 256, "fp8_channel", BF16, (1, 34), BF16)),
    Case("fp8_linear", "one-scale", fp8(48, 256, "fp8_tensor", F32, (35,))),
    Case("route", "prompt", routed(65, 64, 12, 3, BF16)),
    Case("route", "prompt-wide", routed(65, 64, 12, 3, BF16, wide_logits=True, wide_weights=True)),
    Case("experts", "64-rows", chosen(64, 16, 9, 3, 16, masked=True, shared=16, residual=True)),
    Case("experts", "fp8-one-row", chosen(1, 144, 4, 3, 48, BF16, shared=32, gated=True, norm=True, masked=True, format=FP8)),
    Case("experts", "fp8-5-rows", chosen(5, 144, 6, 2, 144, BF16, shared=32, gated=True, masked=True, residual=True, format=FP8)),
    Case("experts", "fp8-12-rows", chosen(12, 64, 3, 2, 80, F32, format=FP8)),
    Case("experts", "fp8-prompt", chosen(70, 144, 4, 2, 144, BF16, shared=16, gated=True, masked=True, format=FP8)),
    Case("routed_experts", "fp32", routed_experts(64, 12, 3, 8)),
    Case("routed_experts", "bf16", routed_experts(100, 12, 5, 6, BF16, shared=10, gated=True, norm=True, residual=True)),
    Case("routed_experts", "fp16", routed_experts(64, 7, 7, 9, F16, shared=6, normalize=False, wrap_weight=padded)),
    Case("routed_experts", "wide", routed_experts(64, 12, 1, 24, BF16, wide_logits=True, normalize=False)),
    Case("routed_experts", "fp8", routed_experts(272, 6, 3, 144, BF16, shared=16, gated=True, norm=True, format=FP8)),
]  # fmt: skip


def meaning(op):
    """Reference, overload, mutates and arg_names of what a kernel implements."""
    return dialect.OPS[op]


def whole(t):
    """All of a tensor's storage."""
    return t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


def rebuilt(value, device, dtype=None):
    """A copy with the same strides and the same values around it, on another device or in another dtype."""
    if isinstance(value, list):
        return [rebuilt(v, device, dtype) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    dtype = dtype if dtype and value.is_floating_point() else value.dtype
    return whole(value).to(device, dtype, copy=True).as_strided(value.shape, value.stride(), value.storage_offset())


def wide(value):
    if isinstance(value, list):
        return next(filter(None, map(wide, value)), None)
    return torch.float64 if isinstance(value, torch.Tensor) and value.is_floating_point() else None


@contextmanager
def poisoned_empty():
    """Allocations give NaN, or the least integer, so that an element nobody wrote shows."""
    filled = lambda make: lambda *a, **k: poison(make(*a, **k))  # noqa: E731
    with mock.patch.multiple(torch, empty=filled(torch.empty), empty_strided=filled(torch.empty_strided)):
        yield


def poison(t):
    return t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).min)


def relative_error(got, want):
    """Largest difference over the largest value wanted; NaNs (of poisoned padding) must be in the same places."""
    got, want = got.detach().double().cpu(), want.double()
    wrong = (got.isnan() ^ want.isnan()).sum()
    assert wrong == 0, f"{wrong} of {got.numel()} elements are NaN and should not be, or the reverse"
    return ((got - want).nan_to_num().abs().max() / want.nan_to_num().abs().max()).item()


def tensors(results):
    """Each result of an op, of which there may be none."""
    return results if isinstance(results, tuple) else () if results is None else (results,)


def bound_of(case, args, got, tolerance):
    """The error allowed to a result: that of its dtype, or where products of tensor cores follow each other of their operands."""
    if not got.is_floating_point():
        return 0.0
    if case.op == "add_rms_norm":
        return 2 * tolerance[got.dtype]  # x is rounded, and then the sum with it
    if case.op == "fp8_linear":
        return tolerance[got.dtype] + 2.0**-11  # tensor cores keep 14 bits of a sum of products of e4m3
    if "experts" in case.op:
        return 2 * tolerance[got.dtype]  # what goes into down is rounded too
    if case.op == "split_linear" and case.label.startswith(NF4):
        return tolerance[args[0].dtype] / 2  # entries of its table are rounded to x's dtype, as eager's weights are
    if case.op == "split_linear":
        return 2 * tolerance[got.dtype]  # tensor cores cut the last bits of a sum off where float32 would round them
    if "chunk" not in case.op and "attention" not in case.op:
        return tolerance[got.dtype]
    return CHUNKED[args[2].dtype]


def layout(t):
    """Sizes, with strides where there is more than one element to step over."""
    return [(n, s if n > 1 else None) for n, s in zip(t.shape, t.stride(), strict=True)]


def check(case, function, device="cpu", tolerance=TOLERANCE, poison=poisoned_empty, slack=1):
    """Compare `function`'s outputs and what it writes, its arguments' surroundings included, with the reference in float64."""
    op = meaning(case.op)
    args, kwargs = case.call()
    exact = [rebuilt(v, "cpu", wide(v)) for v in args]
    expected = op.reference(*exact, **kwargs)
    ours = [rebuilt(v, device) for v in args]
    before = {n: whole(v).clone() for n, v in zip(op.arg_names, ours, strict=False) if isinstance(v, torch.Tensor)}
    with poison():
        got = function(*ours, **{n: rebuilt(v, device) for n, v in kwargs.items()})

    meta = lambda v: pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), v)  # noqa: E731
    fakes = op.overload(*map(meta, args), **{n: meta(v) for n, v in kwargs.items()})
    for i, (mine, fake, want) in enumerate(zip(tensors(got), tensors(fakes), tensors(expected), strict=True)):
        assert (mine.dtype, layout(mine)) == (fake.dtype, layout(fake))
        error = relative_error(mine, want) if mine.numel() else 0.0
        assert error <= slack * bound_of(case, args, mine, tolerance), f"output {i} is off by {error:.2e}"
    for n, mine, reference in zip(op.arg_names, ours, exact, strict=False):
        if n in op.mutates:
            error = relative_error(whole(mine), whole(reference))
            assert error <= tolerance[mine.dtype], f"{n} is off by {error:.2e}"
        elif isinstance(mine, torch.Tensor):
            assert torch.equal(whole(mine).view(torch.uint8), before[n].view(torch.uint8)), f"{n} was written"
