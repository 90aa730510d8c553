"""Speculative decoding: a step checks several drafted tokens at once, and only what the model itself would generate is kept.

It follows Leviathan et al. 2023 (arXiv:2211.17192) and Chen et al. 2023 (arXiv:2302.01318). With greedy decoding the tokens are
those of plain decoding. With sampling they have the same distribution. A round feeds the last token and its drafts to a recording
cache (`RollbackCache`), counts the drafts that the model agrees with, and crops the rest.

The rows of a batch share the length of their cache, so all advance by the number of tokens of the row that accepts fewest. A row
may then sample a token again that it had already accepted. This does not change its distribution, because it depends only on the
other rows.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gdnfuse import compat
from gdnfuse.errors import GdnfuseError
from gdnfuse.generation.caches import cache_argument, cache_finder
from gdnfuse.generation.feeding import Fed, compiled_steps, recorded_steps
from gdnfuse.generation.hooks import hooks_now
from gdnfuse.generation.proposers import Always, Callback, Drafts, Proposer, Run, check_drafts, is_users, proposer_of
from gdnfuse.generation.recorded import generating


@dataclass
class Acceptance:
    """How many drafts were accepted in one generation.

    Attributes:
        rounds: steps in which drafts were checked.
        plain_steps: steps of one token, in which nothing was proposed.
        drafted: tokens that were proposed, per row.
        accepted: how many of them every row accepted.
        tokens: tokens that were generated, per row. The step of the prompt gives the first.
        seconds: time from the first token to the last.
        replay: what put accepted tokens into the states: "triton" or "reference". Empty if nothing did.
    """

    rounds: int = 0
    plain_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    seconds: float = 0.0
    replay: str = ""

    @property
    def rate(self) -> float:
        """The share of drafts that were accepted; 0 if there were none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """New tokens per step after the prompt; 0 if there was no step."""
        steps = self.rounds + self.plain_steps
        return (self.tokens - 1) / steps if steps else 0.0

    def __str__(self) -> str:
        return (
            f"{self.accepted} of {self.drafted} drafts accepted ({self.rate:.0%}), {self.tokens_per_step:.2f} tokens per step: "
            f"{self.rounds} steps with drafts and {self.plain_steps} plain ones"
            f"{f', accepted tokens replayed by delta_rule_commit ({self.replay})' if self.replay else ''}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the attributes, `rate` and `tokens_per_step`."""
        return {**asdict(self), "rate": self.rate, "tokens_per_step": self.tokens_per_step}


class _Noted(threading.local):
    """For one thread: where to note acceptances, or None."""

    generations: list[Acceptance] | None = None


NOTED = _Noted()
EARLY = ("cuda",)  # kinds of devices that work while the host goes on


@contextlib.contextmanager
def noting() -> Iterator[list[Acceptance]]:
    """Collect the acceptances of the generations with drafts in this thread."""
    outer, NOTED.generations = NOTED.generations, []
    try:
        yield NOTED.generations
    finally:
        NOTED.generations = outer


class Speculative:
    """Speculative decoding for one call of `generate`: `model.generate(..., custom_generate=gdnfuse.speculative(...))`.

    Args:
        speculate: a `PromptLookup`, a `Draft`, an `MTP`, a `Callback` or a function that drafts.
        streamer: as in `generate`. `generate` does not pass its own streamer to a `custom_generate`, so give it here.

    Attributes:
        acceptance: how many drafts the last generation accepted; None before the first.
        seen: of the last complete generation: its cache, and the tokens [B, ...] after the prompt that the cache holds. None
            before the first.
        loop: the class that runs one generation.

    Raises:
        GdnfuseError: `speculate` cannot draft. A call raises it too if it cannot use drafts; nothing was generated then.

    Source:
        Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.
    """

    loop: type[Generation]

    def __init__(self, speculate: Any, streamer: Any = None):
        self.proposer: Proposer = proposer_of(speculate)
        self.streamer = streamer
        self.acceptance: Acceptance | None = None
        self.seen: tuple[Any, list[torch.Tensor]] | None = None

    def __call__(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        logits_processor: Any = (),
        stopping_criteria: Any = (),
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        self.acceptance = Acceptance()
        with generating(), torch.no_grad():
            one = self.loop(self, model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
            if NOTED.generations is not None:
                NOTED.generations.append(self.acceptance)
            out = one.run()
        self.seen = one.cache, one.seen
        return out


class Generation:
    """One call of `generate`.

    Attributes:
        cache_is_seen: whether a cache that was passed may be looked at later. It must then hold what was generated and no more.
    """

    cache_is_seen = True

    def __init__(
        self, of: Speculative, model: Any, ids: torch.Tensor, processors: Any, criteria: Any, config: Any, kwargs: dict[str, Any]
    ):
        self.model, self.ids, self.processors, self.config, self.streamer = model, ids, processors, config, of.streamer
        self.proposer, self.counts = of.proposer, of.acceptance
        self.n = self.proposer.n
        _check(model, ids, config, self.proposer)
        self.stop = _Stop(criteria)
        mask = _mask(ids, kwargs)
        self.cache, capacity, length = _cache(model, ids, config, kwargs, self.n)
        call = None if config.disable_compile else compiled_steps(model, capacity is not None)
        self.fed = Fed(model, self.cache, mask, capacity, length, call)
        self.sample = bool(config.do_sample)
        self.careful = not all(map(_is_stateless, processors))
        most = config.max_length + self.n
        scores = processors if self.sample and not self.careful else None
        self.rows = _without_padding(ids, mask)
        self.done = [False] * len(self.rows)
        self.seen: list[torch.Tensor] = []
        # A step may be launched before the tokens that it follows are read, so that the host prepares it while the device still
        # works. The last one may be a step too many. So nobody may see the cache, no hook may see the step, and no row may be
        # padded.
        given = cache_finder()(kwargs.values())
        hidden = not (self.cache is given and self.cache_is_seen) and not config.return_dict_in_generate
        possible = hidden and len(ids) == 1 and ids.device.type in EARLY and not self.careful
        self.early = possible and not hooks_now(model.modules())
        # A step with drafts is launched early where a device alone can tell which drafts are accepted and what comes next.
        greedy = not self.sample and not self.processors
        self.early_drafts = self.early and greedy and capacity is not None and not is_users(self.proposer)
        self._alone = capacity is not None and self._only_known_code(criteria)
        self._plain = False  # whether the next step is taken to be a plain one
        self._ahead: tuple[torch.Tensor, Drafts | None] | None = None  # of a step that was launched early: its logits and drafts
        self._start: torch.Tensor | None = None  # [1], how many tokens the cache held before it, if it has drafts
        self.pad = config.pad_token_id if config.pad_token_id is not None else next(iter(self.stop.eos), 0)
        wanted = config.return_dict_in_generate
        self.scores: list[torch.Tensor] | None = [] if wanted and config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if wanted and config.output_logits else None
        # Last, because a drafter that was started must be closed.
        beside = getattr(call or compat.compiled_call(model), "beside", None)
        run = Run(model, mask, most, capacity is not None, scores, beside, self.early_drafts, self._alone)
        self.drafting = self.proposer.start(run)
        self.fed.after = getattr(self.drafting, "hear", None)

    def run(self) -> Any:
        try:
            return self._run()
        finally:
            if not self.cache.pending:  # also after an error of a drafter or a streamer: later calls write the states
                self.cache.stop_past_recording()
            getattr(self.drafting, "close", lambda: None)()

    def _run(self) -> Any:
        if self.cache.is_recording:
            self.cache.stop_past_recording()
        logits, drafts, start = self._prompt(), None, None
        if self._alone:
            self.fed.recorded, self.fed.few = recorded_steps(self.model, self.cache), range(2, self.n + 2)
            if self.fed.recorded is not None:
                self.fed.recorded.tap = getattr(self.drafting, "tap", None)
        while True:
            try:
                emitted, over = self._take(logits, drafts)
            except BaseException:
                self._undo(drafts)
                raise
            if drafts is not None and self._ahead is None:
                self._keep(emitted - logits.shape[1])
            start = time.perf_counter() if start is None else start
            if over:
                self._recall()
                break
            # If one token is left, drafts would not help.
            drafts = self._drafts() if self._left > 1 else None
            self._plain = drafts is None
            if self._ahead is not None:  # drafts that were proposed now come a step later
                (logits, drafts), self._ahead = self._ahead, None
                continue
            if drafts is None:
                logits = self._plain_step(self.ids[:, -1:])
                continue
            self.counts.rounds += 1
            self.counts.drafted += drafts.tokens.shape[1]
            self.cache.activate_past_recording()
            self.seen.append(torch.cat([self.ids[:, -1:], drafts.tokens], 1))
            try:
                logits = self.fed(self.seen[-1]).logits
            except BaseException:
                self._undo(drafts)
                raise
        self.counts.seconds = time.perf_counter() - start
        if self.streamer is not None:
            self.streamer.end()
        return self._answer()

    def _only_known_code(self, criteria: Any) -> bool:
        """Whether only code of transformers and of gdnfuse runs between two steps."""
        of = self.proposer.of if isinstance(self.proposer, Always) else self.proposer
        run = [*self.processors, *criteria, *([] if self.streamer is None else [self.streamer])]
        # A processor of transformers may call a function of the user's, such as one for the tokens that are allowed.
        called = [x for each in run for x in getattr(each, "__dict__", {}).values() if callable(x)]
        users = is_users(of) or isinstance(of, Callback)
        return not users and all(type(x).__module__.startswith("transformers.") for x in (*run, *called))

    @property
    def _left(self) -> int:
        """How many tokens may still come; 2 if that is not known."""
        return self.stop.most - self.ids.shape[1] if self.stop.most is not None else 2

    @property
    def _room(self) -> int:
        """How many tokens may still come that what was made for this generation can hold. A criterion of the user's for the
        length takes the place of the config's, and may allow more."""
        return min(self._left, self.config.max_length - self.ids.shape[1])

    def _plain_step(self, token: torch.Tensor) -> torch.Tensor:
        """The logits after one more token [B, 1]."""
        self.counts.plain_steps += 1
        self.cache.stop_past_recording()
        self.seen.append(token)
        return self.fed(token, last=True).logits

    def _drafts(self) -> Drafts | None:
        drafts = self.drafting.propose(self.ids, self.rows)
        if drafts is not None and is_users(self.proposer):
            check_drafts(drafts, self.ids, self.n, self.model.config.get_text_config(decoder=True).vocab_size)
        return drafts if drafts is not None and drafts.tokens.shape[1] else None

    def _prompt(self) -> torch.Tensor:
        new = self.ids[:, self.fed.length :]
        chunk = self.config.prefill_chunk_size or new.shape[1]
        for part in new.split(chunk, 1):
            logits = self.fed(part, last=True).logits
        return logits[:, -1:]

    def _launch(self, picked: torch.Tensor, standing: torch.Tensor, drafts: Drafts) -> None:
        """Keep the accepted tokens of a step with drafts and feed the next ones, of which the host knows none yet.

        picked, standing: as in `Drafting`. drafts: what comes behind the last of the accepted tokens.
        """
        T, kept = picked.shape[1], standing[0] + 1
        self.cache.crop_to(kept)
        self.counts.replay = self.cache.replayed_by
        self._start = kept + (self.fed.length - T if self._start is None else self._start)
        self.cache.activate_past_recording()
        self.seen.append(torch.cat([picked.gather(1, standing), drafts.tokens], 1))
        self._ahead = self.fed(self.seen[-1], start=self._start).logits, drafts

    def _caught_up(self, accepted: int, columns: int) -> None:
        """Note what the host now knows of the step before the one that was launched: how many of its drafts are accepted."""
        self.fed.length -= columns - 1 - accepted
        self.seen[-2] = self.seen[-2][:, : accepted + 1]
        self.counts.rounds += 1
        self.counts.drafted += columns - 1

    def _recall(self) -> None:
        """Take back the tokens of a step with drafts that was launched and is one too many."""
        if self._ahead is not None and self._ahead[1] is not None:
            self.fed.length -= self.seen.pop().shape[1]
            self.cache.abandon(self.fed.length)
            self.counts.rounds -= 1
            self.counts.drafted -= self._ahead[1].tokens.shape[1]

    def _keep(self, crop: int) -> None:
        """Take back the last -crop tokens."""
        length, self._start = self.fed.length, None
        try:
            self.cache.crop(crop)
        except BaseException:
            self.cache.abandon(length - self.cache.pending)
            raise
        self.counts.replay = self.cache.replayed_by
        self.fed.length = length + crop
        self.seen[-1] = self.seen[-1][:, : self.seen[-1].shape[1] + crop]

    def _undo(self, drafts: Drafts | None) -> None:
        """Restore the cache to its state before the drafts. Nobody sees one for which a step was launched early."""
        if self._ahead is not None:
            self.cache.abandon(0)
        elif drafts is not None:
            self.cache.abandon(self.ids.shape[1] - 1)

    def _take(self, logits: torch.Tensor, drafts: Drafts | None) -> tuple[int, bool]:
        """Choose tokens and take the accepted ones. Returns how many, and whether the generation has ended."""
        logits = logits.to(self.ids.device)
        picked, scores = self._pick(logits, drafts)
        columns = picked.shape[1]
        # What is launched between the two parts of a read, the device does while the host goes on with what it has read.
        if columns > 1:
            standing = self._standing(picked, drafts.tokens)
            read = reading(torch.cat([standing, picked], 1))
            if len(self.rows) == 1 and self._room > columns:
                ahead = getattr(self.drafting, "draft_ahead", lambda *_: None)(picked, standing)
                if ahead is not None and self.early_drafts and not self._plain:
                    self._launch(picked, standing, ahead)
            read = read()  # the only place in a round where the host waits
            stands = [row[0] for row, padded in zip(read, self._padded, strict=True) if not padded]
            accepted, host = min(stands), [row[1:] for row in read]
            if self._ahead is not None:
                self._caught_up(accepted, columns)
        else:
            read = reading(picked)
            if self.early and self._plain and self._left > 1:
                self._ahead = self._plain_step(picked), None
            accepted, host = 0, read()
        before = self.ids
        self.ids = torch.cat([before, picked[:, : accepted + 1]], 1)
        emitted, over = 0, False
        try:
            while emitted <= accepted and not over:
                self._record(logits, scores, emitted)
                column = [self.pad if padded else row[emitted] for row, padded in zip(host, self._padded, strict=True)]
                for row, token in zip(self.rows, column, strict=True):
                    row.append(token)
                emitted += 1
                if self.streamer is not None:
                    self.streamer.put(torch.tensor(column))
                seen = None if self.scores is None else tuple(self.scores)
                stops = self.stop(self.ids[:, : before.shape[1] + emitted], column, seen)
                self.done = [done or stop for done, stop in zip(self.done, stops, strict=True)]
                over = all(self.done)
        except BaseException:
            self.ids = before
            raise
        self.ids = self.ids[:, : before.shape[1] + emitted]
        if len(self.rows) > 1 and any(self._padded):  # the rest of these rows is padding
            self.ids = torch.cat([before, torch.tensor([row[-emitted:] for row in self.rows], device=before.device)], 1)
        self.counts.tokens += emitted
        if drafts is not None:
            self.counts.accepted += min(accepted, emitted)
        return emitted, over

    @property
    def _padded(self) -> list[bool]:
        """Which rows get padding: those that have ended, if an end-of-text token is known."""
        return self.done if self.stop.pads else [False] * len(self.rows)

    def _standing(self, picked: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
        """How many drafts of each row are accepted [B, 1]: those before the first that the model did not choose."""
        return (picked[:, :-1] == drafts[:, : picked.shape[1] - 1]).long().cumprod(1).sum(1, keepdim=True)

    def _record(self, logits: torch.Tensor, scores: list[torch.Tensor], j: int) -> None:
        if self.scores is not None:
            self.scores.append(scores[j])
        if self.logits is not None:
            self.logits.append(logits[:, j].float().clone())

    def _pick(self, logits: torch.Tensor, drafts: Drafts | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The token at each place [B, columns] if all drafts before it are accepted, and the scores that it was chosen by."""
        if not self.sample and not self.processors and self.scores is None:
            return logits.argmax(-1), []
        picked, scores = [], []
        for i in range(logits.shape[1]):
            tokens = None if drafts is None else drafts.tokens
            ids = self.ids if i == 0 else torch.cat([self.ids, tokens[:, :i]], 1)
            row = logits[:, i].to(copy=True, dtype=torch.float32)
            scores.append(self.processors(ids, row) if self.processors else row)
            draft = tokens[:, i] if tokens is not None and i < tokens.shape[1] else None
            drawn = drafts.probabilities[:, i] if draft is not None and drafts.probabilities is not None else None
            picked.append(self._choose(scores[-1], draft, drawn))
            if self.careful and draft is not None:
                # A processor that remembers its calls must not be called for rejected tokens.
                wrong = (picked[-1] != draft).tolist()
                if any(w for w, padded in zip(wrong, self._padded, strict=True) if not padded):
                    break
        return torch.stack(picked, 1), scores

    def _choose(self, scores: torch.Tensor, draft: torch.Tensor | None, drawn: torch.Tensor | None) -> torch.Tensor:
        if not self.sample:
            return scores.argmax(-1)
        p = scores.softmax(-1)
        if drawn is None:
            # A draft that was not sampled is accepted if the model samples it too: rejection sampling from one point.
            return torch.multinomial(p, 1).squeeze(1)
        at = draft[:, None]
        stands = torch.rand_like(p[:, :1]) * drawn.gather(1, at) < p.gather(1, at)
        rest = (p - drawn).clamp(min=0)
        rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, p)
        return torch.where(stands, at, torch.multinomial(rest, 1)).squeeze(1)

    def _answer(self) -> Any:
        if not self.config.return_dict_in_generate:
            return self.ids
        from transformers.generation import GenerateDecoderOnlyOutput

        found = {"scores": self.scores, "logits": self.logits}
        return GenerateDecoderOnlyOutput(
            sequences=self.ids,
            **{k: tuple(v) for k, v in found.items() if v is not None},
            **cache_argument(self.model, self.cache),
        )


def reading(x: torch.Tensor) -> Callable[[], list[Any]]:
    """Begin to read a tensor. The function that is returned waits for it, but not for what is launched meanwhile."""
    if x.device.type != "cuda":
        return x.tolist
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    there = torch.cuda.current_stream(x.device).record_event()

    def read() -> list[Any]:
        there.synchronize()
        return host.tolist()

    return read


Speculative.loop = Generation

# Processors of transformers that depend only on their arguments. All others are called only for accepted tokens.
STATELESS = frozenset(
    "TemperatureLogitsWarper TopKLogitsWarper TopPLogitsWarper MinPLogitsWarper TypicalLogitsWarper EpsilonLogitsWarper "
    "EtaLogitsWarper RepetitionPenaltyLogitsProcessor NoRepeatNGramLogitsProcessor NoBadWordsLogitsProcessor "
    "MinLengthLogitsProcessor MinNewTokensLengthLogitsProcessor SuppressTokensLogitsProcessor "
    "SuppressTokensAtBeginLogitsProcessor ForcedBOSTokenLogitsProcessor ForcedEOSTokenLogitsProcessor "
    "InfNanRemoveLogitsProcessor LogitNormalization".split()
)


def _is_stateless(processor: Any) -> bool:
    kind = type(processor)
    return kind.__name__ in STATELESS and kind.__module__.startswith("transformers.")


class _Stop:
    """Stopping criteria, checked after each further token of each row. Lengths and ends of text are checked on the host."""

    def __init__(self, criteria: Any):
        self.others, self.most = [], None
        self.eos: dict[int, None] = {}  # in order: rows are padded with the first if there is no padding token
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        for criterion in criteria:
            name = type(criterion).__name__
            if name == "MaxLengthCriteria":
                self.most = criterion.max_length if self.most is None else min(self.most, criterion.max_length)
            elif name == "EosTokenCriteria":
                self.eos |= dict.fromkeys(criterion.eos_token_id.tolist())
            else:
                self.others.append(criterion)

    def __call__(self, ids: torch.Tensor, column: Sequence[int], scores: Any) -> list[bool]:
        ends = self.most is not None and ids.shape[1] >= self.most
        stops = [ends or token in self.eos for token in column]
        for criterion in self.others:
            found = criterion(ids, scores)
            found = found.tolist() if isinstance(found, torch.Tensor) else [found] * len(column)
            stops = [a or b for a, b in zip(stops, found, strict=True)]
        return stops


def check_model(model: torch.nn.Module, proposer: Proposer) -> None:
    """Raise GdnfuseError if a model cannot be used with drafts, or not with these."""
    from gdnfuse.generation.rollback import RollbackCache

    if hasattr(proposer, "check"):
        proposer.check(model)
    RollbackCache(model, tokens=proposer.n + 1)


def _check(model: torch.nn.Module, ids: torch.Tensor, config: Any, proposer: Proposer) -> None:
    beams = getattr(config, "num_beams", 1) or 1
    if beams > 1:
        raise GdnfuseError(f"Speculation needs one sequence per row, found num_beams={beams}: generate without it.")
    asked = [name for name in ("output_attentions", "output_hidden_states") if getattr(config, name, False)]
    if asked and config.return_dict_in_generate:
        raise GdnfuseError(f"Speculation cannot return what layers computed, found {asked[0]}=True: generate without it.")
    if getattr(config, "use_cache", True) is False:
        raise GdnfuseError("Speculation needs a cache, found use_cache=False.")
    if ids.ndim != 2 or 0 in ids.shape:
        raise GdnfuseError(f"Speculation needs a prompt of at least one row and one token, found ids of {list(ids.shape)}.")
    if hasattr(proposer, "check"):
        proposer.check(model)


HEEDED = (
    "attention_mask",
    "position_ids",
    "use_cache",
    "logits_to_keep",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
)


def _mask(ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """[B, L], 0 for padding of prompts; None if there is none. All other arguments of the model are refused."""
    from transformers import Cache

    given = {
        name: x
        for name, x in kwargs.items()
        if x is not None and not isinstance(x, Cache) and not (isinstance(x, dict) and not x)
        # Processors of models for images add this: whether a token belongs to an image.
        if not (name in ("mm_token_type_ids", "token_type_ids") and isinstance(x, torch.Tensor) and not x.any())
    }
    if others := [name for name in given if name not in HEEDED]:
        raise GdnfuseError(f"Speculation needs prompts of plain text, found {', '.join(others)}: generate without it.")
    mask = kwargs.get("attention_mask")
    if mask is not None:
        if mask.shape != ids.shape:
            raise GdnfuseError(
                f"The attention_mask of a speculation must be as long as its input_ids, which hold all tokens, "
                f"{list(ids.shape)}, found {list(mask.shape)}."
            )
        mask = mask.long()
        if bool((mask == 1).all()):
            mask = None
        elif not bool((mask[:, -1] == 1).all()):
            raise GdnfuseError("Speculation needs prompts that are padded on the left, found an attention_mask that ends in 0.")
    places = kwargs.get("position_ids")
    if places is not None and places.shape[-1] == ids.shape[1]:
        wanted = (torch.ones_like(ids) if mask is None else mask).cumsum(1) - 1
        differ = (places.to(wanted.device) != wanted) & (wanted >= 0 if mask is None else mask == 1)
        if bool(differ.any()):
            raise GdnfuseError(
                "Speculation needs positions that count from each row's first token, found other position_ids: leave them out."
            )
    return mask


def _without_padding(ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    if mask is None:
        return ids.tolist()
    return [[token for token, m in zip(*pair, strict=True) if m] for pair in zip(ids.tolist(), mask.tolist(), strict=True)]


def _cache(model: torch.nn.Module, ids: torch.Tensor, config: Any, kwargs: dict[str, Any], n: int) -> tuple[Any, int | None, int]:
    """The cache, how many tokens it can hold (or None), and how many it holds.

    Raises:
        GdnfuseError: the cache that the user passed cannot be used.
    """
    from transformers import DynamicCache, StaticCache

    from gdnfuse.generation.rollback import RollbackCache

    given, needed = cache_finder()(kwargs.values()), config.max_length - 1 + n
    if isinstance(given, RollbackCache):
        if given.pending:
            raise GdnfuseError(
                f"A RollbackCache for generate must hold no recorded tokens, found {given.pending} tokens: crop first."
            )
        if given.tokens < n + 1:
            raise GdnfuseError(f"A RollbackCache for {n} drafts must take {n + 1} tokens a call, found {given.tokens}.")
        if given.capacity is not None and given.capacity < needed:
            raise GdnfuseError(
                f"A RollbackCache for {config.max_length} tokens and {n} drafts must hold {needed}, found {given.capacity}: make "
                "it longer, or generate fewer."
            )
        length = int(given.get_seq_length())
        if length >= ids.shape[1]:
            raise GdnfuseError(
                f"input_ids must hold the {length} tokens that the cache holds and at least one more, found {ids.shape[1]}."
            )
        if length and given.rows != ids.shape[0]:
            raise GdnfuseError(
                f"A RollbackCache of {given.rows} sequences takes as many rows of input_ids, found {ids.shape[0]}."
            )
        return given, given.capacity, length
    plain = type(given) in (DynamicCache, StaticCache) and not given.offloading
    if given is None or not plain or compat.is_users(given):
        raise GdnfuseError(
            f"Speculation needs a gdnfuse.RollbackCache(model), because it takes tokens back, found {type(given).__name__}"
            f"{'' if plain or given is None else ' from cache_implementation'}: pass such a cache, or none."
        )
    if type(given) is DynamicCache:
        return RollbackCache(model, tokens=n + 1), None, 0
    held = max(layer.max_cache_len for layer in given.layers if hasattr(layer, "max_cache_len"))
    capacity = max(needed, held + n)
    return RollbackCache(model, capacity, tokens=n + 1), capacity, 0
