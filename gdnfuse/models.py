"""Models of transformers without their weights: configs, presets, random and meta models, and how to trace or verify one.

transformers is imported inside the functions, so importing this module is fast.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gdnfuse import compat, formats
from gdnfuse import options as gdnfuse_options
from gdnfuse.capture_fp8 import dequantized_calls
from gdnfuse.compressed import keep_compressed as keep_compressed
from gdnfuse.errors import GdnfuseError, one_line, require_model
from gdnfuse.four_bit import keep_four_bit as keep_four_bit
from gdnfuse.four_bit import refuse_to_save
from gdnfuse.generation import shards
from gdnfuse.generation.caches import cache_argument
from gdnfuse.generation.compile import with_own_code
from gdnfuse.progress import announce
from gdnfuse.report.records import GraphReport, reports
from gdnfuse.stored_linear import StoredLinear

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


PHASES = ("decode", "prefill")


def presets() -> list[str]:
    """Names of the built-in configs."""
    files = (resources.files("gdnfuse") / "presets").iterdir()
    return sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json"))


def preset(name: str) -> str | None:
    """The full name of a preset ("4b" is "qwen3.5-4b"), or None if there is none of this name."""
    return next((full for full in (name.lower(), f"qwen3.5-{name.lower()}") if full in presets()), None)


def load_config(name_or_path: str) -> PreTrainedConfig:
    """Load the config of a preset ("qwen3.5-4b" or "4b"), a config.json, a local model folder or a hub id.

    Raises:
        GdnfuseError: there is no such config, or it cannot be read.
    """
    if name := preset(name_or_path):
        return _from_json((resources.files("gdnfuse") / "presets" / f"{name}.json").read_text(), name)
    path = Path(name_or_path).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as e:
            raise GdnfuseError(f"Cannot read {file}: {e}.") from e
        return _from_json(text, str(file))
    if path.is_dir():
        raise GdnfuseError(f"The folder {path} has no config.json.")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name_or_path) or file.suffix == ".json":
        raise GdnfuseError(
            f"No such model: {name_or_path!r} is not a file, folder, hub id (owner/name) or one of the presets "
            f"{', '.join(presets())}."
        )
    return _from_hub(name_or_path)


def _from_json(text: str, source: str) -> PreTrainedConfig:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        raise GdnfuseError(f"{source} is not JSON: {e}.") from e
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise GdnfuseError(f'{source} is not a model config: it has no "model_type".')
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**data)
    except Exception as e:  # the check of a field may raise anything
        raise GdnfuseError(f"{source} is not a config that transformers accepts: {one_line(e)}.") from e


def _from_hub(name: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except Exception as e:  # OSError, ValueError or an error of the HTTP client, depending on what is wrong
        raise GdnfuseError(f"Cannot get the config of {name!r} from the hub: {one_line(e)}.") from e


@contextlib.contextmanager
def _running(tokens: int) -> Iterator[None]:
    """Turn errors of the model or of torch into sentences. Out-of-memory errors pass unchanged: the model is not at fault."""
    try:
        yield
    except (GdnfuseError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        raise GdnfuseError(f"The model does not run a prompt of {tokens} tokens and a step: {one_line(e)}.") from e


@contextlib.contextmanager
def _experts_of_any_dtype(model: torch.nn.Module) -> Iterator[None]:
    """Compute experts in another way than grouped_mm, transformers' default, which only takes bfloat16 on the meta device."""
    before = model.get_experts_implementation()
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def meta_model(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """Make the causal language model of a config on the meta device: shapes without weights.

    A multimodal config gives its text model.

    Raises:
        GdnfuseError: transformers has no causal language model for the config.
    """
    return random_model(config, dtype, "meta")


def random_model(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> torch.nn.Module:
    """Make the causal language model of a config with random weights.

    Raises:
        GdnfuseError: transformers has no causal language model for the config, or the device has no room for it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config.get_text_config(decoder=True), dtype=dtype)
    except Exception as e:  # an unknown architecture or sizes that do not fit together
        raise GdnfuseError(f"Cannot build a causal language model from this config: {one_line(e)}.") from e
    return model.eval().requires_grad_(False)


# Names of the formats on the command line.
QUANTIZED = {
    "fp8": "fp8_block128",
    "fp8-tensor": "fp8_tensor",
    "int8": "int8_channel",
    "int4": "int4_group128",
    "nf4": "nf4_block64",
}
OF_TRANSFORMERS = {"fp8_block128": (formats.fp8_block128.BLOCK,) * 2, "fp8_tensor": None}  # FP8Linear's blocks
# Linears that checkpoints do not quantise: they are small, or an error in them would affect every token.
NOT_QUANTIZED = ("lm_head", "in_proj_a", "in_proj_b", "in_proj_ba", "a_proj", "b_proj", "gate", "shared_expert_gate")


def quantized(model: torch.nn.Module, format: str = "fp8_block128") -> torch.nn.Module:
    """Turn the linears of a model into those of a quantised checkpoint, in place and one by one, without the hub.

    For "fp8_block128" and "fp8_tensor" they become transformers' FP8Linear, and for "fp8_block128" experts become its FP8Experts,
    as in a checkpoint that FineGrainedFP8Config loads. For other formats they become a `StoredLinear`, with the tensors of a
    checkpoint of compressed-tensors. These are not quantised: the head, the linears of a GDN layer's gates, routers, and linears
    whose columns are not a multiple of the group. The model's config is changed, so that a saved model is loaded as a checkpoint
    of that format. There is no such checkpoint for nf4 and fp4, so save_pretrained of such a model raises.

    Args:
        model: a model with weights on any device, or on the meta device.
        format: a name of `gdnfuse.formats.FORMATS`, except "nf4" and "fp4", which only bitsandbytes makes.

    Returns:
        The model.

    Raises:
        GdnfuseError: there is no such format; `model` is not a model; it has nothing to quantise; or it is already quantised. The
            model is unchanged then.
    """
    require_model(model, "A model to quantise")
    if format not in (known := [name for name, found in formats.FORMATS.items() if found.quantize]):
        raise GdnfuseError(f"A model can be quantised to {', '.join(known)}, found {format!r}.")
    if before := next((n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and _is_quantized(m)), None):
        raise GdnfuseError(
            f"A model to quantise must have plain weights, found {type(model.get_submodule(before)).__name__} at {before}: begin "
            "with a model that is not quantised."
        )
    names = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and n.rpartition(".")[2] not in NOT_QUANTIZED]
    names = [n for n in names if model.get_submodule(n).in_features % formats.named(format).columns == 0]
    if not names:
        raise GdnfuseError("A model to quantise must have linears other than its head with whole groups of columns, found none.")
    for name in names:
        linear = model.get_submodule(name)
        new = _quantized_linear(linear, format)
        model.set_submodule(name, new.train(linear.training))
        del linear
    if OF_TRANSFORMERS.get(format):
        _quantize_experts(model, format, OF_TRANSFORMERS[format])
    if format.startswith(tuple(formats.four_bit.TABLES)):
        if hasattr(model, "save_pretrained"):
            model.save_pretrained = refuse_to_save
    elif (config := getattr(model, "config", None)) is not None:
        kept = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear]
        config.quantization_config = _described(format, kept)
    return model


def _is_quantized(linear: torch.nn.Linear) -> bool:
    weight = getattr(linear, "weight", None)
    if isinstance(linear, StoredLinear) or not isinstance(weight, torch.Tensor):
        return isinstance(linear, StoredLinear)
    return weight.dtype == torch.float8_e4m3fn or type(weight) not in (torch.Tensor, torch.nn.Parameter)


def _described(format: str, kept: list[str]) -> dict[str, Any]:
    """The quantization config of a saved model: for transformers' own FP8, or for compressed-tensors.

    Args:
        kept: names of the linears that are not quantised.
    """
    if format in OF_TRANSFORMERS:
        block = OF_TRANSFORMERS[format]
        about = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": kept}
        return {**about, "weight_block_size": list(block) if block else None}
    bits = formats.named(format).bits
    weights = {"num_bits": bits, "type": "float" if format.startswith("fp8") else "int", "dynamic": False}
    weights["symmetric"] = not formats.named(format).more
    group = formats.named(format).columns
    weights |= {"strategy": "group", "group_size": group} if group > 1 else {"strategy": "channel"}
    stored = "pack-quantized" if bits == 4 else f"{weights['type']}-quantized"
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": stored}}
    about = {"quant_method": "compressed-tensors", "format": stored, "config_groups": groups, "ignore": kept}
    return {**about, "quantization_status": "compressed"}


def _quantized_linear(linear: torch.nn.Linear, format: str) -> torch.nn.Linear:
    if format not in OF_TRANSFORMERS:
        return StoredLinear(format, *formats.named(format).quantize(linear.weight.detach()), bias=linear.bias)
    from transformers.integrations.finegrained_fp8 import FP8Linear

    with torch.device("meta"):
        new = FP8Linear(linear.in_features, linear.out_features, OF_TRANSFORMERS[format], has_bias=linear.bias is not None)
    _quantize(new, "weight", linear.weight, format)
    new.bias = linear.bias
    return new


def _quantize(module: torch.nn.Module, name: str, weight: torch.Tensor, format: str) -> None:
    """Give a module of transformers the data and the scale of a quantised weight."""
    for attribute, tensor in zip((name, f"{name}_scale_inv"), formats.named(format).quantize(weight.detach()), strict=True):
        setattr(module, attribute, torch.nn.Parameter(tensor, requires_grad=False))


def _quantize_experts(model: torch.nn.Module, format: str, block: tuple[int, int]) -> None:
    """Turn experts with gate and up in one weight into transformers' FP8Experts."""
    from transformers.integrations import finegrained_fp8 as fp8
    from transformers.integrations.moe import use_experts_implementation

    found = [(n, m) for n, m in model.named_modules() if n.endswith(".experts") and hasattr(m, "gate_up_proj")]
    if not found:
        return
    known = {"experts_interface": fp8.ALL_FP8_EXPERTS_FUNCTIONS, "has_bias": False, "has_gate": True}
    cls = use_experts_implementation(experts_class=type("FP8Experts", (fp8.FP8Experts,), {}), **known)
    for name, module in found:
        with torch.device("meta"):
            new = cls(config=module.config, block_size=block)
        for weight in ("gate_up_proj", "down_proj"):
            _quantize(new, weight, getattr(module, weight), format)
        model.set_submodule(name, new.train(module.training))


@contextlib.contextmanager
def on_ranks(model: torch.nn.Module, ranks: int) -> Iterator[None]:
    """Give a meta model, inside the block, the weights that the first of so many ranks has if it is split by heads.

    No other ranks are needed. Embedding and head stay whole.

    Raises:
        GdnfuseError: the model has no plan for tensor parallel, it cannot be split over so many ranks, or a process group is in
            use.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise GdnfuseError("A report of several ranks needs a process without a process group, found one in use.")
    if not (plan := getattr(model, "tp_plan", None)):
        raise GdnfuseError(f"A report of several ranks needs a model with a tp_plan, found {type(model).__name__} without one.")
    if not compat.start_fake_ranks(ranks):
        raise GdnfuseError("A report of several ranks needs torch's fake process group, found a torch without it.")
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (ranks,))
        shards.share_out(model, {k: v for k, v in plan.items() if "lm_head" not in k and "embed" not in k}, mesh)
        shards.prepare(model, *shards.plan(shards.HEADS, model), shards.Alone())
        yield
    finally:
        torch.distributed.destroy_process_group()


def verify(model: torch.nn.Module, *, batch: int = 1, prompt: int = 70, **options: Any) -> list[GraphReport]:
    """Run a random prompt and one decode step of a model with the option `verify`, and return the reports of their graphs.

    Args:
        model: a model with weights, on the device to verify on. Its values do not change and it is not left compiled. Sibling
            weights are packed.
        batch: number of sequences.
        prompt: tokens of the prompt.
        options: see `gdnfuse.options.Options`. Graphs are rewritten but not compiled further, unless `inner` is given.
    """
    from transformers import StaticCache

    options = {"inner": "eager", **options, "verify": True}
    gdnfuse_options.parse(options)
    known = {r.graph_id for r in reports()}
    held = cache_argument(model, StaticCache(config=model.config, max_cache_len=prompt + 1))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator).to(model.device)
    many = compat.dynamo_settings(recompile_limit=1000, accumulated_recompile_limit=1000)
    with torch.no_grad(), many, _running(prompt):
        step = torch.compile(model, backend="gdnfuse", options=options)
        for ids in (tokens, tokens[:, :1]):
            step(ids, **held, use_cache=True)
    return [r for r in reports() if r.graph_id not in known]


def trace(
    model: torch.nn.Module, *, phase: str = "decode", batch: int = 1, prompt: int = 64, **options: Any
) -> list[GraphReport]:
    """Compile one step of a model on the meta device and return the reports of its graphs. It needs neither weights nor a GPU.

    Args:
        model: from `meta_model`.
        phase: "decode" for one token after a prompt, or "prefill" for the prompt itself.
        batch: number of sequences.
        prompt: tokens of the prompt. The graph of a decode step does not depend on it.
        options: see `gdnfuse.options.Options`. `target` is the device type to choose kernels for.
    """
    from transformers import StaticCache

    if phase not in PHASES:
        raise GdnfuseError(f"phase must be one of {', '.join(PHASES)}, found {phase!r}.")
    for name, size in (("batch", batch), ("prompt", prompt)):
        if size < 1:
            raise GdnfuseError(f"{name} must be at least 1, found {size}.")
    gdnfuse_options.parse(options)
    known = {r.graph_id for r in reports()}
    # Only the cache is made under this mode. Dynamo would trace through it and take four times as long.
    with torch.device("meta"):
        held = cache_argument(model, StaticCache(config=model.config, max_cache_len=prompt + 1))
    tokens = torch.zeros(batch, prompt, dtype=torch.long, device="meta")
    # All models of a process share code. So traces of several models would count towards one limit and make sizes symbolic.
    limits = {"recompile_limit": 1000, "accumulated_recompile_limit": 1000, "automatic_dynamic_shapes": False}
    with torch.no_grad(), compat.dynamo_settings(**limits), _running(prompt):
        # Each trace has its own code. Otherwise Dynamo would reuse the trace of an equal model and make no graph.
        step = torch.compile(with_own_code(model), backend="gdnfuse", options=options or None)
        if phase == "decode":
            announce("run a prompt")
            # Two tokens are enough to create the states, and the chunk rule needs one chunk for them.
            with _experts_of_any_dtype(model), dequantized_calls(model):
                model(tokens[:, :2] if prompt > 1 else tokens, **held, use_cache=True)
            tokens = tokens[:, :1]
        announce(f"trace the {phase}")
        step(tokens, **held, use_cache=True)
    return [r for r in reports() if r.graph_id not in known]
