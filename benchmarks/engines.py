"""How long a decode step and a first token take in vLLM, for comparison. Needs vLLM, which gdnfuse does not install.

    pip install vllm && python benchmarks/engines.py --models 4b --json vllm.json
    python benchmarks/engines.py --models 0.8b,4b --batches 1,32 --lengths "" --engine-args '{"attention_backend": "FLASH_ATTN"}'

Weights are random, in the published shapes, by vLLM's `load_format="dummy"` on the config alone, so nothing is downloaded. Times
are wall time of `LLM.generate`, which is what a user waits for, with scheduler and sampling. The time of a step is the difference
between two answers of different length, divided by the difference of their lengths. A first token is an answer of one token to a
prompt of new random ids. Prefix caching is off, so no prompt is known. Each figure is a median over --repeats runs after a
warm-up.

The JSON has versions, the arguments of the engine, and the meaning of each figure. `benchmarks/figures.py` makes tables from it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from gdnfuse.bench.measure import machine
from gdnfuse.errors import GdnfuseError
from gdnfuse.models import load_config

PROMPT = 128  # tokens before the timed steps
SHORT, LONG = 64, 320  # tokens of the two answers
WHAT = {
    "decode": f"(time of {LONG} tokens - time of {SHORT}) / {LONG - SHORT}, prompt of {PROMPT} tokens, end of text ignored",
    "prompt": "time of an answer of one token to fresh random ids",
}


def engine(model: str, folder: str, longest: int, batch: int, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """vLLM with random weights of a model, and the arguments that it was made with."""
    from vllm import LLM

    config = load_config(model)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.save_pretrained(folder)
    arguments = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": longest,
        "max_num_batched_tokens": max(longest, 8192),  # so that a prompt is one piece
        "max_num_seqs": batch,
        "enable_prefix_caching": False,
        "seed": 0,
    } | given
    return LLM(model=folder, **arguments), arguments | {"vocabulary": config.vocab_size}


def seconds(llm: Any, vocabulary: int, batch: int, tokens: int, new: int) -> float:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": random.choices(range(vocabulary), k=tokens)} for _ in range(batch)]
    sampling = SamplingParams(temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    answers = llm.generate(prompts, sampling, use_tqdm=False)
    took = time.perf_counter() - start
    found = [len(answer.outputs[0].token_ids) for answer in answers]
    if found != [new] * batch:
        raise GdnfuseError(
            f"{batch} answers of {new} tokens are required for a time, found {found}. Check the engine's arguments."
        )
    return took


def median(repeats: int, *how: Any) -> float:
    seconds(*how)
    return statistics.median(seconds(*how) for _ in range(repeats))


def run(model: str, batches: Sequence[int], lengths: Sequence[int], repeats: int, given: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"model": model, "decode": [], "prompt": []}
    with tempfile.TemporaryDirectory() as folder:
        gc.collect()  # an engine keeps its share of the GPU until it is collected
        longest = max([PROMPT + LONG, *(length + 1 for length in lengths)])
        llm, result["engine_arguments"] = engine(model, folder, longest, max([1, *batches]), given)
        vocabulary = result["engine_arguments"].pop("vocabulary")
        for batch in batches:
            short, long = (median(repeats, llm, vocabulary, batch, PROMPT, new) for new in (SHORT, LONG))
            result["decode"].append({"batch": batch, "ms": 1e3 * (long - short) / (LONG - SHORT)})
        for length in lengths:
            result["prompt"].append({"tokens": length, "ms": 1e3 * median(repeats, llm, vocabulary, 1, length, 1)})
    return result


def table(results: Sequence[dict[str, Any]]) -> str:
    rows = [[r["model"], f"a step at batch {d['batch']}", f"{d['ms']:.2f}"] for r in results for d in r["decode"]]
    rows += [[r["model"], f"a first token of {p['tokens']}", f"{p['ms']:.1f}"] for r in results for p in r["prompt"]]
    return tabulate(rows, ["model", "what", "ms"], disable_numparse=True)


def counts(text: str) -> list[int]:
    values = [int(part) for part in text.split(",") if part]
    if any(value < 1 for value in values):
        raise ValueError
    return values


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="4b", help="presets, config files, folders or hub ids, by comma")
    parser.add_argument("--batches", type=counts, default=[1, 32], help="sequences of the steps, by comma; may be empty")
    parser.add_argument(
        "--lengths", type=counts, default=[512, 4096, 16384], help="tokens of the prompts, by comma; may be empty"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, metavar="JSON", help="more arguments of vllm.LLM, or others"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine, versions and settings here")
    args = parser.parse_args(argv)
    if args.repeats < 1 or not (args.batches or args.lengths) or not isinstance(args.engine_args, dict):
        parser.error(
            "--repeats must be 1 or more, --batches or --lengths must have a number, and --engine-args must be a JSON object"
        )
    try:
        import vllm  # noqa: F401
    except ImportError:
        print("engines.py needs vLLM, which is not installed here. Install it: pip install vllm", file=sys.stderr)
        return 1
    data: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/engines.py", *argv]),
        "engine": "vllm",
        "machine": machine() | {"vllm": importlib.metadata.version("vllm")},
        "arguments": vars(args),
        "settings": WHAT,
        "results": [],
    }
    for model in args.models.split(","):
        try:
            data["results"].append(run(model, args.batches, args.lengths, args.repeats, args.engine_args))
        except GdnfuseError as e:
            print(e, file=sys.stderr)
            return 1
        if args.json:
            Path(args.json).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(table(data["results"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
