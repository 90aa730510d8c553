"""What the kernels accept, and the sentence they refuse with."""

import itertools
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import kernel_cases
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from gdnfuse import dialect
from gdnfuse.errors import Refused
from gdnfuse.kernels import implementations, linear_configs
from gdnfuse.kernels.linear_configs import few_rows_config, ring_config, split


@pytest.mark.parametrize("case", kernel_cases.CASES, ids=str)
def test_every_case_is_supported(case):
    args, kwargs = case.call()
    implementations()[case.op].supports(*args, **kwargs)


BF16, F64 = torch.bfloat16, torch.float64
SEVERAL_ROWS = "Several rows can have SwiGLU after their linear and nothing else"
STEPS = "The columns of a weight for several rows must be a multiple of"
PARTS = "Parts of a linear need at least two rows and two parts"
WIDE_K = "K above 128 must be 256, q, k and v bfloat16 and β at most 1; found K = 256"


def keys_in_half_precision():
    (q, keys, *rest), _ = kernel_cases.few_queries(1, 2, 2, 8, 4)()
    return (q, keys.half(), *rest), {}


def cache_in_half_precision():
    args, _ = kernel_cases.growing(1, 2, 2, 8, 4)()
    return (*args[:10], args[10].half(), *args[11:]), {}


def with_argument(op, name, value):
    """A call of the op's first case with another argument."""

    def make():
        args, _ = next(c for c in kernel_cases.CASES if c.op == op).call()
        at = kernel_cases.meaning(op).arg_names.index(name)
        return (*args[:at], value, *args[at + 1 :]), {}

    return make


def counts_that_are_floats():
    args, kwargs = kernel_cases.commit(1, 1, 2, 4, 1, 1, 8, 8, [1])()
    return (*args[:3], args[3].float(), *args[4:]), kwargs


def two_rows_of_indices():
    (x, *_), _ = kernel_cases.chosen(1, 16, 4, 2, 16)()
    (_, *rest), _ = kernel_cases.chosen(2, 16, 4, 2, 16)()
    return (x, *rest), {}


