"""Capture of FP8 linears and experts: transformers' functions become torch's linear, and experts, on dequantised weights.

transformers also quantises the activations to eight bits at every call (W8A8), with a kernel from the hub or DeepGEMM. Here only
weights are quantised, and activations stay in the model's dtype, which is more accurate. An `activation_scale`, which says how to
quantise activations, is not used.

transformers' functions only have kernels for GPUs, so they cannot be run in a proof. Two other things are proved instead: what
`dequantize=True` makes of such weights when they are loaded, and the loop over experts, which uses plain weights if it gets plain
weights.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from gdnfuse import capture_experts as experts
from gdnfuse import (
    dialect,  # noqa: F401  registers torch.ops.gdnfuse
    formats,
)
from gdnfuse.errors import Refused

MODULE = "transformers.integrations.finegrained_fp8"
FUNCTION = "fp8_linear"
LOOP = "FP8Experts.forward"
EXPERTS = {
    MODULE: ("fp8_batched_mm_experts_forward", "fp8_grouped_mm_experts_forward"),
    "transformers.integrations.deepgemm": ("deepgemm_fp8_fp4_experts_forward",),
}
# Attributes of experts with limits or other gates. They are None in experts that the op supports.
OTHERWISE = ("limit", "swiglu_limit", "swiglu_alpha", "gate_softcap", "up_softcap")
PARAMETERS = ("input", "weight", "weight_scale_inv", "block_size", "bias", "activation_scale", "allow_deepgemm")


def call(input, weight, weight_scale_inv, block_size=None, bias=None, activation_scale=None, allow_deepgemm=True):
    name = "fp8_tensor" if block_size is None else "fp8_block128"
    dequantized = torch.ops.gdnfuse.dequantize.default(weight, weight_scale_inv, name, input.dtype)
    if bias is None:
        return F.linear(input, dequantized)
    if bias.dtype == input.dtype:
        return F.linear(input, dequantized, bias)
    return (F.linear(input, dequantized) + bias).to(input.dtype)


def accepts(input, weight, weight_scale_inv, block_size=None, bias=None, activation_scale=None, allow_deepgemm=True):
    """Whether the format of the weight is known. Dynamo traces this function. Other weights run the original code."""
    if not _plain(type(weight)) or not _plain(type(weight_scale_inv)) or not input.is_floating_point():
        return False
    if weight.device != input.device or weight_scale_inv.device != input.device:
        return False
    if block_size is not None and not (block_size[0] == 128 and block_size[1] == 128):
        return False
    sizes = (tuple(weight.shape), tuple(weight_scale_inv.shape))
    return _known("fp8_tensor" if block_size is None else "fp8_block128", *sizes, weight.dtype, weight_scale_inv.dtype)


def call_experts(self, hidden_states, top_k_index, top_k_weights):
    dtype = hidden_states.dtype
    gate_up = torch.ops.gdnfuse.dequantize.default(self.gate_up_proj, self.gate_up_proj_scale_inv, "fp8_block128", dtype)
    down = torch.ops.gdnfuse.dequantize.default(self.down_proj, self.down_proj_scale_inv, "fp8_block128", dtype)
    return torch.ops.gdnfuse.experts.default(hidden_states, top_k_index, top_k_weights, gate_up, down, "silu")


def accepts_experts(self, hidden_states, top_k_index, top_k_weights):
    """Whether the op supports these experts. Dynamo traces this function. Other experts run the original code."""
    x, block = hidden_states, self.block_size
    if not _proved(type(self)) or not self.has_gate or self.has_bias or not experts.is_silu(type(self.act_fn)):
        return False
    for name in OTHERWISE:
        if getattr(self, name, None) is not None:
            return False
    weights = (self.gate_up_proj, self.gate_up_proj_scale_inv, self.down_proj, self.down_proj_scale_inv)
    for w in weights:
        if not _plain(type(w)) or w.ndim != 3 or w.device != x.device or (torch.is_grad_enabled() and w.requires_grad):
            return False
    if block is None or not (block[0] == 128 and block[1] == 128) or not x.is_floating_point():
        return False
    if x.ndim != 2 or top_k_index.ndim != 2 or top_k_index.shape != top_k_weights.shape or top_k_index.dtype != torch.int64:
        return False
    gate_up, gate_up_scale, down, down_scale = weights
    E, both, H = gate_up.shape
    if down.shape != (E, H, both // 2) or x.shape[1] != H or self.num_experts != E or top_k_index.shape[0] != x.shape[0]:
        return False
    for w, scale in ((gate_up, gate_up_scale), (down, down_scale)):
        if not _known("fp8_block128", tuple(w.shape), tuple(scale.shape), w.dtype, scale.dtype):
            return False
    return True


_loops: set[types.FunctionType] = set()  # proved loops over experts


@torch.compiler.assume_constant_result
def _proved(cls: type) -> bool:
    return loop(cls) in _loops


@torch.compiler.assume_constant_result
def _plain(cls: type) -> bool:
    return cls in (torch.Tensor, torch.nn.Parameter)


@torch.compiler.assume_constant_result
def _known(name: str, data: tuple[int, ...], scale: tuple[int, ...], data_dtype: torch.dtype, scale_dtype: torch.dtype) -> bool:
    try:
        formats.named(name).check(
            torch.empty(data, dtype=data_dtype, device="meta"), torch.empty(scale, dtype=scale_dtype, device="meta")
        )
    except Refused:
        return False
    return True


@contextlib.contextmanager
def dequantized_calls(model: torch.nn.Module, activations: str | None = None) -> Iterator[None]:
    """Let the FP8 linears and experts of a model compute in eager calls what compiled calls compute, on any device.

    transformers' own code for them needs a kernel from the hub and a GPU.

    Args:
        model: its modules' calls are replaced inside the block.
        activations: as of `gdnfuse.options.Options`. With "fp8" linears also quantise their input, whatever its rows, as
            transformers' do.
    """
    names = vars(sys.modules[MODULE]) if MODULE in sys.modules else {}
    linear, of_experts = names.get("FP8Linear", ()), names.get("FP8Experts", ())  # an empty tuple matches no class
    found = [m for m in model.modules() if isinstance(m, (linear, of_experts))]
    before = [vars(m).pop("forward", None) for m in found]
    for m in found:
        of_linear = _linear_of_e4m3 if activations else _linear
        m.forward = functools.partial(of_linear if isinstance(m, linear) else _experts, m)
    try:
        yield
    finally:
        for m, forward in zip(found, before, strict=True):
            del m.forward
            if forward is not None:
                m.forward = forward


def _linear(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return call(x, self.weight, self.weight_scale_inv, self.block_size, self.bias)


def _linear_of_e4m3(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    name, columns = ("fp8_tensor", x.shape[-1]) if self.block_size is None else ("fp8_block128", self.block_size[1])
    if x.shape[-1] % formats.fp8_block128.BLOCK:
        return _linear(self, x)
    data, x_scale = torch.ops.gdnfuse.quantize_rows.default(x, columns)
    y = torch.ops.gdnfuse.fp8_linear.default(data, x_scale, self.weight, self.weight_scale_inv, name, x.dtype)
    return y if self.bias is None else (y + self.bias).to(x.dtype)


def _experts(self: torch.nn.Module, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling():  # rules know the weights of a captured call
        return call_experts(self, x, indices, weights)
    # Dequantises only the experts that are chosen.
    scales = [self.gate_up_proj_scale_inv, self.down_proj_scale_inv]
    stored = self.gate_up_proj, self.down_proj
    return torch.ops.gdnfuse.experts.default(x, indices, weights, *stored, "silu", scales=scales, format="fp8_block128")


def loop(cls: Any) -> Any:
    """The loop over experts of a class that transformers decorated, once or several times. None for anything else."""
    forward = vars(cls).get("forward") if isinstance(cls, type) else None
    while isinstance(forward, types.FunctionType) and forward.__globals__.get("__name__") == experts.MOE:
        forward = inspect.getclosurevars(forward).nonlocals.get("original_forward")
    return forward


def found(name: str, module: types.ModuleType) -> Iterator[tuple[str, Any, None]]:
    """Names of functions to capture in a module, and the functions."""
    if name == MODULE:
        if FUNCTION in vars(module):
            yield FUNCTION, vars(module)[FUNCTION], None
        if (forward := loop(vars(module).get("FP8Experts"))) is not None:
            yield LOOP, forward, None
    for attribute in EXPERTS.get(name, ()):
        if attribute in vars(module):
            yield attribute, vars(module)[attribute], None


def calls() -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Experts with weights in float64, which the loop uses without dequantising, and with scales of 1."""
    cls = vars(sys.modules[MODULE])["FP8Experts"]
    for N, k, E, H, width in experts.SIZES:
        generator = torch.Generator().manual_seed(N)
        draw = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
        self = cls.__new__(cls)
        torch.nn.Module.__init__(self)
        self.num_experts, self.hidden_dim, self.intermediate_dim, self.block_size = E, H, width, (128, 128)
        self.has_gate, self.has_bias, self.activation_scheme, self.act_fn = True, False, "dynamic", torch.nn.SiLU()
        for name in OTHERWISE:
            setattr(self, name, None)
        for name, shape in (("gate_up_proj", (E, 2 * width, H)), ("down_proj", (E, H, width))):
            setattr(self, name, torch.nn.Parameter(draw(shape), requires_grad=False))
            setattr(self, f"{name}_scale_inv", torch.nn.Parameter(torch.ones(E, 1, 1), requires_grad=False))
        weights = torch.rand((N, k), dtype=torch.float64, generator=generator)
        chosen = torch.rand((N, E), generator=generator).topk(k, -1).indices if k > 1 else torch.full((N, 1), E - 1)
        yield [self, draw((N, H)), chosen, weights], {}


