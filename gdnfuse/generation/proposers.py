"""Proposers: they draft the next tokens, of which one step of the model checks several.

A bad draft only costs time. The model rejects what it would not have generated itself. So a proposer may guess freely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from gdnfuse import compat
from gdnfuse.errors import GdnfuseError
from gdnfuse.generation.feeding import Fed, compiled_steps, recorded_steps
from gdnfuse.generation.lookup import History

MOST_DRAFTS, LONGEST_PAUSE = 7, 16
TOKENS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass
class Run:
    """What a proposer is told at the start of a generation.

    Attributes:
        model: the model that checks the drafts.
        mask: [B, L], of the prompt, 0 for padding; or None.
        most: the most tokens that a row may get, drafts included.
        static: whether the model's cache has a fixed length. A drafter's cache then has one too.
        scores: a function of ids [B, L] and logits [B, V] that gives the scores from which tokens are sampled. None if drafts are
            to be the likeliest tokens: because nothing is sampled, or because the function must not be called for drafts.
        alone: whether only code of transformers and of gdnfuse runs between two steps, on a cache of fixed length.
        early: whether a step with drafts may be launched before the host has read what it follows.
        compiled: compiles a drafting function as the model is compiled, once for each name. None if the model is not compiled.
    """

    model: torch.nn.Module
    mask: torch.Tensor | None
    most: int
    static: bool
    scores: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    compiled: Callable[[str, Callable[..., Any]], Callable[..., Any]] | None = None
    early: bool = False
    alone: bool = False


@dataclass
class Drafts:
    """Drafted tokens [B, n] and, if they were sampled, the probabilities [B, n, vocabulary] from which they were sampled."""

    tokens: torch.Tensor
    probabilities: torch.Tensor | None = None


class Drafting(Protocol):
    """A proposer during one generation."""

    def propose(self, ids: torch.Tensor, rows: Sequence[Sequence[int]]) -> Drafts | None:
        """The next tokens of all rows, or None if there is nothing to propose.

        Args:
            ids: [B, L], all tokens so far, padding included.
            rows: the same as lists, without padding.
        """

    # A drafter may also have `draft_ahead(picked, standing)`. It makes the next drafts of one row while the host does not know
    # yet which tokens they follow: of picked [1, n + 1], the tokens after each place of a verify step, the first standing + 1,
    # with standing [1, 1]. It returns Drafts of n tokens, or None if it cannot. The next `propose` is then about these drafts.


class Proposer(Protocol):
    """Drafts `n` tokens at a time."""

    n: int

    def start(self, run: Run) -> Drafting: ...


def check_count(n: Any, name: str, most: int = MOST_DRAFTS) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= most:
        raise GdnfuseError(f"{name} drafts 1 to {most} tokens at a time, found {n!r}.")


def is_users(proposer: Proposer) -> bool:
    """Whether a proposer is a user's own class. Its drafts are checked before the model sees them."""
    return not type(proposer).__module__.startswith("gdnfuse.")


def check_drafts(drafts: Any, ids: torch.Tensor, n: int, vocabulary: int) -> None:
    """Raise GdnfuseError unless drafts are `Drafts` of up to n tokens for each row of ids [B, L], all in the vocabulary."""
    wanted = f"Drafts of ids [{ids.shape[0]}, up to {n}] on {ids.device}"
    if not isinstance(drafts, Drafts) or not isinstance(drafts.tokens, torch.Tensor):
        raise GdnfuseError(f"A proposer must give {wanted}, or None, found {type(getattr(drafts, 'tokens', drafts)).__name__}.")
    x, p = drafts.tokens, drafts.probabilities
    if x.ndim != 2 or x.shape[0] != ids.shape[0] or x.shape[1] > n or x.dtype not in TOKENS or x.device != ids.device:
        raise GdnfuseError(f"A proposer must give {wanted}, or None, found {list(x.shape)} of {x.dtype} on {x.device}.")
    if p is not None and p.shape != (*x.shape, vocabulary):
        raise GdnfuseError(f"Probabilities of drafts must be {[*x.shape, vocabulary]}, found {list(p.shape)}.")
    low, high = (int(x.min()), int(x.max())) if x.numel() else (0, 0)
    if low < 0 or high >= vocabulary:
        raise GdnfuseError(f"Drafts must be ids below {vocabulary}, the model's vocabulary, found {low} to {high}.")