REFUSED = [
    ("causal_conv", kernel_cases.prompt_conv(1, 4, 4, 4, F64), "x must be float32, bfloat16 or float16, found float64."),
    ("causal_conv", kernel_cases.prompt_conv(1, 4, 4, 4, act="gelu"), "activation must be one of silu, none, found gelu."),
    (
        "causal_conv_record",
        kernel_cases.recording_conv(1, 4, 9, 4, 2),
        "T must be at most 8 and S at most 8, found T = 9 and S = 4.",
    ),
    (
        "causal_conv_record",
        kernel_cases.recording_conv(1, 4, 8, 9, 2),
        "T must be at most 8 and S at most 8, found T = 8 and S = 9.",
    ),
    (
        "causal_conv_record",
        kernel_cases.recording_conv(1, 4, 2, 4, 2, kernel_cases.F32, F64),
        "context must be float32, bfloat16 or float16, ",
    ),
    ("chunk_delta_rule", kernel_cases.chunked(1, 3, 1, 1, 257, 8), "K must be at most 256, found 257."),
    ("chunk_delta_rule", kernel_cases.chunked(1, 3, 1, 1, 256, 8), WIDE_K),
    ("chunk_delta_rule", kernel_cases.chunked(1, 3, 1, 1, 256, 8, BF16, beta_scale=2.0), WIDE_K),
    ("fused_gating_chunk_delta_rule", kernel_cases.chunked(1, 3, 1, 1, 256, 8, BF16, gated=True, beta_scale=2.0), WIDE_K),
    ("chunk_delta_rule", kernel_cases.chunked(1, 3, 2, 3, 8, 8), "HV must be a multiple of H, found HV = 3 and H = 2."),
    (
        "fused_gating_chunk_delta_rule",
        lambda: (lambda a: ((a[0][0].half(), *a[0][1:]), a[1]))(kernel_cases.chunked(1, 3, 1, 1, 8, 8, gated=True)()),
        "q, k and v must have one dtype, found torch.float16, torch.float32 and torch.float32.",
    ),
    ("causal_conv_update", kernel_cases.conv(1, 4, 4, 4, F64), "x must be float32, bfloat16 or float16, found float64."),
    ("causal_conv_update", kernel_cases.conv(1, 4, 4, 4, act="gelu"), "activation must be one of silu, none, found gelu."),
    ("causal_conv_update", kernel_cases.conv(1, 4, 2, 4), "conv_state must keep at least W - 1 = 3 columns"),
    ("causal_conv_update", lambda: dialect.OPS["causal_conv_update"].examples()[1], "T must be 1, found 3."),
    ("fused_gating_delta_rule", kernel_cases.rule(1, 1, 1, 1, 257, 8), "K must be at most 256, found 257."),
    ("fused_gating_delta_rule", kernel_cases.rule(1, 1, 2, 3, 8, 8), "HV must be a multiple of H, found HV = 3 and H = 2."),
    ("fused_gating_delta_rule", kernel_cases.rule(1, 1, 1, 1, 8, 8, state_dtype=F64), "recurrent_state must be float32"),
    ("attention_few_queries", kernel_cases.few_queries(1, 2, 1, 8, 9, T=65), "T must be at most 64, found 65."),
    ("delta_rule_verify", kernel_cases.rule(1, 9, 1, 1, 8, 8), "T must be at most 8, found 9."),
    ("delta_rule_verify", kernel_cases.rule(1, 2, 2, 3, 8, 8), "HV must be a multiple of H, found HV = 3 and H = 2."),
    ("delta_rule_slots", kernel_cases.slotted(2, 2, 3, 8, 8, [[0, 1]], [1]), "HV must be a multiple of H, found HV = 3"),
    ("delta_rule_slots", kernel_cases.slotted(2, 1, 1, 8, 8, [[0, 1]], [1], index=torch.int16), "slots must be int32 or int64, "),
    ("delta_rule_commit", kernel_cases.commit(1, 1, 2, 4, 2, 3, 8, 8, [1]), "D must be 2·H·K + HV·V with HV a multiple of H,"),
    ("delta_rule_commit", kernel_cases.commit(1, 1, 2, 4, 1, 1, 8, 300, [1]), "V must be at most 256, found 300."),
    ("delta_rule_commit", kernel_cases.commit(1, 1, 2, 4, 1, 1, 8, 8, [1], F64), "windows must be float32, bfloat16 or float16"),
    ("delta_rule_commit", counts_that_are_floats, "accepted must be int32 or int64, found"),
    ("packed_decode", kernel_cases.packed(1, 1, 1, 8, 300), "V must be at most 256, found 300."),
    ("packed_decode", kernel_cases.packed(1, 2, 3, 8, 8), "D must be 2·H·K + HV·V with HV a multiple of H, found D = 56,"),
    ("gated_rms_norm", kernel_cases.norm((1, 1, 1, 1, 8), torch.float32, torch.float32), "o and z must have one shape"),
    ("gated_rms_norm", kernel_cases.norm((2, 8), torch.float32, F64), "z must be float32"),
    (
        "gated_rms_norm",
        kernel_cases.norm((2, 8), BF16, BF16, act="tanh"),
        "The gate's activation must be one of silu, sigmoid, found tanh.",
    ),
    ("mixer_decode", kernel_cases.mixer(1, 1, 1, 8, 8, dtype=F64), "row must be float32"),
    ("mixer_decode", kernel_cases.mixer(1, 2, 1, 1, 1), "D must be 2·H·K + HV·V with HV a multiple of H, found D = 5,"),
    (
        "mixer_decode",
        lambda: (lambda a: ((a[0][0][..., 1:], *a[0][1:]), a[1]))(kernel_cases.mixer(1, 1, 1, 8, 8)()),
        "row must have the 34 columns of its parts, found 33.",
    ),
    ("mixer_decode", kernel_cases.mixer(1, 1, 1, 8, 260), "V must be at most 256, found 260."),
    ("mixer_decode", kernel_cases.mixer(1, 1, 1, 8, 8, state_dtype=F64), "recurrent_state must be float32"),
    ("fused_linear", kernel_cases.linear(4, 8, F64), "x must be float32, bfloat16 or float16, found float64."),
    ("fused_linear", kernel_cases.linear(4, 8, wrap=lambda x: x.half()), "x and weight must have one dtype, found float16"),
    ("fused_linear", kernel_cases.linear(4, 256, lead=(33, 1)), "x must have at most 32 rows, found the sizes [33, 1, 256]."),
    ("fused_linear", kernel_cases.linear(4, 256, lead=(3, 11)), "x must have at most 32 rows, found the sizes [3, 11, 256]."),
    ("fused_linear", kernel_cases.linear(4, 8, lead=(1, 0)), "x must have at most 32 rows, found the sizes [1, 0, 8]."),
    ("fused_linear", kernel_cases.linear(4, 256, lead=(2, 1), norm=True), f"{SEVERAL_ROWS}, found a norm or gate before it."),
    ("fused_linear", kernel_cases.linear(4, 256, lead=(2, 1), head=16), f"{SEVERAL_ROWS}, found a norm or gate before it."),
    ("fused_linear", kernel_cases.linear(4, 256, lead=(2, 1), residual=True), f"{SEVERAL_ROWS}, found a residual after it."),
    ("fused_linear", kernel_cases.linear(4, 40, BF16, lead=(2, 1)), f"{STEPS} 32, found 40."),
    ("fused_linear", kernel_cases.linear(4, 40, lead=(32, 1), swiglu=True), f"{STEPS} 32, found 40."),
    (
        "fused_linear",
        kernel_cases.linear(4, 8, wrap_weight=lambda w: w[0]),
        "x must have at least one dimension and weight two, found 3 and 1.",
    ),
    ("fused_linear", kernel_cases.linear(4, 8, wrap_weight=lambda w: w[:, :4]), "x and weight must agree on N, found 8 and 4."),
    ("fused_linear", kernel_cases.linear(0, 8), "weight must not be empty, found the sizes [0, 8]."),
    ("fused_linear", kernel_cases.linear(1, 32769), "One row must be at most 32768 wide, found 32769."),
    (
        "fused_linear",
        kernel_cases.linear(4, 8, wrap=lambda x: kernel_cases.strided(x, 2)),
        "x must have contiguous rows, found the strides",
    ),
    (
        "fused_linear",
        kernel_cases.linear(4, 8, wrap_weight=kernel_cases.v_major),
        "weight must have contiguous rows, found the strides [1, 4].",
    ),
    ("fused_linear", kernel_cases.linear(4, 8, head=3, lead=(1, 1)), "Heads must fill steps of 8 columns"),
    ("attention_decode", kernel_cases.attention(1, 2, 2, 8, 9, T=9), "T must be at most 8, found 9."),
    ("attention_decode", kernel_cases.attention(1, 3, 2, 8, 4), "H must be a multiple of HKV, found H = 3 and HKV = 2."),
    ("attention_decode", kernel_cases.attention(1, 2, 2, 300, 4), "D must be at most 256, found 300."),
    ("attention_decode", kernel_cases.attention(1, 2, 2, 8, 4, R=3), "R must be even, found 3."),
    ("attention_decode", kernel_cases.attention(1, 2, 2, 8, 4, F64), "q must be float32, bfloat16 or float16, found float64."),
    ("attention_growing", kernel_cases.growing(1, 3, 2, 8, 4), "H must be a multiple of HKV, found H = 3 and HKV = 2."),
    ("attention_growing", kernel_cases.growing(1, 2, 2, 300, 4), "D must be at most 256, found 300."),
    ("attention_growing", kernel_cases.growing(1, 2, 2, 8, 4, R=3), "R must be even, found 3."),
    ("attention_growing", kernel_cases.growing(1, 2, 2, 8, 4, F64), "q must be float32, bfloat16 or float16, found float64."),
    ("attention_growing", cache_in_half_precision, "q, keys and values must have one dtype, found torch.float32, torch.float16"),
    ("attention_few_queries", kernel_cases.few_queries(1, 3, 2, 8, 4), "H must be a multiple of HKV, found H = 3 and HKV = 2."),
    ("attention_few_queries", kernel_cases.few_queries(1, 2, 2, 300, 4), "D must be at most 256, found 300."),
    (
        "attention_few_queries",
        kernel_cases.few_queries(1, 2, 2, 8, 4, F64),
        "q must be float32, bfloat16 or float16, found float64.",
    ),
    (
        "attention_few_queries",
        keys_in_half_precision,
        "q, keys and values must have one dtype, found torch.float32, torch.float16",
    ),
    ("in_proj_conv", kernel_cases.in_proj(9, 256, 4, B=2), f"{SEVERAL_ROWS}, found a norm or gate before it."),
    ("in_proj_conv", kernel_cases.in_proj(9, 256, 4, B=2, norm=False), "x must be one row, found the sizes [2, 1, 256]."),
    ("in_proj_conv", kernel_cases.in_proj(9, 8, 4, state_dtype=F64), "conv_state must be float32"),
    ("split_linear", kernel_cases.split(4, 512, 2, BF16, (1, 1)), f"{PARTS}, found 1 and 2."),
    ("split_linear", kernel_cases.split(4, 512, 1, BF16, (2, 1)), f"{PARTS}, found 2 and 1."),
    ("split_linear", kernel_cases.split(4, 512, 2, BF16, (33, 1)), "x must have at most 32 rows, found the sizes [33, 1, 512]."),
    ("split_linear", kernel_cases.split(4, 160, 3, BF16, (2, 1)), f"{STEPS} 96, found 160."),
    ("split_linear", kernel_cases.split(4, 512, 2, F64, (2, 1)), "x must be float32, bfloat16 or float16, found float64."),
    ("add_rms_norm", kernel_cases.added(2**14 + 1), "A row must be at most 16384 wide, found 16385."),
    ("add_rms_norm", kernel_cases.added(8, F64), "x must be float32, bfloat16 or float16, found float64."),
    ("route", kernel_cases.routed(1, 8, 4, 2, F64), "x must be float32, bfloat16 or float16, found float64."),
    ("route", with_argument("route", "weight", torch.zeros(4, 64, dtype=BF16)), "x and the router's weight must have one dtype"),
    (
        "route",
        with_argument("route", "weight", torch.zeros(4, 32)),
        "x and the router's weight must agree on H, found 64 and 32.",
    ),
    ("route", with_argument("route", "top_k", 33), "A row must go to 1 to 32 of at most 4096 experts, found 33 of 12."),
    ("route", with_argument("route", "x", torch.zeros(0, 64)), "x must have at least one row, found the sizes [0, 64]."),
    (
        "route",
        with_argument("route", "x", torch.zeros(1, 128)[:, ::2]),
        "x must have contiguous rows, found the strides [128, 2].",
    ),
    ("route", kernel_cases.routed(2, 48, 4, 2), "The columns of a router for several rows must be a multiple of 64, found 48."),
    ("route", kernel_cases.routed(2, 64, 4, 2, norm=True), "Several rows take no norm before the router, found one."),
    ("experts", kernel_cases.chosen(1, 8, 4, 2, 8, F64), "routing_weights must be float32, bfloat16 or float16, found float64."),
    ("experts", kernel_cases.chosen(0, 16, 4, 2, 16), "x must have at least one row, found the sizes [0, 16]."),
    ("experts", kernel_cases.chosen(2, 16, 4, 2, 16, norm=True), "Several rows take no norm before their experts, found one."),
    ("experts", kernel_cases.chosen(2, 24, 4, 2, 16), "The columns of experts' weights for several rows must be multiples of 16"),
    ("experts", kernel_cases.chosen(2, 16, 4, 2, 16, shared=8), "The columns of experts' weights for several rows must be multi"),
    ("experts", with_argument("experts", "activation", "gelu"), "activation must be one of silu, found gelu."),
    (
        "experts",
        with_argument("experts", "x", torch.zeros(1, 24, dtype=BF16)),
        "x and gate_up must have one dtype, found bfloat16",
    ),
    ("experts", with_argument("experts", "down", torch.zeros(6, 8, 24).mT), "down must have contiguous rows, found the strides"),
    ("experts", with_argument("experts", "down", torch.zeros(6, 24, 9)), "gate_up must have the sizes [6, 18, 24], found"),
    ("experts", with_argument("experts", "shared_up", torch.zeros(8, 24)), "A shared expert must have gate, up and down"),
    ("experts", two_rows_of_indices, "indices must have the sizes [1], found"),
    ("experts", with_argument("experts", "routing_weights", torch.zeros(1, 2)), "indices must be of int64 and like"),
    (
        "experts",
        kernel_cases.chosen(1, 8, 2, 2, 50000),
        "The experts of one row must have at most 49152 columns together, found 2",
    ),
    ("routed_experts", with_argument("routed_experts", "x", torch.zeros(2, 64)), "x must be one row, found the sizes [2, 64]."),
    (
        "routed_experts",
        with_argument("routed_experts", "router", torch.zeros(13, 64)),
        "The router must have a row per expert, found",
    ),
]


