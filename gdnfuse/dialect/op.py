"""What a dialect op is, and the table of all ops."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class DialectOp:
    """One op of the dialect.

    Attributes:
        name: its name. The op is ``torch.ops.gdnfuse.<name>``.
        reference: a plain PyTorch function with the op's signature. It defines the meaning of the op.
        fake: the same for fake tensors: shape, dtype and device of the result.
        overload: the registered ``OpOverload``.
        mutates: names of the arguments that are written in place.
        examples: yields ``(args, kwargs)`` of small real inputs, for ``opcheck`` and the kernel tests.
        equation: one line of maths, for people.
        inline: whether a compiler may trace the reference, or a function of the arguments by name that says so. It may not if the
            reference loops over something that is known only at run time.
    """

    name: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    overload: Any
    mutates: tuple[str, ...]
    examples: Callable[[], list[tuple[tuple[Any, ...], dict[str, Any]]]]
    equation: str
    inline: bool | Callable[[dict[str, Any]], bool] = True
    arg_names: tuple[str, ...] = field(default=())
    defaults: dict[str, Any] = field(default_factory=dict)

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a call by name, defaults included."""
        bound = dict(self.defaults)
        bound.update(zip(self.arg_names, args, strict=False))
        bound.update(kwargs)
        return bound

    def inlines(self, arguments: dict[str, Any]) -> bool:
        """Whether a compiler may trace the reference of a call with these arguments."""
        return self.inline(arguments) if callable(self.inline) else self.inline


OPS: dict[str, DialectOp] = {}


def register(
    name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    examples: Callable[[], list[tuple[tuple[Any, ...], dict[str, Any]]]],
    *,
    equation: str,
    mutates: tuple[str, ...] = (),
    inline: bool | Callable[[dict[str, Any]], bool] = True,
) -> DialectOp:
    """Register ``gdnfuse::<name>`` with torch.library. The reference is its implementation on every device."""
    custom = torch.library.custom_op(f"gdnfuse::{name}", reference, mutates_args=mutates, schema=schema(reference, mutates))
    custom.register_fake(fake)
    overload = getattr(torch.ops.gdnfuse, name).default
    parameters = inspect.signature(reference).parameters.values()
    arg_names, defaults = tuple(p.name for p in parameters), {p.name: p.default for p in parameters if p.default is not p.empty}
    op = DialectOp(name, reference, fake, overload, mutates, examples, equation, inline, arg_names, defaults)
    OPS[name] = op
    return op


def schema(function: Callable[..., Any], mutates: tuple[str, ...] = ()) -> str:
    """The schema of an op from the annotations of its function.

    torch has no annotation for an optional list of tensors, although its dispatcher supports one.
    """
    signature = inspect.signature(function, eval_str=True)
    lists = [p.name for p in signature.parameters.values() if p.annotation == list[torch.Tensor] | None]
    known = [p.replace(annotation=list[int] | None) if p.name in lists else p for p in signature.parameters.values()]

    def stand_in() -> None: ...

    stand_in.__signature__ = signature.replace(parameters=known)
    text = torch.library.infer_schema(stand_in, mutates_args=mutates)
    for name in lists:
        text = text.replace(f"SymInt[]? {name}=", f"Tensor[]? {name}=")
    return text


def op_of(target: Any) -> DialectOp | None:
    """The dialect op with the overload ``target``, or None."""
    return OPS.get(target.name().removeprefix("gdnfuse::")) if getattr(target, "namespace", None) == "gdnfuse" else None


def need_tokens(op: str, T: Any) -> None:
    """Raise ValueError if there are no tokens."""
    if T == 0:
        raise ValueError(f"{op} needs at least one token, found T = 0.")


def acc_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if any input is float64, else float32."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype
