"""gdnfuse.warmup: compiles all that `generate` will need, from two short prompts."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gdnfuse import compat, kernels
from gdnfuse.errors import GdnfuseError
from gdnfuse.files import check_writable
from gdnfuse.generation import artifacts
from gdnfuse.generation.caches import cache_argument
from gdnfuse.generation.compile import FEW_TOKENS, MOST_ROWS
from gdnfuse.generation.generate import Generate, of
from gdnfuse.generation.prefix_tree import BLOCK
from gdnfuse.generation.wrappers import compiled_models, is_compiled
from gdnfuse.report.records import reports

# With a static cache Dynamo compiles one graph for the first length, and one for all lengths at the second.
# Both are longer than a block of a prefix store, by more tokens than a short step has.
WARM_PROMPTS = (76, 83)
TIMES = 8  # how often a prompt is generated from, until memory has come back and a tail on it is proved
ROOM = 32  # tokens for which a cache of fixed length has room after a prompt whose next turn is short
LONG = 5  # the longest prompt has as many times the tokens between two states


@dataclass(frozen=True)
class Warmup:
    """What a warm-up compiled.

    Attributes:
        seconds: time that it took.
        graphs: number of graphs, by phase.
        kernels: for each Triton kernel, how many machine codes are loaded.
        unfused: paths of the Gated DeltaNet layers that do not run fused, by "prompt" and "decode step". Empty if all run fused,
            or if the model was not compiled by `gdnfuse.compile`.
        short: numbers of tokens for which short turns have a graph now.
        saved: bytes of the file that was written; 0 if none was asked for.
    """

    seconds: float
    graphs: dict[str, int]
    kernels: dict[str, int]
    unfused: dict[str, list[str]]
    short: tuple[int, ...] = ()
    saved: int = 0


def warmup(
    model: torch.nn.Module,
    *,
    batch: int = 1,
    new_tokens: int = 4,
    short: Sequence[int] = (),
    save: str | Path | None = None,
    **generate: Any,
) -> Warmup:
    """Compile all that `model.generate` will need, by generating a few tokens from two short random prompts.

    Later prompts compile nothing more, because chunks have 64 tokens at any length and nothing is tuned at run time. Calls of 2
    to 8 tokens on a filled cache, such as a short turn, are an exception. Each number of tokens has its own graph. Its first call
    compiles it, or this function does if `short` names it.

    For a model with a prefix store, two more kinds of prompts are compiled: those that continue a known prefix, and long ones
    whose graphs keep states on the way. This takes four more prompts. The store itself does not change. For a model with drafts,
    the verify steps and the drafter are compiled.

    Args:
        model: a model after `gdnfuse.compile`.
        batch: rows per prompt, as in later calls.
        new_tokens: tokens to generate from each prompt.
        short: numbers of tokens, from 2 to 8, of short turns on a filled cache, such as `range(2, 9)`. All rows together may have
            at most 32 tokens. Each number adds a graph, or two with a cache of fixed length: one for the first length and one for
            all others.
        save: a file to write with all that this process has compiled. Other processes read it by `gdnfuse.compile(model,
            artifacts=FILE)`.
        generate: arguments of `model.generate` that change what is compiled, such as `cache_implementation` or `num_beams`.

    Returns:
        What was compiled.

    Raises:
        GdnfuseError: the model has no `generate` or is not compiled; the file cannot be written; `short` has other numbers, or is
            used with beams, with several sequences per row, or with a cache that has no short turns.
    """
    if not hasattr(model, "generate"):
        raise GdnfuseError(f"warmup needs a model with generate, found {type(model).__name__}.")
    models = compiled_models(model)
    given = generate.get("compile_config") or getattr(getattr(model, "generation_config", None), "compile_config", None)
    if not given and not any(map(is_compiled, models)):
        raise GdnfuseError(
            f"warmup needs a compiled model, found {type(model).__name__} uncompiled: call gdnfuse.compile(model) first."
        )
    short = _checked(short, batch, generate, models)
    if save is not None:
        check_writable(Path(save))
    known, start = len(reports()), time.perf_counter()
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    found = [x for x in map(of, models) if x is not None]
    ours = [x for x in found if x.prefixes is not None]
    long = max((x.prefixes.every for x in ours if not x.prefixes.in_pieces), default=0)
    with contextlib.ExitStack() as stack:
        for x in found:
            stack.enter_context(x.drafting())
        for x in ours:
            stack.enter_context(x.with_scratch_store(batch, LONG * long + max(WARM_PROMPTS)))
        static = generate.get("cache_implementation") == "static"
        tails = [x.tails for x in ours if x.tails is not None and x.tails.used and static and batch == 1]
        prompts = _prompts(torch.randint(0, vocabulary, (batch, LONG * long + max(WARM_PROMPTS)), device=device), long)
        for i, ids in enumerate(prompts):
            options = {"attention_mask": torch.ones_like(ids), "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
            for _ in range(TIMES if tails and i < len(WARM_PROMPTS) else 1):
                proved = [len(x.proved) for x in tails]
                model.generate(ids, **{**options, **generate})
                if all(x.why_not or len(x.proved) > n for x, n in zip(tails, proved, strict=True)):
                    break
        for T in short:
            _turns(model, T, torch.randint(0, vocabulary, (batch, BLOCK + ROOM), device=device), generate, found)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    graphs = Counter(report.phase for report in reports()[known:])
    coverages = [getattr(compat.compiled_call(m), "coverage", None) for m in models]
    unfused = {phase: missing.layers for c in coverages if c is not None for phase, missing in c.missing.items()}
    seconds, saved = time.perf_counter() - start, 0 if save is None else artifacts.save(models[0], Path(save))
    return Warmup(seconds, dict(graphs), kernels.loaded(), unfused, short, saved)


def _checked(short: Any, batch: int, generate: dict[str, Any], models: Sequence[torch.nn.Module]) -> tuple[int, ...]:
    """The numbers of `short`, sorted and without duplicates."""
    numbers = sorted(set(short)) if isinstance(short, Sequence) and not isinstance(short, str) else None
    most = min(FEW_TOKENS[-1], MOST_ROWS // batch)
    if numbers is None or not all(type(T) is int and FEW_TOKENS[0] <= T <= most for T in numbers):
        rows = f" of {batch} rows" if batch > 1 else ""
        raise GdnfuseError(f"short must have numbers of tokens{rows} from {FEW_TOKENS[0]} to {most}, found {short!r}.")
    for name in ("num_beams", "num_return_sequences") if numbers else ():
        if (generate.get(name) or 1) > 1:
            raise GdnfuseError(
                f"short turns need one sequence per row, found {name}={generate[name]}: warm them up in a call of their own."
            )
    if numbers and generate.get("cache_implementation") not in (None, "dynamic", "static"):
        raise GdnfuseError(
            f"short turns need a dynamic or a static cache, found cache_implementation={generate['cache_implementation']!r}: "
            "leave short out."
        )
    calls = [getattr(compat.compiled_call(m), "coverage", None) for m in models]
    if numbers and not any(c is not None and c.short for c in calls):
        raise GdnfuseError(
            "short turns need prompts that are compiled and captured, found prefill=False or capture=False: leave short out."
        )
    return tuple(numbers)


def _turns(model: torch.nn.Module, T: int, ids: torch.Tensor, generate: dict[str, Any], ours: Sequence[Generate]) -> None:
    """Let the model compute T tokens on a filled cache: after a known prefix if it has a store, else in a second turn."""
    from transformers import DynamicCache, StaticCache

    from gdnfuse.generation.rollback import RollbackCache

    options = {"max_new_tokens": 1, "min_new_tokens": 1, **generate}
    options |= {"max_new_tokens": 1, "min_new_tokens": 1}
    run = lambda ids, **held: model.generate(ids, attention_mask=torch.ones_like(ids), **options, **held)  # noqa: E731
    if any(x.prefixes is not None for x in ours):
        for tail in (ROOM, T):
            run(ids[:, : BLOCK + tail])
        return
    static = options.pop("cache_implementation", None) == "static"
    drafts = next((x.proposer.n for x in ours if x.proposer is not None), None)
    config = model.config.get_text_config(decoder=True)
    for n in WARM_PROMPTS[: 1 + static]:
        length = n + ROOM if static else None
        if drafts is not None:
            cache = RollbackCache(model, length, tokens=drafts + 1)
        else:
            cache = StaticCache(config=config, max_cache_len=length) if static else DynamicCache(config=config)
        held = cache_argument(model, cache)
        out = run(ids[:, :n], **held)
        run(torch.cat([getattr(out, "sequences", out), ids[:, n + 1 : n + T]], 1), **held)


def _prompts(ids: torch.Tensor, every: int) -> list[torch.Tensor]:
    """The prompts to generate from: two, of which the second continues the first.

    If graphs of long prompts keep states after `every` tokens, there are four more: two that start new and two that continue.
    """
    one, two = WARM_PROMPTS
    prompts = [ids[:, :one], ids[:, :two]]
    if every:
        new, known = ids.roll(1, 1), ids[:, :one]
        one, two = (LONG - 1) * every + one, LONG * every + two
        prompts += [ids.flip(1)[:, :one], ids[:, :one], new[:, :two], torch.cat([known, new], 1)[:, :two]]
    return prompts
