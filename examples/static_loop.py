"""A decode loop of one's own: eager prefill into a StaticCache, then one compiled graph for every token, on CUDA a CUDA graph."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from small_model import default_device, small_model
from transformers import StaticCache

import gdnfuse


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> torch.Tensor:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    args = parser.parse_args(argv)
    device = default_device()
    model = small_model(device)
    prompt = torch.randint(0, model.config.vocab_size, (1, 16), device=device)

    # torch takes `mode` or options: with options, CUDA graphs are one of Inductor's.
    inductor = {"triton.cudagraphs": True} if device == "cuda" else {}
    options = {"inner": args.inner, "inductor": inductor, "strict": True}
    step = torch.compile(model, backend="gdnfuse", options=options, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + args.tokens)
    # The prefill runs eagerly: it creates the cached states, which a CUDA graph can only write when they exist before it.
    # The cache stands behind mask and positions; its keyword is cache=, before transformers 5.24 past_key_values=.
    token = model(prompt, None, None, cache).logits[:, -1:].argmax(-1)
    tokens = [token]
    for _ in range(args.tokens - 1):
        torch.compiler.cudagraph_mark_step_begin()
        token = step(token, None, None, cache).logits[:, -1:].argmax(-1)
        tokens.append(token)

    print(gdnfuse.reports()[-1].summary())
    print("tokens:", torch.cat(tokens, 1)[0].tolist())
    return torch.cat(tokens, 1)


if __name__ == "__main__":
    main()
