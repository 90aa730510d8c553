"""Near misses: small edits of a real graph, each of which may or may not change what it means.

A kind of edit is a function from a graph to all edits of that kind; an edit is a function that makes it and the words for it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from gdnfuse.rewrite.edit import quiet_shapes
from gdnfuse.rewrite.evaluate import evaluate_node
from gdnfuse.rewrite.graph import is_tensor, op_name, same, same_shape, storage, value, writes


class Edit(NamedTuple):
    make: Callable[..., None]
    at: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.make.__name__}({', '.join(map(_shown, self.at))})"


def _shown(x: Any) -> str:
    return getattr(x, "__name__", str(x))


def floating(node: Any) -> bool:
    return is_tensor(node) and value(node).is_floating_point()


def _calls(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op in ("call_function", "call_method")]


def _after(node: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new call behind a node, but not among the placeholders."""
    with _behind(node):
        return node.graph.call_function(target, args, kwargs)


def _last(graph: Graph) -> Node:
    return graph.output_node().prev


def _behind(*nodes: Node) -> Any:
    """Where calls go that stand behind all of these nodes and behind the placeholders, in the order in which they are made."""
    graph = nodes[0].graph
    return graph.inserting_before(max(*nodes, graph.find_nodes(op="placeholder")[-1]).next)


def _proxy(node: Node) -> torch.fx.Proxy:
    return torch.fx.Proxy(node, torch.fx.proxy.GraphAppendingTracer(node.graph))


# Ops replaced.

OTHERS = {
    "exp": (torch.exp2, torch.expm1, torch.sigmoid),
    "sigmoid": (torch.tanh, F.silu),
    "silu": (F.gelu, F.relu, torch.sigmoid),
    "softplus": (F.relu, F.silu, F.elu),
    "rsqrt": (torch.reciprocal, torch.sqrt),
    "add": (torch.sub, torch.mul, torch.maximum),
    "sub": (torch.add, torch.rsub),
    "mul": (torch.add, torch.div, torch.sub),
    "div": (torch.mul,),
    "sum": (torch.mean, torch.amax, torch.prod),
    "mean": (torch.sum, torch.amax, torch.std),
    "neg": (torch.abs, torch.positive),
    "cos": (torch.sin,),
    "sin": (torch.cos,),
    "cumsum": (torch.cumprod,),
    "tril": (torch.triu,),
    "triu": (torch.tril,),
    "softmax": (F.softmin, F.log_softmax),
    "itruediv": (operator.mul, operator.sub, operator.truediv),
}  # fmt: skip


def another_op(graph: Graph) -> Iterator[Edit]:
    for n in _calls(graph):
        for target in OTHERS.get(op_name(n), ()):
            yield Edit(become, (n, target))
        if op_name(n) == "repeat_interleave" and len(n.args) > 1:
            yield Edit(tile, (n,))


def become(node: Node, target: Any) -> None:
    node.op, node.target = "call_function", target


def tile(node: Node) -> None:
    """Groups of heads side by side instead of each head beside its copies."""
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
    node.op, node.target, node.args, node.kwargs = "call_function", torch.cat, ([node.args[0]] * node.args[1], dim), {}


# Constants changed.

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def another_constant(graph: Graph) -> Iterator[Edit]:
    for n in _calls(graph):
        for i, old in enumerate(_leaves(n)):
            yield from (Edit(constant, (n, i, new)) for new in _near(old))


def _near(x: Any) -> tuple[Any, ...]:
    if isinstance(x, bool):
        return (not x,)
    if isinstance(x, int):
        return tuple(dict.fromkeys(y for y in (x + 1, x - 1, -x, 0) if y != x))
    if isinstance(x, float):
        return tuple(y for y in (1.5 * x, 10 * x, -x, 0.0) if y != x)
    if isinstance(x, torch.dtype):
        return tuple(d for d in DTYPES if d != x) if x in DTYPES else ()
    return {"silu": ("none",), "none": ("silu",)}.get(x, ()) if isinstance(x, str) else ()


def _leaves(node: Node) -> list[Any]:
    found: list[Any] = []
    map_aggregate((node.args, node.kwargs), lambda a: found.append(a))
    return found


def constant(node: Node, i: int, new: Any) -> None:
    count = iter(range(len(_leaves(node))))
    args, kwargs = map_aggregate((node.args, node.kwargs), lambda a: new if next(count) == i else a)
    node.args, node.kwargs = args, kwargs


