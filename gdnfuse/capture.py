"""Capture: transformers' functions for the rule, conv, experts and FP8 linears become dialect ops while Dynamo traces.

Without capture, the chunk rule unrolls into one loop iteration per 64 tokens, with one graph per length, and a kernel library in
its place breaks the graph. `torch.compiler.substitute_in_graph` replaces it by a function of ours, only in traces: eager calls do
not change. The substitution holds for the whole process. So it must call the original function wherever that was asked for: under
torch's own backends, export, autocast, functorch or gradients, with `capture=False`, and for arguments that our ops do not
support.

Here too, proposals are proved. A function is captured only if its torch implementation and our op agree in float64.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import time
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gdnfuse import capture_experts as experts
from gdnfuse import capture_fp8 as fp8
from gdnfuse import (
    compat,
    dialect,  # noqa: F401  registers torch.ops.gdnfuse
)
from gdnfuse.errors import Refused, one_line
from gdnfuse.options import disabled
from gdnfuse.rewrite.evaluate import Float64, one_thread
from gdnfuse.rewrite.proof import compare

log = logging.getLogger(__name__)

MODULES = ("transformers.models.", "transformers_modules.")  # the second is for code that comes with a checkpoint
ACTIVATIONS = {None: "none", "silu": "silu", "swish": "silu"}


# The replacements. `accepts` says whether our op supports the arguments, and `call` calls it. Dynamo traces both.


def _chunk(
    query, key, value, g, beta, chunk_size=64, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    cu_seqlens=None, **ignored,
):  # fmt: skip
    # A constant in transformers' rules. The proof would find any other value. A global would become a symbol with dynamic sizes.
    eps = 1e-6 if use_qk_l2norm_in_kernel else None
    scale = key.shape[-1] ** -0.5
    o, state, _ = torch.ops.gdnfuse.chunk_delta_rule.default(query, key, value, g, beta, initial_state, scale, eps, cu_seqlens)
    return o.to(query.dtype), state if output_final_state else None


def _recurrent(
    query, key, value, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, cu_seqlens=None,
    **ignored,
):  # fmt: skip
    if initial_state is None or cu_seqlens is not None or value.shape[1] != 1:
        # The recurrent rule has a state and runs token by token. The chunk rule is the same function of its inputs.
        return _chunk(
            query, key, value, g, beta, initial_state=initial_state, output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    eps = 1e-6 if use_qk_l2norm_in_kernel else None
    scale = key.shape[-1] ** -0.5
    o, state = torch.ops.gdnfuse.delta_rule.default(query, key, value, g, beta, initial_state, scale, eps)
    return o.to(query.dtype), state if output_final_state else None


def _rule_accepts(query, key, value, g, beta, initial_state=None, cu_seqlens=None, **others):
    if not (query.ndim == 4 and key.ndim == 4 and value.ndim == 4 and g.ndim == 3 and beta.ndim == 3):
        return False
    if initial_state is None:
        return True
    # The comparison also tells Dynamo that two symbols are the same size, as the original code would.
    heads = initial_state.ndim == 4 and initial_state.shape[1:] == (value.shape[2], key.shape[3], value.shape[3])
    return heads and (cu_seqlens is not None or initial_state.shape[0] == query.shape[0])


def _conv(hidden_states, weight, bias=None, activation=None, cu_seq_lens_q=None, **ignored):
    # transformers passes the bounds of packed sequences only to the rule and mixes sequences here. These are the same bounds.
    if cu_seq_lens_q is not None and cu_seq_lens_q.shape[0] == 2:
        cu_seq_lens_q = None  # one sequence, whose end changes nothing before it
    return torch.ops.gdnfuse.causal_conv.default(hidden_states, weight, bias, ACTIVATIONS[activation], None, cu_seq_lens_q)


def _conv_accepts(hidden_states, weight, bias=None, activation=None, **others):
    return hidden_states.ndim == 3 and weight.ndim == 2 and activation in ACTIVATIONS


def _update(hidden_states, conv_state, weight, bias=None, activation=None, **ignored):
    out = torch.ops.gdnfuse.causal_conv_update.default(
        hidden_states, conv_state, weight.unsqueeze(1), bias, ACTIVATIONS[activation]
    )
    return out.to(hidden_states.dtype)


def _update_accepts(hidden_states, conv_state, weight, bias=None, activation=None, **others):
    shapes = hidden_states.ndim == 3 and conv_state.ndim == 3 and weight.ndim == 2
    shapes = shapes and conv_state.shape[:2] == hidden_states.shape[:2]
    # The first comparison turns a symbol into a number if it is true.
    width = shapes and (conv_state.shape[-1] == weight.shape[-1] or conv_state.shape[-1] >= weight.shape[-1] - 1)
    return width and activation in ACTIVATIONS


# Random calls (args, kwargs) in float64 for the proofs.


def _rule_calls() -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Calls with one token, a part of a chunk, a whole chunk, and more; with and without state, l2norm and grouped heads."""
    for T, H, HV, stateful, normed in (
        (1, 2, 2, True, True), (1, 2, 4, True, False), (5, 2, 2, False, True), (64, 2, 2, True, False), (70, 2, 2, True, True),
        (3, 1, 3, False, True),
    ):  # fmt: skip
        B, K, V = 2, 4, 3
        generator = torch.Generator().manual_seed(T)
        draw = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
        # Some rows are so small that an eps has an effect. All are short enough that a rule without l2norm stays bounded.
        q, k = draw(B, T, H, K), draw(B, T, H, K) * 0.3
        q[:, ::2] *= 1e-3
        k[:, 1::2] *= 1e-3
        # Decays near 1, so that a chunk does not forget the one before it.
        g, beta = -draw(B, T, HV).abs() / 16, draw(B, T, HV).sigmoid()
        state = draw(B, HV, K, V) if stateful else None
        kwargs = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": normed}
        yield [q, k, draw(B, T, HV, V)], {"g": g, "beta": beta, **kwargs}


