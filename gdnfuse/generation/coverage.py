"""Coverage: checks at each call whether every Gated DeltaNet layer of a model ran fused, and says why if not.

The graphs count the fused layers that they run (`gdnfuse.runs`), so a call only compares two numbers. The first call of each
compilation is watched in full: which layers ran fused, and what Dynamo noted. If its graph broke inside a layer, nothing is fused
across the break, which is said even where all layers ran fused.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch

from gdnfuse import capture
from gdnfuse.breaks import describe
from gdnfuse.errors import GdnfuseError
from gdnfuse.generation.causes import GRAPH_BREAK, Found, first_break, likeliest, noted
from gdnfuse.generation.collecting import old_objects_set_aside
from gdnfuse.generation.wrappers import decoder_layers, gdn_layers
from gdnfuse.options import Options, disabled
from gdnfuse.report.records import GraphReport, reports
from gdnfuse.runs import RUNS

log = logging.getLogger(__name__)

PROMPT, STEP, VERIFY, SHORT = "prompt", "decode step", "verify step", "short step"


@dataclass(frozen=True)
class _Watched:
    """One call: what Dynamo noted, the ids of the inputs that fused layers read, and the graphs that were compiled."""

    found: Found
    inputs: set[int]
    graphs: list[GraphReport]


@dataclass(frozen=True)
class Missing:
    """Layers that did not run fused.

    Attributes:
        layers: their paths, as far as they are known.
        counts: how many of how many layers ran fused, in words.
        cause, fix: why, and what to do about it.
    """

    layers: list[str]
    counts: str
    cause: str
    fix: str


class Coverage:
    """Which GDN layers of one model ran fused.

    Args:
        model: the model whose calls are compiled.
        options: with `strict`, a call raises at its end if a layer did not run fused. Otherwise that is logged, once for each
            cause. Layers that options leave unfused on purpose do not count, nor do prompts without `capture`.
        reports: returns the reports of its graphs.
        quiet: log nothing.
        why_not: why none may run fused and what to do about it, where that is known ahead; None otherwise.

    Attributes:
        missing: layers that did not run fused, by kind of call: "prompt", "decode step", "verify step" or "short step".
        short: whether calls of a few tokens on a filled cache have their own graphs.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        options: Options,
        reports: Callable[[], Sequence[GraphReport]] = reports,
        quiet: bool = False,
        why_not: tuple[str, str] | None = None,
    ):
        self.model, self.strict, self.reports, self.quiet, self.why_not = model, options.strict, reports, quiet, why_not
        self.missing: dict[str, Missing] = {}
        self.short = False
        on_purpose = disabled() or options.stop_after is not None or options.fuel is not None
        asked = len(gdn_layers(model)) if options.strict or not on_purpose else 0
        captured = asked if options.capture else 0
        self._wanted = {STEP: asked, PROMPT: captured, VERIFY: captured, SHORT: captured}
        self._said: set[str] = set()

    def checked(self, fn: Callable[..., Any], phase: str, cause: tuple[str, str] | None = None) -> Callable[..., Any]:
        """The same compiled call. Afterwards it checks whether all layers ran fused.

        Args:
            fn: the compiled call.
            phase: the kind of call: "prompt", "decode step", "verify step" or "short step".
            cause: why layers may not run fused and what to do about it, if that is known in advance.

        Raises:
            GdnfuseError: from the call, if `strict` is set and a layer did not run fused.
        """
        wanted, first, broken = self._wanted[phase], True, ""
        if not wanted:
            return fn

        @torch.compiler.assume_constant_result  # Dynamo runs this while it traces
        def look() -> bool:
            return self._traced_for_another_backend()

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal wanted, first, broken
            if torch.compiler.is_dynamo_compiling():  # a torch.compile around the model: there this is an ordinary function
                look()
                return fn(*args, **kwargs)
            before = RUNS.fused
            watched = None
            if first:
                out, watched = self._watched(fn, args, kwargs)
                first, broken = False, self._broken(phase, watched.found)
            else:
                out = fn(*args, **kwargs)
            if (ran := RUNS.fused - before) < wanted:
                wanted = wanted if self.strict else ran
                self._examine(phase, ran, watched, cause)
            elif broken and phase not in self.missing:  # of what is missing the break may be the cause, and it has been said
                self.say(broken, broken.partition(f" in a {phase}. ")[0])
            return out

        return call

    def _traced_for_another_backend(self) -> bool:
        """Whether a torch.compile around the model traces it for one of torch's own backends. If so, it is said."""
        found = capture.backend_under_way()
        if RUNS.watched is not None or found is None or found[2] or capture.home(found[0]).split(".")[0] != "torch":
            return False  # a watched call says more itself
        backend, name = found[0], type(self.model).__name__
        of = getattr(backend, "compiler_name", None) or getattr(backend, "__name__", type(backend).__name__)
        sentence = (
            f"Calls of {name} must be left to gdnfuse.compile, found a torch.compile around them with backend {of!r}: it fuses "
            f"nothing, so call the {name} itself."
        )
        self.say(sentence, sentence)
        return True

    def _watched(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, _Watched]:
        """The result of the call, and what was seen during it."""
        outer, RUNS.watched = RUNS.watched, []
        known = len(self.reports())
        try:
            with noted() as found, old_objects_set_aside():
                out = fn(*args, **kwargs)
        except Exception as e:
            if isinstance(refused := getattr(e, "inner_exception", None), GdnfuseError):  # by the backend, under strict
                raise GdnfuseError(f"{refused} {' '.join(first_break(found, (GRAPH_BREAK,)))}".rstrip()) from e
            raise
        else:
            return out, _Watched(found, {id(x) for x in RUNS.watched}, list(self.reports()[known:]))
        finally:
            if outer is not None:
                outer.extend(RUNS.watched)
            RUNS.watched = outer

    def _examine(self, phase: str, ran: int, watched: _Watched | None, cause: tuple[str, str] | None) -> None:
        """Say which layers did not run fused and why, if the model still has as many layers as before."""
        layers = gdn_layers(self.model)
        if ran >= len(layers):
            return
        missing = list(layers)
        if watched is not None:
            missing = [path for path, A_log in layers.items() if id(A_log) not in watched.inputs]
        elif ran:
            missing = [path for path in layers if path in RUNS.unfused]
        if cause is None and watched is None and phase in self.missing:
            cause = self.missing[phase].cause, self.missing[phase].fix
        found, graphs = (watched.found, watched.graphs or self.reports()) if watched else (None, self.reports()[-1:])
        why, fix = cause or self.why_not or likeliest(found, graphs, missing)
        counts = f"{ran} of {len(layers)} in a {phase}{in_parentheses(missing)}"
        self.missing[phase] = Missing(missing, counts, why, fix)
        name = type(self.model).__name__
        self.say(f"Every GDN layer of {name} must run fused, found {counts}. {why} {fix}".rstrip(), why)

    def _broken(self, phase: str, found: Found) -> str:
        """The sentence on graph breaks inside decoder layers, or empty. Those before and behind all layers cost no fusion."""
        codes = decoder_layers(self.model)
        inside = [r for r in found.reasons if any(frame_is_in(frame, codes) for frame in r.user_stack)]
        if not inside:
            return ""
        where, cause, fix = describe(inside[0].reason, inside[0].user_stack)
        return (
            f"Every layer of {type(self.model).__name__} must be traced as a whole, found that its graph breaks at {where} in a "
            f"{phase}. {cause} Nothing is fused across it. {fix}"
        ).rstrip()

    def say(self, sentence: str, cause: str = "") -> None:
        """Raise the sentence if `strict` is set. Otherwise log it, once for each cause."""
        if self.strict:
            raise GdnfuseError(f"strict: {sentence}")
        if cause not in self._said:
            self._said.add(cause)
            log.log(logging.DEBUG if self.quiet else logging.WARNING, sentence)


def frame_is_in(frame: traceback.FrameSummary, codes: Iterable[CodeType]) -> bool:
    """Whether a line of a stack is one of these functions'."""
    for code in codes:
        lines = [line for *_, line in code.co_lines() if line]
        if frame.filename == code.co_filename and min(lines) <= (frame.lineno or 0) <= max(lines):
            return True
    return False


def in_parentheses(layers: Sequence[str]) -> str:
    """The first of the missing layers and the number of others, in parentheses. Empty if they are not known."""
    more = f" and {len(layers) - 1} more" if layers[1:] else ""
    return f" (not {layers[0]}{more})" if layers else ""