@pytest.mark.parametrize(("op", "make", "sentence"), REFUSED, ids=[f"{op}-{i}" for i, (op, _, _) in enumerate(REFUSED)])
def test_refused(op, make, sentence):
    args, kwargs = make()
    with pytest.raises(Refused) as refusal:
        implementations()[op].supports(*args, **kwargs)
    assert refusal.value.reason.startswith(sentence)


def test_symbolic_sizes_other_than_the_batch_are_refused():
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    args, kwargs = kernel_cases.norm((6, 8), torch.float32, torch.float32)()
    with mode, pytest.raises(Refused, match="V must be static, found the symbolic size"):
        fakes = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in args]
        implementations()["gated_rms_norm"].supports(*fakes, **kwargs)
    assert not mode.shape_env.guards


@pytest.mark.parametrize(
    ("symbolic", "sentence"),
    [
        ({"x": 0}, r"x must have at most 32 rows, found the sizes \[s"),
        ({"x": 2}, "x's last size must be static"),
        ({"weight": 0}, "M must be static"),
        ({"weight": 1}, "N must be static"),
    ],
    ids=str,
)
def test_symbolic_linears_are_refused(symbolic, sentence):
    mode = FakeTensorMode(shape_env=ShapeEnv())
    args, _ = kernel_cases.linear(7, 8, lead=(3, 1))()

    def fake(name, t):
        sizes = [DimDynamic.DUCK if i == symbolic.get(name) else DimDynamic.STATIC for i in range(t.dim())]
        return mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    with mode, pytest.raises(Refused, match=sentence):
        implementations()["fused_linear"].supports(fake("x", args[0]), [fake("weight", args[1][0])])
    assert not mode.shape_env.guards


