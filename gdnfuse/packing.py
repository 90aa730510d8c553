"""Packed weights: the weights of sibling linears as row ranges of one buffer.

The original Parameters become row ranges of the buffer. So memory does not double, and `state_dict`, in-place updates and eager
calls keep working. Each Parameter has its own storage, which is its range of the buffer's memory. So a copy, a file or a message
with one Parameter has only its bytes. A buffer belongs to its Parameters and not to a compiled graph, because Dynamo runs one
graph for all modules of a class. The graph takes the packed weight as an input, and before every call `PackedWeight.current`
finds the buffer of the call's Parameters. Dynamo guards the dtype and shape of a parameter but not its storage. If data pointers
have changed (`param.data = …`, `load_state_dict(assign=True)`, a replaced Parameter), the weights are packed into a new buffer.
"""

from __future__ import annotations

import logging
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gdnfuse import compat
from gdnfuse.errors import Refused

log = logging.getLogger(__name__)

# The packed weight over row ranges at these addresses. An entry is removed when a Parameter gives up the first of its ranges.
# The memory then lives as long as other Parameters need it, and a model that is moved or deleted leaves nothing behind.
_buffers: dict[tuple[Any, ...], torch.Tensor] = {}
_ranges: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()  # storages that are or were a range of a buffer
_packing = threading.RLock()


def check(weights: Sequence[torch.Tensor]) -> None:
    """Check whether these tensors may become row ranges of one buffer.

    Raises:
        Refused: with what was required and what was found.
    """
    for w in weights:
        if compat.is_fake(w) or type(w) in (torch.Tensor, torch.nn.Parameter) and w.is_meta:
            continue
        if type(w) not in (torch.Tensor, torch.nn.Parameter):
            raise Refused(f"Packed weights must be plain tensors, found {type(w).__name__}.")
        if w.is_inference() and not torch.is_inference_mode_enabled():
            raise Refused("Packed weights must be ordinary tensors, found one created under torch.inference_mode.")
        # If another tensor or process uses the same memory, neither would see what is written to the other after packing.
        if w.device.type == "cpu" and w.is_shared():
            raise Refused("Packed weights must be this process's own, found one in shared memory.")
        if (holders := compat.holders(w)) is None:
            raise Refused("How many tensors share the memory of a packed weight must be known, found that torch does not say.")
        if holders > 1:
            raise Refused(f"The memory of a packed weight must be one tensor's, found that {holders} tensors share it.")
    if len({w.is_inference() for w in weights}) > 1:
        raise Refused("Packed weights must all be ordinary or all be made under torch.inference_mode, found both.")
    if len({id(w) for w in weights}) < len(weights):
        raise Refused("Each part of a packed weight must be a weight of its own, found one twice.")


