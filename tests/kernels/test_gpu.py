"""Kernels against the references on a GPU, called directly, through their ops, and inside a graph that Inductor compiled."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import kernel_cases
import pytest
import torch
import torch.utils._pytree as pytree
import triton
from kernel_cases import BF16, F16, Case
from torch._subclasses.fake_tensor import FakeTensorMode

from gdnfuse import compat, dialect
from gdnfuse.dialect import delta_rule, record
from gdnfuse.kernels import chunk_delta_rule, fp8_linear, implementations, loaded, skinny_linear
from gdnfuse.kernels.launch import replay
from gdnfuse.kernels.launch.replay import Recorded

pytestmark = pytest.mark.gpu

H, HV, K, V = 16, 32, 128, 128
REAL = [
    case
    for B in (1, 2, 5, 33)
    for case in (
        Case("causal_conv_update", f"real-B{B}", kernel_cases.conv(B, 8192, 4, 4, BF16, wrap=kernel_cases.row_slice)),
        Case("causal_conv_record", f"real-B{B}", kernel_cases.recording_conv(B, 8192, 5, 4, HV, BF16, more=3)),
        Case("fused_gating_delta_rule", f"real-B{B}", kernel_cases.rule(B, 3, H, HV, K, V, BF16)),
        Case("delta_rule_verify", f"real-B{B}", kernel_cases.rule(B, 5, H, HV, K, V, BF16)),
        Case(
            "delta_rule_slots",
            f"real-B{B}",
            kernel_cases.slotted(5, H, HV, K, V, [[*range(5 * i, 5 * i + 5)] for i in range(B)], [3] * B, BF16),
        ),
        Case(
            "delta_rule_commit",
            f"real-B{B}",
            kernel_cases.commit(3, B, 5, 4, H, HV, K, V, [i % 6 for i in range(1, B + 1)], BF16),
        ),
        Case("packed_decode", f"real-B{B}", kernel_cases.packed(B, H, HV, K, V, BF16, wrap=kernel_cases.strided)),
        Case(
            "gated_rms_norm", f"real-B{B}", kernel_cases.norm((B, 1, HV, V), torch.float32, BF16, wrap=kernel_cases.gate_of_row)
        ),
        Case(
            "attention_decode", f"real-T5-B{B}", kernel_cases.attention(B, 16, 4, 256, 300, BF16, T=5, R=64, filled=90, padded=7)
        ),
        Case("attention_growing", f"real-B{B}", kernel_cases.growing(B, 16, 4, 256, 300, BF16, R=64, hidden=7)),
        Case("attention_few_queries", f"real-T5-B{B}", kernel_cases.few_queries(B, 16, 4, 256, 300, BF16, T=5, hidden=7)),
        Case("attention_few_queries", f"real-B{B}", kernel_cases.few_queries(B, 16, 4, 256, 300, BF16, hidden=7)),
        Case("mixer_decode", f"real-B{B}", kernel_cases.mixer(B, H, HV, K, V, dtype=BF16)),
        Case("mixer_decode", f"real-27B-B{B}", kernel_cases.mixer(B, H, 48, K, V, dtype=BF16, state_dtype=BF16)),
    )
]
REAL += [
    case
    for B in (1, 2, 5)
    for case in (
        Case("attention_growing", f"real-long-B{B}", kernel_cases.growing(B, 16, 4, 256, 5000, BF16, R=64, hidden=4000)),
        Case("attention_growing", f"real-no-mask-B{B}", kernel_cases.growing(B, 16, 4, 256, 5003, BF16, R=64, mask=False)),
        Case("attention_few_queries", f"real-T8-B{B}", kernel_cases.few_queries(B, 16, 4, 256, 5000, BF16, T=8, hidden=4000)),
        Case("attention_few_queries", f"real-T64-B{B}", kernel_cases.few_queries(B, 16, 4, 256, 5000, BF16, T=64)),
        Case("attention_few_queries", f"real-long-B{B}", kernel_cases.few_queries(B, 16, 4, 256, 5000, BF16, hidden=4000)),
        Case("attention_few_queries", f"real-no-mask-B{B}", kernel_cases.few_queries(B, 16, 4, 256, 5000, BF16, mask=False)),
        Case("prompt_attention", f"real-on-a-cache-B{B}", kernel_cases.of_prompt(B, 16, 4, 333, 2048, 256, BF16, start=700)),
        Case(
            "prompt_attention",
            f"real-padded-B{B}",
            kernel_cases.of_prompt(B, 16, 4, 1500, 1500, 256, BF16, padded=[*range(0, 1500, 1500 // B)][:B]),
        ),
        Case(
            "prompt_attention",
            f"real-holes-B{B}",
            kernel_cases.of_prompt(B, 16, 4, 130, 1024, 256, F16, start=800, padded=[900] * B, holes=True),
        ),
        Case("prompt_attention", f"real-128-B{B}", kernel_cases.of_prompt(B, 32, 8, 300, 700, 128, BF16, start=64)),
        Case("causal_conv", f"real-B{B}", kernel_cases.prompt_conv(B, 8192, 333, 4, BF16, S=4, wrap=kernel_cases.row_slice)),
        Case("chunk_delta_rule", f"real-B{B}", kernel_cases.chunked(B, 333, H, HV, K, V, BF16, every=2)),
        Case("fused_gating_chunk_delta_rule", f"real-B{B}", kernel_cases.chunked(B, 333, H, HV, K, V, BF16, gated=True)),
    )
]
CHUNKED = [
    *(Case("chunk_delta_rule", f"T{T}", kernel_cases.chunked(1, T, 1, 2, 32, 32, BF16)) for T in range(1, 301)),
    *(Case("chunk_delta_rule", f"fp32-T{T}", kernel_cases.chunked(2, T, 1, 2, 32, 64)) for T in (1, 64, 65, 300)),
    Case("chunk_delta_rule", "fp16", kernel_cases.chunked(2, 150, 2, 4, 128, 128, torch.float16)),
    *(
        Case("chunk_delta_rule", f"{kernel_cases.name(dtype)}-{K}x{V}", kernel_cases.chunked(1, 150, 1, 2, K, V, dtype, eps=eps))
        for K, V in ((16, 16), (24, 16), (48, 200), (64, 32), (100, 100), (128, 256))
        for dtype, eps in ((BF16, 1e-6), (BF16, None), (torch.float32, None))
    ),
    Case("chunk_delta_rule", "large-heads", kernel_cases.chunked(1, 150, 1, 2, 256, 256, BF16)),
    Case("chunk_delta_rule", "hard-gates", kernel_cases.chunked(1, 700, 2, 4, 128, 128, BF16, hard=30.0)),
    Case("chunk_delta_rule", "sequences", kernel_cases.chunked(1, 700, 2, 4, 128, 128, BF16, lengths=(1, 63, 64, 65, 500, 7))),
    Case("fused_gating_chunk_delta_rule", "hard", kernel_cases.chunked(1, 700, 2, 4, 128, 128, BF16, gated=True, hard=30.0)),
]
LINEARS = [
    Case("fused_linear", f"real-{n_out}x{n_in}", kernel_cases.linear(n_out, n_in, BF16))
    for n_out, n_in in ((12352, 2560), (2560, 4096), (18432, 2560), (2560, 9216), (4096, 12288), (1024, 3584), (248320, 1024))
]
LINEARS += [
    Case("fused_linear", "real-gate-up", kernel_cases.linear(9216, 2560, BF16, norm=True, swiglu=True)),
    Case("fused_linear", "real-down", kernel_cases.linear(2560, 9216, BF16, residual=True)),
    Case("fused_linear", "real-out", kernel_cases.linear(2560, 4096, BF16, head=128, residual=True)),
    Case("in_proj_conv", "real", kernel_cases.in_proj(12352, 2560, 8192, BF16)),
    Case("in_proj_conv", "real-0.8B", kernel_cases.in_proj(8224, 1024, 6144, BF16)),
]
# Rows of the weight that fill no tile, and no multiprocessor; x's rows in a wider tensor, where 16 bytes are and are not aligned.
FEW_ROWS = [
    Case("fused_linear", f"{m}x{n}-{kernel_cases.name(dtype)}", kernel_cases.linear(m, n, dtype, (3, 1), swiglu=swiglu))
    for m, n, dtype, swiglu in ((1, 128, BF16, False), (4225, 384, BF16, False), (17, 128, BF16, True), (4500, 256, F16, True))
]
FEW_ROWS += [
    Case("split_linear", "129x256", kernel_cases.split(129, 256, 2, BF16, (5, 1))),
    Case("split_linear", "2559x1024", kernel_cases.split(2559, 1024, 8, F16, (32, 1))),
    Case("fused_linear", "rows-apart", kernel_cases.linear(300, 512, BF16, (5, 1), wrap=kernel_cases.padded)),
    Case("fused_linear", "rows-apart-by-3", kernel_cases.linear(300, 512, BF16, (5, 1), wrap=kernel_cases.strided)),
]
FEW_ROWS += [
    case
    for rows in (2, 8, 9, 16, 17, 32)
    for case in (
        Case("fused_linear", f"real-{rows}-rows", kernel_cases.linear(12352, 2560, BF16, (rows, 1))),
        Case("fused_linear", f"real-{rows}-rows-swiglu", kernel_cases.linear(9216, 2560, BF16, (rows, 1), swiglu=True)),
        Case("split_linear", f"real-{rows}-rows", kernel_cases.split(2560, 9216, 6, BF16, (rows, 1))),
        Case("add_rms_norm", f"real-{rows}-rows", kernel_cases.added(5120, dtype=BF16, lead=(rows, 1), parts=7)),
    )
]
F32 = torch.float32
FEW_ROWS += [
    case
    for rows, ranks, dtype in ((2, (16,), F32), (8, (16, 16), BF16), (17, (8, 64), F32), (32, (64, 8, 16, 24), F32))
    for under in ({"lead": (rows, 1), "lora": ranks, "lora_dtype": dtype},)
    for name, make in (
        ("real", kernel_cases.linear(12352, 2560, BF16, parts=4, **under)),
        ("real-swiglu", kernel_cases.linear(9216, 2560, BF16, swiglu=True, parts=2, **under)),
        ("real-F16-0.8B", kernel_cases.linear(8224, 1024, F16, parts=4, **under)),
        ("apart-by-3", kernel_cases.linear(300, 512, BF16, wrap=kernel_cases.strided, **under)),
        ("real-split", kernel_cases.split(2560, 9216, 4, BF16, **under)),
    )
    for case in (Case("split_linear" if "split" in name else "fused_linear", f"{name}-lora-{rows}-rows", make),)
]
# Qwen3.5-35B-A3B's sizes, of fewer experts.
SIZES = {"shared": 512, "gated": True, "residual": True}
EXPERTS = [
    Case("routed_experts", "real", kernel_cases.routed_experts(2048, 20, 8, 512, BF16, norm=True, **SIZES)),
    *(
        Case("experts", f"real-{n}", kernel_cases.chosen(n, 2048, 20, 8, 512, BF16, masked=True, **SIZES))
        for n in (1, 2, 8, 32, 65, 200, 1000)
    ),
    *(Case("route", f"real-{n}", kernel_cases.routed(n, 2048, 64, 8, BF16)) for n in (1, 2, 17, 64, 300)),
    Case("experts", "real-fp32", kernel_cases.chosen(3, 2048, 12, 4, 512, **SIZES)),
]


@pytest.mark.parametrize("case", kernel_cases.CASES + REAL + CHUNKED + LINEARS + FEW_ROWS + EXPERTS, ids=str)
def test_launch(case):
    kernel_cases.check(case, implementations()[case.op].launch, "cuda")


@pytest.mark.parametrize("case", [c for c in REAL if c.label == "real-B2"] + LINEARS[:1] + LINEARS[-5:] + FEW_ROWS[:4], ids=str)
def test_op(case):
    kernel_cases.check(case, implementations()[case.op].op, "cuda")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", kernel_cases.CASES + REAL + LINEARS + FEW_ROWS + EXPERTS, ids=str)
def test_repeated(case, mode):
    """The last of four calls of one layout, all on tensors of their own."""
    implementation, kept = implementations()[case.op], []

    def fourth(*args, **kwargs):
        for _ in range(3):
            kept.append([kernel_cases.rebuilt(a, "cuda") for a in args])
            implementation.op(*kept[-1], **kwargs)
        implementation.replayed.launch = unreachable if may_repeat() else launch
        with kernel_cases.poisoned_empty():
            return implementation.op(*args, **kwargs)

    def may_repeat():
        return any(type(x) is Recorded for x in implementation.replayed.layouts.values())

    implementation.replayed.forget()
    launch = implementation.replayed.launch
    try:
        with mode():
            kernel_cases.check(case, fourth, "cuda", poison=nullcontext)
    finally:
        implementation.replayed.launch = launch


@pytest.mark.parametrize("case", kernel_cases.CASES + REAL + LINEARS + FEW_ROWS + EXPERTS, ids=str)
def test_written(case, monkeypatch):
    """The call behind those for whose layout a function was written."""
    implementation, kept = implementations()[case.op], []
    allocate, replayed = compat.empty, implementation.replayed
    filled = lambda make: lambda *a: kernel_cases.poison(make(*a))  # noqa: E731
    monkeypatch.setattr(replay, "OFTEN", 1)
    monkeypatch.setattr(compat, "empty", lambda device: filled(allocate(device)))

    def fifth(*args, **kwargs):
        for _ in range(4):
            kept.append([kernel_cases.rebuilt(a, "cuda") for a in args])
            implementation.op(*kept[-1], **kwargs)
        if any(type(x) is Recorded for x in replayed.layouts.values()) and aligned(kept[-1]):
            assert replayed.matches
            monkeypatch.setattr(replayed, "_by_layout", unreachable)
        return implementation.op(*args, **kwargs)

    replayed.forget()
    try:
        with torch.no_grad():
            kernel_cases.check(case, fifth, "cuda", poison=nullcontext)
    finally:
        replayed.forget()


def aligned(args):
    return all(t.data_ptr() % 16 == 0 for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor))


def unreachable(*args, **kwargs):
    raise AssertionError("the launch was not repeated")


@pytest.mark.parametrize("name", ["attention_growing", "attention_few_queries"])
def test_keys_of_any_length_are_repeated(name, monkeypatch):
    replayed, op = implementations()[name].replayed, implementations()[name].op
    replayed.forget()
    for B, mask in ((1, False), (2, True)):
        for L in (1, 40, 41, 300, 301, 2048, 20000, 3, 42):
            case = Case(name, str(L), getattr(kernel_cases, name.removeprefix("attention_"))(B, 16, 4, 256, L, BF16, mask=mask))
            with monkeypatch.context() as patch:
                if L > 300 or L < 40 and L > 1 or L == 42:
                    patch.setattr(replayed, "_by_layout", unreachable)
                kernel_cases.check(case, op, "cuda", poison=nullcontext)
    assert len(replayed.layouts) == 2 * 4
    replayed.forget()


def test_a_profiler_s_hooks_are_called_for_what_is_repeated(monkeypatch):
    monkeypatch.setattr(replay, "OFTEN", 1)
    implementation, noted = implementations()["gated_rms_norm"], []
    args, kwargs = kernel_cases.norm((2, 1, 4, 128), torch.float32, BF16)()
    args = pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, args)
    implementation.replayed.forget()
    for _ in range(5):
        implementation.replayed(*args, **kwargs)
    assert implementation.replayed.matches
    hook = lambda metadata: noted.append(metadata.get()["name"])  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        implementation.replayed(*args, **kwargs)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    implementation.replayed(*args, **kwargs)
    assert noted == ["gated_rms_norm_kernel"]


def test_real_layouts_are_repeated():
    """Only those whose operands are copied first may not be."""
    for case in REAL + LINEARS + FEW_ROWS:
        implementation, (args, kwargs) = implementations()[case.op], case.call()
        args = [kernel_cases.rebuilt(a, "cuda") for a in args]
        implementation.replayed.forget()
        for _ in range(2):
            implementation.op(*args, **kwargs)
        assert [type(x) for x in implementation.replayed.layouts.values()] == [Recorded], case


def compiled(name, dynamic=False):
    """The op between two pointwise ops, compiled; the allocator's free memory is NaN so that unwritten outputs show."""
    op = implementations()[name].op

    def function(first, *rest, **kwargs):
        results = op(first * 1.0, *rest, **kwargs)
        if results is None:  # all that it does, it writes into its arguments
            return None
        return tuple(r * 1.0 for r in results) if isinstance(results, tuple) else results * 1.0

    torch._dynamo.reset()  # all these functions share one code object, whose recompilations are limited
    fast = torch.compile(function, fullgraph=True)

    def call(*args, **kwargs):
        torch.full((2**28,), float("nan"), device="cuda")
        for argument, value in zip(kernel_cases.meaning(name).arg_names, args, strict=False):
            if dynamic and argument in kernel_cases.BATCHED:
                torch._dynamo.mark_dynamic(value, 0)
        return fast(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    "case", [c for c in REAL if c.label.startswith("real-B")] + LINEARS[:2] + LINEARS[-5:] + FEW_ROWS[:4], ids=str
)
def test_compiled(case):
    kernel_cases.check(case, compiled(case.op), "cuda", poison=nullcontext)


