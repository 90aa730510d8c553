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


LONGEST = 300  # characters of somebody else's error in a sentence of ours


def one_line(error: BaseException) -> str:
    """Kind and message of somebody else's error, for a sentence of ours: one line, without a full stop behind it."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # an error that cannot say what it is about
        text = ""
    text = text if len(text) < LONGEST else text[:LONGEST] + "…"
    return f"{type(error).__name__}: {text.rstrip('.') or 'no message'}"


class GdnfuseError(RuntimeError):
    """An error for the user: bad options, or `strict` and a layer left unfused."""


def require_model(model: Any, who: str) -> None:
    """Raises GdnfuseError unless `model`, which a sentence calls `who`, is a model: something with modules in it."""
    if isinstance(model, type) or not callable(getattr(model, "named_modules", None)):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise GdnfuseError(f"{who} must be a torch.nn.Module, found {found}.")
