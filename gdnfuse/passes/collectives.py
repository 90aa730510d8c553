"""collectives: an all-reduce in place becomes one whose result is read, so that what stands around it may be rewritten.

`dist.all_reduce(x)` is traced as t = all_reduce(x); w = wait_tensor(t); x.copy_(w), and whoever reads x then reads what was
written into another op's memory. Where nobody else looks at that memory, they read w. Which collectives there are, their operands
and their order stay as they came: another rank waits for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from gdnfuse import compat
from gdnfuse.rewrite.edit import infer
from gdnfuse.rewrite.graph import is_tensor, op_name, same_shape, storage, value, writes


def collectives(gm: GraphModule) -> Iterator[Node]:
    """Calls that wait for other ranks: functional collectives, and DTensors that become others."""
    for node in gm.graph.nodes:
        name = op_name(node)
        if name.startswith(("_c10d_functional", "c10d.")) and not name.endswith(".wait_tensor"):
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


def _in_place(copy: Node) -> bool:
    """Whether a copy writes the result of an all-reduce over what was reduced."""
    if len(copy.args) != 2 or copy.kwargs or not all(map(is_tensor, copy.args)):
        return False
    x, wait = copy.args
    if op_name(wait) != "_c10d_functional.wait_tensor" or not isinstance(wait.args[0], Node):
        return False
    reduce = wait.args[0]
    return op_name(reduce) == "_c10d_functional.all_reduce" and reduce.args[0] is x and storage(wait) != storage(x)
