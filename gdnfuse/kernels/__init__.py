"""Triton kernels behind the dialect ops, one family per file. Importing this package does not import triton."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

from gdnfuse.report import Refused

if TYPE_CHECKING:
    from gdnfuse.kernels.implementation import Implementation


def implementations() -> dict[str, Implementation]:
    """The kernel behind each dialect op that has one, by the op's name.

    Registers ``torch.ops.gdnfuse_triton`` on first use.

    Raises:
        Refused: triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise Refused("Triton is required for GPU kernels; it is not installed.")
    from gdnfuse.kernels import (
        causal_conv,
        causal_conv_update,
        chunk_delta_rule,
        delta_rule,
        gated_rms_norm,
        mixer_decode,
        skinny_linear,
    )

    found = (
        causal_conv.implementation,
        causal_conv_update.implementation,
        chunk_delta_rule.chunk_delta_rule,
        chunk_delta_rule.fused_gating_chunk_delta_rule,
        delta_rule.fused_gating_delta_rule,
        delta_rule.packed_decode,
        gated_rms_norm.implementation,
        mixer_decode.implementation,
        skinny_linear.fused_linear,
        skinny_linear.in_proj_conv,
    )
    return {kernel.name: kernel for kernel in found}


def loaded() -> dict[str, int]:
    """How many machine codes of each of our kernels this process has compiled or loaded, by kernel; empty before any launch."""
    counts: dict[str, int] = {}
    for module in [m for name, m in sys.modules.items() if name.startswith("gdnfuse.kernels.")]:
        for name, kernel in vars(module).items():
            caches = getattr(kernel, "device_caches", None)
            if caches and getattr(kernel, "__module__", module.__name__) == module.__name__:
                counts[name] = sum(len(cache[0]) for cache in caches.values())
    return {name: count for name, count in counts.items() if count}
