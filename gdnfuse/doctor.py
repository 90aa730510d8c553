"""What this machine has, what gdnfuse uses of it, and what the user should do next. `gdnfuse doctor` prints it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gdnfuse import compat, versions
from gdnfuse.options import DISABLE, disabled


def next_command() -> str:
    """The command of gdnfuse to try first on this machine."""
    import torch

    return "bench 4b" if torch.cuda.is_available() else "report 4b"


def findings() -> Iterator[tuple[str, str, str, str]]:
    """For each thing that matters: its name, what was found, its effect, and a remedy, which is empty if all is well."""
    import torch

    effect = f"No graph is changed, because {DISABLE} is set." if disabled() else "In use."
    remedy = f"Unset {DISABLE}." if disabled() else ""
    yield "gdnfuse", versions.version("gdnfuse"), effect, remedy
    yield "python", platform.python_version(), "In use.", ""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    yield "torch", f"{torch.__version__} ({build})", versions.standing("torch"), versions.remedy("torch")
    yield "transformers", versions.version("transformers"), versions.standing("transformers"), versions.remedy("transformers")
    triton = importlib.util.find_spec("triton") is not None
    effect = "Used on a GPU." if triton else "Without it there are no GPU kernels."
    remedy = "" if triton or platform.system() != "Linux" else "Install it: pip install triton"
    yield "triton", versions.version("triton"), effect, remedy
    gpu = torch.cuda.is_available()
    if not gpu:
        yield "GPU", "none", "Inductor compiles plain PyTorch references for the CPU.", _unseen_gpu()
    for i in range(torch.cuda.device_count() if gpu else 0):
        properties = torch.cuda.get_device_properties(i)
        architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {architecture}"
        yield f"GPU {i}", found, kernels_for(0 if torch.version.hip else properties.major, triton), _untuned(i) if triton else ""
    compiler = next((path for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (path := shutil.which(name))), "")
    effect = "In use." if compiler else "Inductor and Triton cannot compile without one."
    yield "C compiler", compiler or "none", effect, "" if compiler else "Install gcc, or set CC."
    folder = compat.cache_folder()
    effect = "Later processes reuse what is compiled. For other machines: gdnfuse warmup MODEL --save FILE."
    if torch.compiler.config.force_disable_caches:
        yield "compile cache", "off", "Each process compiles everything again.", "Unset TORCHINDUCTOR_FORCE_DISABLE_CACHES."
    elif folder:
        yield "compile cache", folder, effect, ""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.exists():
        yield "Python.h", str(header), "In use.", ""
    else:
        effect = "Inductor and Triton cannot compile without it."
        yield "Python.h", "none", effect, "Install Python's headers, such as python3-dev."
    gone = compat.missing()
    lost = " ".join(f"Without {entry.missing()} {entry.cost}" for entry in gone)
    found = f"{len(compat.ENTRIES) - len(gone)} of {len(compat.ENTRIES)}"
    remedy = "Install tested versions, or ignore this." if gone else ""
    yield "private APIs", found, lost or "All were found.", remedy
    for package, captured in (("fla", "rule"), ("causal_conv1d", "convolution")):
        here = importlib.util.find_spec(package) is not None
        effect = f"Uncompiled calls use its {captured}." if here else "Not needed by compiled calls."
        name = {"fla": "flash-linear-attention"}.get(package, package)
        remedy = f"Uncompiled calls with it need a GPU, so uninstall it: pip uninstall {name}" if here and not gpu else ""
        yield package, versions.version(name) if here else "none", effect, remedy


def _unseen_gpu() -> str:
    """What to do if the machine has a GPU that torch does not see. Empty if there is no GPU."""
    import torch

    if not any(Path(place).exists() for place in ("/proc/driver/nvidia/version", "/dev/kfd")):
        return ""
    if not (torch.version.cuda or torch.version.hip):
        return "There is a GPU, but this torch was built for CPUs. Install a build for CUDA or ROCm."
    return "There is a GPU that torch does not see. Check its driver and CUDA_VISIBLE_DEVICES."


def _untuned(index: int) -> str:
    """What to do if the choices of kernels were not measured on a GPU. Empty for an H200, and where gdnfuse tune has run."""
    from gdnfuse.kernels import tuned

    if "H200" in tuned.card_of(index) or tuned.is_tuned(index):
        return ""
    return "Measure the choices of its kernels once: gdnfuse tune MODEL."


def kernels_for(capability: int, triton: bool) -> str:
    """What runs on a GPU. `capability` is the major one of NVIDIA's, and 0 for other makers."""
    if not triton:
        return "Inductor compiles plain PyTorch references."
    if capability == 9:
        return "Triton kernels that overlap, and a Gluon kernel for prompts."
    if capability >= 10:
        return "Triton kernels that overlap. Tests compile them for this GPU. Speed was not measured."
    return "Triton kernels. Tests compile them for sm_80, sm_86, sm_89 and gfx942. Speed was not measured."
