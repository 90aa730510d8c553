"""Small random models of every family under test, and how to drive them step by step."""

from __future__ import annotations

import copy
import inspect
import sys

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, StaticCache

from gdnfuse import formats
from gdnfuse.stored_linear import StoredLinear

ROPE = {
    "rope_type": "default",
    "rope_theta": 1e7,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}
TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "tie_word_embeddings": False,
    "rope_parameters": ROPE,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# Every expert takes part: with fewer, a rounding anywhere may flip a choice, and errors measure the flips.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
GDN_LAYERS = 2
# Instead, where one layer of a kind will do: to trace a layer takes longer than all else that most tests do.
SMALL = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
HEADS_OF_27B = {"linear_num_key_heads": 2, "linear_num_value_heads": 6}  # three value heads a key head, as 48 and 16 are
# When it makes the mask of a prompt on a filled cache, this version branches on a static cache's length, a tensor: Dynamo breaks
# the graph there, and under fullgraph raises, whatever the backend.
FILLED_STATIC_CACHE_BREAKS = transformers.__version__.startswith("5.19.")

# By what keyword models take a cache, and in what attribute they answer it.
CACHE = "cache" if "cache" in inspect.signature(transformers.Qwen3_5ForCausalLM.forward).parameters else "past_key_values"


def held(cache):
    """Arguments of a model's call that uses a cache."""
    return {CACHE: cache, "use_cache": True}


def causal_lm(**overrides):
    config = transformers.Qwen3_5TextConfig(**{**TEXT, **overrides})
    return _built(transformers.Qwen3_5ForCausalLM, config)


def conditional_generation(**overrides):
    config = transformers.Qwen3_5Config(
        text_config={**TEXT, **overrides},
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [],
        },
    )  # fmt: skip
    return _built(transformers.Qwen3_5ForConditionalGeneration, config)


def moe(**overrides):
    config = transformers.Qwen3_5MoeTextConfig(**{**TEXT, **EXPERTS, **overrides})
    return _built(transformers.Qwen3_5MoeForCausalLM, config)


def qwen3_next(**overrides):
    config = transformers.Qwen3NextConfig(**{**TEXT, **EXPERTS, "rope_parameters": None, **overrides})
    return _built(transformers.Qwen3NextForCausalLM, config)


def olmo_hybrid(**overrides):
    text = {k: v for k, v in TEXT.items() if k != "head_dim"}
    return _built(
        transformers.OlmoHybridForCausalLM, transformers.OlmoHybridConfig(**{**text, "rope_parameters": None, **overrides})
    )


def qwen4_exp(**overrides):
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    text = {k: v for k, v in TEXT.items() if k != "intermediate_size"} | layers
    index = {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    }
    config = transformers.Qwen4ExpTextConfig(**{**text, **EXPERTS, **index, "hc_lowrank": 16, **overrides})
    return _built(transformers.Qwen4ExpForCausalLM, config)


def lara_mini(**overrides):
    """One layer of each kind, and a window shorter than most prompts."""
    text = {k: v for k, v in TEXT.items() if k != "intermediate_size"} | {"rope_parameters": None, "sliding_window": 16}
    layers = {"layer_types": ["linear_attention", "sliding_attention", "full_attention"]}
    config = transformers.LaraMiniConfig(**{**text, **EXPERTS, **layers, **overrides})
    return _built(transformers.LaraMiniForCausalLM, config)


FAMILIES = {"causal_lm": causal_lm, "conditional_generation": conditional_generation, "moe": moe}


def _built(cls, config):
    torch.manual_seed(0)
    model = cls(config).eval()
    # Random initialisation leaves norms at 0 or 1 and gates alike; spread everything so that a swapped operand shows.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and "A_log" not in name:
                p.add_(torch.randn_like(p) * 0.1)
    return model.requires_grad_(False)


def text_config(model):
    return model.config.get_text_config()


def new_cache(model, kind, length=32):
    if kind == "static":
        return StaticCache(config=text_config(model), max_cache_len=length)
    return DynamicCache(config=text_config(model))


def prompt(batch, length=5, padded=False, seed=1):
    """input_ids and attention_mask (None without padding); with padding every other row starts two tokens later."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 128, (batch, length), generator=generator)
    if not padded:
        return ids, None
    mask = torch.ones_like(ids)
    mask[::2, :2] = 0
    return ids.masked_fill(mask == 0, 0), mask


@torch.no_grad()
def prefill(model, batch, kind, padded=False, length=32, seed=1):
    """The model's own eager prefill; returns the cache and the mask for the next step."""
    cache = new_cache(model, kind, length)
    ids, mask = (x if x is None else x.to(model.device) for x in prompt(batch, padded=padded, seed=seed))
    model(input_ids=ids, attention_mask=mask, **held(cache))
    return cache, mask


