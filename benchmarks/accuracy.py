"""How accurate quantised models are: errors of a prompt's logits, by format, for gdnfuse and for other ways to compute them.

    python benchmarks/accuracy.py --json accuracy.json

Weights are random, in the published shapes of a few layers. All sides have the weights that the format stores. Errors are
relative to the same model in float64, with norms and rules in float32 as in transformers. The sides are gdnfuse, which quantises
no activations; eager with dequantised weights; gdnfuse with activations="fp8" (gdnfuse_fp8); and eager with linears that also
round their inputs to eight bits, as transformers' FP8 and W8A8 do: in e4m3 by 128 columns or by token, or in int8 by token. The
last side is made of torch's operations with exact products. Kernels for it need a GPU, and cannot be more accurate.
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
import torch.nn.functional as F
from tabulate import tabulate

from gdnfuse import formats
from gdnfuse.bench.measure import machine
from gdnfuse.models import load_config, quantized, random_model
from gdnfuse.passes.activations import COLUMNS

SIDES = ("gdnfuse", "dequantised", "gdnfuse_fp8", "w8a8")
FORMATS = ("fp8_block128", "fp8_tensor", "fp8_channel", "int8_channel", "int4_group128", "int4_group128_zero")


class Rounded(torch.nn.Module):
    """A linear that rounds its input to the data type of its format, with one scale per group of columns or per token."""

    def __init__(self, linear: torch.nn.Linear, format: str):
        super().__init__()
        self.linear, self.fp8, self.group = linear, format.startswith("fp8"), 128 if "block" in format else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.float().unflatten(-1, (-1, self.group or x.shape[-1]))
        largest = torch.finfo(torch.float8_e4m3fn).max if self.fp8 else 127.0
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
        steps = (groups / scale).clamp(-largest, largest)
        rounded = steps.to(torch.float8_e4m3fn).float() if self.fp8 else steps.round()
        return F.linear((rounded * scale).flatten(-2), self.linear.weight.float(), self.linear.bias).to(x.dtype)


def _own_code(model: torch.nn.Module) -> Callable[..., Any]:
    """The model as a function of its own, so that another compilation of it does not count as the same."""

    def call(**kwargs: Any) -> Any:
        return model(**kwargs)

    return call


def errors(name: str, format: str, args: argparse.Namespace) -> dict[str, float]:
    """The error of each side."""
    config = load_config(name).get_text_config(decoder=True)
    config.num_hidden_layers, config.layer_types = args.layers, config.layer_types[: args.layers]
    torch.manual_seed(0)
    plain = random_model(config, torch.bfloat16)
    model = quantized(copy.deepcopy(plain), format)
    wide = copy.deepcopy(plain).double()
    of, names = formats.named(format), []
    for path, linear in list(plain.named_modules()):
        if type(linear) is torch.nn.Linear and type(model.get_submodule(path)) is not torch.nn.Linear:
            names.append(path)
            data, scale, *more = of.quantize(linear.weight)
            wide.get_submodule(path).weight.data = of.dequantize(data, scale, torch.float64, *more)
            linear.weight.data = of.dequantize(data, scale, torch.float32, *more).bfloat16()
    tokens = torch.randint(0, config.vocab_size, (1, args.tokens))
    torch.compiler.reset()
    options = {"inner": "eager", "strict": True}
    calls = {
        "gdnfuse": torch.compile(model, backend="gdnfuse", fullgraph=True, options=options),
        "dequantised": plain,
    }
    if format in COLUMNS:
        own = torch.compile(_own_code(model), backend="gdnfuse", fullgraph=True, options=options | {"activations": "fp8"})
        calls["gdnfuse_fp8"] = own
    if of.bits == 8:
        calls["w8a8"] = copy.deepcopy(plain)
        for path in names:
            calls["w8a8"].set_submodule(path, Rounded(calls["w8a8"].get_submodule(path), format))
    exact = wide(input_ids=tokens, use_cache=False).logits
    found = {side: call(input_ids=tokens, use_cache=False).logits.double() for side, call in calls.items()}
    return {side: float((logits - exact).norm() / exact.norm()) for side, logits in found.items()}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="0.8b", help="a preset or a config file")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--formats", default=",".join(FORMATS), help="by comma")
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "benchmarks/accuracy.py", *argv])
    data: dict[str, Any] = {"command": command, "machine": machine(), "arguments": vars(args), "results": []}
    for format in args.formats.split(","):
        data["results"].append({"format": format, "errors": errors(args.model, format, args)})
        if args.json:
            with open(args.json, "w") as f:
                json.dump(data, f, indent=1)
    rows = [
        [r["format"], *(f"{r['errors'][side]:.1e}" if side in r["errors"] else "" for side in SIDES)] for r in data["results"]
    ]
    print(tabulate(rows, ["format", *SIDES], disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
