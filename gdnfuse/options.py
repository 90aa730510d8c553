"""Every option of the backend: its default and its check."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

from gdnfuse.errors import GdnfuseError

STAGES = ("normalize", "lift", "fuse", "lay_out", "lower")
DISABLE = "GDNFUSE_DISABLE"
INNER = ("inductor", "aot_eager", "eager")
ONE_SHOT_MOST, MEASURED = 2**20, "measured"  # of one_shot_bytes


@dataclass(frozen=True)
class Options:
    """Options of `torch.compile(model, backend="gdnfuse", options={...})`.

    Attributes:
        inner: what compiles the rewritten graph: "inductor", "aot_eager" or "eager".
        inductor: options handed to Inductor as they are, e.g. {"max_autotune": True}.
        strict: raise when a GDN layer of a decode graph, or with `capture` of a prefill graph, stays unfused.
        capture: while Dynamo traces for this backend, let transformers' rule and conv functions become dialect ops.
        stop_after: a stage, one of STAGES, to stop after; its graph runs and is in the report.
        verify: run the rewritten graph and the graph as it came on copies of the first call's inputs, and compile the latter if
            ours is less accurate.
        fuel: rewrites that may be made, None for all of them; which one a difference comes from is found with it.
        checkpoint_every: if not 0, a multiple of 64: the graph of a prompt also leaves the states of its GDN layers after every
            so many tokens in `gdnfuse.runs.RUNS.checkpoints`, where somebody collects them. A prefix store has prompts do it.
        one_shot_bytes: sums over ranks of at most so many bytes go through symmetric memory, by one launch that reads all ranks'
            parts. MEASURED is for `gdnfuse.compile` with `tensor_parallel`, which times up to which size that is faster.
        target: device type the lowering assumes, e.g. "cuda"; None takes it from the tensors. For reports without a GPU.
    """

    inner: str = "inductor"
    inductor: dict[str, Any] = field(default_factory=dict)
    strict: bool = False
    capture: bool = True
    stop_after: str | None = None
    verify: bool = False
    fuel: int | None = None
    checkpoint_every: int = 0
    one_shot_bytes: int | str = 0
    target: str | None = None


def disabled() -> bool:
    """Whether the environment asks to leave every graph as it came."""
    return os.environ.get(DISABLE, "0") not in ("", "0")


def parse(given: dict[str, Any] | None) -> Options:
    """Check options as the user wrote them.

    Raises:
        GdnfuseError: an unknown key (named, with the valid ones) or a value of the wrong kind.
    """
    given = dict(given or {})
    valid = [f.name for f in dataclasses.fields(Options)]
    unknown = [k for k in given if k not in valid]
    if unknown:
        raise GdnfuseError(
            f"Unknown gdnfuse option {', '.join(map(repr, unknown))}; the valid ones are {', '.join(valid)}. "
            'Options of Inductor go under "inductor".'
        )
    options = Options(**given)
    _one_of("inner", options.inner, INNER)
    _one_of("stop_after", options.stop_after, (None, *STAGES))
    for name in ("strict", "capture", "verify"):
        if not isinstance(getattr(options, name), bool):
            raise GdnfuseError(f"Option {name} must be True or False, found {getattr(options, name)!r}.")
    if options.fuel is not None and (type(options.fuel) is not int or options.fuel < 0):
        raise GdnfuseError(f"Option fuel must be a number of rewrites or None, found {options.fuel!r}.")
    every = options.checkpoint_every
    if type(every) is not int or every < 0 or every % 64:
        raise GdnfuseError(f"Option checkpoint_every must be 0 or a multiple of 64 tokens, found {every!r}.")
    most = options.one_shot_bytes
    if most != MEASURED and (type(most) is not int or not 0 <= most <= ONE_SHOT_MOST):
        raise GdnfuseError(f"Option one_shot_bytes must be {MEASURED!r} or bytes, at most {ONE_SHOT_MOST}, found {most!r}.")
    if options.target is not None and not isinstance(options.target, str):
        raise GdnfuseError(f"Option target must be a device type such as 'cuda', found {options.target!r}.")
    if not isinstance(options.inductor, dict) or not all(isinstance(k, str) for k in options.inductor):
        raise GdnfuseError(f"Option inductor must be a dict of Inductor options, found {options.inductor!r}.")
    if options.inductor and options.inner != "inductor":
        raise GdnfuseError(f"Option inductor needs inner='inductor', found inner={options.inner!r}.")
    return options


def _one_of(name: str, found: Any, allowed: tuple[Any, ...]) -> None:
    if found not in allowed:
        raise GdnfuseError(f"Option {name} must be one of {', '.join(map(repr, allowed))}, found {found!r}.")