def test_the_length_of_a_cache_may_be_symbolic_where_it_grows_and_not_where_it_is_written():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    for op, refused in (("attention_growing", False), ("attention_decode", True)):
        args, _ = dialect.OPS[op].examples()[0]
        names = kernel_cases.meaning(op).arg_names

        def fake(name, x):
            sizes = [DimDynamic.DUCK if name in ("keys", "values") and i == 2 else DimDynamic.STATIC for i in range(x.ndim)]
            return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

        fakes = [fake(n, x) if isinstance(x, torch.Tensor) else x for n, x in zip(names, args, strict=True)]
        with mode, pytest.raises(Refused, match="L must be static") if refused else nullcontext():
            implementations()[op].supports(*fakes)
    assert not mode.shape_env.guards


@pytest.mark.parametrize("op", ["attention_growing", "attention_few_queries"])
def test_lengths_that_differ_are_an_error(op):
    """Symbols of different names may be one number, which shows when they are called with."""
    args, _ = kernel_cases.CASES[[c.op for c in kernel_cases.CASES].index(op)].call()
    at = kernel_cases.meaning(op).arg_names.index("values")
    with pytest.raises(ValueError, match="must be of one length"):
        implementations()[op].launch(*args[:at], args[at][:, :, 1:], *args[at + 1 :])
    with pytest.raises(ValueError, match="must be of one length"):
        implementations()[op].launch(*args[: at - 1], *(x[:, :, 1:] for x in args[at - 1 : at + 1]), *args[at + 1 :])


