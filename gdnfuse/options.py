"""All options of the backend, with defaults and checks."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

from gdnfuse.errors import GdnfuseError

STAGES = ("normalize", "lift", "fuse", "lay_out", "lower")
DISABLE = "GDNFUSE_DISABLE"
INNER = ("inductor", "aot_eager", "eager")
ACTIVATIONS = (None, "fp8")
ONE_SHOT_MOST, MEASURED = 2**20, "measured"  # largest value of one_shot_bytes, and the value to measure it


@dataclass(frozen=True)
class Options:
    """Options of `torch.compile(model, backend="gdnfuse", options={...})`.

    Attributes:
        inner: what compiles the rewritten graph: "inductor", "aot_eager" or "eager".
        inductor: options for Inductor, e.g. {"max_autotune": True}.
        strict: raise if a GDN layer of a decode graph stays unfused; with `capture` also of a prefill graph.
        capture: turn transformers' rule and conv functions into dialect ops while Dynamo traces for this backend.
        stop_after: the stage to stop after, one of STAGES. The graph of that stage runs and is in the report.
        verify: run the rewritten and the original graph on copies of the first call's inputs, and compile the original one if the
            rewritten one is less accurate.
        activations: "fp8" to quantise the activations of prompts to e4m3 before linears whose weights are e4m3 (W8A8), as
            transformers does. None leaves them in the model's dtype (W8A16), which is more accurate. Steps are always W8A16.
        fuel: how many rewrites may be made; None for all. It helps to find the rewrite that causes a difference.
        checkpoint_every: 0, or a multiple of 64. The graph of a prompt then also leaves the states of its GDN layers after every
            so many tokens in `gdnfuse.runs.RUNS.checkpoints`, if somebody collects them. A prefix store sets this option.
        one_shot_bytes: sums over ranks of at most so many bytes go through symmetric memory, in one launch of each rank. MEASURED
            is for `gdnfuse.compile` with `tensor_parallel`: it measures up to which size that is faster.
        target: the device type to choose kernels for, e.g. "cuda". None takes it from the tensors. For reports without a GPU.
    """

    inner: str = "inductor"
    inductor: dict[str, Any] = field(default_factory=dict)
    strict: bool = False
    capture: bool = True
    stop_after: str | None = None
    verify: bool = False
    activations: str | None = None
    fuel: int | None = None
    checkpoint_every: int = 0
    one_shot_bytes: int | str = 0
    target: str | None = None


def disabled() -> bool:
    """Whether the environment asks to leave every graph unchanged."""
    return os.environ.get(DISABLE, "0") not in ("", "0")


def parse(given: dict[str, Any] | None) -> Options:
    """Check options that the user gave.

    Raises:
        GdnfuseError: an unknown option, or a value of the wrong kind.
    """
    given = dict(given or {})
    valid = [f.name for f in dataclasses.fields(Options)]
    unknown = [k for k in given if k not in valid]
    if unknown:
        raise GdnfuseError(
            f"Options must be among {', '.join(valid)}, found {', '.join(map(repr, unknown))}: correct the name, or put options "
            'of Inductor under "inductor".'
        )
    options = Options(**given)
    _one_of("inner", options.inner, INNER)
    _one_of("stop_after", options.stop_after, (None, *STAGES))
    _one_of("activations", options.activations, ACTIVATIONS)
    for name in ("strict", "capture", "verify"):
        if not isinstance(getattr(options, name), bool):
            raise GdnfuseError(f"Option {name} must be True or False, found {getattr(options, name)!r}.")
    if options.fuel is not None and (type(options.fuel) is not int or options.fuel < 0):
        raise GdnfuseError(f"Option fuel must be a number of rewrites or None, found {options.fuel!r}.")
    if options.activations and options.verify:
        raise GdnfuseError(
            "Option verify compares with activations in the model's dtype, so it cannot be used with activations="
            f"{options.activations!r}: leave one of them out."
        )
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
        raise GdnfuseError(f"Option inductor needs inner='inductor', found inner={options.inner!r}: leave one of them out.")
    return options


def _one_of(name: str, found: Any, allowed: tuple[Any, ...]) -> None:
    if found not in allowed:
        raise GdnfuseError(f"Option {name} must be one of {', '.join(map(repr, allowed))}, found {found!r}.")