def _conv_calls(stateful: bool) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    for T, biased, activation in ((1, True, "silu"), (3, False, None), (6, False, "silu")):
        generator = torch.Generator().manual_seed(T)
        draw = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
        state = [draw(2, 5, 4)] if stateful else []
        yield [draw(2, 5, T), *state, draw(5, 4), draw(5) if biased else None], {"activation": activation}


@dataclass(frozen=True)
class Capturable:
    """A function that models of transformers share.

    Attributes:
        op: the dialect op that replaces it.
        call: calls the op, with the arguments and results of the function.
        accepts: tells from the arguments alone whether the op may be called.
        positional: how many arguments may be positional.
        means: names of the arguments that `call` uses. Other arguments, which only a kernel library uses, must be None or False.
        calls: makes random arguments for the proof.
        others: functions that must compute the same, because they may be called in place of this one.
        keep: called with what was proved. It may refuse it.
    """

    op: str
    call: Callable[..., Any]
    accepts: Callable[..., bool]
    positional: int
    means: frozenset[str]
    calls: Callable[[], Iterator[tuple[list[Any], dict[str, Any]]]]
    others: tuple[Callable[..., Any], ...] = ()
    keep: Callable[[types.FunctionType], None] | None = None


_RULE = frozenset(
    "query key value q k v g beta chunk_size initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens kwargs".split()
)
_CONV = frozenset("hidden_states x conv_state weight bias activation kwargs".split())
_EXPERTS = frozenset("self hidden_states top_k_index top_k_weights".split())


def _no_calls() -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """No calls, for functions that only run on GPUs."""
    return iter(())


SHARED = {  # functions that many modules have
    "torch_chunk_gated_delta_rule": Capturable("chunk_delta_rule", _chunk, _rule_accepts, 5, _RULE, _rule_calls),
    "torch_recurrent_gated_delta_rule": Capturable("delta_rule", _recurrent, _rule_accepts, 5, _RULE, _rule_calls),
    "causal_conv1d_fn": Capturable("causal_conv", _conv, _conv_accepts, 4, _CONV, functools.partial(_conv_calls, False)),
    "causal_conv1d_update": Capturable(
        "causal_conv_update", _update, _update_accepts, 5, _CONV, functools.partial(_conv_calls, True)
    ),
}  # fmt: skip
CAPTURABLE = {
    **SHARED,
    fp8.FUNCTION: Capturable("dequantize", fp8.call, fp8.accepts, 7, frozenset(fp8.PARAMETERS), _no_calls, keep=fp8.keep),
    fp8.LOOP: Capturable("experts", fp8.call_experts, fp8.accepts_experts, 4, _EXPERTS, fp8.calls, keep=fp8.keep_loop),
    **{
        name: Capturable("experts", fp8.call_experts, fp8.accepts_experts, 4, _EXPERTS, _no_calls)
        for names in fp8.EXPERTS.values()
        for name in names
    },
}


@dataclass
class Capture:
    """One function that was found in a module.

    Attributes:
        function: its full name.
        op: the dialect op that it becomes.
        captured: whether it is captured.
        reason: a sentence on why it is not captured, or empty.
        proof_error: worst relative error of the float64 proof. None if the proof did not finish, or if the function needs a GPU.
        seconds: time of the proof.
    """

    function: str
    op: str
    captured: bool
    reason: str = ""
    proof_error: float | None = None
    seconds: float = 0.0


