"""Editing an FX graph: new nodes with their example values, and records of what was done. Knows nothing of GDN."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, Proxy

from gdnfuse import compat
from gdnfuse.report.records import Record, Status
from gdnfuse.rewrite.evaluate import arguments, evaluate_node
from gdnfuse.rewrite.graph import held, is_overload, is_tensor, module_stack, op_name, origin, storage, value


def recorded(name: str, stage: str, node: Node, equation: str) -> Record:
    """A record of a rule that fires at a node, with the node's place for the report."""
    place = {"modules": module_stack(node), "block": node.meta.get("gdnfuse_block", ""), "source": origin(node)}
    return Record(name, stage, Status.FIRED, node.name, equation, **place)


@contextlib.contextmanager
def inserting(graph: Graph, after: Node) -> Iterator[None]:
    """Place nodes that are made inside the block after a node. If the block raises, they are removed."""
    following = after.next
    with graph.inserting_before(following):
        try:
            yield
        except BaseException:
            while following.prev is not after:
                graph.erase_node(following.prev)
            raise


def call(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the overload of a dialect op on tensors. If an argument is a Proxy, the call is recorded instead."""
    for a in (*args, *kwargs.values()):
        for x in a if isinstance(a, list | tuple) else (a,):
            if isinstance(x, Proxy):
                return x.tracer.create_proxy("call_function", target, args, kwargs)
    return target(*args, **kwargs)


def returned(node: Node) -> bool:
    """Whether the graph returns the node or a view of it."""
    return any(u.op == "output" or storage(node) in held(u) and returned(u) for u in node.users)


def infer(node: Node) -> Any:
    """The example value of a node, computed from those of its arguments, without guards."""
    tensors = [value(n) for n in node.all_input_nodes if is_tensor(n)]
    mode = next((t.fake_mode for t in tensors if hasattr(t, "fake_mode")), None)
    with mode if mode is not None else torch.no_grad(), torch.no_grad():
        if mode is not None and is_overload(node.target) and op_name(node).startswith("gdnfuse."):
            return compat.fake_result(node.target, *arguments(node, value))
        try:
            return evaluate_node(node, value)
        except RuntimeError:
            with compat.python_dispatcher():
                return evaluate_node(node, value)


def quiet_shapes(gm: GraphModule) -> Any:
    """Do not add guards inside the block. Looking at symbolic shapes must not add any to what the user compiled."""
    for n in gm.graph.nodes:
        mode = getattr(value(n), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return compat.without_guards(mode)
    return torch.no_grad()
