"""Models that compressed-tensors loaded, whose weights stay compressed.

By itself compressed-tensors decompresses all weights at the model's first call, for good, by a hook that no compiler can trace.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open

from gdnfuse import compat, formats
from gdnfuse.errors import GdnfuseError, Refused, require_model
from gdnfuse.stored_linear import StoredLinear

HOOK = "ct_decompress_hook"  # attribute of the model with the handle of that hook
ZEROS = tuple(name for name, found in formats.FORMATS.items() if found.more == ("zero points",))
ZERO_POINT = ".weight_zero_point"  # what a checkpoint calls them, behind the name of the linear
INSTEAD = "load the model with CompressedTensorsConfig(dequantize=True)"


def keep_compressed(model: torch.nn.Module, checkpoint: str | os.PathLike[str] | None = None) -> torch.nn.Module:
    """Let the linears of a model that compressed-tensors loaded compute with their weights as they are stored, in place.

    Each becomes a `StoredLinear` of the same Parameters under the same names, so the model is saved as it was loaded. Activations
    are not quantised, whatever the checkpoint says (W8A16 for W8A8), which is nearer to what the weights mean. This must come
    before the model's first call.

    Args:
        model: from `from_pretrained` of a checkpoint of compressed-tensors, neither dequantised nor called yet. Its weights are
            FP8 with a scale per block of 128 × 128, row or weight, int8 with a scale per row ("int-quantized"), symmetric, or
            int4 in groups of 32, 64 or 128 columns ("pack-quantized"), symmetric or with zero points.
        checkpoint: the folder that the model was loaded from, for zero points, which transformers does not load: the model then
            came from `from_pretrained(…, ignore_mismatched_sizes=True)`. None for the model's own `name_or_path`.

    Returns:
        The model.

    Raises:
        GdnfuseError: this is no model, or one without compressed weights, or with one that is stored otherwise. The model is as
            it was then.
    """
    require_model(model, "A model whose weights stay compressed")
    found = {name: m for name, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    if not found:
        raise GdnfuseError(
            f"A model whose weights stay compressed must be one that compressed-tensors loaded, found {type(model).__name__} "
            "without such weights."
        )
    if len(devices := sorted({str(p.device) for p in model.parameters()})) > 1:  # between which accelerate's hooks move rows
        raise GdnfuseError(f"A model whose weights stay compressed must be on one device, found {' and '.join(devices)}.")
    made, files = {}, _ZeroPoints(checkpoint or getattr(model, "name_or_path", "") or "")
    for name, module in found.items():
        try:
            made[name] = _linear(module, name, files)
        except Refused as e:
            raise GdnfuseError(f"{name} cannot stay compressed: {INSTEAD}. {e.reason}") from e
    for name, new in made.items():
        model.set_submodule(name, new.train(found[name].training))
    for module in model.modules():
        if (hook := vars(module).pop(HOOK, None)) is not None:
            hook.remove()
    return model


def _linear(module: torch.nn.Module, name: str, files: _ZeroPoints) -> StoredLinear:
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
    zeros = () if getattr(scheme.weights, "symmetric", True) else (tensors.get("weight_zero_point"),)
    if zeros and zeros[0] is not None and zeros[0].dtype == torch.int8 and data.dtype == torch.int32:
        zeros = (files.of(name).to(data.device),)
    if any(x is None or x.is_meta for x in (data, scale, *zeros)):
        what = "its weight, scale and zero points" if zeros else "its weight and its scale"
        raise Refused(f"A compressed linear must hold {what}, found that it does not.")
    if tensors.get("weight_g_idx") is not None:
        raise Refused("Groups must be of columns that lie side by side, found an order of their own.")
    new = StoredLinear(_format(scheme.weights, data), data, scale, *zeros, bias=module.bias)
    wanted, sizes = ([m.out_features, m.in_features] for m in (module, new))
    if sizes != wanted:
        raise Refused(f"A compressed weight must have the sizes {wanted}, found {sizes}.")
    for attribute, tensor in parameters.items():  # what else is saved, as scales of activations
        if attribute not in (*new.names, "bias"):
            new.register_parameter(attribute, tensor)
    return new


class _ZeroPoints:
    """Zero points as a checkpoint has them. Models are made by transformers with others, unpacked, and so load none."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self._places: dict[str, Path] | None = None

    def of(self, linear: str) -> torch.Tensor:
        """Of the linear of a name.

        Raises:
            Refused: there is no such folder, or it has none, or several by that name.
        """
        if self._places is None:
            paths = sorted(self.folder.glob("*.safetensors")) if str(self.folder) != "." else []
            self._places = {}
            for path in paths:
                with safe_open(path, "pt") as file:
                    self._places |= dict.fromkeys((key for key in file.keys() if key.endswith(ZERO_POINT)), path)
        key = linear + ZERO_POINT
        if key not in self._places:  # a model's names may have another beginning than its checkpoint's
            tail = key[key.find("layers.") :]
            found = [k for k in self._places if k.endswith(f".{tail}")]
            if len(found) != 1:
                raise Refused(
                    "Zero points must be read from the checkpoint, as transformers loads none: give its folder as checkpoint=…; "
                    f"found {len(found)} of this linear in {str(self.folder)!r}."
                )
            (key,) = found
        with safe_open(self._places[key], "pt") as file:
            return file.get_tensor(key)


def _format(weights: object, data: torch.Tensor) -> str:
    """The format of weights that compressed-tensors describes so.

    Raises:
        Refused: it is of none that is known.
    """
    facts = {name: getattr(weights, name, None) for name in ("num_bits", "type", "strategy", "group_size", "block_structure")}
    bits, kind, strategy, group, block = (getattr(fact, "value", fact) for fact in facts.values())
    about = f"{kind}{bits} by {strategy}" + (f" of {group}" if strategy == "group" else "")
    zeros, name = not getattr(weights, "symmetric", True), ""
    if bits == 8 and data.dtype in (torch.int8, torch.float8_e4m3fn):
        short = "int8" if data.dtype == torch.int8 else "fp8"
        name = {"channel": f"{short}_channel", "tensor": "fp8_tensor" if short == "fp8" else ""}.get(strategy, "")
        if strategy == "block" and short == "fp8" and list(block or ()) == [formats.fp8_block128.BLOCK] * 2:
            name = "fp8_block128"
    elif (bits, kind, strategy, data.dtype) == (4, "int", "group", torch.int32) and group in formats.int4_group.GROUPS:
        name = f"int4_group{group}" + ("_zero" if zeros else "")
    if name and zeros and name not in ZEROS:
        raise Refused(f"Compressed weights must be symmetric or int4 in groups, found {about} with zero points.")
    if not name:
        known = "FP8 by block of 128 × 128, channel or tensor, int8 by channel, or int4 by group of 32, 64 or 128"
        raise Refused(f"Compressed weights must be {known}, found {about} in {str(data.dtype).removeprefix('torch.')}.")
    return name
