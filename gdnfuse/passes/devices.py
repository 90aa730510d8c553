"""Devices: a graph over several devices comes apart into graphs of one device each, with what goes from one to another between.

Kernels, packed weights and CUDA graphs are of one device. On each device everything stays in its order, so that nothing is read
before it is written or after it was overwritten. What has tensors of two devices runs as it came, between the graphs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from gdnfuse import compat
from gdnfuse.errors import Refused
from gdnfuse.rewrite.graph import held, op_name, tensors_of, value, writes

SYMBOL = "gdnfuse_symbol"  # in the meta of an input that gives a size its name, whether or not anybody reads it


@dataclass
class Piece:
    """A part of a graph.

    Attributes:
        device: of all its tensors; None of what goes between devices.
        nodes: of the whole graph, in their order.
        inputs, outputs: nodes of the whole graph that it reads and that others read.
        gm: the part as a graph of its own, with those inputs and outputs.
    """

    device: torch.device | None
    nodes: list[Node] = field(default_factory=list)
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    gm: GraphModule = field(init=False)


def devices_of(inputs: Iterable[Any]) -> list[str]:
    """The devices of the parameters among a graph's inputs."""
    return sorted({str(x.device) for x in inputs if isinstance(x, torch.nn.Parameter)})


def cut(gm: GraphModule) -> list[Piece]:
    """The pieces of a graph, in the order in which they have to run. In the graph itself, what goes twice to a device goes once.

    Raises:
        Refused: something other than tensors and numbers goes from one piece to another.
    """
    _send_once(gm)
    found: dict[tuple[int, bool, str], Piece] = {}
    placed = _placed(gm)
    _wait(placed)
    for node, (level, device) in placed.items():
        key = level, device is None, str(device)
        found.setdefault(key, Piece(device)).nodes.append(node)
    # Of one level, what goes between devices comes behind the pieces of the devices.
    pieces = [found[key] for key in sorted(found)]
    made_by = {node: piece for piece in pieces for node in piece.nodes}
    symbols = [n for n in gm.graph.find_nodes(op="placeholder") if isinstance(value(n), torch.SymInt)]
    for piece in pieces:
        read = dict.fromkeys(
            i for n in piece.nodes for i in n.all_input_nodes if i.op != "get_attr" and made_by.get(i) is not piece
        )
        piece.inputs = list(dict.fromkeys((*symbols, *read)))
        for node in read:
            _hand_on(node, made_by.get(node))
    for node in next(iter(gm.graph.find_nodes(op="output"))).all_input_nodes:
        _hand_on(node, made_by.get(node))
    for piece in pieces:
        piece.gm = _graph_of(gm, piece, symbols)
    return pieces


