"""Hooks: a graph contains the forward hooks that it was traced with. Dynamo does not check whether they are still the same.

So a call with other hooks would run with the old ones. Such a call runs eager instead, and this is said.
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
    """The forward hooks of a model at its first compiled call.

    Args:
        model: the model whose calls are compiled.
        say: called with a sentence if a call runs eager because its hooks have changed.
    """

    def __init__(self, model: torch.nn.Module, say: Callable[[str], None]):
        self._model, self._say = model, say
        self._known: list[tuple[Any, ...]] | None = None
        self._hooked: list[torch.nn.Module] = []

    def heeded(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled call. If the hooks have changed, it is the model's own call instead.

        torch numbers every hook that is registered anywhere, so a call only has to compare that number.
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


# transformers adds some when hidden states are first asked for, and the first RollbackCache adds some. They do nothing in other
# calls, and Dynamo has guards for this.
ASKED_FOR = ("transformers.utils.output_capturing", "gdnfuse.generation.rollback", "gdnfuse.generation.mtp")


def hooks_now(modules: Iterable[torch.nn.Module]) -> list[tuple[Any, ...]]:
    """The id of each module with hooks, and the numbers of its hooks, then the numbers of the hooks on all modules."""
    found = []
    for m in modules:
        hooks = compat.hooks_of(m)
        found.append((id(m), *(i for i, hook in hooks.items() if getattr(hook, "__module__", "") not in ASKED_FOR)))
    of_all = compat.global_hooks()
    return [one for one in (*found, ("all", *of_all)) if len(one) > 1]
