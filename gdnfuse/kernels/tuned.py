"""Choices of kernels that `gdnfuse tune` measured on this card, which replace those of our tables.

Kernels ask `choose` when they are launched or planned. A choice divides the work of one kernel. It never decides which kernel is
launched, so graphs do not depend on it. The file of a card is read once per process. This file does not import triton.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from gdnfuse import versions
from gdnfuse.errors import Refused
from gdnfuse.files import check_writable, replacing
from gdnfuse.kernels import devices
from gdnfuse.report.records import NOT_MEASURED, TUNE

log = logging.getLogger(__name__)

SCHEMA = "gdnfuse.tuned/1"
FOLDER = "GDNFUSE_CACHE"  # environment variable
REQUIRED = ("card", "capability", "multiprocessors", "gdnfuse", "kernels", "triton")  # what must be as it was when measured
BY_TUNE = "gdnfuse tune on this card"
MOST_WARPS, MOST_SIZE = 32, 2**16

Config = TypeVar("Config", bound=tuple[Any, ...])


class Key(NamedTuple):
    """What a choice is for.

    kernel: its name. kind: what is fused around a linear. sizes: for a linear, rows of the weight per result, plain rows after
    them, columns, and parts; for a rule, heads in all, K and V. of: dtype or format. rows: of x.
    """

    kernel: str
    kind: str
    sizes: tuple[int, ...]
    of: str
    rows: int = 1


@dataclass(frozen=True)
class Choice:
    """One answer of `choose`.

    Attributes:
        key: what it is for.
        default: the choice of our tables.
        config: the choice that was taken.
        tuned: whether `gdnfuse tune` measured it on this card.
        on_h200: whether the default was measured on an H200.
    """

    key: Key
    default: tuple[Any, ...]
    config: tuple[Any, ...]
    tuned: bool
    on_h200: bool


_trying: ContextVar[tuple[str, tuple[Any, ...]] | None] = ContextVar("trying", default=None)
_noting: ContextVar[list[Choice] | None] = ContextVar("noting", default=None)


def choose(key: Key, default: Config, check: Callable[[Config], None], device: torch.device, on_h200: bool = True) -> Config:
    """The config to launch a kernel with.

    Args:
        key: what it is for.
        default: the config of our tables.
        check: raises Refused if the kernel cannot be launched with a config.
        device: where it runs. For tensors on no GPU, as in a report, it is the current one.
        on_h200: whether the default was measured on an H200.

    Raises:
        Refused: inside `trying`, the config does not fit.
    """
    trying = _trying.get()
    if trying and trying[0] == key.kernel:
        config = _like(default, trying[1])
        check(config)
        return config
    found = _table(devices.index_of(device)).get(key)
    config = default
    if found is not None:
        try:
            config = _like(default, found)
            check(config)
        except Refused as e:
            _warn(f"A tuned choice must fit its kernel, found {list(found)} for {name_of(key)}, so the built-in one is used: run "
                  f"gdnfuse tune again. {e.reason}")  # fmt: skip
            config, found = default, None
    if (noted := _noting.get()) is not None:
        noted.append(Choice(key, default, config, found is not None, on_h200))
    return config


@contextmanager
def trying(kernel: str, config: tuple[Any, ...]) -> Iterator[None]:
    """Launch a kernel with this config inside the block, whatever was tuned."""
    token = _trying.set((kernel, config))
    try:
        yield
    finally:
        _trying.reset(token)


@contextmanager
def noting() -> Iterator[list[Choice]]:
    """The choices that are made in this block, in order."""
    choices: list[Choice] = []
    token = _noting.set(choices)
    try:
        yield choices
    finally:
        _noting.reset(token)


def standing(by: str, choices: Iterable[Choice], device: torch.device) -> str:
    """Where the choices of a launch were measured, as the report says it.

    Args:
        by: the benchmark that compares them on an H200, or empty.
        choices: those that were made for the launch. A kernel that does not ask has none.
        device: where it runs.
    """
    choices = list(choices)
    if choices and all(c.tuned for c in choices):
        return BY_TUNE
    card = card_of(devices.index_of(device))
    if (not card or "H200" in card) and by and all(c.tuned or c.on_h200 for c in choices):
        return f"{by} on an H200"
    return (f"{NOT_MEASURED}: {TUNE}" if choices else NOT_MEASURED) if by else ""


def of_weight(weight: torch.Tensor, format: str = "") -> str:
    """What a key says of a weight: its format, or its dtype."""
    return format or str(weight.dtype).removeprefix("torch.")


def name_of(key: Key) -> str:
    """A key in words."""
    sizes = "×".join(map(str, key.sizes))
    return " ".join(filter(None, (key.kernel, key.kind, sizes, key.of, f"{key.rows} rows" if key.rows > 1 else "")))


def require_powers(**sizes: int) -> None:
    """Refuse a size that is not a power of two up to MOST_SIZE. `warps` must be at most MOST_WARPS."""
    for name, n in sizes.items():
        most = MOST_WARPS if name == "warps" else MOST_SIZE
        if not 1 <= n <= most or n & (n - 1):
            raise Refused(f"{name} must be a power of two up to {most}, found {n}.")


def require_divides(n: int, by: int, what: str) -> None:
    """Refuse sizes of which one does not divide the other."""
    if n % by:
        raise Refused(f"{what} must be a multiple of {by}, found {n}.")


def _like(default: Config, found: Iterable[Any]) -> Config:
    """Numbers of a file as a config of the same class as the default."""
    found = tuple(found)
    if [type(x) for x in found] != [type(x) for x in default]:
        raise Refused(f"A config of this kernel is like {list(default)}.")
    return type(default)(*found) if hasattr(default, "_fields") else found


def card_of(index: int) -> str:
    """The name of a GPU. Empty without one; a report is made for an H200 then."""
    return getattr(torch.cuda.get_device_properties(index), "name", "unknown") if torch.cuda.is_available() else ""


def about(index: int) -> dict[str, Any]:
    """What a file must be made for: the GPU and the versions."""
    properties = torch.cuda.get_device_properties(index)
    return {
        "card": card_of(index),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        **{package: versions.version(package) for package in ("gdnfuse", "triton")},
        "kernels": versions.of_sources("kernels"),
        "torch": torch.__version__,
    }


def file_of(card: str) -> Path:
    """The file of a card, in the folder $GDNFUSE_CACHE, or else in the user's folder for caches."""
    folder = os.environ.get(FOLDER) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "gdnfuse")
    name = "_".join("".join(c if c.isalnum() else " " for c in card).split())
    return Path(folder).expanduser() / f"tuned_{name}.json"


