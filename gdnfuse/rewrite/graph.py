"""Reading an FX graph: what a node computes, what it is a view of, what writes where. Knows nothing of GDN."""

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

# What a node that takes another's place keeps of it, for the report.
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
    # Methods of DTensors are functions that torch 2.11's Dynamo makes.
    "prim_to_local": "to_local",
    "prim_redistribute": "redistribute",
}

# Packages whose functions do what their names say, and write what ends in an underscore.
TORCH = ("torch", "_operator", "builtins", "math", "")
# The classes of what torch.ops gives.
_OVERLOAD, _PACKET = type(torch.ops.aten.add.Tensor), type(torch.ops.aten.add)
# Namespaces of registered ops that may run on any values: a proof must not call what talks to other devices or prints.
_PLAIN = ("aten", "prims", "gdnfuse")
_PLAIN_OPS = ("transformers::grouped_mm_fallback",)  # of other namespaces

# Ops whose result holds the elements of their first argument, in some order, when the number of elements is unchanged.
_VIEWS = {
    "transpose", "reshape", "view", "unsqueeze", "squeeze", "flatten", "unflatten", "contiguous", "getitem", "select",
    "narrow", "expand", "view_as", "reshape_as", "alias", "detach", "clone", "stack", "movedim", "t", "swapaxes",
}  # fmt: skip
# Views that hold part of their first argument, or several parts.
_PARTS = {"split", "chunk", "unbind", "tensor_split"}
_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as"}
_REARRANGING = _VIEWS | _PARTS
# What only reads, whatever it is given, though its result may be its input's memory or its name end in an underscore. as_strided
# is not among them: it reads memory and not elements, so that what it is given must stay as it is.
_READING = _REARRANGING | _CASTS | {
    "getattr", "real", "imag", "diagonal", "unfold", "split_with_sizes", "moveaxis", "ravel", "broadcast_to",
    "expand_as", "conj", "resolve_conj", "resolve_neg", "view_as_real", "as_tensor", "requires_grad_",
}  # fmt: skip

# Without side effects: may be dropped when nobody reads the result. Whatever is not listed stays.
PURE = _VIEWS | _CASTS | {
    "add", "sub", "mul", "div", "neg", "exp", "rsqrt", "sqrt", "pow", "square", "sum", "mean", "softplus", "sigmoid", "silu",
    "cat", "split", "chunk", "conv1d", "linear", "zeros_like", "zeros", "empty", "empty_like", "repeat_interleave", "log",
    "matmul", "clamp", "masked_fill", "sort",
}  # fmt: skip


def op_name(node: Any) -> str:
    """The one name of what a node computes: "mul" for operator.mul, torch.mul and Tensor.mul.

    What is not torch's has its namespace or package in front, "gdnfuse.x" for dialect ops, so that no name makes it torch's.
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
    """Whether a call is of one overload of an op registered with torch."""
    return isinstance(target, _OVERLOAD)


def _overloads(target: Any) -> tuple[Any, ...]:
    """Of an op registered with torch, all where it does not say which; none of a function."""
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
    """The package that a function comes from; empty for a built-in of none."""
    return (getattr(target, "__module__", None) or "").split(".")[0]


def value(node: Any) -> Any:
    """The example value Dynamo recorded: a FakeTensor, a SymInt, a tuple of them; plain numbers are their own value."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("example_value"), torch.Tensor)


def is_plain(tensor: Any) -> bool:
    """Whether a tensor is its storage, and nothing that holds or means something else (quantized, distributed, sparse)."""
    known = type(tensor) in (torch.Tensor, torch.nn.Parameter) or isinstance(tensor, torch.Tensor) and compat.is_fake(tensor)
    return known and _address(tensor) is not None


def _address(tensor: torch.Tensor) -> int | None:
    try:
        return compat.memory_of(tensor)
    except NotImplementedError:  # sparse, or of an axis that vmap hides
        return None


