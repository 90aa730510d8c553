"""What ran: how many fused Gated DeltaNet layers the graphs of a thread have run, for whoever asks whether a call was fused."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


class Runs(threading.local):
    """Of one thread.

    Attributes:
        fused: how many times graphs have run a fused layer so far.
        unfused: of the last graph with layers, why each of those that are not fused is not, by path.
        watched: the inputs that fused layers read, while somebody watches; None otherwise.
        checkpoints: while somebody collects them, the states that each graph of a prompt has passed, if it was compiled for it:
            of one layer after the other recurrent states [B, n, HV, K, V] and conv windows [B, n, D, W]. None otherwise.
        drafting: whether what runs drafts for a model, and is of few rows.
    """

    fused: int = 0
    unfused: Mapping[str, str] = MappingProxyType({})
    watched: list[Any] | None = None
    checkpoints: list[list[Any]] | None = None
    drafting: bool = False


RUNS = Runs()
