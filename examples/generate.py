"""The one-liner for `generate()`: the model is compiled in place, everything else stays as it was."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from small_model import default_device, small_model

import gdnfuse


def main(argv: Sequence[str] | None = None) -> torch.Tensor:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    args = parser.parse_args(argv)
    device = default_device()
    model = gdnfuse.compile(small_model(device), inner=args.inner)
    prompt = torch.randint(0, model.config.vocab_size, (1, 16), device=device)

    tokens = model.generate(prompt, max_new_tokens=args.tokens, do_sample=False, cache_implementation="static")

    print(gdnfuse.reports()[-1].summary())
    print("tokens:", tokens[0, prompt.shape[1] :].tolist())
    return tokens


if __name__ == "__main__":
    main()
