"""gdnfuse.PrefixStore: prefixes of prompts that were computed before, so that `generate` does not compute them again.

A recurrent state cannot be cut back to an earlier token, as keys and values can. So states are kept where somebody may want to
begin: after every so many tokens, where prompts part, and where a turn ends (vLLM PR 26807; Marconi, arXiv:2411.19379).
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import Counter
from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gdnfuse import compat, versions
from gdnfuse.capture_fp8 import dequantized_calls
from gdnfuse.errors import GdnfuseError
from gdnfuse.generation import prefix_files
from gdnfuse.generation.caches import cache_argument, mark_lengths, rope_that_looks_ahead
from gdnfuse.generation.prefix_tree import BLOCK, TOKEN, Read, Tree
from gdnfuse.generation.rooms import Room, Rooms
from gdnfuse.generation.weights import Weights
from gdnfuse.generation.wrappers import compiled_models, gdn_layers

MiB = 1 << 20
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
KINDS = ("recurrent_states", "conv_states")  # of what an entry keeps of each GDN layer, in this order
AT_ONCE = 16  # blocks that are cut out of a cache together


@dataclass(frozen=True)
class PrefixStats:
    """What a store has done and holds.

    Attributes:
        prompts: looked up, one for each row.
        hits: of these, how many began with a known prefix.
        tokens_taken, tokens_run: of those prompts, taken from the store and computed.
        states: held, each a place where a prompt may go on.
        blocks: of 64 tokens whose keys and values are held.
        device_bytes, host_bytes: held.
        evicted, offloaded: states that went since the store was made, and that went to the host.
        left_out: why calls of generate did not use the store, and how many.
    """

    prompts: int
    hits: int
    tokens_taken: int
    tokens_run: int
    states: int
    blocks: int
    device_bytes: int
    host_bytes: int
    evicted: int
    offloaded: int
    left_out: dict[str, int]


class PrefixStore:
    """Known prefixes of the prompts of one model. `gdnfuse.compile(model, prefixes=store)` has `generate` use it.

    Keys and values are kept once for each block of 64 tokens, in a tree; states at multiples of `every`, where prompts part (at
    the block they part in), at the last whole block of a prompt, and where `generate` ended. What is least recently used goes
    first. Everything is kept by what the model computes with (`gdnfuse.generation.weights` says what is found of changes), so
    that nothing is taken that other weights, adapters or dtypes have left. Threads may share a store.

    Args:
        model: a causal language model of transformers on one device, or what wraps one, as peft's. It is held weakly, and called
            once, with one token.
        every: tokens between two states of a long prompt, a multiple of 64.
        max_bytes: of what is kept on the model's device; never more. With `tails` the memory of the last static cache that was
            filled stays besides, for the next one.
        host_bytes: of what is kept in the host's memory, pinned for a GPU, once the device's is full; 0 for nothing.
        tails: whether up to 64 tokens behind a known prefix, on a static cache on a GPU, are padded and replayed as one CUDA
            graph. Its speed was not measured beside that of other prompts.

    Raises:
        GdnfuseError: any of them is not so, or the model keeps something that cannot be cut at a token, as sliding windows.

    Source:
        SGLang's RadixAttention, Zheng et al. 2023, arXiv:2312.07104; for recurrent states Marconi, arXiv:2411.19379.
    """

    def __init__(
        self, model: torch.nn.Module, every: int = 1024, max_bytes: int = 4 << 30, *, host_bytes: int = 0, tails: bool = False
    ):
        if type(every) is not int or every <= 0 or every % BLOCK:
            raise GdnfuseError(f"every must be a multiple of {BLOCK} tokens, found {every!r}: a chunk of the rule ends there.")
        for name, found in (("max_bytes", max_bytes), ("host_bytes", host_bytes)):
            if type(found) is not int or found < 0:
                raise GdnfuseError(f"{name} must be a number of bytes, found {found!r}.")
        if type(tails) is not bool:
            raise GdnfuseError(f"tails must be True or False, found {tails!r}.")
        models = compiled_models(model)
        if len(models) > 1 or not gdn_layers(models[0]):
            found = f"{len(models)} models" if models[1:] else f"{type(model).__name__} without one"
            raise GdnfuseError(f"A PrefixStore needs one model with Gated DeltaNet layers, found {found}.")
        # A prompt ends a call wherever a state is wanted, but where `gdnfuse.compile` has its graph leave them.
        self.in_pieces = True
        # Of recurrent states, as `gdnfuse.compile` was told: states that were rounded are others.
        self.state_dtype: torch.dtype | None = None
        self.activations: str | None = None  # option of `gdnfuse.compile`: states of quantised activations are others too
        # Whether a tail is launched before transformers prepares its call. Its tests have passed on a GPU, and it was not timed.
        self.ahead = False
        self.every, self.max_bytes, self.host_bytes, self.tails = every, max_bytes, host_bytes, tails
        self._model = weakref.ref(models[0])
        self._layout = _Layout.of(models[0])
        if max_bytes < self._layout.state_bytes:
            raise GdnfuseError(
                f"max_bytes must have room for one state of {type(models[0]).__name__}, {_mib(self._layout.state_bytes)}, "
                f"found {_mib(max_bytes)}."
            )
        pinned = self._layout.device.type == "cuda"
        self._tree = Tree(
            max_bytes,
            host_bytes,
            lambda x: x.to("cpu", copy=True).pin_memory() if pinned else x.to("cpu", copy=True),
            lambda x: x.to(self._layout.device, copy=True),
        )
        # Of caches of fixed length, once `gdnfuse.compile` replays calls on them by CUDA graphs.
        self.rooms = Rooms(self._layout.attention, self._layout.states)
        self._weights = Weights(models[0])
        self.last_moment: tuple[Hashable, int] | None = None  # what `moment` has said last
        self._lock = threading.RLock()
        self._opened: weakref.WeakKeyDictionary[Any, list[bytes]] = weakref.WeakKeyDictionary()
        self._counts: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()

    def __reduce__(self) -> Any:
        raise GdnfuseError("A PrefixStore must stay with its model and process, found a copy or a pickle: save and load it.")

    @property
    def model(self) -> torch.nn.Module:
        """Whose prefixes these are."""
        model = self._model()
        if model is None:
            raise GdnfuseError("A PrefixStore must be used while its model lives, found that the model is gone.")
        return model

    @property
    def state_bytes(self) -> int:
        """Of one state of the model: its recurrent states [HV, K, V] and conv windows [D, W]."""
        return self._layout.state_bytes

    @property
    def block_bytes(self) -> int:
        """Of the keys and values of 64 tokens."""
        return self._layout.token_bytes * BLOCK

    def open(self, ids: torch.Tensor, max_cache_len: int | None = None) -> Any:
        """A new cache that holds the longest known prefix of a prompt, of at most all tokens but one.

        Its `get_seq_length()` is how many tokens it holds. `generate` takes it with the whole prompt; a loop of your own goes on
        with `ids[:, n:]`. Of several rows it holds the longest length that is known of all.

        Args:
            ids: [B, T] token ids without padding.
            max_cache_len: tokens that a static cache holds; None makes a cache that grows.

        Returns:
            The cache, of transformers.

        Raises:
            GdnfuseError: `ids` is something else, or does not fit in the cache.
        """
        rows = self._tokens(ids)
        length = len(rows[0]) // TOKEN
        if max_cache_len is not None and type(max_cache_len) is not int:
            raise GdnfuseError(f"max_cache_len must be None or a number of tokens, found {max_cache_len!r}.")
        if max_cache_len is not None and max_cache_len < length:
            raise GdnfuseError(f"max_cache_len must have room for the prompt of {length} tokens, found {max_cache_len}.")
        cache = self._layout.new_cache(self.model, max_cache_len)
        with self._lock:
            n, entries = self.find(rows, length - 1)
            self.count(len(rows), n, length - n, prompt=True, hit=n > 0)
        self.fill(cache, entries, 0)
        forget_rope_deltas(self.model)
        self._opened[cache] = [row[: n * TOKEN] for row in rows]
        return cache

    def close(self, cache: Any, sequences: Any) -> int:
        """Remember all that a cache has seen: a cache knows keys, not tokens.

        Args:
            cache: after `generate` or a loop of your own on it, without padding.
            sequences: [B, N] token ids of prompts and answers, or what `generate` returned; of these the first that the cache has
                seen count, which are all but the last after `generate`.

        Returns:
            Of how many rows the state is kept now; fewer than there are where the budget has no room.

        Raises:
            GdnfuseError: the cache has seen more tokens than there are, or was opened for others, or is of another kind or size.
        """
        rows = tokens(getattr(sequences, "sequences", sequences))
        if (why := self._layout.unlike(cache)) is not None:
            raise GdnfuseError(f"close needs a cache whose states and keys can be kept, found {why}.")
        n = int(cache.get_seq_length())
        if n == 0 or any(x is None for x in self._layout.states_of(cache)):
            raise GdnfuseError(f"close needs a cache that a model has filled, found one of {n} tokens that lacks states.")
        if n > len(rows[0]) // TOKEN:
            raise GdnfuseError(f"close needs all the tokens that the cache has seen, {n}, found {len(rows[0]) // TOKEN}.")
        if (held := self._layout.rows(cache)) != len(rows):
            raise GdnfuseError(f"close needs a row of tokens for each of the cache's {held}, found {len(rows)}.")
        self._tokens(getattr(sequences, "sequences", sequences)[:, :n])
        self.check_opened(cache, rows)
        return self.keep(self.key(), cache, [row[: n * TOKEN] for row in rows])

    def pin(self, ids: torch.Tensor) -> int:
        """Have the longest known prefix of these tokens stay, whatever else comes.

        Args:
            ids: [1, T] or [B, T], all tokens of them counting.

        Returns:
            How many tokens that is, of the first row.

        Raises:
            GdnfuseError: nothing of them is known, or the device has no room for it.
        """
        return self._pin(ids, 1)

    def unpin(self, ids: torch.Tensor) -> int:
        """Take back one `pin` of the same tokens.

        Args:
            ids: [1, T] or [B, T] token ids, as `pin` took them.

        Returns:
            How many tokens that is, of the first row.

        Raises:
            GdnfuseError: they are not pinned.
        """
        return self._pin(ids, -1)

    def _pin(self, ids: torch.Tensor, more: int) -> int:
        rows, key = self._tokens(ids), self.key()
        with self._lock:
            found = [self._tree.find(key, row, len(row) // TOKEN) for row in rows]
            wanted = [{n: e for n, e in of.items() if more > 0 or e.pins} for of in found]
            if not all(wanted):
                what = "known prefix" if more > 0 else "pinned prefix"
                fix = "generate from them, or close a cache of them, first." if more > 0 else "pin them first."
                raise GdnfuseError(f"The tokens must have a {what}, found none: {fix}")
            entries = list(dict.fromkeys(of[max(of)] for of in wanted))
            for entry in entries:
                if entry.on_host and not self._tree.promote(entry):
                    raise GdnfuseError(f"A pinned prefix must fit on the device, found no room in {_mib(self._tree.max_bytes)}.")
            for entry in entries:
                entry.pins += more
            return entries[0].length

    def _tokens(self, ids: Any) -> list[bytes]:
        """Rows of token ids that the model knows."""
        rows, size = tokens(ids), self.model.config.get_text_config(decoder=True).vocab_size
        if not 0 <= (least := int(ids.min())) <= (most := int(ids.max())) < size:
            found = least if least < 0 else most
            raise GdnfuseError(f"Token ids must be of the model's vocabulary, at least 0 and below {size}, found {found}.")
        return rows

    def stats(self) -> PrefixStats:
        """What the store has done, and what it holds.

        Returns:
            Its counts of tokens and states, and the bytes that they take.
        """
        with self._lock:
            tree, counts = self._tree, self._counts
            return PrefixStats(
                counts["prompts"],
                counts["hits"],
                counts["taken"],
                counts["run"],
                len(tree.entries()),
                sum(1 for _ in tree.nodes()),
                tree.device,
                tree.host,
                tree.evicted,
                tree.offloaded,
                dict(self._left_out),
            )

    def save(self, folder: str | os.PathLike[str]) -> int:
        """Write what is known of the model as it is now to a folder, as safetensors.

        Args:
            folder: made if it is not there; prefixes that are in it are replaced. The old ones stay whole until all is written.

        Returns:
            How many states were saved.

        Raises:
            GdnfuseError: it cannot be written, or the model has forward hooks or runs under autocast, which no folder can tell.
        """
        prefix_files.check_writable(folder)
        owner, key = self._owner(), self.key()
        with self._lock:
            # Held as they are: what goes from the store meanwhile is written all the same.
            entries = [Read(e) for e in self._tree.entries() if e.root == key]
        prefix_files.write(folder, owner, entries)
        return len(entries)

    def load(self, folder: str | os.PathLike[str]) -> int:
        """Take up what was saved of the same model: weights, dtype, adapters and config, torch, transformers and gdnfuse.

        Every file is compared with its digest first, so that nothing is served of one that was cut short or changed. Several
        processes may read one folder.

        Args:
            folder: that `save` has written.

        Returns:
            How many states are known now of those in the folder; fewer than there are where the budget has no room.

        Raises:
            GdnfuseError: the folder is of another model, or is not as it was written. The store is as it was then.
        """
        with prefix_files.reading(folder, self._owner, self._layout.device) as saved, self._lock:
            key = self.key()
            kept = [one.tokens for one in saved if self._tree.keep(key, one.tokens, one)]
            self._synchronize()
            return sum(len(row) // TOKEN in self._tree.find(key, row, len(row) // TOKEN) for row in kept)

    def _owner(self) -> dict[str, str]:
        """Whose prefixes these are, as a folder says it."""
        model = self.model
        if hooks := self._weights.hooks():
            found = f"{len(hooks)} modules with some"
            raise GdnfuseError(f"A model must have no forward hooks when its prefixes are saved or loaded, found {found}.")
        if torch.is_autocast_enabled(self._layout.device.type):
            raise GdnfuseError("Autocast must be off when prefixes are saved or loaded, found it enabled.")
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        known = {name: versions.version(name) or "" for name in ("gdnfuse", "torch", "transformers")}
        states = {} if self.state_dtype is None else {"state_dtype": str(self.state_dtype).removeprefix("torch.")}
        if self.activations:
            states["activations"] = self.activations
        return {"model": type(model).__name__, "dtype": dtype, **states, **known, "weights": self._weights.digest()}

    def clear(self) -> None:
        """Forget every prefix, pinned ones too."""
        with self._lock:
            self._tree.clear()
            self.rooms.clear()

    # For generate()

    def mark(self) -> torch.cuda.Event | None:
        """A place in what the GPU is to do, for `moment`. None without a GPU."""
        if self._layout.device.type != "cuda":
            return None
        with torch.cuda.device(self._layout.device):
            (event := torch.cuda.Event()).record()
        return event

    def key(self, since: torch.cuda.Event | None = None) -> Hashable:
        """By what prefixes are kept now, or, of what is read of weights, at `since`."""
        with self._lock:
            if (device := next(self.model.parameters()).device) != self._layout.device:
                where = f"on {self._layout.device}, where it was, found it on {device}"
                raise GdnfuseError(f"A PrefixStore must be used while its model is {where}: make one anew.")
            return self._weights.key(since), self.state_dtype, self.activations

    def moment(self, since: torch.cuda.Event | None = None) -> tuple[Hashable, int]:
        """By what prefixes are kept now, and how often that was found changed: what was the same all the while has one moment.

        With `since` what the GPU does behind it is not waited for.
        """
        with self._lock:
            self.last_moment = self.key(since), self._weights.changes
            return self.last_moment

    def find(self, rows: Sequence[bytes], most: int, key: Hashable | None = None) -> tuple[int, list[Read]]:
        """The greatest length, of at most `most` tokens, at which there are states of all rows, and these; or 0."""
        key = self.key() if key is None else key
        with self._lock:
            of_row = [self._tree.find(key, row, most) for row in rows]
            n = max(set.intersection(*(set(found) for found in of_row)), default=0)
            entries = [found[n] for found in of_row] if n else []
            # What goes from here on, as for the sake of another row, stays for this reader.
            read = {entry: Read(entry) for entry in entries}
            for entry in read:
                self._tree.touch(entry)
                if entry.on_host and self._tree.promote(entry):
                    read[entry] = Read(entry)
            return n, [read[entry] for entry in entries]

    def boundaries(self, rows: Sequence[bytes], have: int, end: int, key: Hashable, last: bool) -> list[int]:
        """Where a prompt of `end` tokens, `have` of them known, leaves its states; with `last` at its last whole block too.

        Its end may be missing: a prompt stops there anyhow.
        """
        if have % BLOCK == 0 and end - have <= BLOCK:
            return []
        found = set(range(have // self.every * self.every + self.every, end + 1, self.every))
        with self._lock:
            found |= {self._tree.shared(key, row) for row in rows}
        if last:
            found.add((end - 1) // BLOCK * BLOCK)
        return sorted(n for n in found if have < n <= end)

    def fill(self, cache: Any, entries: Sequence[Read], start: int) -> None:
        """Put what `find` found behind the `start` tokens that a cache holds."""
        if entries:
            self._layout.fill(cache, entries, start, self.rooms)
            self._synchronize()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._layout.device

    def lend(self, entry: Read, tokens: int, lengths: Container[int]) -> Any:
        """A room that holds an entry and has room for so many tokens, and layers in it; see `Rooms.lend`."""
        lent = self.rooms.lend(tokens, lengths, *_dtypes(entry), self._layout.device)
        if lent is not None:
            self._layout.fill_room(lent[0], entry)
        return lent

    def take_over(self, entry: Read, cache: Any, room: Room) -> bool:
        """Have a new cache get the room that was lent for an entry; see `Rooms.take_over`."""
        return self.rooms.take_over(cache, room, *_dtypes(entry), self._layout.device)

    def keep(self, key: Hashable, cache: Any, rows: Sequence[bytes], states: list[torch.Tensor] | None = None) -> int:
        """Keep what a cache holds, which has seen these tokens and no others; of how many rows there was room for.

        With `states`, in the order of `passed`, it has seen more, and had these when it had seen these tokens.
        """
        states = self._layout.states_of(cache) if states is None else states
        with self._lock:
            kept = 0
            for i, row in enumerate(rows):
                if rows.index(row) == i:
                    kept += rows.count(row) * self._tree.keep(key, row, _Row(self._layout, cache, i, states))
            self._synchronize()
            return kept

    def passed(self, collected: list[list[torch.Tensor]], n: int) -> list[list[torch.Tensor]] | None:
        """The states [B, …] at each of `n` places that a prompt has passed, as its graphs left them; None if they left others."""
        left = [x for of_graph in collected for x in of_graph]
        shapes = [shape for *_, shape in self._layout.states]
        if any(x.shape[1] < n for x in left) or [tuple(x.shape[2:]) for x in left] != shapes:
            return None
        return [[x[:, i] for x in left] for i in range(n)]

    def count(self, rows: int, taken: int, run: int, *, prompt: bool, hit: bool) -> None:
        """Count the tokens of each row that were taken and that were computed.

        With `prompt` these are new prompts, with `hit` ones of which nothing had been taken until now."""
        with self._lock:
            self._counts.update(prompts=rows * prompt, hits=rows * hit, taken=rows * taken, run=rows * run)

    def leave_out(self, why: str) -> bool:
        """Note why a generate does not use the store; whether that is the first time."""
        with self._lock:
            self._left_out[why] += 1
            return self._left_out[why] == 1

    def check_opened(self, cache: Any, rows: Sequence[bytes]) -> None:
        """Raises GdnfuseError for a cache that `open` has filled with other tokens than these begin with."""
        opened = self._opened.get(cache)
        if opened is not None and int(cache.get_seq_length()) < len(opened[0]) // TOKEN:
            del self._opened[cache]  # it was reset
            return
        if opened is not None and not (
            len(opened) == len(rows) and all(row.startswith(known) for row, known in zip(rows, opened, strict=True))
        ):
            raise GdnfuseError(
                f"A cache must go on with the prompt that it was opened for, found one that does not begin with the "
                f"{len(opened[0]) // TOKEN} tokens that it has seen: open one for this prompt."
            )

    def went_on(self, cache: Any, sequences: Any) -> None:
        """Note that a cache which `open` has filled has now seen the first of these tokens [B, N], as many as it holds."""
        if cache in self._opened and isinstance(sequences, torch.Tensor):
            n, rows = int(cache.get_seq_length()), tokens(sequences)
            if n <= sequences.shape[1] and len(rows) == len(self._opened[cache]):
                self._opened[cache] = [row[: n * TOKEN] for row in rows]

    def unlike(self, cache: Any) -> str | None:
        """What of a cache cannot be kept or filled, or None."""
        return self._layout.unlike(cache)

    def _synchronize(self) -> None:
        """Others may read and free on the stream that all have; whoever is on one of their own waits for it."""
        if self._layout.device.type == "cuda":
            stream = torch.cuda.current_stream(self._layout.device)
            if stream != torch.cuda.default_stream(self._layout.device):
                stream.synchronize()


@dataclass(frozen=True)
class _Layout:
    """How the caches of a model are cut into tensors.

    Attributes:
        attention: of each layer with keys and values its place in the cache, heads, and columns of keys and of values.
        states: of each state its layer's place, "recurrent_states" or "conv_states", its index there, and its shape without rows.
        token_bytes: of keys and values of one token.
        state_bytes: of all states of one row, with recurrent states as the model makes them.
    """

    attention: tuple[tuple[int, int, int, int], ...]
    states: tuple[tuple[int, str, int, tuple[int, ...]], ...]
    token_bytes: int
    state_bytes: int
    device: torch.device

    @classmethod
    def of(cls, model: torch.nn.Module) -> _Layout:
        """Read off a cache that has seen one token."""
        devices = {p.device for p in model.parameters()}
        if len(devices) > 1 or next(iter(devices)).type == "meta":
            found = " and ".join(sorted(map(str, devices)))
            raise GdnfuseError(f"A PrefixStore needs a model whose weights are on one device, found {found}.")
        if (rope := rope_that_looks_ahead(model)) is not None:
            raise GdnfuseError(
                f"A PrefixStore needs a rotary embedding that is the same at all lengths, found rope_type {rope!r}, with which "
                "the keys of a prefix depend on what follows it."
            )
        name, cache = type(model).__name__, cls.new_cache(model, None)
        if (why := _unlike(cache)) is not None:
            raise GdnfuseError(
                f"A PrefixStore needs a model that keeps full attention's keys and GDN states, found {why} in {name}: "
                "compile it without prefixes."
            )
        with torch.no_grad(), dequantized_calls(model):
            token = torch.zeros(1, 1, dtype=torch.long, device=next(iter(devices)))
            compat.call_of(model)(input_ids=token, use_cache=True, **cache_argument(model, cache))
        attention = [(i, *_heads(layer)) for i, layer in enumerate(cache.layers) if not _linear(layer)]
        states = [
            (i, kind, j, tuple(x.shape[1:]))
            for i, layer in enumerate(cache.layers)
            if _linear(layer)
            for kind in KINDS
            for j, x in getattr(layer, kind).items()
            if x is not None
        ]
        held = [x for i, *_ in attention for x in (cache.layers[i].keys, cache.layers[i].values)]
        if not attention or not states or len({x.dtype for x in held}) > 1:
            found = (
                f"{len(attention)} layers of attention, {len(states)} states and keys of {len({x.dtype for x in held})} dtypes"
            )
            raise GdnfuseError(f"A PrefixStore needs layers of attention with keys of one dtype and GDN layers, found {found}.")
        state_bytes = sum(getattr(cache.layers[i], kind)[j].nbytes for i, kind, j, _ in states)
        return cls(tuple(attention), tuple(states), sum(x.nbytes for x in held), state_bytes, next(iter(devices)))

    @staticmethod
    def new_cache(model: torch.nn.Module, max_cache_len: int | None) -> Any:
        from transformers import DynamicCache, StaticCache

        config = model.config.get_text_config(decoder=True)
        return DynamicCache(config=config) if max_cache_len is None else StaticCache(config=config, max_cache_len=max_cache_len)

    def unlike(self, cache: Any) -> str | None:
        """What of a cache is not as this model's are, or None."""
        if (why := _unlike(cache)) is not None:
            return why
        layers = cache.layers
        linear = {i for i, *_ in self.states}
        if len(layers) != len(linear) + len(self.attention) or any(_linear(x) != (i in linear) for i, x in enumerate(layers)):
            return f"{len(layers)} layers of other kinds than the model's"
        if any(layers[i].is_initialized and _heads(layers[i]) != tuple(heads) for i, *heads in self.attention):
            return "keys and values of other heads than the model's"
        states = [(x, shape) for x, (*_, shape) in zip(self.states_of(cache), self.states, strict=True) if x is not None]
        if any(tuple(x.shape[1:]) != shape for x, shape in states):
            return "states of other sizes than the model's"
        devices = {x.device for x in (*(x for x, _ in states), *self.held(cache)) if x is not None} - {self.device}
        if devices:
            return f"tensors on {' and '.join(sorted(map(str, devices)))}, where the model's are on {self.device}"
        return None

    def rows(self, cache: Any) -> int:
        return cache.layers[self.attention[0][0]].keys.shape[0]

    def held(self, cache: Any) -> list[torch.Tensor]:
        """Keys and values [B, HKV, L, D] of all layers with attention."""
        return [x for i, *_ in self.attention for x in (cache.layers[i].keys, cache.layers[i].values)]

    def states_of(self, cache: Any) -> list[torch.Tensor]:
        return [getattr(cache.layers[i], kind)[j] for i, kind, j, _ in self.states]

    def fill(self, cache: Any, entries: Sequence[Read], start: int, rooms: Rooms) -> None:
        """Keys and values behind the first `start` tokens, and the states in place of those that are there."""
        if len(entries) == 1 and start == 0:
            (entry,) = entries
            room = rooms.enter(cache, *_dtypes(entry), self.device)
            if room is not None:
                self.fill_room(room, entry)
                return
        # Few launches, and nothing is zeroed that is written next: what a prompt takes is waited for before its first token.
        to, of = [], []
        keys, n = {id(e): self._keys(e, start) for e in entries}, entries[0].length
        for place, (i, heads, *columns) in enumerate(self.attention):
            shapes = [(len(entries), heads, n, c) for c in columns]
            for j, held in enumerate(self._room(cache.layers[i], shapes, keys[id(entries[0])][0][0].dtype, start)):
                for row, e in enumerate(entries):
                    at = start
                    for x in keys[id(e)][2 * place + j]:
                        length = x.shape[1:-1].numel()
                        to.append(held[row, :, at : at + length].view(x.shape))
                        at += length
                    of += keys[id(e)][2 * place + j]
        states = {id(e): self._states(e) for e in entries}
        for place, (i, kind, j, shape) in enumerate(self.states):
            layer, x = cache.layers[i], [states[id(e)][place] for e in entries]
            held = getattr(layer, kind)
            if held[j] is None:
                layer.lazy_initialization(**{kind: x[0].new_empty(0, *shape)}, state_idx=j)
                held[j] = x[0].new_empty(len(x), *shape)
                compat.mark_static_address(held[j])
            layer.has_previous_state[j] = True
            to += held[j].unbind()  # which an iteration calls too, after much else
            of += x
        compat.copy_all(to, of)
        for i, *_ in self.attention:
            if not cache.layers[i].is_compileable:
                mark_lengths(cache.layers[i])

    def fill_room(self, room: Room, entry: Read) -> None:
        """What an entry holds, into the tensors of all layers."""
        *layers, L, columns = room.keys.shape
        heads, whole, n = math.prod(layers), len(entry.blocks) * BLOCK, entry.length
        keys = room.keys.view(heads, L * columns)
        if entry.blocks:
            # To ask for the device takes less than to call `to`: there is a block for each 64 tokens.
            blocks = [x if x.device == self.device else x.to(self.device) for x in entry.blocks]
            torch.cat(blocks, 1, out=keys[:, : whole * columns])
        if entry.rest is not None:
            keys[:, whole * columns : n * columns] = entry.rest.to(self.device).view(heads, -1)
        keys[:, n * columns :] = 0
        room.lengths.fill_(n)
        for kind, x in zip(KINDS, entry.states, strict=True):
            room.states[kind].view(-1).copy_(x)

    def _room(self, layer: Any, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, start: int) -> list[torch.Tensor]:
        """Keys and values of a layer, with the first `start` tokens of theirs and room for as many as these shapes have."""
        like = torch.empty(0, dtype=dtype, device=self.device)
        if layer.is_compileable:
            if not layer.is_initialized:  # its length need not come from the host then
                layer.cumulative_length = torch.zeros((), dtype=layer.cumulative_length.dtype, device=self.device)
                layer.lazy_initialization(*(like.new_empty(B, heads, 0, c) for B, heads, _, c in shapes))
            layer.cumulative_length.fill_(shapes[0][2])
            return [layer.keys, layer.values]
        if not layer.is_initialized:
            layer.lazy_initialization(like, like)
        made = [like.new_empty(shape) for shape in shapes]
        for new, old in zip(made, (layer.keys, layer.values), strict=True):
            if start:
                new[:, :, :start] = old
        layer.keys, layer.values = made
        return made

    def _keys(self, entry: Read, start: int) -> list[list[torch.Tensor]]:
        """Keys and values of all layers behind the first `start` tokens, in parts [HKV, tokens, D] or [HKV, n, tokens, D]."""
        widths = [heads * c for _, heads, *columns in self.attention for c in columns]
        sizes = [(heads, c) for _, heads, *columns in self.attention for c in columns]
        first = start // BLOCK
        blocks, parts = entry.blocks[first:], [[] for _ in widths]
        if blocks:
            table = torch.stack([x.to(self.device) for x in blocks]).flatten(1)
            skipped = start - first * BLOCK
            for part, x, (heads, c) in zip(parts, table.split([w * BLOCK for w in widths], 1), sizes, strict=True):
                x = x.view(len(blocks), heads, BLOCK, c).transpose(0, 1)
                part.append(x.reshape(heads, -1, c)[:, skipped:] if skipped else x)
        if entry.rest is not None:
            r = entry.length % BLOCK
            for part, x, (heads, c) in zip(parts, entry.rest.to(self.device).split([w * r for w in widths]), sizes, strict=True):
                part.append(x.view(heads, r, c)[:, 0 if blocks else start - first * BLOCK :])
        return parts

    def _states(self, entry: Read) -> list[torch.Tensor]:
        sizes = {kind: [] for kind in KINDS}
        for _, kind, _, shape in self.states:
            sizes[kind].append(math.prod(shape))
        parts = {kind: iter(x.to(self.device).split(of)) for (kind, of), x in zip(sizes.items(), entry.states, strict=True)}
        return [next(parts[kind]).view(shape) for _, kind, _, shape in self.states]


