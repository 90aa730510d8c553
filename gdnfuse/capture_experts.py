"""Capture of a mixture of experts: all functions of transformers that compute experts become gdnfuse.experts.

A class of experts has its own forward, a loop over experts. By the config's `experts_implementation`, transformers may call one
of its functions instead. All of these are captured. The loop alone would break a graph. Functions that the user has registered
with transformers are not captured.

Each class is proved: its loop, and batched_mm on it, which uses other parts of the class (`_apply_gate`). batched_mm and
grouped_mm are proved themselves too. deepgemm and sonicmoe only run on GPUs. They, like all others, require that the class was
proved.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from gdnfuse.errors import Refused

MODULES = "transformers.integrations."
MOE = f"{MODULES}moe"
FUNCTIONS = (
    "batched_mm_experts_forward",
    "grouped_mm_experts_forward",
    "deepgemm_bf16_experts_forward",
    "sonicmoe_experts_forward",
)
ON_GPU = FUNCTIONS[2:]
# What a class may say about its weights: the value that the op expects, and the others.
LAYOUT = {
    "has_gate": (True, "a gate with up"),
    "has_bias": (False, "no biases"),
    "is_transposed": (False, "weights of [experts, out, in]"),
    "is_concatenated": (True, "all rows of gate above those of up"),
    "has_post_expert_norm": (False, "no norm after an expert"),
}
# (rows, experts per row, experts, columns, columns inside): one row, several, every expert, and one expert for all.
SIZES = ((1, 2, 5, 6, 4), (7, 3, 5, 6, 4), (3, 4, 4, 3, 5), (4, 1, 3, 4, 2))


def call(self, hidden_states, top_k_index, top_k_weights):
    return torch.ops.gdnfuse.experts.default(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj, "silu")


def accepts(self, hidden_states, top_k_index, top_k_weights):
    """Whether the op supports these experts. Dynamo traces this function. Other experts run the original code."""
    if not _proved(type(self)) or not is_silu(type(self.act_fn)):
        return False
    x, gate_up, down = hidden_states, self.gate_up_proj, self.down_proj
    if not _plain(type(gate_up)) or not _plain(type(down)) or not _plain(type(x)):
        return False
    if torch.is_grad_enabled() and (gate_up.requires_grad or down.requires_grad):
        return False
    if x.ndim != 2 or top_k_index.ndim != 2 or top_k_weights.ndim != 2 or gate_up.ndim != 3 or down.ndim != 3:
        return False
    if not x.dtype == gate_up.dtype == down.dtype or not x.is_floating_point() or top_k_index.dtype != torch.int64:
        return False
    if not x.device == gate_up.device == down.device == top_k_index.device == top_k_weights.device:
        return False
    E, both, H = gate_up.shape
    shapes = x.shape[1] == H and down.shape[0] == E and down.shape[1] == H and 2 * down.shape[2] == both
    return shapes and self.num_experts == E and top_k_index.shape == top_k_weights.shape and top_k_index.shape[0] == x.shape[0]


_classes: dict[type, types.FunctionType] = {}  # proved classes of experts, and their loops


@torch.compiler.assume_constant_result
def _proved(cls: type) -> bool:
    return cls in _classes and loop(cls) is _classes[cls]


@torch.compiler.assume_constant_result
def _plain(cls: type) -> bool:
    return cls in (torch.Tensor, torch.nn.Parameter)


@torch.compiler.assume_constant_result
def is_silu(cls: type) -> bool:
    """Whether a class of activations is SiLU: the class of torch, or one with only a forward that computes it."""
    if cls is torch.nn.SiLU:
        return True
    try:
        x, act = torch.linspace(-20, 20, 81, dtype=torch.float64), cls()
        bare = isinstance(act, torch.nn.Module) and vars(act).keys() == vars(torch.nn.Module()).keys()
        return bare and not [*act.parameters(), *act.buffers()] and torch.equal(act(x), F.silu(x))
    except Exception:  # it needs something else, so it is not known to be SiLU
        return False


def loop(cls: Any) -> types.FunctionType | None:
    """The loop over experts of a class that transformers' decorator wraps. None for anything else."""
    forward = vars(cls).get("forward") if isinstance(cls, type) and issubclass(cls, torch.nn.Module) else None
    if not isinstance(forward, types.FunctionType) or forward.__globals__.get("__name__") != MOE:
        return None
    return inspect.getclosurevars(forward).nonlocals.get("original_forward")


