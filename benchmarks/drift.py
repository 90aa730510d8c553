"""How far a recurrent state in half precision drifts: errors of logits and states over many decode steps.

    python benchmarks/drift.py --models 0.8b --steps 512 --json drift.json
    python benchmarks/drift.py --models tiny --dtype float32 --steps 64       (any machine)

Weights are random, in the published shapes. Every side decodes the same tokens after the same eager prompt: eager with the
float32 states of transformers, and gdnfuse with states in float32, bfloat16 and float16 after the prompt. Errors are relative to
eager with the same weights in float32: of the logits of WINDOW steps up to a point, and of all recurrent states there.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from decode import DTYPES, build
from tabulate import tabulate
from tqdm import tqdm

import gdnfuse
from gdnfuse.bench.measure import Decoder, machine
from gdnfuse.progress import hidden

SIDES = ("eager", "float32", "bfloat16", "float16")
POINTS = (8, 32, 128, 512, 2048)
WINDOW = 8
PROMPT = 32

Trace = dict[int, tuple[torch.Tensor, torch.Tensor]]  # by point: logits of the window, states


def states(cache: Any) -> torch.Tensor:
    held = [layer.recurrent_states[0] for layer in cache.layers if hasattr(layer, "recurrent_states")]
    return torch.cat([s.float().flatten() for s in held])


def run(model: torch.nn.Module, step: Callable[..., Any], tokens: torch.Tensor, points: Sequence[int], state: str) -> Trace:
    decode = Decoder(model, step, tokens[:PROMPT].squeeze(-1).T.contiguous(), len(tokens) - PROMPT)
    if state != "float32":
        gdnfuse.set_state_dtype(decode.cache, getattr(torch, state))
    trace, window = {}, []
    for i, token in enumerate(tokens[PROMPT:], 1):
        window = [*window, decode(token).float().clone()][-WINDOW:]
        if i in points:
            trace[i] = torch.stack(window), states(decode.cache)
    return trace


def compiled(model: torch.nn.Module, args: argparse.Namespace) -> Callable[..., Any]:
    inductor = torch._inductor.list_mode_options("reduce-overhead") if args.device == "cuda" else {}
    options = {"inner": args.inner} | ({"inductor": inductor} if args.inner == "inductor" else {})
    return torch.compile(model, backend="gdnfuse", fullgraph=True, options=options)


def errors(found: Trace, exact: Trace) -> dict[str, dict[str, float]]:
    relative = lambda a, b: float((a.double() - b.double()).norm() / b.double().norm())  # noqa: E731
    return {str(i): {"logits": relative(found[i][0], exact[i][0]), "states": relative(found[i][1], exact[i][1])} for i in exact}


def run_model(name: str, args: argparse.Namespace) -> dict[str, Any]:
    model = build(name, getattr(torch, args.dtype), args.device)
    points = [p for p in POINTS if p <= args.steps]
    shape = (PROMPT + args.steps, args.batch, 1)
    tokens = torch.randint(0, model.config.vocab_size, shape, device=args.device)
    wide = copy.deepcopy(model).float()
    exact = run(wide, wide, tokens, points, "float32")
    del wide
    rows = []
    for side in tqdm(SIDES, desc=name, disable=hidden(), leave=False, delay=1):
        torch.compiler.reset()
        step = model if side == "eager" else compiled(model, args)
        found = run(model, step, tokens, points, "float32" if side == "eager" else side)
        rows.append({"side": side, "errors": errors(found, exact)})
    return {"model": name, "batch": args.batch, "points": points, "sides": rows}


def table(result: dict[str, Any]) -> str:
    rows = [[row["side"], *(f"{e['logits']:.1e} / {e['states']:.1e}" for e in row["errors"].values())] for row in result["sides"]]
    headers = ["side or state", *(f"step {p}" for p in result["points"])]
    return f"{result['model']}, errors of logits / states\n{tabulate(rows, headers, disable_numparse=True)}"


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="0.8b", help="presets, config files or `tiny`, by comma")
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"), help="what compiles the rest of the graph")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    if args.steps < POINTS[0]:
        parser.error(f"--steps must be at least {POINTS[0]}, got {args.steps}")
    torch.manual_seed(0)
    command = shlex.join(["python", "benchmarks/drift.py", *argv])
    data: dict[str, Any] = {"command": command, "machine": machine(), "arguments": vars(args), "results": []}
    for name in args.models.split(","):
        data["results"].append(run_model(name, args))
        print(table(data["results"][-1]), end="\n\n", flush=True)
        if args.json:
            with open(args.json, "w") as f:
                json.dump(data, f, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
