"""gdnfuse.compile: a model's calls are compiled by phase, for `generate()` and for loops of one's own.

transformers is imported inside the functions, so that importing this module stays cheap.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gdnfuse import options as gdnfuse_options
from gdnfuse import versions
from gdnfuse.errors import GdnfuseError
from gdnfuse.generation.caches import cache_finder, check_state_dtype, preparing_caches

if TYPE_CHECKING:
    pass


def compile(
    model: torch.nn.Module,
    *,
    mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    prefill: bool | None = None,
    state_dtype: torch.dtype | None = None,
    **options: Any,
) -> torch.nn.Module:
    """Compile a model in place, for `generate()` and for direct calls alike: decode steps one way, prompts another.

    `torch.compile(model).generate()` never reaches any backend, because `generate` stays bound to the inner model. Here the
    model's own call is compiled, and so is the call that `generate(cache_implementation="static")` compiles for itself. Prompts
    are compiled without CUDA graphs whatever the mode: there would be one for each length, and a prompt keeps a GPU busy without.

    Args:
        model: a causal language model of transformers.
        mode: one of Inductor's. None means "reduce-overhead" (CUDA graphs) where `generate` uses a static cache, and "default"
            elsewhere.
        fullgraph: as in `torch.compile`.
        dynamic: as there, but that with None prompts and caches that grow are compiled for all lengths at once.
        prefill: compile calls that are no decode step too, or leave them eager. None means True, but False with `capture=False`:
            the rule would be unrolled into one graph for each length.
        state_dtype: of the recurrent states from their prompt on, see `set_state_dtype`; None leaves them as they are.
        options: see `gdnfuse.options.Options`.

    Returns:
        The same model.

    Raises:
        GdnfuseError: a bad option or mode, or a version of torch or transformers that is too old. The model is as it was then.
    """
    if sentences := versions.too_old():
        raise GdnfuseError(" ".join(sentences))
    parsed = gdnfuse_options.parse(options)
    _check_mode(mode, parsed)
    if state_dtype is not None:
        check_state_dtype(state_dtype)
    generate_mode = "reduce-overhead" if mode is None and parsed.inner == "inductor" else mode
    shared = {"backend": "gdnfuse", "fullgraph": fullgraph, "dynamic": dynamic}

    plain, any_length = model._call_impl, dynamic is None
    decode, first = torch.compile(plain, **shared, **_mode_or_options(mode, options)), plain
    if prefill or prefill is None and parsed.capture:
        first = torch.compile(apart(plain), **shared, **_no_cuda_graphs(mode, options))
        first = preparing_caches(first, fullgraph, state_dtype, any_length)
        if not fullgraph:
            # Where generate compiles this call itself (for prefill_chunk_size), a prompt still gets its own compilation.
            first = torch._dynamo.disable(first, recursive=False)
    elif state_dtype is not None or any_length:
        first = preparing_caches(plain, fullgraph, state_dtype, any_length)
    if dynamic:
        decode, first = _with_numbers(decode), _with_numbers(first)
    model._compiled_call_impl = by_phase(decode, first, parameters_of(model) if any_length else ())
    if getattr(model, "generation_config", None) is not None:
        from transformers import CompileConfig

        config = CompileConfig(**shared, **_mode_or_options(generate_mode, options))
        config._compile_all_devices = True  # otherwise generate warns on CPU that it ignores this config
        model.generation_config.compile_config = config
    return model


def _check_mode(mode: str | None, parsed: gdnfuse_options.Options) -> None:
    valid = torch._inductor.list_mode_options()
    if mode is not None and mode not in valid:
        raise GdnfuseError(f"Unknown mode {mode!r}; the valid ones are {', '.join(valid)}.")
    if mode not in (None, "default") and parsed.inner != "inductor":
        raise GdnfuseError(f"mode={mode!r} is Inductor's and needs inner='inductor', found inner={parsed.inner!r}.")


def _mode_or_options(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """torch.compile refuses mode and options together, so beside options a mode becomes the Inductor options it stands for."""
    if not options:
        return {"mode": mode, "options": None}
    if mode is not None and (settings := torch._inductor.list_mode_options(mode)):
        options = {**options, "inductor": {**settings, **options.get("inductor", {})}}
    return {"mode": None, "options": dict(options)}


def apart(fn: Callable[..., Any], name: str = "apart") -> Callable[..., Any]:
    """The same with code of its own: Dynamo counts compilations by code, and prompts and decode steps must not add up.

    What Dynamo learns of sizes that change it keeps by the code's name, so another `name` starts afresh in that too.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=name)
    return call


def _no_cuda_graphs(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    settings = {**(torch._inductor.list_mode_options(mode) if mode else {}), **options.get("inductor", {})}
    if not settings.get("triton.cudagraphs"):
        return _mode_or_options(mode, options)
    return {"mode": None, "options": {**options, "inductor": {**settings, "triton.cudagraphs": False}}}


def by_phase(decode: Callable[..., Any], first: Callable[..., Any], any_length: Sequence[str] = ()) -> Callable[..., Any]:
    """Calls of one token on a filled cache go to `decode`, all others to `first`.

    With `any_length`, the names of their parameters, either is compiled for prompts and caches of all lengths from its first call
    on. Dynamo alone compiles it for the length that it meets first, and again at the second.
    """

    find_cache = cache_finder()

    def call(*args: Any, **kwargs: Any) -> Any:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        cache = find_cache([*args, *kwargs.values()])
        step = tokens is not None and tokens.shape[1] == 1 and cache is not None and cache.is_initialized
        if any_length and not torch.compiler.is_compiling() and not (step and cache.is_compileable):
            args, kwargs = _of_any_length(any_length, args, kwargs, LENGTHS_OF_STEP if step else LENGTHS)
        return (decode if step else first)(*args, **kwargs)

    return call


# Which axis of what a model is called with is as long as the prompt, and of a step as the cache, whose keys the backend marks.
LENGTHS = {"input_ids": 1, "inputs_embeds": 1, "attention_mask": 1, "position_ids": -1, "cache_position": -1}
LENGTHS_OF_STEP = {"attention_mask": 1}


def _of_any_length(
    parameters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any], axes: dict[str, int]
) -> tuple[list[Any], dict[str, Any]]:
    """The same arguments, whose lengths Dynamo is told may change, but those of which the caller has told it something.

    Marks go to views, because the tensors are the caller's.
    """

    def marked(name: str, x: Any) -> Any:
        if name not in axes or not isinstance(x, torch.Tensor) or any(mark.startswith("_dynamo") for mark in vars(x)):
            return x
        if x.ndim == 0 or name == "attention_mask" and x.ndim != 2:
            return x
        x = x.view(x.shape)
        torch._dynamo.maybe_mark_dynamic(x, axes[name] % x.ndim)
        return x

    placed = [*map(marked, parameters, args), *args[len(parameters) :]]
    return placed, {name: marked(name, x) for name, x in kwargs.items()}


def parameters_of(model: torch.nn.Module) -> list[str]:
    """The names of what a model may be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]


def _with_numbers(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same, traced with floats for the numbers that they are: dynamic=True would make an eps an input of the graph."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        with torch._dynamo.config.patch(specialize_float=True):
            return fn(*args, **kwargs)

    return call
