"""gdnfuse.compile: compiles a model's calls, decode steps and prompts separately, for `generate()` and for loops of your own.

transformers is imported inside the functions, so importing this module is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gdnfuse import compat, versions
from gdnfuse import options as gdnfuse_options
from gdnfuse.errors import GdnfuseError
from gdnfuse.generation import artifacts as files
from gdnfuse.generation import device_map, generate, links, shards, stages, weights
from gdnfuse.generation.agreement import on_graph
from gdnfuse.generation.arguments import checking_arguments, parameters_of
from gdnfuse.generation.caches import cache_finder, check_state_dtype, holds_states, mark_lengths, preparing_caches
from gdnfuse.generation.coverage import PROMPT, SHORT, STEP, VERIFY, Coverage
from gdnfuse.generation.hooks import Hooks
from gdnfuse.generation.wrappers import compiled_models, handing_on
from gdnfuse.runs import RANKS, RUNS


def compile(
    model: torch.nn.Module,
    *,
    mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    prefill: bool | None = None,
    state_dtype: torch.dtype | None = None,
    prefixes: Any = None,
    speculate: Any = None,
    tensor_parallel: str | None = None,
    artifacts: str | Path | None = None,
    **options: Any,
) -> torch.nn.Module:
    """Compile a model in place, for `generate()` and for direct calls. Decode steps and prompts are compiled separately.

    `torch.compile(model).generate()` never reaches any backend, because `generate` stays bound to the inner model. This function
    compiles the model's own call. It also replaces the call that `generate(cache_implementation="static")` would compile itself.
    Prompts are compiled without CUDA graphs, whatever the mode: each length would need its own, and a prompt keeps a GPU busy
    anyway. A copy or a pickle of the model is not compiled.

    Args:
        model: a causal language model of transformers, or a module that passes its calls on to one, such as a model of peft.
        mode: a mode of Inductor. None means "reduce-overhead" (CUDA graphs) if `generate` uses a static cache, else "default".
        fullgraph: as in `torch.compile`.
        dynamic: as in `torch.compile`. But with None, prompts and caches that grow are compiled for all lengths at once.
        prefill: whether to compile prompts too. None means True, or False with `capture=False`, because then the rule would be
            unrolled into one graph for each length.
        state_dtype: dtype of the recurrent states after their prompt, see `set_state_dtype`. None does not change it.
        prefixes: a `gdnfuse.PrefixStore` of the model. Every `generate` takes the longest known prefix of its prompt from it, and
            adds what it computed.
        speculate: what drafts tokens, of which one step checks several: a `PromptLookup`, a `Draft`, an `MTP`, a `Callback` or a
            function. None generates one token per step. See `gdnfuse.generation.speculation`.
        tensor_parallel: for a model that transformers has split over ranks, by a tp_plan under torchrun. "heads" splits the Gated
            DeltaNet layers by key heads, with one all-reduce each instead of five gathers. "as_loaded" keeps transformers' plan,
            as None does, and makes sure that all ranks compile the same. Every rank must make this call.
        artifacts: a file that `gdnfuse.warmup(model, save=FILE)` wrote in another process. What it contains is not compiled
            again. If it was made with other versions or for another device or model, one warning says so. The file contains code,
            which will run: use only files from people whose code you would run.
        options: see `gdnfuse.options.Options`.

    Returns:
        The same model.

    Raises:
        GdnfuseError: an option or the mode is wrong; the file of artifacts is damaged or is none; the store belongs to another
            model; a wrapper does not pass calls on; the model cannot draft or be split; ranks differ; or torch or transformers is
            too old. The model is unchanged then.

    Source:
        The layers: Yang et al. 2024, Gated Delta Networks, arXiv:2412.06464; their chunked form: arXiv:2406.06484.
    """
    agreement = shards.agreement(tensor_parallel)
    asked = {"mode": mode, "fullgraph": fullgraph, "dynamic": dynamic, "prefill": prefill, "state_dtype": state_dtype}
    with agreement.reached({**asked, "tensor_parallel": tensor_parallel, "options": sorted(options.items())}) as terms:
        if sentences := versions.too_old():
            raise GdnfuseError(" ".join(sentences))
        parsed = gdnfuse_options.parse(options)
        _check_mode(mode, parsed)
        if parsed.one_shot_bytes and tensor_parallel is None:
            raise GdnfuseError(f"one_shot_bytes={parsed.one_shot_bytes!r} needs tensor_parallel, found None: give both.")
        if state_dtype is not None:
            check_state_dtype(state_dtype)
        models = compiled_models(model)
        for one in models:
            if parsed.activations and not weights.holds(one, torch.float8_e4m3fn):
                raise GdnfuseError(
                    f"activations={parsed.activations!r} needs weights in e4m3, found none in the model: load an FP8 checkpoint, "
                    "or leave the option out."
                )
            stages.check(one, prefixes=prefixes, speculate=speculate, tensor_parallel=tensor_parallel)
        plans = [shards.plan(tensor_parallel, one, prefixes=prefixes, speculate=speculate) for one in models]
        terms["layers"] = [mixer.facts for _, mixers in plans for mixer in mixers]
        for one in models:
            device_map.check(one, prefixes=prefixes, speculate=speculate)
        if prefixes is not None:
            generate.check(models, prefixes)
        proposer = None if speculate is None else generate.proposer(models, speculate)
        borders = [device_map.Borders(one) for one in models]
        kept = None if artifacts is None else files.read(artifacts)
    prefill = prefill or prefill is None and parsed.capture
    if tensor_parallel == shards.HEADS:
        options = {"one_shot_bytes": gdnfuse_options.MEASURED, **options}
    if options.get("one_shot_bytes") == gdnfuse_options.MEASURED:
        options = {**options, "one_shot_bytes": links.one_shot_bytes(shards.device_of(models[0]))}
    settings = _Settings(mode, fullgraph, dynamic, prefill, state_dtype, prefixes, proposer, options)
    if kept is not None:
        files.load(kept, models[0])
    if agreement.ranks > 1:
        RANKS.agree = on_graph
    for one, (mesh, mixers) in zip(models, plans, strict=True):
        shards.prepare(one, mesh, mixers, agreement)
    with device_map.made(borders):
        coverages = [_compile(one, settings, parsed, b.why_not) for one, b in zip(models, borders, strict=True)]
        if model not in models:
            compat.set_compiled_call(model, handing_on(model, models, coverages[0].say))
    return model


@dataclass(frozen=True)
class _Settings:
    """Arguments of `compile` after they were checked."""

    mode: str | None
    fullgraph: bool
    dynamic: bool | None
    prefill: bool
    state_dtype: torch.dtype | None
    prefixes: Any
    proposer: Any
    options: dict[str, Any]


def _compile(
    whole: torch.nn.Module, settings: _Settings, parsed: gdnfuse_options.Options, why_not: tuple[str, str] | None
) -> Coverage:
    """Compile the calls of one model: its own, and those that its `generate` asks for. Nothing of it fuses if `why_not`."""
    model = stages.inside(whole)
    mode, options, fullgraph, dynamic = settings.mode, settings.options, settings.fullgraph, settings.dynamic
    shared = {"backend": "gdnfuse", "fullgraph": fullgraph, "dynamic": dynamic}
    plain, any_length = compat.call_of(model), dynamic is None
    coverage = Coverage(model, parsed, why_not=why_not)
    coverage.short = settings.prefill and parsed.capture
    hooks = Hooks(model, coverage.say)

    first = plain
    if settings.prefixes is not None:
        settings.prefixes.in_pieces, settings.prefixes.state_dtype = True, settings.state_dtype
        settings.prefixes.activations = parsed.activations
    if settings.prefill:
        first = torch.compile(with_own_code(plain), **shared, **_no_cuda_graphs(mode, options))
        first = coverage.checked(preparing_caches(first, fullgraph, settings.state_dtype, any_length), PROMPT)
        if settings.prefixes is not None and parsed.capture and not parsed.checkpoint_every:
            leaving = {**options, "checkpoint_every": settings.prefixes.every}
            kept = torch.compile(with_own_code(plain, "kept"), **shared, **_no_cuda_graphs(mode, leaving))
            kept = coverage.checked(preparing_caches(kept, fullgraph, settings.state_dtype, any_length), PROMPT)
            first = generate.keeping(first, kept)
            settings.prefixes.in_pieces = False
        if not fullgraph:
            # If the user passes a compile_config (and prefill_chunk_size), a prompt still uses our compilation.
            first = torch.compiler.disable(first)
    elif settings.state_dtype is not None or any_length:
        first = preparing_caches(plain, fullgraph, settings.state_dtype, any_length)

    parameters = parameters_of(model) if any_length else ()
    own = mode_or_options(mode, options)
    decode = coverage.checked(torch.compile(plain, **shared, **own), STEP)

    def few_tokens(before: str = "", **how: Any) -> list[Callable[..., Any]]:
        """Calls for verify steps, and for short steps if their rule is one op and not unrolled."""
        phases = [("verify", VERIFY), ("short", SHORT)][: 1 + coverage.short] if settings.prefill else []

        def of(name: str, phase: str) -> Callable[..., Any]:
            return by_tokens(
                lambda T: coverage.checked(torch.compile(with_own_code(plain, f"{before}{name}_{T}"), **shared, **how), phase)
            )

        return [of(*phase) for phase in phases]

    def uncaptured() -> Callable[..., Any]:
        """What `generate` calls, but without Inductor's CUDA graphs. gdnfuse/generation/recorded.py makes its own."""
        how = _no_cuda_graphs(_mode_of_generate(mode, parsed), options)
        step = coverage.checked(torch.compile(with_own_code(plain, "uncaptured"), **shared, **how), STEP)
        few = few_tokens("uncaptured_", **how)
        return heeding(hooks.heeded(checking_arguments(model, by_phase(step, first, parameters, *few))))

    few = few_tokens(**own)
    ours = generate.install(whole, settings.prefixes, settings.proposer)
    heeding = ours.heeding if ours and settings.prefixes is not None else lambda call: call
    together = shards.together if shards.sharded(model) else lambda call: call
    call = together(heeding(hooks.heeded(checking_arguments(model, by_phase(decode, first, parameters, *few)))))
    call.coverage, call.beside = coverage, Beside({**shared, **own})
    if not compat.set_compiled_call(model, call) and parsed.strict:
        raise GdnfuseError(
            "strict: torch must let a model's call be replaced, found a version that does not: install a tested one."
        )
    stages.enter(whole)
    if hasattr(type(whole), "get_compiled_call"):
        in_generate = mode_or_options(_mode_of_generate(mode, parsed), options)
        if in_generate != own:
            decode = coverage.checked(torch.compile(with_own_code(plain, "in_generate"), **shared, **in_generate), STEP)
            few = few_tokens(**in_generate)
        how = {**shared, **in_generate}
        in_generate = together(heeding(hooks.heeded(checking_arguments(model, by_phase(decode, first, parameters, *few)))))
        in_generate = stages.through(whole, in_generate)
        in_generate.beside = Beside(how)
        if _has_cuda_graphs(how["mode"], how["options"] or {}) and not shards.sharded(model) and stages.inside(whole) is whole:
            in_generate.uncaptured = uncaptured()
        if ours and settings.prefixes is not None and settings.prefill and parsed.capture:
            ours.tails = _tails(model, plain, coverage, hooks, how, settings.prefixes.tails)
            settings.prefixes.rooms.used = ours.tails.used
        elif settings.prefixes is not None and settings.prefixes.tails:
            coverage.say(TAILS.format("that prompts are not compiled or captured"), TAILS)
        whole.get_compiled_call = CompiledCall(whole, in_generate, coverage)
        # Our call replaces a compile_config of the model, and a call that generate has compiled before.
        if getattr(whole, "generation_config", None) is not None:
            whole.generation_config.compile_config = None
        compat.forget_compiled_call(whole)
    return coverage


