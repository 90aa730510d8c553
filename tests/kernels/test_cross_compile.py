"""Kernels compiled without a device, at the shapes of real models; registers and spills are read off the machine code."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gdnfuse.kernels import implementations

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
H, W = 16, 4
BF16 = torch.bfloat16


def calls(B, HV, K=128, V=128, state_dtype=torch.float32):
    """Calls of every op at a model's decode shapes, as meta tensors: bf16 rows, parts in the order qkv, z, b, a."""

    def of(*shape, dtype=BF16):
        return torch.empty(shape, dtype=dtype, device="meta")

    D, F = 2 * H * K + HV * V, HV * V
    row, state, gates = of(B, 1, D + F + 2 * HV), of(B, HV, K, V, dtype=state_dtype), (of(HV), of(HV))
    a, b = row.narrow(-1, D + F + HV, HV), row.narrow(-1, D + F, HV)
    z = row.narrow(-1, D, F).unflatten(-1, (HV, V))
    conv, qkv = (of(B, D, W), of(D, 1, W), None), of(B, 1, D, dtype=torch.float32)
    heads = (of(B, 7, H, K), of(B, 7, H, K), of(B, 7, HV, V), of(B, 7, HV), of(B, 7, HV))
    return {
        "causal_conv_update": (row.narrow(-1, 0, D).transpose(1, 2), *conv, "silu"),
        "fused_gating_delta_rule": (*heads, *gates, state, K**-0.5, 1e-6),
        "packed_decode": (qkv, a, b, *gates, state, K**-0.5, 1e-6),
        "gated_rms_norm": (of(B, 1, HV, V, dtype=torch.float32), z, of(V), 1e-6),
        "linear": (of(1, 1, 2560), of(D + F + 2 * HV, 2560)),
        "mixer_decode": (row, *conv, *gates, state, of(V), 0, D, D + F, D + F + HV, "silu", K**-0.5, 1e-6, 1e-6),
    }


MODELS = {"4B": (1, 32), "4B-batched": (32, 32), "27B": (2, 48)}
PAIRS = [(model, op) for model in MODELS for op in calls(1, 32)]


def compile_for(target, spec):
    source = ASTSource(spec.kernel, spec.signature, spec.constexprs, spec.attrs)
    return triton.compile(source, target=TARGETS[target], options=spec.options)


@cache
def compiled(model, op, target):
    specs = implementations()[op].jit_kernels(*calls(*MODELS[model])[op])
    return [compile_for(target, spec) for spec in specs]


def resources(cubin, tmp_path):
    """REG, STACK, LOCAL and so on of a cubin's kernel."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("model", "op"), PAIRS, ids=["-".join(p) for p in PAIRS])
def test_compiles(model, op, target, tmp_path, record_property):
    kernels = compiled(model, op, target)
    assert len(kernels) == (2 if op == "mixer_decode" else 1)
    for kernel in kernels:
        if target == "gfx942":
            assert kernel.asm["hsaco"]
            continue
        usage = resources(kernel.asm["cubin"], tmp_path)
        record_property(f"{kernel.metadata.name} on {target}", str(usage))
        assert usage["REG"] > 0
        if target == "sm_90":
            assert (usage["STACK"], usage["LOCAL"]) == (0, 0), f"{kernel.metadata.name} spills: {usage}"


# The linears of a decode step: a 4B model's and some of others, N_out × N_in.
LINEARS = [(12352, 2560), (10240, 2560), (18432, 2560), (248320, 2560), (2560, 4096), (2560, 9216), (1024, 2048), (4096, 12288)]


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n_out", "n_in"), LINEARS)
def test_linears_read_16_bytes_at_once_and_do_not_spill(n_out, n_in, dtype, tmp_path, record_property):
    x, weight = torch.empty(1, 1, n_in, dtype=dtype, device="meta"), torch.empty(n_out, n_in, dtype=dtype, device="meta")
    (spec,) = implementations()["linear"].jit_kernels(x, weight)
    kernel = compile_for("sm_90", spec)
    usage = resources(kernel.asm["cubin"], tmp_path)
    record_property("resources", str(usage))
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0), f"{usage}"
    loads = set(re.findall(r"ld\.global\S*", kernel.asm["ptx"]))
    assert loads == {"ld.global.v4.b32"}


@pytest.mark.parametrize("op", ["fused_gating_delta_rule", "mixer_decode"])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 256), (256, 128), (256, 256)])
def test_other_head_dims_do_not_spill(op, K, V, tmp_path):
    *_, spec = implementations()[op].jit_kernels(*calls(32, 32, K, V, torch.bfloat16)[op])
    usage = resources(compile_for("sm_90", spec).asm["cubin"], tmp_path)
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0), f"{usage}"


@pytest.mark.parametrize("op", [op for op in calls(1, 32) if op not in ("causal_conv_update", "linear")])
def test_scalars_may_be_float64(op):
    """Inductor passes Python floats so; the maths must stay float32."""
    *_, spec = implementations()[op].jit_kernels(*calls(1, 32)[op])
    scalars = [name for name, kind in spec.signature.items() if kind == "fp32"]
    assert scalars
    spec.signature.update(dict.fromkeys(scalars, "fp64"))
    ttir = compile_for("sm_90", spec).asm["ttir"]
    assert not re.search(r"arith\.(mulf|addf|divf|subf).*f64", ttir)
