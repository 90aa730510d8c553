"""Checks the arguments of a call of a model before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from gdnfuse import compat
from gdnfuse.errors import GdnfuseError
from gdnfuse.generation.caches import cache_finder


def parameters_of(model: torch.nn.Module) -> list[str]:
    """The names of a model's positional parameters."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]


def checking_arguments(model: torch.nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call, which first checks its arguments.

    Raises:
        GdnfuseError: from the call: there is no row or no token, or `cu_seq_lens_q` packs sequences that attention would mix.
    """
    parameters, find_cache = parameters_of(model), cache_finder()
    config = getattr(model, "config", None)

    def checked(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            given = dict(zip(parameters, args, strict=False)) | kwargs
            for name in ("input_ids", "inputs_embeds"):
                if isinstance(tokens := given.get(name), torch.Tensor) and 0 in tokens.shape[:2]:
                    found = f"{name} of the shape {list(tokens.shape)}"
                    raise GdnfuseError(f"A call must have at least one row and one token, found {found}.")
            if given.get("cu_seq_lens_q") is not None:
                _require_separable(config, given, find_cache(given.values()))
        return call(*args, **kwargs)

    return checked


def _require_separable(config: Any, given: dict[str, Any], cache: Any) -> None:
    """Check that attention can tell packed sequences apart: it needs positions, no cache and no padding mask."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if "flash" in compat.attention_of(config):
        return  # flash attention uses the bounds
    use_cache = given.get("use_cache")
    caching = cache is not None or (getattr(config, "use_cache", True) if use_cache is None else use_cache)
    found = [
        "" if given.get("position_ids") is not None else "no position_ids",
        "a cache" if caching else "",
        "an attention_mask" if isinstance(mask := given.get("attention_mask"), torch.Tensor) and mask.ndim == 2 else "",
    ]
    if any(found):
        raise GdnfuseError(
            "Sequences packed with cu_seq_lens_q must have position_ids that start again at each, use_cache=False and no "
            f"attention_mask, or attention mixes them; found {' and '.join(filter(None, found))}."
        )