class _Row:
    """One row of a cache, as `prefix_tree.Source`."""

    @torch.no_grad()  # without the graph that made them, which would be held as long
    def __init__(self, layout: _Layout, cache: Any, row: int, states: Sequence[torch.Tensor]):
        self._held = [x[row] for x in layout.held(cache)]
        self._states = {kind: [] for kind in KINDS}
        for (_, kind, _, _), x in zip(layout.states, states, strict=True):
            self._states[kind].append(x[row])
        self.token_bytes = sum(x.nbytes // x.shape[1] for x in self._held)
        self.state_bytes = sum(x.nbytes for of in self._states.values() for x in of)

    def blocks(self, first: int, last: int) -> list[torch.Tensor]:
        found = []
        for a in range(first, last, AT_ONCE):
            n = min(AT_ONCE, last - a)
            table = _joined([x[:, a * BLOCK : (a + n) * BLOCK].unflatten(1, (n, BLOCK)).transpose(0, 1) for x in self._held])
            found += [block.clone() for block in table] if n > 1 else [table[0]]
        return found

    def rest(self, first: int, last: int) -> torch.Tensor:
        return _joined([x[None, :, first:last] for x in self._held]).flatten()

    def states(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.cat([x.reshape(-1) for x in of]) for of in self._states.values())


def _dtypes(entry: Read) -> tuple[torch.dtype, dict[str, torch.dtype]]:
    """The dtype of the keys and values of an entry, and those of its states by kind."""
    return [entry.rest, *entry.blocks][-1].dtype, {kind: x.dtype for kind, x in zip(KINDS, entry.states, strict=True)}


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts [n, HKV, tokens, D] of all layers side by side.

    If all have as many columns D, that is one launch and gives [n, all HKV, tokens · D], as a room is filled. Else [n, …].
    """
    if len({x.shape[-1] for x in parts}) > 1:
        return torch.cat([x.flatten(1) for x in parts], 1)
    return torch.cat(parts, 1).flatten(2)


def forget_rope_deltas(model: torch.nn.Module) -> None:
    """A model that has seen pictures moves the positions of what follows on a filled cache; what a store fills has text alone."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


def tokens(ids: Any) -> list[bytes]:
    """Rows of token ids [B, T] as bytes."""
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or 0 in ids.shape or ids.dtype not in INTEGERS or _without_data(ids):
        found = f"{ids.dtype} of the shape {list(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        if isinstance(ids, torch.Tensor) and _without_data(ids):
            found += f", {ids.layout} on {ids.device}"
        raise GdnfuseError(f"A PrefixStore needs token ids [rows, tokens], integers, found {found}.")
    return [row.tobytes() for row in ids.to("cpu", torch.int64).contiguous().numpy()]


def _without_data(x: torch.Tensor) -> bool:
    return x.is_meta or x.layout is not torch.strided


def _linear(layer: Any) -> bool:
    return hasattr(layer, "recurrent_states")


def _heads(layer: Any) -> tuple[int, int, int]:
    return layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]


def _unlike(cache: Any) -> str | None:
    """What of a cache is none of transformers' plain layers, which are cut and filled by what they hold."""
    from transformers import cache_utils

    from gdnfuse.generation import rollback

    plain = (cache_utils.DynamicLayer, cache_utils.StaticLayer, cache_utils.LinearAttentionLayer, *rollback.LAYERS)
    for layer in getattr(cache, "layers", [None]):
        if type(layer) not in plain:
            return f"a {type(cache if layer is None else layer).__name__}"
        if getattr(layer, "record_past", False):
            return "a cache that records the past"
    if getattr(cache, "offloading", False):
        return "a cache that is offloaded"
    return None


def _mib(n: int) -> str:
    return f"{n / MiB:.1f} MiB" if n >= MiB else f"{n} bytes"
