"""constants: symbols that have the same value in every call become numbers.

With dynamic=True sizes and floats are traced as symbols. That is right for lengths and the number of sequences. But the heads of
a state are symbols too, although guards say that they equal a size of weights, and so is the eps of a norm, an attribute of a
module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from gdnfuse import compat
from gdnfuse.rewrite.graph import is_plain, op_name, value


def make_numbers(gm: GraphModule) -> bool:
    """Replace sizes whose values guards have fixed, and the model's own floats, by numbers. For the floats this adds guards.

    Values keep their memory, so views of them stay views. Returns whether anything was changed.
    """
    found = False
    for node in list(gm.graph.nodes):
        v = value(node)
        if isinstance(v, torch.SymInt | torch.SymFloat):
            if (number := _number(node, v)) is not None:
                found = True
                for user in [u for u in node.users if u.op != "output"]:  # results keep their kind
                    swap = lambda a, old=node, new=number: new if a is old else a  # noqa: E731
                    user.args, user.kwargs = map_aggregate(user.args, swap), map_aggregate(user.kwargs, swap)
                if node.op != "placeholder" and not node.users:
                    gm.graph.erase_node(node)
        elif isinstance(v, list | tuple):
            node.meta["example_value"] = type(v)(map(_sized, v)) if type(v) in (list, tuple) else v
        else:
            node.meta["example_value"] = sized = _sized(v)
            found |= sized is not v
    return found


def _number(node: Node, v: torch.SymInt | torch.SymFloat) -> int | float | None:
    """The value of a symbol, if the guards of the graph allow only one; else None."""
    if isinstance(v, torch.SymInt):
        return v.node.maybe_as_int()
    if op_name(node) == "item" and compat.of_the_model(node.args[0]):
        compat.is_number(v)
        return float(v)  # adds a guard
    return float(v.node.expr) if v.node.expr.is_number else None


def _sized(v: Any) -> Any:
    """The same fake tensor with numbers instead of symbols that have one value, in shape and strides."""
    if not isinstance(v, torch.Tensor) or not is_plain(v) or not hasattr(v, "fake_mode"):
        return v
    symbols = (*v.shape, *v.stride(), v.storage_offset())
    numbers = [s.node.maybe_as_int() if isinstance(s, torch.SymInt) else s for s in symbols]
    if all(n is None or n is s for n, s in zip(numbers, symbols, strict=True)):
        return v
    *sizes, offset = (s if n is None else n for n, s in zip(numbers, symbols, strict=True))
    with v.fake_mode, torch.no_grad():
        return v.as_strided(sizes[: v.ndim], sizes[v.ndim :], offset)
