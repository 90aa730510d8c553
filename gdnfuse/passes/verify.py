"""verify: compares the rewritten graph with the original one on the inputs of a real call.

A proof compares maths in float64. This compares what really runs: kernels, roundings, packed weights. Both graphs, and the
original one in a higher precision, run on copies of what they write. So nothing of the caller changes. Bits cannot be equal,
because fusing leaves roundings out. The rewritten graph must be about as near to the higher precision as the original one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from gdnfuse import compat
from gdnfuse.errors import Refused, one_line
from gdnfuse.passes.collectives import collectives
from gdnfuse.report.records import Comparison
from gdnfuse.rewrite.evaluate import hint, in_precision
from gdnfuse.rewrite.graph import op_name, storage, writes

# ours ≤ SLACK · theirs + FLOOR[dtype]. Errors of one call are random, and each output was rounded once in any case.
SLACK = 2.0
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 1e-12}
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


def verify(before: GraphModule, after: GraphModule, inputs: Sequence[Any], more: Sequence[torch.Tensor]) -> list[Comparison]:
    """Run both graphs and compare every output and every input that is written.

    Args:
        before: the original graph.
        after: the rewritten graph. Its inputs are `inputs` and `more`.
        inputs: real tensors and numbers. They are not changed.
        more: packed weights.

    Returns:
        One comparison for each output that is a tensor, and for each input that a graph writes.

    Raises:
        Refused: the graphs cannot be run here. An input is fake or on the meta device, two written inputs share memory, other
            ranks take part, or a graph raised.
    """
    if (shared := next(collectives(before), None)) is not None:
        raise Refused(f"A graph must wait for no other rank to be verified, found {op_name(shared)}.")
    for x in (*inputs, *more):
        if isinstance(x, torch.Tensor) and (compat.is_fake(x) or x.is_meta):
            raise Refused("Verifying needs the tensors of a real call, found one without data.")
    placeholders = before.graph.find_nodes(op="placeholder")
    written = _written(before, placeholders)
    dtypes = [x.dtype for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
    wider = max((WIDER.get(d, torch.float64) for d in dtypes), key=lambda d: d.itemsize, default=torch.float64)
    if any(n.op == "get_attr" for n in before.graph.nodes):
        raise Refused("Verifying needs every tensor as an input of the graph, found one that belongs to it.")
    wide = GraphModule(before, in_precision(before.graph, wider, devices=True))

    kept = {i: placeholders[i].name for i in written}
    theirs = _run(before, _copies(inputs, written), kept)
    exact = _run(wide, _copies(inputs, written, wider), kept)
    try:
        ours = _run(after, [*_copies(inputs, written), *more], kept)
    except Refused as e:
        return [Comparison(f"a run of the rewritten graph ({e.reason.rstrip('.')})", float("inf"), 0.0, False)]
    return [_compare(name, ours[name], theirs[name], exact[name]) for name in theirs]


def _written(gm: GraphModule, placeholders: list[Node]) -> list[int]:
    """Indices of the inputs that a graph writes."""
    memory = set().union(*(writes(n) for n in gm.graph.nodes))
    written = [i for i, n in enumerate(placeholders) if storage(n) in memory]
    if len({storage(placeholders[i]) for i in written}) < len(written):
        raise Refused("Verifying needs written inputs that share no memory, found two that do.")
    return written


def _copies(inputs: Sequence[Any], written: Sequence[int], dtype: torch.dtype | None = None) -> list[Any]:
    """The inputs, with copies of those that are written. With a dtype, all floating inputs are copies in that dtype."""
    copies = []
    for i, x in enumerate(inputs):
        if isinstance(x, torch.Tensor):
            x = x.detach()
            if i in written or dtype is not None and x.is_floating_point():
                copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) if i in written else x
                x = copy.to(dtype) if dtype is not None and x.is_floating_point() else copy
        copies.append(hint(x) if isinstance(x, torch.SymInt) else x)
    return copies


def _run(gm: GraphModule, arguments: list[Any], kept: dict[int, str]) -> dict[str, torch.Tensor]:
    """Outputs and written inputs by name. Grad mode and random state are restored."""
    devices = {x.device.index for x in arguments if isinstance(x, torch.Tensor) and x.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[d for d in devices if d is not None]):
            outputs = compat.tree_leaves(Interpreter(gm).run(*arguments))
    except Exception as e:
        raise Refused(f"Verifying needs graphs that run by themselves, found {one_line(e)}.") from e
    found = {f"output {i}": x for i, x in enumerate(outputs) if isinstance(x, torch.Tensor)}
    return found | {name: arguments[i] for i, name in kept.items()}


def _compare(name: str, ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> Comparison:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return Comparison(name, float("inf"), 0.0, False)
    if not theirs.is_floating_point():
        same = bool(torch.equal(ours, theirs))
        return Comparison(name, 0.0 if same else float("inf"), 0.0, same)
    # Elements that are not finite cannot be compared by distance. They must be equal in both.
    measured, never = theirs.isfinite() & exact.isfinite(), ~theirs.isfinite() & ~exact.isfinite()
    if not ours[measured].isfinite().all() or ours[never].isfinite().any():
        return Comparison(name, float("inf"), 0.0, False)
    error, eager = _error(ours[measured], exact[measured]), _error(theirs[measured], exact[measured])
    return Comparison(name, error, eager, error <= SLACK * eager + FLOOR[theirs.dtype])


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    found, exact = found.double(), exact.double()
    return float((found - exact).norm() / exact.norm().clamp_min(1e-30))
