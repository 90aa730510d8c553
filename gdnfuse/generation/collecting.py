"""Garbage collection during a first call. Compiling makes millions of objects and little garbage.

Each full collection would look at all objects of the process. That is a tenth of the time of a step's first call.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def old_objects_set_aside() -> Iterator[None]:
    """Let collections inside the block look only at objects that were made in it. After the block they look at everything again.

    If somebody else has frozen objects, nothing is done, because unfreezing would free theirs too. Objects without references are
    freed at once in any case. Only cycles that were made before the block stay until its end.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    kept = gc.get_freeze_count()
    try:
        yield
    finally:
        if gc.get_freeze_count() <= kept:  # otherwise somebody else has frozen objects
            gc.unfreeze()
