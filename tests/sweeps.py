"""Which parameters are tried in `make test`, where `make trust` tries all: some values, or each pair of values once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import Any

import pytest

ALL = "GDNFUSE_SWEEP" in os.environ  # set by docs/trust.py


def some(everything: Iterable[Any], *kept: Any) -> list[Any]:
    """Values of a parameter for `pytest.mark.parametrize`: those not `kept` are marked `sweep`."""
    everything = list(everything)
    assert all(one in everything for one in kept), "what is kept must be one of the values"
    return [one if one in kept else pytest.param(one, marks=pytest.mark.sweep) for one in everything]


def pairs(**axes: list[Any]) -> tuple[str, list[Any]]:
    """Arguments for `pytest.mark.parametrize`: combinations in which any two values of two parameters meet at least once.

    A fault of one kernel or pass nearly always shows with the values of two parameters, whatever the others are (Kuhn et al.,
    "Software fault interactions", 2004).
    """
    everything = list(itertools.product(*axes.values()))
    chosen = everything if ALL else _covering(everything)
    return ",".join(axes), chosen if len(axes) > 1 else [one for (one,) in chosen]


def _covering(everything: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Greedily: always the combination that shows most pairs not seen yet."""
    met = lambda one: {(i, id(one[i]), j, id(one[j])) for i, j in itertools.combinations(range(len(one)), 2)}  # noqa: E731
    missing = set().union(*map(met, everything))
    chosen = []
    while missing:
        best = max(everything, key=lambda one: len(met(one) & missing))
        chosen.append(best)
        missing -= met(best)
    return chosen or everything
