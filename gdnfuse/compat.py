"""Every private API of torch, Triton and transformers that gdnfuse uses, each with what happens without it.

An entry is a function that is given what its decorator names, `module:attribute`, found when it is first called. Where a version
of the library has it no more, or it is called otherwise there, the entry does what `instead` says, and one warning says what that
costs: speed, or a row of a report. It is never the user's compilation, nor the import of gdnfuse. `missing` lists what is gone.

Libraries are imported in functions only, so that importing this file imports none.
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
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gdnfuse.errors import one_line

log = logging.getLogger(__name__)

ENTRIES: dict[str, Entry] = {}
GONE = (ImportError, AttributeError, TypeError)  # what a changed API raises: not there, or called otherwise


class Entry:
    """A private API in use.

    Args:
        use: what is done with it. Its docstring says what that gives and, after "Without it:", what is lost where it is gone.
        paths: what `use` is given before the caller's arguments, each "module:attribute" or "module".
        instead: takes the caller's arguments in its place.
        gone: exceptions of `use` that mean that the API is another one in this version.
        level: of the message that says what is lost.
    """

    def __init__(self, use: Callable[..., Any], paths: Sequence[str], instead: Callable[..., Any], gone: Any, level: int):
        self.name, self.use, self.paths, self.instead, self.gone, self.level = use.__name__, use, paths, instead, gone, level
        self.__doc__ = use.__doc__
        self._said = False
        ENTRIES[self.name] = self

    @cached_property
    def apis(self) -> tuple[Any, ...]:
        """What `paths` name."""
        return tuple(map(find, self.paths))

    @property
    def cost(self) -> str:
        """What is lost without it, the end of a sentence."""
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
        """What of `paths` this version of the library lacks; empty where the library, or its build for GPUs, is not here."""
        gone = next((path for path in self.paths if _raises(find, path)), "")
        return gone.replace(":", ".") if all(map(_installed, self.paths)) else ""


def private(
    *paths: str, instead: Callable[..., Any], gone: Any = GONE, level: int = logging.WARNING
) -> Callable[[Callable[..., Any]], Entry]:
    """Makes a function an `Entry`."""
    return lambda use: Entry(use, paths, instead, gone, level)


def find(path: str) -> Any:
    """What "module:attribute" names, or "module"; of "module:attribute|attribute" the first that is there.

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
    """The entries that the installed versions lack. Imports all that they name."""
    return [entry for entry in ENTRIES.values() if entry.missing()]


def forget() -> None:
    """Look for everything anew."""
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
    """Instead of what only helps."""


# torch: tensors


@private("torch._subclasses.fake_tensor:FakeTensor", instead=lambda tensor: hasattr(tensor, "fake_mode"), level=logging.DEBUG)
def is_fake(fake_tensor: Any, tensor: Any) -> bool:
    """Whether a tensor has a shape, a dtype and a device, and no elements. Without it: fake tensors are told by their attribute
    fake_mode."""
    return isinstance(tensor, fake_tensor)


def _empty_in(mode: Any, tensor: Any) -> Any:
    import torch

    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


@private(instead=_empty_in, level=logging.DEBUG)
def fake(mode: Any, tensor: Any) -> Any:
    """A fake tensor like a real one, with its sizes. Without it: fake tensors are allocated in their mode."""
    return mode.from_tensor(tensor, static_shapes=True)


@private("torch:UntypedStorage._cdata", instead=lambda tensor: id(tensor.untyped_storage()), level=logging.DEBUG)
def memory_of(address: Any, tensor: Any) -> int:
    """Which memory a tensor lives in, fake or real: a number that views of it share. Without it: memory is told by a storage's
    Python object, of which torch keeps one."""
    return tensor.untyped_storage()._cdata


@private("torch._C:_storage_Use_Count", "torch:UntypedStorage._cdata", instead=nothing)
def holders(count: Any, address: Any, tensor: Any) -> int | None:
    """How many tensors have this one's storage. Without it: weights are not packed."""
    import torch

    new = torch.empty(1)  # what asking adds to the count, it adds here too
    held, one = (count(t.untyped_storage()._cdata) for t in (tensor, new))
    return held - one + 1


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "to_local") and hasattr(tensor, "device_mesh")


@private("torch.distributed.tensor:DTensor", instead=_is_sharded, level=logging.DEBUG)
def is_sharded(dtensor: Any, tensor: Any) -> bool:
    """Whether a tensor is a DTensor. Without it: DTensors are told by their attributes."""
    return isinstance(tensor, dtensor)


