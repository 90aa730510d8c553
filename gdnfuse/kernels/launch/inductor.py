"""How Inductor calls the ops of our kernels: it is told about them in advance, and its code does not use torch's dispatcher.

Inductor's code runs after autograd, on plain tensors of one device. There the dispatcher only unpacks the arguments of our ops
and packs them again (benchmarks/launch.py measures the cost). So that code calls `Implementation.replayed`, which is an attribute
of the op.
"""

from __future__ import annotations

from torch.fx import GraphModule

from gdnfuse import compat

REPLAYED = "gdnfuse_replayed"  # name of the attribute


def announce(gm: GraphModule) -> None:
    """Tell Inductor about the ops in a graph: the layout that their tag asks for, and by which expression to call them.

    If this version of Inductor is different inside, it calls the ops as usual.
    """
    for target in {n.target for n in gm.graph.nodes if n.op == "call_function"}:
        if getattr(target, "namespace", None) == "gdnfuse_triton":
            # The keys of Inductor's caches do not contain our version, so another version of gdnfuse may run cached code.
            name = f"torch.ops.{target}"
            compat.known_to_inductor(target, f"getattr({name}, {REPLAYED!r}, {name})")