def another_scale(graph: Graph) -> Iterator[Edit]:
    """Options that were not given."""
    for n in _calls(graph):
        for name, new in OPTIONS.get(op_name(n), {}).items():
            if name not in n.kwargs:
                yield Edit(option, (n, name, new))


OPTIONS = {
    "softplus": {"beta": 1.5, "threshold": 1.0},
    "scaled_dot_product_attention": {"scale": 0.3, "is_causal": True, "attn_mask": None},
    "add": {"alpha": 2.0},
    "sub": {"alpha": 2.0},
    "sum": {"dtype": torch.float64},
    "gelu": {"approximate": "tanh"},
}


def option(node: Node, name: str, new: Any) -> None:
    if node.target in (operator.add, operator.sub):
        node.target = {operator.add: torch.add, operator.sub: torch.sub}[node.target]
    node.kwargs = {**node.kwargs, name: new}


# Ops dropped and moved.


def dropped(graph: Graph) -> Iterator[Edit]:
    for n in _calls(graph):
        if is_tensor(n):
            for x in n.all_input_nodes:
                if is_tensor(x) and same_shape(value(x).shape, value(n).shape):
                    yield Edit(bypass, (n, x))


def bypass(node: Node, x: Node) -> None:
    node.replace_all_uses_with(x)


def moved(graph: Graph) -> Iterator[Edit]:
    """An eps, a scale or an offset before or behind the op that it stood behind or before."""
    for n in _calls(graph):
        if op_name(n) in ("add", "sub", "mul", "div") and len(n.args) == 2 and isinstance(n.args[1], float):
            x = n.args[0]
            yield from (Edit(later, (n, u)) for u in n.users if is_tensor(u))
            if isinstance(x, Node):
                yield from (Edit(earlier, (n, x, y)) for y in x.all_input_nodes if floating(y))


def later(node: Node, user: Node) -> None:
    node.replace_all_uses_with(node.args[0])
    new = _after(user, node.target if node.op == "call_function" else getattr(torch, op_name(node)), user, node.args[1])
    user.replace_all_uses_with(new, delete_user_cb=lambda u: u is not new)


def earlier(node: Node, x: Node, y: Node) -> None:
    node.replace_all_uses_with(x)
    new = _after(y, node.target if node.op == "call_function" else getattr(torch, op_name(node)), y, node.args[1])
    x.replace_input_with(y, new)


# Operands swapped and rewired.


def swapped(graph: Graph) -> Iterator[Edit]:
    for n in _calls(graph):
        nodes = [x for x in _leaves(n) if is_tensor(x)]
        yield from (Edit(exchange, (n, x, y)) for i, x in enumerate(nodes[:4]) for y in nodes[i + 1 : 5] if x is not y)


def exchange(node: Node, x: Node, y: Node) -> None:
    other = {x: y, y: x}
    node.args, node.kwargs = map_aggregate((node.args, node.kwargs), lambda a: other.get(a, a) if isinstance(a, Node) else a)


def inputs_swapped(graph: Graph) -> Iterator[Edit]:
    """Weights, states and caches of one shape, of two layers or of one."""
    inputs = [n for n in graph.find_nodes(op="placeholder") if floating(n)]
    for i, x in enumerate(inputs):
        yield from (Edit(trade, (x, y)) for y in inputs[i + 1 :] if same_shape(value(x).shape, value(y).shape))


def trade(x: Node, y: Node) -> None:
    users = {u for n in (x, y) for u in n.users}
    for u in users:
        exchange(u, x, y)


def rewired(graph: Graph) -> Iterator[Edit]:
    """Another tensor of the same shape, made just before or by the same op, in the place of an operand."""
    made: dict[Any, list[Node]] = {}
    for n in graph.nodes:
        for x in dict.fromkeys(n.all_input_nodes) if n.op != "output" else ():
            if is_tensor(x):
                alike = [m for m in reversed(made[_alike(x)]) if m is not x]
                same_op = [m for m in alike if op_name(m) == op_name(x)]
                yield from (Edit(rewire, (n, x, m)) for m in dict.fromkeys(alike[:3] + same_op[:3]))
        if is_tensor(n):
            made.setdefault(_alike(n), []).append(n)


def _alike(node: Node) -> Any:
    return str(value(node).shape), value(node).dtype


def rewire(node: Node, old: Node, new: Node) -> None:
    node.replace_input_with(old, new)


# Something between an operand and its reader.


