"""The tree of known prefixes: what it finds belongs to the tokens, and it never holds more than it may."""

import random

import pytest
import torch

from gdnfuse.generation import prefix_files
from gdnfuse.generation.prefix_tree import BLOCK, TOKEN, Read, Tree

TOKEN_BYTES, STATE_BYTES = 8, 160


def tokens(*ids):
    return b"".join(i.to_bytes(TOKEN, "little") for i in ids)


def sums(row):
    """For each token the sum of all up to it: what keys and states depend on."""
    found, total = [], 0
    for i in range(0, len(row), TOKEN):
        total += int.from_bytes(row[i : i + TOKEN], "little") * (i + 1)
        found.append(total)
    return torch.tensor(found)


class Computed:
    """Keys, values and states of a sequence, as `Source`."""

    token_bytes, state_bytes = TOKEN_BYTES, STATE_BYTES

    def __init__(self, row):
        self.sums = sums(row)

    def blocks(self, first, last):
        return [self.sums[i * BLOCK : (i + 1) * BLOCK].clone() for i in range(first, last)]

    def rest(self, first, last):
        return self.sums[first:last].clone()

    def states(self):
        return (self.sums[-1:].repeat(STATE_BYTES // 8),)


def check(tree):
    """Bytes are those of the tensors, each block is where its entries are, and nothing is there for nobody."""
    device = host = 0
    for node in tree.nodes():
        below, todo = [], [node]
        while todo:
            one = todo.pop()
            below += one.entries.values()
            todo += one.children.values()
        assert node.hot == sum(not e.on_host for e in below) and node.cold == sum(e.on_host for e in below) and below
        assert node.on_host == (node.hot == 0)
        host, device = host + node.block.nbytes * node.on_host, device + node.block.nbytes * (not node.on_host)
    for entry in tree.entries():
        host, device = host + entry.nbytes * entry.on_host, device + entry.nbytes * (not entry.on_host)
    assert (device, host) == (tree.device, tree.host)
    assert device <= tree.max_bytes and host <= tree.host_bytes


def check_found(tree, row, most):
    found = tree.find("weights", row, most)
    for n, entry in found.items():
        wanted = sums(row[: n * TOKEN])
        parts = [*Read(entry).blocks, *([entry.rest] if entry.rest is not None else [])]
        assert n <= most and torch.equal(torch.cat(parts), wanted) and bool((entry.states[0] == wanted[-1]).all())
    return found


def sequences(seed, folder, steps=40):
    """Random keeping, finding, pinning, clearing, and loading of what was saved."""
    rng = random.Random(seed)
    tree = Tree(rng.choice([1000, 3000, 8000]), rng.choice([0, 0, 1200, 5000]))
    known, pinned = [tokens()], []
    for _ in range(steps):
        # Goes on with something known, or parts from it somewhere.
        base = rng.choice(known[-6:])
        base = base[: rng.choice([len(base), rng.randrange(len(base) // TOKEN + 1) * TOKEN])]
        row = base + tokens(*(rng.randrange(3) for _ in range(rng.choice([1, 20, BLOCK, 150]))))
        known.append(row)
        what = rng.random()
        if what < 0.6:
            kept = tree.keep("weights", row, Computed(row))
            assert kept == (len(row) // TOKEN in check_found(tree, row, len(row) // TOKEN))
        elif what < 0.9:
            for entry in check_found(tree, row, len(row) // TOKEN - 1).values():
                tree.touch(entry)
                if entry.on_host and rng.random() < 0.5:
                    tree.promote(entry)
        elif what < 0.92 and not pinned:
            prefix_files.write(folder, {"model": "of the test"}, [Read(e) for e in tree.entries()])
            tree = Tree(tree.max_bytes, tree.host_bytes)
            with prefix_files.reading(folder, lambda: {"model": "of the test"}, torch.device("cpu")) as saved:
                assert all(tree.keep("weights", one.tokens, one) for one in saved)
        elif what < 0.96 and not pinned:
            pinned = [e for e in tree.entries() if not e.on_host][:1]
            for entry in pinned:
                entry.pins += 1
        elif pinned:
            pinned.pop().pins -= 1
        elif what > 0.99:
            tree.clear()
        check(tree)
        assert all(entry in tree.entries() for entry in pinned)
        assert not tree.find("other weights", row, 10**9)


@pytest.mark.parametrize("first", [0, 50])
def test_random_sequences(first, tmp_path):
    for seed in range(first, first + 50):
        sequences(seed, tmp_path)


@pytest.mark.sweep
def test_many_random_sequences(tmp_path):
    for seed in range(1000, 2000):
        sequences(seed, tmp_path)


def test_keys_are_held_once_and_states_where_asked():
    tree, long = Tree(1 << 20), tokens(*range(200))
    for n in (64, 128, 200):
        assert tree.keep("weights", long[: n * TOKEN], Computed(long[: n * TOKEN]))
    other = long[: 130 * TOKEN] + tokens(7, 7)
    assert tree.keep("weights", other, Computed(other))
    assert tree.device == 3 * BLOCK * TOKEN_BYTES + 4 * STATE_BYTES + (8 + 4) * TOKEN_BYTES
    assert sorted(tree.find("weights", long, 199)) == [64, 128] and tree.shared("weights", other) == 128


def test_the_least_recently_used_goes_and_what_is_pinned_stays():
    rows = [tokens(*[i] * 64) for i in range(4)]
    room = 3 * (STATE_BYTES + BLOCK * TOKEN_BYTES)
    tree = Tree(room)
    for row in rows[:3]:
        tree.keep("weights", row, Computed(row))
    tree.find("weights", rows[0], 64)[64].pins += 1
    tree.touch(tree.find("weights", rows[1], 64)[64])
    tree.keep("weights", rows[3], Computed(rows[3]))
    assert [bool(tree.find("weights", row, 64)) for row in rows] == [True, True, False, True] and tree.evicted == 1
    long = tokens(*range(64 * 4))
    assert not tree.keep("weights", long, Computed(long)) and tree.device == room  # nothing goes for what does not fit


def test_what_fails_halfway_leaves_the_tree_as_it_was():
    class Fails(Computed):
        def blocks(self, first, last):
            raise torch.OutOfMemoryError("no memory")

    tree, row = Tree(1 << 20), tokens(*range(70))
    tree.keep("weights", row, Computed(row))
    longer = row + tokens(*range(90))
    before = tree.device
    with pytest.raises(torch.OutOfMemoryError):
        tree.keep("weights", longer, Fails(longer))
    check(tree)
    assert tree.device == before and list(check_found(tree, longer, 99)) == [70]