@dataclass(frozen=True)
class Inner:
    """A tensor inside an argument of a call: inside a tensor subclass, or inside a parameter with a state of its own.

    Attributes:
        argument: the position of the argument.
        name: the attribute that holds the tensor, or several separated by dots.
        shape: the shape of the bytes, if the tensor is stored inside another one; else None.
    """

    argument: int
    name: str
    shape: tuple[int, ...] | None = None

    def of(self, argument: torch.Tensor) -> torch.Tensor:
        """The tensor inside an argument."""
        held = operator.attrgetter(self.name)(argument)
        return held if self.shape is None else held.view(torch.uint8).view(self.shape)

    def current(self, args: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor of this call."""
        return self.of(args[self.argument])


def _part(args: Sequence[torch.Tensor], where: int | Inner | torch.Tensor) -> torch.Tensor:
    return args[where] if isinstance(where, int) else where.current(args) if isinstance(where, Inner) else where


@dataclass
class PackedWeight:
    """Where the parts [Mᵢ, N] of one packed weight [ΣMᵢ, N] come from at each call.

    Attributes:
        where: for each part, its position among the arguments of the call, its place inside an argument, or the tensor itself.
    """

    where: tuple[int | Inner | torch.Tensor, ...]
    # The last buffer and the addresses of its parts. One attribute, because several threads may read and write it.
    _last: tuple[Callable[[], torch.Tensor | None], list[int]] = field(default=(lambda: None, []), repr=False)
    _warned: bool = field(default=False, repr=False)

    def current(self, args: Sequence[torch.Tensor]) -> torch.Tensor:
        """The buffer [ΣMᵢ, N] whose row ranges are the parts of this call. The parts are packed if they are not.

        Parts that may not be packed any more (see `check`) are copied at every call, with one warning.
        """
        weights = [_part(args, w) for w in self.where]
        pointers = [w.data_ptr() for w in weights]
        # While the buffer is alive, tensors at its addresses are its row ranges.
        last, known = self._last
        buffer = last()
        if buffer is None or pointers != known:
            try:
                buffer = pack(weights)
            except Refused as e:
                if not self._warned:
                    log.warning("Weights are copied at every call, which is slow. %s", e.reason)
                    self._warned = True
                give_own_memory(weights)
                return torch.cat([w.detach() for w in weights])
            self._last = weakref.ref(buffer), [w.data_ptr() for w in weights]
        return buffer


class PackedWeights:
    """All inputs that a graph takes after its arguments: packed weights, and tensors inside arguments.

    If no part of a packed weight has moved since the last call, one comparison shows it.
    """

    def __init__(self, each: Sequence[PackedWeight | Inner]):
        self.all = tuple(each)
        self.each = tuple(e for e in each if isinstance(e, PackedWeight))
        self.where = [w for packed in self.each for w in packed.where]
        arguments = all(isinstance(w, int) for w in self.where)
        self._parts = taking(self.where) if arguments else lambda args: [_part(args, w) for w in self.where]
        # One attribute, because several threads may read and write it.
        self._last: tuple[list[int], list[Callable[[], torch.Tensor | None]]] = ([], [])

    def current(self, args: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The current tensor of each input."""
        packed = self._packed(args)
        if len(self.each) == len(self.all):
            return packed
        remaining = iter(packed)
        return [next(remaining) if isinstance(e, PackedWeight) else e.current(args) for e in self.all]

    def _packed(self, args: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        known, refs = self._last
        # A step reads a few hundred pointers. torch has a function for all at once, but it takes longer.
        if list(map(torch.Tensor.data_ptr, self._parts(args))) == known:
            alive = [b for ref in refs if (b := ref()) is not None]
            if len(alive) == len(refs):
                return alive
        buffers = [packed.current(args) for packed in self.each]
        # The addresses of parts when each buffer was made. A weight in two buffers has left the first since.
        lasts = [packed._last for packed in self.each]
        if all(ref() is b for (ref, _), b in zip(lasts, buffers, strict=True)):  # none was copied
            self._last = [p for _, known in lasts for p in known], [ref for ref, _ in lasts]
        return buffers


def taking(places: Sequence[int]) -> Callable[[Sequence[Any]], list[Any]]:
    """A function that takes the items at these places out of a sequence, in C if there are several."""
    if len(places) < 2:
        return lambda args: [args[i] for i in places]
    take = operator.itemgetter(*places)
    return lambda args: list(take(args))


def pack(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Make tensors [Mᵢ, N] the row ranges of one buffer [ΣMᵢ, N] and return it. A buffer that they already share is used again.

    The additional memory is that of the buffer, until the last of `weights` has become a range of it. No other thread may compute
    with `weights` meanwhile, as with any assignment to `.data`.

    Raises:
        Refused: as `check` does. Nothing was changed then.
    """
    first, rows = weights[0], [w.shape[0] for w in weights]
    if any(compat.is_fake(w) or w.is_meta for w in weights):
        check(weights)
        return torch.empty((sum(rows), first.shape[1]), dtype=first.dtype, device="meta")
    with _packing, torch.inference_mode(first.is_inference()), torch.no_grad():
        if (buffer := _buffers.get(_places(weights))) is not None:
            return buffer
        buffer = _known(weights)
        if buffer is None:
            check(weights)
            # Everything is copied before the first Parameter changes, because they may be ranges of each other's old buffers.
            buffer = torch.cat([w.detach() for w in weights])
            for w, part in zip(weights, buffer.split(rows), strict=True):
                w.data = _with_own_storage(part, w.stride())
        places = _places(weights)
        _buffers[places] = buffer
        for w in weights:
            weakref.finalize(w.untyped_storage(), _buffers.pop, places, None).atexit = False
    return buffer


def give_own_memory(tensors: Iterable[Any]) -> None:
    """Copy tensors out of a buffer to their own memory, if another Parameter has left the buffer.

    Otherwise such a tensor would keep the memory of all.
    """
    for w in tensors:
        if type(w) is not torch.nn.Parameter or w.is_meta or w.untyped_storage() not in _ranges:
            continue
        with _packing, torch.inference_mode(w.is_inference()), torch.no_grad():
            if compat.holders(w) == 1 and not any(_covers(buffer, w) for buffer in list(_buffers.values())):
                w.data = w.detach().clone()


def _covers(buffer: torch.Tensor, w: torch.Tensor) -> bool:
    return 0 <= w.data_ptr() - buffer.data_ptr() < buffer.nbytes


def _places(weights: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    return tuple((w.data_ptr(), w.shape, w.dtype, w.device) for w in weights)


def _with_own_storage(part: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """A contiguous part of a buffer as a tensor with its own storage, which keeps the buffer's memory alive.

    Its strides are given. Those of a single row or column may have any value, and Dynamo compares them with earlier ones.
    """
    start = part.storage_offset() * part.itemsize
    storage = part.untyped_storage()[start : start + part.nbytes]
    _ranges.add(storage)
    return part.new_empty(0).set_(storage, 0, part.shape, strides)


def _known(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The rows of a buffer that the weights already are, in order; else None."""
    first, end = weights[0], weights[0].data_ptr()
    for w in weights:
        if w.data_ptr() != end or not w.is_contiguous():
            return None
        end += w.nbytes
    for buffer in list(_buffers.values()):  # a finalizer may remove entries at any time
        alike = buffer.dtype == first.dtype and buffer.shape[1:] == first.shape[1:] and buffer.device == first.device
        if alike and _covers(buffer, first) and end <= buffer.data_ptr() + buffer.nbytes:
            offset = buffer.storage_offset() + (first.data_ptr() - buffer.data_ptr()) // buffer.itemsize
            size = (sum(w.shape[0] for w in weights), first.shape[1])
            return buffer.new_empty(0).set_(buffer.untyped_storage(), offset, size, buffer.stride())
    return None
