"""gathers: what several linears of one input gather over ranks is gathered by one collective.

A plan that shards linears by columns and reads them whole gathers each one's output, four times for a GDN layer's projections.
In a graph that Dynamo traced each is from_local(x, mesh, [Shard(-1)]).redistribute([Replicate()]).to_local(). Their outputs stand
side by side in one tensor here, which is gathered once, and each is cut out of what all ranks sent.

Another rank waits for each collective, so this is decided by calls and sizes alone: they are the same on all ranks.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.fx import GraphModule, Node

from gdnfuse import compat
from gdnfuse.rewrite.columns import ROW
from gdnfuse.rewrite.edit import infer, inserting
from gdnfuse.rewrite.graph import is_tensor, kept_meta, op_name, storage, value, writes


def join(gm: GraphModule) -> int:
    """Gather the outputs of linears of one input at once; answers how many gathers went."""
    if (ops := compat.gather_ops()) is None:
        return 0
    groups: dict[tuple[Any, ...], list[tuple[Node, Node]]] = {}
    for whole in gm.graph.nodes:
        if (found := _gathered(whole)) is not None:
            x, mesh = found
            groups.setdefault((x.args[0], mesh, value(x).dtype, tuple(map(str, value(x).shape[:-1]))), []).append((x, whole))
    gone = 0
    for (_, mesh, *_), group in groups.items():
        if len(together := _movable(gm, group)) > 1:
            _gather(gm, ops, mesh, together)
            gone += len(together) - 1
    return gone


def _gathered(whole: Node) -> tuple[Node, Any] | None:
    """Of a to_local the linear whose output it is, of all ranks side by side, and the mesh of these; or None."""
    chain = [whole]
    for name in ("to_local", "redistribute", "from_local"):
        node = chain[-1]
        if op_name(node) != name or not node.args or not isinstance(node.args[0], Node):
            return None
        if node is not whole and len(node.users) != 1:
            return None
        chain.append(node.args[0])
    _, everywhere, cut, x = chain
    if (
        op_name(x) != "linear"
        or not is_tensor(x)
        or value(x).requires_grad
        or not all(map(compat.is_sharded, map(value, chain[1:3])))
    ):
        return None
    mesh, columns = value(cut).device_mesh, value(x).shape[-1]
    if mesh.ndim != 1 or not isinstance(columns, int) or value(whole).shape[-1] != mesh.size() * columns:
        return None
    (of_ranks,), (result,) = value(cut).placements, value(everywhere).placements
    return (x, mesh) if of_ranks.is_shard(value(x).ndim - 1) and result.is_replicate() else None


def _movable(gm: GraphModule, group: list[tuple[Node, Node]]) -> list[tuple[Node, Node]]:
    """The first of a group, and those whose linears may stand behind its one: what they read is there, and the same."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    first, *others = sorted(group, key=lambda pair: order[pair[0]])
    together, written, node = [first], set(), first[0]
    for x, whole in others:
        while node is not x:
            written |= writes(node)
            node = node.next
        if all(order[n] < order[first[0]] and storage(n) not in written for n in x.all_input_nodes):
            together.append((x, whole))
    return together


def _gather(gm: GraphModule, ops: tuple[Any, Any], mesh: Any, together: list[tuple[Node, Node]]) -> None:
    (gather, wait), ranks, name = ops, mesh.size(), mesh.get_group().group_name
    for (before, _), (x, _) in itertools.pairwise(together):
        before.append(x)
    last = together[-1][0]
    with inserting(gm.graph, last):
        call = gm.graph.call_function
        nodes = [call(torch.cat, ([x for x, _ in together], -1))]
        nodes.append(call(gather, (nodes[-1], ranks, name)))
        nodes.append(call(wait, (nodes[-1],)))
        nodes.append(gm.graph.call_method("unflatten", (nodes[-1], 0, (ranks, -1))))
        of_ranks, at = nodes[-1], 0
        for x, whole in together:
            columns = value(x).shape[-1]
            for method, args in (("narrow", (-1, at, columns)), ("movedim", (0, -2)), ("flatten", (-2,))):
                nodes.append(gm.graph.call_method(method, (of_ranks if method == "narrow" else nodes[-1], *args)))
            nodes[-1].meta[ROW] = True  # ranks have parts of it, so its columns are not those that were sent, in order
            whole.replace_all_uses_with(nodes[-1])
            at += columns
    for node in nodes:
        node.meta.update(kept_meta(last), example_value=infer(node))
    for _, whole in together:
        for node in (whole, whole.args[0], whole.args[0].args[0]):
            gm.graph.erase_node(node)
