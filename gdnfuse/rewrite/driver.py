"""Runs rules over a graph: match, check, cut out the region, prove, replace. One record per anchor. Knows nothing of GDN."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.node import map_aggregate
from torch.fx.proxy import GraphAppendingTracer

from gdnfuse import compat
from gdnfuse.errors import Refused, one_line
from gdnfuse.progress import announce
from gdnfuse.report.records import Record, Source, Status
from gdnfuse.rewrite.edit import infer, inserting, quiet_shapes, recorded, returned
from gdnfuse.rewrite.graph import (
    foreign,
    held,
    is_plain,
    is_tensor,
    kept_meta,
    op_name,
    origin,
    remove_dead,
    storage,
    value,
    writes,
)
from gdnfuse.rewrite.pattern import Mismatch
from gdnfuse.rewrite.proof import prove
from gdnfuse.rewrite.rule import Match, Rule

log = logging.getLogger(__name__)

METADATA = ("size", "stride", "dim", "numel")


@dataclass
class Outcome:
    """What a run of rules did: records in order, and the cost of proofs. `fuel` is how many further rewrites may be made."""

    fuel: int | None = None
    records: list[Record] = field(default_factory=list)
    rewrites: list[Record] = field(default_factory=list)
    proofs: int = 0
    proof_seconds: float = 0.0

    def need_fuel(self) -> None:
        """Raise Refused if no further rewrite may be made."""
        if len(self.rewrites) == self.fuel:
            raise Refused(f"The option fuel must leave a rewrite, found that all {self.fuel} are made.")


def run_rules(gm: GraphModule, rules: list[Rule], outcome: Outcome) -> None:
    """Apply each rule at each of its anchors, in order. The graph is valid after every application.

    A rule that fails has a bug. Only its rewrite at this anchor is lost.
    """
    memory = Memory(gm.graph)
    for rule in rules:
        announce(f"{rule.stage} {rule.name}")
        try:
            anchors = list(rule.anchors(gm.graph))
        except Exception as e:
            outcome.records.append(failed(Record(rule.name, rule.stage, Status.REFUSED, "", rule.equation), e))
            continue
        for anchor in anchors:
            record = recorded(rule.name, rule.stage, anchor, rule.equation)
            outcome.records.append(record)
            if compat.is_erased(anchor):
                record.status, record.reason = Status.SHADOWED, f"An earlier match of {rule.name} took {anchor.name} in."
                continue
            with deciding(record, outcome):
                outcome.need_fuel()
                m = rule.match(anchor)
                rule.check(m)
                region = cut(gm.graph, m, memory)
                with quiet_shapes(gm):
                    replacement = _trace(rule, m, region)
                    proof = prove(region.graph, replacement, region.inputs, m, extremes=rule.stage == "lift")
                    _replace(gm, m, region, replacement, anchor, memory)
                record.proof_error, record.proof_cached = proof.error, proof.cached
                outcome.proofs += not proof.cached
                outcome.proof_seconds += proof.seconds
            log.debug("%s at %s: %s %s", record.rule, record.anchor, record.status, record.reason)
    remove_dead(gm.graph)


@contextlib.contextmanager
def deciding(record: Record, outcome: Outcome) -> Iterator[None]:
    """One rewrite at one anchor. It counts if the block succeeds. Otherwise the record says why not."""
    try:
        yield
        outcome.rewrites.append(record)
    except Mismatch as e:
        record.status = Status.UNMATCHED
        record.at, record.expected, record.got = str(e.node), e.expected, e.got
        record.reason = f"Expected {e.expected} at {e.node}, found {e.got}."
        record.source = _where(e.node) or record.source
    except Refused as e:
        record.status, record.reason, record.at = Status.REFUSED, e.reason, e.at or record.anchor
        record.source = _where(e.node) or record.source
    except Exception as e:
        failed(record, e)


def failed(record: Record, error: Exception) -> Record:
    """The record of a bug in gdnfuse. The log has the whole error."""
    log.error(
        "the rule %s failed at %s, which is left unchanged", record.rule, record.anchor or "all its anchors", exc_info=error
    )
    record.status, record.reason, record.at = Status.REFUSED, f"The rule {record.rule} failed: {one_line(error)}.", record.anchor
    record.failed = True
    return record


def _where(node: Any) -> Source | None:
    return origin(node) if isinstance(node, Node) else None


class Memory:
    """Which nodes use and which write each storage of a graph. Updated when nodes are added."""

    def __init__(self, graph: Graph):
        self.users: dict[int, list[Node]] = {}
        self.writers: dict[int, list[Node]] = {}
        for n in graph.nodes:
            self.add(n)

    def add(self, node: Node) -> None:
        for s in {s for i in node.all_input_nodes for s in held(i)}:
            self.users.setdefault(s, []).append(node)
        for s in writes(node):
            self.writers.setdefault(s, []).append(node)


@dataclass
class Region:
    """A part of a graph to be replaced.

    Attributes:
        nodes: in the order of the graph.
        inputs: the named boundary, then SymInts.
        graph: the region alone, with a placeholder per input.
        point: the node after which the replacement goes.
    """

    nodes: list[Node]
    inputs: list[tuple[str, Node]]
    graph: Graph
    point: Node


def cut(graph: Graph, m: Match, memory: Memory) -> Region:
    """Cut the region of a match out of the graph: all between its inputs and its outputs and writes.

    If the match says so, the region may write memory that it makes itself. All writers up to the last output then belong to the
    region.

    Args:
        graph: the whole graph.
        m: the match.
        memory: of the whole graph.

    Raises:
        Refused: an input is a tensor subclass or not a tensor, the region depends on something that is not an input, it is
            computed by code that is not torch's, or something outside reads or writes a state in between.
    """
    for name, n in m.inputs.items():
        if not is_tensor(n) and not isinstance(value(n), int | torch.SymInt):
            raise Refused(f"{name} must be a tensor or a number, found the result of {op_name(n)} in {n.name}.", at=n)
        if is_tensor(n) and not is_plain(value(n)):
            kind = type(value(n)).__name__ if storage(n) is not None else "one without memory of its own"
            raise Refused(f"{name} must be a plain tensor, found {kind} in {n.name}.", at=n)
    names: dict[Node, str] = {}  # a node that is two operands is one input
    for name, n in m.inputs.items():
        if names.setdefault(n, name) != name and not m.writes.keys().isdisjoint((name, names[n])):
            raise Refused(f"{n.name} must be one operand, because it is written, found that it is {names[n]} and {name}.", at=n)
    boundary = names.keys()
    given = {storage(n) for n in boundary}
    roots = [*m.outputs, *m.writes.values()]
    end, local = max(roots), set()
    seen: set[Node] = set()
    symbols: list[Node] = []
    todo = list(roots)
    while todo:
        n = todo.pop()
        if n in seen or n in boundary:
            continue
        if not is_tensor(n) and isinstance(value(n), int | torch.SymInt):
            if n not in symbols:
                symbols.append(n)
            continue
        if n.op not in ("call_function", "call_method"):
            raise Refused(f"The result must depend on {', '.join(m.inputs)} alone, found that it reads {n.name} too.", at=n)
        if foreign(n):
            raise Refused(f"The result must be computed by torch's own operations, found {op_name(n)} in {n.name}.", at=n)
        seen.add(n)
        todo.extend(n.all_input_nodes)
        if m.local_writes and storage(n) not in given | local:
            local.add(storage(n))
            todo.extend(w for w in memory.writers.get(storage(n), ()) if not compat.is_erased(w) and w < end)
    nodes = sorted(seen)
    _check_states(m, nodes, memory)
    _check_local_writes(m, nodes, given, memory)
    # As early as the operands allow. A later place would give the same result, because nobody else uses the states and nobody
    # writes the operands. But it could come after a reader of an output.
    point = max([*boundary, *symbols, *_last_placeholder(graph)])
    for out in m.outputs:
        for user in out.users:
            if user not in seen and user <= point:
                raise Refused(f"{out.name} must not be read before all operands exist, found that {user.name} reads it.", at=user)
    new, env = Graph(), {}
    inputs = [*((name, n) for n, name in names.items()), *((s.name, s) for s in symbols)]
    for name, n in inputs:
        env[n] = new.placeholder(name)
        env[n].meta["example_value"] = value(n)
    for n in nodes:
        env[n] = new.node_copy(n, lambda x: env[x])
    new.output(tuple(env[o] for o in m.outputs))
    return Region(nodes, inputs, new, point)


def _writes(writer: Node) -> str:
    return "may write" if foreign(writer) else "writes"


def _last_placeholder(graph: Graph) -> list[Node]:
    return graph.find_nodes(op="placeholder")[-1:]


def _check_states(m: Match, nodes: list[Node], memory: Memory) -> None:
    seen = set(nodes)
    for name, write in m.writes.items():
        state = m.inputs[name]
        for user in memory.users.get(storage(state), ()):
            if user not in seen and not compat.is_erased(user) and user.op != "output" and op_name(user) not in METADATA:
                raise Refused(f"{name} must be read and written here alone, found that {user.name} uses it too.", at=user)
        derived = {state}
        for n in nodes:
            # The result of a copy is the state itself. What a dialect op returns besides its write is computed from the state.
            if any(i in derived for i in n.all_input_nodes) and not (n is write and storage(n) == storage(state)):
                derived.add(n)
                strangers = [u for u in n.users if u not in seen]
                if strangers and n not in m.outputs:
                    raise Refused(
                        f"What is computed from {name} must stay inside the motif, found that {strangers[0].name} reads "
                        f"{n.name}.",
                        at=strangers[0],
                    )
    given = {storage(n) for n in m.inputs.values()}
    for n in [*m.inputs.values(), *nodes]:
        allowed = seen if m.local_writes and storage(n) not in given else set(m.writes.values())
        for writer in memory.writers.get(storage(n), ()):
            if writer not in allowed and not compat.is_erased(writer):
                raise Refused(f"{n.name} must not be written in place, found that {writer.name} {_writes(writer)} it.", at=writer)


def _check_local_writes(m: Match, nodes: list[Node], given: set[int | None], memory: Memory) -> None:
    """Check that nobody outside reads memory that the region writes, except through an output after the last write."""
    seen, last, derived = set(nodes), {}, set()
    for n in nodes:
        last |= {s: n for s in writes(n) if s not in given}
    for n in nodes:
        if storage(n) not in last and not any(i in derived for i in n.all_input_nodes):
            continue
        derived.add(n)
        for user in n.users:
            if user in seen:
                continue
            if n not in m.outputs:
                raise Refused(f"{n.name} must be read in the motif, which writes it, found that {user.name} reads it.", at=user)
            if storage(n) in last and user < last[storage(n)]:
                raise Refused(f"{n.name} must not be read before it is complete, found that {user.name} reads it.", at=user)


class _Tracer(GraphAppendingTracer):
    """Makes nodes with sizes as numbers. From torch 2.13 on, a graph warns about symbols that are not nodes."""

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any) -> Node:
        return super().create_node(kind, target, *map_aggregate((args, kwargs), _number), *more, **named)


def _trace(rule: Rule, m: Match, region: Region) -> Graph:
    """The replacement as a graph over the region's placeholders."""
    new = Graph()
    tracer = _Tracer(new)
    proxies = {node: Proxy(new.placeholder(name), tracer) for name, node in region.inputs}
    results = rule.rewrite(m, m.brought(proxies))
    results = results if isinstance(results, tuple) else (results,)
    new.output(tuple(r.node for r in results))
    return new


