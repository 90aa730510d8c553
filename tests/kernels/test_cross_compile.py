"""Kernels compiled without a device, at the shapes of real models; registers and spills are read off the machine code.

`GDNFUSE_FUZZ=1 pytest tests/kernels/test_cross_compile.py` compiles all for every target, which takes a quarter of an hour.
"""

import os
import re
import subprocess
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from gdnfuse import formats
from gdnfuse.dialect import fused_linear
from gdnfuse.dialect.mixer_decode import layout, part_sizes
from gdnfuse.errors import Refused
from gdnfuse.kernels import (
    chunk_scan_hopper,
    devices,
    few_rows_hopper,
    few_rows_hopper_quantized,
    implementations,
    low_rank,
    one_shot_sum,
    quantized,
    skinny_linear,
    skinny_tensor_cores,
)
from gdnfuse.kernels.chunk_delta_rule import prepare_bytes, scan_bytes
from gdnfuse.kernels.devices import H200, Device
from gdnfuse.kernels.few_rows_linear import adapters_table
from gdnfuse.kernels.launch.implementation import POINTERS, launched_by
from gdnfuse.kernels.linear_configs import (
    FewRowsConfig,
    few_rows_config,
    low_rank_config,
    quantized_ring_config,
    ring_config,
    slots_at_once,
    split,
    tensor_cores_config,
)
from gdnfuse.kernels.one_shot_all_reduce import Home
from tests.sweeps import pairs

SWEEP = "GDNFUSE_FUZZ" in os.environ
TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 86, 89, 90, 100, 120)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KiB per program
CARDS = {
    target: Device(1024 * n, H200.multiprocessors, target.startswith("gfx"), target not in ("sm_80", "sm_86", "gfx942"))
    for target, n in SHARED.items()
}
SMALL = [target for target in CARDS if CARDS[target].shared_memory < 100 * 1024]
MAX_THREADS = 1024  # of a program
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
H, W = 16, 4
BF16, F32 = torch.bfloat16, torch.float32


def lora(sizes, N, ranks, dtype=torch.float32):
    """The last arguments of fused_linear: adapters of these ranks on projections with so many rows each."""
    adapters = fused_linear.example_adapters(sizes, N, ranks, dtype)
    A, B, *rest = adapters.values()
    return (None, "", None, *([t.to("meta") for t in of] for of in (A, B)), *rest)


def calls(B, HV, K=128, V=128, state_dtype=torch.float32):
    """Calls of every op at a model's decode shapes, as meta tensors: bf16 rows, parts in the order qkv, z, b, a.

    What stands behind an op's name in a key tells its calls apart. Several rows are as many as there are sequences, or two.
    """

    def of(*shape, dtype=BF16):
        return torch.empty(shape, dtype=dtype, device="meta")

    D, F = 2 * H * K + HV * V, HV * V
    row, state, gates = of(B, 1, D + F + 2 * HV), of(B, HV, K, V, dtype=state_dtype), (of(HV), of(HV))
    a, b = row.narrow(-1, D + F + HV, HV), row.narrow(-1, D + F, HV)
    z = row.narrow(-1, D, F).unflatten(-1, (HV, V))
    conv, qkv = (of(B, D, W), of(D, 1, W), None), of(B, 1, D, dtype=torch.float32)
    many, rows = of(B, 1000, D + F + 2 * HV), max(B, 2)
    q, k, v = many[..., : H * K], many[..., H * K : 2 * H * K], many[..., 2 * H * K : D]
    many_heads = (q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (HV, V)))
    many_gates = (many[..., D + F + HV :], many[..., D + F : D + F + HV])
    (*side_by_side, _), (*head_by_head, _) = (layout(order, H, HV, K, V) for order in ("qkvzba", "qkvz,ba"))
    _, widths = part_sizes(D, state)
    heads = (of(B, 7, H, K), of(B, 7, H, K), of(B, 7, HV, V), of(B, 7, HV), of(B, 7, HV))
    norm = of(2560), 1e-6, 1.0
    in_proj = (of(1, 1, 2560), [of(D + F + 2 * HV, 2560)], *norm, of(1, D, W), of(D, 1, W), None, 0, "silu")
    plain = (None, 0.0, 0.0, None, False, None, "silu")
    return {
        "attention_decode": (
            of(B, 1, 16, 512)[..., :256],
            of(B, 1, 4, 256),
            of(B, 1, 4, 256),
            of(B, 1, 16, 512)[..., 256:],
            of(256),
            of(256),
            1e-6,
            1.0,
            of(1, 1, 64),
            of(1, 1, 64),
            of(B, 4, 4096, 256),
            of(B, 4, 4096, 256),
            of(1, dtype=torch.int64),
            of(B, 1, 1, 4096, dtype=torch.bool),
            1 / 16,
        ),
        "attention_decode of five": (
            *(of(B, 5, 16, 512)[..., :256], of(B, 5, 4, 256), of(B, 5, 4, 256), of(B, 5, 16, 512)[..., 256:]),
            *(of(256), of(256), 1e-6, 1.0, of(1, 5, 64), of(1, 5, 64), of(B, 4, 4096, 256), of(B, 4, 4096, 256)),
            *(of(5, dtype=torch.int64), of(B, 1, 5, 4096, dtype=torch.bool), 1 / 16),
        ),
        "attention_growing": (
            of(B, 1, 16, 512)[..., :256],
            of(B, 1, 4, 256),
            of(B, 1, 4, 256),
            of(B, 1, 16, 512)[..., 256:],
            of(256),
            of(256),
            1e-6,
            1.0,
            of(1, 1, 64),
            of(1, 1, 64),
            of(B, 4, 5000, 256),
            of(B, 4, 5000, 256),
            of(B, 1, 1, 5001, dtype=torch.bool),
            1 / 16,
        ),
        "attention_few_queries": (
            of(B, 16, 1, 256),
            of(B, 4, 5001, 256),
            of(B, 4, 5001, 256),
            of(B, 1, 16, 512)[..., 256:],
            of(B, 1, 1, 5001, dtype=torch.bool),
            1 / 16,
        ),
        "attention_few_queries of five": (
            of(B, 16, 5, 256),
            of(B, 4, 5001, 256),
            of(B, 4, 5001, 256),
            of(B, 5, 16, 512)[..., 256:],
            of(B, 1, 5, 5001, dtype=torch.bool),
            1 / 16,
        ),
        "prompt_attention": (
            of(B, 5000, 16, 256).transpose(1, 2),
            of(B, 4, 8192, 256),
            of(B, 4, 8192, 256),
            of(5000, dtype=torch.int64),
            None,
            1 / 16,
        ),
        "prompt_attention with padding": (
            of(B, 5000, 16, 256).transpose(1, 2),
            of(B, 4, 5000, 256),
            of(B, 4, 5000, 256),
            of(5000, dtype=torch.int64),
            of(B, 5000, dtype=torch.bool),
            1 / 16,
        ),
        "causal_conv": (many[..., :D].mT, of(D, W), None, "silu"),
        "causal_conv_record": (
            *(many[:, :5, :D].mT, of(D, W), None, "silu", of(B, D, W), *(x[:, :5] for x in many_gates)),
            *(of(B, W + 8, D), of(B, 8, HV), of(B, 8, HV)),
        ),
        "chunk_delta_rule": (
            *many_heads,
            of(B, 1000, HV, dtype=torch.float32),
            many_gates[1],
            state,
            K**-0.5,
            1e-6,
            None,
            0,
            1.0,
        ),
        "fused_gating_chunk_delta_rule": (*many_heads, *many_gates, *gates, state, K**-0.5, 1e-6),
        "causal_conv_update": (row.narrow(-1, 0, D).transpose(1, 2), *conv, "silu"),
        "fused_gating_delta_rule": (*heads, *gates, state, K**-0.5, 1e-6),
        "delta_rule_verify": (*(x[:, :5] for x in heads), *gates, state, K**-0.5, 1e-6),
        "delta_rule_slots": (
            *(*(x[:, :5] for x in heads), *gates, of(5 * B, HV, K, V, dtype=state_dtype), of(B, 5, dtype=torch.int32)),
            *(of(B, dtype=torch.int32), K**-0.5, 1e-6),
        ),
        "delta_rule_commit": (
            *(of(24, B, W + 5, D), of(24, B, 5, HV), of(24, B, 5, HV), of(B, dtype=torch.int32), of(24, D, W)),
            *(of(24, HV), of(24, HV), of(24, B, D, W), of(24, B, HV, K, V, dtype=state_dtype), 1e-6),
        ),
        "packed_decode": (qkv, a, b, *gates, state, K**-0.5, 1e-6),
        "gated_rms_norm": (of(B, 1, HV, V, dtype=torch.float32), z, of(V), 1e-6),
        "fused_linear": (of(1, 1, 2560), [of(18432, 2560)], of(2560), 1e-6, 1.0, None, True, of(1, 1, 9216)),
        "fused_linear with adapters": (
            *(of(1, 1, 2560), [of(18432, 2560)], of(2560), 1e-6, 1.0, None, True, None, "silu", None, "", None),
            *([of(144, 2560)], [of(18432, 8), of(18432, 64)]),
            [n for i in (0, 1) for r, k in ((0, 8), (16, 64)) for n in (9216 * i, 9216, r + k * i, int(k == 64), 9216 * i)],
            [1.0, 2.0, 1.0, 2.0],
        ),
        "in_proj_conv": in_proj,
        "in_proj_conv head by head": (
            *in_proj,
            [*chain.from_iterable(zip(*head_by_head, widths, strict=True))],
            H,
        ),
        "mixer_decode": (row, *conv, *gates, state, of(V), *side_by_side, "silu", K**-0.5, 1e-6, 1e-6),
        "mixer_decode head by head": (row, *conv, *gates, state, of(V), *head_by_head, "silu", K**-0.5, 1e-6, 1e-6, 2.0),
        "fused_linear of rows": (of(rows, 1, 2560), [of(12352, 2560)]),
        "fused_linear of rows and swiglu": (of(rows, 1, 2560), [of(18432, 2560)], None, 0.0, 0.0, None, True),
        "fused_linear of rows with adapters": (
            *(of(rows, 1, 2560), [of(D + F + 2 * HV, 2560)], *plain, *lora([D, F, HV, HV], 2560, (16, 16))),
        ),
        "split_linear": (of(rows, 1, F), [of(2560, F)], split(2560, F, rows)),
        "add_rms_norm": (of(rows, 1, 2560), of(rows, 1, 2560), of(2560), 1e-6, 1.0),
        "add_rms_norm of parts": (of(7, rows, 1, 5120, dtype=torch.float32), of(rows, 1, 5120), of(5120), 1e-6, 1.0),
    }


