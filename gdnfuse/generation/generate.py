"""The `generate` of a compiled model: a wrapper around transformers' own, and what it does between the calls of the model.

Caches, loops, processors and streamers stay those of transformers. If a prefix of the prompt is known, it is put into the cache
that transformers made, before the first call with the prompt. That call then computes only the rest. If drafts are checked, the
loop is ours, passed as `custom_generate`. On a GPU it asks one step late whether to stop (`stopping`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gdnfuse.errors import GdnfuseError
from gdnfuse.generation import stopping
from gdnfuse.generation.ahead import Ahead, Expected
from gdnfuse.generation.arguments import parameters_of
from gdnfuse.generation.caches import cache_finder
from gdnfuse.generation.prefix_tree import BLOCK, TOKEN, Read
from gdnfuse.generation.prefixes import PrefixStore, tokens
from gdnfuse.generation.proposers import Always, Proposer, proposer_of
from gdnfuse.generation.recorded import generating
from gdnfuse.generation.speculation import NOTED, Acceptance, Speculative, check_model
from gdnfuse.runs import RUNS

if TYPE_CHECKING:
    from gdnfuse.generation.tails import Tails

log = logging.getLogger(__name__)

CACHES = ("cache", "past_key_values")
AS_LONG = ("input_ids", "position_ids", "mm_token_type_ids", "token_type_ids")  # as long as the prompt along their last axis
PASSED = 16  # the most states that one call keeps, over all rows: they are in memory together
HIDES = "the mask hides tokens, as of padding"
KNOWN = {*AS_LONG, *CACHES, "attention_mask", "use_cache", "logits_to_keep", "return_dict"}


class Generate:
    """Replaces the method `generate` of a compiled model. It calls that method.

    A copy of the model is not compiled and has the method again: this object is copied and pickled as the method of the copy.

    Args:
        model: the model. Its calls must go through `heeding`.
        prefixes: the store of its prompts, or None.
        proposer: the proposer of drafts, or None.

    Attributes:
        acceptance: how many drafts the last generation accepted; None before the first.
    """

    def __init__(self, model: torch.nn.Module, prefixes: PrefixStore | None = None, proposer: Proposer | None = None):
        self.__self__, self.prefixes, self.proposer = model, prefixes, proposer
        self.acceptance: Acceptance | None = None
        self.tails: Tails | None = None  # of prompts behind a known prefix
        self._plain = getattr(type(model), "generate").__get__(model)  # noqa: B009
        functools.update_wrapper(self, self._plain)
        self._signature = inspect.signature(self._plain)
        self._runs = threading.local()
        self._parameters, self._find_cache = parameters_of(model), cache_finder()
        self._expected = Expected()

    def __call__(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        given = dict(self._signature.bind_partial(inputs, *args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        if self.proposer is None or _asks_for_more(self.__self__, given):
            return self._with_prefixes(given, inputs, *args, **kwargs)
        always = getattr(self._runs, "always", False)
        speculative = Speculative(Always(self.proposer) if always else self.proposer, given.get("streamer"))
        out = self._with_prefixes(given, inputs, *args, **kwargs, custom_generate=speculative)
        if NOTED.generations is None:
            self.acceptance = speculative.acceptance
        return out

    def _with_prefixes(self, given: dict[str, Any], inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.prefixes is None:
            with generating(), stopping.late(self.__self__, given):
                return self._plain(inputs, *args, **kwargs)
        noted = getattr(self._runs, "noted", None)
        prefixes = getattr(self._runs, "scratch", None) or self.prefixes
        run = Run(prefixes, self._parameters, self._find_cache, keeps=noted is None, tails=self.tails)
        if noted is not None:
            noted.append(run)
        if _beams(self.__self__, given) > 1:
            run.no_end = "the rows of beams trade places"
        run.is_one_token = _asked(self.__self__, given, "max_new_tokens") == 1
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if (cache := self._find_cache(kwargs.values())) is not None:
            if isinstance(ids, torch.Tensor) and ids.ndim == 2:
                prefixes.check_opened(cache, tokens(ids))
            run.leave("a cache was passed to generate")
        elif isinstance(ids, torch.Tensor) and ids.ndim == 2 and not ids.is_floating_point():
            run.prompt = ids.shape[1]
            if noted is None and prefixes.ahead:
                run.ahead = self._expected.launched(prefixes, self.tails, ids, given)
        outer = getattr(self._runs, "now", None)
        self._runs.now = run
        try:
            with generating():
                out = self._plain(inputs, *args, **kwargs)
        finally:
            self._runs.now = outer
            run.drop_ahead()
            self._expected.note(given, run.is_tail, run.was_wrong)
        if not run.no_end:
            if cache is not None:
                prefixes.went_on(cache, getattr(out, "sequences", out))
            loop = kwargs.get("custom_generate")
            run.finish(out, loop.seen if isinstance(loop, Speculative) else None)
        return out

    def heeding(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The model's call. While a `generate` runs in this thread, the call uses known prefixes."""

        def heeded(*args: Any, **kwargs: Any) -> Any:
            run = None if torch.compiler.is_dynamo_compiling() else getattr(self._runs, "now", None)
            if run is not None:
                return run(call, args, kwargs)
            if self.tails is not None:
                self.tails.join()
            return call(*args, **kwargs)

        return heeded

    @contextlib.contextmanager
    def noting(self) -> Iterator[list[Run]]:
        """Collect the runs of this thread. Meanwhile they read the store but add nothing to it."""
        self._runs.noted = noted = []
        try:
            yield noted
        finally:
            self._runs.noted = None

    @contextlib.contextmanager
    def drafting(self) -> Iterator[None]:
        """Let the runs of this thread check drafts at every step."""
        self._runs.always = True
        try:
            yield
        finally:
            self._runs.always = False

    @contextlib.contextmanager
    def with_scratch_store(self, rows: int, tokens: int) -> Iterator[None]:
        """Let the runs of this thread use a temporary store, for some prompts of so many rows and tokens."""
        known = self.prefixes
        size = 8 * rows * ((tokens // known.every + 3) * known.state_bytes + (tokens // BLOCK + 1) * known.block_bytes)
        self._runs.scratch = scratch = PrefixStore(self.__self__, known.every, size)
        scratch.in_pieces, scratch.state_dtype, scratch.rooms = known.in_pieces, known.state_dtype, known.rooms
        try:
            yield
        finally:
            self._runs.scratch = None

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.__self__, "generate")


def _asked(model: torch.nn.Module, given: dict[str, Any], name: str) -> Any:
    """The value of an argument of `generate`: from the call, else from its config, else from the model's config."""
    if name in given:
        return given[name]
    configs = given.get("generation_config"), getattr(model, "generation_config", None)
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def _beams(model: torch.nn.Module, given: dict[str, Any]) -> int:
    """How many beams a `generate` has. Beams swap rows."""
    return _asked(model, given, "num_beams") or 1


# Arguments that ask for another kind of decoding, or for transformers' own drafts.
OTHERS = (
    "custom_generate", "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "penalty_alpha", "dola_layers",
    "constraints", "force_words_ids", "speculation_type", "use_mtp",
)  # fmt: skip


def _asks_for_more(model: torch.nn.Module, given: dict[str, Any]) -> bool:
    """Whether a call of `generate` must be left to transformers, drafts or not."""
    return any(_asked(model, given, name) for name in OTHERS) or _beams(model, given) > 1


class Run:
    """One run of `generate`, seen from the calls of its model.

    Attributes:
        prompt: length of the prompt; None if that is not known.
        taken: how many tokens of each row came from the store; None before the prompt.
        why_not: why the store is not used, if it is not.
        no_end: why nothing after the prompt will be kept, if that is known in advance.
        ahead: its tail, if that was launched before the model was called.
        is_tail: whether its prompt was a known prefix and a tail.
        was_wrong: whether a tail was launched ahead in vain.
        is_one_token: whether the turn ends with the prompt, because the one token after it is not fed. Then it is kept while the
            GPU computes that token.
    """

    def __init__(
        self,
        prefixes: PrefixStore,
        parameters: list[str],
        find_cache: Callable[..., Any],
        keeps: bool = True,
        tails: Tails | None = None,
    ):
        self.is_one_token, self._ended, self._tails = False, False, tails
        self.prefixes, self.prompt, self.taken, self.why_not, self.no_end = prefixes, None, None, None, ""
        self._parameters, self._find_cache, self._keeps = parameters, find_cache, keeps
        self._left, self._cache, self._in_steps = False, None, False
        self.ahead: Ahead | None = None
        self.is_tail = self.was_wrong = False
        self._rows: list[bytes] = []  # rows of the prompt that the cache has seen
        self._fed: list[torch.Tensor] = []  # tokens after the prompt, one by one

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._tails is not None and self.ahead is None:
            self._tails.join()  # those of other threads
        if self._left:
            return call(*args, **kwargs)
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        ids = given.get("input_ids")
        if self._cache is not None and ids is not None and ids.shape[1] == 1:
            self._in_steps = True
            self._fed.append(ids)
            return call(*args, **kwargs)
        if getattr(self._cache, "is_recording", False):  # drafts: the cache may keep only a part of them
            self._in_steps = True
            return call(*args, **kwargs)
        if self._in_steps:
            self.leave("more than one token was given after the prompt")
        elif (why := self._why_not(given)) is not None:
            self.leave(why)
        else:
            new, why = _plain_tokens(given, self._seen())
            if why:
                self.leave(why)
        if self._left:
            return call(*args, **kwargs)
        return self._prompt(call, given, new)

    def leave(self, why: str) -> None:
        """Continue this run without the store."""
        self._left, self.why_not = True, why
        self.drop_ahead()
        if self._keeps and self.prefixes.leave_out(why):
            log.info(
                "generate uses a prefix store only for prompts of plain tokens, found that %s, so the store is not used.", why
            )

    def finish(self, out: Any, drafted: tuple[Any, list[torch.Tensor]] | None = None) -> None:
        """Keep the whole turn, if the cache has seen exactly what `generate` returned.

        Args:
            out: the result of `generate`.
            drafted: a cache that was fed drafts, and the tokens after the prompt that it still holds.
        """
        sequences = getattr(out, "sequences", out)
        if self._left or self._ended or self._cache is None or not isinstance(sequences, torch.Tensor):
            return
        if drafted is not None and drafted[0] is self._cache:
            self._fed = drafted[1]
        n = int(self._cache.get_seq_length())
        seen = len(self._rows[0]) // TOKEN + sum(x.shape[1] for x in self._fed)
        if n != seen or sequences.shape[0] != len(self._rows) or sequences.shape[1] < n or self.prefixes.unlike(self._cache):
            return
        rows = self._rows
        if self._fed:
            if self.prefixes.moment() != self._began:  # a streamer or another thread has changed the model
                return
            rows = [row + fed for row, fed in zip(rows, tokens(torch.cat(self._fed, 1)), strict=True)]
        if rows == tokens(sequences[:, :n]):
            self._keep(rows)

    def _seen(self) -> int:
        """How many tokens of the prompt the cache has seen."""
        return len(self._rows[0]) // TOKEN if self._rows else 0

    def _why_not(self, given: dict[str, Any]) -> str | None:
        """Why the call of a prompt cannot start from a known prefix, whatever its tokens are. None if it may."""
        if given.get("input_ids") is None:
            return "tokens were given as embeddings"
        for name, x in given.items():
            if name not in KNOWN and x is not None and x is not False and not _nothing(x):
                return f"{name} was given"
        cache = self._find_cache(given.values())
        if cache is None:
            return "there is no cache"
        if (why := self.prefixes.unlike(cache)) is not None:
            return f"there is {why}"
        have = int(cache.get_seq_length())
        if (cache is not self._cache) if self._cache is not None else have > 0:
            return "the cache has seen other tokens"
        if have != self._seen():
            return "the cache has seen other tokens"
        if given.get("logits_to_keep") != 1:
            return "more logits than the last were asked for"
        if self.prefixes.model.training:
            return "the model is in training"
        return None

    def _prompt(self, call: Callable[..., Any], given: dict[str, Any], new: list[bytes], guess: bool = True) -> Any:
        """Compute a prompt or a part of it. Known tokens come from the store, and states are kept where a prompt may start.

        The rows of its tokens are `new`. With `guess`, weights are compared with those of the last prompt while the GPU computes
        this one, if it computes only a tail. If they differ, all is done again.
        """
        prefixes, ids = self.prefixes, given["input_ids"]
        self._cache = self._find_cache(given.values())
        if not self._rows:
            before = prefixes.last_moment if guess and self._tails is not None and self._tails.knows(self._cache) else None
            self._began, self._sure = before or prefixes.moment(), before is None
            self._key, self.taken = self._began[0], 0
            self._rows = [b""] * ids.shape[0]
        have = self._seen()
        end = have + ids.shape[1]
        rows = self._rows = [row + more for row, more in zip(self._rows, new, strict=True)]
        ahead, early = self.ahead, None
        if ahead is not None:
            early = ahead.answer(rows, self._cache, self._began) if have == 0 and not self._sure else None
            self.drop_ahead()
            self.was_wrong = early is None
        n, entries = prefixes.find(rows, end - 1, self._key) if early is None else (ahead.length, ahead.entries)
        at = max(n, have)
        counted = {"taken": at - have, "run": end - at, "prompt": have == 0, "hit": n > have and self.taken == 0}
        if n > have:
            if early is None:
                prefixes.fill(self._cache, entries, have)
            self.taken += n - have
        last = self.prompt is None or end >= self.prompt
        stops = prefixes.boundaries(rows, at, end, self._key, last) if self._keeps else []
        while at < end:
            start, (at, passed) = at, self._piece(at, [n for n in stops if n > at], end)
            part = _part(given, start - have, at - have, end - have)
            if n > have and not passed and (early is not None or self._takes_tail(at - start, ids, start == n)):
                before = prefixes.mark() if early is None else ahead.mark
                out = self._tail(call, part, entries, have, start) if early is None else early
                if not self._is_sure(before):
                    return self._again(call, given, new)
                self.is_tail = out is not None and start == n
                if out is None:  # what the cache holds is of no use
                    prefixes.fill(self._cache, entries, have)
                    at = n
                    continue
            elif not self._is_sure():
                return self._again(call, given, new)
            else:
                with _collecting() if passed else contextlib.nullcontext([]) as collected:
                    out = call(**part)
            states = prefixes.passed(collected, len(passed)) if passed else []
            if states is None:
                prefixes.in_pieces, passed, states = True, [], []  # the graphs of this model keep no states
            for n, held in zip(passed, states, strict=True):
                self._keep([row[: n * TOKEN] for row in rows], held)
            if at % BLOCK == 0 and (at < end or at % prefixes.every == 0):
                self._keep([row[: at * TOKEN] for row in rows])
        if self._keeps:
            prefixes.count(len(rows), **counted)
        if self.is_one_token and end == self.prompt and not self.no_end:
            self._keep(rows)
            self._ended = True
        return out

    def drop_ahead(self) -> None:
        """Hold no tail that was launched ahead any more, and count it as wrong."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None:
            ahead.drop()
            self.was_wrong = True

    def _takes_tail(self, tokens: int, ids: torch.Tensor, first: bool) -> bool:
        """Whether so many tokens behind a known prefix are computed by `Tails`; `first` of those behind it."""
        tails = self._tails
        if tails is None or not tails.takes(tokens, ids, self._cache) or not self.prefixes.rooms.came_back(self._cache):
            return False
        return first or tails.is_proved(self._cache)

    def _tail(self, call: Callable[..., Any], part: dict[str, Any], entries: list[Read], have: int, start: int) -> Any:
        """What `Tails` answers to the tokens from `start` on. The first time it is compared with what the call answers."""
        out = self._tails(part["input_ids"], self._cache, start)
        if out is None or self._tails.is_proved(self._cache):
            return out
        from gdnfuse.generation.tails import left

        stop = start + part["input_ids"].shape[1]
        of_tail = left(out, self._cache, start, stop)
        self.prefixes.fill(self._cache, entries, have)
        out = call(**part)
        self._tails.prove(self._cache, of_tail, left(out, self._cache, start, stop))
        return out

    def _is_sure(self, since: Any = None) -> bool:
        """Whether prefixes are kept by what they were looked up by. With `since` the GPU's work behind it is not waited for."""
        if not self._sure:
            self._sure = self.prefixes.moment(since) == self._began
        return self._sure

    def _again(self, call: Callable[..., Any], given: dict[str, Any], new: list[bytes]) -> Any:
        """Compute a prompt for which a prefix of other weights may have been taken, into a cache of fixed length."""
        self._cache.reset()
        self._rows = []
        return self._prompt(call, given, new, guess=False)

    def _piece(self, at: int, stops: list[int], end: int) -> tuple[int, list[int]]:
        """Where a call from the token `at` ends, and the stops on its way at which its graph keeps the states.

        There are at least two stops, because one graph serves any number of them from two on.
        """
        prefixes, stops = self.prefixes, [*(n for n in stops if n < end), end]
        passed = list(itertools.takewhile(lambda n: n % prefixes.every == 0 and n < end, stops))
        if prefixes.in_pieces or at % prefixes.every or len(passed) < 2:
            return stops[0], []
        most = max(2, PASSED // len(self._rows))
        return stops[min(len(passed), most)], passed[:most]

    def _keep(self, rows: list[bytes], states: list[torch.Tensor] | None = None) -> None:
        """Keep what the cache holds, or what it held when it had these states."""
        if not self._keeps:
            return
        try:
            self.prefixes.keep(self._key, self._cache, rows, states)
        except torch.OutOfMemoryError:  # the answer matters more than the store
            self.leave("the device has no memory left to keep anything")


def keeping(plain: Callable[..., Any], kept: Callable[..., Any]) -> Callable[..., Any]:
    """A call of a prompt. It goes to `kept`, whose graph keeps the states on its way, if somebody collects them."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return (plain if RUNS.checkpoints is None else kept)(*args, **kwargs)

    return call


@contextlib.contextmanager
def _collecting() -> Iterator[list[list[torch.Tensor]]]:
    outer, RUNS.checkpoints = RUNS.checkpoints, []
    try:
        yield RUNS.checkpoints
    finally:
        RUNS.checkpoints = outer


def _nothing(x: Any) -> bool:
    """Whether a value is a dict without content, such as the encoding of no images."""
    return isinstance(x, Mapping) and all(value is None for value in x.values())


def _plain_tokens(given: dict[str, Any], have: int) -> tuple[list[bytes], str]:
    """The rows of tokens of a call behind `have` others, and why they cannot be the key of a prefix, or empty."""
    ids, masks = given["input_ids"], given.get("attention_mask")
    masks = [x for x in (masks.values() if isinstance(masks, dict) else [masks]) if x is not None]
    if not all(isinstance(x, torch.Tensor) and x.ndim in (2, 4) for x in masks):
        return [], HIDES
    named = {name: given[name] for name in AS_LONG if given.get(name) is not None}
    # All of them at once: while the host waits, nothing is launched.
    read = _on_host([*named.values(), *(x if x.ndim == 2 else x[:, :, -1] for x in masks)])
    held, T = dict(zip(named, read, strict=False)), ids.shape[1]
    if "position_ids" in held and not _counting(held["position_ids"], have, T):
        return [], "positions do not count the tokens, as with padding"
    if not all(_all_seen(x, have + T) for x in read[len(named) :]):
        return [], HIDES
    if any(bool(held[name].any()) for name in AS_LONG[2:] if name in held):
        return [], "there are pictures among the tokens"
    return tokens(held["input_ids"]), ""


def _on_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors on the host. Those of one dtype and device are one copy."""
    alike: dict[Any, list[int]] = {}
    for i, x in enumerate(tensors):
        alike.setdefault((x.dtype, x.device), []).append(i)
    found = list(tensors)
    for places in alike.values():
        of = [tensors[i] for i in places]
        parts = torch.cat([x.reshape(-1) for x in of]).cpu().split([x.numel() for x in of])
        for i, x, part in zip(places, of, parts, strict=True):
            found[i] = part.view(x.shape)
    return found


def _counting(positions: torch.Tensor, have: int, T: int) -> bool:
    """Whether position_ids [..., T] are have, have + 1, …"""
    return positions.shape[-1] == T and bool((positions == torch.arange(have, have + T, device=positions.device)).all())


def _all_seen(mask: torch.Tensor, n: int) -> bool:
    """Whether the last token of a prompt sees all n tokens. Then nothing is padding, because masks here are also causal.

    A mask is [B, n] of 1 and 0, or the last row [B, 1, L] of one of booleans or of numbers that are added to logits.
    """
    if mask.ndim == 2:
        return mask.shape[1] == n and bool((mask != 0).all())
    seen = mask[..., :n]
    return seen.shape[-1] == n and bool((seen if mask.dtype == torch.bool else seen == 0).all())


def _part(given: dict[str, Any], start: int, stop: int, T: int) -> dict[str, Any]:
    """The arguments of a call for its tokens start … stop − 1 of T.

    The mask was made for an empty cache. It may be None if torch's causal attention is enough. If a mask hides nothing, it is
    dropped, and the model makes one for the filled cache.
    """
    if (start, stop) == (0, T):
        return given
    part = {name: x for name, x in given.items() if name != "attention_mask"}
    return part | {name: x[..., start:stop] for name in AS_LONG if (x := given.get(name)) is not None}


def of(model: torch.nn.Module) -> Generate | None:
    """Our object in place of a model's `generate`, or None."""
    found = vars(model).get("generate")
    return found if isinstance(found, Generate) else None


def install(model: torch.nn.Module, prefixes: PrefixStore | None, proposer: Proposer | None) -> Generate | None:
    """Replace an instance's `generate`, or remove our replacement if it has nothing to do."""
    if of(model) is not None:
        del model.generate
    if prefixes is None and proposer is None and not (hasattr(type(model), "generate") and stopping.possible(model)):
        return None
    model.generate = Generate(model, prefixes, proposer)
    return model.generate


def proposer(models: list[torch.nn.Module], speculate: Any) -> Proposer:
    """The proposer of drafts for the models.

    Raises:
        GdnfuseError: `speculate` cannot draft, or a model cannot check drafts.
    """
    found = proposer_of(speculate)
    for model in models:
        if not hasattr(type(model), "generate"):
            raise GdnfuseError(f"speculate needs a model with transformers' generate, found {type(model).__name__}.")
        check_model(model, found)
    return found


def check(models: list[torch.nn.Module], prefixes: Any) -> None:
    """Raise GdnfuseError unless `prefixes` is a store of the one model."""
    if not isinstance(prefixes, PrefixStore):
        raise GdnfuseError(f"prefixes must be a gdnfuse.PrefixStore, found {type(prefixes).__name__}.")
    if len(models) > 1 or prefixes.model is not models[0]:
        raise GdnfuseError(
            f"prefixes must be a PrefixStore of the model that is compiled, found one of another "
            f"{type(prefixes.model).__name__}: make it with this model."
        )
    if not hasattr(type(models[0]), "generate"):
        raise GdnfuseError(f"prefixes need a model with generate, found {type(models[0]).__name__}.")