def keep(function: types.FunctionType) -> None:
    """Prove what the weights of a function mean.

    Raises:
        Refused: it has other parameters, or transformers dequantises its weights in another way.
    """
    given = tuple(inspect.signature(function).parameters)
    if given != PARAMETERS:
        raise Refused(f"{FUNCTION} must have the parameters {', '.join(PARAMETERS)}, found {', '.join(given)}.")
    generator = torch.Generator().manual_seed(0)
    for name, scale_shape in (("fp8_block128", (2, 3)), ("fp8_tensor", (1, 1))):
        data = torch.randn(256, 384, generator=generator).to(torch.float8_e4m3fn)
        scale = torch.rand(scale_shape, generator=generator) + 0.5
        wanted = vars(sys.modules[MODULE])["Fp8Dequantize"](None).convert({"w.weight": [data], "w.weight_scale_inv": [scale]})
        if not torch.equal(wanted["w.weight"][0], formats.named(name).dequantize(data, scale, torch.float32)):
            raise Refused(f"Weights of {name} must dequantise as by transformers' Fp8Dequantize, found other values.")


def keep_loop(function: types.FunctionType) -> None:
    """Remember a loop that was proved."""
    _loops.add(function)


def forget() -> None:
    """Forget all loops that were proved."""
    _loops.clear()