def test_rows_that_differ_are_an_error():
    """Symbols of different names may be one number, which shows when the kernel is called with them."""
    args, _ = kernel_cases.chosen(2, 16, 4, 2, 16, residual=True)()
    for at in (0, 13):
        with pytest.raises(ValueError, match="experts needs as many rows of indices and residual as of x"):
            implementations()["experts"].launch(*args[:at], args[at][:1], *args[at + 1 :])


def test_a_norm_of_symbolic_width_is_refused():
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    (x, residual, weight, *rest), _ = kernel_cases.added(300, BF16, parts=2)()
    with mode, pytest.raises(Refused, match="N must be static, found the symbolic size"):
        implementations()["add_rms_norm"].supports(*map(mode.from_tensor, (x, residual, weight)), *rest)
    assert not mode.shape_env.guards


# Rows, columns and sequences of the weights that decode steps meet, and of some that they do not.
MS = (1, 64, 65, 1024, 2560, 4096, 5120, 6336, 6400, 12352, 248320)
NS = (*range(32, 1025, 32), 1536, 2048, 2560, 3584, 4096, 5120, 6144, 9216, 12288, 17408)
ROWS = (1, 2, 3, 8, 9, 16, 17, 32)
DTYPES = (torch.float32, BF16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=kernel_cases.name)
@pytest.mark.parametrize("swiglu", [False, True])
def test_steps_of_a_few_rows_fill_the_columns(swiglu, dtype):
    """Whatever the config, and at most as wide as those of bfloat16 in bytes."""
    for N, rows in itertools.product(NS, ROWS[1:]):
        config = few_rows_config(N, rows, swiglu, dtype=dtype)
        assert N % config.BK == 0 and config.parts == 1 and 32 <= config.BK * dtype.itemsize // 2 <= 256
        for n in (config.BM, config.BK, config.num_warps):
            assert n & (n - 1) == 0


