"""Linears without bias on one input  →  one gdnfuse.packed_linear and slices of its row"""

from __future__ import annotations

from gdnfuse import packing
from gdnfuse.dialect import packed_linear
from gdnfuse.report import Refused
from gdnfuse.rewrite.driver import call
from gdnfuse.rewrite.graph import is_tensor, op_name, value
from gdnfuse.rewrite.rule import Match, Rule

# For any number of rows: benchmarks/packing.py on an H200, 1 to 16384 rows of the in_proj of 0.8B, 4B and 9B, of gate and up and
# of attention's qkv, finds one GEMM 0.98 to 2.9 times as fast as several. Published figures for other engines, 1 to 10 % slower
# above a thousand rows, are not those of cuBLAS on this machine.


class LiftPackedLinear(Rule):
    name, stage, equation = "packed_linear", "lift", packed_linear.op.equation

    def anchors(self, graph):
        """The first of several linears on one input."""
        seen = set()
        for node in graph.nodes:
            if op_name(node) == "linear" and node.args[0] not in seen:
                seen.add(node.args[0])
                if len(_siblings(node)) > 1:
                    yield node

    def match(self, anchor):
        linears = _siblings(anchor)
        x = anchor.args[0]
        for n in linears:
            if not is_tensor(n.args[1]) or not all(isinstance(s, int) for s in value(n.args[1]).shape):
                raise Refused(f"The weight of {n} must be a tensor of static shape, found {n.args[1]}.", at=n)
        widths = [value(n.args[1]).shape[0] for n in linears]
        weights = {f"weight_{i}": n.args[1] for i, n in enumerate(linears)}
        return Match(
            {"x": x, **weights},
            list(linears),
            data={"widths": widths, "linears": linears},
            # The width of the input appears in no constant: a narrow one proves as much.
            shapes={"x": (*_hints(value(x).shape[:-1]), 8), **{k: (w, 8) for k, w in zip(weights, widths, strict=True)}},
        )

    def check(self, m):
        x, linears = m.inputs["x"], m.data["linears"]
        dtype, device = value(x).dtype, value(x).device
        seen: dict = {}
        for n in linears:
            weight = n.args[1]
            if len(n.args) > 2 and n.args[2] is not None or n.kwargs.get("bias") is not None:
                raise Refused(f"Siblings must have no bias, found one on {n}.", at=n)
            if weight.op not in ("placeholder", "get_attr"):
                raise Refused(f"The weight of {n} must be a parameter, found the result of {op_name(weight)}.", at=n)
            v = value(weight)
            if v.dtype != dtype or v.device != device:
                found = f"{v.dtype} on {v.device}"
                raise Refused(f"The weight of {n} must be {dtype} on {device} as its input is, found {found}.", at=n)
            if not dtype.is_floating_point or v.ndim != 2 or not v.is_contiguous():
                raise Refused(f"The weight of {n} must be a contiguous floating matrix, found {dtype} {tuple(v.shape)}.", at=n)
            if weight in seen:
                raise Refused(f"Each sibling must have a weight of its own, found {weight} twice.", at=n)
            seen[weight] = n
        packing.check([w.meta.get("gdnfuse_real", value(w)) for w in seen])

    def rewrite(self, m, t):
        weights = [getattr(t, k) for k in m.inputs if k != "x"]
        row = call(packed_linear.op.overload, t.x, weights)
        results, start = [], 0
        for width in m.data["widths"]:
            results.append(row.narrow(-1, start, width))
            start += width
        return tuple(results)


def _siblings(node):
    return sorted(n for n in node.args[0].users if op_name(n) == "linear" and n.args[0] is node.args[0])


def _hints(shape):
    return [s if isinstance(s, int) else s.node.hint for s in shape]


RULE = LiftPackedLinear()
