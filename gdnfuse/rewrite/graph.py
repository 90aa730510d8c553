"""Reading an FX graph: what a node computes, what it is a view of, and what writes where. Knows nothing of GDN."""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from gdnfuse import compat
from gdnfuse.report.records import Source

# What a replacement node takes over from the original one, for the report.
KEPT = ("nn_module_stack", "stack_trace", "gdnfuse_block")

SYNONYMS = {
    "truediv": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "negative": "neg",
    "concat": "cat",
    "concatenate": "cat",
    "permute": "transpose",
    # In torch 2.11 Dynamo makes functions for methods of DTensors.
    "prim from_local": "from_local",
    "prim_to_local": "to_local",
    "prim_redistribute": "redistribute",
}

# Packages with reliable names: their functions write in place only if the name ends in an underscore.
TORCH = ("torch", "_operator", "builtins", "math", "")
# The classes of ops in torch.ops.
_OVERLOAD, _PACKET = type(torch.ops.aten.add.Tensor), type(torch.ops.aten.add)
# Namespaces of registered ops that a proof may call with any values. Other ops may talk to other devices or print.
_PLAIN = ("aten", "prims", "gdnfuse")
_PLAIN_OPS = ("transformers::grouped_mm_fallback",)  # plain ops of other namespaces

# Ops whose result has the elements of the first argument in some order, if the number of elements is the same.
_VIEWS = {
    "transpose", "reshape", "view", "unsqueeze", "squeeze", "flatten", "unflatten", "contiguous", "getitem", "select",
    "narrow", "expand", "view_as", "reshape_as", "alias", "detach", "clone", "stack", "movedim", "t", "swapaxes",
}  # fmt: skip
# Views of one or several parts of the first argument.
_PARTS = {"split", "chunk", "unbind", "tensor_split"}
_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as"}
_REARRANGING = _VIEWS | _PARTS
# Ops that only read, although their result may share memory with an input, or their name ends in an underscore. as_strided is not
# in this list: it reads memory and not elements, so its input must keep its memory layout.
_READING = _REARRANGING | _CASTS | {
    "getattr", "real", "imag", "diagonal", "unfold", "split_with_sizes", "moveaxis", "ravel", "broadcast_to",
    "expand_as", "conj", "resolve_conj", "resolve_neg", "view_as_real", "as_tensor", "requires_grad_",
}  # fmt: skip

# Ops without side effects. They may be dropped if nobody reads the result. Ops that are not listed stay.
PURE = _VIEWS | _CASTS | {
    "add", "sub", "mul", "div", "neg", "exp", "rsqrt", "sqrt", "pow", "square", "sum", "mean", "softplus", "sigmoid", "silu",
    "cat", "split", "chunk", "conv1d", "linear", "zeros_like", "zeros", "empty", "empty_like", "repeat_interleave", "log",
    "matmul", "clamp", "masked_fill", "sort",
}  # fmt: skip


def op_name(node: Any) -> str:
    """One name for what a node computes: "mul" for operator.mul, torch.mul and Tensor.mul.

    If it is not torch's, its namespace or package comes first, "gdnfuse.x" for dialect ops. So nothing is confused with torch's
    ops.
    """
    if not isinstance(node, Node):
        return type(node).__name__
    if node.op not in ("call_function", "call_method"):
        return node.op
    target = node.target
    if isinstance(target, str):
        return SYNONYMS.get(target, target)
    if _overloads(target):
        return _registered_name(target)
    name = getattr(target, "__name__", None) or str(target)
    return SYNONYMS.get(name, name) if (package := _package(target)) in TORCH else f"{package}.{name}"


def is_overload(target: Any) -> bool:
    """Whether a call is of one overload of an op that is registered with torch."""
    return isinstance(target, _OVERLOAD)


def _overloads(target: Any) -> tuple[Any, ...]:
    """The overloads of an op that is registered with torch; all if the call does not say which. Empty for a function."""
    if isinstance(target, _OVERLOAD):
        return (target,)
    return tuple(getattr(target, overload) for overload in target.overloads()) if isinstance(target, _PACKET) else ()


@functools.cache
def _registered_name(target: Any) -> str:
    namespace, name = _overloads(target)[0].name().split("::")
    name = name.split(".")[0]
    return name if namespace == "aten" else f"{namespace}.{name}"


_written = functools.cache(compat.written_by)


def _package(target: Any) -> str:
    """The package of a function. Empty for a built-in."""
    return (getattr(target, "__module__", None) or "").split(".")[0]