@pytest.mark.parametrize("name", list({c.op: c for c in REAL}))
def test_compiled_dynamic(name):
    """A symbolic batch serves several sizes; marking it raises where the compilation would fix it."""
    call = compiled(name, dynamic=True)
    for case in [c for c in REAL if c.op == name and c.label.startswith("real-B") and c.label != "real-B1"]:
        kernel_cases.check(case, call, "cuda", poison=nullcontext)


@pytest.mark.parametrize("rate", [1.0, 2.0])
@pytest.mark.parametrize("every", [64, 4096])
def test_equal_keys_and_full_rates_do_not_blow_up(every, rate):
    """The hardest system to invert: all keys of a run equal, β full, no decay; powers of it, as doubling takes, overflow."""
    T = 4096
    key = torch.randn(T // every, 1, K).expand(-1, every, -1).reshape(1, T, 1, K).bfloat16().cuda()
    q, v = torch.randn(1, T, 1, K).bfloat16().cuda(), torch.randn(1, T, 2, V).bfloat16().cuda()
    g, beta = torch.zeros(1, T, 2).cuda(), torch.full((1, T, 2), rate).bfloat16().cuda()
    args = (q, key, v, g, beta, None, K**-0.5, 1e-6, None, 0, rate)
    want = dialect.OPS["chunk_delta_rule"].reference(*(x.double() if isinstance(x, torch.Tensor) else x for x in args))
    for mine, theirs in zip(implementations()["chunk_delta_rule"].op(*args)[:2], want, strict=False):
        assert (mine.double() - theirs).norm() / theirs.norm() < 2e-2


def test_chunked_states_do_not_drift_over_32k_tokens():
    """Beside eager's float32 rule, whose keys and values are as rounded as ours: the error at the end is that after 2k tokens."""
    args, _ = kernel_cases.chunked(1, 32768, 2, 4, K, V, BF16)()
    args = [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]
    options = {"scale": K**-0.5, "l2norm_eps": 1e-6, "checkpoint_every": 32, "beta_max": 1.0}
    _, last, states = implementations()["chunk_delta_rule"].op(*args, **options)
    exact = [x.double() if isinstance(x, torch.Tensor) else x for x in args]
    *_, kept = dialect.OPS["chunk_delta_rule"].reference(*exact, **options)
    errors = ((states.double() - kept).flatten(2).norm(dim=2) / kept.flatten(2).norm(dim=2)).flatten()
    assert torch.equal(states[:, -1], last)
    assert errors.isfinite().all() and errors[-1] < 1.5 * errors[0] and errors.max() < 1e-2


@pytest.mark.parametrize("every", [0, 1, 3, 5, 100])
@pytest.mark.parametrize(("B", "columns"), [(1, 64), (4, 128)])
def test_the_scan_for_hopper_leaves_what_the_general_one_leaves(B, columns, every):
    """Outputs, last states and those on the way, bit for bit; with 5, 320 tokens, the last of them is the last state."""
    args, _ = kernel_cases.chunked(B, 320, H, HV, K, V, BF16)()
    q, k, v, g, beta, state = pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, args)
    hopper = chunk_delta_rule.chunk_scan_hopper
    if hopper is None or not hopper.supports_here(q, k, v):
        pytest.skip("needs a Hopper GPU")
    assert hopper._config(B * HV, False, q.device)[0] == columns
    launch = lambda config: chunk_delta_rule.launch_with(  # noqa: E731
        q, k, v, g, beta, None, None, state, K**-0.5, 1e-6, None, every, 1.0, config
    )
    for _ in range(2):
        found, wanted = launch(None), launch((32, 4, 2))
        assert found[2].shape[1] == (320 // (64 * every) if every else 0)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))
    assert every != 5 or torch.equal(found[2][:, -1], found[1])


@pytest.mark.parametrize("op", ["chunk_delta_rule", "fused_gating_chunk_delta_rule"])
def test_chunked_rule_is_deterministic(op):
    args, kwargs = kernel_cases.chunked(2, 1000, H, HV, K, V, BF16, gated="gating" in op)()
    args = [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]
    first, second = (implementations()[op].op(*args, **kwargs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_linear_is_deterministic():
    (x, weights, *rest), _ = kernel_cases.linear(12352, 2560, norm=True)()
    op = implementations()["fused_linear"].op
    x, weights, rest = pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, (x, weights, rest))
    assert torch.equal(op(x, weights, *rest), op(x, weights, *rest))


@pytest.mark.parametrize("config", [(1, 512, 4, 0), (2, 1024, 8, 1), (4, 512, 4, 3), (8, 256, 8, 2)], ids=str)
def test_linear_configs(config):
    for m, n in ((1001, 2560), (1024, 1000), (7, 4096)):
        case = Case("fused_linear", "config", kernel_cases.linear(m, n, BF16, norm=True, swiglu=True))
        kernel_cases.check(case, lambda x, w, *rest: skinny_linear.launch_with(config, x, *w, *rest), "cuda")


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", ["attention_growing", "attention_few_queries"])
def test_keys_of_any_length_have_one_machine_code(name, mask):
    op, before = implementations()[name].op, None
    for L in (1, 16, 17, 300, 2048, 2049, 40000):
        args, _ = getattr(kernel_cases, name.removeprefix("attention_"))(2, 16, 4, 256, L, BF16, mask=mask)()
        op(*pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, args))
        before = before or loaded()
        assert loaded() == before, L


ATTENTION = ("attention_decode-bf16", "attention_growing-seven-queries", "attention_few_queries-no-gate")
AHEAD = [c for c in kernel_cases.CASES if str(c) in ATTENTION]
AHEAD += [c for c in REAL if c.label == "real-B2" and c.op in ("causal_conv_update", "mixer_decode")]


@pytest.mark.parametrize("case", LINEARS[-5:] + FEW_ROWS[12:16] + EXPERTS[:3] + AHEAD, ids=str)
def test_what_is_compiled_ahead_is_what_is_launched(case):
    implementation, (args, _) = implementations()[case.op], case.call()
    args = pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, list(args))
    bound = dict(zip(kernel_cases.meaning(case.op).arg_names, args, strict=False)) | {"overlap": True}
    mode = FakeTensorMode()
    fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, bound)
    with ThreadPoolExecutor() as pool:
        pending = implementation.compile_ahead(fakes, pool)
        assert pending and all(future.exception() is None for future in pending)
    before = loaded()
    implementation.op(**bound)
    assert loaded() == before


