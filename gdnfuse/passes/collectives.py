"""collectives: an all-reduce in place becomes one whose result is read, so that what stands around it may be rewritten; two sums
of a block become one; last, small ones go through symmetric memory.

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
from gdnfuse.kernels.one_shot_all_reduce import takes
from gdnfuse.rewrite.edit import infer, inserting
from gdnfuse.rewrite.graph import is_tensor, kept_meta, op_name, same_shape, storage, value, writes

ONE_SHOT, SUM, WAIT = "gdnfuse.one_shot_all_reduce", "_c10d_functional.all_reduce", "_c10d_functional.wait_tensor"


def collectives(gm: GraphModule) -> Iterator[Node]:
    """Calls that wait for other ranks: functional collectives, and DTensors that become others."""
    for node in gm.graph.nodes:
        name = op_name(node)
        if name == ONE_SHOT or name.startswith(("_c10d_functional", "c10d.")) and not name.endswith(".wait_tensor"):
            yield node
        elif name in ("redistribute", "full_tensor"):
            yield node


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
    """Let sums over ranks of at most `most` bytes go through symmetric memory; answers how many."""
    found = [n for n in gm.graph.nodes if op_name(n) == SUM and _is_waited_for(n)]
    found = [n for n in found if n.args[1] == "sum" and not n.kwargs and takes(value(n.args[0]), most)]
    for node in found:
        (wait,) = node.users
        node.target, node.args = torch.ops.gdnfuse.one_shot_all_reduce.default, (node.args[0], node.args[2])
        node.meta["example_value"] = value(wait)
        wait.replace_all_uses_with(node)
        gm.graph.erase_node(wait)
    return len(found)


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
