"""Every private API of torch, Triton and transformers that gdnfuse uses, and what happens without it.

An entry is a function whose first arguments are what its decorator names as `module:attribute`. These are looked up at the first
call. If this version of the library lacks one, or it must be called in another way, the entry does what `instead` says. One
warning says what that costs: speed, or a row of a report. The user's compilation and the import of gdnfuse never fail because of
it. `missing` lists what is not there.

Libraries are imported only in functions, so importing this file imports none.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from itertools import chain
from operator import attrgetter, is_not, itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gdnfuse.errors import one_line

log = logging.getLogger(__name__)

ENTRIES: dict[str, Entry] = {}
GONE = (ImportError, AttributeError, TypeError)  # what a missing or changed API raises


class Entry:
    """A private API in use.

    Args:
        use: the function that uses it. Its docstring says what it returns and, after "Without it:", what is lost if it is not
            there.
        paths: the first arguments of `use`, each as "module:attribute" or "module".
        instead: called with the other arguments if `use` fails.
        gone: exceptions of `use` which mean that this version has another API.
        level: log level of the message that says what is lost.
    """

    def __init__(self, use: Callable[..., Any], paths: Sequence[str], instead: Callable[..., Any], gone: Any, level: int):
        self.name, self.use, self.paths, self.instead, self.gone, self.level = use.__name__, use, paths, instead, gone, level
        self.__doc__ = use.__doc__
        self._said = False
        ENTRIES[self.name] = self

    @cached_property
    def apis(self) -> tuple[Any, ...]:
        """The objects that `paths` name."""
        return tuple(map(find, self.paths))

    @property
    def cost(self) -> str:
        """What is lost without it, as the end of a sentence."""
        return " ".join((self.__doc__ or "").split()).split("Without it: ")[-1]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.use(*self.apis, *args, **kwargs)
        except self.gone as e:
            self._say(e)
        return self.instead(*args, **kwargs)

    def _say(self, error: Exception) -> None:
        if self._said:
            return
        self._said = True
        level = self.level if all(map(_installed, self.paths)) else logging.DEBUG
        name = self.missing() or next(iter(self.paths), self.name).replace(":", ".")
        sentence = "%s must be as in the versions that gdnfuse is tested with, found %s; without it %s"
        log.log(level, sentence, name, one_line(error), self.cost)

    def missing(self) -> str:
        """Which of `paths` this version of the library lacks. Empty if the library, or its build for GPUs, is not installed."""
        gone = next((path for path in self.paths if _raises(find, path)), "")
        return gone.replace(":", ".") if all(map(_installed, self.paths)) else ""


def private(
    *paths: str, instead: Callable[..., Any], gone: Any = GONE, level: int = logging.WARNING
) -> Callable[[Callable[..., Any]], Entry]:
    """Make a function an `Entry`."""
    return lambda use: Entry(use, paths, instead, gone, level)


def find(path: str) -> Any:
    """The object that "module:attribute" or "module" names. For "module:attribute|attribute", the first attribute that exists.

    Raises:
        ImportError, AttributeError: there is none.
    """
    module, _, attributes = path.partition(":")
    found = importlib.import_module(module)
    *newer, attribute = attributes.split("|")
    for name in newer:
        with contextlib.suppress(AttributeError):
            return attrgetter(name)(found)
    return attrgetter(attribute)(found) if attribute else found


def missing() -> list[Entry]:
    """The entries that the installed versions lack. This imports everything that they name."""
    return [entry for entry in ENTRIES.values() if entry.missing()]


def forget() -> None:
    """Look everything up again at the next call."""
    for entry in ENTRIES.values():
        entry.__dict__.pop("apis", None)
        entry._said = False


def _raises(call: Callable[..., Any], *args: Any) -> bool:
    try:
        call(*args)
    except GONE:
        return True
    return False


def _installed(path: str) -> bool:
    import torch

    library = path.split(":")[0].split(".")[0]
    for_gpus = path.startswith("torch._C:_cuda")
    return importlib.util.find_spec(library) is not None and (torch.version.cuda is not None or not for_gpus)


def nothing(*args: Any, **kwargs: Any) -> None:
    """The replacement for an API that only helps: do nothing."""


# torch: tensors


@private("torch._subclasses.fake_tensor:FakeTensor", instead=lambda tensor: hasattr(tensor, "fake_mode"), level=logging.DEBUG)
def is_fake(fake_tensor: Any, tensor: Any) -> bool:
    """Whether a tensor has a shape, a dtype and a device, but no elements.

    Without it: fake tensors are recognised by their attribute fake_mode.
    """
    return isinstance(tensor, fake_tensor)


def _empty_in(mode: Any, tensor: Any) -> Any:
    import torch

    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


@private(instead=_empty_in, level=logging.DEBUG)
def fake(mode: Any, tensor: Any) -> Any:
    """A fake tensor with the sizes of a real one. Without it: fake tensors are allocated in their mode."""
    return mode.from_tensor(tensor, static_shapes=True)


@private("torch:UntypedStorage._cdata", instead=lambda tensor: id(tensor.untyped_storage()), level=logging.DEBUG)
def memory_of(address: Any, tensor: Any) -> int:
    """A number for the memory of a tensor, fake or real, which its views share.

    Without it: memory is recognised by the storage's Python object, of which torch keeps one.
    """
    return tensor.untyped_storage()._cdata


@private("torch._C:_storage_Use_Count", "torch:UntypedStorage._cdata", instead=nothing)
def holders(count: Any, address: Any, tensor: Any) -> int | None:
    """How many tensors share the storage of this one. Without it: weights are not packed."""
    import torch

    new = torch.empty(1)  # asking adds the same to this count
    held, one = (count(t.untyped_storage()._cdata) for t in (tensor, new))
    return held - one + 1


@private("torch._C:_storage_Use_Count", "torch:UntypedStorage._cdata", instead=lambda tensors: [float("nan")] * len(tensors))
def storage_holders(count: Any, address: Any, tensors: Sequence[Any]) -> list[float]:
    """For each tensor a number that grows by one with each further holder of its storage.

    Without it: not a number, which equals nothing, so that no cache gets the memory of another.
    """
    return [count(x.untyped_storage()._cdata) for x in tensors]


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "to_local") and hasattr(tensor, "device_mesh")


@private("torch.distributed.tensor:DTensor", instead=_is_sharded, level=logging.DEBUG)
def is_sharded(dtensor: Any, tensor: Any) -> bool:
    """Whether a tensor is a DTensor. Without it: DTensors are recognised by their attributes."""
    return isinstance(tensor, dtensor)


@private("torch.distributed.tensor:DTensor._local_tensor", instead=nothing)
def local_part(slot: Any) -> str | None:
    """The attribute in which a DTensor holds this rank's part, which is not a view.

    Without it: weights that are split over ranks are not packed.
    """
    return "_local_tensor"


@private("torch.distributed.distributed_c10d:_get_default_store", instead=nothing)
def say_to_ranks(store: Any, key: str, message: str) -> None:
    """Leave a message in the store of the process group.

    Without it: ranks cannot exchange messages, and models are not cut by heads.
    """
    store().set(key, message)


@private("torch.distributed.distributed_c10d:_get_default_store", instead=nothing, level=logging.DEBUG)
def heard_from_rank(store: Any, key: str, seconds: float) -> str | None:
    """A message of a rank in that store; None if it does not come within these seconds.

    Without it: ranks cannot exchange messages.
    """
    from datetime import timedelta

    try:
        store().wait([key], timedelta(seconds=seconds))
        return store().get(key).decode()
    except RuntimeError:  # the time is over, or the rank that owns the store has ended
        return None


@private("torch:ops._c10d_functional.all_gather_into_tensor", "torch:ops._c10d_functional.wait_tensor", instead=nothing)
def gather_ops(gather: Any, wait: Any) -> tuple[Any, Any] | None:
    """The op that gathers a tensor over ranks, and the one that waits for it.

    Without it: each projection is gathered alone, as transformers' plan has it.
    """
    return gather.default, wait.default


def _summed(x: Any, group: str) -> Any:
    import torch

    summed = x.clone()
    torch.distributed.all_reduce(summed)
    return summed


@private("torch:ops._c10d_functional.all_reduce", "torch:ops._c10d_functional.wait_tensor", instead=_summed)
def summed_over_ranks(all_reduce: Any, wait: Any, x: Any, group: str) -> Any:
    """The sum over the ranks of a process group, given by its name. Without it: the sum is over the default group."""
    return wait(all_reduce(x.contiguous(), "sum", group))


@private("torch.distributed._symmetric_memory:empty", "torch.distributed._symmetric_memory:rendezvous", instead=nothing)
def symmetric_memory(empty: Any, rendezvous: Any, count: int, device: Any, group: str) -> tuple[Any, list[int], int, Any] | None:
    """Memory that all ranks of a group can write. All ranks must call this.

    It is int64 zeros [count]. Returned are this rank's part, the addresses at which this rank finds each part, its own number,
    and what must be kept as long as the memory is used. Without it: small sums over ranks are computed like large ones.
    """
    import torch

    memory = empty(count, dtype=torch.int64, device=device).zero_()
    torch.cuda.synchronize(device)  # zeros must be there before another rank knows the address
    handle = rendezvous(memory, group)
    return memory, list(handle.buffer_ptrs), handle.rank, handle


@private("torch.testing._internal.distributed.fake_pg:FakeStore", instead=nothing, level=logging.DEBUG)
def start_fake_ranks(store: Any, ranks: int) -> bool | None:
    """Make this process the first of so many ranks without the others: collectives return at once, with nothing.

    Without it: there is no report of a model on several ranks.
    """
    import torch

    torch.distributed.init_process_group("fake", store=store(), rank=0, world_size=ranks)
    return True


def _map(x: Any, change: Callable[[Any], Any]) -> Any:
    if hasattr(x, "_fields"):
        return type(x)(*(_map(y, change) for y in x))
    if type(x) in (list, tuple):
        return type(x)(_map(y, change) for y in x)
    return {k: _map(v, change) for k, v in x.items()} if isinstance(x, dict) else change(x)


def _leaves(x: Any) -> list[Any]:
    found: list[Any] = []
    _map(x, found.append)
    return found


@private("torch.utils._pytree:tree_leaves", instead=_leaves, level=logging.DEBUG)
def tree_leaves(leaves: Any, x: Any) -> list[Any]:
    """The values in nested lists, tuples and dicts, in order. Without it: other container classes are not looked into."""
    return leaves(x)


@private(
    "torch.utils._pytree:tree_map_only",
    instead=lambda kind, change, x: _map(x, lambda y: change(y) if isinstance(y, kind) else y),
    level=logging.DEBUG,
)
def tree_map_only(tree_map_only: Any, kind: Any, change: Callable[[Any], Any], x: Any) -> Any:
    """Nested lists, tuples and dicts with each value of a kind replaced.

    Without it: other container classes are not looked into.
    """
    return tree_map_only(kind, change, x)


# torch: graphs


@private("torch.fx.experimental.symbolic_shapes:statically_known_true", instead=lambda x: isinstance(x, bool) and x)
def known_true(known: Any, x: Any) -> bool:
    """Whether a bool, or a SymBool without a guard, is true.

    Without it: nothing is known about symbolic sizes, and less is fused where there are any.
    """
    return bool(known(x))


@private(instead=lambda mode: nullcontext(), level=logging.DEBUG)
def without_guards(mode: Any) -> Any:
    """A context in which looking at the sizes of fake tensors adds no guards. Without it: more may be compiled again."""
    return mode.shape_env.suppress_guards() if mode.shape_env is not None else nullcontext()


def _contiguous(tensor: Any) -> bool:
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not known_true(size == 1) and not known_true(stride == step):
            return False
        step *= size
    return True


@private("torch._prims_common:is_contiguous_or_false", instead=_contiguous, level=logging.DEBUG)
def is_contiguous(or_false: Any, tensor: Any) -> bool:
    """Whether a tensor with symbolic sizes is known to be contiguous. Without it: sizes and strides are compared one by one."""
    return or_false(tensor)


@private(instead=nothing)
def written_by(overload: Any) -> list[tuple[int | None, str]] | None:
    """The arguments that a registered op writes: their positions (None for keyword-only ones) and names.

    Without it: an op is assumed to write all its arguments, and less is fused.
    """
    marked = [(i, a) for i, a in enumerate(overload._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return [(None if a.kwarg_only else i, a.name) for i, a in marked]


def _is_operator(target: Any) -> bool:
    import torch

    return isinstance(target, type(torch.ops.aten.add.Tensor).__mro__[1])


@private("torch._ops:HigherOrderOperator", instead=_is_operator, level=logging.DEBUG)
def is_higher_order(higher_order: Any, target: Any) -> bool:
    """Whether a call is of an op that takes functions. Not called for OpOverloads.

    Without it: such ops are recognised by a class that all ops share.
    """
    return isinstance(target, higher_order)


@private(
    "torch.fx:Node._erased",
    instead=lambda node: node not in node.graph.find_nodes(op=node.op, target=node.target, sort=False),
    level=logging.DEBUG,
)
def is_erased(erased: Any, node: Any) -> bool:
    """Whether a node was removed from its graph. Without it: graphs are searched for nodes that may be gone."""
    return node._erased


@private(
    "torch._library.simple_registry:singleton",
    instead=lambda overload, args, kwargs: overload(*args, **kwargs),
    level=logging.DEBUG,
)
def fake_result(registry: Any, overload: Any, args: Any, kwargs: Any) -> Any:
    """The result of one of our registered ops on fake tensors. Without it: the dispatcher computes it, in four times the time."""
    return registry.find(overload.name()).fake_impl.kernel.func(*args, **kwargs)


def _graph_module(root: Any, graph: Any) -> Any:
    import torch

    return torch.fx.GraphModule(root, graph)


@private("torch.fx._lazy_graph_module:_LazyGraphModule", instead=_graph_module, level=logging.DEBUG)
def graph_module(lazy: Any, root: Any, graph: Any) -> Any:
    """A GraphModule whose code is generated only when it is needed.

    Without it: code is generated for every stage, although most of it is never used.
    """
    return lazy(root, graph)


@private("torch._guards:TracingContext", instead=nothing)
def keep_sources(tracing: Any, placed: dict[Any, Any], gm: Any, copy: Any) -> None:
    """Keep the sources of the inputs of Dynamo's graph in a copy of it. AOTAutograd needs them to treat inputs as static.

    Without it: there are no CUDA graphs.
    """
    if not hasattr(gm, "_param_name_to_source"):
        if tracing.try_get() is not None:
            raise AttributeError("no _param_name_to_source in Dynamo's graph")
        return
    placeholders = {old: new for old, new in placed.items() if old.op == "placeholder"}
    for old, new in placeholders.items():
        new._dynamo_source = old._dynamo_source
    copy._param_name_to_source = dict(gm._param_name_to_source)  # last, because AOTAutograd then requires the others


@private("torch._dynamo.source:ConstantSource", instead=lambda gm, node: vars(gm).pop("_param_name_to_source", None))
def like_an_input(constant: Any, gm: Any, node: Any) -> None:
    """Have AOTAutograd treat an input of a part of Dynamo's graph as one of Dynamo's own: it has a source. Without it: there are
    no CUDA graphs of such parts."""
    node._dynamo_source = constant(node.name)


@private("torch._dynamo.source:ConstantSource", instead=lambda gm, node: vars(gm).pop("_param_name_to_source", None))
def like_a_parameter(constant: Any, gm: Any, node: Any) -> None:
    """Let AOTAutograd treat a new input like one of Dynamo's Parameters: with a source and a fixed address.

    Without it: there are no CUDA graphs.
    """
    node._dynamo_source = constant(node.name)
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


@private(instead=lambda node: str(node.target), level=logging.DEBUG)
def source_name(node: Any) -> str:
    """Dynamo's name for the input of a placeholder ("L['self']..."). Without it: reports name inputs as the graph does."""
    if not hasattr(node, "_dynamo_source"):
        return str(node.target)
    name = node._dynamo_source.name
    return name() if callable(name) else name