LAUNCHES = {
    "fused_linear with adapters": 2,
    "fused_linear of rows with adapters": 2,
    "attention_decode": 2,
    "attention_decode of five": 3,
    "attention_growing": 2,
    "attention_few_queries": 2,
    "mixer_decode": 2,
}
MODELS = {"4B": (1, 32), "4B-batched": (32, 32), "27B": (2, 48)}
OTHERS = ("sm_80", "sm_100", "gfx942")
# Every op at the shapes of one model in turn, for sm_90, where nothing may spill, and for one of the others.
CASES = [
    (model, op, target)
    for i, op in enumerate(calls(1, 32))
    for target in TARGETS
    for k, model in enumerate(MODELS)
    if SWEEP or (i + k) % len(MODELS) == 0 and target in ("sm_90", OTHERS[(i + i // len(MODELS)) % len(OTHERS)])
]


def compile_for(target, spec):
    if target == "gfx942" and spec.constexprs.get("PRECISION") == "tf32x3":
        spec.constexprs["PRECISION"] = "ieee"  # what the launch takes there
    source = GluonASTSource if spec.kernel.is_gluon() else ASTSource
    source = source(spec.kernel, spec.signature, spec.constexprs, spec.attrs)
    return triton.compile(source, target=TARGETS[target], options=spec.options)


@pytest.fixture
def on(monkeypatch):
    """Makes the device one of CARDS."""
    return lambda target: monkeypatch.setattr(devices, "of", lambda device: CARDS[target])


def supported(op, *args, **kwargs):
    """What a call launches, which is supported."""
    implementation = implementations()[op.split()[0]]
    implementation.supports(*args, **kwargs)
    return implementation.jit_kernels(*args, **kwargs)


def resources(cubin, tmp_path):
    """REG, STACK, LOCAL and so on of a cubin's kernel."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}


# Bytes on the stack on sm_90, by Triton's version. The rule is faster with them; for the others that was not measured.
ON_STACK = {
    (3, 6): {"fused_gating_delta_rule 4B-batched": 136, "fused_gating_delta_rule 27B": 136},
    (3, 8): {"attention_few_queries 4B-batched": 64, "gate 5120 × 6144": 376},
}


def stack(what):
    return ON_STACK.get(TRITON, {}).get(what, 0)


@pytest.mark.parametrize(
    *pairs(target=["sm_80", "sm_90", "sm_100"], rows=[1, 8], norm=[False, True], parts=[1, 3], ranks=[2, 8], dtype=[BF16, F32])
)
def test_a_small_sum_over_ranks_compiles(target, rows, norm, parts, ranks, dtype, monkeypatch, tmp_path):
    """A thread waits for each of its words once: a compiler that wants them in another order too must not wait for them again."""
    of = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    monkeypatch.setattr(one_shot_sum, "overlap_options", lambda x: {"launch_pdl": True} if target != "sm_80" else {})
    home = Home(of(16, dtype=torch.int64), 1, ranks)
    N = 5120 if dtype == BF16 else 4096
    x = of(rows, 1, N) if parts == 1 else of(parts, rows, 1, N, dtype=F32)
    (spec,) = launched_by(one_shot_sum.launch, x, of(rows, 1, N), of(N) if norm else None, 1e-6, 1.0, home)
    kernel = compile_for(target, spec)
    threads, turns = 32 * kernel.metadata.num_warps, spec.constexprs["TURNS"]
    words = max(spec.constexprs["BLOCK"] // threads, 1) * (ranks - 1) * turns
    ptx = kernel.asm["ptx"]
    assert ptx.count("ld.relaxed.sys.global.v2.b64") == ptx.count("st.relaxed.sys.global.v2.b64") == words
    usage = resources(kernel.asm["cubin"], tmp_path)
    assert threads * usage["REG"] <= 2**16, usage
    assert usage["STACK"] <= (0 if ranks == 2 else 128) and usage["LOCAL"] == 0, usage  # seven addresses a word


@pytest.mark.parametrize(("model", "op", "target"), CASES, ids=["-".join(c) for c in CASES])
def test_compiles(model, op, target, on, tmp_path, record_property):
    on(target)
    kernels = [compile_for(target, spec) for spec in supported(op, *calls(*MODELS[model])[op])]
    assert len(kernels) == LAUNCHES.get(op, LAUNCHES.get(op.split()[0], 2 if "chunk" in op else 1))
    few_rows = [kernel.metadata.name == "few_rows_linear_kernel" for kernel in kernels]
    assert any(few_rows) == (op == "split_linear" or op.startswith("fused_linear of rows"))
    for kernel in kernels:
        assert kernel.metadata.shared <= CARDS[target].shared_memory
        assert kernel.metadata.num_warps * TARGETS[target].warp_size <= MAX_THREADS
        if target == "gfx942":
            assert kernel.asm["hsaco"]
            continue
        usage = resources(kernel.asm["cubin"], tmp_path)
        record_property(f"{kernel.metadata.name} on {target}", str(usage))
        assert usage["REG"] > 0
        if target == "sm_90":
            on_stack = stack(f"{op} {model}") if kernel.metadata.name in ("attention_split_kernel", "delta_rule_kernel") else 0
            assert (usage["STACK"], usage["LOCAL"]) == (on_stack, 0), f"{kernel.metadata.name} spills: {usage}"


def linear_of(rows, n, swiglu=False):
    of = lambda *shape: torch.empty(shape, dtype=BF16, device="meta")  # noqa: E731
    return (of(rows, 1, n), [of(12352, n)], None, 0.0, 0.0, None, swiglu)


def split_of(rows, n):
    of = lambda *shape: torch.empty(shape, dtype=BF16, device="meta")  # noqa: E731
    return (of(rows, 1, n), [of(2560, n)], split(2560, n, rows))


def chunks_of(K, V=128):
    of = lambda *shape: torch.empty(shape, dtype=BF16, device="meta")  # noqa: E731
    q, v, gate = of(1, 1000, H, K), of(1, 1000, 32, V), of(1, 1000, 32)
    return (q, q, v, gate, gate, None, K**-0.5, 1e-6, None, 0, 1.0)


# What takes most shared memory, by op, and how many stages fit 99 and 64 KiB.
TIGHT = {
    "fused_linear of 2 rows": (linear_of(2, 2560), 3, 2),
    "fused_linear of 2 rows and swiglu": (linear_of(2, 2560, True), 4, 4),
    "fused_linear of 16 rows": (linear_of(16, 2560), 3, 3),
    "fused_linear of 32 rows": (linear_of(32, 2560), 3, 3),
    "fused_linear of 32 rows and swiglu": (linear_of(32, 2560, True), 4, 3),
    "split_linear of 2 rows": (split_of(2, 9216), 3, 2),
    "split_linear of 32 rows": (split_of(32, 9216), 3, 3),
    "chunk_delta_rule of 64": (chunks_of(64, 64), 3, 2),
    "chunk_delta_rule of 128": (chunks_of(128), 3, 2),
    "chunk_delta_rule of 256": (chunks_of(256), 1, 1),
}
BY_DEFAULT = [
    *(("fused_linear of 2 rows", target) for target in ("sm_89", "gfx942")),
    ("split_linear of 2 rows", "sm_120"),
    ("fused_linear of 32 rows and swiglu", "gfx942"),
    ("chunk_delta_rule of 128", "sm_86"),
]


@pytest.mark.parametrize(("op", "target"), [(op, t) for op in TIGHT for t in SMALL] if SWEEP else BY_DEFAULT)
def test_there_are_as_many_stages_as_a_card_has_shared_memory_for(op, target, on):
    """The formulas by which they are counted are at least what is compiled; with one stage more it would not fit, where that was
    the reason to take fewer."""
    card, (args, *stages) = CARDS[target], TIGHT[op]
    wanted = implementations()[op.split()[0]].jit_kernels(*args)[-1].constexprs["STAGES"]
    on(target)
    specs = supported(op, *args)
    chosen = specs[-1].constexprs["STAGES"]
    assert chosen == stages[card.amd] <= wanted
    for spec in specs:
        needed, shared = needs(spec, card.amd), compile_for(target, spec).metadata.shared
        assert shared <= needed <= card.shared_memory
    if chosen < wanted:
        more = replace(specs[-1], constexprs={**specs[-1].constexprs, "STAGES": chosen + 1})
        assert compile_for(target, more).metadata.shared > card.shared_memory


def needs(spec, amd):
    """By the formula beside the kernel's configs."""
    c = spec.constexprs
    if spec.kernel.__name__ == "few_rows_linear_kernel":
        return FewRowsConfig(c["BM"], c["BK"], 4, c["STAGES"], 1, c["EARLY"]).shared_memory(c["BB"], 2)
    if spec.kernel.__name__ == "chunk_prepare_kernel":
        return prepare_bytes(c["BK"], amd)
    return scan_bytes(c["BK"], c["BV"], c["STAGES"], amd)


FP8 = {"4B's in_proj": (12288, 2560, "fp8_block128"), "a row's scale": (1000, 384, "fp8_channel"), "one": (72, 128, "fp8_tensor")}
FP8_TARGETS = {"4B's in_proj": ("sm_89", "sm_90", "sm_100", "sm_120"), "a row's scale": ("sm_89",), "one": ("sm_90",)}


def fp8_call(M, N, format):
    scales = {"fp8_block128": (-(-M // 128), N // 128), "fp8_channel": (M, 1), "fp8_tensor": ()}
    of = lambda dtype, *shape: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    e4m3, groups = torch.float8_e4m3fn, N // 128 if format == "fp8_block128" else 1
    return of(e4m3, 1, 1000, N), of(F32, groups, 1000), of(e4m3, M, N), of(F32, *scales[format]), format, BF16


@pytest.mark.parametrize(("what", "target"), [(what, t) for what in FP8 for t in FP8_TARGETS[what]])
def test_a_product_of_e4m3_compiles_to_tensor_cores_for_it(what, target, on, tmp_path):
    on(target)
    (spec,) = supported("fp8_linear", *fp8_call(*FP8[what]))
    kernel = compile_for(target, spec)
    assert kernel.metadata.shared <= CARDS[target].shared_memory
    instruction = {"sm_90": "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3", "sm_100": "tcgen05.mma"}
    assert instruction.get(target, "e4m3.e4m3.f32") in kernel.asm["ptx"]
    assert resources(kernel.asm["cubin"], tmp_path)["LOCAL"] == 0


@pytest.mark.parametrize(("target", "found"), [("sm_80", "an older GPU"), ("sm_86", "an older GPU"), ("gfx942", "a GPU of AMD")])
def test_a_product_of_e4m3_is_refused_where_tensor_cores_have_none(target, found, on):
    on(target)
    with pytest.raises(Refused, match=f"^Tensor cores must multiply e4m3.* found {found}"):
        supported("fp8_linear", *fp8_call(*FP8["one"]))


WIDER = [(torch.float16, "gfx942"), (torch.float32, "sm_90")]


@pytest.mark.parametrize(
    ("dtype", "target"), [(d, t) for d in (torch.float16, torch.float32) for t in TARGETS] if SWEEP else WIDER, ids=str
)
def test_the_chunked_rule_compiles_for_wider_operands(dtype, target, on):
    """They are slow and may spill; K = V = 32 keeps the test short."""
    on(target)
    of = lambda *shape: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    K = V = 128 if SWEEP else 32
    q, v, gate = of(1, 70, 2, K), of(1, 70, 4, V), of(1, 70, 4)
    every = {"cu_seqlens": torch.empty(3, dtype=torch.int32, device="meta")}
    kernels = [compile_for(target, spec) for spec in supported("chunk_delta_rule", q, q, v, gate, gate, None, 0.1, None, **every)]
    assert [kernel.metadata.name for kernel in kernels] == ["chunk_prepare_kernel", "chunk_scan_kernel"]
    assert all(kernel.metadata.shared <= CARDS[target].shared_memory for kernel in kernels)


SPILLS = pytest.mark.xfail(
    TRITON >= (3, 9),
    strict=True,
    reason="Triton 3.9 keeps 8 or 56 bytes on the stack; what that costs was not measured.",
)


@pytest.mark.parametrize(
    ("columns", "slots", "varlen", "checkpoints"),
    [
        pytest.param(64, 3, False, False, marks=pytest.mark.sweep),
        pytest.param(64, 3, False, True, marks=SPILLS),
        pytest.param(64, 3, True, False, marks=[SPILLS, pytest.mark.sweep]),
        (128, 2, False, False),
        pytest.param(128, 2, False, True, marks=pytest.mark.sweep),
    ],
)
def test_the_hopper_scan_does_not_spill(columns, slots, varlen, checkpoints, tmp_path, record_property):
    """The configurations that are chosen, for the heads of a 4B model."""
    kernel = chunk_scan_hopper.chunk_scan_hopper_kernel
    tile, factors = chunk_scan_hopper.TILE_4D.value, chunk_scan_hopper.FACTORS_4D.value
    constexprs = {"H": H, "HV": 32, "BV": columns, "STAGES": slots, "VARLEN": varlen, "num_warps": columns // 16}
    constexprs["stride_sv"] = 1
    if not varlen:
        constexprs["cu_seqlens_ptr"] = None
    signature = dict.fromkeys(kernel.arg_names, "i32")
    if not checkpoints:
        constexprs["checkpoint_ptr"] = None
    pointers = {"out_ptr": "*bf16", "cu_seqlens_ptr": "*i64"}
    pointers |= dict.fromkeys(("factors_ptr", "state_ptr", "last_ptr", "checkpoint_ptr"), "*fp32")
    squares = ("q_desc", "k_desc", "inverse_desc", "attention_desc")
    signature |= pointers | dict.fromkeys(squares, f"tensordesc<bf16[1, 1, 64, 64],{tile!r}>")
    signature |= dict.fromkeys(("v_desc", "out_desc"), f"tensordesc<bf16[1, 1, 64, {columns}],{tile!r}>")
    signature["factors_desc"] = f"tensordesc<fp32[1, 1, 4, 64],{factors!r}>"
    signature |= dict.fromkeys(constexprs, "constexpr")
    aligned = (*pointers, "stride_sb", "stride_sh", "stride_sk")
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    source = GluonASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=TARGETS["sm_90"], options={"num_warps": columns // 16})
    usage = resources(compiled.asm["cubin"], tmp_path)
    record_property("resources", str(usage))
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0), f"{usage}"
    assert compiled.metadata.shared <= CARDS["sm_90"].shared_memory


# SwiGLU or not × M × N × parts of the columns, of a few rows: one, two and three tiles, with and without parts, and a short ring.
RINGS = [
    *((False, *size, 1) for size in ((8224, 1024), (12352, 2560), (25000, 5120))),
    *((True, *size, 1) for size in ((3584, 1024), (9216, 2560))),
    *((False, *size) for size in ((2560, 4096, 4), (256, 256, 2))),
]


# Some of them with adapters: of one rank on up to four projections, and of several ranks.
RINGS = [(*ring, (), F32, rows) for ring in RINGS for rows in (8, 32)]
RINGS += [(*ring[:4], *more) for ring, *more in [(RINGS[2], (16,), BF16, 8), (RINGS[2], (32, 8, 16), F32, 32),
    (RINGS[8], (16,), BF16, 8), (RINGS[8], (16,), F32, 32), (RINGS[10], (8, 64), F32, 8)]]  # fmt: skip


@pytest.mark.parametrize(("swiglu", "m", "n", "parts", "ranks", "dtype", "rows"), RINGS)
def test_the_ring_of_weights_is_full_before_the_wait_and_nothing_spills(
    swiglu, m, n, parts, ranks, dtype, rows, tmp_path, record_property
):
    kernel, chosen = few_rows_hopper.few_rows_hopper_kernel, ring_config(m, n, swiglu, parts, 0 if ranks else rows)
    tiles, _, stages, _ = chosen
    constexprs = {"SWIGLU": swiglu, "TILES": tiles, "BB": rows, "STAGES": stages, "OVERLAP": True}
    pointers = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*fp32" if parts > 1 else "*bf16"}
    constexprs |= {"ADAPTERS": None, "SLOTS": 1, "NUMBERS": 1, "low_ptr": None, **{f"b{i}_ptr": None for i in range(4)}}
    if ranks:
        sizes = [m, m] if swiglu else [m] if parts > 1 else [8192, m - 8192 - 64, 32, 32]
        *_, B, where, scaling = lora(sizes, n, ranks)
        low = {"low_ptr": "*fp32", **{f"b{i}_ptr": POINTERS[dtype] for i in range(len(B))}}
        constexprs = {name: x for name, x in constexprs.items() if name not in low}
        pointers |= low
        adapters, numbers = few_rows_hopper.adapter_slots(adapters_table(B, where, scaling)), few_rows_hopper.NUMBERS[dtype]
        constexprs |= {"ADAPTERS": adapters, "SLOTS": slots_at_once(chosen, rows, len(adapters), numbers), "NUMBERS": numbers}
    signature = dict.fromkeys(kernel.arg_names, "i32") | pointers | dict.fromkeys(constexprs, "constexpr")
    aligned = (*pointers, "stride_xb", "stride_wm")
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    source = GluonASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=TARGETS["sm_90"], options={"num_warps": 4, "launch_pdl": True})
    usage = resources(compiled.asm["cubin"], tmp_path)
    record_property("resources", str(usage))
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0), f"{usage}"
    assert compiled.metadata.shared <= CARDS["sm_90"].shared_memory
    # A slot is written anew only once all warps have read it: each passes the barrier behind its products of the step before.
    steps = re.sub(r"//.*", "", compiled.asm["ptx"]).split("cp.async.wait_group")
    assert len(steps) == 3 and re.match(r"\s+\d+;\s*bar\.sync\s+0;", steps[1])
    copies = re.findall(r"cp\.async\.c[ag]\S*", before_the_wait(compiled))
    # 16 bytes by each of 128 threads, of tiles of 64 rows and 128 columns, two bytes each.
    assert copies == ["cp.async.cg.shared.global"] * (8 * tiles * (stages - 1))


@pytest.mark.parametrize("rows", [8, 32])
@pytest.mark.parametrize(("swiglu", "m", "n", "parts", "plain"), [(False, 12288, 2560, 1, True), (True, 17408, 5120, 1, False),
    (False, 2560, 9216, 8, False)])  # fmt: skip
def test_the_ring_of_quantised_weights_is_full_before_the_wait_and_nothing_spills(swiglu, m, n, parts, plain, rows, tmp_path):
    kernel, chosen = few_rows_hopper_quantized.few_rows_hopper_quantized_kernel, quantized_ring_config(m, n, rows, swiglu, parts)
    constexprs = {"SWIGLU": swiglu, "TILES": chosen.tiles, "BB": rows, "STAGES": chosen.stages, "PLAIN_STAGES": 3, "ROWS": 128}
    constexprs |= {"OVERLAP": True} | ({} if plain else {"plain_ptr": None})
    pointers = {"x_ptr": "*bf16", "weight_ptr": "*u8", "scale_ptr": "*fp32", "out_ptr": "*fp32" if parts > 1 else "*bf16"}
    pointers |= {"plain_ptr": "*bf16"} if plain else {}
    signature = dict.fromkeys(kernel.arg_names, "i32") | pointers | dict.fromkeys(constexprs, "constexpr")
    aligned = (*pointers, "stride_xb", "stride_wm", "stride_pm")
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    source = GluonASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=TARGETS["sm_90"], options={"num_warps": 4, "launch_pdl": True})
    usage = resources(compiled.asm["cubin"], tmp_path)
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0), f"{usage}"
    # Three programs are on a multiprocessor, by registers too.
    assert 3 * compiled.metadata.shared <= CARDS["sm_90"].shared_memory and 3 * 128 * usage["REG"] <= 65536
    # A slot is written anew only once all warps have read it: each passes the barrier behind its reads of the step before.
    waits = re.findall(r"cp\.async\.wait_group\s+[1-9];\s*(\S+)", re.sub(r"//.*", "", compiled.asm["ptx"]))
    assert waits == ["bar.sync"] * (1 + plain)
    early, *_ = compiled.asm["ptx"].split("griddepcontrol.wait")
    assert early.count("cp.async.cg.shared.global") == 4 * (chosen.stages - 1)  # 16 bytes by each of 128 threads


def on_hopper(op, *args, **options):
    """The kernels that a call launches, compiled as they are launched where they overlap those before them."""
    specs = implementations()[op].jit_kernels(*args, **options)
    for spec in specs:
        spec.constexprs.update({name: True for name in ("OVERLAP", "ANNOUNCE") if name in spec.constexprs})
    return [compile_for("sm_90", replace(spec, options={**spec.options, "launch_pdl": True})) for spec in specs]


def before_the_wait(kernel):
    """The PTX of a kernel up to its one wait for the kernel before it, that it starts with letting the next one start."""
    ptx = kernel.asm["ptx"]
    assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch_dependents") == 1
    before, _, behind = ptx.partition("griddepcontrol.wait")
    assert "griddepcontrol.launch_dependents" in before
    assert "st.global" not in before and "st.global" in behind
    return before


@pytest.mark.parametrize(
    ("R", "n", "rows", "dtype", "at_once"), [(16, 9216, 8, BF16, 5), (64, 2560, 8, F32, 6), (512, 17408, 32, BF16, 4)]
)
def test_the_A_of_adapters_are_read_before_the_wait(R, n, rows, dtype, at_once, tmp_path):
    """16 bytes at once. So are x, many loads before the first product. Threads add up what they have, and meet once."""
    of = lambda dtype, *shape: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    (spec,) = launched_by(low_rank.launch, of(BF16, rows, n), of(dtype, R, n))
    spec.constexprs["OVERLAP"] = True
    kernel = compile_for("sm_90", replace(spec, options={**spec.options, "launch_pdl": True, "maxnreg": low_rank.REGISTERS}))
    usage = resources(kernel.asm["cubin"], tmp_path)
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0), f"{usage}"
    text = subprocess.run([CUOBJDUMP, "-sass", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    assert text.partition("ACQBULK")[2].partition("FFMA")[0].count("LDG.E.128") >= at_once
    assert set(re.findall(r"ld\.global\S*", kernel.asm["ptx"])) == {"ld.global.v4.b32"}
    chosen = low_rank_config(R, n, rows, dtype, BF16)
    loads = before_the_wait(kernel).count("ld.global")
    assert loads == chosen.ahead * chosen.R * dtype.itemsize // 2
    assert chosen.ahead * chosen.BN >= n or R > 64
    assert kernel.asm["ptx"].count("bar.sync") <= 4


# The linears of a decode step of the 0.8B, 4B, 9B and 27B models, and the widest, kind × M × N.
LINEARS = [
    *(("conv", *size) for size in ((8224, 1024), (12352, 2560), (12352, 4096), (16480, 5120))),
    *(("norm", *size) for size in ((10240, 2560), (248320, 1024), (248320, 2560), (248320, 4096))),
    *(("gate", *size) for size in ((1024, 2048), (2560, 4096), (4096, 4096), (5120, 6144))),
    *(("swiglu", *size) for size in ((7168, 1024), (18432, 2560), (24576, 4096), (34816, 5120))),
    *(("plain", *size) for size in ((1024, 3584), (2560, 9216), (4096, 12288), (5120, 17408), (64, 32768))),
]


# Of each kind one size or two in bfloat16, and one in each of the other dtypes.
OF_DTYPES = [
    (*size, dtype)
    for i, size in enumerate(LINEARS)
    for j, dtype in enumerate([BF16, torch.float16, torch.float32])
    if SWEEP or i % 4 == (3, 0, 2)[j]
]


@pytest.mark.parametrize(("kind", "m", "n", "dtype"), OF_DTYPES, ids=str)
def test_linears_read_16_bytes_at_once_and_do_not_spill(kind, m, n, dtype, tmp_path, record_property):
    """As they are launched on Hopper: weights are read before the wait."""
    of = lambda *shape: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    x, weight = of(1, 1, n), of(m, n)
    norm = {"norm_weight": of(n), "norm_eps": 1e-6, "norm_offset": 1.0}
    if kind == "conv":
        args, options = (x, [weight], of(n), 1e-6, 1.0, of(1, m // 2, 4), of(m // 2, 1, 4), None, 0, "silu"), {}
    else:
        args = (x, [weight])
        options = {
            "plain": {"residual": of(1, 1, m)},
            "norm": norm,
            "swiglu": norm | {"swiglu": True},
            "gate": {"norm_weight": of(128), "norm_eps": 1e-6, "gate": of(1, 1, n)},
        }[kind]
    op = "in_proj_conv" if kind == "conv" else "fused_linear"
    if kind == "gate":
        args[0].data = torch.empty_like(x, dtype=torch.float32)
    (kernel,) = on_hopper(op, *args, **options)
    usage = resources(kernel.asm["cubin"], tmp_path)
    record_property("resources", str(usage))
    assert (usage["STACK"], usage["LOCAL"]) == (stack(f"{kind} {m} × {n}"), 0), f"{usage}"
    loads = re.findall(r"ld\.global\S*", before_the_wait(kernel))
    assert loads[0] == "ld.global.v4.b32" and loads.count(loads[0]) >= len(loads) / 2


def quantised(kind, m, n, rows=1, format="fp8_block128"):
    """A linear of a decode step whose weight is quantised, and the last rows of an in_proj's are not: op, args, options."""
    of = lambda *shape, dtype=BF16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    behind = m % 128 if kind == "conv" else 0
    quantised, scale, *zeros = formats.named(format).quantize(of(m - behind, n))
    weights, stored = [quantised, *([of(behind, n)] if behind else [])], {"scales": [scale], "format": format}
    stored |= {"zeros": zeros} if zeros else {}
    if kind == "conv" and rows == 1:
        return (
            "in_proj_conv",
            (of(1, 1, n), weights, of(n), 1e-6, 1.0, of(1, m // 2, 4), of(m // 2, 1, 4), None, 0, "silu"),
            stored,
        )
    x, norm = of(rows, 1, n), {"norm_weight": of(n), "norm_eps": 1e-6, "norm_offset": 1.0}
    options = {"plain": {"residual": of(1, 1, m)}, "norm": norm, "swiglu": norm | {"swiglu": True}, "conv": {}}.get(kind)
    if kind == "gate":
        x, options = x.float(), {"norm_weight": of(128), "norm_eps": 1e-6, "gate": of(1, 1, n), "residual": of(1, 1, m)}
    if rows > 1:
        options = {"swiglu": kind == "swiglu"}
    return "fused_linear", (x, weights), options | stored


QUANTISED = [size for size in LINEARS if size[2] in (2560, 5120) and size[1] < 2**16] + [
    ("gate", 2560, 4096),
    ("plain", 2560, 9216),
]


OF_FORMATS = [
    (*size, format)
    for i, size in enumerate(QUANTISED)
    for j, format in enumerate(["fp8_block128", "int8_channel", "int4_group128"])
    if (SWEEP and (j != 1 or size[2] != 5120)) or (i + j) % 3 == 0
]
OF_FORMATS += [(*size, "int4_group128_zero") for size in QUANTISED if size[0] == "swiglu" and size[2] == 2560]
OF_FORMATS += [(*size, "nf4_block64") for i, size in enumerate(QUANTISED) if SWEEP or i == 0]


@pytest.mark.parametrize(("kind", "m", "n", "format"), OF_FORMATS)
def test_quantised_linears_read_as_much_at_once_and_do_not_spill(kind, m, n, format, tmp_path, record_property):
    op, args, options = quantised(kind, m, n, format=format)
    (kernel,) = on_hopper(op, *args, **options)
    usage = resources(kernel.asm["cubin"], tmp_path)
    record_property("resources", str(usage))
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0), f"{usage}"
    if m % 128:  # the rows behind have programs of their own, which wait for themselves
        op, args, options = quantised(kind, m - m % 128, n, format=format)
        (kernel,) = on_hopper(op, *args, **options)
    wide = re.findall(r"ld\.global\S*\.v[24]\.b32", before_the_wait(kernel))
    config = skinny_linear.config_of(kind, args[1][0], format)
    assert len(wide) >= config[0] * n * (2 if kind == "swiglu" else 1) / (32 * config[2] * config[4])


TENSOR_CORES = [
    (*size, target, "fp8_block128")
    for i, size in enumerate(size for size in QUANTISED if size[0] != "plain")
    for target in ("sm_89", "sm_90", "sm_100", "sm_120")
    if SWEEP or i in (1, 2, 4, 5) and target == ("sm_90", "sm_89")[i % 2]
]
TENSOR_CORES += [
    (*size, target, format)
    for i, size in enumerate(QUANTISED)
    for j, format in enumerate(["int4_group128", "int4_group128_zero", "int4_group32", "nf4_block64"])
    for target in ("sm_80", "sm_90", "sm_100")
    if (SWEEP or size[2] != 5120 and (j == 0 or size[0] == "swiglu") and target == ("sm_80" if j == 2 else "sm_90"))
    and tensor_cores_config(size[0], size[2], quantized.stored(format).kind)
]


@pytest.mark.parametrize(("kind", "m", "n", "target", "format"), TENSOR_CORES)
def test_tensor_cores_take_weights_as_they_were_loaded(kind, m, n, target, format, tmp_path, monkeypatch, record_property):
    monkeypatch.setattr(skinny_tensor_cores, "supports_here", lambda *args: True)
    op, args, options = quantised(kind, m, n, format=format)
    (spec,) = implementations()[op].jit_kernels(*args, **options)
    overlaps = target in ("sm_90", "sm_100", "sm_120")
    spec.constexprs["OVERLAP"] = overlaps
    kernel = compile_for(target, replace(spec, options=spec.options | ({"launch_pdl": True} if overlaps else {})))
    usage = resources(kernel.asm["cubin"], tmp_path)
    record_property("resources", str(usage))
    small = 8 if (kind, format) == ("gate", "int4_group32") else 0  # bytes of the stack with some versions of Triton
    assert usage["STACK"] <= small and usage["LOCAL"] == 0, f"{usage}"
    # Shared memory has the row alone, in float16 once or twice, its sums for int4, and what warps add up: no weight passes
    # through it.
    warps, halves, packed = spec.options["num_warps"], spec.constexprs["HALVES"], spec.constexprs["PACKED"]
    columns = -(-n // (128 * packed * warps)) * 128 * packed * warps
    sums = (columns // 32 if "32" in format else columns // 128) if "int4" in format else 0
    assert kernel.metadata.shared <= max(2 * halves * columns + 4 * sums, 1024 if packed == 1 else 3072)
    ptx = kernel.asm["ptx"]
    steps, tiles = -(-n // (64 * packed * warps)), spec.constexprs["TILE"] // 16
    assert len(re.findall(r"mma\.sync\.aligned\.m16n8k16\S*f16\.f16", ptx)) == 4 * packed * steps * tiles
    if overlaps:
        *_, early = ptx.split("griddepcontrol.wait")[: 2 if kind == "conv" and m % 128 else 1]
        assert early.count("ld.global.v4.b32") >= 2 * tiles * min(spec.constexprs["AHEAD"], steps)  # 16 bytes of two rows each


SCALED = [(1, "sm_80"), (1, "gfx942"), (9, "sm_86"), pytest.param(2, "gfx942", marks=pytest.mark.sweep), (32, "sm_100")]


@pytest.mark.parametrize(("rows", "target"), SCALED)
def test_quantised_linears_compile_for_cards_that_cannot_widen_them(rows, target, on, tmp_path):
    on(target)
    op, args, options = quantised("conv", 12352, 2560, rows)
    (spec,) = supported(op, *args, **options)
    assert spec.constexprs["CONVERTS"] == (target == "sm_100")
    assert compile_for(target, spec).metadata.shared <= CARDS[target].shared_memory


INT4 = [
    (*case, format)
    for i, case in enumerate([(1, "sm_80"), (1, "gfx942"), (32, "sm_86"), (32, "gfx942"), (2, "sm_90"), (9, "sm_120")])
    for j, format in enumerate(["int4_group128", "int4_group32"])
    if SWEEP or i in (0, 3, 4) and i % 2 == j
]
INT4 += [(*case, "int4_group128_zero") for case in [(2, "sm_90"), (1, "gfx942")][: 2 if SWEEP else 1]]
TABLES = [(rows, target, "nf4_block64") for rows in (1, 9, 32) for target in TARGETS] + [(2, "sm_90", "fp4_block128")]
INT4 += TABLES if SWEEP else [(9, "sm_86", "nf4_block64"), (1, "gfx942", "nf4_block64")]


@pytest.mark.parametrize(("rows", "target", "format"), INT4)
def test_linears_of_four_bits_compile_for_every_card(rows, target, format, on, tmp_path):
    on(target)
    op, args, options = quantised("conv", 12352, 2560, rows, format)
    (spec,) = supported(op, *args, **options)
    assert spec.constexprs["CONVERTS"] == (not target.startswith("gfx"))
    kernel = compile_for(target, spec)
    assert kernel.metadata.shared <= CARDS[target].shared_memory
    if rows > 1:
        c = spec.constexprs
        stages = c["STAGES"] + 2 * (target in ("sm_90", "sm_100"))  # see FewRowsConfig.shared_memory
        assert kernel.metadata.shared <= FewRowsConfig(c["BM"], c["BK"], 4, stages, 1, c["EARLY"]).shared_memory(c["BB"], 2)
    if target == "sm_90":
        usage = resources(kernel.asm["cubin"], tmp_path)
        assert (usage["STACK"], usage["LOCAL"]) == (0, 0), f"{usage}"
        if rows > 1 and "128" in format:
            assert re.findall(r"cp\.async\.cg\S*", kernel.asm["ptx"]), "rows of bytes are copied 16 at once"


# The same linears of a few rows: SwiGLU or not × M × N. What is around them is not fused.
FEW_ROWS = [
    *((False, *size) for size in ((8224, 1024), (12352, 2560), (16480, 5120), (1024, 2048), (2560, 4096), (5120, 6144))),
    *((True, *size) for size in ((7168, 1024), (18432, 2560), (34816, 5120))),
    *((False, *size) for size in ((1024, 3584), (2560, 9216), (4096, 12288), (5120, 17408), (64, 32768), (48, 32))),
]


@pytest.mark.parametrize(*pairs(linear=FEW_ROWS, dtype=[BF16, torch.float32], rows=[2, 9, 17]), ids=str)
def test_linears_of_a_few_rows_do_not_spill(linear, dtype, rows, tmp_path, record_property):
    """As they are launched on Hopper, in parts where they are split: if any weight is read before the wait, the first step is."""
    swiglu, m, n = linear
    of = lambda *shape: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    parts = 1 if swiglu else split(m, n, rows)
    x, weights = of(rows, 1, n), [of(m, n)]
    if parts > 1:
        (kernel,) = on_hopper("split_linear", x, weights, parts)
    else:
        (kernel,) = on_hopper("fused_linear", x, weights, swiglu=swiglu)
    usage = resources(kernel.asm["cubin"], tmp_path)
    record_property("resources", str(usage))
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0), f"{usage}"
    assert kernel.metadata.shared <= CARDS["sm_90"].shared_memory  # of the cubin it is no part
    loads = re.findall(r"(?:ld\.global|cp\.async)\S*", before_the_wait(kernel))
    early = few_rows_config(n, rows, swiglu, parts, dtype).early
    assert bool(loads) == early and all("v4" in load or "cg" in load for load in loads)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "parts"), [(1024, 1), (2560, 8), (5120, 7), (8192, 8)])
def test_the_norm_of_a_sum_reads_its_weight_early_and_does_not_spill(n, parts, dtype, tmp_path):
    of = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    x = of(2, 1, n) if parts == 1 else of(parts, 2, 1, n, dtype=torch.float32)
    (kernel,) = on_hopper("add_rms_norm", x, of(2, 1, n), of(n), 1e-6, 1.0)
    usage = resources(kernel.asm["cubin"], tmp_path)
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0), f"{usage}"
    assert "ld.global" in before_the_wait(kernel)


def of_35b(op, rows):
    """A call at Qwen3.5-35B-A3B's sizes, as a decode step has it: one row with its norm and residual, several without norm. An op
    with "fp8" behind its name has the checkpoint's weights."""
    of = lambda *shape, dtype=BF16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    H, E, k, width = 2048, 256, 8, 512
    norm = (of(H), 1e-6, 1.0) if rows == 1 else (None, 0.0, 0.0)
    x, router, behind = of(rows, H), of(E, H), (of(width, H), of(width, H), of(H, width), of(1, H), of(rows, H))
    if op == "route":
        return x, router, k, True, False, False, *norm
    weights, stored = (of(E, 2 * width, H), of(E, H, width)), ()
    if "fp8" in op:
        scale = lambda w: of(*w.shape[:-2], *(n // 128 for n in w.shape[-2:]), dtype=torch.float32)  # noqa: E731
        stored = [scale(w) for w in (*weights, *behind[:3])], "fp8_block128"
        *weights, gate, up, down = (torch.empty_like(w, dtype=torch.float8_e4m3fn) for w in (*weights, *behind[:3]))
        behind = (gate, up, down, *behind[3:])
    if op.startswith("routed_experts"):
        return x, router, k, True, *weights, "silu", False, False, *norm, *behind, *stored
    return x, of(rows, k, dtype=torch.int64), of(rows, k), *weights, "silu", *norm, *behind, *stored


@pytest.mark.parametrize(
    ("op", "rows", "target"),
    [
        ("experts", 2, "sm_80"),
        pytest.param("experts", 32, "sm_100", marks=pytest.mark.sweep),
        pytest.param("experts", 64, "gfx942", marks=pytest.mark.sweep),
        ("routed_experts", 1, "gfx942"),
        ("route", 9, "sm_80"),
        ("experts", 8192, "gfx942"),
        ("experts fp8", 2, "sm_120"),
        ("routed_experts fp8", 1, "sm_80"),
        pytest.param("experts fp8", 8192, "gfx942", marks=pytest.mark.sweep),
    ],
)
def test_experts_compile_within_the_least_shared_memory(op, rows, target, tmp_path, monkeypatch):
    card = CARDS[target]._replace(shared_memory=64 * 1024)
    monkeypatch.setattr(devices, "of", lambda device: card)
    for spec in implementations()[op.split()[0]].jit_kernels(*of_35b(op, rows)):
        assert compile_for(target, spec).metadata.shared <= 64 * 1024


def test_the_experts_of_one_row_are_on_their_way_before_those_who_need_them_wait(tmp_path, record_property):
    """The router's weights, the shared expert's of gate and up, and all down projections, of which the choices are known by then:
    the launch before lets the last one start only when it has itself waited."""
    router, up, down = on_hopper("routed_experts", *of_35b("routed_experts", 1))
    for kernel in (router, up, down):
        usage = resources(kernel.asm["cubin"], tmp_path)
        record_property(kernel.metadata.name, str(usage))
        assert (usage["STACK"], usage["LOCAL"]) == (0, 0), f"{kernel.metadata.name} spills: {usage}"
    wait, _, behind = up.asm["ptx"].partition("griddepcontrol.wait")
    assert "griddepcontrol.launch_dependents" not in wait and "griddepcontrol.launch_dependents" in behind
    # 16 bytes a thread: eight rows of 2048 columns by 128 threads; two of gate and two of up, and the norm; nine times two of 512
    # by 64 threads, and the logits of the choices.
    early = [re.findall(r"ld\.global\S*\.v4\.b32", text) for text in (before_the_wait(router), wait, before_the_wait(down))]
    assert [len(loads) for loads in early] == [16, 16 + 4, 9 * 2 + 1]
    assert "redux.sync.max.s32" in up.asm["ptx"]
    assert "prefetch.global.L2" in wait  # of the shared expert's down projection


@pytest.mark.parametrize(
    ("op", "rows"), [("routed_experts fp8", 1), ("experts fp8", 8), ("experts fp8", 32), ("experts fp8", 4096)]
)
def test_quantised_experts_do_not_spill_and_read_several_at_once(op, rows, tmp_path, record_property):
    name, call = op.split()[0], of_35b(op, rows)
    implementations()[name].supports(*call)
    compiled = (
        on_hopper(name, *call) if rows < 100 else [compile_for("sm_90", s) for s in implementations()[name].jit_kernels(*call)]
    )
    for kernel in compiled:
        usage = resources(kernel.asm["cubin"], tmp_path)
        record_property(kernel.metadata.name, str(usage))
        assert usage["STACK"] <= 16 and usage["LOCAL"] == 0, f"{kernel.metadata.name} spills: {usage}"
        if "up" in kernel.metadata.name or "down" in kernel.metadata.name:
            # Eight bytes at once or more.
            assert re.search(r"ld\.global\S*\.v[24]\.b32|cp\.async\.c[ag][^\n]*, 0x(8|10)", kernel.asm["ptx"])


@pytest.mark.parametrize("rows", [8, 32])
def test_experts_of_several_rows_fit_three_times(rows, tmp_path, record_property):
    up, down, total = on_hopper("experts", *of_35b("experts", rows))
    for kernel in (up, down, total):
        usage = resources(kernel.asm["cubin"], tmp_path)
        record_property(kernel.metadata.name, str(usage))
        # Some versions of Triton leave a few pointers on the stack before the loop over columns.
        assert usage["STACK"] <= 16 and usage["LOCAL"] == 0 and usage["REG"] <= 168, f"{kernel.metadata.name}: {usage}"
        assert kernel.metadata.shared <= 64 * 1024
    for kernel in (up, down):  # weights go to shared memory 16 bytes at a time; of eight rows a thread has 8
        copies = Counter(re.findall(r"cp\.async\.c[ag]\S*", kernel.asm["ptx"]))
        assert copies["cp.async.cg.shared.global"] >= 8 * copies["cp.async.ca.shared.global"] > 0 or rows > 8 and len(copies) == 1
    *_, top_k = on_hopper("route", *of_35b("route", rows))
    assert "bar.sync" not in top_k.asm["ptx"]  # one warp finds a row's largest


@pytest.mark.parametrize("rows", [100, 600, 1800, 8192] if SWEEP else [100, 1800])
def test_experts_of_a_prompt_fit_twice_and_do_not_spill(rows, tmp_path, record_property):
    """Weights and rows go to shared memory 16 bytes at a time, several steps ahead of products that are not waited for."""
    _, *products, _ = implementations()["experts"].jit_kernels(*of_35b("experts", rows))
    for spec in products:
        kernel = compile_for("sm_90", spec)
        usage = resources(kernel.asm["cubin"], tmp_path)
        record_property(kernel.metadata.name, str(usage))
        assert (usage["STACK"], usage["LOCAL"]) == (0, 0), f"{kernel.metadata.name} spills: {usage}"
        assert usage["REG"] <= 255 and kernel.metadata.shared <= 113 * 1024
        ptx = kernel.asm["ptx"]
        assert {*re.findall(r"cp\.async\.c[ag]\S*", ptx)} == {"cp.async.cg.shared.global"}
        assert int(re.search(r"wgmma\.wait_group\S* (\d)", ptx)[1]) > 0


STATES = ["causal_conv_update", "fused_gating_delta_rule", "packed_decode", "mixer_decode", "mixer_decode head by head"]


@pytest.mark.parametrize(
    ("op", "model"), [(op, m) for i, op in enumerate(STATES) for j, m in enumerate(MODELS) if SWEEP or (i + j) % 3 == 0]
)
def test_states_are_read_before_the_wait_and_written_behind(op, model):
    """A window of four columns of bfloat16 is eight bytes, read at once; a thread's part of a state in float32 sixteen."""
    for kernel in on_hopper(op.split()[0], *calls(*MODELS[model])[op]):
        width = "v2" if "conv" in kernel.metadata.name else "v4"
        assert re.search(rf"ld\.global\S*\.{width}\.b32", before_the_wait(kernel)), kernel.metadata.name


HEAD_DIMS = [
    (K, V, op)
    for i, (K, V) in enumerate([(64, 64), (128, 256), (256, 128), (256, 256)])
    for j, op in enumerate(["mixer_decode", "fused_gating_delta_rule"])
    if SWEEP or i < 3 and i % 2 == j
]


@pytest.mark.parametrize(("K", "V", "op"), HEAD_DIMS)
def test_other_head_dims_do_not_spill(op, K, V, tmp_path):
    *_, spec = implementations()[op].jit_kernels(*calls(32, 32, K, V, torch.bfloat16)[op])
    usage = resources(compile_for("sm_90", spec).asm["cubin"], tmp_path)
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0), f"{usage}"


@pytest.mark.parametrize("model", MODELS if SWEEP else ["4B-batched"])
def test_keys_and_values_are_read_before_the_query_and_no_program_waits_for_another_warp(model, tmp_path):
    """The first four of each, a row of 256 columns at once; longer keys and values are written as wide. Those that the graph put
    together are waited for."""
    for op in ("attention_decode", "attention_growing"):
        split, *_ = on_hopper(op, *calls(*MODELS[model])[op])
        assert split.metadata.name == "attention_split_kernel" and "bar.sync" not in split.asm["ptx"]
        assert re.findall(r"ld\.global\S*", before_the_wait(split)) == 8 * ["ld.global.v4.b32"]
        if op == "attention_growing":
            assert split.asm["ptx"].count("st.global.v4.b32") >= 8
            usage = resources(split.asm["cubin"], tmp_path)
            assert (usage["STACK"], usage["LOCAL"]) == (0, 0), f"{usage}"
    for name in ("attention_few_queries", "attention_few_queries of five"):
        split, *_ = on_hopper("attention_few_queries", *calls(*MODELS[model])[name])
        assert "ld.global" not in before_the_wait(split) and "cp.async" not in before_the_wait(split)
        usage = resources(split.asm["cubin"], tmp_path)
        assert (usage["STACK"], usage["LOCAL"]) == (stack(f"{name} {model}"), 0), f"{usage}"