def value(node: Any) -> Any:
    """The example value that Dynamo recorded: a FakeTensor, a SymInt, or a tuple of them. A plain number is its own value."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("example_value"), torch.Tensor)


def is_plain(tensor: Any) -> bool:
    """Whether a tensor is just its storage: not quantized, distributed, sparse or the like."""
    known = type(tensor) in (torch.Tensor, torch.nn.Parameter) or isinstance(tensor, torch.Tensor) and compat.is_fake(tensor)
    return known and _address(tensor) is not None


def _address(tensor: torch.Tensor) -> int | None:
    try:
        return compat.memory_of(tensor)
    except NotImplementedError:  # a sparse tensor, or one with an axis that vmap hides
        return None


def same(a: Any, b: Any) -> bool:
    """Whether a == b is known without a guard."""
    return compat.known_true(a == b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def source(node: Any) -> Node | None:
    """The node with exactly the same elements, up to order, shape and dtype; None if there is none."""
    if not is_tensor(node):
        return None
    name = op_name(node)
    if name == "stack":
        tensors = node.args[0]
        inner = tensors[0] if len(tensors) == 1 else None
    elif name in _VIEWS or name in _CASTS:
        inner = node.args[0]
    else:
        return None
    if not is_tensor(inner):
        return None
    return inner if same(value(inner).numel(), value(node).numel()) else None


def chain(node: Node) -> list[Node]:
    """The node, the node that it is a view or cast of, and so on up to the node that computes the elements."""
    nodes = [node]
    while (inner := source(nodes[-1])) is not None:
        nodes.append(inner)
    return nodes


def peel(node: Any) -> Any:
    """The end of `chain`. Numbers are returned unchanged."""
    return chain(node)[-1] if isinstance(node, Node) else node


def real_users(node: Node) -> Iterator[Node]:
    """Users of a node's elements, through views and casts."""
    for user in node.users:
        if source(user) is node:
            yield from real_users(user)
        else:
            yield user


def storage(node: Any) -> int | None:
    """The identity of the memory of a tensor node. Views of one tensor share it. None if there is no such memory."""
    return _address(node.meta["example_value"]) if is_tensor(node) else None


def held(node: Any) -> set[int]:
    """Storages that may be reached through a node. For an unknown value, these are the storages of all that it was made from."""
    if not isinstance(node, Node):
        return set()
    v = value(node)
    found = set() if v is None else {_address(t) for t in tensors_of(v)}
    if (v is None or None in found) and node.op in ("call_function", "call_method", "call_module"):
        found = found.union(*map(held, node.all_input_nodes))
    return found - {None}


def writes(node: Node) -> set[int]:
    """Storages that this node may write. What is not known to be a pure op or a view counts as writing all that it could."""
    if node.op not in ("call_function", "call_method"):
        return set() if node.op in ("placeholder", "get_attr", "output") else _held(node.all_input_nodes)
    name, target = op_name(node), node.target
    if overloads := _overloads(target):
        return set().union(*(_held(_marked(overload, node)) for overload in overloads))
    if name == "embedding" and (node.args[3] if len(node.args) > 3 else node.kwargs.get("max_norm")) is not None:
        return _held(node.all_input_nodes)  # it scales rows of its weight in place in place
    if node.kwargs.get("out") is not None:
        return _held([node.kwargs["out"]])
    # operator.and_ and or_ end in an underscore only because `and` and `or` are keywords of Python.
    in_place = name.endswith("_") and not name.endswith("__") and target not in (operator.and_, operator.or_, operator.not_)
    if foreign(node):
        return _held(node.all_input_nodes)
    if name in _READING:
        return set()
    if name == "setitem" or in_place:
        return _held(node.args[:1])
    # An op that is not a view but returns the memory of its input has written it, such as relu(x, True).
    return {storage(node)} & _held(node.all_input_nodes) if is_tensor(node) else set()


def _marked(overload: Any, node: Node) -> list[Any]:
    """The arguments that a call writes according to its schema. All arguments if there is no schema."""
    if (written := _written(overload)) is None:
        return node.all_input_nodes
    found = [node.args[i] for i, _ in written if i is not None and i < len(node.args)]
    return found + [node.kwargs[name] for _, name in written if name in node.kwargs]


def _held(nodes: Sequence[Any]) -> set[int]:
    """The storages of nodes, and of nodes in lists."""
    leaves = nodes if all(isinstance(n, Node) for n in nodes) else compat.tree_leaves(list(nodes))
    return {s for n in leaves for s in held(n)}


def foreign(node: Node) -> bool:
    """Whether a call is of unknown code.

    That is a function or op that belongs neither to torch, Python nor the dialect, one that takes functions, or a method of
    something that is not a tensor.
    """
    target = node.target
    if overloads := _overloads(target):
        return overloads[0].namespace not in _PLAIN and overloads[0].name().split(".")[0] not in _PLAIN_OPS
    if isinstance(target, str):
        return bool(node.args) and isinstance(node.args[0], Node) and value(node.args[0]) is None
    return compat.is_higher_order(target) or _package(target) not in TORCH