@private("torch:_grouped_mm", instead=nothing, level=logging.DEBUG)
def grouped_mm(grouped_mm: Any) -> Any:
    """The function that transformers calls if torch.nn.functional has no grouped_mm, or None.

    Without it: it is not called either.
    """
    return grouped_mm


# Dynamo


@private("torch._dynamo:mark_static_address", instead=nothing)
def mark_static_address(mark: Any, tensor: Any) -> None:
    """Tell CUDA graphs that a tensor does not move. Without it: steps on a cache that a prompt made have no CUDA graphs."""
    mark(tensor)


@private("torch._dynamo:maybe_mark_dynamic", instead=nothing)
def mark_any_length(mark: Any, tensor: Any, axis: int) -> None:
    """Tell Dynamo that an axis may have other lengths. If it must be one number, Dynamo specialises.

    Without it: prompts and growing caches are compiled for the first length, and again at the second.
    """
    mark(tensor, axis)


def is_marked(tensor: Any) -> bool:
    """Whether a tensor has such a mark. Without it: the same axis may be marked twice."""
    return any(name.startswith("_dynamo") for name in vars(tensor))


@private("torch._dynamo:config", instead=lambda name, default: default)
def dynamo_setting(config: Any, name: str, default: Any) -> Any:
    """A setting of Dynamo. Without it: Dynamo's settings are assumed to be torch's defaults."""
    return getattr(config, name)


