"""Generates a function for a layout that comes often. It compares a call with the layout, and repeats what was recorded.

Tensors are compared by Dynamo's guards, and everything else by class and value. The repetition is written out. It calls Triton's
launcher as Triton's runner does, without what the runner looks up at each launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gdnfuse import compat
from gdnfuse.kernels.launch.recording import Line, Pointer, Recorded, based, longest

ALIGNMENT = 16  # bytes; Triton specialises pointers by this alignment
TENSORS = (torch.Tensor, torch.nn.Parameter)
PLAIN = {int, float, bool, str, type(None)}
MISSED: Any = object()
SPECIALISED_BY_STORAGE = torch.version.hip is not None  # on AMD Triton has other machine codes for storages of 2 GiB and more


def repeating_function(
    args: Sequence[Any],
    kwargs: dict[str, Any],
    tensors: Sequence[torch.Tensor],
    device: int,
    recorded: Recorded,
    layout: Sequence[tuple[Any, Any]] | None = None,
    length: tuple[int, int] | None = None,
) -> Callable[..., Any] | None:
    """A function that repeats what was recorded if its arguments have this layout and are aligned. Else it returns MISSED.

    None if an argument is neither plain, a dtype, a tensor nor a list of these, if two arguments are the same tensor, or if a
    machine code is chosen by something that the function does not compare.

    Args:
        args, kwargs: of a call.
        tensors: the tensors among them, in order.
        device: index of their GPU, or −1.
        recorded: what to repeat. Integers that depend on a length may be lines.
        layout: sizes and strides of the tensors, which may be lines; by default those of the tensors.
        length: which axis of which tensor is the length.

    Raises:
        Differs: no length is safe, see `longest`.
    """
    if SPECIALISED_BY_STORAGE or len({*map(id, tensors)}) < len(tensors):
        return None
    layout = layout or [(tuple(t.shape), t.stride()) for t in tensors]
    known: dict[str, Any] = {"MISSED": MISSED}
    parameters = [*(f"x{i}" for i in range(len(args))), *kwargs]
    opened, tests, names = [], [], []
    for name, x in zip(parameters, (*args, *kwargs.values()), strict=True):
        kind = type(x)
        if kind in TENSORS:
            names.append(name)
        elif x is None:
            tests.append(f"{name} is None")
        elif kind is torch.dtype:
            known[f"IS_{name}"] = x
            tests.append(f"{name} is IS_{name}")
        elif kind in PLAIN or kind in (list, tuple) and PLAIN.issuperset(map(type, x)):
            known[f"IS_{name}"] = kind(x)  # a list is copied
            tests.append(f"{name}.__class__ is {kind.__name__} and {name} == IS_{name}")
        elif kind in (list, tuple) and all(type(y) in TENSORS for y in x):
            parts = [f"{name}_{i}" for i in range(len(x))]
            opened += [f"if {name}.__class__ is not {kind.__name__} or len({name}) != {len(x)}:", " return MISSED"]
            opened.append(f"{', '.join(parts)}, = {name}")
            names += parts
        else:
            return None
    fixed = [[[None if isinstance(n, Line) else n for n in numbers] for numbers in each] for each in zip(*layout, strict=True)]
    sizes, strides = fixed or ([], [])
    known["SAME"] = compat.tensor_guards(tensors, sizes, strides)
    if known["SAME"] is None:
        return None
    if device >= 0:  # Triton launches on the current device
        known |= {"DEVICE": compat.current_device(), "STREAM": compat.current_stream()}
        tests.append(f"DEVICE() == {device}")
    tests.append(f"SAME({', '.join(names)})")
    lines = [*opened, f"if not ({' and '.join(tests)}):", " return MISSED"]
    if length:
        tensor, axis = length
        lines.append(f"L = {names[tensor]}.size({axis})")
        tests = [f"0 < L <= {longest(recorded.launches)}"]
        for name, (size, stride) in zip(names, layout, strict=True):
            for how, numbers in (("size", size), ("stride", stride)):
                tests += [f"{name}.{how}({i}) == {_text(n, known)}" for i, n in enumerate(numbers) if isinstance(n, Line)]
        lines += [f"if not ({' and '.join(tests)}):", " return MISSED"]
    addresses = [f"a{i}" for i in range(len(names))]
    lines += [f"{a} = {name}.data_ptr()" for a, name in zip(addresses, names, strict=True)]
    lines += [f"if ({' | '.join(addresses)}) % {ALIGNMENT}:", " return MISSED", *_repeated(recorded, addresses, device, known)]
    exec("\n ".join([f"def match({', '.join(parameters)}):", *lines]), known)
    return known["match"]


def _repeated(recorded: Recorded, addresses: list[str], device: int, known: dict[str, Any]) -> list[str]:
    """The statements of `Recorded.repeat`. Before them comes one that calls it instead if a profiler must be called."""
    lines, addresses = [], [*addresses]
    for i, (size, stride, dtype, on) in enumerate(recorded.allocations):
        known[f"EMPTY{i}"] = compat.empty(on)
        lines.append(f"m{i} = EMPTY{i}({_text(size, known)}, {_text(stride, known)}, {_text(dtype, known)})")
        lines.append(f"b{i} = m{i}.data_ptr()")
        addresses.append(f"b{i}")
    launchers = [compat.launcher(launch.compiled, launch.grid) for launch in recorded.launches] if device >= 0 else [None]
    direct = all(launchers)
    if direct:
        hooked = [f'getattr(HOOKS.launch_{when}_hook, "calls", True)' for when in ("enter", "exit")]
        lines = [f"if {' or '.join(hooked)}:", " return MISSED", *lines]
        lines.append(f"stream = STREAM({device})")
        known["HOOKS"] = compat.launch_hooks()
    for i, launch in enumerate(recorded.launches):
        texts = [_text(x, known) for x in launch.arguments]
        for place, source, offset in launch.pointers:
            texts[place] = f"{addresses[source]} + {_text(offset, known)}"
        for place, source, offset in launch.descriptors:
            known |= {"based": based, "Pointer": Pointer}
            texts[place] = f"based({texts[place]}, Pointer({addresses[source]} + {_text(offset, known)}))"
        if direct:
            known |= dict(zip((f"RUN{i}", f"CODE{i}", f"PACKED{i}"), launchers[i], strict=True))
            texts = [*map(str, launch.grid), "stream", f"CODE{i}", f"PACKED{i}", "None", "None", "None", *texts]
        else:
            known[f"RUN{i}"] = compat.runner(launch.compiled, launch.grid)
        lines.append(f"RUN{i}({', '.join(texts)})")
    results = [f"m{i}" if view is None else f"m{i}.as_strided{_text(view, known)}" for i, view in recorded.results]
    if not results:
        return [*lines, "return None"]
    return [*lines, f"return ({', '.join(results)},)" if recorded.several else f"return {results[0]}"]


def _text(x: Any, known: dict[str, Any]) -> str:
    """An expression for a value. `known` gets the values that need a name."""
    if isinstance(x, Line):
        return f"{x.base} + {x.per} * L"
    if type(x) in (int, bool, type(None)):
        return repr(x)
    if type(x) in (tuple, torch.Size):
        return f"({''.join(f'{_text(y, known)}, ' for y in x)})"
    name = f"C{len(known)}"
    known[name] = x
    return name