# A copy of each captured function, which is not substituted, by the id of the function. It is a global so that Dynamo has a
# source for it, as it would for the function itself.
_originals: dict[int, types.FunctionType] = {}

# Every function or class that was looked at, by id, with the outcome. It is kept alive, so that no other object gets its id.
_seen: dict[int, tuple[Any, Capture, type | None]] = {}


_active = False  # substitutions that cannot be undone call the original function while this is False


def install() -> None:
    """Look for functions to capture at the start of every compilation, so that modules that are loaded later are found too."""
    global _active
    _active = True
    if not compat.at_compile_start(_on_compile_start):
        _on_compile_start()


def uninstall() -> None:
    """Undo every substitution. Graphs that were compiled before do not change; `torch._dynamo.reset()` drops them."""
    global _active
    _active = False
    compat.not_at_compile_start(_on_compile_start)
    for function, capture, _ in _seen.values():
        if capture.captured and compat.undo_substitution(function):
            _originals.pop(id(function), None)
    _seen.clear()
    experts.forget()
    fp8.forget()
    _forget_activations()


def status() -> list[Capture]:
    """The functions that were found so far, and whether they are captured.

    Functions are looked for when something is compiled, or by `scan`.

    Returns:
        One Capture for each function, in the order in which they were found.
    """
    return [capture for _, capture, _ in _seen.values()]


def scan() -> None:
    """Look at every function of a loaded module that was not looked at before, prove it and capture it."""
    _scan_activations()
    for name, module in list(sys.modules.items()):
        if not name.startswith((*MODULES, experts.MODULES)) or not isinstance(module, types.ModuleType):
            continue
        for attribute, function, cls in (*_named(name, module), *experts.found(name, module), *fp8.found(name, module)):
            if id(cls or function) not in _seen:  # several classes may share a loop
                capture = _try(function, f"{name}.{attribute}", CAPTURABLE.get(attribute) or _of_experts(attribute, cls))
                _seen[id(cls or function)] = (function, capture, cls)
                log.debug("%s: %s", capture.function, capture.reason or f"captured as gdnfuse.{capture.op}")


# transformers' table of activations makes a new module at each access, and each GDN layer accesses it in each call. Tracing that
# takes more than a tenth of Dynamo's time. SiLU, which GDN uses, has no weights, so in traces it is torch's function.
_silu: type | None = None  # the class of the table's entry, after a check that it is SiLU
_made: Callable[..., Any]  # the original access


def _activation(self, key):
    if OrderedDict.__getitem__(self, key) is _silu and _unwatched():
        return torch.nn.functional.silu
    return _made(self, key)


@torch.compiler.assume_constant_result
def _unwatched() -> bool:
    """Whether no hook watches calls of modules, and the current compilation is one to capture in."""
    return wanted() and not compat.global_hooks()


