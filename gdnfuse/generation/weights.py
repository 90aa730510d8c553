"""What a model computes with: a digest of its weights, adapters and config, and whether it is still the same."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from gdnfuse import compat
from gdnfuse.generation.hooks import hooks_now

SAMPLED, TOGETHER = 32, 8  # weights of which a few numbers are compared at each call, and how many numbers
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
COLUMNS = 1024
OF_A_FOLDER = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}  # not of what is computed


class Weights:
    """Answers at each call by what a model's results may be kept.

    What is found: a tensor of the model at another place or with another version counter, as loading, moving, training and every
    in-place change through torch leave it; another module, buffer or hook; another adapter, its scaling, whether it is merged;
    and by samples, eight numbers of 32 weights, what was written past torch's counter, as by `weight.data.copy_`. Where any of
    that differs, all weights are read and digested anew, so that weights that only moved are still the same ones. What is not
    found is a write past the counter that leaves the samples as they were.

    Args:
        model: held weakly. No tensor of it is held.

    Attributes:
        changes: how often something of that was found. What was put back as it was has the same digest, and has changed twice.
    """

    def __init__(self, model: torch.nn.Module):
        self._model = weakref.ref(model)
        self._seen: list[Any] | None = None
        self._digest = ""
        self.changes = 0
        self._looked, self._hooked = -1, weakref.WeakSet()
        self._samples: list[tuple[weakref.ref[torch.nn.Module], str]] = []

    def digest(self) -> str:
        """Of weights, buffers, adapters and config, the same in every process; hooks take no part."""
        model = self._model()
        modules, tensors = compat.everything_of(model)
        tensors = [plain for x in tensors for plain in _plain(x)]
        adapters = _adapters(modules)
        seen = [list(map(id, modules)), [x.data_ptr() for x in tensors], compat.version_counters(tensors), adapters]
        if self._seen is None or seen != self._seen[:-1]:
            self._samples = _to_sample(modules)
            self._seen = None
        seen.append(self._sampled())
        if seen != self._seen:
            self._seen, self._digest = seen, _digest(model, adapters)
            self.changes += 1
        return self._digest

    def hooks(self) -> list[tuple[Any, ...]]:
        """Forward hooks that are registered now, by the numbers of their handles, but those of transformers that only capture."""
        if self._looked != RemovableHandle.next_id:  # which counts all that are registered anywhere
            self._looked = RemovableHandle.next_id
            self._hooked = weakref.WeakSet(m for m in self._model().modules() if hooks_now([m]))
        return hooks_now(self._hooked)

    def key(self) -> Hashable:
        """By what results of this process may be kept: the digest, forward hooks, and what autocast does."""
        kind = next(self._model().parameters()).device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return self.digest(), tuple(sorted(map(str, self.hooks()))), autocast

    def _sampled(self) -> list[int]:
        parts = []
        for module, name in self._samples:
            for p in _plain(getattr(module(), name)):
                middle = p.detach().view(-1)[p.numel() // 2 - TOGETHER // 2 :][:TOGETHER]
                parts.append(middle.view(INTEGERS[middle.element_size()]))
        return torch.cat(parts).tolist() if parts else []


def _adapters(modules: list[torch.nn.Module]) -> list[tuple[str, ...]]:
    """Of each layer with adapters, as peft has them: which are active, merged or disabled, and by what they are scaled."""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    layers = [m for m in modules if "merged_adapters" in vars(m)]
    return [tuple(repr(getattr(m, name, None)) for name in names) for m in layers]


def _to_sample(modules: list[torch.nn.Module]) -> list[tuple[weakref.ref[torch.nn.Module], str]]:
    """Weights over the whole model, by what owns them: a reference to one of them would keep its memory from being packed."""
    owned = [(m, name, p) for m in modules for name, p in m.named_parameters(recurse=False)]
    fit = lambda x: x.ndim > 1 and x.is_contiguous() and x.numel() >= TOGETHER and x.element_size() in INTEGERS  # noqa: E731
    kinds = [{(x.dtype, x.device) for x in _plain(p) if fit(x)} if all(map(fit, _plain(p))) else set() for _, _, p in owned]
    # One copy from the device, so of one dtype and place.
    most = Counter(next(iter(kind)) for kind in kinds if len(kind) == 1).most_common(1)
    chosen = [(m, name) for (m, name, _), kind in zip(owned, kinds, strict=True) if most and kind == {most[0][0]}]
    return [(weakref.ref(m), name) for m, name in chosen[:: max(1, len(chosen) // SAMPLED)]]


def _plain(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor, or those that a tensor subclass is made of, as quantized weights are."""
    if hasattr(x, "__tensor_flatten__"):
        for name in x.__tensor_flatten__()[0]:
            yield from _plain(getattr(x, name))
    else:
        yield x


def _state(x: torch.Tensor) -> list[torch.Tensor]:
    """What a parameter of bitsandbytes is scaled by, which is no parameter itself."""
    states = [state for state in (getattr(x, "quant_state", None), getattr(x, "SCB", None)) if state is not None]
    states += [state.state2 for state in states if getattr(state, "state2", None) is not None]
    found = [state if isinstance(state, torch.Tensor) else state.absmax for state in states]
    return found + [state.offset for state in states if isinstance(getattr(state, "offset", None), torch.Tensor)]


def _digest(model: torch.nn.Module, adapters: list[Any]) -> str:
    sha = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        known = {k: v for k, v in config.to_dict().items() if k not in OF_A_FOLDER}
        sha.update(json.dumps(known, sort_keys=True, default=str).encode())
    sha.update(repr((type(model).__name__, adapters)).encode())
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        for plain in (*_plain(x), *_state(x)):
            sha.update(repr((name, plain.dtype, tuple(plain.shape))).encode())
            sha.update(_sums(plain.detach()).cpu().numpy().tobytes())
    return sha.hexdigest()


def _sums(x: torch.Tensor) -> torch.Tensor:
    """Sums of a tensor's bits, by column and by row, which a swap of numbers changes too."""
    bits = x.contiguous().view(-1)
    bits = bits.view(INTEGERS[bits.element_size()])
    whole = bits.numel() // COLUMNS * COLUMNS
    table, rest = bits[:whole].view(-1, COLUMNS), bits[whole:].long()
    rows = table.sum(1, dtype=torch.int64)
    by_row = (rows * torch.arange(1, len(rows) + 1, device=x.device)).sum()
    return torch.cat([table.sum(0, dtype=torch.int64), by_row[None], rest])
