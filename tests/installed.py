"""Builds a wheel, checks it, installs it in a new environment, and runs the README's commands there, from an empty folder.

    python -m tests.installed

Everything but gdnfuse comes from the environment that this runs in. `make` is not run, because CI runs it. Benchmarks of whole
models are not run, because they need a GPU or take long. Where a command would make a whole model with random weights, it gets
the config of a small model, `path/to/config.json`, which this script writes.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.metadata import Metadata
from transformers import Qwen3_5TextConfig

from tests.pages import ROOT, blocks

NOT_RUN = ("gdnfuse bench 0.8b --batch", "gdnfuse bench 4b", "gdnfuse bench path/to/model")

# These would compile or run a whole model, which takes minutes, or trace all of its layers.
WEIGHED = ("bench 0.8b", "verify 0.8b", "warmup 4b", "report 4b")
# Presets are files of the wheel.
LOADED = "import gdnfuse; from gdnfuse import models; print(gdnfuse.__file__, *map(models.load_config, models.presets()))"


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks(ROOT / "README.md", "console") for line in block.splitlines()]
    lines = [line for line in lines if line.startswith("gdnfuse") and not line.startswith(NOT_RUN)]
    for command in WEIGHED:
        lines = [line.replace(command, f"{command.split()[0]} path/to/config.json") for line in lines]
    return list(dict.fromkeys(lines))


PIP = [sys.executable, "-m", "pip"]
BUILD = ["--quiet", "--no-deps", "--no-build-isolation"]


def wheel(folder: Path) -> Path:
    subprocess.run([*PIP, "wheel", *BUILD, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def check_metadata(text: bytes) -> None:
    """Check each field of a wheel's METADATA, and that its version is the project's. `twine check` checks only the description.

    Raises:
        ExceptionGroup: a field is missing or is not as the specification says.
        ValueError: there is no page to show, or the version is another.
    """
    metadata = Metadata.from_email(text, validate=True)
    if not metadata.description or not (metadata.description_content_type or "").startswith("text/markdown"):
        raise ValueError(f"The metadata must have a description in Markdown, found {metadata.description_content_type}.")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if str(metadata.version) != wanted:
        raise ValueError(f"The wheel must have version {wanted}, found {metadata.version}.")


def install(folder: Path) -> Path:
    """The folder of the new environment's programs."""
    built = wheel(folder / "wheels")
    with zipfile.ZipFile(built) as files:
        (metadata,) = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        check_metadata(files.read(metadata))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(built)], check=True)
    venv.create(folder, with_pip=False)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "all-else.pth").write_text(site.getsitepackages()[0])
    python = folder / "bin" / "python"
    subprocess.run([*PIP, "--python", str(python), "install", *BUILD, "--ignore-installed", str(built)], check=True)
    where = subprocess.run([python, "-c", LOADED], cwd=folder, capture_output=True, text=True)
    assert where.stdout.startswith(str(folder)) and "Qwen3_5TextConfig" in where.stdout, where
    return python.parent


def small_config(folder: Path) -> None:
    heads = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    sizes |= {"full_attention_interval": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen3_5TextConfig(**sizes, **heads).save_pretrained(folder)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        programs, work = install(Path(folder) / "environment"), Path(folder) / "work"
        (work / "path" / "to").mkdir(parents=True)
        small_config(work / "path" / "to")
        # Two at once, most of which is Python and compilers on one core each; so torch gets one thread.
        env = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        env.pop("PYTHONPATH", None)

        def run(command: str) -> tuple[float, subprocess.CompletedProcess]:
            start = time.monotonic()
            done = subprocess.run(command.split(), cwd=work, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            return time.monotonic() - start, done

        # What compiles takes longest.
        order = sorted(commands(), key=lambda command: " warmup " not in command)
        with ThreadPoolExecutor(2) as pool:
            for command, (seconds, done) in zip(order, pool.map(run, order), strict=True):
                print(f"{seconds:6.1f} s  {command}", flush=True)
                if done.returncode or not done.stdout.strip() or "Traceback" in done.stderr:
                    print(f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}", file=sys.stderr)
                    pool.shutdown(cancel_futures=True)
                    return 1
        assert (work / "report.html").stat().st_size > 10_000
    return 0


if __name__ == "__main__":
    sys.exit(main())
