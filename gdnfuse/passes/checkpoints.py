"""A prompt's graph hands back the states that it passes, after every so many tokens: recurrent states and conv windows.

The rule has each state where it scans over chunks, so it leaves some on the way (vLLM PR 26807), and the conv's window there is a
slice of its input. Both stand behind the graph's own results, for `gdnfuse.backend` to take off.
"""

from __future__ import annotations

import operator

from torch.fx import Graph, GraphModule, Node

from gdnfuse.dialect import conv_windows, op_of
from gdnfuse.dialect.chunk_delta_rule import CHUNK
from gdnfuse.errors import Refused
from gdnfuse.report.records import Record, Status
from gdnfuse.rewrite.edit import infer, recorded
from gdnfuse.rewrite.graph import kept_meta, value

RULES = ("chunk_delta_rule", "fused_gating_chunk_delta_rule")
EQUATION = "states and conv windows after every n tokens"


def hand_back(gm: GraphModule, every: int, layers: int) -> tuple[int, list[Record]]:
    """Have all chunk rules of a graph, before they are lowered, leave their states after every `every` tokens.

    Args:
        gm: rewritten in place.
        every: a multiple of 64.
        layers: how many GDN layers the graph has; where one has no rule in chunks, nothing is handed back.

    Returns:
        How many results there are more, recurrent states [B, T // every, HV, K, V] and conv windows [B, T // every, D, W] of one
        layer after the other; and a record for each layer.
    """
    rules = [n for n in gm.graph.nodes if n.op == "call_function" and (op := op_of(n.target)) is not None and op.name in RULES]
    try:
        if len(rules) != layers:
            raise Refused(f"Each of {layers} GDN layers must be one rule in chunks, found {len(rules)}.")
        convs = [_conv(rule) for rule in rules]
    except Refused as e:
        at = [recorded("checkpoints", "fuse", rule, EQUATION) for rule in rules[:1]]
        for record in at:
            record.status, record.reason = Status.REFUSED, e.reason
        return 0, at
    more = [x for rule, conv in zip(rules, convs, strict=True) for x in _of_layer(gm.graph, rule, conv, every)]
    output = gm.graph.output_node()
    results = output.args[0]
    output.args = (type(results)([*results, *more]),)
    return len(more), [recorded("checkpoints", "fuse", rule, EQUATION) for rule in rules]


def _of_layer(graph: Graph, rule: Node, conv: Node, every: int) -> list[Node]:
    call = op_of(rule.target).bind(rule.args, rule.kwargs)
    rule.args, rule.kwargs = (), {**call, "checkpoint_every": every // CHUNK}
    rule.meta["example_value"] = infer(rule)
    given = op_of(conv.target).bind(conv.args, conv.kwargs)
    width = value(given["weight"]).shape[-1]
    with graph.inserting_before(graph.output_node()):
        states = graph.call_function(operator.getitem, (rule, 2))
        windows = graph.call_function(conv_windows.op.overload, (given["x"], call["v"], every, width))
    for node in (states, windows):
        node.meta |= kept_meta(rule) | {"example_value": infer(node)}
    return [states, windows]


def _conv(rule: Node) -> Node:
    """The conv whose result a rule's v is a part of."""
    call = op_of(rule.target).bind(rule.args, rule.kwargs)
    if call["cu_seqlens"] is not None:
        raise Refused("States are handed back of rows that are one sequence each, found packed sequences.")
    todo, seen, found = [call["v"]], set(), []
    while todo:
        node = todo.pop()
        if node in seen or not isinstance(node, Node):
            continue
        seen.add(node)
        op = op_of(node.target) if node.op == "call_function" else None
        if op is not None and op.name == "causal_conv":
            found.append(node)
        elif op is None:
            todo += node.all_input_nodes
    if len(found) != 1:
        raise Refused(f"A rule's values must come from one causal conv, found {len(found)}.")
    return found[0]
