"""Packed weights: the weights of sibling linears as row ranges of one buffer.

The original Parameters become views of the buffer, so memory does not double and `state_dict`, in-place updates and eager calls
keep working. A buffer belongs to its Parameters, not to a compiled graph: Dynamo runs one graph for all modules of a class, so
the graph takes the packed weight as an input, and before every call `PackedWeight.current` finds the buffer of the Parameters
it is given. Dynamo guards a parameter's dtype and shape but not its storage; where data pointers are no longer those of the
buffer (`param.data = …`, `load_state_dict(assign=True)`, a replaced Parameter), the weights are packed into a new one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from gdnfuse.report import Refused

# The packed weight of each group, by its first Parameter: the buffer, and the data pointers of all its row ranges. Weak: the
# buffer goes when the Parameters do.
_buffers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check(weights: Sequence[torch.Tensor]) -> None:
    """Whether these tensors may become views of one buffer.

    Raises:
        Refused: with what was required and what was found.
    """
    for w in weights:
        if isinstance(w, FakeTensor):
            continue
        if type(w) not in (torch.Tensor, torch.nn.Parameter):
            raise Refused(f"Packed weights must be plain tensors, found {type(w).__name__}.")
        if w.is_inference() and not torch.is_inference_mode_enabled():
            raise Refused("Packed weights must be ordinary tensors, found one created under torch.inference_mode.")


@dataclass
class PackedWeight:
    """Where the parts [Mᵢ, N] of one packed weight [ΣMᵢ, N] come from at each call.

    Attributes:
        where: for each part its position among the call's arguments, or the tensor itself if it is not an argument.
    """

    where: tuple[int | torch.Tensor, ...]
    _last: Callable[[], torch.Tensor | None] = field(default=lambda: None, repr=False)
    _pointers: list[int] = field(default_factory=list, repr=False)

    def current(self, args: Sequence[torch.Tensor]) -> torch.Tensor:
        """The buffer [ΣMᵢ, N] that the parts of this call are row ranges of; packs them if they are not."""
        weights = [args[w] if isinstance(w, int) else w for w in self.where]
        pointers = [w.data_ptr() for w in weights]
        # While the buffer lives, tensors at its addresses are its row ranges. It lives as long as its first Parameter does.
        buffer = self._last()
        if buffer is None or pointers != self._pointers:
            found, known = _buffers.get(weights[0], (None, None))
            buffer = found if known == pointers else pack(weights)
            self._last, self._pointers = weakref.ref(buffer), [w.data_ptr() for w in weights]
        return buffer


def pack(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Make tensors [Mᵢ, N] the row ranges of one buffer [ΣMᵢ, N] and return it; one that they already share is used again.

    Peak extra memory: the buffer, until the last of `weights` has become a view of it.

    Raises:
        Refused: as `check` does; nothing was changed then.
    """
    check(weights)
    first, rows = weights[0], [w.shape[0] for w in weights]
    if any(isinstance(w, FakeTensor) or w.is_meta for w in weights):
        return torch.empty((sum(rows), first.shape[1]), dtype=first.dtype, device="meta")
    with torch.no_grad():
        buffer = _adjacent(weights, rows)
        if buffer is None:
            # All is copied before the first Parameter changes: they may be views of each other's old buffers.
            buffer = torch.cat([w.detach() for w in weights])
            for w, view in zip(weights, buffer.split(rows), strict=True):
                w.data = view
    _buffers[first] = (buffer, [w.data_ptr() for w in weights])
    return buffer


def _adjacent(weights: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor | None:
    """The tensor whose row ranges the weights are, in order, if their storage is one; else None."""
    first = weights[0]
    storage, width = first.untyped_storage().data_ptr(), first.shape[1]
    offset = first.storage_offset()
    for w, r in zip(weights, rows, strict=True):
        if w.untyped_storage().data_ptr() != storage or w.storage_offset() != offset or not w.is_contiguous():
            return None
        offset += r * width
    # No view of a Parameter: a compiler would take the Parameter's base into account.
    whole = torch.empty(0, dtype=first.dtype, device=first.device)
    return whole.set_(first.untyped_storage(), first.storage_offset(), (sum(rows), width), (width, 1))
