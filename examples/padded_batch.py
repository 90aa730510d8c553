"""Prompts of different lengths in one batch, padded on the left, and the same prompts one by one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from small_model import default_device, small_model

import gdnfuse

LENGTHS = (5, 12, 16)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    args = parser.parse_args(argv)
    model = gdnfuse.compile(small_model(default_device()), inner=args.inner)
    prompts = [torch.randint(1, model.config.vocab_size, (n,), device=model.device) for n in LENGTHS]

    # A tokenizer with padding_side="left" makes these two.
    width = max(LENGTHS)
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([(torch.arange(width, device=model.device) >= width - len(p)).long() for p in prompts])
    options = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False, "cache_implementation": "static"}
    together = model.generate(ids, attention_mask=mask, **options)[:, width:]
    alone = [model.generate(p[None], **options)[0, len(p) :] for p in prompts]

    for n, row, single in zip(LENGTHS, together, alone, strict=True):
        print(f"{n:3} tokens: {row.tolist()}{'' if torch.equal(row, single) else ', alone ' + str(single.tolist())}")
    for report in gdnfuse.reports():
        print(report.summary())
    return together, alone


if __name__ == "__main__":
    main()