@torch.no_grad()
def decode(call, cache, mask, tokens):
    """Feed `tokens` [B, n] one by one through `call`; returns logits [B, n, vocab]."""
    logits = []
    static = isinstance(cache, StaticCache)
    if mask is not None and static:
        # Of the cache's length from the start, so that no shape changes between steps; the future is masked by causality.
        length = next(layer.max_cache_len for layer in cache.layers if hasattr(layer, "max_cache_len"))
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], length - mask.shape[1])], 1)
    for t in range(tokens.shape[1]):
        if mask is not None and not static:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        out = call(input_ids=tokens[:, t : t + 1], attention_mask=mask, **held(cache))
        logits.append(out.logits[:, -1].clone())
    return torch.stack(logits, 1)


def tokens_for(batch, n, seed=2):
    return torch.randint(2, 128, (batch, n), generator=torch.Generator().manual_seed(seed))


def states(cache):
    """All recurrent and conv states of a cache, in layer order."""
    found = {"recurrent": [], "conv": []}
    for layer in cache.layers:
        if getattr(layer, "recurrent_states", None):
            found["recurrent"].append(layer.recurrent_states[0])
            found["conv"].append(layer.conv_states[0])
    return found


def flat_states(cache, kind):
    """All states of a kind in one vector: an error over all layers is a figure, over one layer of a toy it is a draw."""
    return torch.cat([s.flatten().double() for s in states(cache)[kind]])


class Float64(TorchFunctionMode):
    """Runs eager code in float64 where it asks for any floating dtype: the oracle for a model that casts to float32 inside."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        floats = (torch.float32, torch.float16, torch.bfloat16)
        swap = lambda a: torch.float64 if isinstance(a, torch.dtype) and a in floats else a  # noqa: E731
        args = tuple(map(swap, args))
        kwargs = {k: swap(v) for k, v in (kwargs or {}).items()}
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        return func(*args, **kwargs)


def in_float64(model):
    """A float64 copy of a model, and a callable that runs it wholly in float64."""
    wide = copy.deepcopy(model).double()
    # Grouped matmuls of experts exist for float32 and below only.
    text_config(wide)._experts_implementation = "eager"

    def call(*args, **kwargs):
        with Float64():
            return wide(*args, **kwargs)

    return wide, call


def relative(found, wanted):
    """‖found − wanted‖ / ‖wanted‖ in float64."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())


# What is left of a GDN layer's decode step, views apart: for one sequence its parts go into the linears around it, of
# which out_proj ends in the residual and so belongs to the decoder layer.
MANY_ROWS = ["linear", "mixer_decode", "linear"]
ONE_ROW = ["in_proj_conv", "packed_decode"]


def ops_without_views(layer):
    return [op for op in layer.ops_after if op not in ("narrow", "reshape")]


# Sizes of which fp8's blocks of 128 are filled, and sizes of which they are not.
FILLED = {
    **SMALL, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
RAGGED = {
    **SMALL, "hidden_size": 72, "intermediate_size": 136, "linear_key_head_dim": 32, "linear_value_head_dim": 16,
}  # fmt: skip


def dequantized(model, dtype=None):
    """A copy of a quantised model with plain linears and experts, of the weights that are stored."""
    from transformers.integrations import finegrained_fp8

    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, StoredLinear):
            new = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            new.bias = module.bias
            data, scale, *more = module.stored()
            made = formats.named(module.format).dequantize(data, scale, torch.float64, *more)
            new.weight = torch.nn.Parameter(made, requires_grad=False)
            plain.set_submodule(name, new.eval())
            continue
        if isinstance(module, finegrained_fp8.FP8Linear):
            new = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            new.bias = module.bias
            weights = ("weight",)
        elif isinstance(module, finegrained_fp8.FP8Experts):
            classes = vars(sys.modules[type(model).__module__])
            with torch.device("meta"):
                new = next(c for n, c in classes.items() if n.endswith("Experts"))(text_config(plain))
            weights = ("gate_up_proj", "down_proj")
        else:
            continue
        for weight in weights:
            made = by_loop(getattr(module, weight), getattr(module, f"{weight}_scale_inv"))
            setattr(new, weight, torch.nn.Parameter(made, requires_grad=False))
        plain.set_submodule(name, new.eval())
    return plain.to(dtype or next(p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize > 1))


def by_loop(data, scale, block=128):
    """A weight of fp8 with a scale per block, or one scale, block by block in float64."""
    if data.ndim > 2:
        return torch.stack([by_loop(*pair, block) for pair in zip(data, scale, strict=True)])
    weight = data.double()
    if scale.numel() == 1:
        return weight * scale.double()
    for i, row in enumerate(scale.double()):
        for j, factor in enumerate(row):
            weight[i * block : (i + 1) * block, j * block : (j + 1) * block] *= factor
    return weight
