"""gdnfuse: a torch.compile backend that fuses the Gated DeltaNet layers of stock Hugging Face models, and says what it fused.

Importing it imports neither triton nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gdnfuse.errors import GdnfuseError, Refused
from gdnfuse.report.records import GraphReport, LayerReport, Record, Status, clear_reports, reports

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from gdnfuse.generation.explain import Explanation
    from gdnfuse.generation.mtp import MTP
    from gdnfuse.generation.prefixes import PrefixStore
    from gdnfuse.generation.proposers import Callback, Draft, PromptLookup
    from gdnfuse.generation.rollback import RollbackCache
    from gdnfuse.generation.speculation import Speculative
    from gdnfuse.generation.warmup import Warmup

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
    "explain",
    "reports",
    "set_state_dtype",
    "speculative",
    "warmup",
]


# What is loaded when asked for, because it imports torch or transformers.
_LATER = {
    "Callback": "gdnfuse.generation.proposers",
    "Draft": "gdnfuse.generation.proposers",
    "MTP": "gdnfuse.generation.mtp",
    "PrefixStore": "gdnfuse.generation.prefixes",
    "PromptLookup": "gdnfuse.generation.proposers",
    "RollbackCache": "gdnfuse.generation.rollback",
}


def __getattr__(name: str) -> Any:
    if name == "capture":
        return importlib.import_module("gdnfuse.capture")
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def compile(model: torch.nn.Module, *, mode: str | None = None, **options: Any) -> torch.nn.Module:
    """Compile a Hugging Face model in place for `generate()` and direct calls. See `gdnfuse.generation.compile.compile`."""
    from gdnfuse.generation import compile

    return compile.compile(model, mode=mode, **options)


def explain(call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Make a real call of a model, its `generate` or a function, and say what fuses in it. See `gdnfuse.generation.explain`."""
    from gdnfuse.generation import explain

    return explain.explain(call, *args, **kwargs)


def set_state_dtype(cache: Any, dtype: torch.dtype) -> None:
    """Keep the recurrent states of a filled cache in another dtype. See `gdnfuse.generation.caches.set_state_dtype`."""
    from gdnfuse.generation import caches

    caches.set_state_dtype(cache, dtype)


def speculative(speculate: Any, streamer: Any = None) -> Speculative:
    """Speculative decoding as `generate` takes it, `custom_generate=`. See `gdnfuse.generation.speculation.Speculative`."""
    from gdnfuse.generation.speculation import Speculative

    return Speculative(speculate, streamer)


def warmup(model: torch.nn.Module, **options: Any) -> Warmup:
    """Compile all that `model.generate` will need. See `gdnfuse.generation.warmup.warmup`."""
    from gdnfuse.generation import warmup

    return warmup.warmup(model, **options)
