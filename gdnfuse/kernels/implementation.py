"""What the kernel files share: how one is registered, launched, checked and described for compilation without a device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from gdnfuse.dialect import OPS
from gdnfuse.report import Refused

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
INDEX_POINTERS = {torch.int32: "*i32", torch.int64: "*i64"}
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class CompileSpec:
    """One specialisation of a kernel, as ``triton.compiler.ASTSource`` takes it.

    Attributes:
        kernel: the ``@triton.jit`` function.
        signature: type of every argument by name, "constexpr" included.
        constexprs: values of the constexpr arguments, and of integers that are 1.
        attrs: divisibility of pointers and integers by 16, by argument index.
        options: num_warps and the like.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]


@dataclass(frozen=True)
class Implementation:
    """A kernel behind one dialect op, or behind a function of torch's.

    Attributes:
        name: the dialect op's name, if there is one; the Triton op is ``torch.ops.gdnfuse_triton.<name>``.
        op: its ``OpOverload``, with the arguments, outputs and mutations of what it replaces.
        launch: the function behind it.
        supports: takes the same arguments, real or fake; raises Refused with the reason if the kernel cannot take them.
    """

    name: str
    op: Any
    launch: Callable[..., Any] = field(repr=False)
    supports: Callable[..., None] = field(repr=False)

    @property
    def arg_names(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.op._schema.arguments)

    def jit_kernels(self, *args: Any, **kwargs: Any) -> list[CompileSpec]:
        """The specialisations that a call with these arguments launches, in order; tensors on device "meta" will do."""
        with _recording() as specs:
            self.launch(*args, **kwargs)
        return specs


_library = torch.library.Library("gdnfuse_triton", "DEF")


def register(
    name: str,
    launch: Callable[..., Any],
    supports: Callable[..., None],
    mutates: tuple[str, ...] = (),
    fake: Callable[..., Any] | None = None,
) -> Implementation:
    """Register ``gdnfuse_triton::<name>``, opaque to compilers, with `launch` for CUDA and `fake`, by default the dialect's.

    A launch may take one more argument than the op it stands for, by name: `overlap`, see `overlap_options`.

    Opaque, because a compiler that sees into a launch analyses the kernel anew for every call in a graph (about 30 ms each, three
    times per compilation: several seconds for a 32-layer model), and has nothing to fuse into it.
    """
    _library.define(name + torch.library.infer_schema(launch, mutates_args=mutates), tags=torch.Tag.needs_fixed_stride_order)
    _library.impl(name, _on_its_device(launch), "CUDA")
    meaning = OPS[name].fake if fake is None else fake
    torch.library.register_fake(
        f"gdnfuse_triton::{name}", lambda *args, overlap=False, **kwargs: meaning(*args, **kwargs), lib=_library
    )
    return Implementation(name, getattr(torch.ops.gdnfuse_triton, name).default, launch, supports)


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the tensors'."""

    @functools.wraps(launch)
    def launched(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(first):
            return launch(first, *args, **kwargs)

    return launched


def overlap_options(tensor: torch.Tensor, *early: torch.Tensor | None) -> dict[str, Any]:
    """Launch options of a kernel that may start while the one before it still runs; none where that cannot be.

    Args:
        tensor: on the device that must be able to.
        early: tensors that the kernel reads before it waits, contiguous: a copy would only just have been launched.
    """
    if tensor.device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(tensor.device)[0] < 9:
        return {}
    return {"launch_pdl": True} if all(t is None or t.is_contiguous() for t in early) else {}


_recorded: list[CompileSpec] | None = None


@contextmanager
def _recording() -> Iterator[list[CompileSpec]]:
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


class _Recorder:
    """Stands in for a kernel and notes how it is called."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.record

    def record(self, *args: Any, **kwargs: Any) -> None:
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
        options = {n: v for n, v in kwargs.items() if n not in names}
        signature, constexprs, attrs = {}, {}, {}
        for i, param in enumerate(self.kernel.params):
            value = values[param.name]
            if param.is_constexpr or value is None or (type(value) is int and value == 1 and not param.do_not_specialize):
                signature[param.name], constexprs[param.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                pointers = POINTERS | INDEX_POINTERS
                signature[param.name], attrs[(i,)] = pointers[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[param.name] = "fp32"
            else:
                signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not param.do_not_specialize:
                    attrs[(i,)] = [["tt.divisibility", 16]]
        _recorded.append(CompileSpec(self.kernel, signature, constexprs, attrs, options))


def kernel_of(kernel: Any) -> Any:
    """The kernel to launch: itself, or what notes the launch while `Implementation.jit_kernels` records."""
    return kernel if _recorded is None else _Recorder(kernel)


def require_dtypes(**tensors: torch.Tensor | None) -> None:
    """Refuse a tensor that is not float32, bfloat16 or float16."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in POINTERS:
            raise Refused(f"{name} must be float32, bfloat16 or float16, got {str(t.dtype).removeprefix('torch.')}.")


def require_static(**sizes: Any) -> None:
    """Refuse a size that is not a plain number; the comparison adds no guard."""
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise Refused(f"{name} must be static, got the symbolic size {size}.")


def require_one_token(T: Any) -> None:
    """Refuse any length other than the number 1; the comparison adds no guard."""
    if not isinstance(T, int) or T != 1:
        raise Refused(f"T must be 1, got {T}.")


def require_head_dims(**dims: Any) -> None:
    """Refuse a head dimension that is symbolic or above MAX_HEAD_DIM."""
    require_static(**dims)
    for name, size in dims.items():
        if size > MAX_HEAD_DIM:
            raise Refused(f"{name} must be at most {MAX_HEAD_DIM}, got {size}.")
