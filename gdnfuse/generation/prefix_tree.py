"""A tree of known prefixes: keys and values once per block of tokens, states where a prompt may start, and budgets of bytes.

It knows neither models nor caches. A block is a tensor, and a state is a tuple of tensors. Tokens are bytes, eight for each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol

import torch

BLOCK = 64  # tokens whose keys and values are one tensor; a chunk of the rule
TOKEN = 8  # bytes of a token


class Source(Protocol):
    """What can be kept of one sequence. The tree asks for sizes first, and for tensors only if there is room for them."""

    token_bytes: int  # of keys and values
    state_bytes: int

    def blocks(self, first: int, last: int) -> list[torch.Tensor]:
        """Keys and values of the blocks first … last − 1, one tensor each."""

    def rest(self, first: int, last: int) -> torch.Tensor:
        """Keys and values of the tokens first … last − 1."""

    def states(self) -> tuple[torch.Tensor, ...]:
        """The states after the last token."""


class Node:
    """A block of tokens after the blocks of its parent.

    Attributes:
        hot, cold: how many entries at and below this node are on the device and on the host. If any is on the device, so is the
            block. If all are on the host, so is the block. Without entries it is removed.
    """

    __slots__ = ("block", "children", "cold", "entries", "hot", "key", "length", "on_host", "parent")

    def __init__(self, parent: Node | None, key: Hashable, length: int, block: torch.Tensor | None = None):
        self.parent, self.key, self.length, self.block = parent, key, length, block
        self.children: dict[bytes, Node] = {}
        self.entries: dict[bytes, Entry] = {}
        self.hot = self.cold = 0
        self.on_host = False

    def path(self) -> list[Node]:
        """The nodes from this one up to the first block."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes


class Entry:
    """States after a block, or after up to 63 further tokens, whose keys and values are stored in the entry."""

    def __init__(self, node: Node, tail: bytes, rest: torch.Tensor | None, states: tuple[torch.Tensor, ...]):
        self.node, self.tail, self.rest, self.states = node, tail, rest, states
        self.on_host, self.pins = False, 0

    @property
    def length(self) -> int:
        return self.node.length + len(self.tail) // TOKEN

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.states) + (0 if self.rest is None else self.rest.nbytes)

    @property
    def root(self) -> Hashable:
        """The key, besides the tokens, under which it is kept."""
        node = self.node
        while node.parent is not None:
            node = node.parent
        return node.key

    def move(self, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.states = tuple(map(to, self.states))
        self.rest = None if self.rest is None else to(self.rest)


class Read:
    """An entry at the time when it was found. It stays usable if the tree drops the entry.

    Attributes:
        nodes: the nodes of all whole blocks before its states, in order. `blocks` has their keys and values.
    """

    def __init__(self, entry: Entry):
        self.nodes = entry.node.path()[::-1]
        self.blocks = [node.block for node in self.nodes]
        self.length, self.tail, self.rest, self.states = entry.length, entry.tail, entry.rest, entry.states


class Tree:
    """Kept prefixes. The least recently used entries are dropped first. Pinned entries stay.

    Args:
        max_bytes: budget for tensors on the device.
        host_bytes: budget for tensors that are moved to the host when the device is full. What does not fit there is dropped.
        to_host, to_device: functions that move a tensor.
    """

    def __init__(
        self,
        max_bytes: int,
        host_bytes: int = 0,
        to_host: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.cpu,
        to_device: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.cpu,
    ):
        self.max_bytes, self.host_bytes = max_bytes, host_bytes
        self._to_host, self._to_device = to_host, to_device
        self.evicted = self.offloaded = 0
        self.clear()

    def clear(self) -> None:
        self.roots: dict[Hashable, Node] = {}
        self.device, self.host = 0, 0  # bytes
        self._recent: OrderedDict[Entry, None] = OrderedDict()
        self._recent_on_host: OrderedDict[Entry, None] = OrderedDict()
        self._walked: tuple[bytes, list[Node]] | None = None  # the last path through the tree, and its tokens

    def entries(self) -> list[Entry]:
        """The least recently used first. Those on the host come before the others."""
        return [*self._recent_on_host, *self._recent]

    def nodes(self) -> Iterator[Node]:
        todo = list(self.roots.values())
        while todo:
            node = todo.pop()
            todo += node.children.values()
            if node.parent is not None:
                yield node

    def find(self, root: Hashable, tokens: bytes, most: int) -> dict[int, Entry]:
        """All entries that are a prefix of the tokens, with at most `most` tokens, by length."""
        found = {}
        for node in self._known(self.roots[root], tokens) if root in self.roots else ():
            for tail, entry in node.entries.items():
                if entry.length <= most and tokens.startswith(tail, node.length * TOKEN):
                    found[entry.length] = entry
        return found

    def shared(self, root: Hashable, tokens: bytes) -> int:
        """How many tokens, in whole blocks, are shared with something that is kept."""
        return 0 if root not in self.roots else self._known(self.roots[root], tokens)[-1].length

    def touch(self, entry: Entry) -> None:
        recent = self._recent_on_host if entry.on_host else self._recent
        if entry in recent:
            recent.move_to_end(entry)

    def keep(self, root: Hashable, tokens: bytes, source: Source) -> bool:
        """Keep the states after these tokens, and the keys and values that are not kept yet. Returns whether there was room."""
        n, whole = len(tokens) // TOKEN, len(tokens) // TOKEN // BLOCK
        top = self.roots.get(root) or Node(None, root, 0)
        *known, node = self._known(top, tokens)
        known = [*known[1:], node] if node is not top else []
        tail = tokens[whole * BLOCK * TOKEN :]
        if len(known) == whole and tail in node.entries:
            entry = node.entries[tail]
            self.touch(entry)
            if entry.on_host:
                self.promote(entry)
            return True
        cold = sum(x.block.nbytes for x in known if x.on_host)
        more = (n - len(known) * BLOCK) * source.token_bytes
        if not self._room(source.state_bytes + more + cold, known):
            return False
        try:
            states, rest = source.states(), source.rest(whole * BLOCK, n) if tail else None
            blocks = source.blocks(len(known), whole)
        except BaseException:
            self._release(known)
            raise
        self.roots.setdefault(root, top)
        self._warm(known)
        for i, block in enumerate(blocks, len(known)):
            key = tokens[i * BLOCK * TOKEN : (i + 1) * BLOCK * TOKEN]
            child = node.children[key] = Node(node, key, node.length + BLOCK, block)
            child.hot, node = 1, child
            self.device += block.nbytes
        entry = node.entries[tail] = Entry(node, tail, rest, states)
        self.device += entry.nbytes
        self._recent[entry] = None
        return True

    def promote(self, entry: Entry) -> bool:
        """Move an entry from the host back to the device. Returns whether it still exists and there was room."""
        if entry not in self._recent_on_host:
            return False
        path = entry.node.path()
        entry.pins += 1
        try:
            if not self._room(entry.nbytes + sum(x.block.nbytes for x in path if x.on_host), path):
                return False
            entry.move(self._to_device)
        finally:
            entry.pins -= 1
        self._warm(path)
        for node in path:
            node.cold -= 1
        del self._recent_on_host[entry]
        self.host -= entry.nbytes
        self.device += entry.nbytes
        entry.on_host = False
        self._recent[entry] = None
        return True

    def _known(self, node: Node, tokens: bytes) -> list[Node]:
        """The root and the nodes of whole blocks along the tokens.

        Prompts often begin as the last one did. To compare all tokens at once takes less than to hash each block. A node that was
        removed has no block, and neither has any below it.
        """
        path = [node]
        if self._walked is not None:
            before, nodes = self._walked
            if nodes[0] is node and nodes[-1].block is not None and tokens.startswith(before):
                path = nodes[:]
        while True:
            at = path[-1].length * TOKEN
            node = path[-1].children.get(tokens[at : at + BLOCK * TOKEN])
            if node is None:
                break
            path.append(node)
        if path[1:]:
            self._walked = tokens[: path[-1].length * TOKEN], path[:]
        return path

    def _room(self, need: int, path: list[Node]) -> bool:
        """Make room on the device and count one more entry on the nodes. If there cannot be enough room, nothing is dropped."""
        stay = {id(x): x.block.nbytes for pinned in self._recent if pinned.pins for x in pinned.node.path()}
        stay |= {id(x): x.block.nbytes for x in path if not x.on_host}
        pinned = sum(x.nbytes for x in self._recent if x.pins)
        if need + pinned + sum(stay.values()) > self.max_bytes:
            return False  # although other entries were dropped
        for node in path:
            node.hot += 1
        while self.device + need > self.max_bytes:
            self._demote(next(x for x in self._recent if not x.pins))
        return True

    def _release(self, path: list[Node]) -> None:
        for node in path:
            node.hot -= 1
        for node in sorted(path, key=lambda node: -node.length):
            self._place_block(node)

    def _warm(self, path: list[Node]) -> None:
        """Move the blocks of held nodes to the device, if there is room for them."""
        for node in path:
            if node.on_host:
                node.block, node.on_host = self._to_device(node.block), False
                self.host -= node.block.nbytes
                self.device += node.block.nbytes

    def _demote(self, entry: Entry) -> None:
        """Move an entry from the device to the host if there is room, else drop it."""
        del self._recent[entry]
        path, fits = entry.node.path(), entry.nbytes <= self.host_bytes
        if fits:
            self._room_on_host(entry.nbytes)
            fits = self.host + entry.nbytes <= self.host_bytes
        self.device -= entry.nbytes
        for node in path:
            node.hot -= 1
            node.cold += fits
        if fits:
            self.offloaded += 1
            entry.move(self._to_host)
            entry.on_host = True
            self.host += entry.nbytes
            self._recent_on_host[entry] = None
        else:
            self.evicted += 1
            del entry.node.entries[entry.tail]
        for node in path:
            self._place_block(node)
        self._prune(entry.root)

    def _room_on_host(self, need: int) -> None:
        while self.host + need > self.host_bytes:
            victim = next((x for x in self._recent_on_host if not x.pins), None)
            if victim is None:
                return
            self._drop_from_host(victim)

    def _drop_from_host(self, entry: Entry) -> None:
        del self._recent_on_host[entry]
        del entry.node.entries[entry.tail]
        self.evicted += 1
        self.host -= entry.nbytes
        path = entry.node.path()
        for node in path:
            node.cold -= 1
        for node in path:
            self._place_block(node)
        self._prune(entry.root)

    def _place_block(self, node: Node) -> None:
        """Move a block to where its entries need it, or drop it."""
        if node.hot or node.block is None:
            return
        if node.cold and not node.on_host:
            self._room_on_host(node.block.nbytes)  # this may drop the entries that need the block
        if node.cold and not node.on_host:
            self.device -= node.block.nbytes
            self.host += node.block.nbytes
            node.block, node.on_host = self._to_host(node.block), True
        elif not node.cold and node.block is not None:
            if node.on_host:
                self.host -= node.block.nbytes
            else:
                self.device -= node.block.nbytes
            node.block = None
            del node.parent.children[node.key]

    def _prune(self, root: Hashable) -> None:
        if root in self.roots and not (self.roots[root].children or self.roots[root].entries):
            del self.roots[root]
