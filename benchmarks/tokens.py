"""What a token of `generate` takes: a step, and what transformers' loop does around it.

    python benchmarks/tokens.py --models 4b --json tokens.json
    python benchmarks/tokens.py --models 4b --batch 32 --sample
    python benchmarks/tokens.py --models tiny --dtype float32 --device cpu --new 8,24     (any machine)

Weights are random, of the published shapes, with a static cache, after `gdnfuse.compile(model)`. As in benchmarks/engines.py the
time of a token is the difference between two answers of different length, divided by the difference of their lengths; each is
wall time of `generate`, a median over --repeats after a warm-up. Prompts are fresh random ids, and the end of text is asked for
at each step, but is an id that a row hardly ever draws: an answer that ends early is an error.

Two sides share the compiled model. `late` is what `generate` of a compiled model does on a GPU: it asks one step late whether to
stop (gdnfuse/generation/stopping.py). `waited` asks at every step, as stock transformers does. Their tokens must be equal.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import together
import torch
import transformers
from decode import DTYPES, build
from tabulate import tabulate

import gdnfuse
from gdnfuse.bench.measure import machine, seconds
from gdnfuse.errors import GdnfuseError
from gdnfuse.generation import stopping
from gdnfuse.models import QUANTIZED

SIDES = ("late", "waited")
PROMPT = 128


def answer(model: torch.nn.Module, side: str, prompt: torch.Tensor, new: int, sample: bool) -> torch.Tensor:
    """The tokens of one `generate`, exactly `new` of them.

    Raises:
        GdnfuseError: there were fewer.
    """
    asked = {"max_new_tokens": new, "do_sample": sample, "cache_implementation": "static", "pad_token_id": 0}
    end = model.config.vocab_size - 1
    with mock.patch.object(stopping, "DEVICES", stopping.DEVICES if side == "late" else ()):
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), eos_token_id=end, **asked)
    if (found := tokens.shape[1] - prompt.shape[1]) != new:
        raise GdnfuseError(f"Answers of {new} tokens are required for a time, found {found}. Run it again.")
    return tokens


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row of a model."""
    model = gdnfuse.compile(build(name, getattr(torch, args.dtype), args.device, args.quantize))
    short, long = args.new
    generator = torch.Generator(args.device).manual_seed(1)
    draw = lambda: torch.randint(  # noqa: E731
        0, model.config.vocab_size, (args.batch, PROMPT), device=args.device, generator=generator
    )
    prompt = draw()
    first = seconds(lambda: answer(model, "waited", prompt, long, args.sample), args.device)
    cold = {"first_call_seconds": first} if together.quiet() else {}
    found = []
    for side in SIDES:
        torch.manual_seed(0)
        found.append(answer(model, side, prompt, short, args.sample))
    if not torch.equal(*found):
        raise GdnfuseError("Both sides must give the same tokens, found others: no speed of what is wrong.")

    def took(side: str, new: int) -> float:
        prompts = [draw() for _ in range(args.repeats)]
        return statistics.median(seconds(partial(answer, model, side, p, new, args.sample), args.device) for p in prompts)

    together.turn()
    rows = [{"side": side, "ms": 1e3 * (took(side, long) - took(side, short)) / (long - short)} for side in SIDES]
    return {"model": name, "batch": args.batch, "sample": args.sample, **cold, "sides": rows}


def table(results: Sequence[dict[str, Any]]) -> str:
    rows = [[r["model"], r["batch"], *(f"{row['ms']:.3f}" for row in r["sides"])] for r in results]
    return tabulate(rows, ["model", "sequences", *(f"{side}, ms a token" for side in SIDES)], disable_numparse=True)


def lengths(text: str) -> list[int]:
    short, long = map(int, text.split(","))
    if not 1 < short < long:
        raise ValueError(text)
    return [short, long]


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="4b", help="presets, config files or `tiny`, by comma")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--quantize", choices=[*QUANTIZED], help="turn linears into those of a checkpoint of this format")
    parser.add_argument("--sample", action="store_true", help="draw tokens in place of the likeliest")
    parser.add_argument("--new", type=lengths, default=[64, 320], metavar="SHORT,LONG", help="tokens of the two answers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    if min(args.batch, args.repeats) < 1:
        parser.error("--batch and --repeats must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    transformers.utils.logging.set_verbosity_error()
    results = [run(name, args) for name in args.models.split(",")]
    print(table(results))
    if args.json:
        data = {"machine": machine(args.device), "command": shlex.join(["benchmarks/tokens.py", *argv]), "results": results}
        Path(args.json).write_text(json.dumps(data, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