def overlapped(name, *args, **options):
    return implementations()[name].op(*args, **options, overlap=True)


def one_by_one(name, *args, **options):
    return implementations()[name].op(*args, **options)


def meant(name, *args, **options):
    return dialect.OPS[name].reference(*args, **options)


def check_overlap(chain, inputs, states, tolerance):
    """Kernels that start before the one they read has ended give, to the last bit, what they give one by one, run after run.

    Args:
        chain: of calls of its first argument, one of the functions above, on inputs and states; returns a tensor.
        inputs: tensors and numbers in lists and tuples.
        states: tensors that are written in place.
        tolerance: error relative to the references in float64, of the result and of all states together.
    """
    inputs, states = pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, (inputs, states))
    ours, theirs = [s.clone() for s in states], [s.clone() for s in states]
    want = chain(one_by_one, inputs, theirs)
    chain(overlapped, inputs, ours)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(overlapped, inputs, ours)
    for _ in range(20):
        for s, original in zip(ours, states, strict=True):
            s.copy_(original)
        graph.replay()
        assert torch.equal(got, want)
        assert all(map(torch.equal, ours, theirs))
    inputs, states = pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, (inputs, states))
    exact = chain(meant, inputs, states)
    assert relative(got, exact) < tolerance
    if states:
        assert relative(*(torch.cat([s.flatten().double() for s in all_of]) for all_of in (ours, states))) < tolerance


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def weights(count, rows, columns, dtype=torch.float32):
    return [(torch.randn(rows, columns) / columns**0.5).to(dtype) for _ in range(count)]


