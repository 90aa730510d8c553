"""What a launch did, as `replay` records it, to repeat it with other pointers. And what recordings at several lengths share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class Pointer(NamedTuple):
    """An address where a tensor descriptor expects its tensor."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class Launch(NamedTuple):
    """A compiled kernel with its grid and arguments, and index, source and offset in bytes of pointers and descriptors.

    `specialised` has the indices of integers for which Triton may have compiled a special machine code.
    """

    compiled: Any
    grid: tuple[int, int, int]
    run: Callable[..., None] | None
    arguments: list[Any]
    pointers: list[tuple[int, int, int]]
    descriptors: list[tuple[int, int, int]]
    specialised: frozenset[int]


class Result(NamedTuple):
    """A tensor that the launch returns: an allocation, and sizes, strides and offset if it is a view of one."""

    allocation: int
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None


class Recorded(NamedTuple):
    """What a launch did. Sources are the input tensors in order, then the allocations (size, stride, dtype, device)."""

    allocations: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]]
    launches: list[Launch]
    results: list[Result]
    several: bool

    def repeat(self, addresses: list[int]) -> Any:
        made = [torch.empty_strided(size, stride, dtype=dtype, device=on) for size, stride, dtype, on in self.allocations]
        addresses += [t.data_ptr() for t in made]
        for launch in self.launches:
            arguments = launch.arguments.copy()
            for place, source, offset in launch.pointers:
                arguments[place] = addresses[source] + offset
            for place, source, offset in launch.descriptors:
                arguments[place] = based(launch.arguments[place], Pointer(addresses[source] + offset))
            launch.run(*arguments)
        results = [made[i] if view is None else made[i].as_strided(*view) for i, view in self.results]
        if not results:
            return None
        return tuple(results) if self.several else results[0]

    def without_runs(self) -> Recorded:
        """The same without functions, to compare it with another.

        Each launch has its own function, even for the same kernel and grid.
        """
        return self._replace(launches=[launch._replace(run=None) for launch in self.launches])


def based(descriptor: Any, base: Any) -> Any:
    """The tensor descriptor with another base.

    Its constructor is not called, because it would check again what the layout determines.
    """
    new = object.__new__(type(descriptor))
    new.__dict__.update(descriptor.__dict__)
    new.base = base
    return new


class Line(NamedTuple):
    """A number that depends on a length L: base + per · L."""

    base: int
    per: int


class Differs(Exception):
    """Recordings do not belong to one launch at several lengths."""


def common(lengths: Sequence[int], values: Sequence[Any]) -> Any:
    """What is equal at all lengths, with a `Line` in place of each integer that depends on the length.

    Args:
        lengths: three or more, because two numbers are always on a line.
        values: nested tuples and lists, one for each length.

    Raises:
        Differs: something else is not equal.
    """
    first = values[0]
    if any(type(v) is not type(first) for v in values):
        raise Differs
    if isinstance(first, tuple | list):
        if any(len(v) != len(first) for v in values):
            raise Differs
        parts = [common(lengths, each) for each in zip(*values, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if all(v is first or v == first for v in values):
        return first
    if type(first) is not int:
        raise Differs
    per, rest = divmod(values[1] - first, lengths[1] - lengths[0])
    line = Line(first - per * lengths[0], per)
    if rest or any(v != line.base + per * n for n, v in zip(lengths, values, strict=True)):
        raise Differs
    return line


INT32 = 2**31 - 1
DIVISOR = 16  # Triton specialises integers by divisibility by this


def longest(launches: Sequence[Launch]) -> int:
    """The largest length for which launches with lines as arguments use the recorded machine codes.

    Raises:
        Differs: machine codes may differ at any length, or something other than arguments depends on the length.
    """
    most = INT32
    for launch in launches:
        offsets = [offset for _, _, offset in (*launch.pointers, *launch.descriptors)]
        if any(isinstance(x, Line) for x in (*launch.grid, *offsets)) or any(map(_has_lines, launch.arguments)):
            raise Differs
        for place, x in enumerate(launch.arguments):
            if isinstance(x, Line):
                if x.per < 0 or x.base < 0 or place in launch.specialised and (x.per % DIVISOR or x.base % DIVISOR):
                    raise Differs
                most = min(most, (INT32 - x.base) // x.per)
    return most


def _has_lines(argument: Any) -> bool:
    return type(argument) in (tuple, list) and any(isinstance(x, Line) or _has_lines(x) for x in argument)
