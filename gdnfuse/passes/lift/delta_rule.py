"""The recurrence of the gated delta rule, T steps inlined, and the copy of its last state  →  gdnfuse.delta_rule"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gdnfuse.dialect import delta_rule
from gdnfuse.errors import Refused
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import is_tensor, op_name, peel, real_users, value
from gdnfuse.rewrite.pattern import Mismatch, Op, Var
from gdnfuse.rewrite.rule import Match, Rule, bring

decayed = Op("mul", Var("before"), Op("exp", Var("g")), bind="decayed")
read = Op("sum", Op("mul", decayed, Var("k")))
delta = Op("mul", Op("sub", Var("v"), read), Var("beta"))
STEP = Op("add", decayed, Op("mul", Var("k"), delta))


def negative(shape, generator):
    """Log decays: −|x|."""
    return -torch.randn(shape, dtype=torch.float64, generator=generator).abs()


def unit(shape, generator):
    """β in (0, 1)."""
    return torch.rand(shape, dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class Facts:
    scale: float
    dtype: torch.dtype
    shape: tuple[Any, ...]  # shape of the output
    T: int


class LiftDeltaRule(Rule[Facts]):
    name, stage, equation = "delta_rule", "lift", delta_rule.op.equation

    def anchors(self, graph):
        """A copy into a rank-4 state.

        Copies of results of dialect ops are excluded, because those rules are already recognised.
        """
        for node in graph.nodes:
            if op_name(node) == "copy_" and is_tensor(node.args[0]) and value(node.args[0]).ndim == 4:
                made = peel(node.args[1])
                if not (op_name(made) == "getitem" and op_name(made.args[0]).startswith("gdnfuse.")):
                    yield node

    def match(self, anchor):
        state, last = anchor.args[0], peel(anchor.args[1])
        steps = []
        while last is not state:
            env = STEP.match(last)
            steps.insert(0, {**env, "after": last})
            last = peel(env["before"])
        if not steps:
            raise Mismatch(anchor, "a state computed by the rule", "the state itself")
        T = len(steps)
        reads = [_read_out(s["after"], state) for s in steps]
        out, scale, q = _output(reads, T)
        B, HV, K, V = value(state).shape
        whole = {"q": q, **{k: _whole([s[k] for s in steps], k) for k in ("k", "v", "g", "beta")}}
        shapes = {"q": (B, T, HV, K), "k": (B, T, HV, K), "v": (B, T, HV, V), "g": (B, T, HV), "beta": (B, T, HV)}
        operands = {name: bring(node, shapes[name], name) for name, node in whole.items()}
        return Match(
            {**operands, "state": state},
            [out],
            Facts(scale, value(out).dtype, tuple(value(out).shape), T),
            writes={"state": anchor},
            samplers={"g": negative, "beta": unit},
        )

    def check(self, m):
        if len(m.facts.shape) == 3 and m.facts.T > 1:
            raise Refused(f"The outputs of {m.facts.T} steps must be stacked, found separate ones.", at=m.outputs[0])

    def rewrite(self, m, t):
        results = call(delta_rule.op.overload, t.q, t.k, t.v, t.g, t.beta, t.state, m.facts.scale)
        o, new = results[0], results[1]
        t.state.copy_(new)
        if m.facts.T > 1:
            o = o.transpose(1, 2)
        return o.reshape(-1, *m.facts.shape[1:]).to(m.facts.dtype)


def _read_out(after, state):
    """The read-out o = Σ_K S·q of one step: its node, and its q."""
    for user in real_users(after):
        if op_name(user) == "mul":
            factors = [x for x in user.all_input_nodes if peel(x) is not after]
            sums = [u for u in real_users(user) if op_name(u) == "sum"]
            if len(factors) == 1 and len(sums) == 1 and _not_next_step(factors[0]):
                return sums[0], factors[0]
    found = ", ".join(op_name(u) for u in real_users(after)) or "no reader"
    raise Mismatch(after, "a read-out: sum of the new state times q", found)


def _not_next_step(factor) -> bool:
    return op_name(peel(factor)) != "exp"


def _output(reads, T):
    """The node that holds all outputs, the scale on q, and q over all steps."""
    outs = [r[0] for r in reads]
    stacks = [u for u in outs[0].users if op_name(u) == "stack" and len(u.args[0]) == T]
    if stacks and all(peel(a) is peel(b) for a, b in zip(stacks[0].args[0], outs, strict=True)):
        out = stacks[0]
    elif T == 1:
        out = outs[0]
    else:
        raise Mismatch(outs[0], f"a stack of {T} read-outs", ", ".join(op_name(u) for u in outs[0].users))
    q, scale = _whole([r[1] for r in reads], "q"), 1.0
    end = peel(q)
    if op_name(end) in ("mul", "div") and len(end.args) == 2 and isinstance(end.args[1], int | float):
        scale = 1.0 / end.args[1] if op_name(end) == "div" else float(end.args[1])
        q = end.args[0]
    return out, scale, q


def _whole(nodes, name):
    """An operand over all steps: for one step the node itself, for several steps the tensor that its T slices come from."""
    if len(nodes) == 1:
        return nodes[0]
    sources = []
    for t, n in enumerate(nodes):
        end = peel(n)
        if op_name(end) != "getitem" or t not in (i for i in _index(end) if isinstance(i, int)):
            raise Mismatch(end, f"slice {t} of {name}", op_name(end))
        sources.append(end.args[0])
    if any(peel(s) is not peel(sources[0]) for s in sources):
        raise Mismatch(nodes[0], f"slices of one {name}", "slices of several tensors")
    return sources[0]


def _index(getitem):
    return getitem.args[1] if isinstance(getitem.args[1], tuple) else (getitem.args[1],)


RULE = LiftDeltaRule()
