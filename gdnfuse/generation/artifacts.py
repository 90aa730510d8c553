"""What a process compiled, in one file, for other processes that compile the same.

`gdnfuse.warmup(model, save=FILE)` writes it and `gdnfuse.compile(model, artifacts=FILE)` reads it. It contains what torch saves
(`torch.compiler.save_cache_artifacts`): the graphs of AOTAutograd and Inductor, Inductor's Triton kernels, and its measurements.
It also contains the machine code of our own kernels. Everything goes into the caches on disk, where the compilers look for it.
The machine code of Inductor's C++ is not in the file, so on a CPU that is compiled again.

Loading a file runs the code in it. So trust the file as you trust the code of the model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gdnfuse import compat, kernels, versions
from gdnfuse.errors import GdnfuseError, one_line
from gdnfuse.files import replacing

log = logging.getLogger(__name__)

SCHEMA = "gdnfuse.artifacts/1"
ABOUT, TORCH, KERNELS = "about.json", "torch.bin", "kernels/"  # the parts of the file, which is a zip and so has checksums
PACKAGES = ("gdnfuse", "torch", "triton", "transformers")
OF_NO_GRAPH = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")  # in a config


@dataclass(frozen=True)
class Artifacts:
    """The content of a complete file.

    Attributes:
        file: path of the file.
        about: what it was compiled with, see `fingerprint`.
        torch: the argument of `torch.compiler.load_cache_artifacts`; empty if torch saved nothing.
        kernels: files with the machine code of our kernels, by their keys in Triton's cache.
    """

    file: Path
    about: dict[str, str]
    torch: bytes
    kernels: dict[str, dict[str, bytes]]


def fingerprint(model: torch.nn.Module) -> dict[str, str]:
    """What must be equal where artifacts are made and where they are used.

    These are versions, the name of the device, and the class, dtype and config of the model. The weights do not matter.
    """
    parameter = next(model.parameters())
    device = torch.cuda.get_device_name(parameter.device) if parameter.device.type == "cuda" else parameter.device.type
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True).to_dict() if hasattr(config, "get_text_config") else {}
    facts = json.dumps({k: v for k, v in text.items() if k not in OF_NO_GRAPH}, sort_keys=True, default=str)
    made = {package: versions.version(package) for package in PACKAGES} | {"torch": torch.__version__}  # its build too
    dtype = str(parameter.dtype).removeprefix("torch.")
    digest = hashlib.sha256(facts.encode()).hexdigest()[:12]
    return made | {"device": device, "model": type(model).__name__, "dtype": dtype, "config": digest}


def save(model: torch.nn.Module, file: Path) -> int:
    """Write what this process has compiled so far. The file is replaced as a whole or not at all.

    Returns:
        The size of the file in bytes.

    Raises:
        GdnfuseError: nothing was compiled that can be saved, or the file cannot be written.
    """
    kept, codes = torch.compiler.save_cache_artifacts(), kernels.machine_codes()
    if kept is None and not codes:
        raise GdnfuseError(
            "Artifacts are what Inductor and Triton keep in their caches, found nothing from this process: compile "
            "with inner='inductor', and leave torch's caches on (torch.compiler.config.force_disable_caches)."
        )
    with replacing(file) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr(ABOUT, json.dumps({"schema": SCHEMA, **fingerprint(model)}))
        parts.writestr(TORCH, kept[0] if kept else b"")
        for key, files in codes.items():
            for name, content in files.items():
                parts.writestr(f"{KERNELS}{key}/{name}", content)
    return file.stat().st_size


def read(file: str | Path) -> Artifacts:
    """Read a file that `save` wrote. Nothing in it is used yet.

    Raises:
        GdnfuseError: the file is missing, damaged, or of another kind.
    """
    file = Path(file)
    required = f"artifacts must be a file that gdnfuse.warmup(model, save=…) has written, found that {file}"
    try:
        with zipfile.ZipFile(file) as parts:
            content = {name: parts.read(name) for name in parts.namelist()}
        about = json.loads(content.pop(ABOUT))
        if about.pop("schema", None) != SCHEMA:
            raise GdnfuseError(f"{required} has another schema than {SCHEMA}: write it again.")
        kept = content.pop(TORCH)
    except FileNotFoundError as e:
        raise GdnfuseError(f"{required} does not exist: write it first.") from e
    except OSError as e:
        raise GdnfuseError(f"{required} cannot be read: {e.strerror}.") from e
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, AttributeError) as e:
        raise GdnfuseError(f"{required} is damaged or another kind of file: write it again.") from e
    codes: dict[str, dict[str, bytes]] = {}
    for name, data in content.items():
        _, key, part = name.split("/")
        codes.setdefault(key, {})[part] = data
    return Artifacts(file, about, kept, codes)


def load(artifacts: Artifacts, model: torch.nn.Module) -> bool:
    """Put artifacts where the compilers look, if they were made for this model, this device and these versions.

    Returns:
        Whether they are in place. If not, one warning says why, and everything is compiled as without them.
    """
    wanted = fingerprint(model)
    if other := [name for name in wanted if artifacts.about.get(name) != wanted[name]]:
        required, found = (", ".join(f"{name} {facts.get(name)}" for name in other) for facts in (wanted, artifacts.about))
        log.warning(
            "Artifacts must be made for %s, found %s in %s, so everything is compiled as without them: make them again with "
            "gdnfuse.warmup(model, save=…).",
            *(required, found, artifacts.file),
        )
        return False
    try:
        kept: Any = torch.compiler.load_cache_artifacts(artifacts.torch) if artifacts.torch else True
        for key, files in artifacts.kernels.items():
            compat.keep_machine_code(key, files, next(model.parameters()).device.index or 0)
    except Exception as e:  # for example a full disk: the caches check their content, and everything can be compiled
        kept, reason = None, one_line(e)
    else:
        reason = "torch does not take them"
    if kept is None:
        log.warning(
            "Artifacts must be written to the caches of torch and Triton on disk, found that those of %s were not (%s), so what "
            "is missing there is compiled: check free space and permissions, or make them again.",
            *(artifacts.file, reason),
        )
    return kept is not None
