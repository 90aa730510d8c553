"""Models with bitsandbytes' linears of four bits, whose weights our kernels read instead of its own."""

from __future__ import annotations

import gc
from typing import Any

import torch

from gdnfuse import formats
from gdnfuse.errors import GdnfuseError, Refused, require_model
from gdnfuse.formats import four_bit
from gdnfuse.stored_linear import StoredLinear


def keep_four_bit(model: torch.nn.Module) -> torch.nn.Module:
    """Turn bitsandbytes' linears of four bits into ones that our kernels read, in place.

    Each `Linear4bit` becomes a `StoredLinear` over the same bytes. Scales that are quantised themselves (double quantisation)
    become float32 once, which takes half a bit more per weight in blocks of 64. Products are computed in the dtype of the input,
    whatever compute_dtype was. Call this before the model's first call, on the device that it will run on, and before adapters
    are loaded.

    Args:
        model: a model from `from_pretrained` with `BitsAndBytesConfig(load_in_4bit=True)`, nf4 or fp4, in blocks of 64 or 128.

    Returns:
        The model. It cannot be saved any more: save_pretrained raises.

    Raises:
        GdnfuseError: `model` is not a model, it has no such linears, or one is stored in another way. The model is unchanged
            then.
    """
    require_model(model, "A model with weights of four bits")
    found = {name: m for name, m in model.named_modules() if _state(m) is not None}
    if not found:
        raise GdnfuseError(
            "A model with weights of four bits must be one that bitsandbytes quantised and that is on its device, found "
            f"{type(model).__name__} without such weights."
        )
    if len(devices := sorted({str(p.device) for p in model.parameters()})) > 1:  # accelerate's hooks would move rows between them
        raise GdnfuseError(f"A model with weights of four bits must be on one device, found {' and '.join(devices)}.")
    made = {}
    for name, module in found.items():
        try:
            made[name] = _linear(module)
        except Refused as e:
            raise GdnfuseError(f"{name} cannot be read by kernels: leave the model as bitsandbytes has it. {e.reason}") from e
    for name, new in made.items():
        model.set_submodule(name, new.train(found[name].training))
    # bitsandbytes' weights and modules refer to each other. Until they are collected, two tensors share the memory to be packed.
    del module
    found.clear()
    gc.collect()
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = refuse_to_save
    return model


def refuse_to_save(*args: Any, **kwargs: Any) -> None:
    """Replaces save_pretrained of a model. transformers could not load the weights that it would write.

    Raises:
        GdnfuseError: always.
    """
    raise GdnfuseError(
        "A model to save must have weights of a format that transformers loads, found nf4 or fp4 in linears of gdnfuse: save it "
        "before gdnfuse.models makes these."
    )


def _state(module: torch.nn.Module) -> Any:
    """What bitsandbytes keeps next to the four-bit weight of a module. A weight of a base layer does not count."""
    return getattr(dict(module.named_parameters(recurse=False)).get("weight"), "quant_state", None)


def _linear(module: torch.nn.Module) -> StoredLinear:
    """The same linear over the same bytes.

    Raises:
        Refused: it computes something else, or is stored in another way.
    """
    if type(module).__name__ != "Linear4bit":
        raise Refused(f"A module with weights of four bits must be a Linear4bit, found {type(module).__name__}.")
    weight, state = module.weight, _state(module)
    if getattr(state, "packing_format_for_cpu", False):
        raise Refused(
            "Weights must be in bitsandbytes' own order, found that of a CPU: set support_avx512bf16_for_cpu = False on each "
            "Linear4bit before the first call."
        )
    (M, N), block, name = state.shape, state.blocksize, f"{state.quant_type}_block{state.blocksize}"
    if name not in formats.FORMATS:
        known = f"{' or '.join(four_bit.TABLES)} in blocks of {' or '.join(map(str, four_bit.OF_ROWS))} elements"
        raise Refused(f"Weights must be {known}, found {state.quant_type} in blocks of {block}.")
    if N % block:
        raise Refused(f"Rows of a weight must have whole blocks of {block} columns, found {N} columns.")
    data = weight.data.as_subclass(torch.Tensor).view(torch.uint8).view(M, N // 2)
    scale = state.absmax
    if state.nested:
        if state.state2.blocksize != four_bit.NESTED:
            found = state.state2.blocksize
            raise Refused(f"Magnitudes must be quantised {four_bit.NESTED} at a time, found {found}.")
        scale = four_bit.magnitudes(scale, state.state2.absmax, state.state2.code, state.offset)
    return StoredLinear(name, data, scale.float().view(M, N // block), bias=module.bias)
