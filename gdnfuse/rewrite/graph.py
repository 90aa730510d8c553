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
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

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
}

# Ops whose result holds the elements of their first argument, in some order, when the number of elements is unchanged.
_VIEWS = {
    "transpose", "reshape", "view", "unsqueeze", "squeeze", "flatten", "unflatten", "contiguous", "getitem", "select",
    "narrow", "expand", "view_as", "reshape_as", "alias", "detach", "clone", "stack", "movedim", "t", "swapaxes",
}  # fmt: skip
# Views that hold part of their first argument, or several parts.
_PARTS = {"split", "chunk", "unbind", "tensor_split"}
_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as"}
_REARRANGING = _VIEWS | _PARTS
_READING = _REARRANGING | _CASTS  # what only reads, whatever it is given

# Without side effects: may be dropped when nobody reads the result. Whatever is not listed stays.
_PURE = _VIEWS | _CASTS | {
    "add", "sub", "mul", "div", "neg", "exp", "rsqrt", "sqrt", "pow", "square", "sum", "mean", "softplus", "sigmoid", "silu",
    "cat", "split", "chunk", "conv1d", "linear", "zeros_like", "zeros", "empty", "empty_like", "repeat_interleave", "log",
    "matmul",
}  # fmt: skip


def op_name(node: Any) -> str:
    """The one name of what a node computes: "mul" for operator.mul, torch.mul and Tensor.mul; "gdnfuse.x" for dialect ops."""
    if not isinstance(node, Node):
        return type(node).__name__
    if node.op not in ("call_function", "call_method"):
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _overload_name(target)
    name = target if isinstance(target, str) else getattr(target, "__name__", None) or str(target)
    return SYNONYMS.get(name, name)


@functools.cache
def _overload_name(target: torch._ops.OpOverload) -> str:
    namespace, name = target._schema.name.split("::")
    return name if namespace == "aten" else f"{namespace}.{name}"


def value(node: Any) -> Any:
    """The example value Dynamo recorded: a FakeTensor, a SymInt, a tuple of them; plain numbers are their own value."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("example_value"), torch.Tensor)


def is_plain(tensor: Any) -> bool:
    """Whether a tensor is its storage, no subclass that holds or means something else (quantized, distributed)."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter, FakeTensor)


def same(a: Any, b: Any) -> bool:
    """a == b is known without a guard."""
    return bool(statically_known_true(a == b))


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
    """Identity of the memory a tensor node lives in; views of one tensor share it."""
    return node.meta["example_value"].untyped_storage()._cdata if is_tensor(node) else None


def writes(node: Node) -> set[int]:
    """Storages this node may write. Generous: what is not known to be a pure op or a view counts as writing what it could."""
    if node.op not in ("call_function", "call_method"):
        return set() if node.op in ("placeholder", "get_attr", "output") else _storages(node.all_input_nodes)
    name, target = op_name(node), node.target
    if isinstance(target, torch._ops.OpOverload):
        arguments = target._schema.arguments
        marked = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
        found = [x for x, w in zip(node.args, marked, strict=False) if w]
        found += [node.kwargs[a.name] for a, w in zip(arguments, marked, strict=True) if w and a.name in node.kwargs]
        return _storages(found)
    if name == "embedding" and (node.args[3] if len(node.args) > 3 else node.kwargs.get("max_norm")) is not None:
        return _storages(node.all_input_nodes)  # it scales rows of its weight
    if node.kwargs.get("out") is not None:
        out = node.kwargs["out"]
        return _storages(out if isinstance(out, list | tuple) else [out])
    # operator.and_ and or_ have their underscore from the keywords of Python.
    in_place = name.endswith("_") and not name.endswith("__") and target not in (operator.and_, operator.or_, operator.not_)
    if name == "setitem" or in_place:
        return _storages(node.args[:1])
    if name in _READING:
        return set()
    if not _known_module(target):
        return _storages(node.all_input_nodes)
    # An op that is no view and yet returns its input's memory, as relu(x, True) does, has written it.
    return {storage(node)} & _storages(node.all_input_nodes) if is_tensor(node) else set()


def _storages(nodes: Sequence[Any]) -> set[int]:
    """Of tensors, and of those in lists."""
    leaves = nodes if all(isinstance(n, Node) for n in nodes) else tree_leaves(list(nodes))
    return {s for n in leaves if (s := storage(n)) is not None}


def _known_module(target: Any) -> bool:
    """Whether a function or method is torch's or Python's own, and no higher-order or foreign op that may do anything."""
    module = getattr(target, "__module__", None) or ""
    foreign = isinstance(target, torch._ops.HigherOrderOperator | torch._ops.OpOverloadPacket)
    return isinstance(target, str) or (not foreign and module.split(".")[0] in ("torch", "_operator", "builtins", "math", ""))


def remove_dead(graph: Graph) -> None:
    """Drop pure nodes nobody reads."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "call_method"):
            name = op_name(node)
            if (name in _PURE or name.startswith("gdnfuse.")) and not writes(node):
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
    given = {s for n in node.all_input_nodes for s in _memory(n)}
    return not _memory(node) <= given or bool(writes(node))


def _memory(node: Node) -> set[int]:
    """Storages of what a node gives: a tensor, or several."""
    return {t.untyped_storage()._cdata for t in tensors_of(value(node))}


def tensors_of(v: Any) -> list[torch.Tensor]:
    """The tensors of an example value: itself, or those in it."""
    if isinstance(v, torch.Tensor):  # nearly always, and a tree takes longer to look at than all else here
        return [v]
    return [t for t in tree_leaves(v) if isinstance(t, torch.Tensor)]


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
    parts = [p for p in path.split(".") if p]
    if "__self__" in parts:  # a bound method: the module follows
        parts = parts[parts.index("__self__") + 1 :]
    while parts and parts[0] in ("L", "G", "self", "fn", "args", "_orig_mod"):
        parts.pop(0)
    return ".".join(parts) or "(root)"


def kept(node: Node) -> dict[str, Any]:
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
