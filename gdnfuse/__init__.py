"""gdnfuse: a torch.compile backend that fuses the Gated DeltaNet layers of stock Hugging Face models, and says what it fused.

Importing it imports neither triton nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gdnfuse.report import GdnfuseError, GraphReport, LayerReport, Record, Refused, Status, clear_reports, reports

if TYPE_CHECKING:
    import torch

__all__ = [
    "GdnfuseError",
    "GraphReport",
    "LayerReport",
    "Record",
    "Refused",
    "Status",
    "clear_reports",
    "compile",
    "reports",
]


def compile(model: torch.nn.Module, *, mode: str | None = None, **options: Any) -> torch.nn.Module:
    """Compile a Hugging Face model in place for `generate()` and direct calls. See `gdnfuse.huggingface.compile`."""
    from gdnfuse import huggingface

    return huggingface.compile(model, mode=mode, **options)
