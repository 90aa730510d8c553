"""collectives: an all-reduce in place becomes one whose result is read, so that what stands around it may be rewritten; two sums
of a block become one; last, small ones go through symmetric memory, with the residual and the norm behind them.

`dist.all_reduce(x)` is traced as t = all_reduce(x); w = wait_tensor(t); x.copy_(w), and whoever reads x then reads what was
written into another op's memory. Where nobody else looks at that memory, they read w.

Another rank waits for each collective, so whatever else changes them is decided by what is the same on all ranks: the calls of
the graph, sizes and options, and never by what a weight or its memory is like on one of them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from gdnfuse import compat
from gdnfuse.dialect import rms_norm
from gdnfuse.kernels.one_shot_all_reduce import takes, takes_norm
from gdnfuse.rewrite.edit import infer, inserting
from gdnfuse.rewrite.graph import is_tensor, kept_meta, op_name, same_shape, source, storage, value, writes

ONE_SHOT, ONE_SHOT_NORM = "gdnfuse.one_shot_all_reduce", "gdnfuse.one_shot_add_rms_norm"
SUM, WAIT = "_c10d_functional.all_reduce", "_c10d_functional.wait_tensor"


def collectives(gm: GraphModule) -> Iterator[Node]:
    """Calls that wait for other ranks: functional collectives, and DTensors that become others."""
    for node in gm.graph.nodes:
        name = op_name(node)
        if name.startswith(("_c10d_functional", "c10d.")) and not name.endswith(".wait_tensor"):
            yield node
        elif name in (ONE_SHOT, ONE_SHOT_NORM, "redistribute", "full_tensor"):
            yield node


def sent(gm: GraphModule) -> list[str]:
    """What a graph sends to other ranks, in order: each collective with the sizes and dtype of its result."""
    found = [(op_name(n), value(n)) for n in collectives(gm)]
    sizes = lambda x: [n if isinstance(n, int) else "any" for n in x.shape]  # noqa: E731  ranks may name symbols differently
    return [f"{name} {sizes(x)} {x.dtype}" if isinstance(x, torch.Tensor) else name for name, x in found]


def out_of_place(gm: GraphModule) -> None:
    """x.copy_(wait_tensor(all_reduce(x))) goes, and who read x behind it reads the result, where nobody could tell."""
    found = [n for n in gm.graph.nodes if op_name(n) == "copy_" and _in_place(n)]
    if not found:
        return
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    homes: dict[int | None, list[Node]] = {}
    for n in order:
        homes.setdefault(storage(n), []).append(n)
    for copy in found:
        x, result = copy.args[:2]
        home = storage(x)
        here = [n for n in homes[home] if n is not copy and not compat.is_erased(n)]
        # Views of x from before the copy would show what it wrote, so nobody may read them behind it.
        before = [n for n in here if order[n] < order[copy]]
        views = any(n is not x and any(order[u] > order[copy] for u in n.users) for n in before)
        written = any(home in writes(u) for n in (*here, copy) for u in n.users if u is not copy)
        if views or written or not all(n.op.startswith("call_") for n in here):
            continue
        if value(result).dtype != value(x).dtype or not same_shape(value(result).shape, value(x).shape):
            continue  # the copy casts or broadcasts
        for reader in [u for u in x.users if order[u] > order[copy]]:
            reader.replace_input_with(x, result)
        copy.replace_all_uses_with(result)
        gm.graph.erase_node(copy)
        for view in [n for n in here if order[n] > order[copy]]:
            view.meta["example_value"] = infer(view)
            homes.setdefault(storage(view), []).append(view)
            homes[home].remove(view)


def join_sums(gm: GraphModule) -> int:
    """Σ a + g · Σ b becomes Σ (a + g · b): one sum over ranks for routed experts and the shared one; answers how many.

    g must be the same on all ranks: the sigmoid of a linear whose weight every rank has whole, as a shared expert's gate is.
    """
    found = 0
    for add in [n for n in gm.graph.nodes if op_name(n) == "add" and len(n.args) == 2 and not n.kwargs]:
        for one, product in (add.args, add.args[::-1]):
            if (parts := _gated(product)) is None or (a := _summed(one)) is None:
                continue
            b, scaled = parts
            if a is b or a.args[1:] != b.args[1:] or not same_shape(value(one).shape, value(product).shape):
                continue
            (wait,) = a.users
            with inserting(gm.graph, add.prev):
                operands = tuple(b.args[0] if x is scaled else x for x in product.args)
                total = gm.graph.call_function(operator.add, (a.args[0], gm.graph.call_function(operator.mul, operands)))
            for new in (total.args[1], total):
                new.meta.update(kept_meta(add), example_value=infer(new))
            a.args = (total, *a.args[1:])
            add.prepend(a)
            add.prepend(wait)
            add.replace_all_uses_with(wait)
            for old in (add, product, scaled, b):
                gm.graph.erase_node(old)
            found += 1
            break
    return found


def _summed(wait: Any) -> Node | None:
    """The sum over ranks that a node waits for, if nobody else reads either."""
    if not isinstance(wait, Node) or op_name(wait) != WAIT or len(wait.users) != 1:
        return None
    node = wait.args[0]
    good = op_name(node) == SUM and _is_waited_for(node) and node.args[1:2] == ("sum",) and not node.kwargs
    return node if good else None


def _gated(product: Any) -> tuple[Node, Node] | None:
    """Of a product of a gate and a sum over ranks, that nobody else reads: the sum, and who waits for it."""
    if not isinstance(product, Node) or op_name(product) != "mul" or len(product.args) != 2 or len(product.users) != 1:
        return None
    for gate, wait in (product.args, product.args[::-1]):
        if (node := _summed(wait)) is not None and _is_gate(gate) and same_shape(value(product).shape, value(wait).shape):
            return node, wait
    return None


def _is_gate(gate: Any) -> bool:
    if not isinstance(gate, Node) or op_name(gate) != "sigmoid" or op_name(gate.args[0]) != "linear":
        return False
    weight = gate.args[0].args[1]
    return weight.op == "placeholder" and "gdnfuse_inner" not in weight.meta and not compat.is_sharded(value(weight))


def one_shot(gm: GraphModule, most: int) -> int:
    """Let sums over ranks of at most `most` bytes go through symmetric memory; answers how many.

    A residual that is added to the sum goes with it, and so does a norm of that, which a linear has not taken. A rank that finds
    neither still sends the others the same.
    """
    found = [n for n in gm.graph.nodes if op_name(n) == SUM and _is_waited_for(n)]
    found = [n for n in found if n.args[1] == "sum" and not n.kwargs and takes(value(n.args[0]), most)]
    for node in found:
        (wait,) = node.users
        (x, _, group), behind = node.args, _residual_sum(node, wait)
        add, residual = behind[-1], _other(behind)
        norm = None if residual is None else _norm(node, add)
        with inserting(gm.graph, node):
            if not same_shape(value(x).shape, value(add).shape):
                x = gm.graph.call_method("reshape", (x, tuple(value(add).shape)))
                x.meta.update(kept_meta(node), example_value=infer(x))
            if norm is None:
                args = (x, group, residual) if residual is not None else (x, group)
                parts = [gm.graph.call_function(torch.ops.gdnfuse.one_shot_all_reduce.default, args)]
            else:
                bound = rms_norm.op.bind(norm.args, norm.kwargs)
                args = (x, residual, bound["weight"], bound["eps"], bound["offset"], group)
                both = gm.graph.call_function(torch.ops.gdnfuse.one_shot_add_rms_norm.default, args)
                both.meta.update(kept_meta(node), example_value=infer(both))
                parts = [gm.graph.call_function(operator.getitem, (both, i)) for i in range(2)]
            for part in parts:
                part.meta.update(kept_meta(node), example_value=infer(part))
        for old, part in zip((add, norm), parts, strict=False):
            old.replace_all_uses_with(part)
        for old in (*([norm] if norm is not None else []), *reversed(behind), node):
            gm.graph.erase_node(old)
    return len(found)


def adds_up(node: Node, x: Node) -> bool:
    """Whether a node sums up x over ranks and takes it in parts too."""
    place = {ONE_SHOT: 2, ONE_SHOT_NORM: 1}.get(op_name(node), len(node.args))
    residual = node.args[place] if place < len(node.args) else None
    return residual is not None and node.args[0] is x and residual is not x


def _residual_sum(node: Node, wait: Node) -> list[Node]:
    """From the wait for a sum over ranks to its sum with a residual, by way of views; the wait alone where there is none.

    The residual must be there before the sum over ranks, and nobody may write it until it is added.
    """
    behind = [wait]
    while len(behind[-1].users) == 1:
        (reader,) = behind[-1].users
        behind.append(reader)
        if source(reader) is not behind[-2] or value(reader).dtype != value(wait).dtype:
            break
    add, residual = behind[-1], _other(behind)
    good = residual is not None and residual is not behind[-2] and not add.kwargs
    if not good or not all(value(n).dtype == value(wait).dtype for n in (add, residual)):
        return [wait]
    same = same_shape(value(residual).shape, value(add).shape) and value(add).numel() == value(wait).numel()
    return behind if same and _undisturbed(node, add, residual) else [wait]


def _other(behind: list[Node]) -> Node | None:
    """What the last of these nodes adds to the one before."""
    *before, add = behind
    if not before or op_name(add) != "add" or len(add.args) != 2:
        return None
    return next((x for x in add.args if is_tensor(x) and x is not before[-1]), None)


def _norm(node: Node, add: Node) -> Node | None:
    """The norm of a sum with a residual that may be computed with it."""
    for norm in add.users:
        if op_name(norm) == "gdnfuse.rms_norm" and takes_norm(value(add)):
            bound = rms_norm.op.bind(norm.args, norm.kwargs)
            if bound["x"] is add and _undisturbed(node, norm, bound["weight"], add):
                return norm
    return None


def _undisturbed(first: Node, last: Node, *read: Node) -> bool:
    """Whether what is read at one node may be read at an earlier one: it is there by then, and written by nobody in between."""
    node, homes = first.next, {storage(n) for n in read}
    while node is not last:
        if node in read[:1] or not homes.isdisjoint(writes(node)):
            return False
        node = node.next
    return True


def _is_waited_for(node: Node) -> bool:
    """Whether its result is read by nobody but a wait."""
    return len(node.users) == 1 and op_name(next(iter(node.users))) == WAIT and is_tensor(node.args[0])


def _in_place(copy: Node) -> bool:
    """Whether a copy writes the result of an all-reduce over what was reduced."""
    if len(copy.args) != 2 or copy.kwargs or not all(map(is_tensor, copy.args)):
        return False
    x, wait = copy.args
    if op_name(wait) != WAIT or not isinstance(wait.args[0], Node):
        return False
    reduce = wait.args[0]
    return op_name(reduce) == SUM and reduce.args[0] is x and storage(wait) != storage(x)