def is_tuned(index: int = 0) -> bool:
    """Whether there is something to use for a card."""
    return bool(_table(index))


@functools.cache
def _table(index: int) -> dict[Key, list[Any]]:
    """What was chosen for a card. Empty, with one warning, if the file cannot be used."""
    card = card_of(index)
    if not card or not (file := file_of(card)).exists():
        return {}
    try:
        return {key: row["config"] for key, row in read(file, about(index)).items()}
    except Refused as e:
        _warn(f"{e.reason} So the built-in choices are used: run gdnfuse tune again.")
        return {}


def read(file: Path, wanted: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """The choices in a file, with their figures.

    Raises:
        Refused: the file is damaged or another kind of file, or it was made for another card or other versions.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise Refused(f"Tuned choices must have the schema {SCHEMA}, found {data['schema']} in {file}.")
        found = data["about"]
        rows = {Key(r["kernel"], r["kind"], tuple(r["sizes"]), r["of"], r["rows"]): r for r in data["choices"]}
        if not all(isinstance(r["config"], list) for r in rows.values()):
            raise ValueError
        if other := [name for name in REQUIRED if found.get(name) != wanted[name]]:
            required, had = (", ".join(f"{name} {facts.get(name)}" for name in other) for facts in (wanted, found))
            raise Refused(f"Tuned choices must be made for {required}, found {had} in {file}.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise Refused(f"Tuned choices must be in a file that gdnfuse tune has written, found that {file} is damaged.") from e
    return rows


def write(file: Path, facts: dict[str, Any], rows: dict[Key, dict[str, Any]]) -> None:
    """Write choices, as `read` returns them, with what they are made for. The file is replaced as a whole or not at all."""
    choices = [{**dict(zip(Key._fields, key, strict=True)), **row} for key, row in rows.items()]
    data = {"schema": SCHEMA, "about": facts, "choices": choices}
    check_writable(file)
    with replacing(file) as partial:
        partial.write_text(json.dumps(data, indent=1), encoding="utf-8")


def forget() -> None:
    """Read the files again when a kernel asks next."""
    _table.cache_clear()
    _warn.cache_clear()


@functools.cache
def _warn(sentence: str) -> None:
    """Say a sentence once."""
    log.warning("%s", sentence)