@pytest.mark.parametrize("rows", ROWS[1:])
def test_parts_fill_the_columns_and_the_device(rows):
    split_at_all = set()
    for M, N in itertools.product(MS, NS):
        parts = split(M, N, rows)
        assert parts >= 1 and N % parts == 0
        if parts == 1:
            continue
        split_at_all.add(M)
        assert parts in linear_configs.PARTS and -(-M // 64) * parts <= linear_configs.MOST
        for dtype in DTYPES:
            config = few_rows_config(N, rows, parts=parts, dtype=dtype)
            assert config.parts == parts and N % (config.BK * parts) == 0 and N // parts >= 2 * config.BK
    assert {1024, 2560} <= split_at_all and not {12352, 248320} & split_at_all


@pytest.mark.parametrize("sequences", [8, 32])
def test_a_ring_shares_rows_out_equally(sequences):
    """Every row is some program's, no program is idle, and where there are rows enough the multiprocessors have about as many."""
    taken = set()
    for M, N, swiglu in itertools.product((*MS, 3584, 9216, 12288, 16480, 17408), NS, (False, True)):
        for parts in {1, split(M, N, 8, ring=True)} if not swiglu else {1}:
            ring = ring_config(M, N, swiglu, parts, sequences)
            if ring is None:
                assert N % (128 * parts) or M > 2 * 132 * 3 * (32 if swiglu else 64)
                continue
            taken.add(M)
            each = ring.tiles * ring.live
            programs = -(-M // each) * parts
            assert ring.parts == parts and ring.live <= (32 if swiglu else 64) and ring.tiles <= 3
            assert (-(-M // each) - 1) * each < M and programs <= (3 if swiglu and sequences > 16 else 2) * 132
            at_once = -(-programs // 132) if ring.tiles == 1 else 1
            memory = at_once * 2 * 128 * ring.stages * (64 * ring.tiles + max(sequences, 16))
            assert 2 <= ring.stages <= N // parts // 128 + 1 and memory <= 224 * 1024
            if parts == 1 and M >= 132 * 16:
                waves = -(-programs // 132)
                assert M / (132 * waves) > 0.9 * each - 3
    assert taken == {*MS, 3584, 9216, 12288, 16480, 17408} - {248320}


@pytest.mark.parametrize("rows", ROWS[1:])
def test_parts_of_a_ring_have_few_rows_and_whole_steps(rows):
    for M, N in itertools.product(MS, NS):
        parts = split(M, N, rows, ring=True)
        if parts > 1:
            assert N % (128 * parts) == 0 and N // parts >= 256 and M < 132 * 32
            ring = ring_config(M, N, False, parts)
            assert ring.tiles == 1 and ring.live <= 48
            assert few_rows_config(N, rows, parts=parts, dtype=BF16).parts == parts  # for rows that are not aligned
    assert split(2560, 9216, rows, ring=True) == 4 and split(12352, 2560, rows, ring=True) == 1


@pytest.mark.parametrize(
    ("capability", "dtype", "hip", "taken"),
    [((9, 0), BF16, None, True), ((9, 0), torch.float16, None, True), ((9, 0), torch.float32, None, False)]
    + [((8, 0), BF16, None, False), ((10, 0), BF16, None, False), ((9, 4), BF16, "6.0", False)],
)
def test_rings_are_for_half_precision_on_hopper(capability, dtype, hip, taken, monkeypatch):
    weight, planned = SimpleNamespace(dtype=dtype, device=torch.device("cuda", 0)), torch.empty(1, dtype=dtype, device="meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not linear_configs.rings(weight)  # as a fake tensor of a device that is not there
    assert not linear_configs.rings(planned)  # as in a report
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert linear_configs.rings(weight) == linear_configs.rings(planned) == taken
    assert not linear_configs.rings(torch.empty(1, dtype=dtype))


@pytest.mark.parametrize(
    ("name", "swiglu", "parts"), [("fused_linear", False, 1), ("fused_linear", True, 1), ("split_linear", False, 4)]
)
def test_the_report_says_how_a_ring_shares_its_work(name, swiglu, parts, monkeypatch):
    """And may ask before there is a device."""
    monkeypatch.setattr("gdnfuse.kernels.few_rows_hopper.rings", lambda weight: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, weight = (torch.empty(s, dtype=BF16, device="cuda") for s in ((3, 1, 2560), (2560, 2560)))
    call = {"x": x, "weights": [weight]} | ({"parts": parts} if parts > 1 else {"swiglu": swiglu})
    (plan,) = implementations()[name].plan(call)
    assert plan.startswith("few_rows_hopper, ") and plan.endswith("TILES 1, STAGES 4, 4 warps"), plan


def test_one_row_and_more_than_32_are_not_split():
    assert {split(M, N, rows) for M in MS for N in NS for rows in (0, 1, 33, 64, 1000)} == {1}
    assert split(1024, 4096, 2) > 1 and split(1024, 4096, 32) > 1


def test_what_is_split_is_supported():
    for M, N, rows in itertools.product((64, 2560, 6336), (1024, 3584, 9216), (2, 9, 32)):
        parts = split(M, N, rows)
        x, weight = (torch.empty(s, dtype=BF16, device="meta") for s in ((rows, 1, N), (M, N)))
        if parts > 1:
            implementations()["split_linear"].supports(x, [weight], parts)
        implementations()["fused_linear"].supports(x, [weight])


def test_missing_triton_is_a_refusal(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refused, match="Triton is required for GPU kernels; it is not installed"):
        implementations()


def test_importing_the_package_does_not_import_triton():
    code = "import sys, gdnfuse.kernels; assert 'gdnfuse.kernels.launch.implementation' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
