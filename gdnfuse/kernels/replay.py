"""Repeat a launch with other pointers: what Python and Triton do for a call depends on its layout alone, so it is done once.

A launch works out grids, strides and views, allocates, and has Triton bind and specialise some twenty to forty arguments: 25 to
220 µs of the host's time (benchmarks/launch.py), which a step without CUDA graphs and a short prompt wait for. The second call of
a layout is recorded: which compiled kernels ran, on what grid, with which arguments, and of every pointer from which input or
allocation it was derived, how many bytes further on. From then on only that is repeated.

Layout is all that a launch may look at: sizes, strides and dtypes of the tensors, whether they are aligned to 16 bytes, their
device, and every other argument. A launch that does more than allocate, make views and launch kernels is not recorded.

To read a layout off a call takes longer than to repeat it, because every size and stride becomes a Python object. So for a layout
that comes again and again a function is written that compares a call with it, the tensors by the guards that Dynamo has for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch._C._dynamo.guards import TensorGuards
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

MOST = 512  # layouts of one op that are kept: prompts have one per length
ALIGNMENT = 16  # bytes, by which Triton specialises a pointer
MOST_MATCHES = 8  # layouts of one op that a call is compared with, one after another
# Readings of a layout after which calls are compared with it, twice as many each time that another has to go for it: keys that
# grow have another layout at each token, and the same ones in the next text.
OFTEN = 256
TENSORS = (torch.Tensor, torch.nn.Parameter)
PLAIN = {int, float, bool, str, type(None)}


class _NotRecorded(Exception):
    """The launch does what cannot be repeated by pointers alone."""


class _Pointer(NamedTuple):
    """An address, where a tensor descriptor wants its tensor."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class _Launch(NamedTuple):
    """A compiled kernel on its grid, its arguments, and which are pointers or descriptors: place, source, offset in bytes."""

    run: Callable[..., None]
    arguments: list[Any]
    pointers: list[tuple[int, int, int]]
    descriptors: list[tuple[int, int, int]]


class _Result(NamedTuple):
    """A tensor that the launch returns: an allocation, and sizes, strides and offset of the view if it is one."""

    allocation: int
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None


class Recorded(NamedTuple):
    """Sources are the input tensors in order, then the allocations (size, stride, dtype, device)."""

    allocations: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]]
    launches: list[_Launch]
    results: list[_Result]
    several: bool

    def repeat(self, addresses: list[int]) -> Any:
        made = [torch.empty_strided(size, stride, dtype=dtype, device=on) for size, stride, dtype, on in self.allocations]
        addresses += [t.data_ptr() for t in made]
        for run, template, pointers, descriptors in self.launches:
            arguments = template.copy()
            for place, source, offset in pointers:
                arguments[place] = addresses[source] + offset
            for place, source, offset in descriptors:
                arguments[place] = _based(template[place], _Pointer(addresses[source] + offset))
            run(*arguments)
        results = [made[i] if view is None else made[i].as_strided(*view) for i, view in self.results]
        return tuple(results) if self.several else results[0]


MISSED: Any = object()


def _matching(
    args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[torch.Tensor], device: int, recorded: Recorded
) -> Callable[..., Any] | None:
    """A function of such arguments: if they have the layout of these and are aligned, it repeats what was recorded, else MISSED.

    None where an argument is neither plain nor a tensor nor a list of one or the other, or is the same tensor as another.
    """
    if len({*map(id, tensors)}) < len(tensors):
        return None
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    same = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    known: dict[str, Any] = {"torch": torch, "MISSED": MISSED, "SAME": same.check, "REPEAT": recorded.repeat}
    parameters = [*(f"x{i}" for i in range(len(args))), *kwargs]
    opened, tests, names = [], [], []
    for name, x in zip(parameters, (*args, *kwargs.values()), strict=True):
        kind = type(x)
        if kind in TENSORS:
            names.append(name)
        elif x is None:
            tests.append(f"{name} is None")
        elif kind in PLAIN or kind in (list, tuple) and PLAIN.issuperset(map(type, x)):
            known[f"IS_{name}"] = kind(x)  # of a list a copy
            tests.append(f"{name}.__class__ is {kind.__name__} and {name} == IS_{name}")
        elif kind in (list, tuple) and all(type(y) in TENSORS for y in x):
            parts = [f"{name}_{i}" for i in range(len(x))]
            opened += [f" if {name}.__class__ is not {kind.__name__} or len({name}) != {len(x)}:", "  return MISSED"]
            opened.append(f" {', '.join(parts)}, = {name}")
            names += parts
        else:
            return None
    if device >= 0:  # Triton launches on the current device
        tests.append(f"torch.cuda.current_device() == {device}")
    lines = [f"def match({', '.join(parameters)}):", *opened]
    tests.append(f"SAME({', '.join(names)})")
    lines += [f" if not ({' and '.join(tests)}):", "  return MISSED"]
    lines += [f" a{i} = {name}.data_ptr()" for i, name in enumerate(names)]
    addresses = [f"a{i}" for i in range(len(names))]
    lines += [f" if ({' | '.join(addresses)}) % {ALIGNMENT}:", "  return MISSED"]
    lines.append(f" return REPEAT([{', '.join(addresses)}])")
    exec("\n".join(lines), known)
    return known["match"]


