"""Shows on the terminal what is being done."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


def hidden() -> bool | None:
    """The value of tqdm's `disable` that shows a bar only on terminals. tqdm does not read TQDM_DISABLE if `disable` is given."""
    return bool(os.environ.get("TQDM_DISABLE")) or None


@contextmanager
def progress(lines: bool = False) -> Iterator[Callable[[str], None]]:
    """Show what is done and for how long, after a second, on stderr. Only on a terminal, and if TQDM_DISABLE is not set.

    Args:
        lines: where stderr is no terminal, as in a log, write each step on a line of its own when it begins.

    Yields a function to call with the name of each step.
    """
    if lines and not sys.stderr.isatty() and not hidden():
        yield _lines()
        return
    bar = tqdm(bar_format="{desc} ({elapsed})", disable=hidden(), delay=1, leave=False)
    done = threading.Event()

    def tick() -> None:  # shows the time while a long step runs
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


def _lines() -> Callable[[str], None]:
    """A function that writes the name of each step to stderr, once in a row."""
    last = ""

    def write(step: str) -> None:
        nonlocal last
        if step != last:
            print(step, file=sys.stderr, flush=True)
        last = step

    return write


_listeners: list[Callable[[str], None]] = []


def announce(step: str) -> None:
    """Tell all listeners what is done next."""
    for listener in _listeners:
        listener(step)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Call `listener` with every step that is announced."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