@private("torch.distributed.tensor:DTensor._local_tensor", instead=nothing)
def local_part(slot: Any) -> str | None:
    """The attribute in which a DTensor has this rank's part, and no view of it, which would share its memory. Without it: weights
    that are shared out over ranks are not packed."""
    return "_local_tensor"


@private("torch.distributed.distributed_c10d:_get_default_store", instead=nothing)
def say_to_ranks(store: Any, key: str, message: str) -> None:
    """Leave a message in the store that the process group was made with. Without it: no rank hears of another, and models are not
    cut by heads."""
    store().set(key, message)


@private("torch.distributed.distributed_c10d:_get_default_store", instead=nothing, level=logging.DEBUG)
def heard_from_rank(store: Any, key: str, seconds: float) -> str | None:
    """A message that a rank leaves there, None if it does not within these seconds. Without it: no rank hears of another."""
    from datetime import timedelta

    try:
        store().wait([key], timedelta(seconds=seconds))
        return store().get(key).decode()
    except RuntimeError:  # the time is over, or the rank whose store it is has ended
        return None


def _summed(x: Any, group: str) -> Any:
    import torch

    summed = x.clone()
    torch.distributed.all_reduce(summed)
    return summed


@private("torch:ops._c10d_functional.all_reduce", "torch:ops._c10d_functional.wait_tensor", instead=_summed)
def summed_over_ranks(all_reduce: Any, wait: Any, x: Any, group: str) -> Any:
    """The sum over the ranks of a process group, by its name. Without it: over those of the default group."""
    return wait(all_reduce(x.contiguous(), "sum", group))


@private("torch.distributed._symmetric_memory:empty", "torch.distributed._symmetric_memory:rendezvous", instead=nothing)
def symmetric_memory(empty: Any, rendezvous: Any, count: int, device: Any, group: str) -> tuple[Any, list[int], int, Any] | None:
    """Memory that all ranks of a group can write: int64 zeros [count], where this rank finds each rank's, its own number, and
    what must be kept as long as it is used. All ranks must call this. Without it: small sums over ranks go as large ones."""
    import torch

    memory = empty(count, dtype=torch.int64, device=device).zero_()
    torch.cuda.synchronize(device)  # zeroed before another rank knows where it is
    handle = rendezvous(memory, group)
    return memory, list(handle.buffer_ptrs), handle.rank, handle


@private("torch.testing._internal.distributed.fake_pg:FakeStore", instead=nothing, level=logging.DEBUG)
def start_fake_ranks(store: Any, ranks: int) -> bool | None:
    """Make this process the first of so many ranks of which the others are not there: collectives return at once, with nothing.
    Without it: there is no report of a model on several ranks."""
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
    """What stands in nested lists, tuples and dicts, in order. Without it: other classes that hold several things are not looked
    into."""
    return leaves(x)


@private(
    "torch.utils._pytree:tree_map_only",
    instead=lambda kind, change, x: _map(x, lambda y: change(y) if isinstance(y, kind) else y),
    level=logging.DEBUG,
)
def tree_map_only(tree_map_only: Any, kind: Any, change: Callable[[Any], Any], x: Any) -> Any:
    """Nested lists, tuples and dicts with each thing of a kind replaced. Without it: other classes that hold several things are
    not looked into."""
    return tree_map_only(kind, change, x)


# torch: graphs


@private("torch.fx.experimental.symbolic_shapes:statically_known_true", instead=lambda x: isinstance(x, bool) and x)
def known_true(known: Any, x: Any) -> bool:
    """Whether a bool, or a SymBool without a guard, is true. Without it: nothing is known of symbolic sizes, and less is fused
    where there are any."""
    return bool(known(x))


@private(instead=lambda mode: nullcontext(), level=logging.DEBUG)
def without_guards(mode: Any) -> Any:
    """A context in which to look at the sizes of a mode's fake tensors adds no guard to what the user compiled. Without it: more
    may be compiled again."""
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
    """Whether a tensor of symbolic sizes is known to be contiguous. Without it: sizes and strides are compared one by one."""
    return or_false(tensor)