def _axes(node: Node) -> list[int]:
    return list(range(value(node).ndim))


def by_its_place(x, axis):
    """Another factor for every sequence, token, head or column."""


def paired(x):
    """Pairs of sequences in another order."""


def of_one_sequence(x):
    """All sequences become the first."""


def by_its_size(x):
    """Times the number of sequences."""


def narrowed(x):
    return x.to(torch.bfloat16).float()


def scaled(x):
    return x * 1.01


def shifted(x):
    return x + 0.01


def centred(x):
    return x - x.mean(0, keepdim=True)


def contiguous(x):
    return x.contiguous()


def detached(x):
    return x.detach()


def viewed(x):
    """A view that needs contiguous memory."""
    return x.view_as(x.reshape(-1)).view_as(x)


def by_strides(x):
    """The same elements by their places in contiguous memory."""


VIEWED = (viewed, by_strides)
ANY = (scaled, shifted, torch.neg, torch.abs, F.relu, torch.clone, contiguous, detached, narrowed, by_its_size)
BATCHED = (paired, centred, of_one_sequence)
AXIS = (torch.flip, torch.roll, by_its_place, torch.cumsum)


def inserted(graph: Graph) -> Iterator[Edit]:
    for n in _calls(graph):
        for x in dict.fromkeys(n.all_input_nodes):
            if floating(x):
                yield from (Edit(insert, (n, x, f)) for f in (*ANY, *BATCHED))


def restrided(graph: Graph) -> Iterator[Edit]:
    """Views of contiguous memory where they are allowed."""
    for n in _calls(graph):
        for x in dict.fromkeys(n.all_input_nodes):
            if floating(x) and x.op != "placeholder" and all(isinstance(size, int) for size in value(x).shape):
                yield from (Edit(insert, (n, x, f)) for f in VIEWED if value(x).is_contiguous())


def along_an_axis(graph: Graph) -> Iterator[Edit]:
    for n in _calls(graph):
        for x in dict.fromkeys(n.all_input_nodes):
            if floating(x):
                sizes = value(x).shape
                yield from (Edit(insert, (n, x, f, i)) for i in _axes(x) if not same(sizes[i], 1) for f in AXIS)


def transposed(graph: Graph) -> Iterator[Edit]:
    for n in _calls(graph):
        for x in dict.fromkeys(n.all_input_nodes):
            if is_tensor(x):
                s = value(x).shape
                pairs = [(i, j) for i in _axes(x) for j in range(i) if same(s[i], s[j]) and not same(s[i], 1)]
                yield from (Edit(insert, (n, x, torch.transpose, i, j)) for i, j in pairs)


def insert(node: Node, x: Node, function: Callable[..., Any], *axes: int) -> None:
    """As the calls that it traces to, as Dynamo would have it."""
    with node.graph.inserting_before(node):
        new = _inserted(_proxy(x), value(x), function, axes)
    node.replace_input_with(x, new.node)


def _inserted(proxy: torch.fx.Proxy, x: torch.Tensor, function: Callable[..., Any], axes: tuple[int, ...]) -> torch.fx.Proxy:
    sizes = [size if isinstance(size, int) else proxy.size(i) for i, size in enumerate(x.shape)]
    axis = axes[0] if axes else 0
    if function is torch.flip:
        return torch.flip(proxy, (axis,))
    if function is torch.roll:
        return torch.roll(proxy, 1, axis)
    if function is by_its_place:
        numbers = proxy.tracer.create_proxy("call_function", torch.arange, (1, sizes[axis] + 1), {"device": x.device})
        return proxy * numbers.to(x.dtype).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    if function is paired:
        return proxy.reshape(-1, 2, *sizes[1:]).transpose(0, 1).reshape(sizes)
    if function is of_one_sequence:
        return proxy[:1].expand(sizes)
    if function is by_strides:
        return proxy.as_strided(sizes, x.stride())
    if function is by_its_size:
        return proxy * sizes[0]
    return function(proxy, *axes)


# Readers and writers.


def read(graph: Graph) -> Iterator[Edit]:
    """One more output, made where a tensor is, before it is written, or at the end."""
    last, writers = _last(graph), [(w, writes(w)) for w in _calls(graph)]
    for n in graph.nodes:
        if floating(n):
            here = [n, last, *(w.prev for w, memory in writers if w is not n and storage(n) in memory)]
            yield from (Edit(look, (n, at, how)) for at in dict.fromkeys(here) for how in READERS)


