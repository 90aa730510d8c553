"""Causes: what stood between a call and one fused graph, in torch's words, and what to do about each.

They are read where torch keeps them, before and after the call: `graph_break_reasons`, and the metrics that Dynamo records of
each compilation.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gdnfuse import compat
from gdnfuse.report.records import GraphReport

METRICS = 4096  # compilations of one call that torch is asked to remember; 64 otherwise

# What is found in torch's words → what to do. The first that matches holds; torch's own hint otherwise.
HOOKS = (  # that libraries put around every module
    (
        r"accelerate[/.]hooks|AlignDevicesHook",
        "accelerate's hooks, which a device_map over several devices and offloading put around every module, are never traced: "
        'load the model on one device, with device_map={"": 0} or none.',
    ),
    (
        r"compressed_tensors",
        "Call gdnfuse.models.keep_compressed(model) before the model's first call, or load the weights decompressed: "
        "CompressedTensorsConfig(dequantize=True), run_compressed=False in older versions.",
    ),
)
BREAKS = (
    *HOOKS,
    (r"generic_jump|[Dd]ata-dependent", "Decide it outside the compiled call, or without a branch: torch.where, torch.cond."),
    (
        r"\.item|scalar",
        "Keep the value in a tensor, or read it outside the compiled call; torch._dynamo.config.capture_scalar_outputs keeps it "
        "in the graph.",
    ),
    (r"`print`|[Ll]ogg", "Take the output out of the call, or name it in torch._dynamo.config.reorderable_logging_functions."),
    (r"fla\.|causal_conv1d", "Leave capture on: it takes our op in the place of the library's function."),
    (r"graph_break\(\)", "Remove the call of torch._dynamo.graph_break from the code."),
    (r"[Dd]isable", "Take the function that may not be traced out of the model's call, or lift its torch.compiler.disable."),
)
RECOMPILES = (
    (
        r"(?:keys|values)\S*' size mismatch",
        'Use a cache that does not grow: generate(cache_implementation="static"), or a StaticCache in a loop of your own.',
    ),
    (
        r"size mismatch|\.size\(\)\[|stride mismatch",
        "Sizes that change get a graph for all of them at the second one; dynamic=True makes that one at once.",
    ),
    (r"GLOBAL_STATE|grad_mode|is_grad", "Run every call under the same mode: all of them under torch.no_grad()."),
    (
        r"dispatch key",
        "Run every call under the same mode: tensors made under torch.inference_mode() are others than those of torch.no_grad().",
    ),
    (r"dtype|expected type|device", "Give every call inputs of the same kinds, dtypes and devices."),
    (
        r"has_previous_state|is_initialized|_states|cumulative_length",
        "Let prompts and decode steps be compiled apart, as gdnfuse.compile does: a cache is another one once it is filled.",
    ),
    (r"layer_idx|___check_obj_id|___check_type_id|ID_MATCH", "Compile the model as a whole rather than its layers one by one."),
    (
        r" == \S+",
        "A Python number is a constant of its graph: hand over one that changes as a tensor, or compile with dynamic=True.",
    ),
)
LIMIT = "Remove what compiles it again; if all of it is wanted, raise torch._dynamo.config.{}."
NOTES = (
    (r"without gradients", "Call under torch.no_grad() or torch.inference_mode(), or model.requires_grad_(False)."),
    (r"autocast", "Leave autocast out and load the model in the dtype it should run in."),
    (r"one mode from start to end", "Enter autocast or inference mode around the compiled call, not inside it."),
    (r"leave graphs alone", "Unset GDNFUSE_DISABLE."),
    (r"on one device", 'Load the model on one device, with device_map={"": 0} or none.'),
)


GRAPH_BREAK, LEFT_EAGER = "graph break", "frame left eager"


@dataclass(frozen=True)
class Finding:
    """Something between the call and one fused graph.

    Attributes:
        kind: "layers not fused", "graph break", "frame left eager", "recompilation", "recompilation limit", "graph left as it
            came" or "not compiled".
        cause: in torch's words or ours.
        where: "file:line in function", what was called or compiled again, or the graph.
        fix: a suggestion, or empty where there is none.
        count: how often.
    """

    kind: str
    cause: str
    where: str
    fix: str
    count: int = 1


class Found:
    """What Dynamo noted since this was made."""

    def __init__(self) -> None:
        reasons, metrics = compat.compilation_notes()
        self._known = [*reasons, *metrics]
        self.reasons: list[Any] = []
        self.metrics: list[Any] = []

    @classmethod
    def ever(cls) -> Found:
        """All that Dynamo still remembers."""
        found = cls()
        found._known = []
        found.read()
        return found

    def read(self) -> None:
        known = {id(x) for x in self._known}
        self.reasons, self.metrics = ([x for x in notes if id(x) not in known] for notes in compat.compilation_notes())

    def breaks(self) -> list[Finding]:
        """Each place once: what is behind a break in an inner function is traced again, and breaks again."""
        found = {}
        for reason in self.reasons:
            frame = reason.user_stack[-1] if reason.user_stack else None
            where = f"{frame.filename}:{frame.lineno} in {_function(frame.name)}" if frame else "unknown"
            cause = "Data-dependent branching." if reason.reason.startswith("generic_jump") else _cause(reason.reason)
            found[where] = Finding(GRAPH_BREAK, cause, where, remedy(BREAKS, f"{where} {reason.reason}"))
        for m in self.metrics:
            if m.fail_reason and not _limit(m):
                at = (m.fail_user_frame_filename, m.fail_user_frame_lineno)
                file, line = at if all(at) else (m.co_filename, m.co_firstlineno)
                where = f"{file}:{line} in {_function(m.co_name)}"
                found[where] = Finding(
                    "frame left eager", _cause(m.fail_reason), where, remedy(BREAKS, f"{where} {m.fail_reason}")
                )
        return list(found.values())

    def recompilations(self, names: dict[str, str]) -> list[Finding]:
        """Those with the same cause together, and where torch gave up.

        Args:
            names: of the code that we compile, and what it stands for.
        """
        found: dict[Finding, int] = {}
        for one in (_again(m, names) for m in self.metrics):
            if one is not None:
                found[one] = found.get(one, 0) + 1
        return [Finding(f.kind, f.cause, f.where, f.fix, n) for f, n in found.items()]

    def limit(self) -> Finding | None:
        """Where torch gave up last."""
        return next((_again(m, {}) for m in reversed(self.metrics) if _limit(m)), None)


@contextlib.contextmanager
def noted() -> Iterator[Found]:
    """What Dynamo notes meanwhile, however much it is."""
    with compat.remembering_compilations(METRICS):
        found = Found()
        try:
            yield found
        finally:
            found.read()


def left(reports: Sequence[GraphReport]) -> list[Finding]:
    """A finding for each graph that was compiled unchanged."""
    not_rewritten = [r for r in reports if not r.rewritten]
    return [Finding("graph left unchanged", r.note, f"graph {r.graph_id}", remedy(NOTES, r.note)) for r in not_rewritten]


NOT_TRACED = (
    "No graph was made of it.",
    "See whether compilation is off (TORCH_COMPILE_DISABLE, torch.compiler.set_stance, torch._dynamo.config.disable).",
)

LATER = ("At its first call they did.", "gdnfuse.explain of this call says what has changed.")
NOT_KNOWN = ("In its graphs no rule finds the gates of a GDN layer.", "gdnfuse.explain lists what the rules saw.")


def likeliest(found: Found | None, graphs: Sequence[GraphReport], missing: Sequence[str]) -> tuple[str, str]:
    """Why layers did not run fused in a call, and what to do about it, each in sentences.

    Args:
        found: what Dynamo noted of the call; None where that is not known, but for what it still remembers of limits.
        graphs: compiled by the call, or before it if it compiled none.
        missing: paths of the layers.
    """
    if came := left(graphs):
        return came[-1].cause, came[-1].fix
    unfused = {layer.path: layer.why_not for graph in graphs for layer in graph.layers if not layer.fused}
    # A layer that a graph holds as a whole has the path that it has in the model. One in pieces has not: the break is to blame.
    if whole := next((unfused[path] for path in missing if path in unfused), ""):
        return whole, ""
    limit = (found or Found.ever()).limit()
    at, fix = first_break(found) if found is not None else ("", "")
    if limit and fix not in [fix for _, fix in HOOKS]:  # hooks around all modules hit the limit too
        return limit.cause, limit.fix
    if at:
        return at, fix
    if unfused:
        return next(iter(unfused.values())), ""
    if found is None:
        return LATER
    return NOT_KNOWN if graphs else NOT_TRACED


def first_break(found: Found, kinds: Sequence[str] = (GRAPH_BREAK, LEFT_EAGER)) -> tuple[str, str]:
    """Where a call left its graph and why, and what to do about it, each in sentences; two empty ones where it did not.

    The first place, or one of a library's hooks where there are any: those are at every module.
    """
    breaks = [b for b in found.breaks() if b.kind in kinds]
    if not breaks:
        return "", ""
    first = next((b for b in breaks if any(b.fix == fix for _, fix in HOOKS)), breaks[0])
    more = f" That is one of {len(breaks)} such places." if len(breaks) > 1 else ""
    return f"{first.kind.capitalize()} at {first.where}: {first.cause}{more}", first.fix


def remedy(known: Sequence[tuple[str, str]], text: str) -> str:
    """What one of these lists says about a text, or the hint in it."""
    hint = re.search(r"^ *Hint: (.+)", text, re.MULTILINE)
    return next((fix for pattern, fix in known if re.search(pattern, text)), hint[1].strip() if hint else "")


def _again(m: Any, names: dict[str, str]) -> Finding | None:
    """The recompilation that a metric is of, if it is of one and the cause is known, or the limit that torch hit there."""
    reason = _reason(m.recompile_reason or "")
    where = names.get(m.co_name) or f"{m.co_filename}:{m.co_firstlineno} in {_function(m.co_name)}"
    # Of code that was compiled before, by somebody else, Dynamo has nothing better to say.
    unknown = not reason or "BACKEND_MATCH" in reason or "Unable to find" in reason
    if limit := _limit(m):
        last = "" if unknown else f" Last cause: {reason}."
        return Finding("recompilation limit", f"torch left it eager at {limit}.{last}", where, LIMIT.format(limit))
    return None if unknown else Finding("recompilation", reason, where, remedy(RECOMPILES, reason))


def _cause(text: str) -> str:
    """The first line of torch's message, and its explanation."""
    explanation = re.search(r"^ *Explanation: (.+)", text, re.MULTILINE)
    lines = text.strip().splitlines() or ["unknown"]
    first = (lines[1] if lines[1:] and lines[0].endswith("raised:") else lines[0]).rstrip(".")
    return f"{first}. {explanation[1].strip().rstrip('.')}." if explanation else f"{first}."


def _reason(text: str) -> str:
    """Without the number of the compilation, the line of code that follows a guard, and the stack."""
    first = (text.splitlines() or [""])[0]
    return re.sub(r"^\[?\d+/\d+\S*: |\s{2,}# .*", "", first).strip()


def _limit(m: Any) -> str:
    """The setting that ended recompilation, or empty."""
    found = re.search(r"Limit type: (\w+)", m.fail_reason or "")
    return found[1] if found else ""


def _function(name: str) -> str:
    """What Dynamo calls the rest of a function behind a break is that function."""
    return re.sub(r"^torch_dynamo_resume_in_(.+)_at_\d+$", r"\1", name or "unknown")
