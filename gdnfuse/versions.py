"""Which versions of what this builds on are tested (`make test-matrix`), and what to say of others."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import re
from pathlib import Path

TESTED = {"torch": ((2, 11), (2, 15)), "transformers": ((5, 17), (5, 24))}  # the first and the last


def version(package: str) -> str:
    """Of the installed distribution, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def of_sources(*folders: str) -> str:
    """A digest of gdnfuse's Python files in these folders: a checkout has one version for many of them."""
    here, digest = Path(__file__).parent, hashlib.sha256()
    files = [file for folder in folders for file in sorted((here / folder).rglob("*.py"))]
    for file in files:
        digest.update(f"{file.relative_to(here)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def standing(package: str) -> str:
    """A sentence on what the installed version is among those that are tested."""
    first, last = TESTED[package]
    tested = f"tested with {'.'.join(map(str, first))} to {'.'.join(map(str, last))}"
    found = _parts(package)
    if found < first:
        return f"Too old: it is {tested}. gdnfuse.compile refuses it; the backend runs with it, and more may stay unfused."
    if found > last:
        return f"In use, newer than what it is {tested}; `gdnfuse verify` compares results."
    return f"In use, {tested}."


def remedy(package: str) -> str:
    """What to do about the installed version, empty where it is one that is tested."""
    first, last = TESTED[package]
    found = _parts(package)
    if found < first:
        return f"Install a newer one: pip install '{package}>={'.'.join(map(str, first))}'"
    return "Compare results once: gdnfuse verify 0.8b" if found > last else ""


def too_old() -> list[str]:
    """A sentence for each package that is older than the first tested version; one that is not there needs none."""
    sentences = (older(package, first) for package, (first, _) in TESTED.items() if version(package) != "none")
    return [sentence for sentence in sentences if sentence]


def older(package: str, first: tuple[int, ...]) -> str:
    """A sentence where the installed version is older than this one, empty where it is not."""
    wanted = ".".join(map(str, first))
    return f"{package} {wanted} or newer is required, found {version(package)}." if _parts(package) < first else ""


def _parts(package: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version(package))[:2])
