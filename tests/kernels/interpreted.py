"""Every case under Triton's interpreter; test_interpreted runs this file in processes of its own, with TRITON_INTERPRET set."""

from dataclasses import replace
from unittest import mock

import kernel_cases
import numpy as np
import pytest
import quick_interpreter  # noqa: F401
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from gdnfuse import models, versions
from gdnfuse.bench import tune
from gdnfuse.dialect import add_rms_norm
from gdnfuse.errors import Refused
from gdnfuse.kernels import (
    attention_decode,
    attention_tile,
    causal_conv_update,
    chunk_delta_rule,
    delta_rule,
    devices,
    experts,
    few_rows_linear,
    fp8_linear,
    grouped_experts,
    implementations,
    low_rank,
    one_shot_all_reduce,
    one_shot_sum,
    prompt_attention,
    skinny_linear,
    tuned,
)
from gdnfuse.kernels.linear_configs import FewRowsConfig, LowRankConfig
from tests.models import zoo
from tests.sweeps import ALL, pairs

# The interpreter multiplies the bits of bfloat16 as integers, so products get float32 operands here.
chunk_delta_rule.OPERANDS.clear()
few_rows_linear.OPERANDS[torch.bfloat16] = few_rows_linear.OPERANDS[torch.float32]
fp8_linear.OPERAND = tl.float32  # it multiplies no e4m3
# It runs one program after another; of few splits each has several blocks of keys, and with more heads there is but one.
attention_decode.PROGRAMS = attention_tile.PROGRAMS = 16
prompt_attention.CONFIGS = prompt_attention.CONFIGS[-1:]  # so that short prompts have several blocks


def spread(self, block, x):
    """A scalar to a block. Triton 3.9 spreads what a comparison of integers gives as integers, which are no mask then."""
    return interpreter.TensorHandle(np.full(block.shape, x.data, dtype=x.data.dtype), x.dtype.scalar)


if not versions.older("triton", (3, 9)):
    interpreter.InterpreterBuilder.create_splat = spread


# The interpreter truncates where devices round to the nearest bfloat16.
TOLERANCE = kernel_cases.TOLERANCE | {torch.bfloat16: 2.0**-7 + kernel_cases.MATHS}


# What a device needs hundreds of keys for, few programs need for some dozens: several blocks a split, and several turns.
# Experts are as many, and as wide, as it takes to fill no block.
SMALLER = {
    "experts-fp8-one-row": kernel_cases.chosen(
        1, 144, 3, 2, 48, torch.bfloat16, shared=32, gated=True, norm=True, masked=True, format="fp8_block128"
    ),
    "routed_experts-bf16": kernel_cases.routed_experts(
        100, 7, 3, 6, torch.bfloat16, shared=10, gated=True, norm=True, residual=True
    ),
    "routed_experts-fp16": kernel_cases.routed_experts(
        64, 4, 4, 9, torch.float16, shared=6, normalize=False, wrap_weight=kernel_cases.padded
    ),
    "routed_experts-fp8": kernel_cases.routed_experts(
        144, 3, 2, 136, torch.bfloat16, shared=16, gated=True, norm=True, format="fp8_block128"
    ),
    "attention_decode-far-blocks": kernel_cases.attention(1, 4, 1, 16, 300, filled=290, padded=270),
    "attention_growing-far-blocks": kernel_cases.growing(1, 4, 1, 16, 110, R=8, hidden=100),
    "attention_few_queries-float32-270": kernel_cases.few_queries(2, 4, 2, 16, 70, torch.float32),
    "attention_few_queries-bfloat16-270": kernel_cases.few_queries(2, 4, 2, 16, 70, torch.bfloat16),
    "attention_few_queries-no-mask-600": kernel_cases.few_queries(1, 6, 2, 20, 100, torch.bfloat16, mask=False),
    "attention_few_queries-padded": kernel_cases.few_queries(1, 4, 1, 16, 110, hidden=100),
    "attention_few_queries-masks-in-turns": kernel_cases.few_queries(1, 2, 1, 16, 2200, hidden=2150),
    "attention_few_queries-T3-one-split": kernel_cases.few_queries(2, 10, 10, 8, 37, torch.float16, T=3),
    "attention_decode-bf16": kernel_cases.attention(1, 8, 2, 32, 70, torch.bfloat16, filled=70),
    "attention_growing-no-mask-230": kernel_cases.growing(1, 6, 2, 20, 130, torch.bfloat16, mask=False, R=6),
}
# Of dtypes with sizes, and formats with kinds of linears, some of each.
LEFT_OUT = {
    "mixer_decode": "tiles-ahead many-heads",
    "attention_growing": "float32-1 float32-4 bfloat16-4 bfloat16-33 float16-1 float16-33 no-mask-17 seven-queries one-mask "
    "tokens-first",
    "attention_few_queries": "bfloat16-270 one-mask tokens-first",
    "delta_rule_verify": "float32-T5 float32-T8 bfloat16-T2 bfloat16-T5 float16-T2 float16-T8",
    "delta_rule_commit": "float16",
    "chunk_delta_rule": "float32-1 float32-130 bfloat16-1 bfloat16-63 float16-63 float16-130",
    "fused_gating_chunk_delta_rule": "soft-beta-to-2-float32-24 soft-beta-to-2-bfloat16-96 hard-beta-to-2-bfloat16-16",
    "fused_linear": "large fp8_channel-and-plain int8_channel-and-plain int4_group128-and-plain fp8_block128-and-plain "
    "fp8_channel-F32 int8_channel-BF16 int8_channel-swiglu int4_group128-F32 int4_group128-swiglu",
    "in_proj_conv": "fp8_channel int8_channel int4_group32 int4_group128 int4_group32_zero",
    "experts": "float16-5 fp8-12-rows",
}
SWEPT = {f"{op}-{case}" for op, cases in LEFT_OUT.items() for case in cases.split()}
assert {*SMALLER, *SWEPT} <= {*map(str, kernel_cases.CASES)}
CASES = [replace(case, make=SMALLER.get(str(case), case.make)) for case in kernel_cases.CASES if str(case) not in SWEPT]


