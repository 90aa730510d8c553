"""Wrappers: which models inside a module have to be compiled.

peft, torch's DistributedDataParallel and classes of your own may pass their calls on to a model of transformers inside them. The
`generate` of that model calls the model and never the wrapper.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import Any

import torch

from gdnfuse import compat
from gdnfuse.errors import GdnfuseError


def gdn_layers(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The A_log of every Gated DeltaNet layer of a model, by the path of the layer.

    Such a layer owns A_log and dt_bias, one number per value head [HV]. Mamba2 also has a D, and Kimi's delta attention has
    another dt_bias.
    """
    found = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        A_log, dt_bias = own.get("A_log"), own.get("dt_bias")
        if A_log is not None and dt_bias is not None and A_log.ndim == 1 and A_log.shape == dt_bias.shape:
            if "D" not in own:
                found[path] = A_log
    return found


def decoder_layers(model: torch.nn.Module) -> set[CodeType]:
    """The code of the forwards of a model's decoder layers: of the list that its Gated DeltaNet layers stand in, or their own."""
    found: set[type[torch.nn.Module]] = set()
    for path in gdn_layers(model):
        names = path.split(".")
        above = [model.get_submodule(".".join(names[:i])) for i in range(len(names) + 1)]
        stack = next((m for m in reversed(above) if isinstance(m, torch.nn.ModuleList | torch.nn.Sequential)), None)
        found |= {type(above[-1])} if stack is None else {type(m) for m in stack}
    return {f.__code__ for f in (inspect.unwrap(cls.forward) for cls in found) if isinstance(f, FunctionType)}


def compiled_models(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The models whose calls must be compiled so that the calls and the `generate` of `model` are compiled.

    That is `model` itself, unless it passes its calls on. Then it is every model inside that has Gated DeltaNet layers and
    transformers' `generate`.

    Raises:
        GdnfuseError: the module cannot pass calls on to a compiled model.
    """
    if not isinstance(model, torch.nn.Module):
        raise GdnfuseError(f"gdnfuse.compile needs a torch.nn.Module, found {type(model).__name__}.")
    inner = [] if _generates(model) else [m for m in model.modules() if m is not model and _generates(m) and gdn_layers(m)]
    for module in model.modules():
        if module not in inner and (module is model or any(m in inner for m in module.modules())):
            _check(module)
    return inner or [model]


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether calls of a model go through torch.compile in any way."""
    forward = model.forward
    return compat.compiled_call(model) is not None or compat.uncompiled(forward) is not forward


def _generates(module: torch.nn.Module) -> bool:
    """Whether `module.generate` is transformers' own and calls this module."""
    if not hasattr(type(module), "get_compiled_call"):  # that generate asks the model for it
        return False
    from transformers import GenerationMixin

    return getattr(type(module), "generate", None) is GenerationMixin.generate


def _check(wrapper: torch.nn.Module) -> None:
    if compat.uncompiled(wrapper) is not wrapper:
        raise GdnfuseError(
            "gdnfuse.compile needs a model that torch.compile has not wrapped, found an OptimizedModule, whose calls go to "
            "torch.compile's backend and whose generate bypasses it: pass the model that was given to torch.compile."
        )
    if isinstance(wrapper, torch.nn.DataParallel) and len(wrapper.device_ids) > 1:
        raise GdnfuseError(
            f"gdnfuse.compile needs a model that is not copied between devices, found DataParallel, which copies it to "
            f"{len(wrapper.device_ids)} devices at each call: use a process per device, or pass the model inside."
        )


def handing_on(wrapper: torch.nn.Module, inner: Sequence[torch.nn.Module], say: Callable[[str], None]) -> Callable[..., Any]:
    """The call of a wrapper. Afterwards it says if the call reached none of the compiled models."""
    plain, reached = compat.call_of(wrapper), False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal reached
        if reached or torch.compiler.is_dynamo_compiling():
            return plain(*args, **kwargs)
        compiled = [compat.compiled_call(m) for m in inner]

        def noting(impl: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal reached
                reached = True
                return impl(*args, **kwargs)

            return call

        for m, impl in zip(inner, compiled, strict=True):
            compat.set_compiled_call(m, noting(impl))
        try:
            out = plain(*args, **kwargs)
        finally:
            for m, impl in zip(inner, compiled, strict=True):
                compat.set_compiled_call(m, impl)
        if not reached:
            name, called = type(wrapper).__name__, type(inner[0]).__name__
            say(
                f"A call of {name} must reach the call of the {called} inside it, which is what is compiled, found that it goes "
                f"round it, as a call of its forward does. Call the {called} itself; generate is compiled."
            )
        return out

    return call