def itself(x):
    return x


def first_column(x):
    return x[..., :1]


READERS = (itself, first_column, torch.abs, scaled)


def look(node: Node, at: Node, how: Callable[[Any], Any]) -> None:
    graph = node.graph
    with _behind(at, node):
        seen = how(_proxy(node)).node
    output = graph.output_node()
    output.args = ((*output.args[0], seen),)


def written(graph: Graph) -> Iterator[Edit]:
    """One more write to a tensor or a part of it, where it is, before its last reader, or at the end."""
    last = _last(graph)
    for n in graph.nodes:
        if floating(n):
            readers = sorted(u for u in n.users if u.op != "output")
            places = dict.fromkeys([n, *(r.prev for r in readers[-1:]), last])
            yield from (Edit(write, (n, at, how)) for at in places for how in WRITERS)


def doubled(x):
    return x.mul_(2.0)


def zeroed(x):
    return x.zero_()


def rectified(x):
    return x.tracer.create_proxy("call_function", F.relu, (x,), {"inplace": True})


def first_column_doubled(x):
    return x[..., :1].mul_(2.0)


def first_row_shifted(x):
    return x[0].add_(1.0)


def made_again(x):
    return x.tracer.create_proxy("call_function", torch.mul, (x, 0.5), {"out": x})


WRITERS = (doubled, zeroed, rectified, first_column_doubled, first_row_shifted, made_again)


def write(node: Node, at: Node, how: Callable[[Any], Any]) -> None:
    with _behind(at, node):
        how(_proxy(node))


def rewritten(graph: Graph) -> Iterator[Edit]:
    """Writes moved, doubled, left out, or made to each other's tensors."""
    found = [n for n in _calls(graph) if writes(n) and is_tensor(n.args[0])]
    last = _last(graph)
    for w in found:
        yield from (Edit(move, (w, last)), Edit(move, (w, max(w.all_input_nodes))), Edit(again, (w, last)))
        if is_tensor(w):
            yield Edit(bypass, (w, w.args[0]))
            yield Edit(leave_out, (w,))
        others = [v for v in found if v is not w and is_tensor(v.args[0]) and v.args[0] is not w.args[0]]
        yield from (Edit(trade_targets, (w, v)) for v in others if same_shape(value(v.args[0]).shape, value(w.args[0]).shape))


def move(node: Node, at: Node) -> None:
    if at is not node:
        at = max(at, node.graph.find_nodes(op="placeholder")[-1])
        at.append(node)
        for user in sorted(node.users):
            if user.op != "output" and user < node:
                user.replace_input_with(node, node.args[0])


def again(node: Node, at: Node) -> None:
    with node.graph.inserting_after(at):
        node.graph.node_copy(node)


def leave_out(node: Node) -> None:
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)


def trade_targets(w: Node, v: Node) -> None:
    first, second = w.args[0], v.args[0]
    w.args, v.args = (second, *w.args[1:]), (first, *v.args[1:])


KINDS: dict[str, Callable[[Graph], Iterator[Edit]]] = {
    f.__name__: f
    for f in (
        another_op, another_constant, another_scale, dropped, moved, swapped, inputs_swapped, rewired, inserted, along_an_axis,
        transposed, restrided, read, written, rewritten,
    )
}  # fmt: skip


class Unfit(Exception):
    """An edit that makes no graph that runs."""


def apply(gm: GraphModule, edit: Edit) -> None:
    """Make an edit and give every node that it reaches the value it has now.

    Raises:
        Unfit: an operand does not exist where it is read, or an op does not take its operands.
    """
    before = {n: (n.target, n.args, n.kwargs) for n in gm.graph.nodes}
    edit.make(*edit.at)
    try:
        gm.graph.lint()
        _infer(gm, {n for n in gm.graph.nodes if before.get(n) != (n.target, n.args, n.kwargs)})
    except Exception as e:
        raise Unfit(f"{type(e).__name__}: {e}") from e


def _infer(gm: GraphModule, stale: set[Node]) -> None:
    mode = next(m for n in gm.graph.nodes if (m := getattr(value(n), "fake_mode", None)) is not None)
    with quiet_shapes(gm), mode, torch.no_grad():
        for n in gm.graph.nodes:
            if n.op in ("call_function", "call_method") and (n in stale or not stale.isdisjoint(n.all_input_nodes)):
                n.meta["example_value"] = evaluate_node(n, value)
                stale.add(n)