@pytest.mark.parametrize("case", kernel_cases.CASES if ALL else CASES, ids=str)
def test_launch(case):
    kernel_cases.check(case, implementations()[case.op].launch, tolerance=TOLERANCE)


@pytest.mark.parametrize("config", [config for _, config in delta_rule.GATED_CONFIGS])
def test_mixers_of_few_heads_in_the_way_of_many(config, monkeypatch):
    """Heads of three tiles, and of one."""
    monkeypatch.setattr(delta_rule, "GATED_CONFIGS", ((float("inf"), config),))
    for sizes in ((2, 1, 3, 16, 168), (3, 2, 6, 16, 24)):
        case = kernel_cases.Case("mixer_decode", "", kernel_cases.mixer(*sizes, dtype=torch.bfloat16))
        kernel_cases.check(case, implementations()["mixer_decode"].launch, tolerance=TOLERANCE)


TUNED = {
    "one-row": ("fused_linear", kernel_cases.linear(24, 128, torch.bfloat16, norm=True, swiglu=True), [4, 64, 2, 1]),
    "few-rows": ("fused_linear", kernel_cases.linear(40, 128, torch.bfloat16, (5, 1)), [32, 64, 2, 3, 1, False]),
    "parts": ("split_linear", kernel_cases.split(40, 256, 2, torch.bfloat16, (5, 1)), [32, 64, 2, 3, 2, False]),
    "rule": ("packed_decode", kernel_cases.packed(2, 1, 2, 16, 24), [64, 2]),
    "gated-rule": ("mixer_decode", kernel_cases.mixer(2, 1, 2, 16, 24), [64, 2, False]),
}


@pytest.mark.parametrize("name", TUNED)
def test_what_was_tuned_is_launched(name, monkeypatch, tmp_path):
    op, make, config = TUNED[name]
    facts = dict.fromkeys(tuned.REQUIRED, "") | {"card": "none"}
    monkeypatch.setattr(tuned, "about", lambda index: facts)
    monkeypatch.setattr(tuned, "card_of", lambda index: "none")
    monkeypatch.setenv(tuned.FOLDER, str(tmp_path))
    case, launch = kernel_cases.Case(op, "tuned", make), implementations()[op].launch
    tuned.forget()
    with tuned.noting() as choices:
        kernel_cases.check(case, launch, tolerance=TOLERANCE)
    assert choices[0].config == choices[0].default != tuple(config)
    tuned.write(tuned.file_of("none"), facts, {choices[0].key: {"config": config}})
    tuned.forget()
    with tuned.noting() as choices:
        kernel_cases.check(case, launch, tolerance=TOLERANCE)
    assert choices and all(choice.tuned and choice.config == tuple(config) for choice in choices)
    tuned.forget()


