"""Causes: what kept a call from being one fused graph, in torch's words, and what to do about each.

They are read where torch keeps them, before and after the call: in `graph_break_reasons`, and in the metrics that Dynamo records
for each compilation.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gdnfuse import compat
from gdnfuse.breaks import BREAKS, HOOKS, describe, function, remedy, sentence
from gdnfuse.report.records import GraphReport

METRICS = 4096  # how many compilations torch remembers during one call; its default is 64

# A fragment of torch's message, and what to do about it. The first match is used.
RECOMPILES = (
    (
        r"(?:keys|values)\S*' size mismatch",
        'Use a cache that does not grow: generate(cache_implementation="static"), or a StaticCache in a loop of your own.',
    ),
    (
        r"size mismatch|\.size\(\)\[|stride mismatch",
        "The second size compiles a graph for all sizes. With dynamic=True that happens at the first.",
    ),
    (r"GLOBAL_STATE|grad_mode|is_grad", "Run every call under the same mode: all of them under torch.no_grad()."),
    (
        r"dispatch key",
        "Run every call under the same mode: tensors from torch.inference_mode() differ from those of torch.no_grad().",
    ),
    (r"dtype|expected type|device", "Use inputs of the same kinds, dtypes and devices in every call."),
    (
        r"has_previous_state|is_initialized|_states|cumulative_length",
        "Compile prompts and decode steps separately, as gdnfuse.compile does: a filled cache needs another graph.",
    ),
    (r"layer_idx|___check_obj_id|___check_type_id|ID_MATCH", "Compile the whole model, not its layers one by one."),
    (
        r" == \S+",
        "A Python number is a constant in its graph: pass a number that changes as a tensor, or compile with dynamic=True.",
    ),
)
LIMIT = "Remove the cause of the recompilations. If all are needed, raise torch._dynamo.config.{}."
NOTES = (
    (r"without gradients", "Call under torch.no_grad() or torch.inference_mode(), or model.requires_grad_(False)."),
    (r"autocast", "Do not use autocast; load the model in the dtype that it should run in."),
    (r"one mode from start to end", "Enter autocast or inference mode around the compiled call, not inside it."),
    (r"leave graphs alone", "Unset GDNFUSE_DISABLE."),
    (r"on one device", 'Load the model on one device, with device_map={"": 0} or none.'),
)


GRAPH_BREAK, LEFT_EAGER = "graph break", "frame left eager"


@dataclass(frozen=True)
class Finding:
    """Something that kept a call from being one fused graph.

    Attributes:
        kind: "layers not fused", "graph break", "frame left eager", "recompilation", "recompilation limit", "graph left
            unchanged" or "not compiled".
        cause: why, in the words of torch or of gdnfuse.
        where: "file:line in function", the function that was called or compiled again, or the graph.
        fix: what to do. Empty if there is no suggestion.
        count: how often.
    """

    kind: str
    cause: str
    where: str
    fix: str
    count: int = 1


class Found:
    """What Dynamo has noted since this object was made."""

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
        """Graph breaks, each place once. Code after a break in an inner function is traced again, and breaks again."""
        found = {}
        for reason in self.reasons:
            where, cause, fix = describe(reason.reason, reason.user_stack)
            found[where] = Finding(GRAPH_BREAK, cause, where, fix)
        for m in self.metrics:
            if m.fail_reason and not _limit(m):
                at = (m.fail_user_frame_filename, m.fail_user_frame_lineno)
                file, line = at if all(at) else (m.co_filename, m.co_firstlineno)
                where = f"{file}:{line} in {function(m.co_name)}"
                found[where] = Finding(
                    "frame left eager", sentence(m.fail_reason), where, remedy(BREAKS, f"{where} {m.fail_reason}")
                )
        return list(found.values())

    def recompilations(self, names: dict[str, str]) -> list[Finding]:
        """Recompilations, those with the same cause together, and limits that torch hit.

        Args:
            names: names of code that we compile, and what they stand for.
        """
        found: dict[Finding, int] = {}
        for one in (_again(m, names) for m in self.metrics):
            if one is not None:
                found[one] = found.get(one, 0) + 1
        return [Finding(f.kind, f.cause, f.where, f.fix, n) for f, n in found.items()]

    def limit(self) -> Finding | None:
        """The last recompilation limit that torch hit."""
        return next((_again(m, {}) for m in reversed(self.metrics) if _limit(m)), None)


@contextlib.contextmanager
def noted() -> Iterator[Found]:
    """What Dynamo notes inside the block, without its usual limit on how much it remembers."""
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
    """Why layers did not run fused in a call, and what to do about it, each as sentences.

    Args:
        found: what Dynamo noted during the call. None if that is not known; then only limits are known.
        graphs: graphs that the call compiled, or earlier ones if it compiled none.
        missing: paths of the layers.
    """
    if came := left(graphs):
        return came[-1].cause, came[-1].fix
    unfused = {layer.path: layer.why_not for graph in graphs for layer in graph.layers if not layer.fused}
    # A layer that is whole in a graph has its path in the model. A layer in pieces does not: then the break is the cause.
    if whole := next((unfused[path] for path in missing if path in unfused), ""):
        return whole, ""
    limit = (found or Found.ever()).limit()
    at, fix = first_break(found) if found is not None else ("", "")
    if limit and fix not in [fix for _, fix in HOOKS]:  # hooks on all modules hit the limit too
        return limit.cause, limit.fix
    if at:
        return at, fix
    if unfused:
        return next(iter(unfused.values())), ""
    if found is None:
        return LATER
    return NOT_KNOWN if graphs else NOT_TRACED


def first_break(found: Found, kinds: Sequence[str] = (GRAPH_BREAK, LEFT_EAGER)) -> tuple[str, str]:
    """Where the graph of a call breaks and why, and what to do about it, each as sentences. Both are empty if it does not break.

    This is the first break, or one at a hook of a library if there is any, because such hooks are on every module.
    """
    breaks = [b for b in found.breaks() if b.kind in kinds]
    if not breaks:
        return "", ""
    first = next((b for b in breaks if any(b.fix == fix for _, fix in HOOKS)), breaks[0])
    more = f" That is one of {len(breaks)} such places." if len(breaks) > 1 else ""
    return f"{first.kind.capitalize()} at {first.where}: {first.cause}{more}", first.fix


def _again(m: Any, names: dict[str, str]) -> Finding | None:
    """The recompilation that a metric describes, or the limit that torch hit there. None if the cause is not known."""
    reason = _reason(m.recompile_reason or "")
    where = names.get(m.co_name) or f"{m.co_filename}:{m.co_firstlineno} in {function(m.co_name)}"
    # For code that was compiled before, by somebody else, Dynamo gives no better cause.
    unknown = not reason or "BACKEND_MATCH" in reason or "Unable to find" in reason
    if limit := _limit(m):
        last = "" if unknown else f" Last cause: {reason}."
        return Finding("recompilation limit", f"torch left it eager at {limit}.{last}", where, LIMIT.format(limit))
    return None if unknown else Finding("recompilation", reason, where, remedy(RECOMPILES, reason))


def _reason(text: str) -> str:
    """The text without the number of the compilation, the line of code after a guard, and the stack."""
    first = (text.splitlines() or [""])[0]
    return re.sub(r"^\[?\d+/\d+\S*: |\s{2,}# .*", "", first).strip()


def _limit(m: Any) -> str:
    """The setting that stopped recompilation, or an empty string."""
    found = re.search(r"Limit type: (\w+)", m.fail_reason or "")
    return found[1] if found else ""
