"""The exceptions: for the user, and between parts of the compiler. This module imports nothing of gdnfuse."""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """A rule, a kernel or the packing declines. The sentence says what was required and what was found.

    Args:
        reason: the sentence.
        at: the node that it is about, or its name, if any.
    """

    def __init__(self, reason: str, at: Any = None):
        super().__init__(reason)
        self.reason = reason
        self.node = at
        self.at = None if at is None else str(at)


LONGEST = 300  # the most characters that are quoted from another library's error


def one_line(error: BaseException) -> str:
    """The class and message of another library's error, as one line without a full stop at its end."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # an error whose text cannot be made
        text = ""
    text = text if len(text) < LONGEST else text[:LONGEST] + "…"
    return f"{type(error).__name__}: {text.rstrip('.') or 'no message'}"


class GdnfuseError(RuntimeError):
    """An error for the user: a wrong option or argument, or a layer that was not fused under `strict`."""


def require_model(model: Any, who: str) -> None:
    """Raise GdnfuseError unless `model` is a torch.nn.Module. `who` names the argument in the sentence."""
    if isinstance(model, type) or not callable(getattr(model, "named_modules", None)):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise GdnfuseError(f"{who} must be a torch.nn.Module, found {found}.")