def test_a_clock_of_tune_refuses_wrong_results(monkeypatch):
    """The launches of a model's steps with random numbers, on a CPU: each is timed once with the default, and never if wrong."""
    for name, stub in {"mem_get_info": lambda: (2**24, 0), "empty_cache": lambda: 0, "synchronize": lambda: 0}.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(tune, "DEVICE", "cpu")
    monkeypatch.setattr(tune, "COLD_BYTES", 1.0)
    monkeypatch.setattr(tune, "replayed", lambda call, sets, *args, **kwargs: [float(len([call(each) for each in sets]))])
    model = models.meta_model(zoo.causal_lm(**zoo.SMALL, hidden_size=128).config)
    models.quantized(model, "int4_group128")
    found = {call.kernel.name: call for call in tune.calls(model, [1, 3]) if call.choice.key.sizes[0] < 600}
    assert set(found) == {"fused_linear", "in_proj_conv", "packed_decode"}
    for call in found.values():
        time = tune.stopwatch(call)
        assert time(call.choice.default) >= 1
        with mock.patch.object(tune, "TOLERANCE", -1.0), pytest.raises(Refused, match="must be those of the built-in config"):
            time(call.choice.default)


@pytest.mark.parametrize(*pairs(config=[(1, 64, 4, 0), (2, 32, 4, 0), (4, 64, 4, 1)], m=[1, 7, 8], n=[16, 100, 128]))
def test_fused_linear_configs(config, m, n, monkeypatch):
    """One tile per program, and a few programs that take several each."""
    monkeypatch.setattr(devices, "of", lambda device: devices.H200._replace(multiprocessors=2))
    case = kernel_cases.Case("fused_linear", "config", kernel_cases.linear(m, n, torch.bfloat16, norm=True, swiglu=True))
    kernel_cases.check(case, lambda x, w, *rest: skinny_linear.launch_with(config, x, *w, *rest), tolerance=TOLERANCE)


def check_few_rows(case, config, swiglu=False):
    kernel_cases.check(case, lambda x, w, *_: few_rows_linear.launch_with(config, x, *w, swiglu), tolerance=TOLERANCE)


KINDS = [(False, 3), (False, 11), (True, 2), (True, 5), (True, 19)]  # SwiGLU or not, and rows