def _scan_activations() -> None:
    global _silu, _made
    activations = sys.modules.get("transformers.activations")
    table, cls = (getattr(activations, name, None) for name in ("ClassInstantier", "SiLUActivation"))
    if _silu is not None or table is None or cls is None or not isinstance(made := table.__getitem__, types.FunctionType):
        return
    x = torch.linspace(-8, 8, 33, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        same = not any(True for _ in cls().state_dict()) and torch.equal(cls()(x), torch.nn.functional.silu(x))
    if same:
        _made = types.FunctionType(made.__code__, made.__globals__, made.__name__, made.__defaults__, made.__closure__)
        _silu = cls if compat.trace_instead(made, _activation) else None


def _forget_activations() -> None:
    global _silu
    if _silu is not None:
        compat.trace_instead(sys.modules["transformers.activations"].ClassInstantier.__getitem__, None)
        _silu = None


def _of_experts(attribute: str, cls: type | None) -> Capturable:
    others, keep = (experts.others(cls), functools.partial(experts.keep, cls)) if cls else ((), None)
    calls = functools.partial(experts.calls, attribute, cls)
    return Capturable("experts", experts.call, experts.accepts, 4, _EXPERTS, calls, others, keep)


def _named(name: str, module: types.ModuleType) -> Iterator[tuple[str, Any, None]]:
    if name.startswith(MODULES):
        yield from ((attribute, vars(module)[attribute], None) for attribute in SHARED if vars(module).get(attribute))


def _on_compile_start(*_: Any) -> None:
    try:
        scan()
    except Exception:  # a compilation of something else must not fail because of gdnfuse
        log.exception("gdnfuse could not look for functions to capture")


def _try(function: Any, name: str, capturable: Capturable) -> Capture:
    capture = Capture(name, capturable.op, False)
    start = time.perf_counter()
    try:
        if not isinstance(function, types.FunctionType):
            raise Refused(f"What is captured must be a plain function, found {type(function).__name__}.")
        capture.proof_error = prove(inspect.unwrap(function), capturable)
        if capturable.keep:
            capturable.keep(function)
        if id(function) not in _originals:
            _substitute(function, capturable)
        capture.captured = True
    except Refused as e:
        capture.reason = e.reason
    except Exception as e:
        capture.reason = f"The function could not be substituted: {one_line(e)}."
    capture.seconds = time.perf_counter() - start
    return capture


def prove(function: Callable[..., Any], capturable: Capturable) -> float | None:
    """Run a function, functions that may be called in its place, and its replacement on the same inputs in float64.

    Returns:
        The worst relative error over results and written arguments. None if there was nothing to run.

    Raises:
        Refused: they differ, or the function could not be run.
    """
    errors = []
    with torch.no_grad(), torch.device("cpu"), one_thread():
        for tried in (function, *capturable.others):
            for args, kwargs in capturable.calls():
                copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
                try:
                    with Float64():
                        wanted = tried(*args, **kwargs)
                except Exception as e:
                    if isinstance(q := args[0], torch.Tensor) and q.ndim == 4 and q.shape[2] != args[2].shape[2]:
                        continue  # a function without grouped heads is never called with them
                    raise Refused(f"The proof could not be run: {one_line(e)}.") from e
                got = capturable.call(*copies, **kwargs)
                pairs = zip(_tensors(wanted) + _tensors(args), _tensors(got) + _tensors(copies), strict=True)
                errors += [compare(f"result or argument {i}", w, g) for i, (w, g) in enumerate(pairs)]
    return max(errors, default=None)


def _tensors(results: Any) -> list[torch.Tensor]:
    results = results if isinstance(results, list | tuple) else [results]
    return [x for x in results if isinstance(x, torch.Tensor)]


def _substitute(function: types.FunctionType, capturable: Capturable) -> None:
    original = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    original.__kwdefaults__ = function.__kwdefaults__
    key = id(function)
    call, accepts, positional = capturable.call, capturable.accepts, capturable.positional
    # If a kernel library is installed, the wrapper has the parameters of its function. Unknown ones may change the result.
    held = inspect.getclosurevars(function).nonlocals.get("applicable_params", ())
    foreign = tuple(sorted({"seq_idx", *held} - capturable.means))

    def captured(*args, **kwargs):
        if wanted() and len(args) <= positional and _plain(args, kwargs, foreign) and accepts(*args, **kwargs):
            return call(*args, **kwargs)
        return _originals[key](*args, **kwargs)

    torch.compiler.substitute_in_graph(function, skip_signature_check=True)(captured)
    _originals[key] = original


def _plain(args, kwargs, foreign):
    """Whether nothing needs gradients, and no argument is given that only another implementation knows."""
    for name in foreign:
        if kwargs.get(name) is not None and kwargs.get(name) is not False:
            return False
    if torch.is_grad_enabled():
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Tensor) and x.requires_grad:
                return False
    return True


@torch.compiler.assume_constant_result
def wanted() -> bool:
    """Whether the current compilation is one to capture in. Dynamo really runs this function while it traces.

    torch passes options to a backend only with the finished graph, so they are read from the tracer. If that is not possible, for
    example under a backend that was built around ours, the answer is yes: the ops are correct under every backend.
    """
    if not _active or disabled() or torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return False
    if compat.under_functorch():
        return False
    if (found := backend_under_way()) is None:
        return True
    backend, options, exporting = found
    if exporting:
        return False
    if home(backend).startswith("gdnfuse."):
        return options.get("capture", True) is not False
    return home(backend).split(".")[0] != "torch"


def backend_under_way() -> tuple[Any, dict[str, Any], bool] | None:
    """The backend that Dynamo traces for, without torch's wrappers, its options, and whether the trace is an export.

    None if that cannot be told.
    """
    if (found := compat.compiling_for()) is None:
        return None
    (backend, exporting), options = found, {}
    while True:
        if isinstance(backend, functools.partial):
            options = {**backend.keywords.get("options", {}), **options}
            inner = backend.func
        else:
            options = {**(getattr(backend, "kwargs", {}).get("options") or {}), **options}
            inner = compat.wrapped_backend(backend)
        if inner is None or inner is backend:
            return backend, options, exporting
        backend = inner


def home(backend: Any) -> str:
    """The module in which a backend is defined."""
    return getattr(backend, "__module__", None) or type(backend).__module__
