"""Repeats a launch with other pointers. What Python and Triton do for a call depends only on its layout, so it is done once.

A launch computes grids, strides and views, allocates memory, and lets Triton bind and specialise twenty to forty arguments. That
takes 26 to 231 µs of the host's time (benchmarks/launch.py), for which a step without CUDA graphs and a short prompt wait. The
second call of a layout is recorded: which compiled kernels ran, with which grid and arguments, and for every pointer the input or
allocation that it comes from and the offset in bytes. Later calls only repeat that.

The layout is everything that a launch may depend on: sizes, strides and dtypes of the tensors, whether they are aligned to 16
bytes, their device, and every other argument. A launch that does more than allocate, make views and launch kernels is not
recorded.

Reading the layout of a call takes longer than repeating it, because every size and stride becomes a Python object. So for a
layout that comes often, a function is generated that compares a call with it, with Dynamo's guards for the tensors.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from gdnfuse import compat
from gdnfuse.kernels.launch.codegen import ALIGNMENT, MISSED, SPECIALISED_BY_STORAGE, repeating_function
from gdnfuse.kernels.launch.recording import INT32, Differs, Launch, Recorded, Result, based, common

MOST = 512  # the most layouts of one op that are kept; prompts have one per length
MOST_MATCHES = 8  # the most layouts of one op that a call is compared with
# After so many readings of a layout, calls are compared with it. The number doubles each time that another layout is dropped.
OFTEN = 64
LENGTHS = 3  # how many lengths are recorded before others are assumed to be like them


Mode, without_modes = compat.dispatch_mode()


class _NotRecorded(Exception):
    """The launch does something that cannot be repeated with other pointers."""


class _AtLength(NamedTuple):
    """A recording of a launch with growing tensors at one length, and the layout of all tensors."""

    length: int
    layout: list[tuple[tuple[int, ...], tuple[int, ...]]]
    recorded: Recorded


class Replayed:
    """A launch that is repeated without its Python code, from the third call of a layout on.

    Args:
        launch: takes tensors, lists of tensors and plain values, and launches kernels. Its results are its own allocations.
        standing_in: a context in which every kernel is passed through a function before it is launched.
        grows: names of tensors that are longer at each call, with the axis. At all lengths the launch must use the same kernels
            and grids, and every number that it passes on or allocates must be a constant plus another times the length. Three
            lengths are recorded to check this.
    """

    def __init__(
        self,
        launch: Callable[..., Any],
        standing_in: Callable[[Any], AbstractContextManager[None]],
        grows: dict[str, int] | None = None,
    ):
        self.launch, self.standing_in = launch, standing_in
        self.grows = grows if grows and not SPECIALISED_BY_STORAGE else {}
        self.names = list(inspect.signature(launch).parameters) if grows else []
        self.layouts: dict[Hashable, Recorded | None] = {}
        self.met: Counter[Hashable] = Counter()  # how often each layout was read since it was recorded
        # By the arguments that are given:
        self.matches: dict[Hashable, list[Callable[..., Any]]] = {}
        self.often: dict[Hashable, int] = {}
        # By the layout without the length and strides of what grows:
        self.at_lengths: dict[Hashable, list[_AtLength]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for match in self.matches.get((len(args), *kwargs), ()):
            if (results := match(*args, **kwargs)) is not MISSED:
                return results
        return self._by_layout(args, kwargs)

    def _by_layout(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = args[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton launches on the current device
                return self._by_layout(args, kwargs)
        tensors: list[torch.Tensor] = []
        layout = (device, *_layout(args, tensors), *kwargs, *_layout(kwargs.values(), tensors))
        addresses = [t.data_ptr() for t in tensors]
        if SPECIALISED_BY_STORAGE:
            layout += tuple(t.untyped_storage().nbytes() > INT32 for t in tensors)
        key = (*layout, *[a % ALIGNMENT for a in addresses])  # whether a view is aligned depends on this
        recorded = self.layouts.get(key, self)
        if type(recorded) is Recorded:
            self.met[key] += 1
            given = (len(args), *kwargs)
            if self.met[key] >= self.often.get(given, OFTEN) and not any(key[-len(tensors) :]):
                self.met[key] = 0  # another class of tensors with this layout gets its own function
                if match := repeating_function(args, kwargs, tensors, device, recorded):
                    self._compare_with(match, given)
            return recorded.repeat(addresses)
        if recorded is NOT_RECORDED:
            return self.launch(*args, **kwargs)
        family, length, place = self._family(args, kwargs, tensors)
        if recorded is self:
            if len(self.layouts) >= MOST:
                self.forget()
            self.layouts[key] = None
            if family not in self.at_lengths:  # the first call also compiles
                if place:
                    self.at_lengths[family] = []
                return self.launch(*args, **kwargs)
        if Mode is None:
            self.layouts[key] = NOT_RECORDED
            return self.launch(*args, **kwargs)
        recording = _Recording(tensors)
        with self.standing_in(recording), recording:
            results = self.launch(*args, **kwargs)
        self.layouts[key] = recorded = recording.finished(results) or NOT_RECORDED
        if place and type(recorded) is Recorded and not any(key[-len(tensors) :]):
            known = self.at_lengths.get(family, [])  # replaced and never changed, because other threads may read it
            if all(length != other.length for other in known):
                known = [*known, _AtLength(length, [(tuple(t.shape), t.stride()) for t in tensors], recorded)]
            self.at_lengths[family] = known if len(known) < LENGTHS else []
            if len(known) >= LENGTHS and (match := _at_all_lengths(known, args, kwargs, tensors, device, place)):
                self._compare_with(match, (len(args), *kwargs))
        return results

    def _family(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[torch.Tensor]
    ) -> tuple[Hashable, int, tuple[int, int] | None]:
        """The layout without the length and strides of what grows; the length; and its tensor and axis, if any."""
        rest, place = [], None
        for name, x in (*zip(self.names, args, strict=False), *kwargs.items()) if self.grows else ():
            if name in self.grows and isinstance(x, torch.Tensor):
                axis, shape = self.grows[name], list(x.shape)
                place = place or (next(i for i, t in enumerate(tensors) if t is x), axis)
                del shape[axis]
                rest += [name, *shape, x.dtype, x.get_device()]
            else:
                rest += [name, *_layout([x], [])]
        return tuple(rest), tensors[place[0]].shape[place[1]] if place else 0, place

    def _compare_with(self, match: Callable[..., Any], given: Hashable) -> None:
        known = self.matches.get(given, [])
        if len(known) >= MOST_MATCHES:
            self.often[given] = 2 * self.often.get(given, OFTEN)
        self.matches[given] = [*known[-MOST_MATCHES + 1 :], match]

    def forget(self) -> None:
        """Record every layout again."""
        for kept in (self.layouts, self.met, self.matches, self.often, self.at_lengths):
            kept.clear()


NOT_RECORDED: Any = object()


def _at_all_lengths(
    at_lengths: Sequence[_AtLength],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    tensors: Sequence[torch.Tensor],
    device: int,
    place: tuple[int, int],
) -> Callable[..., Any] | None:
    """A function that repeats at any length what was recorded at these. None if the recordings do not belong together."""
    lengths = [a.length for a in at_lengths]
    try:
        layout, recorded = common(lengths, [(a.layout, a.recorded.without_runs()) for a in at_lengths])
        return repeating_function(args, kwargs, tensors, device, recorded, layout, place)
    except Differs:
        return None


def _layout(arguments: Any, tensors: list[torch.Tensor]) -> list[Hashable]:
    layout: list[Hashable] = []
    for x in arguments:
        if isinstance(x, torch.Tensor):
            tensors.append(x)
            layout += (x.shape, x.stride(), x.dtype, x.get_device())
        elif isinstance(x, list | tuple):
            layout.append(tuple(_layout(x, tensors)))
        else:
            layout.append(x)
    return layout


def _one_storage(view: torch.Tensor, base: torch.Tensor) -> bool:
    """Whether a tensor is a view.

    In inference mode, and inside another mode, composite ops are not decomposed: contiguous, reshape and to. They declare a view
    and may copy.
    """
    return compat.memory_of(view) == compat.memory_of(base)


def _start(x: torch.Tensor) -> int:
    """Bytes from the start of the storage. data_ptr() is 0 if there are no elements."""
    return x.storage_offset() * x.itemsize


class _Recording(Mode or object):
    """Notes what a launch allocates and launches. For every tensor it knows the one that it is a view of."""

    launches_kernels = True

    def __init__(self, inputs: Sequence[torch.Tensor]):
        super().__init__()
        self.inputs = len(inputs)
        # Tensor, source and offset in bytes, by the id of the tensor. Tensors are kept while recording, so that ids are unique.
        self.sources = {id(t): (t, i, 0) for i, t in enumerate(inputs)}
        self.allocations: list[torch.Tensor] = []
        self.launches: list[Launch] = []
        # If a tensor is given twice, the source of a pointer is ambiguous. A tensor from elsewhere must be checked by Triton.
        self.whole = len(self.sources) == len(inputs) and len({t.device for t in inputs}) == 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in ALLOCATES:
            self.sources[id(out)] = (out, self.inputs + len(self.allocations), 0)
            self.allocations.append(out)
        elif func.is_view and isinstance(out, torch.Tensor) and id(args[0]) in self.sources and _one_storage(out, args[0]):
            _, source, offset = self.sources[id(args[0])]
            self.sources[id(out)] = (out, source, offset + _start(out) - _start(args[0]))
        else:
            self.whole = False
        return out

    def __call__(self, kernel: Any) -> Any:
        return _Noting(self, kernel)

    def launched(self, kernel: Any, compiled: Any, grid: Sequence[int], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        grid = (*grid, 1, 1)[:3]
        runner, parameters = compat.runner(compiled, grid), compat.parameters(kernel)
        if runner is None or parameters is None:  # for example under the interpreter
            self.whole = False
            return
        given = dict(zip([p.name for p in parameters], args, strict=False)) | kwargs
        arguments = [given[p.name] if p.name in given else p.default for p in parameters]
        pointers, descriptors = [], []
        try:
            for place, x in enumerate(arguments):
                if isinstance(x, torch.Tensor):
                    pointers.append((place, *self._source(x)))
                    arguments[place] = None
                elif isinstance(getattr(x, "base", None), torch.Tensor):
                    descriptors.append((place, *self._source(x.base)))
                    arguments[place] = based(x, None)
                elif any(isinstance(leaf, torch.Tensor) for leaf in compat.tree_leaves(x)):
                    raise _NotRecorded
        except _NotRecorded:
            self.whole = False
        specialised = frozenset(i for i, p in enumerate(parameters) if not getattr(p, "do_not_specialize", False))
        self.launches.append(Launch(compiled, grid, runner, arguments, pointers, descriptors, specialised))

    def finished(self, results: Any) -> Recorded | None:
        """What to repeat, or None if the launch did something that cannot be repeated."""
        leaves = [] if results is None else compat.tree_leaves(results)
        try:
            found = [self._result(t) for t in leaves]
        except _NotRecorded:
            return None
        if not self.whole:
            return None
        allocations = [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in self.allocations]
        return Recorded(allocations, self.launches, found, isinstance(results, tuple))

    def _source(self, x: torch.Tensor) -> tuple[int, int]:
        if id(x) not in self.sources:
            raise _NotRecorded
        return self.sources[id(x)][1:]

    def _result(self, x: torch.Tensor) -> Result:
        source, offset = self._source(x)
        if source < self.inputs or x.dtype != self.allocations[source - self.inputs].dtype:
            raise _NotRecorded
        allocation, view = self.allocations[source - self.inputs], (tuple(x.shape), x.stride(), offset // x.itemsize)
        whole = view == (tuple(allocation.shape), allocation.stride(), 0)
        return Result(source - self.inputs, None if whole else view)


ALLOCATES = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.new_empty}


class _Noting:
    """Replaces a kernel: launches it and tells the recording."""

    def __init__(self, recording: _Recording, kernel: Any):
        self.recording, self.kernel = recording, kernel

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            with without_modes():  # the compiled kernel repeats what Triton does here
                compiled = self.kernel[grid](*args, **kwargs)
            self.recording.launched(self.kernel, compiled, grid, args, kwargs)

        return run