class Replayed:
    """A launch that is repeated, from the third call of a layout on, without going through its Python.

    Args:
        launch: takes tensors, lists of them and plain values, and launches kernels; its results are its own allocations.
        standing_in: a context in which every kernel is passed through a function before it is launched.
    """

    def __init__(self, launch: Callable[..., Any], standing_in: Callable[[Any], AbstractContextManager[None]]):
        self.launch, self.standing_in = launch, standing_in
        self.layouts: dict[Hashable, Recorded | None] = {}
        self.met: Counter[Hashable] = Counter()  # how often a layout was read off since it was recorded
        # By which arguments are given:
        self.matches: dict[Hashable, list[Callable[..., Any]]] = {}
        self.often: dict[Hashable, int] = {}

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
        key = (*layout, *[a % ALIGNMENT for a in addresses])  # a view further on is aligned or not by how far off this is
        recorded = self.layouts.get(key, self)
        if type(recorded) is Recorded:
            self.met[key] += 1
            given = (len(args), *kwargs)
            if self.met[key] >= self.often.get(given, OFTEN) and not any(key[-len(tensors) :]):
                self.met[key] = 0  # met otherwise, by another class of tensors, it gets another function
                if match := _matching(args, kwargs, tensors, device, recorded):
                    known = self.matches.get(given, [])
                    if len(known) >= MOST_MATCHES:
                        self.often[given] = 2 * self.often.get(given, OFTEN)
                    self.matches[given] = [*known[-MOST_MATCHES + 1 :], match]
            return recorded.repeat(addresses)
        if recorded is self:  # the first call also compiles
            if len(self.layouts) >= MOST:
                self.forget()
            self.layouts[key] = None
        elif recorded is None:
            recording = _Recording(tensors)
            with self.standing_in(recording), recording:
                results = self.launch(*args, **kwargs)
            self.layouts[key] = recording.finished(results) or NOT_RECORDED
            return results
        return self.launch(*args, **kwargs)

    def forget(self) -> None:
        """Record every layout anew."""
        self.layouts.clear()
        self.met.clear()
        self.matches.clear()
        self.often.clear()


NOT_RECORDED: Any = object()


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


def _based(descriptor: Any, base: Any) -> Any:
    """The tensor descriptor with another base; not its constructor, which checks again what the layout has settled."""
    new = object.__new__(type(descriptor))
    new.__dict__.update(descriptor.__dict__)
    new.base = base
    return new


def _one_storage(view: torch.Tensor, base: torch.Tensor) -> bool:
    """Whether it is a view. In inference mode, and behind another mode, composite ops come whole: contiguous, reshape and to,
    which declare one and may copy."""
    return view.untyped_storage()._cdata == base.untyped_storage()._cdata


def _start(x: torch.Tensor) -> int:
    """Bytes from the start of the storage; data_ptr() is 0 where there are no elements."""
    return x.storage_offset() * x.itemsize


class _Recording(TorchDispatchMode):
    """Notes what a launch allocates and launches, while it does; follows every tensor from the one that it is a view of."""

    launches_kernels = True

    def __init__(self, inputs: Sequence[torch.Tensor]):
        super().__init__()
        self.inputs = len(inputs)
        # Tensor, source and offset in bytes, by the tensor's id; kept while recording, so that no two have one id.
        self.sources = {id(t): (t, i, 0) for i, t in enumerate(inputs)}
        self.allocations: list[torch.Tensor] = []
        self.launches: list[_Launch] = []
        # Of one tensor given twice nothing tells which one a pointer was derived from. A tensor from elsewhere Triton must check.
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
        if not hasattr(compiled, "run"):  # under the interpreter
            self.whole = False
            return
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        arguments = [given[p.name] if p.name in given else p.default for p in kernel.params]
        pointers, descriptors = [], []
        try:
            for place, x in enumerate(arguments):
                if isinstance(x, torch.Tensor):
                    pointers.append((place, *self._source(x)))
                    arguments[place] = None
                elif isinstance(getattr(x, "base", None), torch.Tensor):
                    descriptors.append((place, *self._source(x.base)))
                    arguments[place] = _based(x, None)
                elif any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(x)):
                    raise _NotRecorded
        except _NotRecorded:
            self.whole = False
        self.launches.append(_Launch(compiled[(*grid, 1, 1)[:3]], arguments, pointers, descriptors))

    def finished(self, results: Any) -> Recorded | None:
        """What to repeat, or None where the launch did more than can be."""
        leaves = pytree.tree_leaves(results)
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

    def _result(self, x: torch.Tensor) -> _Result:
        source, offset = self._source(x)
        if source < self.inputs or x.dtype != self.allocations[source - self.inputs].dtype:
            raise _NotRecorded
        allocation, view = self.allocations[source - self.inputs], (tuple(x.shape), x.stride(), offset // x.itemsize)
        whole = view == (tuple(allocation.shape), allocation.stride(), 0)
        return _Result(source - self.inputs, None if whole else view)


ALLOCATES = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.new_empty}


class _Noting:
    """Stands in for a kernel: launches it and tells the recording."""

    def __init__(self, recording: _Recording, kernel: Any):
        self.recording, self.kernel = recording, kernel

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():  # what Triton does is repeated by the compiled kernel
                compiled = self.kernel[grid](*args, **kwargs)
            self.recording.launched(self.kernel, compiled, grid, args, kwargs)

        return run
