"""Speculative decoding: tokens that stood in the prompt before are checked several in a step."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from small_model import default_device, small_model

import gdnfuse


def main(argv: Sequence[str] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    args = parser.parse_args(argv)
    device = default_device()
    model = small_model(device)
    prompt = torch.randint(0, model.config.vocab_size, (1, 12), device=device).repeat(1, 3)
    asked = {"max_new_tokens": args.tokens, "do_sample": False, "cache_implementation": "static"}
    plain = model.generate(prompt, **asked)

    gdnfuse.compile(model, inner=args.inner, speculate=gdnfuse.PromptLookup(4))
    tokens = model.generate(prompt, **asked)

    print(model.generate.acceptance)
    print("the same tokens:", torch.equal(tokens, plain))
    return tokens, plain


if __name__ == "__main__":
    main()
