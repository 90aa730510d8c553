"""gdnfuse tune: measures the choices of the kernels of a model's decode steps on this card, and keeps those that are faster.

A model without weights is traced as for a report, so the choices are those that its steps will make. Each is timed with random
weights that are not in the L2, in a CUDA graph. The results of each config are compared with those of the default one first.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from gdnfuse import compat, models
from gdnfuse.bench.configs import DEVICE, near
from gdnfuse.bench.measure import COLD_BYTES, SETTLING, replayed
from gdnfuse.dialect import OPS
from gdnfuse.errors import GdnfuseError, Refused, one_line
from gdnfuse.kernels import tuned
from gdnfuse.kernels.launch.implementation import Implementation, planning
from gdnfuse.kernels.tuned import Choice, Key
from gdnfuse.progress import announce

log = logging.getLogger(__name__)

LEAST = 1.03  # times as fast as the default, or it is not kept
REPEATS = 2  # interleaved with the default
NEAREST, TRIED = 16, 3  # configs that are timed, and how many of them again
MOVED_BYTES, LAUNCHES, REPLAYS = 2e9, 48, 9  # the most of a graph, and the least number of launches of a small kernel
MEMORY, MOST_SETS = 0.6, 256  # of what is free, and sets of weights, at most
TOLERANCE = 2.0**-7  # of results, relative to the largest: one rounding to bfloat16


@dataclass(frozen=True)
class Call:
    """A launch of a decode step that makes a choice.

    Attributes:
        kernel: what is launched.
        arguments: by name, fake tensors on the device.
        choice: the choice that it makes.
    """

    kernel: Implementation
    arguments: dict[str, Any]
    choice: Choice


def calls(model: torch.nn.Module, batches: Sequence[int]) -> list[Call]:
    """The launches of a model's decode steps that make a choice, one for each key.

    Args:
        model: from `models.meta_model`.
        batches: numbers of sequences.
    """
    found: dict[Key, Call] = {}
    for batch in batches:
        with planning() as planned:
            models.trace(model, batch=batch, target="cuda")
        for kernel, arguments in planned:
            placed = compat.tree_map_only(torch.Tensor, _placed, arguments)
            with tuned.noting() as choices:
                kernel.plan(placed)
            for choice in choices:
                found.setdefault(choice.key, Call(kernel, placed, choice))
    return list(found.values())


def _placed(fake: torch.Tensor) -> torch.Tensor:
    with fake.fake_mode:
        return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=DEVICE)


class Found(NamedTuple):
    """config: the one to keep. us, default_us: microseconds of it and of the default. compared: how many others were timed."""

    config: tuple[Any, ...]
    us: float
    default_us: float
    compared: int


def search(default: tuple[Any, ...], others: Sequence[tuple[Any, ...]], time: Callable[[tuple[Any, ...]], float]) -> Found:
    """The fastest config: the default, unless another is at least LEAST times as fast, again and again.

    Args:
        default: the config of our tables.
        others: configs to compare it with. If `time` raises for one of them, it is left out.
        time: microseconds of a config.
    """
    first = time(default)
    times = {}
    for config in others:
        try:
            times[config] = time(config)
        except Exception as e:  # it does not fit, does not compile, or is wrong
            log.debug("%s is left out: %s", config, one_line(e))
    for config in sorted(times, key=times.__getitem__)[:TRIED]:
        if first < LEAST * times[config]:
            break
        pairs = [(time(default), time(config)) for _ in range(REPEATS)]
        if all(theirs >= LEAST * ours for theirs, ours in pairs):
            theirs, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
            return Found(config, ours, theirs, len(times))
    return Found(default, first, first, len(times))


def stopwatch(call: Call) -> Callable[[tuple[Any, ...]], float]:
    """A function that times the launch of a call on the GPU with a config: the median, in microseconds.

    It raises Refused if the results are not those of the default config.
    """
    written = OPS[call.kernel.name].mutates
    rotated = {n: x for n, x in call.arguments.items() if x is not None and n in (*call.kernel.early, *written)}
    torch.cuda.empty_cache()
    size = sum(t.nbytes for t in compat.tree_leaves(rotated) if isinstance(t, torch.Tensor))
    room = min(int(MEMORY * torch.cuda.mem_get_info()[0] / size), MOST_SETS)
    shared = _real({n: x for n, x in call.arguments.items() if n not in rotated})
    sets = [shared | _real(rotated) for _ in range(max(1, min(math.ceil(COLD_BYTES / size) + 1, room)))]
    states = {name: sets[0][name].clone() for name in written}

    def results(config: tuple[Any, ...]) -> list[torch.Tensor]:
        own = {name: state.clone() for name, state in states.items()}
        torch.cuda.synchronize()  # a kernel that may overlap reads states before what wrote them need have ended
        with tuned.trying(call.choice.key.kernel, config):
            made = call.kernel.launch(**sets[0] | own)
        return [t.float() for t in compat.tree_leaves([made, own])]

    wanted = results(call.choice.default)

    def time(config: tuple[Any, ...]) -> float:
        for found, exact in zip(results(config), wanted, strict=True):
            if not (error := float((found - exact).abs().max() / exact.abs().max())) <= TOLERANCE:
                raise Refused(f"Its results must be those of the built-in config, found an error of {error:.1e}.")
        launches = min(LAUNCHES, max(1, int(MOVED_BYTES / size)))
        with tuned.trying(call.choice.key.kernel, config):
            times = replayed(lambda each: call.kernel.launch(**each), sets, launches, REPLAYS, untimed=SETTLING)
        return statistics.median(times)

    return time


def _real(arguments: dict[str, Any]) -> dict[str, Any]:
    return compat.tree_map_only(torch.Tensor, _random, arguments)


def _random(fake: torch.Tensor) -> torch.Tensor:
    """A tensor of the same layout on the GPU: small normal numbers, or any bits of quantised weights."""
    t = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=DEVICE)
    if fake.dtype == torch.float8_e4m3fn:
        return t.copy_(torch.randn(fake.shape, device=DEVICE, dtype=torch.float16))
    if fake.dtype.is_floating_point:
        return t.normal_(std=0.1)
    limits = torch.iinfo(fake.dtype)
    return t.random_(limits.min, limits.max)


def compile_ahead(found: Sequence[tuple[Call, Sequence[tuple[Any, ...]]]]) -> None:
    """Compile all configs side by side."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for call, configs in found:
            for config in configs:
                with tuned.trying(call.choice.key.kernel, config):
                    call.kernel.compile_ahead(call.arguments, pool)


