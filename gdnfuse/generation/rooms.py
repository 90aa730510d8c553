"""Rooms: the memory of a cache of fixed length, which the next cache gets when nobody holds it any more.

A CUDA graph has the addresses that it was recorded with. `generate` makes a cache for each call, and one at other addresses lets
each graph be recorded anew, which takes longer than a short prompt. A room also knows how its layers look when they are filled,
and has the tensors of all layers beside each other. So a cache is filled in a few launches.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections.abc import Container, Sequence
from typing import Any

import torch

from gdnfuse import compat

ALIGNED = 16  # bytes. CUDA graphs copy what begins elsewhere.


class Room:
    """Tensors for the layers of one cache of one sequence.

    Args:
        layers: of a cache that has seen nothing. They get the tensors, which are not written.
        keys: of each layer with keys and values its place, heads, and columns of keys and of values.
        states: of each state its layer's place, "recurrent_states" or "conv_states", its index there, its shape and its dtype.
        dtype: of keys and values.
        length: tokens that the cache holds.

    Attributes:
        keys: keys and values of all layers [layers, 2, HKV, L, D].
        states: all states of a kind [layers, …], by kind.
        lengths: how many tokens each layer has seen, in the first column; each has a row, so that its address is aligned.
        length: tokens that it holds.
        caches: how many caches had it.
        cache: the last of them, as a weak reference.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        keys: Sequence[tuple[int, int, int, int]],
        states: Sequence[tuple[int, str, int, tuple[int, ...], torch.dtype]],
        dtype: torch.dtype,
        length: int,
        device: torch.device,
    ):
        self._make(layers, keys, states, dtype, length, device)
        self.length, self._kinds = length, [type(layer) for layer in layers]
        self._looks = [_copied(vars(layer)) for layer in layers]
        self._parts = [x for look in self._looks for x in _tensors(look)]
        # What holds each tensor besides the cache.
        self._alone = [n - 1 for n in self._held()]
        self.caches, self.cache = 0, lambda: None

    def _make(self, layers: Any, keys: Any, states: Any, dtype: torch.dtype, length: int, device: torch.device) -> None:
        _, heads, columns, _ = keys[0]
        like = torch.empty(0, dtype=dtype, device=device)
        self.keys = like.new_empty(len(keys), 2, heads, length, columns)
        self.lengths = torch.zeros(len(keys), ALIGNED, dtype=layers[keys[0][0]].cumulative_length.dtype, device=device)
        self.states = {}
        for place, (i, *_) in enumerate(keys):
            layer = layers[i]
            layer.lazy_initialization(*2 * [like.new_empty(0, heads, 0, columns)])
            layer.batch_size = 1
            layer.keys, layer.values = (apart(self.keys[place, j][None]) for j in range(2))
            layer.cumulative_length = apart(self.lengths[place, 0])
            for x in (layer.keys, layer.values, layer.cumulative_length):
                compat.mark_static_address(x)
        for kind in dict.fromkeys(kind for _, kind, *_ in states):
            of_kind = [of for of in states if of[1] == kind]
            *_, shape, state_dtype = of_kind[0]
            self.states[kind] = torch.empty(len(of_kind), *shape, dtype=state_dtype, device=device)
            for place, (i, _, j, *_) in enumerate(of_kind):
                part = apart(self.states[kind][place][None])
                layers[i].lazy_initialization(**{kind: part[:0]}, state_idx=j)
                getattr(layers[i], kind)[j] = part
                layers[i].has_previous_state[j] = True
                compat.mark_static_address(part)

    def is_free(self) -> bool:
        """Whether no cache has these tensors, and nobody else reads their memory."""
        return self._held() == self._alone

    def enter(self, layers: Sequence[Any]) -> None:
        """Have the layers of a cache that has seen nothing hold these tensors."""
        for layer, look in zip(layers, self._looks, strict=True):
            vars(layer).update(_copied(look))

    def layers(self) -> list[Any]:
        """Layers of no cache that hold these tensors."""
        made = [kind.__new__(kind) for kind in self._kinds]
        self.enter(made)
        return made

    def _held(self) -> list[int]:
        return [sys.getrefcount(x) + n for x, n in zip(self._parts, compat.storage_holders(self._parts), strict=True)]