def drawn(run: Run, ids: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A drafted token [B, 1] from logits [B, V] after ids [B, L] and, if it was sampled, the probabilities for it."""
    if run.scores is None:
        return logits.argmax(-1, keepdim=True), None
    probabilities = run.scores(ids, logits).softmax(-1)
    return torch.multinomial(probabilities, 1), probabilities


@dataclass(frozen=True)
class PromptLookup:
    """Drafts by looking for the last tokens earlier in the prompt or the answer. It proposes what followed them there.

    If they are found nowhere, nothing is proposed, and the step is a plain one.

    Args:
        n: tokens per draft, 1 to 7.
        ngram: how many last tokens to look for, at most. If so many are not found, it looks for fewer.

    Raises:
        GdnfuseError: `n` or `ngram` is out of range.

    Source:
        Saxena 2023, prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding.
    """

    n: int = 4
    ngram: int = 3

    def __post_init__(self) -> None:
        check_count(self.n, "PromptLookup")
        if isinstance(self.ngram, bool) or not isinstance(self.ngram, int) or self.ngram < 1:
            raise GdnfuseError(f"PromptLookup looks for at least one token, found ngram={self.ngram!r}.")

    def start(self, run: Run) -> Drafting:
        """The drafter of one generation."""
        return _Lookup(self, run)


class _Lookup:
    """The drafter of one generation. After drafts of which not one token was right, it proposes nothing for 1, 2, 4, 8 and then
    LONGEST_PAUSE tokens, because a step with drafts takes longer than a plain one."""

    def __init__(self, of: PromptLookup, run: Run):
        self.of, self.most, self.early, self._rows = of, run.most, run.early, []
        self._proposed: list[tuple[int, int]] = []  # of each row how long it was, and the first draft
        self._failures, self._wait = 0, 0
        self._known: torch.Tensor | None = None  # all tokens [1, L] at the last proposal that was not made ahead
        self._history: History | None = None  # of one row: the same and what came after them
        self._ahead: Drafts | None = None

    def draft_ahead(self, picked: torch.Tensor, standing: torch.Tensor) -> Drafts | None:
        """As in `Drafting`."""
        if self._known is None or not self.early:  # then the host finds the same with fewer launches
            return None
        if self._history is None:
            self._history = History(self._known, self.most + MOST_DRAFTS + 1, self.of.ngram)
        self._history.add(picked, standing[0] + 1)
        self._ahead = Drafts(self._history.after(self.of.n))
        return self._ahead

    def propose(self, ids: torch.Tensor, rows: Sequence[Sequence[int]]) -> Drafts | None:
        if not self._rows:
            self._rows = [_Places(self.of.ngram) for _ in rows]
        found = [places.after(row, self.of.n) for places, row in zip(self._rows, rows, strict=True)]
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            alone = len(rows) == 1 and len(rows[0]) == ids.shape[1]
            self._known, self._history = ids if alone else None, None
        if self._proposed:
            right = [len(row) > at and row[at] == draft for row, (at, draft) in zip(rows, self._proposed, strict=True)]
            self._failures = 0 if any(right) else self._failures + 1
            self._wait = len(rows[0]) + min(2 ** (self._failures - 1), LONGEST_PAUSE) if self._failures else 0
            self._proposed = []
        if not any(found) or len(rows[0]) < self._wait:
            return None
        self._proposed = [(len(row), draft[0] if draft else -1) for draft, row in zip(found, rows, strict=True)]
        if ahead is not None:  # the same drafts
            return ahead
        filled = [draft or [row[-1]] * self.of.n for draft, row in zip(found, rows, strict=True)]
        return Drafts(torch.tensor(filled, device=ids.device))


@dataclass
class _Places:
    """For each n-gram of a row, the place after its last occurrence."""

    most: int
    places: dict[tuple[int, ...], int] = field(default_factory=dict)
    seen: int = 0

    def after(self, row: Sequence[int], n: int) -> list[int]:
        """The n tokens that followed the longest of the last n-grams that occurred before. Empty if none did."""
        for end in range(max(self.seen, 1), len(row)):  # n-grams that a token follows
            for size in range(1, min(self.most, end) + 1):
                self.places[tuple(row[end - size : end])] = end
        self.seen = len(row)
        for size in range(min(self.most, len(row)), 0, -1):
            at = self.places.get(tuple(row[len(row) - size :]))
            if at is not None:
                read = list(row[at : at + n])
                period = len(row) - at
                while len(read) < n:  # assume that the row repeats with this period
                    read.append(read[len(read) - period])
                return read
        return []


@dataclass(frozen=True)
class Callback:
    """Drafts with a function.

    Args:
        propose: a function of all tokens so far [B, L], padding included. It returns up to `n` more tokens for each row, [B, m],
            as a tensor or as lists, or None.
        n: tokens per draft, 1 to 7. Fewer are padded to n, so that all steps have one shape.

    Raises:
        GdnfuseError: `propose` is not a function, or `n` is out of range.

    Source:
        The acceptance of drafts: Leviathan et al. 2023, arXiv:2211.17192.
    """

    propose: Callable[[torch.Tensor], Any]
    n: int = 4

    def __post_init__(self) -> None:
        check_count(self.n, "Callback")
        if not callable(self.propose):
            raise GdnfuseError(f"Callback needs a function, found {type(self.propose).__name__}.")

    def start(self, run: Run) -> Drafting:
        """The drafter of one generation."""
        return _Called(self, run.model.config.get_text_config(decoder=True).vocab_size)


class _Called:
    def __init__(self, of: Callback, vocabulary: int):
        self.of, self.vocabulary = of, vocabulary

    def propose(self, ids: torch.Tensor, rows: Sequence[Sequence[int]]) -> Drafts | None:
        drafts = self.of.propose(ids.clone())  # the function may write to its argument
        if drafts is None:
            return None
        try:
            drafts = torch.as_tensor(drafts, device=ids.device)
        except (ValueError, TypeError, RuntimeError):
            drafts = None
        B, wanted = ids.shape[0], f"ids of tokens [{ids.shape[0]}, up to {self.of.n}], as a tensor or as lists of equal length"
        if (
            drafts is None
            or drafts.ndim != 2
            or drafts.shape[0] != B
            or drafts.shape[1] > self.of.n
            or drafts.dtype not in TOKENS
            or drafts.layout != torch.strided
        ):
            found = "something else" if drafts is None else f"{list(drafts.shape)} of {drafts.dtype}"
            found += "" if drafts is None or drafts.layout == torch.strided else f", {drafts.layout}"
            raise GdnfuseError(f"A function that proposes drafts must give {wanted}, found {found}.")
        if drafts.shape[1] == 0:
            return None
        low, high = drafts.min().item(), drafts.max().item()
        if low < 0 or high >= self.vocabulary:
            raise GdnfuseError(f"Drafts must be ids below {self.vocabulary}, the model's vocabulary, found {low} to {high}.")
        missing = self.of.n - drafts.shape[1]
        return Drafts(torch.cat([drafts, drafts[:, -1:].expand(B, missing)], 1).to(ids.dtype))


@dataclass(frozen=True)
class Draft:
    """Drafts with a smaller model.

    The model has its own cache and generates one token at a time. If it has recurrent states, they are copied after each draft,
    so that rejected tokens can be taken back exactly. This takes memory for up to `n` + 2 times its states, which are 19 MiB in a
    0.8B model.

    Args:
        model: any causal language model with the same vocabulary. Compile it with `gdnfuse.compile` to make it fast.
        n: tokens per draft, 1 to 7.

    Raises:
        GdnfuseError: `model` is not a causal language model, or `n` is out of range.

    Source:
        Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.
    """

    model: torch.nn.Module
    n: int = 4

    def __post_init__(self) -> None:
        check_count(self.n, "Draft")
        if not isinstance(self.model, torch.nn.Module) or not hasattr(self.model, "generate"):
            raise GdnfuseError(f"Draft needs a causal language model of transformers, found {type(self.model).__name__}.")

    def check(self, model: torch.nn.Module) -> None:
        """Raise GdnfuseError if drafts of this model would be no tokens of the other model."""
        ours, theirs = (m.config.get_text_config(decoder=True).vocab_size for m in (self.model, model))
        if ours != theirs:
            raise GdnfuseError(
                f"A draft must have the vocabulary of the model it drafts for, {theirs} tokens of {type(model).__name__}, found "
                f"{ours} of {type(self.model).__name__}."
            )
        if self.model is model:
            raise GdnfuseError("A draft must be another model than the one it drafts for, found the same.")
        here, there = (next(m.parameters()).device for m in (self.model, model))
        if here != there:
            raise GdnfuseError(f"A draft must be on the device of the model it drafts for, {there}, found {here}.")

    def start(self, run: Run) -> Drafting:
        """The drafter of one generation."""
        return _Drafting(self, run)


class _Drafting:
    """The drafter of one generation.

    The cache has been fed the last token and all drafts but the last. The next drafts may have to be made before the host knows
    which of these are accepted. Then it has been fed the last one too, so that the device alone can go back to any of them.
    """

    def __init__(self, of: Draft, run: Run):
        from transformers import DynamicCache, StaticCache

        config = of.model.config.get_text_config(decoder=True)
        cache = StaticCache(config=config, max_cache_len=run.most) if run.static else DynamicCache(config=config)
        cache.layers = [_whole(layer, run.most) for layer in cache.layers]
        self.n, self.run, self.early = of.n, run, run.early and run.static and run.scores is None
        call = compiled_steps(of.model, run.static)
        self.fed = Fed(of.model, cache, run.mask, run.most if run.static else None, call=call)
        if run.alone:
            self.fed.recorded, self.fed.few = recorded_steps(of.model, cache), range(1, 2)
        self.fed_tokens = of.n + self.early
        # Of the states after each token that may be the last accepted one. The cache itself holds the last, if the host knows.
        self.states = _States(cache, of.n + 1 if self.early else of.n - 1)
        self.known = 0  # tokens in the cache before those that the drafts were made with
        self.start: torch.Tensor | None = None  # [1], the same on the device
        self.ahead: Drafts | None = None

    def draft_ahead(self, picked: torch.Tensor, standing: torch.Tensor) -> Drafts | None:
        """As in `Drafting`."""
        from gdnfuse.generation.rollback import take_back

        if not self.early or picked.shape[1] != self.n + 1:
            return None
        if self.start is None:
            self.start = torch.full((1,), self.known, device=picked.device)
        with torch.no_grad():
            self.states.restore(standing.reshape(1))
            take_back(self.fed.cache.layers, self.n - standing.view(()))
            self.start = self.start + standing.reshape(1) + 1
            self.ahead = self._made(picked.gather(1, standing), None, self.start)
        return self.ahead

    def propose(self, ids: torch.Tensor, rows: Sequence[Sequence[int]]) -> Drafts | None:
        if self.ahead is not None:
            ahead, self.ahead, self.known = self.ahead, None, ids.shape[1] - 1
            self.fed.length = self.known + self.fed_tokens
            return ahead
        with torch.no_grad():
            self._catch_up(ids)
            self.known, self.start = self.fed.length, None
            return self._made(ids[:, -1:], ids, None)

    def _made(self, token: torch.Tensor, ids: torch.Tensor | None, start: torch.Tensor | None) -> Drafts:
        """The drafts behind a token [B, 1].

        Args:
            token: which the cache is fed first.
            ids: [B, L], all tokens so far. None if nothing is sampled.
            start: [1], how many tokens the cache holds, if only the device knows it.
        """
        drafts, probabilities = [], []
        for i in range(self.fed_tokens):
            logits = self.fed(token, last=True, start=None if start is None else start + i).logits[:, -1].float()
            self.states.keep(i)
            if i == self.n:
                break
            token, p = drawn(self.run, ids, logits)
            drafts.append(token)
            if p is not None:
                probabilities.append(p)
                ids = torch.cat([ids, token], 1)
        return Drafts(torch.cat(drafts, 1), torch.stack(probabilities, 1) if probabilities else None)

    def _catch_up(self, ids: torch.Tensor) -> None:
        """Let the cache hold all tokens but the last, and nothing else."""
        from gdnfuse.generation.rollback import take_back

        wanted = ids.shape[1] - 1
        if not self.fed.length:
            if wanted:
                self.fed(ids[:, :wanted], last=True)
            return
        if wanted < self.fed.length:
            self.states.restore(wanted - self.known - 1)
            take_back(self.fed.cache.layers, self.fed.length - wanted)
            self.fed.length = wanted
        for i in range(self.fed.length, wanted):
            self.fed(ids[:, i : i + 1], last=True)


def _whole(layer: Any, most: int) -> Any:
    """A layer of a cache that keeps all keys, because none can be taken back from a window. A mask hides those before it."""
    from transformers import cache_utils

    if type(layer) is cache_utils.StaticSlidingWindowLayer:
        whole = cache_utils.StaticLayer(max_cache_len=most)
    elif type(layer) is cache_utils.DynamicSlidingWindowLayer:
        whole = cache_utils.DynamicLayer()
    else:
        return layer
    whole.is_sliding = True  # whose mask is that of a window
    return whole


class _States:
    """So many copies of the recurrent and conv states of a cache. They are made when there is something to keep."""

    def __init__(self, cache: Any, copies: int):
        self.cache, self.copies = cache, copies
        self._kept: list[torch.Tensor] | None = None  # [copies, ...] of each

    def _held(self) -> list[torch.Tensor]:
        layers = [layer for layer in self.cache.layers if hasattr(layer, "recurrent_states")]
        held = [x for layer in layers for x in (*layer.recurrent_states.values(), *layer.conv_states.values())]
        return [x for x in held if x is not None]

    def keep(self, i: int) -> None:
        """Make the copy i, if there is one."""
        if i < self.copies:
            held = self._held()
            if self._kept is None:
                self._kept = [x.new_empty(self.copies, *x.shape) for x in held]
            compat.copy_all([x[i] for x in self._kept], held)

    def restore(self, i: int | torch.Tensor) -> None:
        """Go back to the copy i, a tensor [1] if only the device knows it."""
        kept = [x[i] if isinstance(i, int) else x.index_select(0, i)[0] for x in self._kept]
        compat.copy_all(self._held(), kept)


class Always:
    """Proposes the same as another proposer, and any tokens if that proposes nothing; or never proposes anything."""

    def __init__(self, of: Proposer, ever: bool = True):
        self.of, self.n, self.ever = of, of.n, ever

    def start(self, run: Run) -> Always:
        self.drafting = self.of.start(run) if self.ever else None
        optional = ("hear", "close", "draft_ahead")
        self.tap = getattr(self.drafting, "tap", None)
        self.hear, self.close, self.draft_ahead = (getattr(self.drafting, name, lambda *_: None) for name in optional)
        return self

    def propose(self, ids: torch.Tensor, rows: Sequence[Sequence[int]]) -> Drafts | None:
        if self.drafting is None:
            return None
        return self.drafting.propose(ids, rows) or Drafts(ids[:, -1:].expand(-1, self.n))


def proposer_of(speculate: Any) -> Proposer:
    """The proposer that `speculate=` stands for.

    Raises:
        GdnfuseError: the value stands for none.
    """
    if isinstance(speculate, type) or isinstance(speculate, torch.nn.Module) or isinstance(speculate, bool):
        pass
    elif hasattr(speculate, "start") and hasattr(speculate, "n"):
        if is_users(speculate):
            check_count(speculate.n, type(speculate).__name__)
        return speculate
    elif callable(speculate):
        return Callback(speculate)
    found = speculate.__name__ if isinstance(speculate, type) else type(speculate).__name__
    raise GdnfuseError(
        f"speculate must be a PromptLookup, a Draft, an MTP, a Callback or a function that drafts, found {found}; a model "
        "drafts as gdnfuse.Draft(model, 4)."
    )