def same(a: Any, b: Any) -> bool:
    """a == b is known without a guard."""
    return compat.known_true(a == b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def source(node: Any) -> Node | None:
    """The node whose elements, all of them and no others, this one holds up to order, shape and dtype; None if there is none."""
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
    """The node, what it is a view or cast of, and so on to the node that computes the elements."""
    nodes = [node]
    while (inner := source(nodes[-1])) is not None:
        nodes.append(inner)
    return nodes


def peel(node: Any) -> Any:
    """The end of `chain`; numbers pass through."""
    return chain(node)[-1] if isinstance(node, Node) else node


def real_users(node: Node) -> Iterator[Node]:
    """Users of a node's elements, seen through views and casts."""
    for user in node.users:
        if source(user) is node:
            yield from real_users(user)
        else:
            yield user


def storage(node: Any) -> int | None:
    """Identity of the memory a tensor node lives in; views of one tensor share it. None for what has no memory of that kind."""
    return _address(node.meta["example_value"]) if is_tensor(node) else None


def held(node: Any) -> set[int]:
    """Storages that may be reached through a node: its tensor's, those of several, or, of a value that nobody knows, those of all
    that it was made of."""
    if not isinstance(node, Node):
        return set()
    v = value(node)
    found = set() if v is None else {_address(t) for t in tensors_of(v)}
    if (v is None or None in found) and node.op in ("call_function", "call_method", "call_module"):
        found = found.union(*map(held, node.all_input_nodes))
    return found - {None}


def writes(node: Node) -> set[int]:
    """Storages this node may write. Generous: what is not known to be a pure op or a view counts as writing what it could."""
    if node.op not in ("call_function", "call_method"):
        return set() if node.op in ("placeholder", "get_attr", "output") else _held(node.all_input_nodes)
    name, target = op_name(node), node.target
    if overloads := _overloads(target):
        return set().union(*(_held(_marked(overload, node)) for overload in overloads))
    if name == "embedding" and (node.args[3] if len(node.args) > 3 else node.kwargs.get("max_norm")) is not None:
        return _held(node.all_input_nodes)  # it scales rows of its weight
    if node.kwargs.get("out") is not None:
        return _held([node.kwargs["out"]])
    # operator.and_ and or_ have their underscore from the keywords of Python.
    in_place = name.endswith("_") and not name.endswith("__") and target not in (operator.and_, operator.or_, operator.not_)
    if foreign(node):
        return _held(node.all_input_nodes)
    if name in _READING:
        return set()
    if name == "setitem" or in_place:
        return _held(node.args[:1])
    # An op that is no view and yet returns its input's memory, as relu(x, True) does, has written it.
    return {storage(node)} & _held(node.all_input_nodes) if is_tensor(node) else set()


def _marked(overload: Any, node: Node) -> list[Any]:
    """The arguments of a call that its schema says are written; all where it cannot be asked."""
    if (written := _written(overload)) is None:
        return node.all_input_nodes
    found = [node.args[i] for i, _ in written if i is not None and i < len(node.args)]
    return found + [node.kwargs[name] for _, name in written if name in node.kwargs]


def _held(nodes: Sequence[Any]) -> set[int]:
    """Of nodes, and of those in lists."""
    leaves = nodes if all(isinstance(n, Node) for n in nodes) else compat.tree_leaves(list(nodes))
    return {s for n in leaves for s in held(n)}


def foreign(node: Node) -> bool:
    """Whether a call is of code that is neither torch's nor Python's own, and no op of the dialect: a function or op of somebody
    else's, one that takes functions, or a method of something that is no tensor."""
    target = node.target
    if overloads := _overloads(target):
        return overloads[0].namespace not in _PLAIN and overloads[0].name().split(".")[0] not in _PLAIN_OPS
    if isinstance(target, str):
        return bool(node.args) and isinstance(node.args[0], Node) and value(node.args[0]) is None
    return compat.is_higher_order(target) or _package(target) not in TORCH


def remove_dead(graph: Graph) -> None:
    """Drop pure nodes nobody reads."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "call_method"):
            name = op_name(node)
            if (name in PURE or name.startswith("gdnfuse.")) and not writes(node):
                graph.erase_node(node)


def is_cast(node: Node) -> bool:
    """Whether a node has its first argument's elements in another dtype."""
    return op_name(node) in _CASTS


def rearranges(node: Node) -> bool:
    """Whether a call's elements are its arguments' and nothing else: views, parts, and tensors beside each other."""
    return node.op in ("call_function", "call_method") and (op_name(node) in _REARRANGING or op_name(node) == "cat")


def computes(node: Node) -> bool:
    """Whether a call needs a kernel: it is no view and makes elements in memory that none of its inputs has, or writes to theirs.

    A cast to the dtype that a tensor has needs none, nor does memory that is only reserved. Views are told by name, because a
    node's example value may be older than a rewrite of what it is a view of; a reshape that has to copy counts as a view.
    """
    name = op_name(node)
    gather = name == "getitem" and any(map(is_tensor, node.all_input_nodes[1:]))
    view = name in _REARRANGING and name not in ("stack", "contiguous", "clone") and not gather
    if node.op not in ("call_function", "call_method") or view or name in ("empty", "empty_like"):
        return False
    return not held(node) <= _held(node.all_input_nodes) or bool(writes(node))


def tensors_of(v: Any) -> list[torch.Tensor]:
    """The tensors of an example value: itself, or those in it."""
    if isinstance(v, torch.Tensor):  # nearly always, and a tree takes longer to look at than all else here
        return [v]
    return [t for t in compat.tree_leaves(v) if isinstance(t, torch.Tensor)]


def calls(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op in ("call_function", "call_method", "call_module")]


def module_stack(node: Node) -> list[str]:
    """Paths of the modules a node was traced in, outermost first: "(root)", …, "model.layers.0.linear_attn"."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(dict.fromkeys(["(root)", *(clean_path(entry[0]) for entry in stack.values())]))


@functools.cache
def clean_path(path: str) -> str:
    """A module path of Dynamo's ("L['self']._modules['model']…", "L['self'].layers[0]") with dots; "(root)" if empty."""
    for old, new in (("['", "."), ("']", ""), ("[", "."), ("]", ""), ("._modules", ""), ("._parameters", ""), ("._buffers", "")):
        path = path.replace(old, new)
    for itself in ("._old_forward.__self__", ".forward.args.0"):  # under a hook of accelerate
        path = path.replace(itself, "")
    parts = [p for p in path.split(".") if p]
    if "__self__" in parts:  # a bound method: the module follows
        parts = parts[parts.index("__self__") + 1 :]
    if parts[:3] == ["L", "args", "0"]:  # self, where a decorator of forward takes it: transformers 5.24's does
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
    """The line of the model's code that a node was traced from; None where Dynamo recorded no stack.

    That is the innermost frame in the file that most of the modules around the node are from, torch's own left out: not the line
    of a cache, an attention function or an activation that the model's code called.
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
