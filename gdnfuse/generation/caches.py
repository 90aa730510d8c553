"""Caches of transformers between calls: marks for CUDA graphs and for lengths, and the dtype of recurrent states."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from gdnfuse import compat
from gdnfuse.errors import GdnfuseError


def cache_finder() -> Callable[[Iterable[Any]], Any]:
    """A function that returns the first `transformers.Cache` among values, or None. The keyword of a cache differs by version.

    Dynamo traces that function if `generate` compiles the call, so the class is looked up here.
    """
    from transformers import Cache

    def find(values: Iterable[Any]) -> Any:
        for x in values:
            if isinstance(x, Cache):
                return x
        return None

    return find


def cache_argument(model: torch.nn.Module, cache: Any) -> dict[str, Any]:
    """A cache as a keyword argument of a model: `cache` since transformers 5.24, `past_key_values` before."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    # A model whose code came with its weights may use the old name. The forward of a wrapper may have neither.
    versions = [*inspect.signature(model.forward).parameters, *inspect.signature(CausalLMOutputWithPast).parameters]
    return {next(name for name in versions if name in ("cache", "past_key_values")): cache}


def preparing_caches(
    fn: Callable[..., Any], fullgraph: bool, state_dtype: torch.dtype | None, any_length: bool
) -> Callable[..., Any]:
    """A call that prepares the cache for later steps.

    The states keep their dtype, CUDA graphs of later steps can write them in place, and keys and values that grow count as having
    any length.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        out = fn(*args, **kwargs)
        if not (fullgraph and torch.compiler.is_dynamo_compiling()):
            _prepare([*args, *kwargs.values()], out, state_dtype, any_length)
        return out

    return call


@torch.compiler.disable  # a graph can neither mark a tensor nor replace one in a cache
def _prepare(given: list[Any], out: Any, state_dtype: torch.dtype | None, any_length: bool) -> None:
    made = out.values() if isinstance(out, Mapping) else out if isinstance(out, tuple) else ()
    cache = cache_finder()([*given, *made])
    if state_dtype is not None and _recurrent_states(cache):
        set_state_dtype(cache, state_dtype)
    for layer in getattr(cache, "layers", []):
        states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        held = [getattr(layer, name, None) for name in ("keys", "values")]
        if layer.is_compileable:
            states += [*held, getattr(layer, "cumulative_length", None)]
        elif any_length:
            mark_lengths(layer)
        for tensor in states:
            if isinstance(tensor, torch.Tensor):
                compat.mark_static_address(tensor)


def rope_that_looks_ahead(model: torch.nn.Module) -> str | None:
    """A kind of rotary embedding whose angles depend on the longest position of a call. None if the model has none.

    With such a kind, keys depend on what follows them.
    """
    kinds = (str(getattr(m, "rope_type", "")) for m in model.modules())
    return next((kind for kind in kinds if "dynamic" in kind or kind == "longrope"), None)


def holds_states(cache: Any) -> bool:
    """Whether a prompt has left its states in a cache. A cache of fixed length may be initialised before."""
    return any(any(layer.has_previous_state.values()) for layer in cache.layers if hasattr(layer, "recurrent_states"))


def mark_lengths(layer: Any) -> None:
    """Let the keys and values of a growing layer count as having any length."""
    from gdnfuse.passes.growing_keys import mark

    held = [getattr(layer, name, None) for name in ("keys", "values")]
    mark(held, [i for i, x in enumerate(held) if isinstance(x, torch.Tensor) and x.ndim == 4])


STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def set_state_dtype(cache: Any, dtype: torch.dtype) -> None:
    """Keep the recurrent states of a filled cache in another dtype from now on.

    transformers makes each state [B, HV, K, V] in float32, and a decode step reads and writes it once. With many sequences that
    is most of what a step moves, and bfloat16 halves it. The maths stays in float32, but every step rounds the state.
    docs/reference.md says how far results drift. The cache keeps the dtype in later calls, compiled or not.

    Args:
        cache: a cache of transformers, after its prompt.
        dtype: float32, bfloat16 or float16.

    Raises:
        GdnfuseError: another dtype, or a cache without recurrent states. Nothing is changed then.
    """
    check_state_dtype(dtype)
    states = _recurrent_states(cache)
    if not states:
        raise GdnfuseError("The cache must hold recurrent states, found none: run a prompt first.")
    for held, i in states:
        if held[i].dtype != dtype:
            held[i] = held[i].to(dtype)
            compat.mark_static_address(held[i])


def check_state_dtype(dtype: Any) -> None:
    if dtype not in STATE_DTYPES:
        raise GdnfuseError(f"state_dtype must be one of {', '.join(map(str, STATE_DTYPES))}, found {dtype!r}.")


def _recurrent_states(cache: Any) -> list[tuple[dict[int, torch.Tensor], int]]:
    """Where a cache holds each recurrent state: a dict and its key."""
    held = [layer.recurrent_states for layer in getattr(cache, "layers", []) if hasattr(layer, "recurrent_states")]
    return [(states, i) for states in held for i, state in states.items() if isinstance(state, torch.Tensor)]