def remove_dead(graph: Graph) -> None:
    """Drop pure nodes that nobody reads."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "call_method"):
            name = op_name(node)
            if (name in PURE or name.startswith("gdnfuse.")) and not writes(node):
                graph.erase_node(node)


def is_cast(node: Node) -> bool:
    """Whether a node has the elements of its first argument in another dtype."""
    return op_name(node) in _CASTS


def rearranges(node: Node) -> bool:
    """Whether a call only rearranges elements of its arguments: views, parts, and concatenations."""
    return node.op in ("call_function", "call_method") and (op_name(node) in _REARRANGING or op_name(node) == "cat")


def computes(node: Node) -> bool:
    """Whether a call needs a kernel: it makes new elements in new memory, or writes to memory of its inputs.

    A cast to the same dtype needs none, nor does memory that is only allocated. Views are recognised by name, because the example
    value of a node may be older than a rewrite of what it is a view of. A reshape that has to copy counts as a view.
    """
    name = op_name(node)
    gather = name == "getitem" and any(map(is_tensor, node.all_input_nodes[1:]))
    view = name in _REARRANGING and name not in ("stack", "contiguous", "clone") and not gather
    if node.op not in ("call_function", "call_method") or view or name in ("empty", "empty_like", "as_strided"):
        return False
    return not held(node) <= _held(node.all_input_nodes) or bool(writes(node))


def tensors_of(v: Any) -> list[torch.Tensor]:
    """The tensors in an example value."""
    if isinstance(v, torch.Tensor):  # the usual case; looking at a tree takes longer than everything else here
        return [v]
    return [t for t in compat.tree_leaves(v) if isinstance(t, torch.Tensor)]


def calls(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op in ("call_function", "call_method", "call_module")]


def module_stack(node: Node) -> list[str]:
    """Paths of the modules in which a node was traced, outermost first: "(root)", …, "model.layers.0.linear_attn"."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(dict.fromkeys(["(root)", *(clean_path(entry[0]) for entry in stack.values())]))


@functools.cache
def clean_path(path: str) -> str:
    """A module path of Dynamo ("L['self']._modules['model']…", "L['self'].layers[0]") with dots; "(root)" if empty."""
    for old, new in (("['", "."), ("']", ""), ("[", "."), ("]", ""), ("._modules", ""), ("._parameters", ""), ("._buffers", "")):
        path = path.replace(old, new)
    for itself in ("._old_forward.__self__", ".forward.args.0"):  # under a hook of accelerate
        path = path.replace(itself, "")
    parts = [p for p in path.split(".") if p]
    if "__self__" in parts:  # a bound method: the module follows
        parts = parts[parts.index("__self__") + 1 :]
    if parts[:3] == ["L", "args", "0"]:  # self, if a decorator of forward takes it, as in transformers 5.24
        parts = parts[3:]
    if parts[:2] == ["L", "module"]:  # self, as accelerate's hook around a model's forward calls it
        parts = parts[2:]
    while parts and parts[0] in ("L", "G", "self", "fn", "args", "_orig_mod"):
        parts.pop(0)
    return ".".join(parts) or "(root)"


def kept_meta(node: Node) -> dict[str, Any]:
    return {k: node.meta[k] for k in KEPT if k in node.meta}


_FRAME = re.compile(r'^  File "(.+)", line (\d+), in (.+)(?:\n {4}(.*))?', re.MULTILINE)


def origin(node: Node) -> Source | None:
    """The line of the model's code from which a node was traced. None if Dynamo recorded no stack.

    This is the innermost frame in the file that most modules around the node come from, except torch's. So it is not a line of a
    cache, an attention function or an activation that the model's code calls.
    """
    classes = [entry[1] for entry in (node.meta.get("nn_module_stack") or {}).values()]
    files = Counter(filter(None, (_forward_file(c) for c in reversed(classes) if isinstance(c, type))))
    return _innermost(node.meta.get("stack_trace") or "", tuple(file for file, _ in files.most_common()))


@functools.cache
def _forward_file(module: type) -> str:
    code = getattr(inspect.unwrap(getattr(module, "forward", None)), "__code__", None)
    return "" if code is None or module.__module__.split(".")[0] == "torch" else code.co_filename


@functools.lru_cache(maxsize=4096)
def _innermost(trace: str, files: tuple[str, ...]) -> Source | None:
    frames = [Source(file, int(line), function, code.strip()) for file, line, function, code in _FRAME.findall(trace)]
    for file in files:
        if inside := [f for f in frames if f.file == file]:
            return inside[-1]
    return frames[-1] if frames else None
