"""A document that is asked three questions: it is computed once, and each prompt takes what is known of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from small_model import default_device, small_model

import gdnfuse


def main(argv: Sequence[str] | None = None) -> list[int]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--document", type=int, default=1500, help="tokens")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    args = parser.parse_args(argv)
    device = default_device()
    model = small_model(device)
    store = gdnfuse.PrefixStore(model, every=512, max_bytes=1 << 30)
    gdnfuse.compile(model, prefixes=store, inner=args.inner)

    tokens = lambda n: torch.randint(2, model.config.vocab_size, (1, n), device=device)  # noqa: E731
    document, taken = tokens(args.document), []
    for question in (tokens(20), tokens(30), tokens(40)):
        before = store.stats().tokens_taken
        prompt = torch.cat([document, question], 1)
        model.generate(prompt, max_new_tokens=4, do_sample=False)
        taken.append(store.stats().tokens_taken - before)
        print(f"{taken[-1]} of the prompt's {prompt.shape[1]} tokens were known")
    return taken


if __name__ == "__main__":
    main()
