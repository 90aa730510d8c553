"""Recorded: steps of one generation as CUDA graphs, without the guards of a compiled call.

Before a compiled call runs, Dynamo compares all that it depends on with what it was traced with: modules, parameters, hooks,
attributes. Of a model of 32 layers that takes the host about a millisecond. Between the steps of one generation in which only
code of transformers and of gdnfuse runs, nothing of it can change. So the first call of a shape runs with its guards, the second
is recorded as a CUDA graph, and later ones replay it. A recording lasts for one generation.

While one thread records on a GPU, torch 2.11 lets no other draw random numbers there. So nothing is recorded while another
thread generates, and a generation begins behind a recording.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from gdnfuse.errors import one_line

log = logging.getLogger(__name__)

NOT_RECORDED = (
    "A step of a generation must be recordable as a CUDA graph to run without guards, found %s. So steps are compiled calls, "
    "whose guards take the host longer."
)


_recording = threading.Lock()
_threads: Counter[int] = Counter()  # how many generations go on in each


@contextlib.contextmanager
def generating() -> Iterator[None]:
    """A generation in this thread."""
    me = threading.get_ident()
    with _recording:
        _threads[me] += 1
    try:
        yield
    finally:
        with _recording:
            _threads[me] -= 1
            if not _threads[me]:
                del _threads[me]


def others_generate() -> bool:
    """Whether a generation goes on in another thread than in the one that asks from within a generation."""
    return len(_threads) > 1


class Graph:
    """A CUDA graph of one function. When it goes, the next one gets its memory, which torch would keep otherwise."""

    def __init__(self, device: torch.device):
        self._graph, self._device = torch.cuda.CUDAGraph(), device
        free = _free.setdefault(device, [])
        self._memory = free.pop() if free else _small(device)
        weakref.finalize(self, free.append, self._memory)

    def record(self, fn: Callable[[], Any]) -> Any:
        """What `fn` returns. Its kernels are recorded and do not run yet."""
        now, own = torch.cuda.current_stream(self._device), _stream(self._device)
        own.wait_stream(now)
        with torch.cuda.device(self._device), torch.cuda.stream(own):
            self._graph.capture_begin(self._memory.pool(), capture_error_mode="thread_local")
            try:
                out = fn()
            finally:
                self._end()
        now.wait_stream(own)
        return out

    def _end(self) -> None:
        try:
            self._graph.capture_end()
        except RuntimeError:
            # For random numbers torch 2.11 believes that this recording still goes on, until another has succeeded.
            _small(self._device)
            raise

    def replay(self) -> None:
        self._graph.replay()


# Of each device, graphs that have memory of their own, which no other graph uses now.
_free: dict[torch.device, list[torch.cuda.CUDAGraph]] = {}


def _small(device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph of one launch. As long as it lives, other graphs may use its memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.stream(_stream(device)):
        graph.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=device)
        graph.capture_end()
    return graph


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """What is recorded on, always the same one, because cuBLAS keeps memory for each."""
    return torch.cuda.Stream(device)


class Recorded:
    """Calls of a model on one cache of fixed length.

    Args:
        call: the model's compiled call, whose graphs are not CUDA graphs already.
        cache: of transformers, which `call` fills in place.

    Attributes:
        tap: where a hook of the model leaves the last hidden states, in `hidden`, if anybody reads them.
        graph: the class of the graphs.
        why_not: why steps are not recorded. Then they should not come here any more, because `call` has no CUDA graphs.
    """

    graph: type = Graph

    def __init__(self, call: Callable[..., Any], cache: Any):
        self._call, self._cache, self.tap, self.why_not = call, cache, None, ""
        self._steps: dict[Hashable, _Step | None] = {}

    def __call__(self, **arguments: Any) -> Any:
        """What the call answers. The next one of the same shapes overwrites it.

        Args:
            arguments: of the model. What is no tensor must be the same object or number at each call of a shape.
        """
        key = tuple((name, _layout(x)) for name, x in arguments.items())
        if key not in self._steps:
            self._steps[key] = None
            return self._call(**arguments)
        step = self._steps[key]
        if step is None and not self.why_not:
            step = self._steps[key] = self._record(arguments)
        if step is None:
            return self._call(**arguments)
        out = step(arguments)
        if getattr(self._cache, "is_recording", False):
            self._cache.record_again(arguments["input_ids"].shape[1])
        return out

    def _record(self, arguments: dict[str, Any]) -> _Step | None:
        """A step, of which nothing has run yet. None if it cannot be recorded, and `why_not` says why."""
        with _recording:
            if others_generate():
                self.why_not = "another thread that generates"
                return None
            return self._record_alone(arguments)

    def _record_alone(self, arguments: dict[str, Any]) -> _Step | None:
        before = [(layer, dict(vars(layer))) for layer in self._cache.layers]
        try:
            step = _Step(self._call, arguments, self.tap, self.graph(arguments["input_ids"].device))
            changed = [name for layer, known in before for name, x in vars(layer).items() if not _same(x, known.get(name))]
            if not changed or getattr(self._cache, "is_recording", False):
                return step
            return self._leave(f"{changed[0]} of its cache, which Python changes and a graph would not")
        except Exception as e:  # of any kind: what cannot be recorded runs as it is
            return self._leave(one_line(e))
        finally:
            for layer, known in before:
                vars(layer).clear()
                vars(layer).update(known)

    def _leave(self, why: str) -> None:
        self.why_not = why
        if why not in _said:
            _said.add(why)
            log.warning(NOT_RECORDED, why)


_said: set[str] = set()


class _Step:
    """One recorded call, on copies of its tensors."""

    def __init__(self, call: Callable[..., Any], arguments: dict[str, Any], tap: Any, graph: Any):
        self._given = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        self._held = {name: x.clone() for name, x in self._given.items()}
        self._graph = graph
        self._out = graph.record(lambda: call(**{**arguments, **self._held}))
        self._tap, self._hidden = tap, None if tap is None else tap.hidden

    def __call__(self, arguments: dict[str, Any]) -> Any:
        for name, held in self._held.items():
            if (x := arguments[name]) is not self._given[name]:
                held.copy_(x)
                self._given[name] = x
        self._graph.replay()
        if self._tap is not None:
            self._tap.hidden = self._hidden
        return self._out


def _layout(x: Any) -> Hashable:
    if isinstance(x, torch.Tensor):
        return tuple(x.shape), x.dtype
    return x if isinstance(x, int | str | None) else id(x)


def _same(x: Any, y: Any) -> bool:
    return x is y or isinstance(x, int) and isinstance(y, int) and x == y
