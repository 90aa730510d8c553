"""What no stage may change in a graph. It is checked after each stage. Knows nothing of GDN."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.fx import GraphModule, Node

from gdnfuse.rewrite.graph import calls, foreign, held, op_name, tensors_of, value, writes

COLLECTIVE = "_c10d_functional."  # torch's functional collectives
Versions = dict[int, int]  # number of writes to memory, by its storage


class Spec:
    """What the original graph returns, how often it writes the memory of its inputs, and which of these writes each call sees."""

    def __init__(self, gm: GraphModule):
        self.valued = {n: "example_value" in n.meta for n in calls(gm)}
        self.results = [_kind(r) for r in _results(gm)]
        self.written, self.seen = _versions(gm)

    def check(self, gm: GraphModule) -> None:
        """Check a graph after a stage.

        New calls must be torch's or the dialect's and have an example value, and no call may have lost its own. Results must be
        of the same kinds. Inputs must be written as often as before. The remaining calls must see the same writes.

        Raises:
            AssertionError: names the node that is wrong.
        """
        for n in calls(gm):
            valued = "example_value" in n.meta
            assert valued or not self.valued.get(n, True), f"{n} has no example value"
            plain = not foreign(n) or op_name(n).startswith(COLLECTIVE)
            assert n in self.valued or plain, f"{n} must be torch's or the dialect's, found {n.target}"
            self.valued[n] = valued
        for wanted, result in zip(self.results, _results(gm), strict=True):
            assert _fits(_kind(result), wanted), f"the result {result} must be {wanted}, found {_kind(result)}"
        written, seen = _versions(gm)
        wanted, found = sorted(self.written.values()), sorted(written.values())
        assert written == self.written, f"inputs must be written {wanted} times, found {found}"
        # A call that returns sizes or other numbers reads no memory, so it may be before or after a write.
        for n in (n for n in seen.keys() & self.seen.keys() if writes(n) or tensors_of(value(n))):
            wanted, found = list(self.seen[n].values()), list(seen[n].values())
            assert seen[n] == self.seen[n], f"{n} must see {wanted} writes of what it reads, found {found}"


def _versions(gm: GraphModule) -> tuple[Versions, dict[Node, Versions]]:
    """How often each input is written, and for each call that uses written inputs, how often they were written before it."""
    inputs = [n for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")]
    memory = {
        n: held(n) for n in inputs
    }  # nodes in the memory of inputs, found from the inputs on, because weights have few readers
    mine, used = set().union(*memory.values()), {}
    for n in inputs:
        for user in n.users:
            used.setdefault(user, set()).update(memory[n])
            if user not in memory and (inside := held(user) & mine):
                memory[user] = inside
                inputs.append(user)
    by = {n: here for n, touched in used.items() if (here := writes(n) & touched)}
    ever = set().union(*by.values())
    written: Counter[int] = Counter()
    seen: dict[Node, Versions] = {}
    for n in sorted(n for n, touched in used.items() if touched & ever):
        seen[n] = {s: written[s] for s in used[n] & ever}
        written.update(by.get(n, ()))
    return dict(written), seen


def _results(gm: GraphModule) -> list[Any]:
    (results,) = gm.graph.output_node().args
    return list(results) if isinstance(results, list | tuple) else [results]


def _kind(result: Any) -> tuple[Any, ...]:
    """The dtype, device and sizes of a tensor."""
    v = value(result)
    return (v.dtype, v.device, *v.shape) if isinstance(v, torch.Tensor) else (type(v),)


def _fits(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    """Whether two kinds are equal. Symbols are not compared, because one size may have several."""
    pairs = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(f == w for f, w in pairs if torch.SymInt not in (type(f), type(w)))
