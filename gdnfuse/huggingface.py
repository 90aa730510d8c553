"""What needs Hugging Face: the one-liner for `generate()`, and reports of a config without weights.

transformers is imported inside the functions, so that importing this module stays cheap.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gdnfuse import kernels, versions
from gdnfuse import options as gdnfuse_options
from gdnfuse.report import GdnfuseError, GraphReport, announce, reports

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PHASES = ("decode", "prefill")
LONGEST = 300  # characters of somebody else's error in a sentence of ours


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
        _check_state_dtype(state_dtype)
    generate_mode = "reduce-overhead" if mode is None and parsed.inner == "inductor" else mode
    shared = {"backend": "gdnfuse", "fullgraph": fullgraph, "dynamic": dynamic}

    plain, any_length = model._call_impl, dynamic is None
    decode, first = torch.compile(plain, **shared, **_mode_or_options(mode, options)), plain
    if prefill or prefill is None and parsed.capture:
        first = torch.compile(apart(plain), **shared, **_no_cuda_graphs(mode, options))
        first = _preparing_caches(first, fullgraph, state_dtype, any_length)
        if not fullgraph:
            # Where generate compiles this call itself (for prefill_chunk_size), a prompt still gets its own compilation.
            first = torch._dynamo.disable(first, recursive=False)
    elif state_dtype is not None or any_length:
        first = _preparing_caches(plain, fullgraph, state_dtype, any_length)
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

    def call(*args: Any, **kwargs: Any) -> Any:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        cache = kwargs.get("past_key_values")
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


def _preparing_caches(
    fn: Callable[..., Any], fullgraph: bool, state_dtype: torch.dtype | None, any_length: bool
) -> Callable[..., Any]:
    """Have the states that a prompt left kept in their dtype, and written by the CUDA graphs of later steps where they are, and
    keys and values that grow taken for ones of any length."""

    def call(*args: Any, **kwargs: Any) -> Any:
        out = fn(*args, **kwargs)
        if not (fullgraph and torch.compiler.is_compiling()):
            _prepare(getattr(out, "past_key_values", None) or kwargs.get("past_key_values"), state_dtype, any_length)
        return out

    return call


@torch.compiler.disable  # neither a mark nor another tensor in a cache can be set in a graph
def _prepare(cache: Any, state_dtype: torch.dtype | None, any_length: bool) -> None:
    if state_dtype is not None and _recurrent_states(cache):
        set_state_dtype(cache, state_dtype)
    for layer in getattr(cache, "layers", []):
        states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        held = [getattr(layer, name, None) for name in ("keys", "values")]
        if layer.is_compileable:
            states += [*held, getattr(layer, "cumulative_length", None)]
        elif any_length:
            from gdnfuse.passes.growing_keys import mark

            mark(held, [i for i, x in enumerate(held) if isinstance(x, torch.Tensor) and x.ndim == 4])
        for tensor in states:
            if isinstance(tensor, torch.Tensor):
                torch._dynamo.mark_static_address(tensor)


STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def set_state_dtype(cache: Any, dtype: torch.dtype) -> None:
    """Keep the recurrent states of a filled cache in another dtype from here on.

    A decode step reads and writes each state once, [B, HV, K, V] float32 as transformers makes it: for many sequences that is
    most of what it moves, and bfloat16 halves it. Maths stays float32, but every step rounds the state; docs/reference.md says
    how far that drifts. The cache's own update keeps the dtype, compiled or not.

    Args:
        cache: of transformers, after its prompt.
        dtype: float32, bfloat16 or float16.

    Raises:
        GdnfuseError: another dtype, or a cache without recurrent states. Nothing is changed then.
    """
    _check_state_dtype(dtype)
    states = _recurrent_states(cache)
    if not states:
        raise GdnfuseError("The cache must hold recurrent states, found none: a prompt makes them.")
    for held, i in states:
        if held[i].dtype != dtype:
            held[i] = held[i].to(dtype)
            torch._dynamo.mark_static_address(held[i])


def _check_state_dtype(dtype: Any) -> None:
    if dtype not in STATE_DTYPES:
        raise GdnfuseError(f"state_dtype must be one of {', '.join(map(str, STATE_DTYPES))}, found {dtype!r}.")


def _recurrent_states(cache: Any) -> list[tuple[dict[int, torch.Tensor], int]]:
    """Where a cache holds each recurrent state: a dict and a key of it."""
    held = [layer.recurrent_states for layer in getattr(cache, "layers", []) if hasattr(layer, "recurrent_states")]
    return [(states, i) for states in held for i, state in states.items() if isinstance(state, torch.Tensor)]


# Two lengths: with a static cache Dynamo makes one graph for the first and one for any length at the second.
WARM_PROMPTS = (70, 83)


@dataclass(frozen=True)
class Warmup:
    """What a warm-up compiled: seconds it took, graphs by phase, and machine codes of each Triton kernel that are loaded."""

    seconds: float
    graphs: dict[str, int]
    kernels: dict[str, int]


def warmup(model: torch.nn.Module, *, batch: int = 1, new_tokens: int = 4, **generate: Any) -> Warmup:
    """Compile all that `model.generate` will need, by generating a few tokens from two short random prompts.

    Chunks are of 64 tokens whatever the prompt's length and nothing is tuned at run time, so later prompts compile nothing more.

    Args:
        model: after `gdnfuse.compile`.
        batch: rows per prompt, as later.
        new_tokens: generated from each.
        generate: arguments of `model.generate` that change what is compiled, such as `cache_implementation` or `num_beams`.

    Returns:
        What it compiled.

    Raises:
        GdnfuseError: the model has no `generate`.
    """
    if not hasattr(model, "generate"):
        raise GdnfuseError(f"warmup needs a model with generate, found {type(model).__name__}.")
    known, start = len(reports()), time.perf_counter()
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    for length in WARM_PROMPTS:
        ids = torch.randint(0, vocabulary, (batch, length), device=device)
        options = {"attention_mask": torch.ones_like(ids), "min_new_tokens": new_tokens, "max_new_tokens": new_tokens, **generate}
        model.generate(ids, **options)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    graphs = Counter(report.phase for report in reports()[known:])
    return Warmup(time.perf_counter() - start, dict(graphs), kernels.loaded())


def presets() -> list[str]:
    """Names of the built-in configs."""
    files = (resources.files("gdnfuse") / "presets").iterdir()
    return sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json"))


def preset(name: str) -> str | None:
    """The full name of a preset ("4b" is "qwen3.5-4b"), or None where there is none of this name."""
    return next((full for full in (name.lower(), f"qwen3.5-{name.lower()}") if full in presets()), None)


def load_config(name_or_path: str) -> PreTrainedConfig:
    """The config of a preset ("qwen3.5-4b" or "4b"), a config.json, a local model folder or a hub id.

    Raises:
        GdnfuseError: with a sentence, if there is no such config or it cannot be read.
    """
    if name := preset(name_or_path):
        return _from_json((resources.files("gdnfuse") / "presets" / f"{name}.json").read_text(), name)
    path = Path(name_or_path).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as e:
            raise GdnfuseError(f"Cannot read {file}: {e}.") from e
        return _from_json(text, str(file))
    if path.is_dir():
        raise GdnfuseError(f"The folder {path} has no config.json.")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name_or_path) or file.suffix == ".json":
        raise GdnfuseError(
            f"No such model: {name_or_path!r} is no file, folder or hub id (owner/name), nor one of the presets "
            f"{', '.join(presets())}."
        )
    return _from_hub(name_or_path)


def _from_json(text: str, source: str) -> PreTrainedConfig:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        raise GdnfuseError(f"{source} is not JSON: {e}.") from e
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise GdnfuseError(f'{source} is not a model config: it has no "model_type".')
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**data)
    except Exception as e:  # transformers raises whatever the field's check raises
        raise GdnfuseError(f"{source} is not a config that transformers accepts: {one_line(e)}") from e


def _from_hub(name: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except Exception as e:  # OSError, ValueError or an error of the HTTP client, depending on what is wrong
        raise GdnfuseError(f"Cannot get the config of {name!r} from the hub: {one_line(e)}") from e


def one_line(error: Exception) -> str:
    """Kind and message of an error of somebody else's."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text if len(text) < LONGEST else text[:LONGEST] + '…'}"


