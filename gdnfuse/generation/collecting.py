"""Garbage collection while a first call compiles, which makes millions of objects and little garbage.

Each full collection would look at all that the process holds: of a step's first call that is a tenth.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def old_objects_set_aside() -> Iterator[None]:
    """Collections inside the block look at what was made in it alone; afterwards at everything again.

    Where somebody has set objects aside already, who may not want them back, nothing is done. Objects that nobody holds go at
    once all the same; only cycles made before the block stay until its end.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    kept = gc.get_freeze_count()
    try:
        yield
    finally:
        if gc.get_freeze_count() <= kept:  # more would be somebody else's
            gc.unfreeze()