@private("torch._dynamo:config", instead=lambda **settings: nullcontext())
def dynamo_settings(config: Any, **settings: Any) -> Any:
    """A context with other settings of Dynamo.

    Without it: what is to be compiled once may be compiled again, or left eager at a limit.
    """
    for name in settings:
        getattr(config, name)
    return config.patch(settings)


NOTED = "fail_reason fail_user_frame_filename fail_user_frame_lineno co_filename co_firstlineno co_name recompile_reason".split()


@private(
    "torch._dynamo.utils",
    "torch._dynamo.utils:CompilationMetrics.__dataclass_fields__",
    "torch._dynamo.output_graph:GraphCompileReason.__dataclass_fields__",
    instead=lambda: ([], []),
)
def compilation_notes(utils: Any, metrics: Any, reason: Any) -> tuple[list[Any], list[Any]]:
    """What Dynamo remembers: a GraphCompileReason per graph break, and CompilationMetrics per compilation.

    Without it: neither explain nor the warnings about unfused layers know of graph breaks and recompilations.
    """
    if lost := {*NOTED} - metrics.keys() | {"reason", "user_stack"} - reason.keys():
        raise AttributeError(f"no {', '.join(sorted(lost))}")
    return list(utils.graph_break_reasons), list(utils.get_compilation_metrics())