TAILS = (
    "PrefixStore(tails=True) needs compiled prompts on a GPU, CUDA graphs in generate, plain weights and no flash attention, "
    "found {}: leave tails out. What follows a known prefix is computed as other prompts are."
)


def _tails(
    model: torch.nn.Module, plain: Callable[..., Any], coverage: Coverage, hooks: Hooks, how: dict[str, Any], asked: bool
) -> Any:
    """Calls of the tokens behind a known prefix on a cache of fixed length: if asked for, and if CUDA graphs replay steps."""
    from gdnfuse.generation import tails

    compiled = hooks.heeded(coverage.checked(torch.compile(with_own_code(plain, "tail"), **how), PROMPT))
    on_a_gpu = next(model.parameters()).device.type == "cuda"
    graphs = _has_cuda_graphs(how["mode"], how["options"] or {})
    used = asked and on_a_gpu and graphs and tails.rows_are_apart(model)
    if asked and not used:
        found = "no GPU" if not on_a_gpu else "no CUDA graphs" if not graphs else "quantised weights or flash attention"
        coverage.say(TAILS.format(found), TAILS)
    return tails.Tails(model, compiled, used, FEW_TOKENS[-1])


class Beside:
    """Compiles the functions of a drafter with the same settings as the model.

    Args:
        how: arguments of torch.compile.
    """

    def __init__(self, how: dict[str, Any]):
        self._how, self._made = how, {}

    def __call__(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled function of a name. It is compiled from `fn` at the first call."""
        if name not in self._made:
            compiled = torch.compile(with_own_code(fn, name), **self._how)

            def call(*args: Any, **kwargs: Any) -> Any:
                outer, RUNS.drafting = RUNS.drafting, True
                try:
                    return compiled(*args, **kwargs)
                finally:
                    RUNS.drafting = outer

            self._made[name] = call
        return self._made[name]


class CompiledCall:
    """What `generate` gets when it asks its model for a compiled call. It asks before steps with a static cache on a GPU.

    This is an attribute of the instance and hides the method of transformers. So it does not matter with which generation config
    a call runs. A copy of the model is not compiled and has the method again: torch leaves compiled calls out of copies and
    pickles.
    """

    def __init__(self, model: torch.nn.Module, call: Callable[..., Any], coverage: Coverage):
        self.model, self.call, self.coverage = model, call, coverage
        self._theirs: tuple[Any, Callable[..., Any]] | None = None

    def __call__(self, compile_config: Any = None) -> Callable[..., Any]:
        if compile_config is None:
            return self.call
        if self._theirs is None or self._theirs[0] != compile_config:
            self._theirs = compile_config, self._compiled(compile_config)
        return self._theirs[1]

    def _compiled(self, compile_config: Any) -> Callable[..., Any]:
        """The compilation that the user asked for, as transformers makes it. Its steps are checked as ours are."""
        call, backend = torch.compile(self.model.__call__, **compile_config.to_dict()), compile_config.backend
        cause = f"generate was called with a compile_config, with backend {getattr(backend, '__name__', backend)!r}."
        why = None if backend == "gdnfuse" else (cause, "Leave compile_config out: generate then uses what gdnfuse compiled.")
        return by_phase(self.coverage.checked(call, STEP, why), call)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.model, "get_compiled_call")


def _mode_of_generate(mode: str | None, parsed: gdnfuse_options.Options) -> str | None:
    return "reduce-overhead" if mode is None and parsed.inner == "inductor" else mode


def _check_mode(mode: str | None, parsed: gdnfuse_options.Options) -> None:
    valid = compat.modes()
    if mode is not None and mode not in valid:
        raise GdnfuseError(f"mode must be one of {', '.join(valid)}, found {mode!r}.")
    if mode not in (None, "default") and parsed.inner != "inductor":
        raise GdnfuseError(f"mode={mode!r} needs inner='inductor', found inner={parsed.inner!r}: leave one of them out.")


def mode_or_options(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """torch.compile does not accept mode and options together. So with options, a mode becomes its Inductor options."""
    if not options:
        return {"mode": mode, "options": None}
    if mode is not None and (settings := compat.modes()[mode]):
        options = {**options, "inductor": {**settings, **options.get("inductor", {})}}
    return {"mode": None, "options": dict(options)}


def with_own_code(fn: Callable[..., Any], name: str = "own_code") -> Callable[..., Any]:
    """The same with code of its own: Dynamo counts compilations by code, and prompts and decode steps must not add up.

    What Dynamo learns of sizes that change it keeps by the code's name, so another `name` starts afresh in that too.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=name)
    return call


def _has_cuda_graphs(mode: str | None, options: dict[str, Any]) -> bool:
    return bool({**(compat.modes()[mode] if mode else {}), **options.get("inductor", {})}.get("triton.cudagraphs"))


def _no_cuda_graphs(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    settings = {**(compat.modes()[mode] if mode else {}), **options.get("inductor", {})}
    if not settings.get("triton.cudagraphs"):
        return mode_or_options(mode, options)
    return {"mode": None, "options": {**options, "inductor": {**settings, "triton.cudagraphs": False}}}


def by_phase(
    decode: Callable[..., Any],
    first: Callable[..., Any],
    any_length: Sequence[str] = (),
    verify: Callable[..., Any] | None = None,
    short: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Calls of one token on a filled cache go to `decode`, those on a cache that records to `verify`, those of 2 to 8 tokens, of
    all rows at most 32, to `short`, and all others to `first`.

    With `any_length`, the names of their parameters, either is compiled for prompts and caches of all lengths from its first call
    on. Dynamo alone compiles it for the length that it meets first, and again at the second.
    """

    find_cache = cache_finder()

    def call(*args: Any, **kwargs: Any) -> Any:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        cache = find_cache([*args, *kwargs.values()])
        filled = tokens is not None and cache is not None and cache.is_initialized
        call = decode if filled and tokens.shape[1] == 1 else first
        if filled and verify is not None and kwargs.get("inputs_embeds") is None:
            if getattr(cache, "is_recording", False):
                call = verify
            elif short is not None and not torch.compiler.is_dynamo_compiling() and tokens.shape[1] in FEW_TOKENS:
                call = short if tokens.numel() <= MOST_ROWS and holds_states(cache) else call
        if any_length and not torch.compiler.is_dynamo_compiling() and not (call is not first and cache.is_compileable):
            if call is short:
                for layer in cache.layers:
                    mark_lengths(layer)
            args, kwargs = _of_any_length(any_length, args, kwargs, LENGTHS if call is first else LENGTHS_OF_STEP)
        return call(*args, **kwargs)

    return call


FEW_TOKENS, MOST_ROWS = range(2, 9), 32  # of a short step; kernels of few rows take no more


def by_tokens(compiled: Callable[[int], Callable[..., Any]]) -> Callable[..., Any]:
    """A call that is compiled for each number of tokens, of which kernels know: Dynamo would make one graph for all."""
    made: dict[int, Callable[..., Any]] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        T = (args[0] if args else kwargs["input_ids"]).shape[1]
        if T not in made:
            made[T] = compiled(T)
        return made[T](*args, **kwargs)

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
        if name not in axes or not isinstance(x, torch.Tensor) or compat.is_marked(x):
            return x
        if x.ndim == 0 or name == "attention_mask" and x.ndim != 2:
            return x
        x = x.view(x.shape)
        compat.mark_any_length(x, axes[name] % x.ndim)
        return x

    placed = [*map(marked, parameters, args), *args[len(parameters) :]]
    return placed, {name: marked(name, x) for name, x in kwargs.items()}
