"""What a machine has, what of it is used, and what its user should do next. `gdnfuse doctor` prints it."""

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
    """A command of gdnfuse to try on this machine, once nothing is left to do."""
    import torch

    return "bench 4b" if torch.cuda.is_available() else "report 4b"


def findings() -> Iterator[tuple[str, str, str, str]]:
    """For each thing that matters: its name, what is here, what follows, and what to do; the last is empty where nothing is."""
    import torch

    so, do = (f"Every graph is left as it came: {DISABLE} is set.", f"Unset {DISABLE}.") if disabled() else ("In use.", "")
    yield "gdnfuse", versions.version("gdnfuse"), so, do
    yield "python", platform.python_version(), "In use.", ""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    yield "torch", f"{torch.__version__} ({build})", versions.standing("torch"), versions.remedy("torch")
    yield "transformers", versions.version("transformers"), versions.standing("transformers"), versions.remedy("transformers")
    triton = importlib.util.find_spec("triton") is not None
    so, do = ("In use on a GPU.", "") if triton else ("There are no GPU kernels without it.", "Install it: pip install triton")
    yield "triton", versions.version("triton"), so, do if platform.system() == "Linux" else ""
    gpu = torch.cuda.is_available()
    if not gpu:
        yield "GPU", "none", "References are inlined, and Inductor compiles them for the CPU.", _unseen_gpu()
    for i in range(torch.cuda.device_count() if gpu else 0):
        properties = torch.cuda.get_device_properties(i)
        architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {architecture}"
        yield f"GPU {i}", found, kernels_for(0 if torch.version.hip else properties.major, triton), ""
    compiler = next((path for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (path := shutil.which(name))), "")
    so, do = ("In use.", "") if compiler else ("Inductor and Triton cannot compile without one.", "Install gcc, or set CC.")
    yield "C compiler", compiler or "none", so, do
    folder = compat.cache_folder()
    so = "A second process finds in it what the first compiled; gdnfuse warmup MODEL --save FILE is for other machines."
    if torch.compiler.config.force_disable_caches:
        yield "compile cache", "off", "Each process compiles anew.", "Unset TORCHINDUCTOR_FORCE_DISABLE_CACHES."
    elif folder:
        yield "compile cache", folder, so, ""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    so, do = (
        ("In use.", "")
        if header.exists()
        else ("Inductor and Triton compile against it.", "Install Python's headers, such as python3-dev.")
    )
    yield "Python.h", str(header) if header.exists() else "none", so, do
    gone = compat.missing()
    lost = " ".join(f"Without {entry.missing()} {entry.cost}" for entry in gone)
    found = f"{len(compat.ENTRIES) - len(gone)} of {len(compat.ENTRIES)}"
    do = "Install versions that are tested, or go without." if gone else ""
    yield "private APIs", found, lost or "All are as in the versions that are tested.", do
    for package, captured in (("fla", "rule"), ("causal_conv1d", "convolution")):
        here = importlib.util.find_spec(package) is not None
        so = (
            f"Eager calls take its {captured}; compiled ones take ours."
            if here
            else f"Not needed: compiled calls take our {captured}."
        )
        name = {"fla": "flash-linear-attention"}.get(package, package)
        do = f"Uninstall it where there is no GPU, as eager calls fail with it: pip uninstall {name}" if here and not gpu else ""
        yield package, versions.version(name) if here else "none", so, do


def _unseen_gpu() -> str:
    """What to do about a GPU that the machine has and torch does not see; empty if there is none."""
    import torch

    if not any(Path(place).exists() for place in ("/proc/driver/nvidia/version", "/dev/kfd")):
        return ""
    if not (torch.version.cuda or torch.version.hip):
        return "There is a GPU, and this torch is built for CPUs: install a build for CUDA or ROCm."
    return "There is a GPU that torch does not see: check its driver and CUDA_VISIBLE_DEVICES."


def kernels_for(capability: int, triton: bool) -> str:
    """`capability` is NVIDIA's major one, 0 elsewhere."""
    if not triton:
        return "References are inlined, and Inductor compiles them."
    if capability == 9:
        return "Triton kernels that overlap, and a chunk scan of its own in Gluon."
    if capability >= 10:
        return "Triton kernels that overlap; compiled for it in tests, not measured."
    return "Triton kernels; compiled for sm_80, sm_86, sm_89 and gfx942 in tests, not measured."