def _number(a: Any) -> Any:
    """A size that is known to be one number, as that number. In a graph other symbols must be nodes."""
    if not isinstance(a, torch.SymInt):
        return a
    if (number := a.node.maybe_as_int()) is None:
        raise Refused(f"A replacement must have sizes that are known or found, found the symbolic size {a}.")
    return number


def _replace(gm: GraphModule, m: Match, region: Region, replacement: Graph, anchor: Node, memory: Memory) -> None:
    env: dict[Node, Node] = {}
    placeholders = iter(region.inputs)
    results: tuple[Node, ...] = ()
    meta = kept_meta(anchor)
    with inserting(gm.graph, region.point):
        for n in replacement.nodes:
            if n.op == "placeholder":
                env[n] = next(placeholders)[1]
            elif n.op == "output":
                results = tuple(env[o] for o in n.args[0])
            else:
                env[n] = _added(gm.graph.node_copy(n, lambda x: env[x]), meta, memory)
        # The caller may take views of what the graph returns. A slice of a packed row would allow fewer views.
        results = tuple(
            _added(gm.graph.call_method("contiguous", (result,)), meta, memory)
            if _contiguous(out) and not _contiguous(result) and returned(out)
            else result
            for out, result in zip(m.outputs, results, strict=True)
        )
    for out, result in zip(m.outputs, results, strict=True):
        out.replace_all_uses_with(result)
    for name, write in m.writes.items():
        if op_name(write) == "copy_":
            write.replace_all_uses_with(m.inputs[name])
    for n in reversed(region.nodes):
        if not compat.is_erased(n) and not n.users:
            gm.graph.erase_node(n)


def _added(node: Node, meta: dict[str, Any], memory: Memory) -> Node:
    node.meta.update(meta)
    node.meta["example_value"] = infer(node)
    memory.add(node)
    return node


def _contiguous(node: Node) -> bool:
    return is_tensor(node) and compat.is_contiguous(value(node))
