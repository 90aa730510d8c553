"""delta_rule(q, k, v, gating(a, …), [c·]sigmoid(b), state), state.copy_(new)  →  fused_gating_delta_rule(…, state!)"""

from __future__ import annotations

from gdnfuse.dialect import delta_rule, fused_gating_delta_rule, gating
from gdnfuse.errors import Refused
from gdnfuse.passes.fuse.rules import Step, two_sequences
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import op_name, peel, real_users, value
from gdnfuse.rewrite.pattern import Alt, Const, Mismatch, Op, Var
from gdnfuse.rewrite.rule import Match, Rule, bring

SIGMOID = Op("sigmoid", Var("b"))
BETA = Alt(SIGMOID, Op("mul", SIGMOID, Const("scale")))


class FuseGatingDeltaRule(Rule[Step]):
    name, stage, equation = "gating_delta_rule", "fuse", fused_gating_delta_rule.op.equation

    def anchors(self, graph):
        return [n for n in graph.nodes if op_name(n) == "gdnfuse.delta_rule"]

    def match(self, anchor):
        bound = delta_rule.op.bind(anchor.args, anchor.kwargs)
        gates = gate_operands(bound)
        o, write = _results(anchor, bound["state"])
        operands = {name: bound[name] for name in ("q", "k", "v")}
        operands |= {name: gates[name] for name in ("a", "b", "A_log", "dt_bias")} | {"recurrent_state": bound["state"]}
        facts = Step(bound["scale"], bound["l2norm_eps"], gates["beta_scale"])
        m = Match(operands, [o], facts, writes={"recurrent_state": write})
        return two_sequences(m, "q", "k", "v", "a", "b", "recurrent_state")

    def rewrite(self, m, t):
        tensors = (t.q, t.k, t.v, t.a, t.b, t.A_log, t.dt_bias, t.recurrent_state)
        return call(fused_gating_delta_rule.op.overload, *tensors, m.facts.scale, m.facts.l2norm_eps, m.facts.beta_scale)


def gate_operands(bound):
    """a, b, A_log, dt_bias and beta_scale of a rule whose decay and β are gates."""
    g = peel(bound["g"])
    if op_name(g) != "gdnfuse.gating":
        raise Mismatch(g, "gating(a, A_log, dt_bias)", op_name(g))
    gates = gating.op.bind(g.args, g.kwargs)
    beta = BETA.match(bound["beta"])
    shape = value(bound["g"]).shape
    operands = {"a": bring(gates["a"], shape, "a"), "b": bring(beta["b"], shape, "b")}
    return {**operands, "A_log": gates["A_log"], "dt_bias": gates["dt_bias"], "beta_scale": beta.get("scale", 1.0)}


def _results(rule, state):
    """The node of the rule's output, and the copy of its new state into `state`."""
    taken = {u.args[1]: u for u in rule.users}
    if 0 not in taken or 1 not in taken:
        raise Refused("Both the output and the new state must be used, found that one is unused.", at=rule)
    copies = [u for u in real_users(taken[1]) if op_name(u) == "copy_" and u.args[0] is state]
    if len(copies) != 1:
        raise Refused(f"The new state must be copied once into the state it came from, found {len(copies)} copies.", at=rule)
    return taken[0], copies[0]


RULE = FuseGatingDeltaRule()
