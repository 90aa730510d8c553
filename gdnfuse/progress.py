"""What is being done, in a line on the terminal."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


def hidden() -> bool | None:
    """What `disable` must be for a bar on terminals only: given that, tqdm does not read TQDM_DISABLE itself."""
    return bool(os.environ.get("TQDM_DISABLE")) or None


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Show what is done and for how long, after a second, on stderr if that is a terminal and TQDM_DISABLE is not set.

    Yields what to call with each step's name.
    """
    bar = tqdm(bar_format="{desc} ({elapsed})", disable=hidden(), delay=1, leave=False)
    done = threading.Event()

    def tick() -> None:  # a step may take long, and time goes on meanwhile
        wait = bar.delay
        while not done.wait(wait):
            bar.refresh()
            wait = 0.5

    ticker = threading.Thread(target=tick, daemon=True)
    if not bar.disable:
        ticker.start()
    try:
        yield lambda step: bar.set_description_str(step, refresh=False)
    finally:
        done.set()
        if ticker.is_alive():
            ticker.join()
        bar.close()


_listeners: list[Callable[[str], None]] = []


def announce(step: str) -> None:
    """Say what is done next, to whoever waits for it."""
    for listener in _listeners:
        listener(step)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Have `listener` called with every step that is announced."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
