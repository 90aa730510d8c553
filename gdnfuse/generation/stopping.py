"""`generate` asks one step late whether to stop. So the host prepares a step while the GPU still runs the one before.

transformers does this for mps: its `DeferredStopCheck` copies the answer to the host without waiting, reads it after the next
step, and undoes that step if it was one too many. On a GPU transformers waits for every step, so the host's time adds to the
GPU's. Here the check is used on GPUs too, while a `generate` of a compiled model runs. The step that is undone must not be
visible: processors and stopping criteria must be those of transformers, modules must have no hooks, and the cache must not be
returned.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gdnfuse import compat

DEVICES = ("cuda",)
# Arguments of generate that would be called or used once too often.
OBSERVERS = (
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "custom_generate", "assistant_model", "past_key_values",
    "cache", "synced_gpus",
)  # fmt: skip


class _Wanted(threading.local):
    now: bool = False


_WANTED = _Wanted()


def stop_check(theirs: type) -> type:
    """transformers' check that is one step late. It also works on GPUs while `late` is active."""

    class LateStopCheck(theirs):
        of_gdnfuse = True

        def __init__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any):
            super().__init__(input_ids, *args, **kwargs)
            device = input_ids.device
            # The step that is undone has drawn random numbers.
            self._random = torch.cuda.default_generators[device.index] if device.type == "cuda" else None
            self._drawn: deque[int] = deque(maxlen=2)

        @staticmethod
        def is_supported(device: torch.device, cache: Any, cache_is_returned: bool, is_assistant: bool) -> bool:
            if theirs.is_supported(device, cache, cache_is_returned, is_assistant):
                return True
            return _WANTED.now and device.type in DEVICES and not (cache_is_returned or is_assistant)

        def __call__(self, *args: Any) -> bool:
            if self._random is not None:
                self._drawn.append(self._random.get_offset())
            return super().__call__(*args)

        def finish(self) -> int:
            undone = super().finish()
            if undone and self._random is not None:
                self._random.set_offset(self._drawn[0])
            return undone

    return LateStopCheck


def possible(model: torch.nn.Module) -> bool:
    """Whether `generate` of this model may ask late: it is on a GPU, and transformers has the check."""
    weight = next(model.parameters(), None)
    return weight is not None and weight.device.type in DEVICES and compat.replace_stop_check(stop_check)


@contextlib.contextmanager
def late(model: torch.nn.Module, given: Mapping[str, Any]) -> Iterator[None]:
    """Let one `generate` of a model ask late, unless hooks or its arguments would see the step that is undone."""
    seen = any(given.get(name) is not None and given[name] is not False for name in OBSERVERS)
    outer, _WANTED.now = _WANTED.now, not (seen or any(map(compat.hooks_of, model.modules())))
    try:
        yield
    finally:
        _WANTED.now = outer
