"""Decodes with a small random Qwen3.5: what is fused, whether the tokens are those of eager, and how long a token takes."""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from tabulate import tabulate
from transformers import Qwen3_5TextConfig, StaticCache
from transformers.utils.logging import set_verbosity_error

import gdnfuse
from gdnfuse.models import random_model
from gdnfuse.progress import progress
from gdnfuse.report.text import render

SIDES = ("eager", "Inductor", "gdnfuse")


def config(layers: int, hidden: int) -> Qwen3_5TextConfig:
    """A small Qwen3.5. Three of four layers are Gated DeltaNet. With fewer layers, all but one are."""
    heads = {"linear_num_key_heads": max(hidden // 64, 1), "linear_num_value_heads": max(hidden // 32, 2)}
    sizes = {"vocab_size": 1024, "hidden_size": hidden, "intermediate_size": 3 * hidden, "head_dim": max(hidden // 4, 16)}
    heads |= {"num_attention_heads": 4, "num_key_value_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
    return Qwen3_5TextConfig(**sizes, **heads, num_hidden_layers=layers, full_attention_interval=min(4, layers))


def decode(model: torch.nn.Module, step: Callable, prompt: torch.Tensor, tokens: int, room: int) -> tuple[list[int], list[float]]:
    """Greedy tokens after an eager prompt, and the seconds of each step. With an equally long cache the graph is the same."""
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + room)
    token = model(prompt, None, None, cache).logits[:, -1:].argmax(-1)
    chosen, seconds = [token.item()], []
    for _ in range(tokens - 1):
        start = time.perf_counter()
        token = step(token, None, None, cache).logits[:, -1:].argmax(-1)
        chosen.append(token.item())  # waits for the device
        seconds.append(time.perf_counter() - start)
    return chosen, seconds


def compiled(side: str, model: torch.nn.Module, device: str, inner: str) -> Callable:
    if side == "eager":
        return model
    mode = "reduce-overhead" if device == "cuda" and inner == "inductor" else None
    if side == "Inductor":
        return torch.compile(model, backend=inner, mode=mode)
    options = None if inner == "inductor" else {"inner": inner}
    return torch.compile(model, backend="gdnfuse", mode=mode, options=options)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    args = parser.parse_args(argv)
    set_verbosity_error()
    for name in ("torchao", "torch.utils._pytree"):  # what importing torchao prints, as transformers does if it is installed
        logging.getLogger(name).setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_model(config(args.layers, args.hidden), torch.float32, device)
    prompt = torch.randint(0, model.config.vocab_size, (1, 32), device=device)

    tokens, rows = {}, []
    with progress() as announce:
        for side in SIDES:
            announce(f"{side}, first call")
            torch.compiler.reset()  # otherwise the sides share Dynamo's cache, and its limit
            gdnfuse.clear_reports()
            step = compiled(side, model, device, args.inner)
            start = time.perf_counter()
            decode(model, step, prompt, 4, args.tokens)
            first = time.perf_counter() - start
            announce(f"{side}, {args.tokens} tokens")
            tokens[side], seconds = decode(model, step, prompt, args.tokens, args.tokens)
            same = "yes" if tokens[side] == tokens["eager"] else "NO"
            rows.append([side, f"{1e3 * statistics.median(seconds):.2f}", f"{first:.1f}", same])

    for report in gdnfuse.reports():
        print(render(report), end="\n\n")
    print(f"{args.layers} layers, hidden {args.hidden}, float32, {args.tokens} greedy tokens, {device}")
    print(tabulate(rows, ["side", "ms per token (median)", "first call (s)", "tokens as eager"], disable_numparse=True))
    problems = [f"the tokens of {side} differ from eager's" for side in SIDES if tokens[side] != tokens["eager"]]
    if not gdnfuse.reports() or any(r.fused_layers < len(r.layers) or not r.layers for r in gdnfuse.reports()):
        problems.append("not every GDN layer was fused")
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
