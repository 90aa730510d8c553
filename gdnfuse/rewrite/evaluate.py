"""Running a graph or a node on values, in its own dtypes or in others. Knows nothing of GDN."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from gdnfuse import compat
from gdnfuse.errors import Refused
from gdnfuse.rewrite.graph import is_tensor, value

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FLOAT_METHODS = ("float", "half", "bfloat16")


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor, bias: None = None, out_dtype: Any = None) -> Any:
    """torch's grouped_mm for any dtype: x [S, N], rows offs[e − 1] to offs[e], times weight[e] [N, M]."""
    y, start = x.new_zeros(x.shape[0], weight.shape[2]), 0
    for e, end in enumerate(offs.tolist()):
        y[start:end] = x[start:end] @ weight[e]
        start = end
    return y


_GIVEN = getattr(torch.nn.functional, "grouped_mm", None), compat.grouped_mm()
_WIDE = {given: grouped_mm for given in _GIVEN if given is not None}


def in_float64(graph: Graph) -> Graph:
    """A copy of a graph of functions and methods, with every floating dtype constant as float64 and every device as the CPU."""
    return in_precision(graph, torch.float64)


def in_precision(graph: Graph, dtype: torch.dtype, devices: bool = False) -> Graph:
    """A copy with another floating dtype. With `devices`, devices do not change."""
    new, env = Graph(), {}

    def swap(a: Any) -> Any:
        if isinstance(a, torch.device) and not devices:
            return torch.device("cpu")
        return dtype if isinstance(a, torch.dtype) and a in _FLOATS else a

    for n in graph.nodes:
        copy = new.node_copy(n, lambda x: env[x])
        copy.args, copy.kwargs = map_aggregate(copy.args, swap), map_aggregate(copy.kwargs, swap)
        numbers = all(isinstance(value(i), int | torch.SymInt) for i in n.all_input_nodes)  # not a tuple of results
        made = n.op == "call_function" and is_tensor(n) and numbers
        if made and value(n).is_floating_point():
            copy.kwargs = {**copy.kwargs, "dtype": dtype}
        if copy.op == "call_method" and copy.target in _FLOAT_METHODS:
            copy.target, copy.args = "to", (*copy.args, dtype)
        if dtype.itemsize > 2 and copy.op == "call_function":
            copy.target = _WIDE.get(copy.target, copy.target)
        env[n] = copy
    return new


class Float64(TorchFunctionMode):
    """Replaces floating dtypes by float64 in code that is not a graph."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        swap = lambda a: torch.float64 if isinstance(a, torch.dtype) and a in _FLOATS else a  # noqa: E731
        if getattr(func, "__name__", "") in _FLOAT_METHODS:
            func = torch.Tensor.double
        func = _WIDE.get(func, func)
        return func(*map(swap, args), **{k: swap(v) for k, v in (kwargs or {}).items()})


def evaluate(graph: Graph, inputs: list[Any], env: dict[Node, Any] | None = None) -> Any:
    """Run a graph of placeholders, functions and methods. If `env` is given, it gets the value of every node."""
    last = {i: n for n in graph.nodes for i in n.all_input_nodes} if env is None else {}
    env = {} if env is None else env
    remaining = iter(inputs)
    load = lambda a: env[a] if isinstance(a, Node) else a  # noqa: E731
    for n in graph.nodes:
        if n.op == "placeholder":
            env[n] = next(remaining)
            continue
        if n.op == "output":
            return mapped(n.args[0], load)
        env[n] = evaluate_node(n, load)
        for i in n.all_input_nodes:
            if last.get(i) is n:
                del env[i]
    return None


def evaluate_node(node: Node, load: Callable[[Any], Any]) -> Any:
    """Run one function or method. `load` turns a node into its value and returns everything else unchanged."""
    args, kwargs = arguments(node, load)
    if node.op == "call_function":
        return node.target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    raise TypeError(f"cannot evaluate a node of kind {node.op}")


def arguments(node: Node, load: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node. `load` is as in `evaluate_node`."""
    return mapped(node.args, load), mapped(node.kwargs, load)


def mapped(a: Any, f: Any) -> Any:
    """map_aggregate that returns plain tuples, lists, dicts and slices."""
    if isinstance(a, tuple):
        return tuple(mapped(x, f) for x in a)
    if isinstance(a, list):
        return [mapped(x, f) for x in a]
    if isinstance(a, dict):
        return {k: mapped(v, f) for k, v in a.items()}
    if isinstance(a, slice):
        return slice(mapped(a.start, f), mapped(a.stop, f), mapped(a.step, f))
    return f(a)


def hint(size: Any, bound: dict[Any, int] | None = None) -> int:
    """The number that a symbolic size has at compile time, or that it has if its symbols are `bound` to other numbers.

    Raises:
        Refused: the size is known only when the graph runs, such as the number of elements that a mask selects.
    """
    if isinstance(size, int):
        return int(size)
    number = size.node.expr.subs(bound) if bound else size.node.hint
    if number is None:
        raise Refused(f"Sizes must be known before the graph runs, found {size}.")
    return int(number)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread. A proof has thousands of tiny ops, for which starting threads takes longer than the ops."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
