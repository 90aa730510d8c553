"""x · rsqrt(mean(x²) + eps) · (offset + w)  →  gdnfuse.rms_norm(x, w, eps, offset), of one token, of a sum, or of heads"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from gdnfuse.dialect import rms_norm
from gdnfuse.errors import Refused
from gdnfuse.passes.rows import one_row
from gdnfuse.passes.sdpa import MOST_QUERIES
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.evaluate import hint
from gdnfuse.rewrite.graph import is_tensor, op_name, peel, real_users, same, value
from gdnfuse.rewrite.pattern import Alt, Const, Mismatch, Op, Var
from gdnfuse.rewrite.rule import Match, Rule, bring

x, w = Var("x"), Var("weight")
normed = Op("mul", x, Op("rsqrt", Op("add", Op("mean", Op("mul", x, x)), Const("eps"))))
PATTERN = Alt(Op("mul", normed, Op("add", w, Const("offset"))), Op("mul", normed, w))


def _squared(mean: Node) -> Node:
    """The tensor that is squared under the mean."""
    square = peel(mean.args[0])
    return next(map(peel, square.all_input_nodes), square)


def _of_few_tokens(node: Node) -> bool:
    """Whether a norm is of one token, or by heads of so few that attention takes it in, for all inputs."""
    shape = value(node).shape if is_tensor(node) else ()
    return len(shape) > 2 and (same(shape[1], 1) or len(shape) == 4 and isinstance(shape[1], int) and shape[1] <= MOST_QUERIES)


@dataclass(frozen=True)
class Facts:
    eps: float
    offset: float


class LiftRMSNorm(Rule[Facts]):
    name, stage, equation = "rms_norm", "lift", rms_norm.op.equation

    def anchors(self, graph):
        """The inverse square root of a mean, for one token, for a sum, or for heads of few tokens.

        Other norms of a prompt are left to the compiler: nothing is fused with them.
        """
        for node in graph.nodes:
            if op_name(node) == "rsqrt" and op_name(add := peel(node.args[0])) == "add" and op_name(peel(add.args[0])) == "mean":
                if one_row(node) or _of_few_tokens(node) or op_name(_squared(peel(add.args[0]))) == "add":
                    yield node

    def match(self, anchor):
        product = next((u for u in real_users(anchor) if op_name(u) == "mul"), None)
        root = product and next((u for u in real_users(product) if op_name(u) == "mul"), None)
        if root is None:
            raise Mismatch(anchor, "a product with x, and one with a weight", "none")
        env = PATTERN.match(root)
        shapes = {"x": value(root).shape, "weight": value(root).shape[-1:]}
        operands = {name: bring(env[name], shape, name) for name, shape in shapes.items()}
        dtype = value(operands["x"].node).dtype
        users = list(root.users)
        if len(users) == 1 and op_name(users[0]) == "to" and value(users[0]).dtype == dtype:
            root = users[0]
        if value(root).dtype != dtype:
            raise Refused(f"The norm must be rounded to the dtype of its input, {dtype}, found {value(root).dtype}.", at=root)
        # Each row is normalised by itself, so the proof uses a few narrow rows.
        lead = [min(hint(s), 2) for s in value(operands["x"].node).shape[:-1]]
        facts = Facts(env["eps"], env.get("offset", 0.0))
        return Match(operands, [root], facts, shapes={"x": (*lead, 8), "weight": (8,)})

    def check(self, m):
        if not same(value(m.outputs[0]).shape[-1], value(m.inputs["weight"]).numel()):
            raise Refused("The weight must have one element per column.", at=m.inputs["weight"])

    def rewrite(self, m, t):
        return call(rms_norm.op.overload, t.x, t.weight, m.facts.eps, m.facts.offset)


RULE = LiftRMSNorm()
