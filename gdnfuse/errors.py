"""What is raised: for the user, and between the parts of the compiler. Imports nothing of ours."""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """A rule, a kernel or the packing declines, with a sentence: what was required and what was found.

    Args:
        reason: the sentence.
        at: the node it is about, or its name, if any.
    """

    def __init__(self, reason: str, at: Any = None):
        super().__init__(reason)
        self.reason = reason
        self.node = at
        self.at = None if at is None else str(at)


class GdnfuseError(RuntimeError):
    """An error for the user: bad options, or `strict` and a layer left unfused."""
