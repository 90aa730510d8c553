"""What a model computes with: a digest of its weights, adapters and config, and whether they have changed."""

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

SAMPLED, TOGETHER = 32, 8  # how many weights are sampled at each call, and how many numbers of each
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
COLUMNS = 1024
OF_A_FOLDER = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}  # not of what is computed


class Weights:
    """Tells at each call whether a model still computes the same.

    A change is found if a tensor of the model has another address or version counter, as after loading, moving, training and
    every in-place change through torch. It is found if there is another module, buffer or hook, or another adapter, or if an
    adapter's scaling or merged state is different. A write past torch's counter, as by `weight.data.copy_`, is found by samples:
    eight numbers of 32 weights. If anything differs, all weights are read and digested again. So weights that only moved count as
    the same. A write past the counter that does not change the samples is not found.

    Args:
        model: held weakly. None of its tensors is held.

    Attributes:
        changes: how often a change was found. Weights that are changed back have the same digest and count as two changes.
    """

    def __init__(self, model: torch.nn.Module):
        self._model = weakref.ref(model)
        self._seen: list[Any] | None = None
        self._digest = ""
        self.changes = 0
        self._looked, self._hooked = -1, weakref.WeakSet()
        self._samples: list[tuple[weakref.ref[torch.nn.Module], str]] = []
        self._beside: torch.cuda.Stream | None = None

    def digest(self, since: torch.cuda.Event | None = None) -> str:
        """A digest of weights, buffers, adapters and config. It is the same in every process. Hooks are not part of it.

        Samples are those of the time `since`, and the GPU's work behind that is not waited for. Without it they are those of now.
        """
        model = self._model()
        modules, tensors = compat.everything_of(model)
        if not set(map(type, tensors)) <= {torch.Tensor, torch.nn.Parameter}:
            tensors = [plain for x in tensors for plain in _plain(x)]
        adapters = _adapters(modules)
        pointers = list(map(torch.Tensor.data_ptr, tensors))
        seen = [list(map(id, modules)), pointers, compat.version_counters(tensors), adapters]
        if self._seen is None or seen != self._seen[:-1]:
            self._samples = _to_sample(modules)
            self._seen, since = None, None  # what these tensors hold may have been written behind it
        seen.append(self._sampled(since))
        if seen != self._seen:
            self._seen, self._digest = seen, _digest(model, adapters)
            self.changes += 1
        return self._digest

    def hooks(self) -> list[tuple[Any, ...]]:
        """Forward hooks that are registered now, by their numbers, without those by which transformers captures outputs."""
        if self._looked != RemovableHandle.next_id:  # the number of hooks registered anywhere
            self._looked = RemovableHandle.next_id
            self._hooked = weakref.WeakSet(m for m in self._model().modules() if hooks_now([m]))
        return hooks_now(self._hooked)

    def key(self, since: torch.cuda.Event | None = None) -> Hashable:
        """The key of results in this process: the digest, forward hooks, and the settings of autocast."""
        kind = next(self._model().parameters()).device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return self.digest(since), tuple(sorted(map(str, self.hooks()))), autocast

    @torch.no_grad()
    def _sampled(self, since: torch.cuda.Event | None) -> list[int]:
        # One launch and one copy to the host, whatever is sampled: each prompt waits for it.
        parts = [_middle(x) for module, name in self._samples for x in _plain(getattr(module(), name))]
        if not parts:
            return []
        if since is None:
            return torch.cat([x.view(INTEGERS[x.element_size()]) for x in parts]).tolist()
        with torch.cuda.device(parts[0].device):
            self._beside = self._beside or torch.cuda.Stream()
            self._beside.wait_event(since)
            with torch.cuda.stream(self._beside):
                return torch.cat([x.view(INTEGERS[x.element_size()]) for x in parts]).tolist()


def _middle(x: torch.Tensor) -> torch.Tensor:
    """The numbers in the middle of a contiguous tensor, as a view."""
    n = min(TOGETHER, x.numel())
    return x.as_strided((n,), (1,), x.storage_offset() + (x.numel() - n) // 2)


def _adapters(modules: list[torch.nn.Module]) -> list[tuple[str, ...]]:
    """For each layer with adapters of peft: which are active, merged or disabled, and their scaling."""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    layers = [m for m, of in zip(modules, map(vars, modules), strict=True) if "merged_adapters" in of]
    return [tuple(repr(getattr(m, name, None)) for name in names) for m in layers]


def _to_sample(modules: list[torch.nn.Module]) -> list[tuple[weakref.ref[torch.nn.Module], str]]:
    """Weights spread over the model, each as its owner and name. A reference to the weight would keep it from being packed."""
    owned = [(m, name, p) for m in modules for name, p in m.named_parameters(recurse=False)]
    fit = lambda x: x.ndim > 1 and x.is_contiguous() and x.numel() >= TOGETHER and x.element_size() in INTEGERS  # noqa: E731
    kinds = [{(x.dtype, x.device) for x in _plain(p) if fit(x)} if all(map(fit, _plain(p))) else set() for _, _, p in owned]
    # One copy from the device needs one dtype and one device.
    most = Counter(next(iter(kind)) for kind in kinds if len(kind) == 1).most_common(1)
    chosen = [(m, name) for (m, name, _), kind in zip(owned, kinds, strict=True) if most and kind == {most[0][0]}]
    return [(weakref.ref(m), name) for m, name in chosen[:: max(1, len(chosen) // SAMPLED)]]


def holds(model: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether a parameter or buffer of a model is of a dtype, or has an inner tensor of it."""
    return any(plain.dtype == dtype for x in (*model.parameters(), *model.buffers()) for plain in _plain(x))


def _plain(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor, or the inner tensors of a tensor subclass, such as a quantized weight."""
    if hasattr(x, "__tensor_flatten__"):
        for name in x.__tensor_flatten__()[0]:
            yield from _plain(getattr(x, name))
    else:
        yield x


def _state(x: torch.Tensor) -> list[torch.Tensor]:
    """The scales of a parameter of bitsandbytes. They are not parameters themselves."""
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
    """Sums of a tensor's bits, by column and by row, so that swapped numbers change them too."""
    bits = x.contiguous().view(-1)
    bits = bits.view(INTEGERS[bits.element_size()])
    whole = bits.numel() // COLUMNS * COLUMNS
    table, rest = bits[:whole].view(-1, COLUMNS), bits[whole:].long()
    rows = table.sum(1, dtype=torch.int64)
    by_row = (rows * torch.arange(1, len(rows) + 1, device=x.device)).sum()
    return torch.cat([table.sum(0, dtype=torch.int64), by_row[None], rest])