@private(instead=nothing)
def written_by(overload: Any) -> list[tuple[int | None, str]] | None:
    """What a registered op writes: of each such argument its place, None for one that is given by keyword only, and its name.
    Without it: an op is taken to write all that it is given, and less is fused."""
    marked = [(i, a) for i, a in enumerate(overload._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return [(None if a.kwarg_only else i, a.name) for i, a in marked]


def _is_operator(target: Any) -> bool:
    import torch

    return isinstance(target, type(torch.ops.aten.add.Tensor).__mro__[1])


@private("torch._ops:HigherOrderOperator", instead=_is_operator, level=logging.DEBUG)
def is_higher_order(higher_order: Any, target: Any) -> bool:
    """Whether a call is of an op that takes functions. Not asked of OpOverloads. Without it: ops that take functions are told by
    the class that they share with all ops."""
    return isinstance(target, higher_order)


@private(
    "torch.fx:Node._erased",
    instead=lambda node: node not in node.graph.find_nodes(op=node.op, target=node.target, sort=False),
    level=logging.DEBUG,
)
def is_erased(erased: Any, node: Any) -> bool:
    """Whether a node has been taken out of its graph. Without it: graphs are searched for nodes that may be gone."""
    return node._erased


@private(
    "torch._library.simple_registry:singleton",
    instead=lambda overload, args, kwargs: overload(*args, **kwargs),
    level=logging.DEBUG,
)
def fake_result(registry: Any, overload: Any, args: Any, kwargs: Any) -> Any:
    """What a registered op of ours gives of fake tensors. Without it: the dispatcher tells what our ops give of fake tensors, in
    four times the time."""
    return registry.find(overload.name()).fake_impl.kernel.func(*args, **kwargs)


def _graph_module(root: Any, graph: Any) -> Any:
    import torch

    return torch.fx.GraphModule(root, graph)


@private("torch.fx._lazy_graph_module:_LazyGraphModule", instead=_graph_module, level=logging.DEBUG)
def graph_module(lazy: Any, root: Any, graph: Any) -> Any:
    """A GraphModule whose code is made when it is asked for. Without it: code is made of every stage, though of most nobody asks
    for it."""
    return lazy(root, graph)


@private("torch._guards:TracingContext", instead=nothing)
def keep_sources(tracing: Any, placed: dict[Any, Any], gm: Any, copy: Any) -> None:
    """Keep in a copy of Dynamo's graph where its inputs come from: AOTAutograd asks, and takes none for static otherwise. Without
    it: there are no CUDA graphs."""
    if not hasattr(gm, "_param_name_to_source"):
        if tracing.try_get() is not None:
            raise AttributeError("no _param_name_to_source in Dynamo's graph")
        return
    placeholders = {old: new for old, new in placed.items() if old.op == "placeholder"}
    for old, new in placeholders.items():
        new._dynamo_source = old._dynamo_source
    copy._param_name_to_source = dict(gm._param_name_to_source)  # last: AOTAutograd then demands the others


@private("torch._dynamo.source:ConstantSource", instead=lambda gm, node: vars(gm).pop("_param_name_to_source", None))
def like_an_input(constant: Any, gm: Any, node: Any) -> None:
    """Have AOTAutograd treat an input of a part of Dynamo's graph as one of Dynamo's own: it has a source. Without it: there are
    no CUDA graphs of such parts."""
    node._dynamo_source = constant(node.name)


@private("torch._dynamo.source:ConstantSource", instead=lambda gm, node: vars(gm).pop("_param_name_to_source", None))
def like_a_parameter(constant: Any, gm: Any, node: Any) -> None:
    """Have AOTAutograd treat a new input as Dynamo's Parameters: it has a source, and its address is fixed. Without it: there are
    no CUDA graphs."""
    node._dynamo_source = constant(node.name)
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


@private(instead=lambda node: str(node.target), level=logging.DEBUG)
def source_name(node: Any) -> str:
    """What Dynamo calls the input that a placeholder stands for ("L['self']..."). Without it: reports name inputs as the graph
    does."""
    if not hasattr(node, "_dynamo_source"):
        return str(node.target)
    name = node._dynamo_source.name
    return name() if callable(name) else name


@private("torch:_grouped_mm", instead=nothing, level=logging.DEBUG)
def grouped_mm(grouped_mm: Any) -> Any:
    """The function that transformers calls where torch.nn.functional has no grouped_mm, or None. Without it: it is not called
    either."""
    return grouped_mm


# Dynamo


@private("torch._dynamo:mark_static_address", instead=nothing)
def mark_static_address(mark: Any, tensor: Any) -> None:
    """Tell CUDA graphs that a tensor stays where it is. Without it: steps on a cache that a prompt made have no CUDA graphs."""
    mark(tensor)


@private("torch._dynamo:maybe_mark_dynamic", instead=nothing)
def mark_any_length(mark: Any, tensor: Any, axis: int) -> None:
    """Tell Dynamo that an axis may have other lengths; where it has to be one number, it specialises. Without it: prompts and
    caches that grow are compiled for the first length, and again at the second."""
    mark(tensor, axis)


def is_marked(tensor: Any) -> bool:
    """Whether somebody has told Dynamo something of a tensor. Without it: told by us of the same axis, it is told twice."""
    return any(name.startswith("_dynamo") for name in vars(tensor))


@private("torch._dynamo:config", instead=lambda name, default: default)
def dynamo_setting(config: Any, name: str, default: Any) -> Any:
    """A setting of Dynamo's. Without it: Dynamo's settings are taken to be torch's own."""
    return getattr(config, name)


@private("torch._dynamo:config", instead=lambda **settings: nullcontext())
def dynamo_settings(config: Any, **settings: Any) -> Any:
    """A context with other settings of Dynamo's. Without it: what is to be compiled once may be compiled again, or left eager at
    a limit."""
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
    """What Dynamo remembers: a GraphCompileReason of each graph break, CompilationMetrics of each compilation. Without it:
    neither explain nor what says why a layer is not fused knows of graph breaks and recompilations."""
    if lost := {*NOTED} - metrics.keys() | {"reason", "user_stack"} - reason.keys():
        raise AttributeError(f"no {', '.join(sorted(lost))}")
    return list(utils.graph_break_reasons), list(utils.get_compilation_metrics())


@private("torch._dynamo.utils", instead=lambda most: nullcontext(), level=logging.DEBUG)
def remembering_compilations(utils: Any, most: int) -> Any:
    """A context in which Dynamo remembers more of its compilations. Without it: explain knows of the last 64."""
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
    """Have a function called whenever a compilation starts, after `torch._dynamo.reset()` too. Whether that is so. Without it: of
    modules that are loaded after the backend nothing is captured."""

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
    """Undo `torch.compiler.substitute_in_graph`, which has no inverse of its own. Whether that is done. Without it: what was
    captured stays substituted, by what calls the function itself."""
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
    """Have Dynamo trace another function, of no closure, in a method's place, or the method itself again where that is None;
    whether it does. Without it: a first call takes longer by what making an activation in each layer takes to trace."""
    if instead is None:
        vars(method).pop("_torchdynamo_inline", None)
    return instead is None or vars(method).setdefault("_torchdynamo_inline", instead) is instead


@private("torch._C._functorch:peek_interpreter_stack", instead=lambda: True)
def under_functorch(peek: Any) -> bool:
    """Whether a transform of functorch is on, such as vmap, under which our ops have no rules. Without it: functions are not
    captured."""
    return peek() is not None


@private("torch._dynamo.symbolic_convert:InstructionTranslator.current_tx", instead=nothing)
def compiling_for(current: Any) -> tuple[Any, bool] | None:
    """The backend for which Dynamo traces in this thread, and whether it exports; None where it does not trace. Without it:
    functions are captured for torch's own backends too."""
    try:
        output = current().output
    except AttributeError:  # it does not trace
        return None
    return output.compiler_fn, output.export


def wrapped_backend(backend: Any) -> Any:
    """The backend that one of torch's wrappers holds, if any; DistributedDataParallel's, which cuts graphs, is a bound method.
    Without it: a wrapper counts as a backend of torch's."""
    held = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None)
    return held or getattr(getattr(backend, "__self__", None), "backend_compile_fn", None)


@private("torch._guards:GuardSource.LOCAL", instead=lambda node: False)
def of_the_model(argument: Any, node: Any) -> bool:
    """Whether what a placeholder stands for is no argument of the compiled call, but found in a module or a global. Without it:
    dynamic=True leaves norms unfused, whose eps may then be any."""
    if not hasattr(node, "_dynamo_source"):
        return False
    where = node._dynamo_source.guard_source
    return (where() if callable(where) else where) is not argument


@private("torch._dynamo.symbolic_convert:TensorifyState", instead=nothing, level=logging.DEBUG)
def is_number(state: Any, symbol: Any) -> None:
    """Tell AOTAutograd that a symbolic float has become a number, or it has Dynamo trace anew. Without it: with dynamic=True each
    graph is traced twice."""
    state.specialize(symbol.node._expr.name)


@private("torch._inductor:compile", instead=nothing)
def inductor(compile: Any) -> Callable[..., Any] | None:
    """Compiles a graph with Inductor, or None. Without it: rewritten graphs run without Inductor."""
    return lambda gm, inputs, config_patches=None: compile(gm, inputs, options=config_patches)


def _lookup(name: str) -> Callable[..., Any]:
    return name == "inductor" and inductor() or (lambda gm, inputs, **options: gm.forward)


@private("torch._dynamo.backends.registry:lookup_backend", instead=_lookup)
def lookup_backend(lookup: Any, name: str) -> Callable[..., Any]:
    """A backend of torch.compile by its name. Without it: rewritten graphs run without the inner backend, but for Inductor."""
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
    """What each mode of torch.compile stands for, as options of Inductor's. Without it: modes of torch.compile stand for what
    they do in torch 2.13."""
    return options()


@private("torch._inductor:config.get_config_copy", instead=nothing, level=logging.DEBUG)
def inductor_options(get: Any) -> dict[str, Any] | None:
    """Inductor's options by name, or None. Without it: unknown options are named by Inductor."""
    return get()


@private("torch._inductor.runtime.runtime_utils:cache_dir", instead=nothing, level=logging.DEBUG)
def cache_folder(folder: Any) -> str | None:
    """Where Inductor keeps what it compiles. Without it: gdnfuse doctor does not say where."""
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
    """A context in which Inductor finds nothing that it compiled before. Without it: Inductor's cache is another folder
    meanwhile."""
    return fresh()


@private("torch._dispatch.python:enable_python_dispatcher", instead=nullcontext)
def python_dispatcher(enable: Any) -> Any:
    """While it lasts, composite operators are computed by their Python code, as while Dynamo traces: torch 2.11's matmul in C++
    takes no strides that are symbolic. Without it: with that torch, of prompts of any length, all rows are computed."""
    return enable()


# Triton


@private("triton.language.extra.cuda:gdc_launch_dependents", "triton.language.extra.cuda:gdc_wait", instead=lambda: (None, None))
def dependent_launch(launch_dependents: Any, wait: Any) -> tuple[Any, Any]:
    """What lets a kernel start before the one before it ends, for kernels to call: (gdc_launch_dependents, gdc_wait). Without it:
    the kernels of a decode step do not overlap."""
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
    """Gluon for Hopper, or None: (gluon, its language, async_copy, the language's hopper, TensorDescriptor, what copies to shared
    memory). Without it: Triton's kernels take the places of the chunk scan and of the ring that are written for Hopper."""
    return gluon, language, async_copy, hopper, descriptor, copy


@private("triton.experimental.gluon.language.nvidia.ampere:mma_v2", instead=nothing)
def mma_v2(mma: Any) -> Any | None:
    """Gluon's product on tensor cores whose operands are in registers, or None. Without it: FP8 weights of one row are multiplied
    without tensor cores."""
    return mma


@private(  # by their names from Triton 3.8 or 3.9 on, and before
    "triton.experimental.gluon.language:shared_memory_descriptor.reinterpret|shared_memory_descriptor._reinterpret",
    "triton.experimental.gluon.language.nvidia.hopper:tma.async_load|tma.async_copy_global_to_shared",
    "triton.experimental.gluon.language.nvidia.hopper:tma.async_store|tma.async_copy_shared_to_global",
    "triton.experimental.gluon.language.nvidia.hopper:tma.store_wait",
    instead=nothing,
)
def gluon_tiles(reinterpret: Any, load: Any, store: Any, store_wait: Any) -> tuple[Any, ...] | None:
    """What Gluon does with tiles, or None: (reinterpret one in another shape and layout, load it, store it, wait for stores).
    Without it: Triton's kernel takes the place of the chunk scan that is written for Hopper."""
    return reinterpret, load, store, store_wait


@private("triton:knobs.runtime", instead=lambda: os.environ.get("TRITON_INTERPRET") == "1", level=logging.DEBUG)
def interpreting(knobs: Any) -> bool:
    """Whether Triton interprets kernels in place of compiling them. Without it: the environment tells whether Triton interprets
    kernels."""
    return bool(knobs.interpret)


@private(instead=nothing)
def parameters(kernel: Any) -> list[Any] | None:
    """The parameters of a `triton.jit` function with name, default, is_constexpr and do_not_specialize, or None. Without it: a
    launch goes through its Python at each call, and reports lack how kernels share out their work."""
    return list(kernel.params)


@private("triton.runtime.jit:JITFunction", instead=lambda kernel: 0, level=logging.DEBUG)
def machine_codes(jit_function: Any, kernel: Any) -> int:
    """How many machine codes of a kernel this process has; 0 for what is none. Without it: warmup counts no kernels."""
    return sum(len(cache[0]) for cache in kernel.device_caches.values()) if isinstance(kernel, jit_function) else 0


@private("triton.runtime.jit:JITFunction", instead=lambda kernel: {})
def machine_code_files(jit_function: Any, kernel: Any) -> dict[str, dict[str, bytes]]:
    """What Triton's cache on disk has of a kernel's machine codes in this process: files by name, by the key there. Without it:
    files of artifacts lack our kernels, which are compiled again."""
    caches = kernel.device_caches.values() if isinstance(kernel, jit_function) else ()
    found = {}
    for code in [code for cache in caches for code in cache[0].values()]:
        with contextlib.suppress(FileNotFoundError):  # somebody has emptied the cache since
            found[code.hash] = {name: Path(path).read_bytes() for name, path in code.metadata_group.items()}
    return found


@private("triton.runtime.cache:get_cache_manager", "torch._inductor.runtime.runtime_utils:triton_cache_dir", instead=nothing)
def keep_machine_code(manager: Any, folder: Any, key: str, files: dict[str, bytes], device: int) -> None:
    """Put a machine code into Triton's cache on disk, where it is found when its kernel is compiled for the device of that index.
    Without it: our kernels are compiled whatever a file of artifacts has."""
    # As Inductor does at its first kernel of Triton's: from then on its folder is Triton's, and ours would be looked for there.
    os.environ.setdefault("TRITON_CACHE_DIR", folder(device))
    cache = manager(key)
    paths = {name: cache.put(content, name) for name, content in files.items()}
    cache.put_group(next(name for name in files if name.endswith(".json")), paths)


@private(instead=nothing)
def runner(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., None] | None:
    """What launches a compiled kernel on a grid, its arguments as they were bound; None of what is not compiled. Without it: a
    launch goes through its Python at each call."""
    return compiled[grid] if hasattr(compiled, "run") else None


@private("triton:knobs.runtime", instead=nothing)
def launch_hooks(knobs: Any) -> Any:
    """Where Triton keeps the hooks that profilers add to every launch: launch_enter_hook and launch_exit_hook, or None. Without
    it: launches that are repeated go through Triton's runner."""
    if not hasattr(knobs, "launch_enter_hook") or not hasattr(knobs, "launch_exit_hook"):
        raise AttributeError("no hooks of a launch")
    return knobs


@private(instead=nothing, gone=Exception)
def launcher(compiled: Any, grid: tuple[int, int, int]) -> tuple[Any, Any, Any] | None:
    """Triton's launcher of a compiled kernel, and the function and metadata that it takes, or None. Asked is Triton's runner: it
    has to call its launcher with (*grid, stream, function, metadata, None, enter hook, exit hook, *arguments), as we do in its
    place. Where a profiler has added a hook, the runner is to call it. Without it: launches that are repeated go through Triton's
    runner."""
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
    """(TorchDispatchMode, a context without any). Without it: a launch goes through its Python at each call."""
    return mode, without


@private("torch.utils._python_dispatch:TorchDispatchMode", instead=lambda seen: nullcontext())
def seeing_ops(mode: Any, seen: Callable[[Any, Any], None]) -> Any:
    """A context in which `seen` is told of each op of eager calls and its result. Without it: benchmarks find no collectives."""

    class Seeing(mode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = op(*args, **(kwargs or {}))
            seen(op, result)
            return result

    return Seeing()


@private("torch._C._dynamo.guards:TensorGuards", instead=nothing)
def tensor_guards(guards: Any, tensors: Sequence[Any], sizes: Any, strides: Any) -> Callable[..., bool] | None:
    """Compares tensors with these: class, dispatch keys, dtype, device, and sizes and strides where these are no None. Without
    it: a call's layout is read off it in Python, to be compared with those that were recorded."""
    return guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def _current_device() -> Callable[[], int]:
    import torch

    return torch.cuda.current_device


@private("torch._C:_cuda_getDevice", instead=_current_device, level=logging.DEBUG)
def current_device(get: Any) -> Callable[[], int]:
    """Gives the index of the current GPU. Without it: torch.cuda tells the current GPU, in twice the time."""
    return get


def _current_stream() -> Callable[[int], int]:
    import torch

    return lambda device: torch.cuda.current_stream(device).cuda_stream


@private("torch._C:_cuda_getCurrentRawStream", instead=_current_stream, level=logging.DEBUG)
def current_stream(get: Any) -> Callable[[int], int]:
    """Gives the handle of a GPU's current stream. Without it: torch.cuda tells the current stream, in several times the time."""
    return get


def _empty(device: Any) -> Callable[..., Any]:
    import torch

    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


@private("torch._C._dynamo.guards:_empty_strided_cuda", instead=_empty, level=logging.DEBUG)
def empty(on_gpu: Any, device: Any) -> Callable[..., Any]:
    """Allocates by size, stride and dtype on a device, which is the current one if it is a GPU; as Inductor's code does. Without
    it: launches that are repeated allocate by torch.empty_strided, in several times the time."""
    return on_gpu if device.type == "cuda" else _empty(device)


@private(
    "torch._inductor.lowering:constrain_to_fx_strides",
    "torch._inductor.lowering:lowerings",
    "torch._inductor.lowering:make_fallback",
    instead=nothing,
    gone=Exception,
)
def known_to_inductor(strides: Any, lowerings: Any, make_fallback: Any, op: Any, name: str) -> None:
    """Have Inductor lay out an op's arguments as the graph does, as its tag asks for, and its code call it by an expression. For
    an op that it has not heard of torch 2.11 makes a message that prints all the op depends on, again for each path to it, which
    takes longer than the rest of its compilation of a decode step. Without it: Inductor's code calls the kernels through torch's
    dispatcher."""
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
    """Have the call of an op that Inductor has made last written as a call of an expression in its Python code. Without it:
    Inductor's code calls the kernels through torch's dispatcher."""
    if virtualized.graph.cpp_wrapper:
        return
    operations = reversed(virtualized.graph.operations)
    made = next(o for o in operations if isinstance(o, fallback_kernel) and o.op_overload is op)
    if not hasattr(made, "python_kernel_name"):
        raise AttributeError("the call has no name")
    made.python_kernel_name = name


@private("torch._inductor.runtime.triton_compat:triton_key", instead=nothing, level=logging.DEBUG)
def triton_key(key: Any) -> Callable[[], str] | None:
    """Makes the key of Triton's caches and keeps it, or None. Without it: the key of Triton's caches is made by whoever asks for
    it first."""
    return key


# torch: attention of prompts


@private("torch:ops.aten._scaled_dot_product_flash_attention.default", instead=nothing)
def flash_attention(op: Any) -> Any:
    """FlashAttention-2 as torch has it, (query, key, value, dropout_p, is_causal, return_debug_mask, *, scale), or None. Without
    it: attention of prompts is torch's."""
    return _of_arguments(op, "query key value dropout_p is_causal return_debug_mask scale")


@private("torch:ops.aten._scaled_dot_product_cudnn_attention.default", instead=nothing)
def cudnn_attention(op: Any) -> Any:
    """cuDNN's attention, (query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, *, scale).
    Without it: attention of long prompts is FlashAttention-2's."""
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
    """Copy many tensors into others in a few launches. Without it: states of drafts and of known
    prefixes are copied one by one."""
    if to:
        copy(to, tensors)


# torch: modules


@private("torch.nn:Module._call_impl", instead=lambda module: module.__call__)
def call_of(call: Any, module: Any) -> Callable[..., Any]:
    """What a call of a module does where nothing is compiled: its hooks and its forward. Without it: a model's calls run
    eager, but steps of generate with a static cache on a GPU."""
    return module._call_impl


@private("torch.nn:Module._call_impl", "torch.nn:Module._compiled_call_impl", instead=lambda module, to: False)
def set_compiled_call(call: Any, compiled: Any, module: Any, to: Callable[..., Any] | None) -> bool:
    """Have the calls of a module go to a function, which torch leaves out of copies and pickles; whether they do. Without it: a
    model's calls run eager, but steps of generate with a static cache on a GPU."""
    module._compiled_call_impl = to
    return True


@private("torch.nn:Module._compiled_call_impl", instead=nothing)
def compiled_call(compiled: Any, module: Any) -> Callable[..., Any] | None:
    """Where the calls of a module go to, or None. Without it: a model's own calls count as not compiled."""
    return module._compiled_call_impl


def forget_compiled_call(model: Any) -> None:
    """Have `generate` not use a call that it has compiled itself. Without it: it asks for one all the same."""
    vars(model).pop("_compiled_call", None)


@private(instead=lambda module: {})
def hooks_of(module: Any) -> dict[int, Callable[..., Any]]:
    """A module's forward hooks by the numbers of their handles. Without it: hooks that come or go after a graph was traced do not
    show in it."""
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
    """A class of modules, of which `to`, `half` and their like leave what `stored` gives as it is: they cast no integers, so it
    goes as such. Without it: a cast of a model casts what its quantised linears store, which then are no such weights."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

    def as_integers(module: Any, change: Callable[[Any], Any], recurse: bool = True) -> Any:
        stored = module.stored()

        def apart(x: Any) -> Any:
            return change(x.view(integers[x.itemsize])).view(x.dtype) if any(x is s for s in stored) else change(x)

        return apply(module, apart, recurse)

    cls._apply = as_integers
    return cls


def _everything_of(module: Any) -> tuple[list[Any], list[Any]]:
    return list(module.modules()), [*module.parameters(), *module.buffers()]


@private(instead=_everything_of)
def everything_of(module: Any) -> tuple[list[Any], list[Any]]:
    """All modules of a module and all their parameters and buffers, as often as they are there. Without it: a generate with a
    prefix store begins a millisecond later."""
    modules, tensors = [module], []
    for one in modules:  # which grows meanwhile
        for held in (one._parameters, one._buffers):
            tensors += [x for x in held.values() if x is not None]
        modules += [x for x in one._modules.values() if x is not None]
    return modules, tensors


@private(instead=lambda tensors: [0] * len(tensors))
def version_counters(tensors: Sequence[Any]) -> list[int]:
    """How often each tensor was written in place, as far as torch counts it. Without it: weights written in place are found by
    samples alone."""
    return [0 if x.is_inference() else x._version for x in tensors]


def _of_wrapper(call: Any) -> Any:
    return getattr(call, "_orig_mod", None) or getattr(call, "_torchdynamo_orig_callable", call)


@private("torch._dynamo:OptimizedModule", instead=_of_wrapper, level=logging.DEBUG)
def uncompiled(optimized: Any, call: Any) -> Any:
    """What torch.compile was given for a module or function that it made, else the same. Without it: any module with the
    attribute _orig_mod is taken for one that torch.compile made."""
    return call._orig_mod if isinstance(call, optimized) else getattr(call, "_torchdynamo_orig_callable", call)


@private("torch.nn.modules.module:_global_forward_pre_hooks", "torch.nn.modules.module:_global_forward_hooks", instead=lambda: ())
def global_hooks(before: Any, after: Any) -> tuple[int, ...]:
    """The numbers of the handles of forward hooks that all modules have.

    Without it: such hooks do not run in graphs that were traced before they were registered.
    """
    return (*before, *after)


# transformers: configs


@private(instead=lambda config: "")
def attention_of(config: Any) -> str:
    """The attention that a model was loaded with, such as "sdpa" or "flash_attention_2". Without it: packed sequences are refused
    under FlashAttention too, which keeps them apart."""
    return config._attn_implementation or ""


# transformers: generate


@private("transformers.generation.utils:DeferredStopCheck", instead=lambda make: False, level=logging.INFO)
def replace_stop_check(theirs: Any, make: Callable[[type], type]) -> bool:
    """Put a class made from it in the place of what `generate` asks one step late whether to stop; whether there is one. Without
    it: generate waits for every step on a GPU before it prepares the next."""
    from transformers.generation import utils

    if not hasattr(utils.DeferredStopCheck, "of_gdnfuse"):
        utils.DeferredStopCheck = make(theirs)
    return True


def is_users(cache: Any) -> bool:
    """Whether a cache was handed to `generate`, and not made by it. Without it: where speculation cannot use such a cache, it
    makes one of its own and leaves that one empty."""
    return getattr(cache, "_is_user_defined", False)
