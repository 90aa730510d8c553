"""fused_gating_chunk_delta_rule over 2 to 8 tokens on a state that is not written  →  delta_rule_verify"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Graph, Node

from gdnfuse.dialect import delta_rule_verify, fused_gating_chunk_delta_rule
from gdnfuse.passes.fuse.rules import RuleCall, rule_match
from gdnfuse.rewrite.edit import call
from gdnfuse.rewrite.graph import op_name, value
from gdnfuse.rewrite.rule import Rule

TOKENS = range(2, 9)  # numbers of tokens of a verify or a short step. For more tokens chunks are faster


class FuseVerifyDeltaRule(Rule[RuleCall]):
    name, stage, equation = "verify_delta_rule", "fuse", delta_rule_verify.op.equation

    def anchors(self, graph):
        """Rules over a few tokens of which only the output is read."""
        return (node for node, _, taken in over_few_tokens(graph) if list(taken) == [0])

    def match(self, anchor):
        return rule_match(anchor, delta_rule_verify.op, {})

    def rewrite(self, m, t):
        given = vars(t) | m.facts.numbers
        return call(m.facts.op.overload, *(given[name] for name in m.facts.op.arg_names))


def over_few_tokens(graph: Graph) -> Iterator[tuple[Node, dict[str, Any], dict[int, Node]]]:
    """Rules over a few tokens after a given state: the node, its arguments, and which of its results are used."""
    for node in graph.nodes:
        if op_name(node) == "gdnfuse.fused_gating_chunk_delta_rule" and few_tokens(value(node.args[2])):
            bound = fused_gating_chunk_delta_rule.op.bind(node.args, node.kwargs)
            if isinstance(bound["state"], Node) and bound["cu_seqlens"] is None and not bound["checkpoint_every"]:
                yield node, bound, {u.args[1]: u for u in node.users if op_name(u) == "getitem"}


def few_tokens(v):
    """Whether v [B, T, HV, V] of a rule has few tokens, for all inputs."""
    return isinstance(v.shape[1], int) and v.shape[1] in TOKENS


RULE = FuseVerifyDeltaRule()
