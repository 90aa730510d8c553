"""Agreement: before ranks do something together, they compare what each is about to do. If one cannot do it, none does.

Messages go through the store of the process group, not through collectives. A collective waits for a missing rank until it times
out, after half an hour by default.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gdnfuse import compat, versions
from gdnfuse.errors import GdnfuseError, one_line

SECONDS = 8.0  # how long a rank waits for the others
OF_A_GRAPH = 120.0  # and while they compile one graph, for which ranks need different times
_calls = itertools.count()  # each rank makes the same number of calls
_graphs: Counter[str] = Counter()  # how often a graph that sends the same was compiled
log = logging.getLogger("gdnfuse")


class Alone:
    """The agreement of a single process: there is nothing to compare."""

    ranks = 1

    @contextlib.contextmanager
    def reached(self, terms: dict[str, Any] | None = None, failed: Exception | None = None) -> Iterator[dict[str, Any]]:
        """Run the block. If `failed` is given, raise it instead."""
        if failed is not None:
            raise failed
        yield dict(terms or {})


class Agreement:
    """One matter on which the ranks of the default process group agree, step by step."""

    def __init__(self) -> None:
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._name, self._points = f"gdnfuse/{next(_calls)}", itertools.count()

    @contextlib.contextmanager
    def reached(self, terms: dict[str, Any] | None = None, failed: Exception | None = None) -> Iterator[dict[str, Any]]:
        """Run the block, and end when every rank has run it and has the same terms.

        Args:
            terms: what must be equal on all ranks, by name. The block may add to them.
            failed: an earlier failure of this rank. It then only tells the others.

        Raises:
            GdnfuseError: on every rank, if one failed, did not arrive, or has other terms.
        """
        mine, said = {**_versions(), **(terms or {})}, ""
        try:
            if failed is not None:
                raise failed
            yield mine
        except GdnfuseError as e:
            failed, said = e, str(e)
        except Exception as e:
            failed, said = e, f"{one_line(e)}."
        message = json.dumps({"failed": said, "terms": {name: repr(term) for name, term in mine.items()}})
        found = self._exchanged(message)
        if sentence := _disagreement(found):
            raise GdnfuseError(sentence) from failed

    def _exchanged(self, message: str) -> list[dict[str, Any] | None]:
        """The message of each rank; None for a rank that did not arrive."""
        key, until = f"{self._name}/{next(self._points)}", time.monotonic() + SECONDS
        compat.say_to_ranks(f"{key}/{self.rank}", message)
        found = [compat.heard_from_rank(f"{key}/{rank}", max(until - time.monotonic(), 0.01)) for rank in range(self.ranks)]
        heard = [None if text is None else json.loads(text) for text in found]
        if _disagreement(heard):
            # One rank may own the store, so it may end only after all have read.
            compat.say_to_ranks(f"{key}/{self.rank}/heard", "")
            for rank in range(self.ranks):
                if heard[rank] is not None:
                    compat.heard_from_rank(f"{key}/{rank}/heard", 1.0)
        return heard


def on_graph(before: Sequence[str], after: Sequence[str]) -> str:
    """Compare with the other ranks what a graph would send, before it is compiled.

    If one rank rewrites a graph and another cannot, the first would wait for what the other never sends. If another rank does not
    compile this graph within OF_A_GRAPH seconds, a warning says so, and this rank compiles its own.

    Args:
        before: the collectives of the graph as it came, in order, each with what it sends.
        after: those of the graph as it would be compiled.

    Returns:
        Why all ranks must compile it as it came; empty if all would send the same.
    """
    if not torch.distributed.is_initialized():
        return ""
    same, sent = (hashlib.sha256(json.dumps(list(x)).encode()).hexdigest() for x in (before, after))
    key, until = f"gdnfuse/graph/{same}/{_graphs[same]}", time.monotonic() + OF_A_GRAPH
    _graphs[same] += 1
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    compat.say_to_ranks(f"{key}/{rank}", f"{sent} {len(after)}")
    for other in range(ranks):
        text = compat.heard_from_rank(f"{key}/{other}", max(until - time.monotonic(), 0.01))
        if text is None:
            needed = f"Every rank must compile a graph with collectives within {OF_A_GRAPH:g} s of the first"
            log.warning("%s, found nothing from rank %d: call the model on all ranks with the same inputs.", needed, other)
        elif text.split()[0] != sent:
            found = f"{len(after)} collectives on rank {rank} and {text.split()[1]} others on rank {other}"
            return f"All ranks must send the same from a graph, found {found}: it stays as it came on all."
    return ""


def _versions() -> dict[str, Any]:
    return {f"version of {name}": versions.version(name) for name in ("gdnfuse", "torch", "transformers")}


def _disagreement(found: list[dict[str, Any] | None]) -> str:
    """A sentence on what the ranks disagree about. Empty if they agree."""
    for rank, said in enumerate(found):
        if said is not None and said["failed"]:
            return f"Rank {rank}: {said['failed']}"
    if missing := [rank for rank, said in enumerate(found) if said is None]:
        return (
            f"Every rank must call gdnfuse.compile with tensor_parallel within {SECONDS:g} s of the first, found nothing from "
            f"rank {missing[0]}: call it on all ranks, after torch.distributed.barrier() if some take longer to load."
        )
    first = found[0]["terms"]
    for rank, said in enumerate(found):
        for name in {**first, **said["terms"]}:
            here, there = first.get(name, "none"), said["terms"].get(name, "none")
            if here != there:
                return f"Every rank must have the same {name}, found {_short(here)} on rank 0 and {_short(there)} on rank {rank}."
    return ""


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
