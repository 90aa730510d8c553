"""Linears without bias on one input  →  one gdnfuse.packed_linear and slices of its row

Some or all of the weights may be quantised. These come first, and the plain ones after them.
"""

from __future__ import annotations

from dataclasses import dataclass

from gdnfuse import packing
from gdnfuse.dialect import packed_linear
from gdnfuse.errors import Refused
from gdnfuse.passes.quantized import bind, is_quantized, is_weight, stored
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.evaluate import hint
from gdnfuse.rewrite.graph import is_tensor, op_name, value
from gdnfuse.rewrite.rule import Match, Rule

# Packing pays for any number of rows. By benchmarks/packing.py on an H200, one GEMM is 0.98 to 2.9 times as fast as several, with
# 1 to 16384 rows of in_proj of 0.8B, 4B and 9B, of gate and up, and of attention's qkv. Published figures of other engines are 1
# to 10 % slower above a thousand rows. They do not hold for cuBLAS on this machine.


@dataclass(frozen=True)
class Facts:
    widths: list[int]  # number of rows of each weight


class LiftPackedLinear(Rule[Facts]):
    name, stage, equation = "packed_linear", "lift", packed_linear.op.equation

    def anchors(self, graph):
        """For several linears on one input: each that must stay separate, and the first of the others."""
        seen = set()
        for node in graph.nodes:
            if op_name(node) == "linear" and node.args[0] not in seen:
                seen.add(node.args[0])
                together, apart = _siblings(node)
                if len(together) + len(apart) > 1:
                    yield from apart
                if len(together) > 1:
                    yield together[0]

    def match(self, anchor):
        linears, apart = _siblings(anchor)
        if anchor in apart:
            raise apart[anchor]
        x = anchor.args[0]
        widths = [value(n.args[1]).shape[0] for n in linears]
        return Match(
            {"x": x, "weights": [n.args[1] for n in linears]},
            linears,
            Facts(widths),
            # The maths does not depend on the number of rows or their width, so the proof uses a few narrow rows.
            shapes={
                "x": (*[min(hint(s), 2) for s in value(x).shape[:-1]], 8),
                **{f"weights_{i}": (width, 8) for i, width in enumerate(widths)},
            },
        )

    def rewrite(self, m, t):
        row = call(packed_linear.op.overload, t.x, t.weights)
        results, start = [], 0
        for width in m.facts.widths:
            results.append(row.narrow(-1, start, width))
            start += width
        return tuple(results)


def _siblings(node):
    """The linears on the input of a linear: those that may share one weight, and for each other one why it may not."""
    together, apart, weights, kinds = [], {}, set(), []
    for n in sorted(n for n in node.args[0].users if op_name(n) == "linear" and n.args[0] is node.args[0]):
        try:
            _check(n)
            if not weights.isdisjoint(stored(n.args[1])):
                raise Refused(f"Each sibling must have a weight of its own, found {n.args[1]} twice.", at=n)
            if together and _inference(n) != _inference(together[0]):
                raise Refused("Siblings must all be ordinary or all be made under torch.inference_mode, found both.", at=n)
            if is_quantized(n.args[1]):
                kinds.append(bind(n.args[1])["format"])
                if kinds[-1] != kinds[0]:
                    found = f"{kinds[0]} and {kinds.pop()}"
                    raise Refused(f"Siblings that are quantised must be of one format, found {found}.", at=n)
        except Refused as e:
            apart[n] = e
        else:
            together.append(n)
            weights.update(stored(n.args[1]))
    return sorted(together, key=lambda n: (not is_quantized(n.args[1]), _of_adapter(n))), apart


def _of_adapter(linear):
    """Whether a linear is the A of a low-rank adapter.

    Their rows come last, so that the others are packed in the same way without it.
    """
    narrow = value(linear).shape[-1] < value(linear.args[0]).shape[-1]
    return narrow and bool(linear.users) and all(op_name(u) == "linear" and u.args[0] is linear for u in linear.users)


def _inference(linear):
    real = stored(linear.args[1])[0].meta.get("gdnfuse_real")
    return real is not None and real.is_inference()


def _check(linear):
    x, weight = value(linear.args[0]), linear.args[1]
    if len(linear.args) > 2 and linear.args[2] is not None or linear.kwargs.get("bias") is not None:
        raise Refused(f"Siblings must have no bias, found one on {linear}.", at=linear)
    if not is_tensor(weight) or not is_weight(weight):
        raise Refused(f"The weight of {linear} must be a parameter, found the result of {op_name(weight)}.", at=linear)
    v = value(weight)
    if v.dtype != x.dtype or v.device != x.device:
        expected, found = f"{x.dtype} on {x.device}", f"{v.dtype} on {v.device}"
        raise Refused(f"The weight of {linear} must be {expected} as its input is, found {found}.", at=linear)
    static = all(isinstance(s, int) for s in v.shape)
    if not static or not v.dtype.is_floating_point or v.ndim != 2 or not v.is_contiguous():
        found = f"{v.dtype} {tuple(v.shape)}"
        raise Refused(f"The weight of {linear} must be a contiguous floating matrix of static shape, found {found}.", at=linear)
    for n in stored(weight):
        packing.check([n.meta.get("gdnfuse_real", value(n))])


RULE = LiftPackedLinear()
