"""A prompt's graph also returns states after every so many tokens: recurrent states and conv windows.

The rule has each state while it scans over chunks, so it can store some (vLLM PR 26807). The conv's window at that place is a
slice of its input. Both come after the graph's own results, and `gdnfuse.backend` removes them.
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
    """Let all chunk rules of a graph also return their states after every `every` tokens. Called before they are lowered.

    Args:
        gm: rewritten in place.
        every: a multiple of 64.
        layers: number of GDN layers of the graph. If one has no rule in chunks, nothing is changed.

    Returns:
        The number of additional results: recurrent states [B, T // every, HV, K, V] and conv windows [B, T // every, D, W], layer
            by layer. And a record for each layer.
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
    """The conv whose result contains the v of a rule."""
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
