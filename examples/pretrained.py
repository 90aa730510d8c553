"""Load a model and its tokenizer, or a small Qwen3.5 with random weights if they are neither on the hub nor in a folder."""

from __future__ import annotations

import argparse

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

SIZES = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "head_dim": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4}


def load(name: str):
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    except OSError:
        print(f"{name} cannot be loaded. Using a small model with random weights instead.")
        torch.manual_seed(0)
        config = Qwen3_5TextConfig(**SIZES, **HEADS, linear_key_head_dim=64, linear_value_head_dim=64, pad_token_id=0)
        model = Qwen3_5ForCausalLM(config)
        letters = {"<pad>": 0} | {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
        letters = Tokenizer(models.BPE(letters, merges=[]))
        letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", padding_side="left")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def arguments(about: str, argv=None, *, tokens: int = 32) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", default="Qwen/Qwen3.5-0.8B", help="hub id or folder")
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    return parser.parse_args(argv)