class Rooms:
    """The last room of the caches of a model.

    Args:
        keys, states: as of `Room`, but the states without dtypes.

    Attributes:
        used: whether caches get rooms. Without CUDA graphs little would be gained.
    """

    def __init__(self, keys: Sequence[tuple[int, int, int, int]], states: Sequence[tuple[int, str, int, tuple[int, ...]]]):
        self._keys, self._states, self.used = keys, states, False
        alike = len({tuple(of) for _, *of in keys}) == 1 and keys[0][2] == keys[0][3]
        self._alike = alike and len({(kind, j, shape) for _, kind, j, shape in states}) == 2
        self._lock = threading.Lock()
        self._room: tuple[Any, Room] | None = None

    def enter(self, cache: Any, dtype: torch.dtype, states: dict[str, torch.dtype], device: torch.device) -> Room | None:
        """The room that a cache of one sequence has from now on; None if it is none of fixed length that has seen nothing.

        Args:
            cache: of transformers.
            dtype: of its keys and values.
            states: the dtypes of its states, by kind.
            device: where it is.
        """
        key = self._key(cache, dtype, states, device)
        if key is None:
            return None
        with self._lock:
            if self._room is not None and self._room[0] == key and self._room[1].is_free():
                self._room[1].enter(cache.layers)
            else:
                self._room = None  # before there is a second one
                of_states = [(*of, states[of[1]]) for of in self._states]
                self._room = key, Room(cache.layers, self._keys, of_states, dtype, key[0], device)
            return self._has_entered(cache)

    def lend(self, tokens: int, lengths: Container[int], dtype: torch.dtype, states: Any, device: torch.device) -> Any:
        """The room and layers that hold its tensors, for a cache that there is not yet. None if there is none that is free.

        Args:
            tokens: that must have room.
            lengths: that it may have.
            dtype, states, device: as of `enter`.
        """
        with self._lock:
            if self._room is None:
                return None
            (length, *of), room = self._room
            fits = tokens <= length and length in lengths and of == [dtype, states, device, _stream(device)]
            return (room, room.layers()) if fits and room.is_free() else None

    def take_over(self, cache: Any, room: Room, dtype: torch.dtype, states: Any, device: torch.device) -> bool:
        """Have a cache get a room that was lent, if it is one that `enter` would give this room."""
        key = self._key(cache, dtype, states, device)
        with self._lock:
            if key is None or self._room is None or self._room[0] != key or self._room[1] is not room:
                return False
            room.enter(cache.layers)
            self._has_entered(cache)
            return True

    def _has_entered(self, cache: Any) -> Room:
        room = self._room[1]
        room.caches, room.cache = room.caches + 1, weakref.ref(cache)
        return room

    def _key(
        self, cache: Any, dtype: torch.dtype, states: dict[str, torch.dtype], device: torch.device
    ) -> tuple[Any, ...] | None:
        """What rooms of caches like this one have in common. None if it has none."""
        from transformers.cache_utils import StaticLayer

        layers = cache.layers
        of_keys = [layers[i] for i, *_ in self._keys]
        empty = all(getattr(layers[i], kind)[j] is None for i, kind, j, _ in self._states)
        if not (self.used and self._alike and empty) or any(x.is_initialized or type(x) is not StaticLayer for x in of_keys):
            return None
        length = of_keys[0].max_cache_len
        sizes = {math.prod(shape) * states[kind].itemsize for _, kind, _, shape in self._states}
        if any(n % ALIGNED for n in (math.prod(self._keys[0][1:3]) * length * dtype.itemsize, *sizes)):
            return None
        return length, dtype, states, device, _stream(device)

    def came_back(self, cache: Any) -> bool:
        """Whether a cache has the memory of one before it, so that CUDA graphs of calls on it are worth recording."""
        with self._lock:
            return not self.used or self._room is not None and self._room[1].cache() is cache and self._room[1].caches > 1

    def clear(self) -> None:
        """Hold no memory."""
        with self._lock:
            self._room = None


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def apart(part: torch.Tensor) -> torch.Tensor:
    """The same memory as a separate storage. torch.compile treats written parts of one storage as views of one tensor."""
    start = part.storage_offset() * part.itemsize
    storage = part.untyped_storage()[start : start + part.nbytes]
    return part.new_empty(0).set_(storage, 0, part.shape, part.stride())


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: dict(x) if isinstance(x, dict) else x for name, x in attributes.items()}


def _tensors(attributes: dict[str, Any]) -> list[torch.Tensor]:
    held = [y for x in attributes.values() for y in (x.values() if isinstance(x, dict) else (x,))]
    return [x for x in held if isinstance(x, torch.Tensor)]
