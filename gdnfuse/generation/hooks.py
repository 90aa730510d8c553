"""Hooks: a graph holds the forward hooks that it was traced with, and Dynamo does not look whether they are still the same ones.

So a call with others would run without them, or with those that are gone. Such a call is left eager and said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from gdnfuse import compat

CHANGED = (
    "The forward hooks of {} must be those that its graphs were traced with, found others, so calls run eager while that is so. "
    "Register hooks before gdnfuse.compile, or compile again; peft registers some for each call with adapter_names."
)


class Hooks:
    """The forward hooks of a model as its first compiled call finds them.

    Args:
        model: whose calls are compiled.
        say: what is called with a sentence where a call runs eager because they are others now.
    """

    def __init__(self, model: torch.nn.Module, say: Callable[[str], None]):
        self._model, self._say = model, say
        self._known: list[tuple[Any, ...]] | None = None
        self._hooked: list[torch.nn.Module] = []

    def heeded(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled call, for as long as the hooks are those that are known, and the model's own call otherwise.

        Whenever a hook is registered anywhere, torch counts its handle, so what a call costs is to compare that number.
        """
        plain, looked = compat.call_of(self._model), -1

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal looked
            if torch.compiler.is_dynamo_compiling():
                return compiled(*args, **kwargs)
            if looked != RemovableHandle.next_id or self._known:
                if self._changed(anywhere=looked != RemovableHandle.next_id):
                    self._say(CHANGED.format(type(self._model).__name__))
                    return plain(*args, **kwargs)
                looked = RemovableHandle.next_id
            return compiled(*args, **kwargs)

        return call

    def _changed(self, anywhere: bool) -> bool:
        found = hooks_now(self._model.modules() if anywhere else self._hooked)
        if self._known is None:
            self._known, self._hooked = found, [m for m in self._model.modules() if hooks_now([m])]
        return found != self._known


# Transformers puts some there when hidden states are first asked for, and a RollbackCache when the first one is made. They do
# nothing in calls that do not ask, and Dynamo looks whether a call does.
ASKED_FOR = ("transformers.utils.output_capturing", "gdnfuse.generation.rollback", "gdnfuse.generation.mtp")


def hooks_now(modules: Iterable[torch.nn.Module]) -> list[tuple[Any, ...]]:
    """Each hooked module's id and the numbers of its hooks' handles, and those of the hooks of all modules."""
    found = []
    for m in modules:
        hooks = compat.hooks_of(m)
        found.append((id(m), *(i for i, hook in hooks.items() if getattr(hook, "__module__", "") not in ASKED_FOR)))
    of_all = compat.global_hooks()
    return [one for one in (*found, ("all", *of_all)) if len(one) > 1]
