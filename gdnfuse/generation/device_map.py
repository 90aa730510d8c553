"""device_map: the hooks that accelerate puts around every module of a model over several devices, of which those at borders stay.

torch may not trace these hooks, so that a graph ends at each. What they do here can be traced: a module's inputs go where its
weights are. Inside a decoder layer of one device they have nothing to do. So the layer's own hook stays, in a form that is
traced, and the backend cuts the graph between devices. The model computes the same, compiled or not, and so does a copy of it.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from gdnfuse import compat
from gdnfuse.errors import GdnfuseError, Refused
from gdnfuse.generation.wrappers import gdn_layers

log = logging.getLogger(__name__)

REMEDY = (
    'Load the model on one device, with device_map={{"": 0}} or none, or on several GPUs with whole decoder layers on each; '
    "until then nothing around {} is fused."
)


class Borders:
    """What becomes of the hooks of one model. Nothing is changed before `make`.

    Args:
        model: as accelerate has left it, or without any hooks.

    Attributes:
        why_not: why all hooks stay as they are, and what to do about it, in sentences; empty where they need not.
        kept: paths of the modules whose hooks stay, in a form that is traced.
        inside: how many hooks have nothing to do.
    """

    def __init__(self, model: torch.nn.Module):
        self.why_not: tuple[str, str] | None = None
        self.kept: list[str] = []
        self._hooks: list[tuple[Any, torch.device]] = []
        self._inside: list[torch.nn.Module] = []
        self._before: list[tuple[Any, str, Any]] = []
        hooks = {path: hook for path, m in model.named_modules() if (hook := compat.hook_of_accelerate(m)) is not None}
        if not any(map(compat.aligns_devices, hooks.values())):
            return
        try:
            _check(model, hooks)
        except Refused as e:
            self.why_not = e.reason, REMEDY.format(e.at or "a module with such a hook")
            return
        self._shared = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
        self._plan(model, "", None)

    @property
    def inside(self) -> int:
        return len(self._inside)

    def __str__(self) -> str:
        devices = " and ".join(dict.fromkeys(str(device) for _, device in self._hooks))
        return (
            f"Of accelerate's hooks {len(self.kept)} stay at borders of devices, where they are traced, and {self.inside} inside "
            f"of what is on one device are left out ({devices})."
        )

    def make(self) -> None:
        """Have the hooks at borders traced, and those inside not called."""
        for hook, device in self._hooks:
            self._set(hook, "execution_device", device)
            for name, of in (("pre_forward", before_forward), ("post_forward", after_forward)):
                self._set(hook, name, types.MethodType(of, hook))
        for module in self._inside:
            for name, value in compat.without_hook(module).items():
                self._set(module, name, value)
        if self._hooks:
            log.info("gdnfuse: %s", self)

    def undo(self) -> None:
        """As it was before `make`."""
        for of, name, value in reversed(self._before):
            _set(of, name, value)
        self._before = []

    def _set(self, of: Any, name: str, value: Any) -> None:
        self._before.append((of, name, vars(of).get(name)))
        _set(of, name, value)

    def _plan(self, module: torch.nn.Module, path: str, around: torch.device | None) -> None:
        """Of a module and all in it, whose inputs are on the device `around`, if that is known."""
        hook = compat.hook_of_accelerate(module)
        if hook is not None:
            device = _execution(hook)
            alone = self._shared[id(module)] == 1 and not isinstance(module, torch.nn.Embedding)
            if around == device and alone and not hook.io_same_device:
                self._inside.append(module)
            elif all(hook is not known for known, _ in self._hooks):
                self._hooks.append((hook, device))
                self.kept.append(path)
            hooked = (compat.hook_of_accelerate(m) for m in module.modules())
            on = {_execution(h) for h in hooked if h is not None} | _devices(module)
            around = device if on == {device} else None
        for name, child in module.named_children():
            self._plan(child, f"{path}.{name}".lstrip("."), around)


def check(model: torch.nn.Module, **others: Any) -> None:
    """Raises GdnfuseError for arguments of `gdnfuse.compile`, by their names, that need a model on one device, if it is not."""
    on = sorted(map(str, _devices(model) - {torch.device("meta")}))
    given = [name for name, argument in others.items() if argument is not None]
    if given and len(on) > 1:
        raise GdnfuseError(
            f"{given[0]} needs a model on one device, found it on {' and '.join(on)}: leave {given[0]} away, or load the model "
            'with device_map={"": 0}.'
        )


@contextlib.contextmanager
def made(borders: Sequence[Borders]) -> Iterator[None]:
    """Makes all of them, and undoes them if what is inside fails."""
    try:
        for one in borders:
            one.make()
        yield
    except BaseException:
        for one in borders:
            one.undo()
        raise


def _set(of: Any, name: str, value: Any) -> None:
    """An attribute of an instance; with None it has that of its class."""
    if value is None:
        vars(of).pop(name, None)
    else:
        vars(of)[name] = value


def before_forward(hook: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What accelerate's hook does before a module whose weights stay where they are, in a form that is traced."""
    if hook.io_same_device:
        hook.input_device = next((x.device for x in _tensors((args, kwargs))), None)
    skipped = [hook.skip_keys] if isinstance(hook.skip_keys, str) else hook.skip_keys or []
    return _sent(args, hook.execution_device, ()), _sent(kwargs, hook.execution_device, skipped)