def joined(
    gm: GraphModule,
    pieces: Sequence[Piece],
    inputs: Sequence[Any],
    compiled: Callable[[GraphModule, list[Any], str], Callable[..., Any]],
) -> Callable[..., list[Any]]:
    """A call like that of the whole graph.

    Args:
        gm: the whole graph.
        pieces: of it.
        inputs: its example inputs.
        compiled: makes a callable of a piece on one device, from its graph, its example inputs and the device's name.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    given = dict(zip(placeholders, inputs, strict=True))
    at = {n: i for i, n in enumerate((*placeholders, *(n for piece in pieces for n in piece.outputs)))}
    steps = []
    for piece in pieces:
        call = piece.gm.forward
        read = [given[n] if n in given else value(n) for n in piece.inputs]
        if piece.device is not None and (piece.device.type != "cpu" or devices_of(read)):  # beside GPUs a CPU has constants
            with on(piece.device):
                call = compiled(piece.gm, read, str(piece.device))
        steps.append((piece.device, call, [at[n] for n in piece.inputs]))
    results = next(iter(gm.graph.find_nodes(op="output"))).args[0]
    places = [at[n] if isinstance(n, Node) else None for n in results]

    def run(*args: Any) -> list[Any]:
        values = list(args)
        for device, call, read in steps:
            with on(device):
                values += call(*(values[i] for i in read))
        return [constant if i is None else values[i] for i, constant in zip(places, results, strict=True)]

    return run


def on(device: torch.device | None) -> contextlib.AbstractContextManager[Any]:
    """Triton launches kernels on the current device."""
    return torch.cuda.device(device) if device is not None and device.type == "cuda" else contextlib.nullcontext()


def _send_once(gm: GraphModule) -> None:
    """Every layer is sent the same positions. What nobody writes is sent to a device once, and what nobody reads not at all."""
    written = set().union(*map(writes, gm.graph.nodes))
    sent: dict[Any, Node] = {}
    for node in list(gm.graph.nodes):
        if op_name(node) != "to" or not set(_devices(node, True)) - set(_devices(node.args[0], True)):
            continue
        if not written.isdisjoint(held(node) | held(node.args[0])):
            continue
        first = sent.setdefault((node.target, node.args, tuple(node.kwargs.items())), node) if node.users else None
        if first is not node:
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)


def _placed(gm: GraphModule) -> dict[Node, tuple[int, torch.device | None]]:
    """Of each call its level and its device, None of what goes between devices. Levels run one after the other."""
    placed: dict[Node, tuple[int, torch.device | None]] = {}
    level: dict[torch.device, int] = defaultdict(int)  # of what comes next on a device
    written: dict[int, int] = defaultdict(lambda: -1)  # the last level at which a storage was
    read: dict[int, int] = defaultdict(lambda: -1)  # and at which what goes between devices has read it
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        made = [i for i in node.all_input_nodes if i in placed]
        theirs = {d for i in node.all_input_nodes for d in _devices(i, numbers=False)}
        memory = writes(node)
        if _tensors(node) or memory:
            devices = theirs | set(_devices(node, numbers=not theirs))
        else:  # numbers and sizes: where that is made which has them, or ahead of all for those of an input
            devices = {placed[i][1] for i in made} - {None}
        if len(devices) != 1:
            at = max((placed[i][0] for i in made), default=-1)
            at = max([at, *(written[s] for i in node.all_input_nodes for s in held(i))])
            if memory:
                at = max([at, *(level[d] for d in devices), *(read[s] for s in memory)])
            placed[node] = at, None
            read |= {s: max(read[s], at) for i in node.all_input_nodes for s in held(i)}
            if memory:
                level |= dict.fromkeys(devices, at + 1)
        else:
            (device,) = devices
            before = [at if d == device else at + 1 for at, d in (placed[i] for i in made)]
            numbers = {s for i in node.all_input_nodes if set(_devices(i, True)) - {device} for s in held(i)}
            at = max([level[device], *before, *(read[s] + 1 for s in memory), *(written[s] + 1 for s in numbers)])
            read |= {s: max(read[s], at) for s in numbers}  # on the CPU, by another device
            level[device] = at
            if op_name(node) == "getitem" and not _handed_on(value(node.args[0])) and made and placed[made[0]][1] == device:
                at = placed[made[0]][0]  # one of several results stands with them
            placed[node] = at, device
        written |= dict.fromkeys(memory, placed[node][0])
    return placed


def _wait(placed: dict[Node, tuple[int, torch.device | None]]) -> None:
    """Have what a device computes ahead of others without need be computed with what comes next there, so that no layer is cut
    where it meets something of another device, such as angles."""
    for device in dict.fromkeys(d for _, d in placed.values() if d is not None):
        levels = sorted({at for at, d in placed.values() if d == device})
        for this, following in itertools.pairwise(levels):
            # Of the level that follows, what goes between devices runs behind all of them, and they run in any order.
            others = [n for n, (at, d) in placed.items() if d != device and (at < following or d is not None and at == following)]
            read = {i for n in others for i in n.all_input_nodes}
            memory = set().union(*map(held, read)), set().union(*map(writes, others))
            waiting: list[Node] = []
            for node in reversed([n for n, place in placed.items() if place == (this, device)]):
                touched = held(node).union(*map(held, node.all_input_nodes))
                if node in read or not memory[0].isdisjoint(writes(node)) or not memory[1].isdisjoint(touched):
                    break
                waiting.append(node)
            placed |= dict.fromkeys(waiting, (following, device))
            # One of several results stands with them.
            there = {n for n, place in placed.items() if place == (this, device) and not _handed_on(value(n))}
            stuck = [n for n in waiting if not there.isdisjoint(n.all_input_nodes)]
            placed |= dict.fromkeys(stuck if all(op_name(n) == "getitem" for n in stuck) else waiting, (this, device))


def _devices(node: Node, numbers: bool) -> list[torch.device]:
    """Of the tensors in a node's value, without numbers on the CPU, which go with tensors of any device."""
    return [t.device for t in _tensors(node) if numbers or t.ndim or t.device.type != "cpu"]


def _tensors(node: Node) -> list[torch.Tensor]:
    return tensors_of(value(node)) if value(node) is not None else []


def _handed_on(x: Any) -> bool:
    return isinstance(x, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)


def _hand_on(node: Node, piece: Piece | None) -> None:
    if piece is None or node in piece.outputs:
        return
    if not _handed_on(value(node)):
        found = type(value(node)).__name__
        raise Refused(
            f"Tensors and numbers alone can go from one device's graph to the next, found the {found} {node.name}.", node
        )
    piece.outputs.append(node)


def _graph_of(gm: GraphModule, piece: Piece, symbols: Sequence[Node]) -> GraphModule:
    graph, env = Graph(), {}
    for node in piece.inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
        if node in symbols:
            env[node].meta[SYMBOL] = True

    def of(node: Node) -> Node:
        if node not in env:
            env[node] = graph.node_copy(node)  # what belongs to the graph itself
        return env[node]

    for node in piece.nodes:
        env[node] = graph.node_copy(node, of)
    graph.output(tuple(env[n] for n in piece.outputs))
    copy = compat.graph_module(gm, graph)
    copy.meta = dict(gm.meta)
    compat.keep_sources(env, gm, copy)
    for node in piece.inputs:
        if node.op != "placeholder":
            compat.like_an_input(copy, env[node])
    return copy
