"""How Inductor calls the ops behind our kernels: announced before it meets them, and past torch's dispatcher.

Inductor's code runs behind autograd, on plain tensors of one device, where all that the dispatcher does for an op of ours is to
take its arguments apart and to put them together again (benchmarks/launch.py has what that costs). So that code calls the
function behind the op, `Implementation.replayed`, which the op carries as an attribute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

REPLAYED = "gdnfuse_replayed"  # the attribute


def announce(gm: GraphModule) -> None:
    """Tell Inductor of the ops in a graph, with the layout their tag asks for, and by which name to call them.

    For an op it has not heard of torch 2.11 makes a message that prints all the op depends on, again for each path to it, which
    takes longer than the rest of its compilation of a decode step.
    """
    from torch._inductor.lowering import constrain_to_fx_strides, lowerings, make_fallback

    for target in {n.target for n in gm.graph.nodes if n.op == "call_function"}:
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "gdnfuse_triton" and target not in lowerings:
            make_fallback(target, layout_constraint=constrain_to_fx_strides, warn=False)
            lowerings[target] = _past_the_dispatcher(target, lowerings[target])


def _past_the_dispatcher(target: Any, lowering: Callable[..., Any]) -> Callable[..., Any]:
    from torch._inductor.ir import FallbackKernel
    from torch._inductor.virtualized import V

    target_name = f"torch.ops.{target}"

    @functools.wraps(lowering)
    def lowered(*args: Any, **kwargs: Any) -> Any:
        known = len(V.graph.operations)
        results = lowering(*args, **kwargs)
        if not V.graph.cpp_wrapper:
            for made in V.graph.operations[known:]:
                if isinstance(made, FallbackKernel) and made.op_overload is target:
                    # Inductor keeps its code in caches whose keys know nothing of us: another version of us may run it.
                    made.python_kernel_name = f"getattr({target_name}, {REPLAYED!r}, {target_name})"
        return results

    return lowered