def after_forward(hook: Any, module: torch.nn.Module, output: Any) -> Any:
    """What it does behind one."""
    if not hook.io_same_device or hook.input_device is None:
        return output
    skipped = [hook.skip_keys] if isinstance(hook.skip_keys, str) else hook.skip_keys or []
    return _sent(output, hook.input_device, skipped)


def _sent(x: Any, device: torch.device, skipped: Any) -> Any:
    """The same with every tensor on a device, but what stands under a skipped key. What is there already is the same object."""
    if isinstance(x, torch.Tensor):
        return x if x.device == device else x.to(device)
    if isinstance(x, tuple | list):
        sent = [_sent(y, device, skipped) for y in x]
        return type(x)(*sent) if hasattr(x, "_fields") else type(x)(sent)
    if isinstance(x, Mapping):
        return type(x)({k: y if k in skipped else _sent(y, device, skipped) for k, y in x.items()})
    return x.to(device) if hasattr(x, "to") else x


def _tensors(x: Any) -> Iterator[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, tuple | list | Mapping):
        for y in x.values() if isinstance(x, Mapping) else x:
            yield from _tensors(y)


def _check(model: torch.nn.Module, hooks: dict[str, Any]) -> None:
    """Raises Refused for hooks that must stay as they are."""
    modules = dict(model.named_modules())
    for path, hook in hooks.items():
        name = path or type(model).__name__
        if not compat.aligns_devices(hook) or not _is_as_it_was(hook):
            raise Refused(
                f"Hooks of accelerate must all be AlignDevicesHooks as it made them, found a {type(hook).__name__}.", name
            )
        if hook.execution_device is None:
            raise Refused("Hooks of accelerate must say where a module computes, found one that does not.", name)
        if hook.offload or any(x.is_meta for x in modules[path].parameters(recurse=False)):
            raise Refused("Weights must stay on the device that computes with them, found some that are offloaded.", name)
        here = _devices(modules[path], recurse=False)
        if here - {_execution(hook)}:
            on = " and ".join(map(str, here))
            raise Refused(
                f"Weights must be where their module's hook sends its inputs, {_execution(hook)}, found them on {on}.", name
            )
    for path in gdn_layers(model):
        layer = path.rpartition(".")[0]
        if len(on := _devices(modules[layer])) > 1 and layer:
            raise Refused(f"A decoder layer must be on one device, found it on {' and '.join(sorted(map(str, on)))}.", layer)


def _is_as_it_was(hook: Any) -> bool:
    """Whether nobody but us has put methods of their own on a hook."""
    own = (vars(hook).get(name) for name in ("pre_forward", "post_forward"))
    return all(x is None or getattr(x, "__func__", None) in (before_forward, after_forward) for x in own)


def _devices(module: torch.nn.Module, recurse: bool = True) -> set[torch.device]:
    return {x.device for held in (module.parameters(recurse), module.buffers(recurse)) for x in held}


def _execution(hook: Any) -> torch.device:
    """Where a hook sends inputs, with its number."""
    device = torch.device(hook.execution_device)
    return device if device.type == "cpu" or device.index is not None else torch.empty(0, device=device).device
