"""Random calls of dialect ops: grouped heads, head dims that are no powers of two, many sequences, memory of every layout."""

from __future__ import annotations

from functools import partial

import kernel_cases as cases
import torch
from hypothesis import strategies as st

GROUPS = (1, 2, 3, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plain(x: torch.Tensor) -> torch.Tensor:
    return x


def expanded(x: torch.Tensor) -> torch.Tensor:
    """Every sequence is the first, in the same memory."""
    return x[:1].expand(x.shape)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The last two axes exchanged in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x


def inner(x: torch.Tensor) -> torch.Tensor:
    """Inside a tensor of NaN that is larger on every side."""
    whole = torch.full([n + 2 for n in x.shape], float("nan"), dtype=x.dtype)
    view = whole[tuple(slice(1, n + 1) for n in x.shape)]
    return view.copy_(x)


def stepped(x: torch.Tensor) -> torch.Tensor:
    return cases.strided(x, 2)


READ = (plain, expanded, transposed, inner, stepped)
WRITTEN = (plain, transposed, inner, stepped)


def _rule(B, T, H, HV, K, V, dtype, state_dtype, wrap, wrap_state):
    return cases.rule(B, T, H, HV, K, V, dtype, state_dtype, wrap=wrap, wrap_state=wrap_state)


def _packed(B, T, H, HV, K, V, dtype, state_dtype, wrap, wrap_state):
    make = cases.packed(B, H, HV, K, V, dtype, state_dtype, wrap)

    def wrapped():
        (*args, state), options = make()
        return (*args, wrap_state(state)), options

    return wrapped


def _mixer(B, T, H, HV, K, V, dtype, state_dtype, wrap, wrap_state):
    make = cases.mixer(B, H, HV, K, V, dtype=dtype, state_dtype=state_dtype, wrap_state=wrap_state)

    def wrapped():
        (row, conv_state, *args), options = make()
        return (wrap(row), wrap_state(conv_state), *args), options

    return wrapped


def _chunked(gated, B, T, H, HV, K, V, dtype, state_dtype, wrap, wrap_state):
    return cases.chunked(B, T, H, HV, K, V, dtype, gated=gated, wrap=wrap)


def _norm(B, T, H, HV, K, V, dtype, state_dtype, wrap, wrap_state):
    return cases.norm((B, T, HV, V), state_dtype, dtype, wrap)


def _conv_update(B, T, H, HV, K, V, dtype, state_dtype, wrap, wrap_state):
    return cases.conv(B, 2 * H * K + HV * V, 4, 4, dtype, state_dtype, wrap=wrap, wrap_state=wrap_state)


def _conv(B, T, H, HV, K, V, dtype, state_dtype, wrap, wrap_state):
    return cases.prompt_conv(B, 2 * H * K + HV * V, T, 4, dtype, S=4 * (H % 2), wrap=wrap)


def _few_queries(B, T, H, HV, K, V, dtype, state_dtype, wrap, wrap_state):
    return cases.few_queries(B, HV, H, K, 9 * T + 1, dtype, mask=V % 2 == 0, wrap=wrap)


def _growing(B, T, H, HV, K, V, dtype, state_dtype, wrap, wrap_state):
    return cases.growing(B, HV, H, K, 9 * T, dtype, R=K // 2 // 2 * 2, mask=V % 2 == 0, wrap=wrap)


MAKE = {
    "attention_growing": _growing,
    "attention_few_queries": _few_queries,
    "fused_gating_delta_rule": _rule,
    "packed_decode": _packed,
    "mixer_decode": _mixer,
    "chunk_delta_rule": partial(_chunked, False),
    "fused_gating_chunk_delta_rule": partial(_chunked, True),
    "gated_rms_norm": _norm,
    "causal_conv_update": _conv_update,
    "causal_conv": _conv,
}


@st.composite
def calls(draw: st.DrawFn, op: str, most: int, tokens: int) -> cases.Case:
    """A call of an op with at most `most` elements of state, for up to 300 sequences, and at most so many tokens."""
    K = draw(st.integers(16, 256))
    V = draw(st.integers(16, max(16, min(256, most // K))))
    groups = draw(st.sampled_from([n for n in GROUPS if n * K * V <= most] or [1]))
    H = draw(st.integers(1, max(1, min(3, most // (groups * K * V)))))
    B = draw(st.integers(1, max(1, min(300, most // (H * groups * K * V)))))
    return _case(draw, op, B, draw(st.integers(1, tokens)), H, H * groups, K, V)


@st.composite
def odd_calls(draw: st.DrawFn, op: str) -> cases.Case:
    """A call that a kernel may have to refuse: no tokens, heads that do not divide, head dims above 256."""
    dims = st.sampled_from([1, 3, 16, 31, 255, 256, 257, 300])
    heads = st.integers(1, 4)
    return _case(draw, op, 1, draw(st.integers(0, 2)), draw(heads), draw(heads), draw(dims), draw(dims))


def _case(draw: st.DrawFn, op: str, *sizes: int) -> cases.Case:
    dtype, state_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    wrap, wrap_state = draw(st.sampled_from(READ)), draw(st.sampled_from(WRITTEN))
    label = f"{sizes} {cases.name(dtype)}, {cases.name(state_dtype)}, {wrap.__name__}, {wrap_state.__name__}"
    return cases.Case(op, label, MAKE[op](*sizes, dtype, state_dtype, wrap, wrap_state))
