"""gdnfuse bench MODEL --speculate KIND: tokens per second with drafts, at forced acceptances, compared with plain steps.

Random weights accept drafts only by chance. So drafts are made and checked as usual, and how many are accepted is sampled: each
with the given probability if the one before it was accepted. The generated text means nothing, but the time is right.

Everything, plain steps included, runs on one static cache in the loop of `gdnfuse.generation.speculation`. So differences come
from drafts alone. The cache is long enough for the most drafts of all kinds, and an eager prompt makes its states before anything
is compiled. So all kinds share the graphs of the prompt and of plain steps. The first generation of plain steps and of each kind
compiles, and records CUDA graphs on a GPU. Medians are over the other generations.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import gdnfuse
from gdnfuse.bench.measure import COLD_BYTES, bandwidth, machine, replayed, seconds, time_steps
from gdnfuse.errors import GdnfuseError
from gdnfuse.generation import mtp
from gdnfuse.generation.caches import cache_argument
from gdnfuse.generation.feeding import Fed, compiled_steps, recorded_steps
from gdnfuse.generation.proposers import MOST_DRAFTS, Always, Proposer, check_count
from gdnfuse.generation.rollback import commit
from gdnfuse.generation.speculation import Acceptance, Generation, Speculative
from gdnfuse.models import load_config, random_model
from gdnfuse.progress import announce

SCHEMA = "gdnfuse.bench.speculation/1"
ACCEPTANCES = (0.0, 0.5, 0.7, 0.9, 1.0)
GENERATIONS, LAUNCHES, UNTIMED = 3, 20, 4
PLAIN, OWN = "plain steps", "its own"
SHOWN = ("ms_per_step", "tokens_per_step", "tokens_per_second")


@dataclass(frozen=True)
class Settings:
    """What is measured: a model, its drafts, and how much.

    Attributes:
        model: a preset, config.json, model folder or hub id. Weights are random.
        speculate: kinds of drafts: "lookup:4", "mtp:3" with a random head, "draft:4:0.8b" with another model that drafts.
        acceptances: probabilities, each measured.
        batch, prompt, new: number of sequences, tokens of the prompt, tokens to generate.
        dtype, device, inner: as in `gdnfuse.bench.run.Settings`.
    """

    model: str
    speculate: list[str]
    acceptances: tuple[float, ...] = ACCEPTANCES
    batch: int = 1
    prompt: int = 512
    new: int = 128
    dtype: str = "bfloat16"
    device: str = "cpu"
    inner: str = "inductor"


KINDS = {"lookup": 1, "mtp": 1, "draft": 2}  # and how many values follow each


def check(settings: Settings) -> None:
    """Raise GdnfuseError if something cannot be measured."""
    for kind in settings.speculate:
        name, *rest = kind.split(":")
        if len(rest) != KINDS.get(name) or not rest[0].isdigit():
            raise GdnfuseError(f"Drafts are lookup:N, mtp:N or draft:N:MODEL, found {kind!r}.")
        check_count(int(rest[0]), name, 4 if name == "mtp" else MOST_DRAFTS)
    if settings.new < 2 * UNTIMED:
        raise GdnfuseError(f"At least {2 * UNTIMED} tokens must be generated, found {settings.new}.")
    if wrong := [p for p in settings.acceptances if not 0 <= p <= 1]:
        raise GdnfuseError(f"An acceptance must be from 0 to 1, found {wrong[0]}.")


def proposer(kind: str, model: torch.nn.Module, settings: Settings) -> Proposer:
    """The proposer for a kind that was checked."""
    name, n, *rest = kind.split(":")
    if name == "lookup":
        return gdnfuse.PromptLookup(int(n))
    if name == "mtp":
        head = mtp.empty(model).to_empty(device=settings.device).to(model.dtype).eval().requires_grad_(False)
        for p in head.parameters():
            torch.nn.init.normal_(p, std=0.02)
        found = gdnfuse.MTP(int(n), "random weights")
        found.hold(model, head)
        return found
    drafter = _random(rest[0], settings)
    gdnfuse.compile(drafter, inner=settings.inner)
    return gdnfuse.Draft(drafter, int(n))


def _random(model: str, settings: Settings) -> torch.nn.Module:
    torch.manual_seed(0)
    config = load_config(model).get_text_config(decoder=True)
    return random_model(config, getattr(torch, settings.dtype), settings.device)


class Unseen(Generation):
    """As `generate` runs it on a cache of its own, at which nobody looks. The bench passes one so that it stays where it is."""

    cache_is_seen = False


def unforced(of: Proposer) -> Speculative:
    """Speculation that accepts what the model accepts."""
    speculative = Speculative(of)
    speculative.loop = Unseen
    return speculative


def forced(of: Proposer, probability: float) -> Speculative:
    """Speculation that accepts each draft with a probability, if the one before it was accepted."""
    generators: dict[torch.device, torch.Generator] = {}

    class Forced(Unseen):
        def _standing(self, picked: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
            # Drawn on the device, for which the host would have to wait otherwise.
            generator = generators.setdefault(picked.device, torch.Generator(picked.device).manual_seed(1))
            drawn = torch.rand(drafts.shape, device=picked.device, generator=generator) < probability
            return drawn.long().cumprod(1).sum(1, keepdim=True)

    speculative = Speculative(Always(of))
    speculative.loop = Forced
    return speculative


class Bench:
    """One model, not compiled yet, on a cache with room for so many drafts."""

    def __init__(self, settings: Settings, model: torch.nn.Module, drafts: int):
        self.settings, self.model = settings, model
        generator = torch.Generator(settings.device).manual_seed(1)
        shape = (settings.batch, settings.prompt)
        self.ids = torch.randint(0, model.config.vocab_size, shape, device=settings.device, generator=generator)
        # One cache for all, so that nothing moves and CUDA graphs are recorded once.
        self.cache = gdnfuse.RollbackCache(model, settings.prompt + settings.new + drafts, tokens=drafts + 1)
        # A prompt has other graphs if the states do not exist yet, or if recording has moved them.
        self.fill()

    def fill(self) -> None:
        """Fill the cache with the prompt by an eager call, and start to record."""
        self.cache.reset()
        with torch.no_grad():
            self.model.forward(self.ids, **cache_argument(self.model, self.cache), use_cache=True, logits_to_keep=1)
        self.cache.activate_past_recording()

    def generate(self, speculative: Speculative) -> Acceptance:
        self.cache.reset()
        how = {
            "max_new_tokens": self.settings.new,
            "min_new_tokens": 0,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        held = {"attention_mask": torch.ones_like(self.ids), **cache_argument(self.model, self.cache)}
        self.model.generate(self.ids, **how, **held, custom_generate=speculative)
        return speculative.acceptance

    def figures(self, speculative: Speculative) -> dict[str, float]:
        found = [self.generate(speculative) for _ in range(GENERATIONS)]
        steps = [1e3 * a.seconds / (a.rounds + a.plain_steps) for a in found]
        rates = [self.settings.batch * (a.tokens - 1) / a.seconds for a in found]
        return {
            "ms_per_step": statistics.median(steps),
            "tokens_per_second": statistics.median(rates),
            "tokens_per_step": statistics.mean(a.tokens_per_step for a in found),
            "accepted": sum(a.accepted for a in found) / max(sum(a.drafted for a in found), 1),
            "steps_with_drafts": sum(a.rounds for a in found) / sum(a.rounds + a.plain_steps for a in found),
        }

    @torch.no_grad()
    def steps_ms(self, T: int) -> float:
        """Milliseconds of a step of T tokens, of many in a row: nothing is waited for, proposed or chosen between them.

        Steps of several tokens are recorded, and taken back.
        """
        self.fill()
        if T == 1:
            self.cache.stop_past_recording()
        capacity, length = self.cache.capacity, self.settings.prompt
        fed = Fed(self.model, self.cache, None, capacity, length, compiled_steps(self.model, True))
        if T > 1:  # as a generation repeats them
            fed.recorded, fed.few = recorded_steps(self.model, self.cache), range(T, T + 1)

        def step(tokens: torch.Tensor) -> None:
            fed(tokens, last=T == 1)
            if T > 1:
                self.cache.crop(-T)
                fed.length -= T

        # The first steps compile and record CUDA graphs. All fit a cache that is long enough for an answer.
        tokens = self.ids[:, :1].repeat(1, T).expand(self.settings.new, -1, -1)
        for each in tokens[:UNTIMED]:
            step(each)
        times = time_steps(step, tokens[UNTIMED:], self.settings.device, max((self.settings.new - UNTIMED) // 2, 1))
        return statistics.median(times)

    @torch.no_grad()
    def replay_ms(self, of: Proposer) -> float:
        """Milliseconds to replay all tokens of a step into the states of all layers. On a GPU in a CUDA graph, on cold states."""
        self.fill()
        T = of.n + 1
        arguments = self.cache.replay(self._all_of(T), T)
        bytes_ = sum(x.nbytes for x in arguments if isinstance(x, torch.Tensor))
        if torch.device(self.settings.device).type != "cuda":
            return 1e3 * statistics.median(seconds(lambda: commit(*arguments), self.settings.device) for _ in range(5))
        copies = [
            [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments] for _ in range(math.ceil(COLD_BYTES / bytes_))
        ]
        return 1e-3 * statistics.median(replayed(lambda each: commit(*each), copies, LAUNCHES))

    def _all_of(self, T: int) -> torch.Tensor:
        return torch.full((self.settings.batch,), T, dtype=torch.int32, device=self.settings.device)

    def replay_bytes(self, of: Proposer) -> int:
        """Bytes that a replay of all tokens of a step must move: states and windows of conv both ways, and what was recorded."""
        *recorded, _counts, conv_weight, A_log, dt_bias, conv_state, recurrent_state, _, _ = self.cache.replay(
            self._all_of(of.n + 1), of.n + 1
        )
        once = [*recorded, conv_weight, A_log, dt_bias, conv_state, recurrent_state, conv_state, recurrent_state]
        return sum(x.nbytes for x in once)


def run(
    settings: Settings,
    finished: Callable[[dict[str, Any], str], None] = lambda data, line: None,
    before_timing: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure all kinds of drafts.

    Args:
        settings: what is measured.
        finished: called for each new figure, with the data so far and a line about the figure.
        before_timing: called when everything is compiled.

    Returns:
        Plain data for JSON: "schema", "machine", "arguments", and "results", one for each kind of drafts.

    Raises:
        GdnfuseError: a kind of drafts is unknown, or the model cannot use it.
    """
    check(settings)
    begin, results = time.perf_counter(), []
    data = {"schema": SCHEMA, "machine": machine(settings.device), "arguments": vars(settings), "results": results}

    def say(kind: str, what: str) -> None:
        finished(data, f"{settings.model}, {kind}: {what} ({time.perf_counter() - begin:.0f} s)")

    announce("build the model")
    model = _random(settings.model, settings)
    proposers = {kind: proposer(kind, model, settings) for kind in settings.speculate}
    gdnfuse.compile(model, inner=settings.inner)
    bench = Bench(settings, model, max(of.n for of in proposers.values()))

    def compiled(kind: str, speculative: Speculative) -> tuple[list[str], float]:
        """What the first generation of a kind compiles, and seconds that it takes."""
        announce(f"{kind}, first generation")
        known, start = len(gdnfuse.reports()), time.perf_counter()
        bench.generate(speculative)
        reports, took = gdnfuse.reports()[known:], time.perf_counter() - start
        say(kind, f"first generation {took:.1f} s, {len(reports)} graphs compiled")
        return [report.summary() for report in reports], took

    def figures(kind: str, how: str, speculative: Speculative) -> dict[str, float]:
        announce(f"{kind}, {how}")
        return bench.figures(speculative)

    of_plain = unforced(Always(next(iter(proposers.values())), ever=False))
    plain_graphs, _ = compiled(PLAIN, of_plain)
    first = {kind: compiled(kind, unforced(Always(of))) for kind, of in proposers.items()}
    before_timing()
    rate = bandwidth(settings.device)
    plain = figures(PLAIN, "generations", of_plain)
    say(PLAIN, _line(plain))
    of_one = bench.steps_ms(1)
    for kind, of in proposers.items():
        graphs, took = first[kind]
        result = {"speculate": kind, "plain": plain, "first_seconds": took, "graphs": [*plain_graphs, *graphs], "drafts": []}
        results.append(result)
        for acceptance in (OWN, *settings.acceptances):
            how = unforced(of) if acceptance == OWN else forced(of, acceptance)
            row = {"acceptance": acceptance, **figures(kind, f"acceptance {acceptance}", how)}
            row["speedup"] = row["tokens_per_second"] / plain["tokens_per_second"]
            result["drafts"].append(row)
            say(kind, f"acceptance {acceptance}, {_line(row)}, speedup {row['speedup']:.3g}")
        announce(f"{kind}, steps in a row and replay")
        result["step_ms"], result["verify_ms"] = of_one, bench.steps_ms(of.n + 1)
        result["replay_ms"] = bench.replay_ms(of)
        result["replay_limit_ms"] = 1e3 * bench.replay_bytes(of) / rate
        say(kind, f"steps in a row: {of_one:.3f} ms, {result['verify_ms']:.3f} with drafts")
        say(kind, f"replay of all layers {result['replay_ms']:.3g} ms, limit {result['replay_limit_ms']:.3g} ms")
    return data


def _line(figures: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {figures[name]:.3g}" for name in SHOWN)


def tables(data: dict[str, Any]) -> str:
    """One table for each kind of drafts."""
    from gdnfuse.report.text import table

    parts = []
    for result in data["results"]:
        rows = [{"acceptance": PLAIN, **result["plain"], "speedup": 1.0}, *result["drafts"]]
        columns = (*SHOWN, "speedup")
        shown = [{"drafts accepted": str(r["acceptance"])} | {c.replace("_", " "): f"{r[c]:.3g}" for c in columns} for r in rows]
        title = (
            f"{data['arguments']['model']}, {result['speculate']}; steps in a row {result['step_ms']:.3f} ms, with drafts "
            f"{result['verify_ms']:.3f}; replay of all layers {result['replay_ms']:.3g} ms, limit {result['replay_limit_ms']:.3g}"
        )
        parts.append("\n".join([title, table(shown), *result["graphs"]]))
    return "\n\n".join(parts)
