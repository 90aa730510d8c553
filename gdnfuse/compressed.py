"""Models that compressed-tensors loaded, whose weights stay compressed.

Without this module compressed-tensors decompresses all weights at the model's first call, by a hook that no compiler can trace.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open

from gdnfuse import compat, formats
from gdnfuse.errors import GdnfuseError, Refused, require_model
from gdnfuse.stored_linear import StoredLinear

HOOK = "ct_decompress_hook"  # the model's attribute with the handle of that hook
ZEROS = tuple(name for name, found in formats.FORMATS.items() if found.more == ("zero points",))
ZERO_POINT = ".weight_zero_point"  # suffix of their names in a checkpoint
INSTEAD = "load the model with CompressedTensorsConfig(dequantize=True)"


def keep_compressed(model: torch.nn.Module, checkpoint: str | os.PathLike[str] | None = None) -> torch.nn.Module:
    """Let the linears of a model that compressed-tensors loaded compute with their compressed weights, in place.

    Each becomes a `StoredLinear` over the same Parameters under the same names, so the model is saved as it was loaded.
    Activations are not quantised, even if the checkpoint says so (W8A16 instead of W8A8), which is more accurate. Call this
    before the model's first call.

    Args:
        model: a model from `from_pretrained` of a checkpoint of compressed-tensors, not dequantised and not called yet. Its
            weights must be FP8, symmetric, with a scale per block of 128 × 128, per row or per weight; int8, symmetric, with a
            scale per row ("int-quantized"); or int4 in groups of 32, 64 or 128 columns ("pack-quantized"), symmetric or with zero
            points.
        checkpoint: the folder that the model was loaded from. It is needed for zero points, which transformers does not load;
            such a model must come from `from_pretrained(…, ignore_mismatched_sizes=True)`. None is the model's own
            `name_or_path`.

    Returns:
        The model.

    Raises:
        GdnfuseError: `model` is not a model, it has no compressed weights, or one is stored in another way. The model is
            unchanged then.
    """
    require_model(model, "A model whose weights stay compressed")
    found = {name: m for name, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    if not found:
        raise GdnfuseError(
            f"A model whose weights stay compressed must be one that compressed-tensors loaded, found {type(model).__name__} "
            "without such weights."
        )
    if len(devices := sorted({str(p.device) for p in model.parameters()})) > 1:  # accelerate's hooks would move rows between them
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
        raise Refused(f"A compressed module must be a torch.nn.Linear, found {type(module).__name__}.")
    if (status := getattr(module, "quantization_status", None)) != "compressed":
        raise Refused(
            f"Weights must still be compressed, found {getattr(status, 'value', status)} ones: call keep_compressed before the "
            "model's first call."
        )
    if compat.hooks_of(module):
        raise Refused("A compressed linear must have no hooks, found at least one: add hooks after keep_compressed.")
    scheme = module.quantization_scheme
    if getattr(scheme, "output_activations", None) is not None:
        raise Refused("A linear must not quantise its result, found one that does.")
    parameters = dict(module.named_parameters(recurse=False))
    tensors = {**parameters, **dict(module.named_buffers(recurse=False))}
    data = tensors.get("weight_packed", tensors.get("weight"))
    scale = tensors.get("weight_scale")
    zeros = () if getattr(scheme.weights, "symmetric", True) else (tensors.get("weight_zero_point"),)
    if zeros and zeros[0] is not None and zeros[0].dtype == torch.int8 and data.dtype == torch.int32:
        zeros = (files.of(name).to(data.device),)
    if any(x is None or x.is_meta for x in (data, scale, *zeros)):
        what = "its weight, scale and zero points" if zeros else "its weight and its scale"
        raise Refused(f"A compressed linear must hold {what}, found one without.")
    if tensors.get("weight_g_idx") is not None:
        raise Refused("Groups must be of adjacent columns, found reordered ones (weight_g_idx).")
    new = StoredLinear(_format(scheme.weights, data), data, scale, *zeros, bias=module.bias)
    wanted, sizes = ([m.out_features, m.in_features] for m in (module, new))
    if sizes != wanted:
        raise Refused(f"A compressed weight must have the sizes {wanted}, found {sizes}.")
    for attribute, tensor in parameters.items():  # other saved tensors, such as scales of activations
        if attribute not in (*new.names, "bias"):
            new.register_parameter(attribute, tensor)
    return new


class _ZeroPoints:
    """Zero points from the files of a checkpoint. transformers makes models with unpacked ones, and so does not load them."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self._places: dict[str, Path] | None = None

    def of(self, linear: str) -> torch.Tensor:
        """The zero points of a linear.

        Raises:
            Refused: there is no such folder, or the folder has none or several of that name.
        """
        if self._places is None:
            paths = sorted(self.folder.glob("*.safetensors")) if str(self.folder) != "." else []
            self._places = {}
            for path in paths:
                with safe_open(path, "pt") as file:
                    self._places |= dict.fromkeys((key for key in file.keys() if key.endswith(ZERO_POINT)), path)
        key = linear + ZERO_POINT
        if key not in self._places:  # names in the model may have another prefix than in the checkpoint
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
    """The format of weights that compressed-tensors describes.

    Raises:
        Refused: the format is not known here.
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
