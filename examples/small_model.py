"""A small Qwen3.5 with random weights, so that the examples run anywhere and without a download."""

from __future__ import annotations

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig


def small_model(device: str = "cpu", *, layers: int = 4, hidden: int = 128, seed: int = 0) -> Qwen3_5ForCausalLM:
    """Qwen3.5 of `layers` layers, three in four of them Gated DeltaNet, in float32."""
    torch.manual_seed(seed)
    config = Qwen3_5TextConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=max(hidden // 4, 16),
        linear_num_key_heads=max(hidden // 64, 1),
        linear_num_value_heads=max(hidden // 32, 2),
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        max_position_embeddings=4096,
    )
    model = Qwen3_5ForCausalLM(config).to(device).eval().requires_grad_(False)
    model.generation_config.pad_token_id = 0
    return model


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
