"""Devices: what a graph over two GPUs is cut into, on fake tensors; what is computed is tested on what one CPU has."""

from __future__ import annotations

import operator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from gdnfuse.errors import Refused
from gdnfuse.passes import devices

A, B = torch.device("cuda", 0), torch.device("cuda", 1)


class Traced:
    """A graph as Dynamo's, of calls on fake tensors."""

    def __init__(self):
        self.mode, self.graph, self.values = FakeTensorMode(), Graph(), {}

    def given(self, name, device=A, shape=(2, 3)):
        with self.mode:
            return self._valued(self.graph.placeholder(name), torch.empty(shape, device=device))

    def call(self, target, *args, **kwargs):
        known = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["example_value"])
        with self.mode:
            if isinstance(target, str):
                return self._valued(
                    self.graph.call_method(target, args, kwargs), getattr(known[0][0], target)(*known[0][1:], **known[1])
                )
            return self._valued(self.graph.call_function(target, args, kwargs), target(*known[0], **known[1]))

    def done(self, *results):
        self.graph.output(tuple(results))
        return GraphModule(torch.nn.Module(), self.graph)

    def _valued(self, node, value):
        node.meta["example_value"] = value
        return node


def pieces(gm):
    return [(piece.device, [n.name for n in piece.nodes]) for piece in devices.cut(gm)]


def test_layers_of_a_device_stay_together():
    t = Traced()
    x, w = t.given("x"), t.given("w", B, (3, 3))
    size = t.call("numel", w)  # a number, wherever the tensor is
    a = t.call(torch.add, x, size)
    position = t.call(torch.cos, x)
    first = t.call("to", a, B), t.call("to", position, B)
    b = t.call(torch.mul, t.call(torch.matmul, first[0], w), first[1])
    again = t.call("to", position, B)  # as every layer is sent it
    c = t.call(torch.mul, b, again)
    back = t.call("to", c, A)
    found = pieces(t.done(back, t.call(torch.neg, back)))
    assert found == [
        (None, ["numel"]),
        (A, ["add", "cos"]),
        (None, ["to", "to_1"]),
        (B, ["matmul", "mul", "mul_1"]),
        (None, ["to_3"]),
        (A, ["neg"]),
    ]


def test_what_need_not_run_early_waits():
    """Angles come from another device, and layers are not cut where they meet them; but what is sent is made before."""
    t = Traced()
    x, y = t.given("x"), t.given("y")
    there = t.call("to", t.call(torch.cos, x), B)
    t.call("add_", y, 1)
    written = t.call("to", y, B)
    layer = t.call(torch.mul, x, 2)
    two = t.call(torch.chunk, layer, 2)
    angles = t.call("to", t.call(torch.mul, t.call(torch.sin, there), written), A)
    found = pieces(t.done(t.call(torch.mul, t.call(operator.getitem, two, 0), angles)))
    assert found == [
        (A, ["cos", "add_"]),
        (None, ["to", "to_1"]),
        (B, ["sin", "mul_1"]),
        (None, ["to_2"]),
        (A, ["mul", "chunk", "getitem", "mul_2"]),
    ]


def test_what_is_sent_is_what_it_was_then():
    """A write behind it, or before it, stays behind it, or before it."""
    t = Traced()
    x = t.given("x")
    early = t.call("to", x, B)
    t.call("add_", x, 1)
    late = t.call("to", x, B)
    found = pieces(t.done(early, late))
    assert found == [(None, ["to"]), (A, ["add_"]), (None, ["to_1"])]


def test_several_results_stand_where_they_are_made():
    t = Traced()
    x = t.given("x")
    two = t.call(torch.chunk, x, 2)
    sent = t.call("to", t.call(operator.getitem, two, 0), B)
    back = t.call("to", t.call(torch.neg, sent), A)
    behind = t.call(torch.mul, back, 2)
    late = t.call(operator.getitem, two, 1)
    found = pieces(t.done(behind, late))
    assert found[0] == (A, ["chunk", "getitem", "getitem_1"]) and [d for d, _ in found] == [A, None, B, None, A]


def test_what_cannot_be_handed_on_is_refused():
    t = Traced()
    x = t.given("x")
    two = t.call(torch.chunk, x, 2)
    sent = t.call("to", t.call(torch.neg, x), B)
    back = t.call("to", sent, A)
    with pytest.raises(
        Refused, match="^Tensors and numbers alone can go from one device's graph to the next, found the tuple chunk"
    ):
        devices.cut(t.done(t.call(torch.mul, back, 2), t.call(torch.cat, two)))


def test_a_joined_graph_computes_what_the_whole_does(monkeypatch):
    """On one CPU, where the second device is a name of what is made of the second input."""
    graph = Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    a = graph.call_function(torch.add, (x, 1))
    sent = graph.call_method("to", (a, "cpu"))
    b = graph.call_function(torch.mul, (sent, w))
    graph.call_method("add_", (x, b))
    graph.output((b, a, None))
    gm = GraphModule(torch.nn.Module(), graph)
    for node in graph.nodes:
        node.meta["example_value"] = torch.ones(2)
    on = {"x": A, "w": B, "add": A, "to": B, "mul": B, "add_": A}
    monkeypatch.setattr(devices, "_devices", lambda node, numbers: [on[node.name]])
    monkeypatch.setattr(devices, "on", lambda device: torch.no_grad())
    made = []
    run = devices.joined(gm, devices.cut(gm), [torch.ones(2)] * 2, lambda gm, inputs, on: made.append(on) or gm.forward)
    inputs, again = ([torch.arange(2.0), torch.full((2,), 3.0)] for _ in range(2))
    assert all(torch.equal(o, t) if t is not None else o is None for o, t in zip(run(*inputs), gm(*again), strict=True))
    assert torch.equal(inputs[0], again[0]) and made == ["cuda:0", "cuda:1"]
