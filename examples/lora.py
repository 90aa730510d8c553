"""Low-rank adapters under a compiled model: active, switched off, merged into the weight and taken out again.

What peft does to a model, in a few lines. Merging writes the weight in place, and the packed weight that the kernels read is
the same memory, so nothing is packed again. On and off are two graphs, each compiled once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from small_model import default_device, small_model

import gdnfuse


class LoRA(torch.nn.Module):
    """base(x) + B·A·x while it is on; merged, the base alone."""

    def __init__(self, base: torch.nn.Linear, rank: int = 8):
        super().__init__()
        self.base, self.on = base, True
        self.A = torch.nn.Parameter(torch.randn(rank, base.in_features, device=base.weight.device) / base.in_features**0.5)
        self.B = torch.nn.Parameter(torch.randn(base.out_features, rank, device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T if self.on else self.base(x)

    def merge(self, sign: int = 1) -> None:
        self.base.weight.data += sign * self.B @ self.A
        self.on = sign < 0


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    args = parser.parse_args(argv)
    model = small_model(default_device())
    adapters = []
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.out_proj = LoRA(layer.linear_attn.out_proj)
            adapters.append(layer.linear_attn.out_proj)
    gdnfuse.compile(model, inner=args.inner)
    prompt = torch.randint(0, model.config.vocab_size, (1, 16), device=model.device)
    tokens = {}

    def generate(name: str) -> None:
        tokens[name] = model.generate(prompt, max_new_tokens=args.tokens, do_sample=False)[0, prompt.shape[1] :]
        print(f"{name:>10}: {tokens[name].tolist()}")

    generate("active")
    for adapter in adapters:
        adapter.on = False
    generate("off")
    for adapter in adapters:
        adapter.merge()
    generate("merged")
    for adapter in adapters:
        adapter.merge(-1)
    generate("unmerged")
    print(gdnfuse.reports()[-1].summary())
    return tokens


if __name__ == "__main__":
    main()
