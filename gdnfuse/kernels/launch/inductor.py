"""How Inductor calls the ops behind our kernels: announced before it meets them, and past torch's dispatcher.

Inductor's code runs behind autograd, on plain tensors of one device, where all that the dispatcher does for an op of ours is to
take its arguments apart and to put them together again (benchmarks/launch.py has what that costs). So that code calls the
function behind the op, `Implementation.replayed`, which the op carries as an attribute.
"""

from __future__ import annotations

from torch.fx import GraphModule

from gdnfuse import compat

REPLAYED = "gdnfuse_replayed"  # the attribute


def announce(gm: GraphModule) -> None:
    """Tell Inductor of the ops in a graph, with the layout their tag asks for, and by which name to call them.

    Where Inductor is another one inside, it calls them as it would have without us.
    """
    for target in {n.target for n in gm.graph.nodes if n.op == "call_function"}:
        if getattr(target, "namespace", None) == "gdnfuse_triton":
            # Inductor keeps its code in caches whose keys know nothing of us: another version of us may run it.
            name = f"torch.ops.{target}"
            compat.known_to_inductor(target, f"getattr({name}, {REPLAYED!r}, {name})")