@private("torch._dynamo.output_graph:GraphCompileReason", instead=lambda gm: None)
def graph_break(reason: Any, gm: Any) -> Any:
    """Why Dynamo ended a graph before its function was done: `reason` and `user_stack`, or None. Without it: reports do not say
    where a graph was cut."""
    found = getattr(gm, "compile_subgraph_reason", None)
    return found if isinstance(found, reason) and found.graph_break else None


@private("torch._dynamo.utils", instead=lambda most: nullcontext(), level=logging.DEBUG)
def remembering_compilations(utils: Any, most: int) -> Any:
    """A context in which Dynamo remembers more compilations. Without it: explain knows only the last 64."""
    before, limit = utils._compilation_metrics.maxlen, utils.set_compilation_metrics_limit
    limit(most)

    @contextmanager
    def remembering() -> Iterator[None]:
        try:
            yield
        finally:
            limit(before)

    return remembering()


@private("torch._dynamo.callback:callback_handler", instead=lambda callback: False)
def at_compile_start(handler: Any, callback: Callable[..., None]) -> bool:
    """Call a function whenever a compilation starts, also after `torch._dynamo.reset()`. Returns whether that works.

    Without it: nothing is captured in modules that are loaded after the backend.
    """

    def clear() -> None:
        type(handler).clear(handler)
        handler.register_start_callback(callback)

    if callback not in handler.start_callbacks:
        handler.register_start_callback(callback)
        handler.clear = clear
    return True


@private("torch._dynamo.callback:callback_handler", instead=nothing, level=logging.DEBUG)
def not_at_compile_start(handler: Any, callback: Callable[..., None]) -> None:
    """Undo `at_compile_start`. Without it: there is nothing to undo."""
    if callback in handler.start_callbacks:
        handler.remove_start_callback(callback)
        del handler.clear


@private(
    "torch._dynamo.trace_rules:_polyfilled_function_ids",
    "torch._dynamo.trace_rules:get_torch_obj_rule_map",
    "torch._dynamo.variables:PolyfilledFunctionVariable._get_polyfill_handlers",
    "torch._dynamo.variables.builder:VariableBuilder._id_dispatch",
    instead=lambda function: False,
)
def undo_substitution(ids: Any, rules: Any, handlers_of: Any, dispatch: Any, function: Any) -> bool:
    """Undo `torch.compiler.substitute_in_graph`, which has no inverse. Returns whether that worked.

    Without it: captured functions stay substituted by ones that call the original.
    """
    handlers = handlers_of()
    for known in (function, handlers.get(function)):
        if known is not None:
            dispatch().pop(id(known), None)
            if id(known) in ids():
                ids.remove(id(known))
            rules().pop(known, None)
    for known in (handlers.get(function), function):
        handlers.pop(known, None)
    return True


@private("torch._dynamo.variables:UserFunctionVariable", instead=lambda method, instead: False, level=logging.DEBUG)
def trace_instead(variable: Any, method: Any, instead: Callable[..., Any] | None) -> bool:
    """Let Dynamo trace another function, without closure, in place of a method, or the method again if it is None.

    Returns whether that works. Without it: a first call also traces how each layer makes its activation, and takes longer.
    """
    if instead is None:
        vars(method).pop("_torchdynamo_inline", None)
    return instead is None or vars(method).setdefault("_torchdynamo_inline", instead) is instead


@private("torch._C._functorch:peek_interpreter_stack", instead=lambda: True)
def under_functorch(peek: Any) -> bool:
    """Whether a transform of functorch, such as vmap, is active. Our ops have no rules for these.

    Without it: functions are not captured.
    """
    return peek() is not None


@private("torch._dynamo.symbolic_convert:InstructionTranslator.current_tx", instead=nothing)
def compiling_for(current: Any) -> tuple[Any, bool] | None:
    """The backend for which Dynamo traces in this thread, and whether it exports; None if it does not trace.

    Without it: functions are captured for torch's own backends too.
    """
    try:
        output = current().output
    except AttributeError:  # Dynamo does not trace now
        return None
    return output.compiler_fn, output.export


def wrapped_backend(backend: Any) -> Any:
    """The backend inside a wrapper of torch, if any. DistributedDataParallel's, which splits graphs, is a bound method.

    Without it: a wrapper counts as one of torch's backends.
    """
    held = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None)
    return held or getattr(getattr(backend, "__self__", None), "backend_compile_fn", None)


@private("torch._guards:GuardSource.LOCAL", instead=lambda node: False)
def of_the_model(argument: Any, node: Any) -> bool:
    """Whether the value of a placeholder comes from a module or a global and not from an argument of the call.

    Without it: dynamic=True leaves norms unfused, because their eps may have any value.
    """
    if not hasattr(node, "_dynamo_source"):
        return False
    where = node._dynamo_source.guard_source
    return (where() if callable(where) else where) is not argument


@private("torch._dynamo.symbolic_convert:TensorifyState", instead=nothing, level=logging.DEBUG)
def is_number(state: Any, symbol: Any) -> None:
    """Tell AOTAutograd that a symbolic float has become a number. Otherwise it lets Dynamo trace again.

    Without it: with dynamic=True each graph is traced twice.
    """
    state.specialize(symbol.node._expr.name)


@private("torch._inductor:compile", instead=nothing)
def inductor(compile: Any) -> Callable[..., Any] | None:
    """Compiles a graph with Inductor, or None. Without it: rewritten graphs run without Inductor."""
    return lambda gm, inputs, config_patches=None: compile(gm, inputs, options=config_patches)


