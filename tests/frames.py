"""Calls with room for the frames of all that they call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def with_room(call: Callable[..., Any], *args: Any) -> Any:
    """What the call returns.

    Python gets memory for frames from the system in blocks of 16 kB, and gives a block back when the call that needed it ends.
    A loop whose calls cross the end of a block does that each time, which was a tenth of the time of tests that compile. A frame
    that needs a large block leaves the rest of it to all that it calls.
    """
    return call(*args)


with_room.__code__ = with_room.__code__.replace(co_stacksize=2**17)  # words: more than half of a block of 2 MB, never touched
