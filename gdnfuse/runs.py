"""Counts how many fused Gated DeltaNet layers the graphs of a thread have run, so that a call can check whether it was fused.

And what the ranks of a process agree by before they compile a graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any


class Runs(threading.local):
    """The counters of one thread.

    Attributes:
        fused: how often graphs have run a fused layer so far.
        bounded: how often graphs have run a chunked rule that was given the bounds of sequences.
        unfused: for the last graph with layers: why each unfused layer is not fused, by path.
        watched: the inputs that fused layers read, while a call is watched; else None.
        checkpoints: while somebody collects them, the states that graphs of prompts keep on their way, layer by layer: recurrent
            states [B, n, HV, K, V] and conv windows [B, n, D, W]. Else None.
        drafting: whether what runs now drafts tokens for a model.
    """

    fused: int = 0
    bounded: int = 0
    unfused: Mapping[str, str] = MappingProxyType({})
    watched: list[Any] | None = None
    checkpoints: list[list[Any]] | None = None
    drafting: bool = False


class Ranks:
    """How ranks agree on a graph, for all threads.

    Attributes:
        agree: called with what a graph sends to other ranks as it came, and as it would be compiled. Its answer is why it must be
            compiled as it came, on all ranks; or empty. None if ranks do not agree, as in a process alone.
    """

    agree: Callable[[Sequence[str], Sequence[str]], str] | None = None


RUNS, RANKS = Runs(), Ranks()