def _lookup(name: str) -> Callable[..., Any]:
    return name == "inductor" and inductor() or (lambda gm, inputs, **options: gm.forward)


@private("torch._dynamo.backends.registry:lookup_backend", instead=_lookup)
def lookup_backend(lookup: Any, name: str) -> Callable[..., Any]:
    """A backend of torch.compile by name. Without it: rewritten graphs run without the inner backend, unless it is Inductor."""
    return lookup(name)


@private("torch._logging:trace_structured", instead=nothing, gone=Exception, level=logging.DEBUG)
def add_to_trace(trace: Any, name: str, encoding: str, payload: Callable[[], Any]) -> None:
    """Add something to torch's structured trace (TORCH_TRACE), for tlparse. Without it: tlparse lists no reports."""
    trace("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


# Inductor


MODES = {
    "default": {},
    "reduce-overhead": {"triton.cudagraphs": True},
    "max-autotune-no-cudagraphs": {"max_autotune": True, "coordinate_descent_tuning": True},
    "max-autotune": {"max_autotune": True, "triton.cudagraphs": True, "coordinate_descent_tuning": True},
}


@private("torch._inductor:list_mode_options", instead=lambda: MODES)
def modes(options: Any) -> dict[str, dict[str, Any]]:
    """The options of Inductor that each mode of torch.compile stands for.

    Without it: modes are assumed to be as in torch 2.13.
    """
    return options()


@private("torch._inductor:config.get_config_copy", instead=nothing, level=logging.DEBUG)
def inductor_options(get: Any) -> dict[str, Any] | None:
    """Inductor's options by name, or None. Without it: Inductor itself reports unknown options."""
    return get()


@private("torch._inductor.runtime.runtime_utils:cache_dir", instead=nothing, level=logging.DEBUG)
def cache_folder(folder: Any) -> str | None:
    """The folder in which Inductor keeps what it compiles. Without it: gdnfuse doctor does not show this folder."""
    return folder()


@contextmanager
def _fresh_cache() -> Iterator[None]:
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            os.environ.update({"TORCHINDUCTOR_CACHE_DIR": before} if before else {})


@private("torch._inductor.utils:fresh_cache", instead=_fresh_cache, level=logging.DEBUG)
def fresh_cache(fresh: Any) -> Any:
    """A context in which Inductor finds nothing that it compiled before. Without it: Inductor uses another folder meanwhile."""
    return fresh()


@private("torch._dispatch.python:enable_python_dispatcher", instead=nullcontext)
def python_dispatcher(enable: Any) -> Any:
    """A context in which composite operators are computed by their Python code, as while Dynamo traces.

    In torch 2.11 the C++ code of matmul does not support symbolic strides. Without it: with that torch, all rows of prompts of
    any length are computed.
    """
    return enable()


# Triton


@private("triton.language.extra.cuda:gdc_launch_dependents", "triton.language.extra.cuda:gdc_wait", instead=lambda: (None, None))
def dependent_launch(launch_dependents: Any, wait: Any) -> tuple[Any, Any]:
    """Functions with which a kernel starts before the one before it ends: (gdc_launch_dependents, gdc_wait).

    Without it: the kernels of a decode step do not overlap.
    """
    return launch_dependents, wait


@private(
    "triton.experimental.gluon",
    "triton.experimental.gluon.language",
    "triton.experimental.gluon.language.nvidia.ampere:async_copy",
    "triton.experimental.gluon.language.nvidia.hopper",
    "triton.experimental.gluon.nvidia.hopper:TensorDescriptor",
    "triton.experimental.gluon.language.nvidia.ampere:async_copy.async_load|async_copy.async_copy_global_to_shared",
    "triton.experimental.gluon.language.nvidia.hopper:fence_async_shared",
    "triton.experimental.gluon.language.nvidia.hopper:mbarrier",
    "triton.experimental.gluon.language.nvidia.hopper:warpgroup_mma",
    "triton.experimental.gluon.language.nvidia.hopper:warpgroup_mma_wait",
    "triton.experimental.gluon.language:warp_specialize",
    instead=nothing,
)
def gluon(
    gluon: Any, language: Any, async_copy: Any, hopper: Any, descriptor: Any, copy: Any, *used: Any
) -> tuple[Any, ...] | None:
    """Gluon for Hopper, or None: (gluon, language, async_copy, language for hopper, TensorDescriptor, copy to shared memory).

    Without it: Triton kernels replace the chunk scan and the ring that are written for Hopper.
    """
    return gluon, language, async_copy, hopper, descriptor, copy


@private("triton.experimental.gluon.language.nvidia.ampere:mma_v2", instead=nothing)
def mma_v2(mma: Any) -> Any | None:
    """Gluon's product on tensor cores with operands in registers, or None.

    Without it: FP8 weights of one row are multiplied without tensor cores.
    """
    return mma


@private(  # names since Triton 3.8 or 3.9, then older names
    "triton.experimental.gluon.language:shared_memory_descriptor.reinterpret|shared_memory_descriptor._reinterpret",
    "triton.experimental.gluon.language.nvidia.hopper:tma.async_load|tma.async_copy_global_to_shared",
    "triton.experimental.gluon.language.nvidia.hopper:tma.async_store|tma.async_copy_shared_to_global",
    "triton.experimental.gluon.language.nvidia.hopper:tma.store_wait",
    instead=nothing,
)
def gluon_tiles(reinterpret: Any, load: Any, store: Any, store_wait: Any) -> tuple[Any, ...] | None:
    """Gluon's functions for tiles, or None: (reinterpret with another shape and layout, load, store, wait for stores).

    Without it: a Triton kernel replaces the chunk scan that is written for Hopper.
    """
    return reinterpret, load, store, store_wait


@private("triton:knobs.runtime", instead=lambda: os.environ.get("TRITON_INTERPRET") == "1", level=logging.DEBUG)
def interpreting(knobs: Any) -> bool:
    """Whether Triton interprets kernels instead of compiling them. Without it: the environment variable is read instead."""
    return bool(knobs.interpret)


@private(instead=nothing)
def parameters(kernel: Any) -> list[Any] | None:
    """The parameters of a `triton.jit` function with name, default, is_constexpr and do_not_specialize, or None.

    Without it: every launch runs its Python code, and reports do not say how kernels divide their work.
    """
    return list(kernel.params)


@private("triton.runtime.jit:JITFunction", instead=lambda kernel: 0, level=logging.DEBUG)
def machine_codes(jit_function: Any, kernel: Any) -> int:
    """How many machine codes of a kernel this process has; 0 for anything else. Without it: warmup counts no kernels."""
    return sum(len(cache[0]) for cache in kernel.device_caches.values()) if isinstance(kernel, jit_function) else 0


@private("triton.runtime.jit:JITFunction", instead=lambda kernel: {})
def machine_code_files(jit_function: Any, kernel: Any) -> dict[str, dict[str, bytes]]:
    """The files in Triton's cache on disk with a kernel's machine codes of this process, by name, by key.

    Without it: files of artifacts do not contain our kernels, which are compiled again.
    """
    caches = kernel.device_caches.values() if isinstance(kernel, jit_function) else ()
    found = {}
    for code in [code for cache in caches for code in cache[0].values()]:
        with contextlib.suppress(FileNotFoundError):  # the cache was emptied meanwhile
            found[code.hash] = {name: Path(path).read_bytes() for name, path in code.metadata_group.items()}
    return found


@private("triton.runtime.cache:get_cache_manager", "torch._inductor.runtime.runtime_utils:triton_cache_dir", instead=nothing)
def keep_machine_code(manager: Any, folder: Any, key: str, files: dict[str, bytes], device: int) -> None:
    """Put a machine code into Triton's cache on disk, where it is found when its kernel is compiled for the device.

    Without it: our kernels are compiled again, whatever a file of artifacts contains.
    """
    # Inductor sets this at its first Triton kernel. From then on its folder is Triton's cache, and ours must be in it.
    os.environ.setdefault("TRITON_CACHE_DIR", folder(device))
    cache = manager(key)
    paths = {name: cache.put(content, name) for name, content in files.items()}
    cache.put_group(next(name for name in files if name.endswith(".json")), paths)


@private(instead=nothing)
def runner(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., None] | None:
    """A function that launches a compiled kernel on a grid, with its arguments in bound form; None if it is not compiled.

    Without it: every launch runs its Python code.
    """
    return compiled[grid] if hasattr(compiled, "run") else None


@private("triton:knobs.runtime", instead=nothing)
def launch_hooks(knobs: Any) -> Any:
    """The object with the hooks that profilers add to every launch: launch_enter_hook and launch_exit_hook, or None.

    Without it: repeated launches go through Triton's runner.
    """
    if not hasattr(knobs, "launch_enter_hook") or not hasattr(knobs, "launch_exit_hook"):
        raise AttributeError("no hooks of a launch")
    return knobs


@private(instead=nothing, gone=Exception)
def launcher(compiled: Any, grid: tuple[int, int, int]) -> tuple[Any, Any, Any] | None:
    """Triton's launcher of a compiled kernel, and the function and metadata that it takes, or None.

    This checks that Triton's runner calls its launcher with (*grid, stream, function, metadata, None, enter hook, exit hook,
    *arguments), as we do. If a profiler has added a hook, the runner must be called. Without it: repeated launches go through
    Triton's runner.
    """
    hooks, seen = launch_hooks(), []
    probe = SimpleNamespace(
        run=lambda *arguments: seen.append(arguments),
        function=compiled.function,
        packed_metadata=compiled.packed_metadata,
        _init_handles=lambda: None,
        launch_metadata=lambda *arguments: None,
    )
    type(compiled).__getitem__(probe, grid)("argument", stream=7)
    expected = (*grid, 7, compiled.function, compiled.packed_metadata, None)
    known = seen == [(*expected, hooks.launch_enter_hook, hooks.launch_exit_hook, "argument")]
    if not known:
        raise AttributeError("its runner calls its launcher otherwise")
    hooked = hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls
    return None if hooked else (compiled.run, compiled.function, compiled.packed_metadata)


# torch: launches that are repeated


@private(
    "torch.utils._python_dispatch:TorchDispatchMode",
    "torch.utils._python_dispatch:_disable_current_modes",
    instead=lambda: (None, None),
)
def dispatch_mode(mode: Any, without: Any) -> tuple[Any, Any]:
    """(TorchDispatchMode, a context without any). Without it: every launch runs its Python code."""
    return mode, without


@private("torch.utils._python_dispatch:TorchDispatchMode", instead=lambda seen: nullcontext())
def seeing_ops(mode: Any, seen: Callable[[Any, Any], None]) -> Any:
    """A context in which `seen` is called with each op of eager calls and its result.

    Without it: benchmarks find no collectives.
    """

    class Seeing(mode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = op(*args, **(kwargs or {}))
            seen(op, result)
            return result

    return Seeing()


@private("torch._C._dynamo.guards:TensorGuards", instead=nothing)
def tensor_guards(guards: Any, tensors: Sequence[Any], sizes: Any, strides: Any) -> Callable[..., bool] | None:
    """A function that compares tensors with these: class, dispatch keys, dtype, device, and sizes and strides that are not None.

    Without it: the layout of a call is read in Python and compared with the recorded ones.
    """
    return guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def _current_device() -> Callable[[], int]:
    import torch

    return torch.cuda.current_device


@private("torch._C:_cuda_getDevice", instead=_current_device, level=logging.DEBUG)
def current_device(get: Any) -> Callable[[], int]:
    """Returns the index of the current GPU. Without it: torch.cuda is asked, which takes twice the time."""
    return get


def _current_stream() -> Callable[[int], int]:
    import torch

    return lambda device: torch.cuda.current_stream(device).cuda_stream


@private("torch._C:_cuda_getCurrentRawStream", instead=_current_stream, level=logging.DEBUG)
def current_stream(get: Any) -> Callable[[int], int]:
    """Returns the handle of a GPU's current stream. Without it: torch.cuda is asked, which takes several times as long."""
    return get


def _empty(device: Any) -> Callable[..., Any]:
    import torch

    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


@private("torch._C._dynamo.guards:_empty_strided_cuda", instead=_empty, level=logging.DEBUG)
def empty(on_gpu: Any, device: Any) -> Callable[..., Any]:
    """Allocates memory by size, stride and dtype on a device, as Inductor's code does. A GPU must be the current device.

    Without it: repeated launches allocate by torch.empty_strided, which takes several times as long.
    """
    return on_gpu if device.type == "cuda" else _empty(device)


@private(
    "torch._inductor.lowering:constrain_to_fx_strides",
    "torch._inductor.lowering:lowerings",
    "torch._inductor.lowering:make_fallback",
    instead=nothing,
    gone=Exception,
)
def known_to_inductor(strides: Any, lowerings: Any, make_fallback: Any, op: Any, name: str) -> None:
    """Tell Inductor about an op: it keeps the layout of the arguments, as the op's tag asks, and its code calls an expression.

    For an op that it does not know, torch 2.11 makes a message with everything that the op depends on, again for each path to it.
    That takes longer than the rest of compiling a decode step. Without it: Inductor's code calls the kernels through torch's
    dispatcher.
    """
    if op in lowerings:
        return
    make_fallback(op, layout_constraint=strides, warn=False)
    lowering = lowerings[op]

    @functools.wraps(lowering)
    def lowered(*args: Any, **kwargs: Any) -> Any:
        results = lowering(*args, **kwargs)
        called_by_inductor(op, name)
        return results

    lowerings[op] = lowered


@private("torch._inductor.ir:FallbackKernel", "torch._inductor.virtualized:V", instead=nothing, gone=Exception)
def called_by_inductor(fallback_kernel: Any, virtualized: Any, op: Any, name: str) -> None:
    """Let Inductor's Python code call an expression for the op call that it generated last.

    Without it: Inductor's code calls the kernels through torch's dispatcher.
    """
    if virtualized.graph.cpp_wrapper:
        return
    operations = reversed(virtualized.graph.operations)
    made = next(o for o in operations if isinstance(o, fallback_kernel) and o.op_overload is op)
    if not hasattr(made, "python_kernel_name"):
        raise AttributeError("the call has no name")
    made.python_kernel_name = name


@private("torch._inductor.runtime.triton_compat:triton_key", instead=nothing, level=logging.DEBUG)
def triton_key(key: Any) -> Callable[[], str] | None:
    """A function that makes the key of Triton's caches and remembers it, or None.

    Without it: the key is made when it is first needed, which takes time then.
    """
    return key


# torch: attention of prompts


@private("torch:ops.aten._scaled_dot_product_flash_attention.default", instead=nothing)
def flash_attention(op: Any) -> Any:
    """torch's FlashAttention-2 (query, key, value, dropout_p, is_causal, return_debug_mask, *, scale), or None.

    Without it: attention of prompts is torch's.
    """
    return _of_arguments(op, "query key value dropout_p is_causal return_debug_mask scale")


@private("torch:ops.aten._scaled_dot_product_cudnn_attention.default", instead=nothing)
def cudnn_attention(op: Any) -> Any:
    """cuDNN's attention (query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, *, scale).

    Without it: attention of long prompts is FlashAttention-2's.
    """
    return _of_arguments(op, "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask scale")


def _of_arguments(op: Any, names: str) -> Any:
    found = " ".join(argument.name for argument in op._schema.arguments)
    if found != names:
        raise AttributeError(f"its arguments are {found}")
    return op


# torch: tensors


def _copy_each(to: Sequence[Any], tensors: Sequence[Any]) -> None:
    for x, y in zip(to, tensors, strict=True):
        x.copy_(y)


@private("torch:_foreach_copy_", instead=_copy_each)
def copy_all(copy: Any, to: Sequence[Any], tensors: Sequence[Any]) -> None:
    """Copy many tensors into others in a few launches, one for each dtype if they are contiguous.

    Without it: states of drafts and of known prefixes are copied one by one.
    """
    pairs: dict[tuple[Any, ...], tuple[list[Any], list[Any]]] = {}
    for x, y in zip(to, tensors, strict=True):
        of_kind = pairs.setdefault((x.dtype, y.dtype, x.is_contiguous() and y.is_contiguous()), ([], []))
        of_kind[0].append(x)
        of_kind[1].append(y)
    for of_kind in pairs.values():
        copy(*of_kind)


def _subtract_from_each(tensors: Sequence[Any], n: int | Sequence[Any]) -> None:
    for x, each in zip(tensors, [n] * len(tensors) if isinstance(n, int) else n, strict=True):
        x.sub_(each)


@private("torch:_foreach_sub_", instead=_subtract_from_each)
def subtract_from_all(subtract: Any, tensors: Sequence[Any], n: int | Sequence[Any]) -> None:
    """Subtract a number, or a tensor from each, from many tensors in place, in one launch if they are of one dtype and device.

    Without it: the lengths of a static cache's layers are cropped one by one.
    """
    if tensors:
        subtract(tensors, n)


@private("torch:_foreach_add_", instead=nothing)
def add_to_all(add: Any) -> Any:
    """The function that adds a number to many tensors in place, in one launch. None if there is none.

    Without it: the lengths of a static cache's layers are written one by one.
    """
    return add


# torch: modules


@private("torch.nn:Module._call_impl", instead=lambda module: module.__call__)
def call_of(call: Any, module: Any) -> Callable[..., Any]:
    """The uncompiled call of a module: its hooks and its forward.

    Without it: a model's calls run eager, except steps of generate with a static cache on a GPU.
    """
    return module._call_impl


@private("torch.nn:Module._call_impl", "torch.nn:Module._compiled_call_impl", instead=lambda module, to: False)
def set_compiled_call(call: Any, compiled: Any, module: Any, to: Callable[..., Any] | None) -> bool:
    """Let the calls of a module go to a function, which torch leaves out of copies and pickles. Returns whether that works.

    Without it: a model's calls run eager, except steps of generate with a static cache on a GPU.
    """
    module._compiled_call_impl = to
    return True


@private("torch.nn:Module._compiled_call_impl", instead=nothing)
def compiled_call(compiled: Any, module: Any) -> Callable[..., Any] | None:
    """The function that the calls of a module go to, or None. Without it: a model's own calls count as not compiled."""
    return module._compiled_call_impl


def forget_compiled_call(model: Any) -> None:
    """Let `generate` forget a call that it has compiled itself. Without it: it asks the model for one anyway."""
    vars(model).pop("_compiled_call", None)


@private(instead=lambda model: None)
def pipeline_stage(model: Any) -> Any:
    """What transformers knows of a model's place in a pipeline of ranks (`pp_size`), None of a model in none. Without it: graphs
    end where a stage sends and receives."""
    return vars(model).get("_pp_stage")


@private(instead=lambda module: {})
def hooks_of(module: Any) -> dict[int, Callable[..., Any]]:
    """A module's forward hooks by their numbers.

    Without it: hooks that are added or removed after a graph was traced have no effect in it.
    """
    return {**module._forward_pre_hooks, **module._forward_hooks}


@private(instead=lambda module: None)
def hook_of_accelerate(module: Any) -> Any:
    """The hook that accelerate has put around a module's forward, or None where it has none or its forward goes without. Without
    it: hooks of a device_map stay as they are, and end a graph at every module."""
    own = vars(module)
    return own["_hf_hook"] if "_hf_hook" in own and isinstance(own.get("forward"), functools.partial) else None


@private("accelerate.hooks:AlignDevicesHook", instead=lambda hook: False)
def aligns_devices(aligning: Any, hook: Any) -> bool:
    """Whether a hook of accelerate is one of those that send a module's inputs to a device, and no class made of it. Without it:
    hooks of a device_map stay as they are, and end a graph at every module."""
    return type(hook) is aligning


@private(instead=lambda module: {})
def without_hook(module: Any) -> dict[str, Any]:
    """The attributes of a module before accelerate put a hook around its forward, None where it had none. Without it: hooks that
    have nothing to do stay, and end a graph at every module."""
    old = module._old_forward
    theirs = None if getattr(old, "__func__", None) is type(module).forward else old
    return {"forward": theirs, "_hf_hook": None, "_old_forward": None}


@private("torch.nn:Module._apply", instead=lambda cls: cls)
def not_cast(apply: Any, cls: Any) -> Any:
    """A class of modules whose `to`, `half` and the like do not change what `stored` returns.

    Casts leave integers unchanged, so the stored tensors are viewed as integers meanwhile. Without it: a cast of a model also
    casts what its quantised linears store, which makes them invalid.
    """
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by their size in bytes

    def as_integers(module: Any, change: Callable[[Any], Any], recurse: bool = True) -> Any:
        stored = module.stored()

        def viewed_as_integers(x: Any) -> Any:
            return change(x.view(integers[x.itemsize])).view(x.dtype) if any(x is s for s in stored) else change(x)

        return apply(module, viewed_as_integers, recurse)

    cls._apply = as_integers
    return cls


def _everything_of(module: Any) -> tuple[list[Any], list[Any]]:
    return list(module.modules()), [*module.parameters(), *module.buffers()]


@private(instead=_everything_of, gone=(*GONE, KeyError))
def everything_of(module: Any) -> tuple[list[Any], list[Any]]:
    """All modules of a module, and all their parameters and buffers, with repetitions.

    Without it: a generate with a prefix store starts a millisecond later.
    """
    level, modules = [module], []
    while level:
        modules += level
        level = _values("_modules", level)
    return modules, _values("_parameters", modules) + _values("_buffers", modules)


def _values(name: str, modules: Sequence[Any]) -> list[Any]:
    """What the dicts of this name hold, without None. Five hundred modules take a tenth of the time of a loop."""
    dicts = filter(None, map(itemgetter(name), map(vars, modules)))
    return list(filter(partial(is_not, None), chain.from_iterable(map(dict.values, dicts))))


@private(instead=lambda tensors: [0] * len(tensors))
def version_counters(tensors: Sequence[Any]) -> list[int]:
    """How often each tensor was written in place, as far as torch counts it.

    Without it: weights written in place are found only by samples.
    """
    try:
        return list(map(attrgetter("_version"), tensors))
    except RuntimeError:  # a tensor of inference mode counts nothing
        return [0 if x.is_inference() else x._version for x in tensors]


def _of_wrapper(call: Any) -> Any:
    return getattr(call, "_orig_mod", None) or getattr(call, "_torchdynamo_orig_callable", call)


@private("torch._dynamo:OptimizedModule", instead=_of_wrapper, level=logging.DEBUG)
def uncompiled(optimized: Any, call: Any) -> Any:
    """The module or function that was given to torch.compile, if this is its result; else the same object.

    Without it: any module with the attribute _orig_mod counts as a result of torch.compile.
    """
    return call._orig_mod if isinstance(call, optimized) else getattr(call, "_torchdynamo_orig_callable", call)


@private("torch.nn.modules.module:_global_forward_pre_hooks", "torch.nn.modules.module:_global_forward_hooks", instead=lambda: ())
def global_hooks(before: Any, after: Any) -> tuple[int, ...]:
    """The numbers of the forward hooks that all modules have.

    Without it: such hooks do not run in graphs that were traced before they were registered.
    """
    return (*before, *after)


# transformers: configs


@private(instead=lambda config: "")
def attention_of(config: Any) -> str:
    """The attention that a model was loaded with, such as "sdpa" or "flash_attention_2".

    Without it: packed sequences are refused under FlashAttention too, which would keep them apart.
    """
    return config._attn_implementation or ""


# transformers: generate


@private("transformers.generation.utils:DeferredStopCheck", instead=lambda make: False, level=logging.INFO)
def replace_stop_check(theirs: Any, make: Callable[[type], type]) -> bool:
    """Replace the class by which `generate` asks one step late whether to stop by one made from it.

    Returns whether there is such a class. Without it: generate waits for every step on a GPU before it prepares the next.
    """
    from transformers.generation import utils

    if not hasattr(utils.DeferredStopCheck, "of_gdnfuse"):
        utils.DeferredStopCheck = make(theirs)
    return True


def is_users(cache: Any) -> bool:
    """Whether a cache was passed to `generate` and not made by it.

    Without it: if speculation cannot use such a cache, it makes its own and leaves the other one empty.
    """
    return getattr(cache, "_is_user_defined", False)