@contextlib.contextmanager
def _running(tokens: int) -> Iterator[None]:
    """What the model or torch raise is said in a sentence; memory that runs out is not of the model's making."""
    try:
        yield
    except (GdnfuseError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        raise GdnfuseError(f"The model does not run a prompt of {tokens} tokens and a step: {one_line(e)}") from e


def meta_model(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """The causal language model of a config on the meta device: shapes without weights. Multimodal configs give their text model.

    Raises:
        GdnfuseError: the config has no causal language model in transformers.
    """
    return random_model(config, dtype, "meta")


def random_model(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> torch.nn.Module:
    """The same on another device, with random weights.

    Raises:
        GdnfuseError: the config has no causal language model in transformers, or the device no room for it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config.get_text_config(decoder=True), dtype=dtype)
    except Exception as e:  # an unknown architecture or sizes that do not fit together
        raise GdnfuseError(f"Cannot build a causal language model from this config: {one_line(e)}") from e
    return model.eval().requires_grad_(False)


def verify(model: torch.nn.Module, *, batch: int = 1, prompt: int = 70, **options: Any) -> list[GraphReport]:
    """Run a random prompt and one decode step of a model with the option `verify`, and return the reports of their graphs.

    Args:
        model: with weights, on the device to verify on. Keeps its values, and is not left compiled; sibling weights are packed.
        batch: sequences.
        prompt: tokens of the prompt.
        options: see `gdnfuse.options.Options`. Graphs are rewritten but not compiled further, unless `inner` says so.
    """
    from transformers import StaticCache

    options = {"inner": "eager", **options, "verify": True}
    gdnfuse_options.parse(options)
    known = {r.graph_id for r in reports()}
    cache = StaticCache(config=model.config, max_cache_len=prompt + 1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator).to(model.device)
    many = torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000)
    with torch.no_grad(), many, _running(prompt):
        step = torch.compile(model, backend="gdnfuse", options=options)
        for ids in (tokens, tokens[:, :1]):
            step(ids, past_key_values=cache, use_cache=True)
    return [r for r in reports() if r.graph_id not in known]


def trace(
    model: torch.nn.Module, *, phase: str = "decode", batch: int = 1, prompt: int = 64, **options: Any
) -> list[GraphReport]:
    """Compile one step of a model on the meta device and return the reports of its graphs. Needs neither weights nor a GPU.

    Args:
        model: from `meta_model`.
        phase: "decode", one token after a prompt, or "prefill", the prompt itself.
        batch: sequences.
        prompt: tokens of the prompt. What decodes does not depend on it.
        options: see `gdnfuse.options.Options`; `target` names the device type to lower for.
    """
    from transformers import StaticCache

    if phase not in PHASES:
        raise GdnfuseError(f"phase must be one of {', '.join(PHASES)}, found {phase!r}.")
    for name, size in (("batch", batch), ("prompt", prompt)):
        if size < 1:
            raise GdnfuseError(f"{name} must be at least 1, found {size}.")
    gdnfuse_options.parse(options)
    known = {r.graph_id for r in reports()}
    # Only the cache is built under the device: with that mode on, Dynamo traces through it and takes four times as long.
    with torch.device("meta"):
        cache = StaticCache(config=model.config, max_cache_len=prompt + 1)
    tokens = torch.zeros(batch, prompt, dtype=torch.long, device="meta")
    # Every model of a process shares code, so reports of several models add up to the limit, and would make sizes symbolic.
    limits = {"recompile_limit": 1000, "accumulated_recompile_limit": 1000, "automatic_dynamic_shapes": False}
    with torch.no_grad(), torch._dynamo.config.patch(limits), _running(prompt):
        # Code of its own: Dynamo would take an equal model, traced before, for this one, and make no graph.
        step = torch.compile(apart(model), backend="gdnfuse", options=options or None)
        if phase == "decode":
            announce("run a prompt")
            # Two tokens are enough for the cached states to exist, and keep the chunk rule to one chunk.
            model(tokens[:, :2] if prompt > 1 else tokens, past_key_values=cache, use_cache=True)
            tokens = tokens[:, :1]
        announce(f"trace the {phase}")
        step(tokens, past_key_values=cache, use_cache=True)
    return [r for r in reports() if r.graph_id not in known]
