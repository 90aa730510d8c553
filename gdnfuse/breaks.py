"""Graph breaks: where and why Dynamo ended a graph before its function was done, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

# A fragment of torch's message, and what to do about it. The first match is used, else torch's own hint.
HOOKS = (  # of libraries that put hooks on every module
    (
        r"accelerate[/.]hooks|AlignDevicesHook",
        "accelerate's hooks, which a device_map over several devices and offloading put on every module, cannot be traced: "
        'load the model on one device, with device_map={"": 0} or none, or compile one on several GPUs with gdnfuse.compile.',
    ),
    (
        r"compressed_tensors",
        "Call gdnfuse.models.keep_compressed(model) before the model's first call, or load the weights decompressed: "
        "CompressedTensorsConfig(dequantize=True), run_compressed=False in older versions.",
    ),
)
BREAKS = (
    *HOOKS,
    (
        r"generic_jump|[Dd]ata-dependent",
        "Make the decision outside the compiled call, or without a branch: torch.where, torch.cond.",
    ),
    (
        r"\.item|scalar",
        "Keep the value in a tensor, or read it outside the compiled call. torch._dynamo.config.capture_scalar_outputs keeps it "
        "in the graph.",
    ),
    (r"`print`|[Ll]ogg", "Remove the output from the call, or name it in torch._dynamo.config.reorderable_logging_functions."),
    (r"fla\.|causal_conv1d", "Leave capture on: it replaces the library's function by an op of gdnfuse."),
    (r"graph_break\(\)", "Remove the call of torch._dynamo.graph_break from the code."),
    (r"[Dd]isable", "Remove the disabled function from the model's call, or remove its torch.compiler.disable."),
)
# A file on the way to the break, where nothing above says more.
THROUGH = (
    (
        r"[/\\]peft[/\\]tuners[/\\]",
        "Merge the adapter with peft's merge_adapter(), or use LoRA without use_dora and target_parameters, which is traced.",
    ),
)


class Break(NamedTuple):
    """A graph break.

    Attributes:
        where: "file:line in function".
        cause: why, in torch's words, as sentences.
        fix: what to do, a sentence. Empty if there is no suggestion.
    """

    where: str
    cause: str
    fix: str


def describe(reason: str, stack: Sequence[Any]) -> Break:
    """Describe a break in words.

    Args:
        reason: torch's message.
        stack: the frames on the way to it, outermost first, as of traceback.
    """
    frame = stack[-1] if stack else None
    where = f"{frame.filename}:{frame.lineno} in {function(frame.name)}" if frame else "unknown"
    cause = "Data-dependent branching." if reason.startswith("generic_jump") else sentence(reason)
    files = "\n".join(f.filename for f in stack)
    return Break(where, cause, remedy(BREAKS, f"{where} {reason}", remedy(THROUGH, files)))


def remedy(known: Sequence[tuple[str, str]], text: str, otherwise: str = "") -> str:
    """The remedy of the first pattern that matches the text, else `otherwise`, else the hint in the text."""
    hint = re.search(r"^ *Hint: (.+)", text, re.MULTILINE)
    return next((fix for pattern, fix in known if re.search(pattern, text)), otherwise or (hint[1].strip() if hint else ""))


def sentence(text: str) -> str:
    """The first line of torch's message, and its explanation."""
    explanation = re.search(r"^ *Explanation: (.+)", text, re.MULTILINE)
    lines = text.strip().splitlines() or ["unknown"]
    first = (lines[1] if lines[1:] and lines[0].endswith("raised:") else lines[0]).rstrip(".")
    return f"{first}. {explanation[1].strip().rstrip('.')}." if explanation else f"{first}."


def function(name: str) -> str:
    """The function that a name stands for. Dynamo gives the rest of a function after a break a name of its own."""
    return re.sub(r"^torch_dynamo_resume_in_(.+)_at_\d+$", r"\1", name or "unknown")
