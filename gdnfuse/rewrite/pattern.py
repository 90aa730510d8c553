"""Patterns over graphs that read like the maths. Operands are seen through views and casts. Knows nothing of GDN.

A pattern is generous on purpose: it ignores shapes, axes and options that it does not name. What it finds is a proposal, and the
proof decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from gdnfuse.rewrite.graph import op_name, peel

Env = dict[str, Any]
COMMUTATIVE = {"add", "mul"}


class Mismatch(Exception):
    """The pattern does not match: what was expected and what was found at the deepest node that was reached."""

    def __init__(self, node: Any, expected: str, got: str):
        super().__init__(f"expected {expected} at {node}, got {got}")
        self.node, self.expected, self.got = node, expected, got


@dataclass
class _Trace:
    """Remembers the deepest failure of a match with backtracking."""

    depth: int = -1
    failure: Mismatch | None = None

    def fail(self, depth: int, node: Any, expected: str) -> None:
        if depth > self.depth:
            got = op_name(node) if isinstance(node, Node) else repr(node)
            self.depth, self.failure = depth, Mismatch(node, expected, got)


class Pattern:
    def _match(self, node: Any, env: Env, depth: int, trace: _Trace) -> Iterator[Env]:
        raise NotImplementedError

    def match(self, node: Any) -> Env:
        """Bindings of the first match.

        Raises:
            Mismatch: at the deepest node that was reached.
        """
        trace = _Trace()
        for env in self._match(node, {}, 0, trace):
            return env
        raise trace.failure or Mismatch(node, str(self), op_name(node))


@dataclass(frozen=True)
class Var(Pattern):
    """Any tensor. The same name must have the same elements each time. It binds the node before views are removed."""

    name: str

    def _match(self, node, env, depth, trace):
        if not isinstance(node, Node):
            trace.fail(depth, node, f"a tensor ({self.name})")
        elif self.name not in env:
            yield {**env, self.name: node}
        elif peel(env[self.name]) is peel(node):
            yield env
        else:
            trace.fail(depth, node, f"{self.name} again, which is {env[self.name]}")

    def __str__(self):
        return self.name


@dataclass(frozen=True)
class Const(Pattern):
    """A Python number."""

    name: str

    def _match(self, node, env, depth, trace):
        if isinstance(node, bool) or not isinstance(node, int | float):
            trace.fail(depth, node, f"a constant number ({self.name})")
        elif self.name in env and env[self.name] != node:
            trace.fail(depth, node, f"the constant {env[self.name]}")
        else:
            yield {**env, self.name: float(node)}

    def __str__(self):
        return self.name


class Op(Pattern):
    """A call of one of the named ops. If the op commutes, operands may be in either order.

    Arguments that are not named are ignored.
    """

    def __init__(self, names: str, *operands: Pattern, bind: str | None = None):
        self.names, self.operands, self.bind = names.split("|"), operands, bind

    def _match(self, node, env, depth, trace):
        node = peel(node)
        if not isinstance(node, Node) or op_name(node) not in self.names:
            trace.fail(depth, node, " or ".join(self.names))
            return
        args = node.args[: len(self.operands)]
        if len(args) < len(self.operands):
            trace.fail(depth, node, f"{len(self.operands)} operands")
            return
        if self.bind:
            env = {**env, self.bind: node}
        orders = [args]
        if op_name(node) in COMMUTATIVE and len(args) == 2:
            orders.append(args[::-1])
        for permuted in orders:
            yield from self._operands(permuted, 0, env, depth, trace)

    def _operands(self, args, i, env, depth, trace):
        if i == len(args):
            yield env
            return
        for found in self.operands[i]._match(args[i], env, depth + 1, trace):
            yield from self._operands(args, i + 1, found, depth, trace)

    def __str__(self):
        return f"{'|'.join(self.names)}({', '.join(map(str, self.operands))})"


class Alt(Pattern):
    """The first of several alternatives that matches."""

    def __init__(self, *patterns: Pattern):
        self.patterns = patterns

    def _match(self, node, env, depth, trace):
        for p in self.patterns:
            yield from p._match(node, env, depth, trace)

    def __str__(self):
        return " or ".join(map(str, self.patterns))
