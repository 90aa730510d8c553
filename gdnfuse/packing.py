"""Packed weights: the weights of sibling linears as row ranges of one buffer.

The original Parameters become views of the buffer, so memory does not double and `state_dict`, in-place updates and eager calls
keep working. Dynamo guards a parameter's dtype and shape but not its storage: before every call `PackedWeight.ensure` compares
data pointers, and where one moved (`param.data = …`, `load_state_dict(assign=True)`, a replaced Parameter) copies the new values
into the same buffer, whose address never changes (CUDA graphs hold it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensor

from gdnfuse.report import Refused


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
    """One buffer [ΣMᵢ, N] and the Parameters [Mᵢ, N] that are views of its rows.

    Attributes:
        buffer: the packed weight.
        where: for each part, its position among the call's arguments, or the tensor itself if it is not an argument.
        views: the buffer's row ranges.
    """

    buffer: torch.Tensor
    where: list[int | torch.Tensor]
    views: list[torch.Tensor]
    _pointers: list[int] = field(default_factory=list)

    def ensure(self, args: Sequence[torch.Tensor]) -> None:
        """Make every part a view of the buffer again where it is not; call before each use."""
        for source, view, pointer in zip(self.where, self.views, self._pointers, strict=True):
            weight = args[source] if isinstance(source, int) else source
            if weight.data_ptr() != pointer:
                _adopt(weight, view)


def pack(weights: Sequence[torch.Tensor], where: Sequence[int | torch.Tensor]) -> PackedWeight:
    """Pack weights, or reuse the buffer they already are row ranges of (another graph packed them).

    Peak extra memory: the buffer, until the last of `weights` has become a view of it.
    """
    first = weights[0]
    rows = [w.shape[0] for w in weights]
    if any(isinstance(w, FakeTensor) or w.is_meta for w in weights):
        buffer = torch.empty((sum(rows), first.shape[1]), dtype=first.dtype, device=first.device)
        return PackedWeight(buffer, [], [])
    with torch.no_grad():
        buffer = _adjacent(weights, rows)
        views: list[torch.Tensor]
        if buffer is None:
            buffer = torch.empty((sum(rows), first.shape[1]), dtype=first.dtype, device=first.device)
            views = list(buffer.split(rows))
            for w, view in zip(weights, views, strict=True):
                _adopt(w, view)
        else:
            views = list(buffer.split(rows))
    return PackedWeight(buffer, list(where), views, [v.data_ptr() for v in views])


def _adopt(weight: torch.Tensor, view: torch.Tensor) -> None:
    with torch.no_grad():
        view.copy_(weight.detach())
        weight.data = view


def _adjacent(weights: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor | None:
    """The tensor whose row ranges the weights are, in order, if their storage is one; else None."""
    first = weights[0]
    storage, width = first.untyped_storage().data_ptr(), first.shape[1]
    offset = first.storage_offset()
    for w, r in zip(weights, rows, strict=True):
        if w.untyped_storage().data_ptr() != storage or w.storage_offset() != offset or not w.is_contiguous():
            return None
        offset += r * width
    return torch.as_strided(first.detach(), (sum(rows), width), (width, 1), first.storage_offset())