def tune(
    model: torch.nn.Module, batches: Sequence[int], save: Path | None = None, clock: Callable[[Call], Any] = stopwatch
) -> dict[str, Any]:
    """Measure the choices of a model's decode steps and write them to a file, together with those that are in it already.

    Args:
        model: from `models.meta_model`.
        batches: numbers of sequences.
        save: the file; None for the one that kernels read.
        clock: makes the function that times the configs of a call, for tests.

    Returns:
        The schema, the file, what it is made for, and one row for each choice that was measured.

    Raises:
        GdnfuseError: there is no GPU or no Triton, the model's steps make no choice, or the file cannot be written.
    """
    facts = require_gpu()
    file = save or tuned.file_of(facts["card"])
    announce("trace the steps")
    found = [(call, near(call.choice.key, call.choice.default, NEAREST)) for call in calls(model, batches)]
    if not found:
        raise GdnfuseError(
            "A model to tune must have steps with kernels whose choices can be measured, found none: see gdnfuse report."
        )
    announce("compile")
    compile_ahead([(call, [call.choice.default, *others]) for call, others in found])
    rows = {}
    for i, (call, others) in enumerate(found, 1):
        announce(f"measure {i} of {len(found)}: {tuned.name_of(call.choice.key)}")
        best = search(call.choice.default, others, clock(call))
        figures = {"us": best.us, "default": list(call.choice.default), "default_us": best.default_us, "compared": best.compared}
        rows[call.choice.key] = {"config": list(best.config), **figures}
    kept: dict[Key, Any] = {}
    with suppress(Refused):
        kept = tuned.read(file, facts)
    if not save:
        file.parent.mkdir(parents=True, exist_ok=True)
    tuned.write(file, facts, kept | rows)
    tuned.forget()
    return {"schema": tuned.SCHEMA, "file": str(file), "about": facts, "choices": list(_flat(rows))}


def require_gpu() -> dict[str, Any]:
    """What choices are measured for.

    Raises:
        GdnfuseError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise GdnfuseError("gdnfuse tune measures kernels and needs a GPU, found none: run it where the model will run.")
    return tuned.about(torch.cuda.current_device())


def _flat(rows: dict[Key, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for key, row in rows.items():
        yield dict(zip(Key._fields, key, strict=True)) | row


def table(data: dict[str, Any]) -> str:
    """What `tune` returned, as text."""
    rows = []
    for row in data["choices"]:
        key = Key(row["kernel"], row["kind"], tuple(row["sizes"]), row["of"], row["rows"])
        changed = row["config"] != row["default"]
        figures = [f"{row['default_us']:.2f}", f"{row['us']:.2f}" if changed else ""]
        rows.append(
            [tuned.name_of(key), row["compared"], _config(row["default"]), _config(row["config"]) if changed else "", *figures]
        )
    headers = ["kernel", "compared", "built-in", "faster", "built-in µs", "faster µs"]
    changed = sum(row["config"] != row["default"] for row in data["choices"])
    end = f"Wrote {data['file']}: {changed} of {len(rows)} choices differ from the built-in ones on {data['about']['card']}."
    return f"{tabulate(rows, headers, disable_numparse=True)}\n\n{end}"


def _config(config: Sequence[int]) -> str:
    return "×".join(str(int(n)) for n in config)