@pytest.mark.parametrize(*pairs(kind=KINDS, tile=[32, 64], block=[64, 128], early=[False, True]))
def test_fused_linear_configs_of_a_few_rows(kind, tile, block, early):
    """Tiles that the weight does not fill, and one step, that none is left behind where it is loaded early, or three."""
    swiglu, rows = kind
    for m, n in ((tile + 9, 3 * block), (tile // 2, block), (7, 2 * block)):
        case = kernel_cases.Case("fused_linear", "config", kernel_cases.linear(m, n, torch.bfloat16, (rows, 1), swiglu=swiglu))
        check_few_rows(case, FewRowsConfig(tile, block, 4, 3, 1, early), swiglu)


@pytest.mark.parametrize(*pairs(rows=[2, 13], tile=[32, 64], block=[64, 128], early=[False, True]))
def test_split_linear_configs(rows, tile, block, early):
    for m, parts, steps in ((tile + 9, 3, 1), (7, 3, 2), (tile, 2, 1)):
        case = kernel_cases.Case(
            "split_linear", "config", kernel_cases.split(m, steps * parts * block, parts, torch.bfloat16, (rows, 1))
        )
        check_few_rows(case, FewRowsConfig(tile, block, 4, 3, parts, early))


@pytest.mark.parametrize(("config", "dtype"), [((4, 4, 128, 1, 2, 3), torch.bfloat16), ((2, 4, 256, 2, 1, 2), torch.float32)])
def test_low_rank_configs(config, dtype, monkeypatch):
    """Rows of A and of x that fill no tile, columns that fill no step, and steps that are loaded early and late."""
    monkeypatch.setattr(low_rank, "low_rank_config", lambda *args: LowRankConfig(*config))
    x, A = torch.randn(3, 2, 480).to(torch.float16), torch.randn(7, 416).to(dtype)
    found = low_rank.launch(x[..., :416], A)
    wanted = x[..., :416].reshape(6, 416).double() @ A.double().T
    assert found.dtype == torch.float32 and (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@pytest.mark.parametrize("swiglu", [False, True])
def test_fused_linear_rows_are_independent(swiglu):
    """What a row gives is the same to the last bit whatever is in the rows beside it."""
    (x, (weight,), *_), _ = kernel_cases.linear(41, 256, lead=(5, 1), swiglu=swiglu)()
    config = FewRowsConfig(32, 64, 4, 3, 1, True)
    beside = x.clone()
    beside[3] = float("nan")
    one, other = (few_rows_linear.launch_with(config, rows, weight, swiglu) for rows in (x, beside))
    assert other[3].isnan().all() and one.isfinite().all()
    assert torch.equal(one[[0, 1, 2, 4]], other[[0, 1, 2, 4]])


# The same windows of four columns in memory that a thread can read at once and in memory that it cannot.
WINDOWS = {
    "every second element": lambda s: kernel_cases.strided(s, 2, 0),
    "one element on": lambda s: kernel_cases.strided(s.flatten(), 1, 1).view(s.shape),
    "rows of five": lambda s: kernel_cases.strided(s, 1, 1),
    "columns first": kernel_cases.v_major,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=kernel_cases.name)
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("bias", [False, True])
def test_causal_conv_update_windows_read_at_once_or_one_by_one(bias, name, dtype):
    (x, state, *rest), _ = kernel_cases.conv(3, 200, 4, 4, dtype, bias=bias)()
    other = WINDOWS[name](state)
    assert causal_conv_update.packed(state) and not causal_conv_update.packed(other) and torch.equal(state, other)
    at_once, one_by_one = (causal_conv_update.launch(x, s, *rest) for s in (state, other))
    assert torch.equal(at_once, one_by_one) and torch.equal(state, other)
    assert torch.equal(state[..., -1], x[..., 0])


def test_causal_conv_update_windows_that_start_at_a_multiple_of_four():
    """Rows of eight columns, of which the windows are the last four."""
    (x, state, *rest), _ = kernel_cases.conv(2, 50, 4, 4)()
    wide = kernel_cases.strided(state, 1, 4)
    assert causal_conv_update.packed(wide) and wide.storage_offset() == 4
    assert torch.equal(causal_conv_update.launch(x, state, *rest), causal_conv_update.launch(x, wide, *rest))
    assert torch.equal(state, wide) and kernel_cases.whole(wide).view(2, 50, 8)[..., :4].isnan().all()


def test_causal_conv_update_windows_of_another_length_are_read_one_by_one():
    for length in (3, 5, 8):
        assert not causal_conv_update.packed(torch.empty(2, 6, length))


# Heads are of two key heads: six queries of one are two programs'. With at most one program there are no splits.
@pytest.mark.parametrize(
    *pairs(L=[1, 2, 5, 33 if ALL else 17], dtype=[torch.float32, torch.bfloat16], heads=[2, 12], programs=[1, 16])
)
def test_attention_growing_copies_every_bit_and_hides_what_is_no_number(dtype, L, heads, programs, monkeypatch):
    monkeypatch.setattr(attention_decode, "PROGRAMS", programs)
    args, _ = kernel_cases.growing(2, heads, 2, 24, L, dtype, R=6, hidden=L // 2, wrap=kernel_cases.strided)()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    keys, values, seen = args[10:13]
    hidden = ~seen[:, :, 0, :-1, None]  # [B, 1, L, 1]
    finite = [x.masked_fill(hidden, 0.0) for x in (keys, values)]
    for x, number in ((keys, float("nan")), (values, float("inf"))):
        x.copy_(x.masked_fill(hidden, number))
        x[..., 1].view(bits)[hidden[..., 0].expand(-1, 2, -1)] = -3  # no NaN that arithmetic makes
    with kernel_cases.poisoned_empty():
        o, *longer = implementations()["attention_growing"].launch(*args)
        wanted, *others = implementations()["attention_growing"].launch(*args[:10], *finite, *args[12:])
    assert torch.equal(o, wanted) and o.isfinite().all()
    for old, new, other in zip((keys, values), longer, others, strict=True):
        assert new.is_contiguous() and torch.equal(new[:, :, :-1].view(bits), old.contiguous().view(bits))
        assert torch.equal(new[:, :, -1], other[:, :, -1]) and new[:, :, -1].isfinite().all()


@pytest.mark.parametrize("position", [-1, 40, 2**40])
def test_attention_decode_behind_the_end_of_the_cache_writes_nothing_and_shows(position):
    args, _ = kernel_cases.attention(2, 2, 1, 16, 40)()
    args = (*args[:12], torch.tensor([position]), *args[13:])
    keys, values = args[10].clone(), args[11].clone()
    assert implementations()["attention_decode"].launch(*args).isnan().all()
    assert torch.equal(args[10], keys) and torch.equal(args[11], values)
    args, _ = kernel_cases.attention(2, 2, 1, 16, 40, T=3)()
    args[12][2] = position
    keys, values = args[10].clone(), args[11].clone()
    o = implementations()["attention_decode"].launch(*args)
    assert o[:, 2].isnan().all() and o[:, :2].isfinite().all()
    changed = (args[10] != keys).any(3), (args[11] != values).any(3)
    assert all(where.nonzero()[:, 2].unique().tolist() == [37, 38] for where in changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=kernel_cases.name)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("wide", [False, True])
def test_of_equal_logits_the_lower_experts_are_chosen(wide, rows, dtype):
    """Also of those of no size, of infinite ones, and of what is no number, which torch takes for the largest."""
    nan, inf = float("nan"), float("inf")
    for changed, wanted in (
        ({}, [0, 2, 6, 3]),
        ({5: inf, 1: inf}, [1, 5, 0, 2]),
        ({2: nan, 4: nan}, [2, 4, 0, 6]),
        ({0: -inf}, [2, 6, 3, 4]),
    ):
        logits = [changed.get(e, logit) for e, logit in enumerate((1.0, -2.0, 1.0, 0.0, -0.0, -2.0, 1.0))]
        weight, x = torch.zeros(7, 64, dtype=dtype), torch.zeros(rows, 64, dtype=dtype)
        weight[:, 5], x[:, 5] = torch.tensor(logits), 1.0
        weights, indices = implementations()["route"].launch(x, weight, 4, True, wide)
        assert indices.tolist() == rows * [wanted]
        assert weights.isnan().all() == bool({2, 5} & {*changed})


@pytest.mark.parametrize("rows", [1, 5])
def test_experts_that_no_row_chose_are_not_looked_at(rows):
    args, _ = kernel_cases.chosen(rows, 32, 16, 2, 16, shared=16, choose=lambda i: i.clamp(max=4))()
    wanted = experts.launch(*args)
    for weight in args[3:5]:
        weight[5:] = float("nan")
    assert wanted.isfinite().all() and torch.equal(experts.launch(*args), wanted)


def test_rows_of_experts_are_independent():
    """What a row gives is the same to the last bit whatever is in the rows beside it that chose the same experts."""
    args, _ = kernel_cases.chosen(12, 32, 3, 2, 16, shared=16, gated=True)()
    beside = args[0].clone()
    beside[3] = float("nan")
    one, other = experts.launch(*args), experts.launch(beside, *args[1:])
    assert other[3].isnan().all() and one.isfinite().all()
    rest = [n for n in range(12) if n != 3]
    assert torch.equal(one[rest], other[rest])


@pytest.mark.parametrize(("rows", "block", "norm"), [(2, 16, True), (4, 32, False)])
def test_experts_configs(rows, block, norm):
    """One row's steps that the columns do not fill, and tiles that the rows of a weight do not."""
    case = kernel_cases.routed_experts(40, 3, 2, 11, shared=22, gated=True, norm=norm)
    down = experts.DownConfig(rows, block, 4)
    with mock.patch.multiple(experts, config_of_up=lambda *_: (rows, block, 2, 0), config_of_down=lambda *_: down):
        kernel_cases.check(kernel_cases.Case("routed_experts", "", case), implementations()["routed_experts"].launch)
    case = kernel_cases.chosen(3, 96, 5, 2, 64, shared=32, gated=True, residual=True)
    tile = experts.RowsConfig(8 * rows, block, 4, 3)
    with mock.patch.multiple(experts, UP_ROWS=tile, DOWN_ROWS=tile, SUMMED=64):
        kernel_cases.check(kernel_cases.Case("experts", "", case), implementations()["experts"].launch)


def test_experts_of_a_prompt_in_turns():
    """Rows that are not taken all at once, choices that are not read all at once, tiles that nothing fills."""
    case = kernel_cases.chosen(70, 48, 5, 2, 80, shared=40, gated=True, residual=True, masked=True)
    small = {"ROWS": 50, "LISTED": 32, "SUMMED": 32, "WIDE": grouped_experts.GroupedConfig(32, 16, 16, 4, 2)}
    with mock.patch.multiple(grouped_experts, **small):
        kernel_cases.check(kernel_cases.Case("experts", "", case), implementations()["experts"].launch)


def test_the_order_of_choices_is_by_expert_and_then_as_they_come():
    indices = torch.randint(-1, 8, (40, 3))  # of 7 experts
    order, tiles = torch.full((120,), -1, dtype=torch.int32), torch.full((3, 120 // 8 + 7), -1, dtype=torch.int32)
    grouped_experts.group_choices_kernel[(7,)](indices, order, tiles, 120, 7, tiles.shape[1], BB=8, BLOCK=16, STAGES=1)
    flat = indices.flatten()
    wanted = torch.cat([(flat == e).nonzero()[:, 0] for e in range(7)])
    assert order[: len(wanted)].tolist() == wanted.tolist() and (order[len(wanted) :] == -1).all()
    covered = []
    for expert, first, last in tiles.T.tolist():
        assert 0 <= last - first <= 8 and (flat[order[first:last]] == expert).all()
        covered += range(first, last)
    assert covered == list(range(len(wanted)))


@triton.jit
def stored(address, word, number, live):
    """What `send` does, of which the interpreter knows no assembly."""
    packet = address.to(tl.pointer_type(tl.int64))
    low, high = word & 0xFFFFFFFF, (word >> 32) & 0xFFFFFFFF
    flag = number.to(tl.int64) << 32
    tl.store(packet, low | flag, mask=live)
    tl.store(packet + 1, high | flag, mask=live)


@triton.jit
def found(address, number, live):
    """What `receive` does where all is there: what has another number is no word."""
    packet = address.to(tl.pointer_type(tl.int64))
    low, high = tl.load(packet, mask=live, other=0), tl.load(packet + 1, mask=live, other=0)
    there = ((low >> 32) == number) & ((high >> 32) == number)
    return tl.where(there | (live == 0), (low & 0xFFFFFFFF) | (high << 32), -1)


@pytest.mark.parametrize(
    *pairs(ranks=[2, 3], dtype=[torch.float32, torch.bfloat16], rows=[1, 3], N=[40, 136], parts=[1, 3], norm=[False, True])
)
def test_one_shot_sums_over_ranks(ranks, dtype, rows, N, parts, norm, monkeypatch):
    """The ranks' memories are here, and a rank runs twice: before the others have sent, and after. Four calls, of two sizes."""
    monkeypatch.setattr(one_shot_sum, "send", stored)
    monkeypatch.setattr(one_shot_sum, "receive", found)
    monkeypatch.setattr(one_shot_sum, "BLOCK", 32)
    monkeypatch.setattr(one_shot_sum, "PROGRAMS", 3)
    monkeypatch.setattr(one_shot_sum, "MOST", tl.constexpr(1024))
    homes = one_shot_memories(ranks)
    for call, lines in enumerate((rows, 2, rows, rows), 1):
        shape = (parts, lines, N) if parts > 1 else (lines, N)
        # Sums of quarters are exact, as is what the interpreter rounds them to.
        xs = [(torch.randint(-8, 9, shape) / 4).to(torch.float32 if parts > 1 else dtype) for _ in range(ranks)]
        residual, weight = (torch.randint(-8, 9, (lines, N)) / 4).to(dtype), torch.randn(N).to(dtype) if norm else None
        for home in homes:
            one_shot_sum.launch(xs[home.rank], residual, weight, 1e-6, 1.0, home)
            home.memory[0] -= 1
        results = [one_shot_sum.launch(xs[home.rank], residual, weight, 1e-6, 1.0, home) for home in homes]
        assert [home.memory[:2].tolist() for home in homes] == [[call, 0]] * ranks
        assert all(torch.equal(a, b) for one in results for a, b in zip(one, results[0], strict=True))
        summed = sum(x.sum(0) if parts > 1 else x for x in xs).to(dtype)
        hidden, normed = add_rms_norm.op.reference(summed, residual, weight if norm else torch.zeros(N), 1e-6, 1.0)
        assert torch.equal(results[0][0], hidden)
        torch.testing.assert_close(results[0][1], normed if norm else hidden, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def one_shot_memories(ranks):
    memories = [torch.zeros(16 + 4 * ranks * 1024, dtype=torch.int64) for _ in range(ranks)]
    for memory in memories:
        memory[2 : 2 + ranks] = torch.tensor([m.data_ptr() for m in memories])
    return [one_shot_all_reduce.Home(memory, rank, ranks) for rank, memory in enumerate(memories)]
