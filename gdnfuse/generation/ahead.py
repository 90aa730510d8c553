"""A tail is launched before transformers prepares the call of its model. So the GPU computes it meanwhile.

Between the call of `generate` and that of its model the host makes a config, a cache, positions and masks. The GPU has little
to do then. If a `generate` has the arguments of the last one, apart from tokens, and that one's prompt was a known prefix and a
tail, this one's probably is too. So the last cache's room is filled, and the tail launched, on a stream of its own, for which
transformers does not wait. If the model is called with just those tokens and a new cache as long as the room, the cache gets
the room, and the answer is there. Otherwise nobody has seen the room, and the prompt is computed as others are. Either way what
the model computes next comes behind the tail: CUDA graphs of one thread share memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from gdnfuse.generation.prefix_tree import BLOCK, Read
from gdnfuse.generation.prefixes import PrefixStore, tokens

if TYPE_CHECKING:
    from gdnfuse.generation.tails import Tails

PLAIN = (torch.Tensor, bool, int, float, str, type(None))
PAUSE = 16  # generations after one that was not as expected


class Ahead:
    """A tail that was launched.

    Attributes:
        rows: the tokens of the prompt.
        length: how many of them came from the store.
        entries: what came from there. Held as long as the GPU may read it.
        began: of the store, by what the prefix was found.
        mark: what the GPU had to do before the tail.
    """

    def __init__(self, prefixes: PrefixStore, rows: list[bytes], length: int, entries: list[Read], began: Any):
        self.rows, self.length, self.entries, self.began = rows, length, entries, began
        self.mark: Any = None
        self._tails: Tails | None = None  # while the tail is not waited for
        self._prefixes, self._room, self._holder, self._out = prefixes, None, None, None

    def launch(self, tails: Tails, ids: torch.Tensor) -> bool:
        """Fill the room and launch the tail. Returns whether there was a room, and the tail was right."""
        with self._beside(tails, ids.device), torch.no_grad():
            lent = self._prefixes.lend(self.entries[0], ids.shape[1], tails.proved)
            if lent is None:
                return False
            self._room, self._holder = lent[0], SimpleNamespace(layers=lent[1])
            self.mark = self._prefixes.mark()
            self._out = tails(ids[:, self.length :], self._holder, self.length)
        return self._out is not None

    def answer(self, rows: list[bytes], cache: Any, began: Any) -> Any:
        """What the model answers to the prompt `rows`, whose cache holds what it should from then on. None if that is another."""
        try:
            if rows != self.rows or began != self.began or not self._prefixes.take_over(self.entries[0], cache, self._room):
                return None
            out = self._out
            for name, x in out.items():
                if x is self._holder:
                    out[name] = cache
            return out
        finally:
            self.drop()

    def drop(self) -> None:
        """Have whatever comes next on this stream come behind the tail, and hold nothing of it."""
        if self._tails is not None:
            self._tails.join()
            self._tails.ahead.discard(self)
        self._tails = None
        self._room = self._holder = self._out = None

    @contextlib.contextmanager
    def _beside(self, tails: Tails, device: torch.device) -> Iterator[None]:
        self._tails = tails
        tails.ahead.add(self)
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            tails.beside = tails.beside or torch.cuda.Stream()
            tails.beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(tails.beside):
                yield


class Expected:
    """What the next `generate` of a model is expected to be."""

    def __init__(self) -> None:
        self._last: Hashable = None
        self._pause = 0

    def launched(self, prefixes: PrefixStore, tails: Tails | None, ids: torch.Tensor, given: Mapping[str, Any]) -> Ahead | None:
        """The tail of a prompt [1, T], if one is expected and there is room for it."""
        if self._pause:
            self._pause -= 1
            return None
        began = prefixes.last_moment
        if self._last is None or self._last != _kind(given) or began is None:
            return None
        if tails is None or tails.why_not or not tails.used:
            return None
        if ids.shape[0] != 1 or ids.device != prefixes.device:
            return None
        rows, end = tokens(ids), ids.shape[1]
        n, entries = prefixes.find(rows, end - 1, began[0])
        # A prompt that goes on over the end of a block leaves states there, and makes a call of each part.
        if n == 0 or n % BLOCK or end - n > BLOCK or not tails.takes(end - n, ids):
            return None
        ahead = Ahead(prefixes, rows, n, entries, began)
        launched = False
        try:
            with contextlib.suppress(torch.OutOfMemoryError):
                launched = ahead.launch(tails, ids)
        finally:
            if not launched:
                ahead.drop()
        return ahead if launched else None

    def note(self, given: Mapping[str, Any], tail: bool, wrong: bool) -> None:
        """Note whether the prompt of a `generate` was a known prefix and a tail, and whether that was expected in vain."""
        self._last, self._pause = _kind(given) if tail else None, PAUSE if wrong else self._pause


def _kind(given: Mapping[str, Any]) -> Hashable:
    """The arguments of a generate, apart from what is in tensors. None if there are others, which may call a model themselves."""
    if not all(isinstance(x, PLAIN) for x in given.values()):
        return None
    return frozenset((name, type(x) if isinstance(x, torch.Tensor) else x) for name, x in given.items())
