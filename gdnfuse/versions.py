"""Which versions of torch and transformers are tested (`make test-matrix`), and what to say about other versions."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import re
from pathlib import Path

TESTED = {"torch": ((2, 11), (2, 15)), "transformers": ((5, 17), (5, 24))}  # the first and the last


def version(package: str) -> str:
    """The version of an installed package, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def of_sources(*folders: str) -> str:
    """A digest of gdnfuse's Python files in these folders. The version number is not enough, because a checkout may be edited."""
    here, digest = Path(__file__).parent, hashlib.sha256()
    files = [file for folder in folders for file in sorted((here / folder).rglob("*.py"))]
    for file in files:
        digest.update(f"{file.relative_to(here)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def standing(package: str) -> str:
    """A sentence that compares the installed version with the tested ones."""
    first, last = TESTED[package]
    tested = f"tested with {'.'.join(map(str, first))} to {'.'.join(map(str, last))}"
    found = _parts(package)
    if found < first:
        return f"Too old: gdnfuse is {tested}. gdnfuse.compile refuses it. The backend runs with it, but may fuse less."
    if found > last:
        return f"In use, newer than the tested versions: gdnfuse is {tested}."
    return f"In use, {tested}."


def remedy(package: str) -> str:
    """What to do about the installed version. Empty if it is a tested one."""
    first, last = TESTED[package]
    found = _parts(package)
    if found < first:
        return f"Install a newer one: pip install '{package}>={'.'.join(map(str, first))}'"
    return "Compare results once: gdnfuse verify 0.8b" if found > last else ""


def too_old() -> list[str]:
    """A sentence for each installed package that is older than the first tested version."""
    sentences = (older(package, first) for package, (first, _) in TESTED.items() if version(package) != "none")
    return [sentence for sentence in sentences if sentence]


def older(package: str, first: tuple[int, ...]) -> str:
    """A sentence if the installed version is older than `first`, else an empty string."""
    wanted = ".".join(map(str, first))
    if _parts(package) >= first:
        return ""
    return f"{package} must be {wanted} or newer, found {version(package)}: pip install '{package}>={wanted}'."


def _parts(package: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version(package))[:2])