def test_overlapping_kernels_wait_for_each_other():
    width = 512
    torch.manual_seed(0)
    inputs = torch.randn(1, 1, width), torch.randn(width), torch.randn(width, 1, 4), weights(40, width, width)

    def chain(call, inputs, states):
        x, norm, taps, layers = inputs
        for w, state in zip(layers, states, strict=True):
            row = call("in_proj_conv", x, [w], norm, 1e-6, 0.0, state, taps, None, 0, "silu")
            x = call("fused_linear", row, [w], residual=x)
        return x

    check_overlap(chain, inputs, [torch.randn(1, width, 4) for _ in range(40)], 1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (BF16, 5e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [2, 8, 17, 32])
def test_overlapping_kernels_of_a_few_rows_wait_for_each_other(rows, dtype, tolerance):
    """MLPs with their norms, as in a decode step of several sequences."""
    width, inner, count, parts = 1024, 2048, 20, 4
    torch.manual_seed(0)
    x, residual = torch.randn(2, rows, 1, width).to(dtype)
    norms = [(torch.randn(width) / 10).to(dtype) for _ in range(count)]
    inputs = x, residual, norms, weights(count, 2 * inner, width, dtype), weights(count, width, inner, dtype)

    def chain(call, inputs, states):
        x, residual, *layers = inputs
        for norm, gate_up, down in zip(*layers, strict=True):
            residual, y = call("add_rms_norm", x, residual, norm, 1e-6, 1.0)
            y = call("fused_linear", y, [gate_up], swiglu=True)
            x = call("split_linear", y, [down], parts)
        return call("add_rms_norm", x, residual, norm, 1e-6, 1.0)[1]

    check_overlap(chain, inputs, [], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (BF16, 5e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("B", "heads"), [(1, 8), (2, 8), (9, 8), (17, 16)])
def test_overlapping_mixers_wait_for_each_other(B, heads, dtype, tolerance):
    """Each reads its states before the linear ahead of it has ended; with more sequences their gated rule takes other tiles, and
    with 544 heads it does not start early itself, but lets the linear behind it do so."""
    count = 12
    torch.manual_seed(0)
    calls = [kernel_cases.mixer(B, heads, 2 * heads, K, V, dtype=dtype)()[0] for _ in range(count)]
    constants = calls[0][8:]
    # row, conv_state, conv_weight, no bias, A_log, dt_bias, recurrent_state, norm_weight
    parameters = [(taps, A_log, dt_bias, norm) for _, _, taps, _, A_log, dt_bias, _, norm, *_ in calls]
    states = [s for call in calls for s in (call[1], call[6])]
    inner, columns = 2 * heads * V, calls[0][0].shape[-1]
    inputs = torch.randn(B, 1, inner).to(dtype), weights(count, columns, inner, dtype), parameters

    def chain(call, inputs, states):
        x, in_proj, parameters = inputs
        for i, (w, (taps, A_log, dt_bias, norm)) in enumerate(zip(in_proj, parameters, strict=True)):
            row = call("fused_linear", x, [w])
            x = call("mixer_decode", row, states[2 * i], taps, None, A_log, dt_bias, states[2 * i + 1], norm, *constants)
        return x

    check_overlap(chain, inputs, states, tolerance)


@pytest.mark.parametrize(("B", "T"), [(1, 5), (3, 2)])
def test_overlapping_mixers_of_verify_steps_wait_for_each_other(B, T):
    """Conv and rule read windows and states early that they do not write; what is recorded is whole."""
    heads, width, count = 4, 512, 12
    D = 2 * heads * K + 2 * heads * V
    torch.manual_seed(0)
    layers, states = [], []
    for _ in range(count):
        _, context, _, _, *room = record.example_tensors(B, T, D, 4, 2 * heads, more=3, dtype=BF16)
        *_, A_log, dt_bias, state = delta_rule.example_tensors(B, T, heads, 2 * heads, K, V, BF16)
        layers.append((context, torch.randn(D, 4).to(BF16) / 2, A_log, dt_bias, state, torch.rand(V).to(BF16)))
        states += room
    inner = 2 * heads * V
    in_proj, out_proj = weights(count, D + inner + 4 * heads, width, BF16), weights(count, width, inner, BF16)
    inputs = torch.randn(B, T, width).to(BF16), in_proj, out_proj, layers

    def chain(call, inputs, states):
        x, in_proj, out_proj, layers = inputs
        for i, (context, taps, A_log, dt_bias, state, norm) in enumerate(layers):
            row, z, b, a = call("fused_linear", x, [in_proj[i]]).split([D, inner, 2 * heads, 2 * heads], -1)
            row = call("causal_conv_record", row.mT, taps, None, "silu", context, a, b, *states[3 * i : 3 * i + 3])
            q, k, v = row.mT.split([heads * K, heads * K, inner], -1)
            heads_of = q.unflatten(-1, (heads, K)), k.unflatten(-1, (heads, K)), v.unflatten(-1, (2 * heads, V))
            o = call("delta_rule_verify", *heads_of, a, b, A_log, dt_bias, state, K**-0.5, 1e-6)
            y = call("gated_rms_norm", o, z.unflatten(-1, (2 * heads, V)), norm, 1e-6)
            x = call("fused_linear", y.flatten(2), [out_proj[i]])
        return x

    check_overlap(chain, inputs, states, 5e-2)


@pytest.mark.parametrize("B", [1, 4])
def test_overlapping_attention_copies_a_cache_that_grows_into_memory_that_was_just_read(B):
    """Of keys, values and partial sums that nobody keeps: the allocator hands it out again before a kernel has read it."""
    H, HKV, D, L, count = 8, 2, 128, 700, 12
    torch.manual_seed(0)
    calls = [kernel_cases.growing(B, H, HKV, D, L, BF16, R=64, mask=False)()[0] for _ in range(count)]
    # gate, q_norm_weight, k_norm_weight, cos, sin, keys, values
    layers = [(*call[3:6], *call[8:12]) for call in calls]
    inputs = torch.randn(B, 1, H * D).to(BF16), weights(count, (H + 2 * HKV) * D, H * D, BF16), layers

    def chain(call, inputs, states):
        x, projections, layers = inputs
        for w, (*gate_and_norms, cos, sin, keys, values) in zip(projections, layers, strict=True):
            q, k, v = call("fused_linear", x, [w]).unflatten(-1, (-1, D)).split([H, HKV, HKV], 2)
            longer = call("attention_growing", q, k, v, *gate_and_norms, 1e-6, 1.0, cos, sin, keys, values, None, D**-0.5)
            x = longer[0]
        return torch.cat([t.flatten() for t in longer])

    check_overlap(chain, inputs, [], 5e-2)


@pytest.mark.parametrize(("B", "T"), [(1, 5), (3, 2)])
def test_overlapping_attention_of_a_few_tokens_reads_what_its_first_kernel_writes(B, T):
    H, HKV, D, L, count = 8, 2, 128, 700, 12
    torch.manual_seed(0)
    calls = [kernel_cases.attention(B, H, HKV, D, L, BF16, T=T, R=64, filled=600, padded=5)()[0] for _ in range(count)]
    # gate, norms, eps, offset, cosine and sine; position, mask and scale; keys and values
    layers, states = [(call[3:10], call[12:]) for call in calls], [t for call in calls for t in call[10:12]]
    inputs = torch.randn(B, T, H * D).to(BF16), weights(count, (H + 2 * HKV) * D, H * D, BF16), layers

    def chain(call, inputs, states):
        x, projections, layers = inputs
        for i, (w, (before, after)) in enumerate(zip(projections, layers, strict=True)):
            q, k, v = call("fused_linear", x, [w]).unflatten(-1, (-1, D)).split([H, HKV, HKV], 2)
            x = x + call("attention_decode", q, k, v, *before, *states[2 * i : 2 * i + 2], *after)
        return x

    check_overlap(chain, inputs, states, 5e-2)


def test_overlapping_experts_know_their_choices():
    """The last launch of a block reads them before it waits, and they are others in each block; their memory is handed out again.
    In float32, so that no rounding chooses other experts than the reference in float64."""
    H, E, k, width, count = 256, 24, 4, 64, 20
    torch.manual_seed(0)
    blocks = [kernel_cases.routed_experts(H, E, k, width, shared=width, gated=True, norm=True)()[0] for _ in range(count)]
    routers = weights(count, E, H)
    inputs = torch.randn(1, H), [(router, *block[2:-1]) for router, block in zip(routers, blocks, strict=True)]

    def chain(call, inputs, states):
        x, blocks = inputs
        for block in blocks:
            x = call("routed_experts", x, *block, x)
        return x

    check_overlap(chain, inputs, [], 1e-3)


@pytest.mark.parametrize("rows", [1, 2, 9, 40])
def test_overlapping_experts_of_given_choices_wait_for_each_other(rows):
    H, E, k, width, count = 256, 24, 4, 64, 6  # a block's result grows with the square of what it is given
    torch.manual_seed(0)
    blocks = [kernel_cases.chosen(rows, H, E, k, width, BF16, shared=width, gated=True)()[0] for _ in range(count)]
    inputs = (0.3 * torch.randn(rows, H)).to(BF16), weights(count, E, H, BF16), [block[1:-1] for block in blocks]

    def chain(call, inputs, states):
        x, routers, blocks = inputs
        for router, (indices, _, *block) in zip(routers, blocks, strict=True):
            weights, _ = call("route", x, router, k, True)
            x = call("experts", x, indices, weights, *block, x)
        return x

    check_overlap(chain, inputs, [], 1e-1)


def test_state_is_written_in_place_by_compiled_code():
    """Inductor must not copy the recurrent state: a second call needs less memory than one copy of it."""
    args, _ = kernel_cases.mixer(33, H, HV, K, V, dtype=BF16)()
    args = [v.cuda() if isinstance(v, torch.Tensor) else v for v in args]
    op = implementations()["mixer_decode"].op
    fast = torch.compile(lambda *a: op(*a), fullgraph=True)
    fast(*args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fast(*args)
    torch.cuda.synchronize()
    state = args[6]
    assert torch.cuda.max_memory_allocated() - before < state.numel() * state.element_size()


@pytest.mark.parametrize("rows", [33, 144, 1001, 4095])
@pytest.mark.parametrize("format", ["fp8_block128", "fp8_channel"])
def test_products_of_e4m3_are_torchs_on_hopper(rows, format):
    """If cuBLAS refused one, the kernel of this project would compute it, and all that follow."""
    if torch.cuda.get_device_capability() != fp8_linear.HOPPER:
        pytest.skip("cuBLAS multiplies blocks of e4m3 on Hopper alone")
    (x, x_scale, data, scale, *rest), _ = kernel_cases.fp8(256, 640, format, BF16, (rows,))()
    # Not rounded to bfloat16 too: of so many results some are between two of its numbers.
    wanted = kernel_cases.meaning("fp8_linear").reference(x, x_scale.double(), data, scale.double(), format, torch.float64)
    with kernel_cases.poisoned_empty():
        found = fp8_linear.launch(*(t.cuda() for t in (x, x_scale, data, scale)), *rest)
    assert kernel_cases.relative_error(found, wanted) <= kernel_cases.TOLERANCE[BF16]
    assert not fp8_linear._failed


if not torch.cuda.is_available():  # here, behind all parameters, so that these are evaluated without a GPU too
    pytest.skip("needs a CUDA device", allow_module_level=True)
