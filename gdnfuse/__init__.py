"""gdnfuse: a torch.compile backend that fuses the Gated DeltaNet layers of stock Hugging Face models, and says what it fused.

Importing it imports neither triton nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gdnfuse.errors import GdnfuseError, Refused
from gdnfuse.report.records import GraphReport, LayerReport, Record, Status, clear_reports, reports

if TYPE_CHECKING:
    from gdnfuse.generation.caches import set_state_dtype
    from gdnfuse.generation.compile import compile
    from gdnfuse.generation.explain import explain
    from gdnfuse.generation.mtp import MTP
    from gdnfuse.generation.prefixes import PrefixStore
    from gdnfuse.generation.proposers import Callback, Draft, PromptLookup
    from gdnfuse.generation.rollback import RollbackCache
    from gdnfuse.generation.speculation import Speculative as speculative
    from gdnfuse.generation.warmup import warmup
    from gdnfuse.slots import delta_rule_slots

    __version__: str

__all__ = [
    "MTP",
    "Callback",
    "Draft",
    "GdnfuseError",
    "GraphReport",
    "LayerReport",
    "PrefixStore",
    "PromptLookup",
    "Record",
    "Refused",
    "RollbackCache",
    "Status",
    "capture",
    "clear_reports",
    "compile",
    "delta_rule_slots",
    "explain",
    "reports",
    "set_state_dtype",
    "speculative",
    "warmup",
]


# What is loaded when asked for, because it imports torch or transformers: its module, and its name there.
_LATER = {
    "Callback": ("gdnfuse.generation.proposers", "Callback"),
    "Draft": ("gdnfuse.generation.proposers", "Draft"),
    "MTP": ("gdnfuse.generation.mtp", "MTP"),
    "PrefixStore": ("gdnfuse.generation.prefixes", "PrefixStore"),
    "PromptLookup": ("gdnfuse.generation.proposers", "PromptLookup"),
    "RollbackCache": ("gdnfuse.generation.rollback", "RollbackCache"),
    "compile": ("gdnfuse.generation.compile", "compile"),
    "delta_rule_slots": ("gdnfuse.slots", "delta_rule_slots"),
    "explain": ("gdnfuse.generation.explain", "explain"),
    "set_state_dtype": ("gdnfuse.generation.caches", "set_state_dtype"),
    "speculative": ("gdnfuse.generation.speculation", "Speculative"),
    "warmup": ("gdnfuse.generation.warmup", "warmup"),
}


def __getattr__(name: str) -> Any:
    if name == "capture":
        return importlib.import_module("gdnfuse.capture")
    if name == "__version__":
        return importlib.import_module("gdnfuse.versions").version("gdnfuse")
    if name in _LATER:
        module, attribute = _LATER[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