def found(name: str, module: types.ModuleType) -> Iterator[tuple[str, Any, type | None]]:
    """Names of functions to capture in a module, the functions, and the class if the function is its loop."""
    if name.startswith(MODULES):
        for attribute in FUNCTIONS:
            if attribute in vars(module) and vars(module)[attribute].__module__ == name:
                yield attribute, vars(module)[attribute], None
        return
    for attribute, cls in list(vars(module).items()):
        if (forward := loop(cls)) is not None and cls.__module__ == name:
            yield f"{attribute}.forward", forward, cls


def calls(attribute: str, cls: type | None) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Random experts of a class, or of one as transformers documents it, and arguments to call them with.

    For transformers' functions one choice is masked, with a weight of 0, as under expert parallelism.
    """
    if attribute in ON_GPU:
        return
    if cls is not None:
        check(cls)
    for N, k, E, H, width in SIZES:
        generator = torch.Generator().manual_seed(N)
        draw = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
        weights = torch.rand((N, k), dtype=torch.float64, generator=generator)
        chosen = torch.rand((N, E), generator=generator).topk(k, -1).indices if k > 1 else torch.full((N, 1), E - 1)
        self = _instance(cls, draw((E, 2 * width, H)), draw((E, H, width)))
        if cls is None:
            self._is_expert_parallel, chosen[0, 0], weights[0, 0] = True, E, 0.0
        yield [self, draw((N, H)), chosen, weights], {}


def _instance(cls: type | None, gate_up: torch.Tensor, down: torch.Tensor) -> torch.nn.Module:
    """Experts with these weights and only the attributes that all experts have. A class that reads more is not proved."""
    cls = cls or types.new_class("Experts", (torch.nn.Module,), {}, lambda ns: ns.update(_apply_gate=_apply_gate))
    self = cls.__new__(cls)
    torch.nn.Module.__init__(self)
    self.num_experts, self.hidden_dim, self.intermediate_dim = gate_up.shape[0], gate_up.shape[2], down.shape[2]
    self.gate_up_proj, self.down_proj = (torch.nn.Parameter(w, requires_grad=False) for w in (gate_up, down))
    self.act_fn, self._is_expert_parallel = torch.nn.SiLU(), False
    for name, (meant, _) in LAYOUT.items():
        setattr(self, name, meant)
    return self


def _apply_gate(self, gate_up):
    gate, up = gate_up.chunk(2, -1)
    return self.act_fn(gate) * up


def check(cls: type) -> None:
    """Check that a class stores its weights as the op expects.

    Raises:
        Refused: the class says that it does not.
    """
    given = inspect.getclosurevars(cls.__init__).nonlocals
    for name, (meant, words) in LAYOUT.items():
        if given.get(name, meant) != meant:
            raise Refused(f"Experts must have {words}, found {name}={given[name]} of {cls.__name__}.")


def others(cls: type) -> tuple[Callable[..., Any], ...]:
    """Functions that must compute the same as the loop of a class, because they may be called in its place."""
    batched = getattr(sys.modules.get(MOE), FUNCTIONS[0], None)
    return (batched,) if batched is not None else ()


def keep(cls: type, function: types.FunctionType) -> None:
    """Remember a class of experts whose loop was proved."""
    _classes[cls] = function


def forget() -> None:
    """Forget all classes that were proved."""
    _classes.clear()
