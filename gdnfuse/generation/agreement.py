"""Agreement: what all ranks must be about to do alike is compared before any does it, and one that cannot has none do it.

It goes through the store with which the process group was made, and not through collectives, which wait for a rank that never
comes for as long as their timeout says, half an hour by default.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import torch

from gdnfuse import compat, versions
from gdnfuse.errors import GdnfuseError, one_line

SECONDS = 8.0  # that a rank waits for the others
_calls = itertools.count()  # of this process; each rank makes as many


class Alone:
    """What there is to agree on where no other rank takes part: nothing."""

    ranks = 1

    @contextlib.contextmanager
    def reached(self, terms: dict[str, Any] | None = None, failed: Exception | None = None) -> Iterator[dict[str, Any]]:
        """Runs what is inside, and raises what has failed before."""
        if failed is not None:
            raise failed
        yield dict(terms or {})


class Agreement:
    """One matter on which the ranks of the default process group agree, point after point."""

    def __init__(self) -> None:
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._name, self._points = f"gdnfuse/{next(_calls)}", itertools.count()

    @contextlib.contextmanager
    def reached(self, terms: dict[str, Any] | None = None, failed: Exception | None = None) -> Iterator[dict[str, Any]]:
        """Runs what is inside, and ends once every rank has run it and found the same terms.

        Args:
            terms: what must be alike, by name; the block may add to them.
            failed: what this rank has failed with before. It takes no other step then.

        Raises:
            GdnfuseError: on every rank, if one failed, did not come, or has other terms.
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
        """What each rank said; None of one that did not come."""
        key, until = f"{self._name}/{next(self._points)}", time.monotonic() + SECONDS
        compat.say_to_ranks(f"{key}/{self.rank}", message)
        found = [compat.heard_from_rank(f"{key}/{rank}", max(until - time.monotonic(), 0.01)) for rank in range(self.ranks)]
        heard = [None if text is None else json.loads(text) for text in found]
        if _disagreement(heard):
            # The store may be one rank's: it goes when all have heard.
            compat.say_to_ranks(f"{key}/{self.rank}/heard", "")
            for rank in range(self.ranks):
                if heard[rank] is not None:
                    compat.heard_from_rank(f"{key}/{rank}/heard", 1.0)
        return heard


def _versions() -> dict[str, Any]:
    return {f"version of {name}": versions.version(name) for name in ("gdnfuse", "torch", "transformers")}


def _disagreement(found: list[dict[str, Any] | None]) -> str:
    """What keeps the ranks from it, in a sentence; empty where nothing does."""
    for rank, said in enumerate(found):
        if said is not None and said["failed"]:
            return f"Rank {rank}: {said['failed']}"
    if missing := [rank for rank, said in enumerate(found) if said is None]:
        return (
            f"Every rank must call gdnfuse.compile with tensor_parallel within {SECONDS:g} s of the first, found nothing of rank "
            f"{missing[0]}: call it on all, behind torch.distributed.barrier() where loading takes them unequally long."
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
