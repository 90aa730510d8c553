"""What kernel files share: how a kernel is registered, launched, checked, and described for compilation without a device."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from gdnfuse import compat
from gdnfuse.dialect import OPS
from gdnfuse.dialect.op import schema
from gdnfuse.errors import Refused
from gdnfuse.kernels.launch.inductor import REPLAYED
from gdnfuse.kernels.launch.replay import Replayed

log = logging.getLogger(__name__)

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
INDEX_POINTERS = {torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1", torch.uint8: "*u8", torch.int8: "*i8"}
MAX_HEAD_DIM = 256
# Constexprs by which a kernel divides its work: tiles, steps, parts.
SHARES = ("R", "BM", "BN", "BK", "BV", "BB", "BD", "BL", "TILES", "SPLITS", "STAGES", "EARLY", "AHEAD", "LOOP")


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
    """The kernel of one dialect op, or of a function of torch.

    Attributes:
        name: name of the dialect op, if there is one. The Triton op is ``torch.ops.gdnfuse_triton.<name>``.
        op: its ``OpOverload``, with the arguments, outputs and mutations of what it replaces.
        launch: the function that launches it.
        replayed: the same function, as the op calls it.
        supports: takes the same arguments, real or fake. Raises Refused with the reason if the kernel does not support them.
        early: names of the arguments that it reads before it waits for the kernels before it, if it may overlap them (see
            `overlap_options`). They must not change after the first kernel of a graph has started.
        measured: the benchmark that compares its configurations on an H200, or empty.
        by: whose kernels it launches.
    """

    name: str
    op: Any
    launch: Callable[..., Any] = field(repr=False)
    replayed: Replayed = field(repr=False)
    supports: Callable[..., None] = field(repr=False)
    early: tuple[str, ...] = ()
    measured: str = ""
    by: str = "triton"

    @property
    def arg_names(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.launch).parameters)

    def jit_kernels(self, *args: Any, **kwargs: Any) -> list[CompileSpec]:
        """The specialisations that a call with these arguments launches, in order. Tensors may be on the device "meta"."""
        return launched_by(self.launch, *args, **kwargs)

    def plan(self, arguments: dict[str, Any]) -> list[str]:
        """One line per kernel that a call with these fake tensors launches: its name, how it divides the work, its warps.

        Empty if that depends on sizes that are known only at run time, or on a missing device.
        """
        specs: list[CompileSpec] = []
        tensors = [t for t in compat.tree_leaves(arguments) if isinstance(t, torch.Tensor) and compat.is_fake(t)]
        if tensors and all(isinstance(n, int) for t in tensors for n in (*t.shape, *t.stride())):
            if (planned := _planned.get()) is not None:
                planned.append((self, arguments))
            with _standing_in(lambda kernel: _Recorder(kernel, specs)), tensors[0].fake_mode:
                try:
                    self.launch(**arguments)
                except Exception as e:
                    log.debug("%s has no plan: %s", self.name, e)
                    return []
        return [
            ", ".join(
                [spec.kernel.__name__.removesuffix("_kernel")]
                + [f"{name} {spec.constexprs[name]}" for name in SHARES if name in spec.constexprs]
                + [f"{spec.options['num_warps']} warps"]
            )
            for spec in specs
        ]

    def compile_ahead(self, arguments: dict[str, Any], pool: Executor) -> list[Future[Any]]:
        """Let threads of `pool` compile the kernels that a call with these fake tensors launches, one each.

        Kernels that need real tensors, for descriptors, are excluded. They are compiled when they are launched.
        """
        pending: list[Future[Any]] = []
        tensors = [t for t in compat.tree_leaves(arguments) if isinstance(t, torch.Tensor)]
        numbers = [n for t in tensors for n in (*t.shape, *t.stride())]
        if all(isinstance(n, int) for n in numbers) and compat.is_fake(tensors[0]) and tensors[0].device.type == "cuda":
            with _standing_in(lambda kernel: _Ahead(kernel, tensors[0].device, pool, pending)), tensors[0].fake_mode:
                try:
                    self.launch(**arguments)
                except Exception as e:
                    log.debug("%s is not compiled ahead: %s", self.name, e)
        return pending


_library = torch.library.Library("gdnfuse_triton", "DEF")


def register(
    name: str,
    launch: Callable[..., Any],
    supports: Callable[..., None],
    early: tuple[str, ...] = (),
    measured: str = "",
    by: str = "triton",
    grows: dict[str, int] | None = None,
) -> Implementation:
    """Register ``gdnfuse_triton::<name>``, opaque to compilers, with `launch` for CUDA. Fake and writes are those of the dialect.

    A launch may have one additional argument named `overlap`, see `overlap_options`. `grows` is as in `Replayed`.

    The op is opaque because a compiler that looks into a launch analyses the kernel again for every call in a graph. That takes
    about 30 ms each, three times per compilation: several seconds for a model with 32 layers. And there is nothing to fuse into
    it.
    """
    _library.define(name + schema(launch, OPS[name].mutates), tags=torch.Tag.needs_fixed_stride_order)
    replayed = Replayed(launch, _standing_in, grows)
    _library.impl(name, replayed, "CUDA")
    meaning = OPS[name].fake
    torch.library.register_fake(
        f"gdnfuse_triton::{name}", lambda *args, overlap=False, **kwargs: meaning(*args, **kwargs), lib=_library
    )
    op = getattr(torch.ops.gdnfuse_triton, name).default
    setattr(op, REPLAYED, replayed)
    return Implementation(name, op, launch, replayed, supports, early, measured, by)


def overlap_options(tensor: torch.Tensor, *early: torch.Tensor | None) -> dict[str, Any]:
    """Launch options of a kernel that may start while the one before it still runs. Empty if it cannot.

    Args:
        tensor: a tensor on the device that must support it.
        early: tensors that the kernel reads before it waits. They must be contiguous, because a copy would have been launched
            just before.
    """
    if tensor.device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(tensor.device)[0] < 9:
        return {}
    if compat.dependent_launch() == (None, None):
        return {}
    return {"launch_pdl": True} if all(t is None or t.is_contiguous() for t in early) else {}


_planned: ContextVar[list[tuple[Implementation, dict[str, Any]]] | None] = ContextVar("planned", default=None)


@contextmanager
def planning() -> Iterator[list[tuple[Implementation, dict[str, Any]]]]:
    """What is planned in this block: each kernel with its arguments, which are fake tensors of known sizes."""
    planned: list[tuple[Implementation, dict[str, Any]]] = []
    token = _planned.set(planned)
    try:
        yield planned
    finally:
        _planned.reset(token)


# What replaces kernels in this thread: a function from a kernel to its replacement.
_stand_in: ContextVar[Callable[[Any], Any] | None] = ContextVar("stand_in", default=None)


@contextmanager
def _standing_in(make: Callable[[Any], Any]) -> Iterator[None]:
    token = _stand_in.set(make)
    try:
        yield
    finally:
        _stand_in.reset(token)


class _Recorder:
    """Replaces a kernel and notes how it is called."""

    def __init__(self, kernel: Any, specs: list[CompileSpec]):
        self.kernel, self.specs = kernel, specs

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.record

    def record(self, *args: Any, **kwargs: Any) -> None:
        parameters = compat.parameters(self.kernel)
        names = [p.name for p in parameters]
        values = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
        options = {n: v for n, v in kwargs.items() if n not in names}
        signature, constexprs, attrs = {}, {}, {}
        for i, param in enumerate(parameters):
            value = values[param.name]
            if param.is_constexpr or value is None or (type(value) is int and value == 1 and not param.do_not_specialize):
                signature[param.name], constexprs[param.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                pointers = POINTERS | INDEX_POINTERS
                signature[param.name] = pointers[value.dtype]
                if not param.do_not_specialize_on_alignment:
                    attrs[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[param.name] = "fp32"
            else:
                signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not param.do_not_specialize:
                    attrs[(i,)] = [["tt.divisibility", 16]]
        self.specs.append(CompileSpec(self.kernel, signature, constexprs, attrs, options))


@dataclass(frozen=True)
class _Ahead:
    """Replaces a kernel and lets a thread compile it."""

    kernel: Any
    device: torch.device
    pool: Executor
    pending: list[Future[Any]]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.submit

    def submit(self, *args: Any, **kwargs: Any) -> None:
        self.pending.append(self.pool.submit(self._warmup, [a.dtype if isinstance(a, torch.Tensor) else a for a in args], kwargs))

    def _warmup(self, args: list[Any], kwargs: dict[str, Any]) -> None:
        with torch.cuda.device(self.device):
            self.kernel.warmup(*args, grid=(1,), **kwargs)


def launched_by(launch: Callable[..., Any], *args: Any, **kwargs: Any) -> list[CompileSpec]:
    """The specialisations of kernels that a function launches, in order. The kernels are only noted."""
    specs: list[CompileSpec] = []
    with _standing_in(lambda kernel: _Recorder(kernel, specs)):
        launch(*args, **kwargs)
    return specs


def kernel_of(kernel: Any) -> Any:
    """The kernel to launch: itself, or its replacement in this thread."""
    make = _stand_in.get()
    return kernel if make is None else make(kernel)


def launching() -> bool:
    """Whether kernels are really launched in this thread, and not only noted or compiled."""
    make = _stand_in.get()
    return make is None or getattr(make, "launches_kernels", False)


def require_dtypes(**tensors: torch.Tensor | None) -> None:
    """Refuse a tensor that is not float32, bfloat16 or float16."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in POINTERS:
            raise Refused(f"{name} must be float32, bfloat16 or float16, found {str(t.dtype).removeprefix('torch.')}.")


def require_static(**sizes: Any) -> None:
    """Refuse a size that is not a plain number. The check adds no guard."""
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise Refused(f"{name} must be static, found the symbolic size {size}.")


def require_tokens(T: Any) -> None:
    """Refuse the length 0. Other and symbolic lengths are accepted."""
    if isinstance(T, int) and T < 1:
        raise Refused(f"T must be at least 1, found {T}.")


def require_one_token(T: Any) -> None:
    """Refuse any length but the number 1. The check adds no guard."""
    if not isinstance(T, int) or T != 1:
        raise Refused(f"T must be 1, found {T}.")


def require_head_dims(**dims: Any) -> None:
    """Refuse a head dimension that is symbolic or above MAX_HEAD_DIM."""
    require_static(**dims)
    for name, size in dims.items():
        if size > MAX_HEAD_DIM:
            raise Refused(f"{name} must be at most {MAX_HEAD_DIM}, found {size}.")
