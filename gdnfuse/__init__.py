"""gdnfuse: a torch.compile backend that fuses the Gated DeltaNet layers of stock Hugging Face models, and says what it fused.

Importing it imports neither triton nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gdnfuse.report import GdnfuseError, GraphReport, LayerReport, Record, Refused, Status, clear_reports, reports

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from gdnfuse.explanation import Explanation
    from gdnfuse.huggingface import Warmup

__all__ = [
    "GdnfuseError",
    "GraphReport",
    "LayerReport",
    "Record",
    "Refused",
    "Status",
    "capture",
    "clear_reports",
    "compile",
    "explain",
    "reports",
    "set_state_dtype",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name == "capture":  # loaded when asked for: it imports torch
        return importlib.import_module("gdnfuse.capture")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def compile(model: torch.nn.Module, *, mode: str | None = None, **options: Any) -> torch.nn.Module:
    """Compile a Hugging Face model in place for `generate()` and direct calls. See `gdnfuse.huggingface.compile`."""
    from gdnfuse import huggingface

    return huggingface.compile(model, mode=mode, **options)


def explain(call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Make a real call of a model, its `generate` or a function and say what fuses in it. See `gdnfuse.explanation.explain`."""
    from gdnfuse import explanation

    return explanation.explain(call, *args, **kwargs)


def set_state_dtype(cache: Any, dtype: torch.dtype) -> None:
    """Keep the recurrent states of a filled cache in another dtype. See `gdnfuse.huggingface.set_state_dtype`."""
    from gdnfuse import huggingface

    huggingface.set_state_dtype(cache, dtype)


def warmup(model: torch.nn.Module, **options: Any) -> Warmup:
    """Compile all that `model.generate` will need. See `gdnfuse.huggingface.warmup`."""
    from gdnfuse import huggingface

    return huggingface.warmup(model, **options)
