"""Models that compressed-tensors loaded, whose weights stay compressed.

By itself compressed-tensors decompresses all weights at the model's first call, for good, by a hook that no compiler can trace.
"""

from __future__ import annotations

import torch

from gdnfuse import compat, formats
from gdnfuse.errors import GdnfuseError, Refused
from gdnfuse.stored_linear import StoredLinear

HOOK = "ct_decompress_hook"  # attribute of the model with the handle of that hook
INSTEAD = "load the model with CompressedTensorsConfig(dequantize=True)"


def keep_compressed(model: torch.nn.Module) -> torch.nn.Module:
    """Let the linears of a model that compressed-tensors loaded compute with their weights as they are stored, in place.

    Each becomes a `StoredLinear` of the same Parameters under the same names, so the model is saved as it was loaded. Activations
    are not quantised, whatever the checkpoint says (W8A16 for W8A8), which is nearer to what the weights mean. This must come
    before the model's first call.

    Args:
        model: from `from_pretrained` of a checkpoint of compressed-tensors, neither dequantised nor called yet. Its weights are
            symmetric: FP8 with a scale per block of 128 × 128, row or weight, int8 with a scale per row ("int-quantized"), or
            int4 in groups of 32, 64 or 128 columns ("pack-quantized").

    Returns:
        The model.

    Raises:
        GdnfuseError: the model has no compressed weights, or one that is stored otherwise. The model is as it was then.
    """
    found = {name: m for name, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    if not found:
        raise GdnfuseError(
            f"A model whose weights stay compressed must be one that compressed-tensors loaded, found {type(model).__name__} "
            "without such weights."
        )
    if len(devices := sorted({str(p.device) for p in model.parameters()})) > 1:  # between which accelerate's hooks move rows
        raise GdnfuseError(f"A model whose weights stay compressed must be on one device, found {' and '.join(devices)}.")
    made = {}
    for name, module in found.items():
        try:
            made[name] = _linear(module)
        except Refused as e:
            raise GdnfuseError(f"{name} cannot stay compressed: {INSTEAD}. {e.reason}") from e
    for name, new in made.items():
        model.set_submodule(name, new.train(found[name].training))
    for module in model.modules():
        if (hook := vars(module).pop(HOOK, None)) is not None:
            hook.remove()
    return model


def _linear(module: torch.nn.Module) -> StoredLinear:
    """The same linear, with the module's own Parameters.

    Raises:
        Refused: it computes something else.
    """
    if type(module) is not torch.nn.Linear:
        raise Refused(f"What is compressed must be a torch.nn.Linear, found {type(module).__name__}.")
    if (status := getattr(module, "quantization_status", None)) != "compressed":
        raise Refused(f"Weights must be compressed still, found them {getattr(status, 'value', status)}.")
    if compat.hooks_of(module):
        raise Refused("A compressed linear must have no hooks, found some.")
    scheme = module.quantization_scheme
    if getattr(scheme, "output_activations", None) is not None:
        raise Refused("Results of a linear must not be quantised, found that they are.")
    parameters = dict(module.named_parameters(recurse=False))
    tensors = {**parameters, **dict(module.named_buffers(recurse=False))}
    data = tensors.get("weight_packed", tensors.get("weight"))
    scale = tensors.get("weight_scale")
    if data is None or scale is None or data.is_meta or scale.is_meta:
        raise Refused("A compressed linear must hold its weight and its scale, found that it does not.")
    if tensors.get("weight_g_idx") is not None:
        raise Refused("Groups must be of columns that lie side by side, found an order of their own.")
    new = StoredLinear(_format(scheme.weights, data), data, scale, module.bias)
    wanted, sizes = ([m.out_features, m.in_features] for m in (module, new))
    if sizes != wanted:
        raise Refused(f"A compressed weight must have the sizes {wanted}, found {sizes}.")
    for name, tensor in parameters.items():  # what else is saved, as scales of activations
        if name not in ("weight", "weight_packed", "weight_scale", "bias"):
            new.register_parameter(name, tensor)
    return new


def _format(weights: object, data: torch.Tensor) -> str:
    """The format of weights that compressed-tensors describes so.

    Raises:
        Refused: it is of none that is known.
    """
    facts = {name: getattr(weights, name, None) for name in ("num_bits", "type", "strategy", "group_size", "block_structure")}
    bits, kind, strategy, group, block = (getattr(fact, "value", fact) for fact in facts.values())
    about = f"{kind}{bits} by {strategy}" + (f" of {group}" if strategy == "group" else "")
    if not getattr(weights, "symmetric", True):
        raise Refused(f"Compressed weights must be symmetric, found {about} with zero points.")
    name = ""
    if bits == 8 and data.dtype in (torch.int8, torch.float8_e4m3fn):
        short = "int8" if data.dtype == torch.int8 else "fp8"
        name = {"channel": f"{short}_channel", "tensor": "fp8_tensor" if short == "fp8" else ""}.get(strategy, "")
        if strategy == "block" and short == "fp8" and list(block or ()) == [formats.fp8_block128.BLOCK] * 2:
            name = "fp8_block128"
    elif (bits, kind, strategy, data.dtype) == (4, "int", "group", torch.int32) and group in formats.int4_group.GROUPS:
        name = f"int4_group{group}"
    if not name:
        known = "FP8 by block of 128 × 128, channel or tensor, int8 by channel, or int4 by group of 32, 64 or 128"
        raise Refused(f"Compressed weights must be {known}, found {about} in {str(data.dtype).removeprefix('torch.')}.")
    return name
