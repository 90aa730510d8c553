"""The command line.

`gdnfuse report MODEL_OR_CONFIG` says what would be fused, without weights and without a GPU; `gdnfuse verify` runs a prompt and a
decode step with random weights and compares the rewritten graphs with those that came.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

from tabulate import tabulate
from tqdm import tqdm

from gdnfuse.options import STAGES
from gdnfuse.report import Comparison, GdnfuseError, GraphReport, LayerReport

DTYPES = ("bfloat16", "float16", "float32")
WIDTH = 60  # columns for a sentence in a table


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 1 for an error of ours or a graph that does not verify."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except Exception as e:
        if args.debug:
            traceback.print_exc()
        expected = isinstance(e, GdnfuseError)
        sentence = " ".join(str(e).split())
        if not expected:
            sentence = f"internal error, {type(e).__name__}: {sentence[:200]} (--debug shows where)"
        print(f"gdnfuse: {sentence}", file=sys.stderr)
        return 2 if expected else 1


def _parser() -> _Parser:
    parser = _Parser(prog="gdnfuse", description="Fuses the Gated DeltaNet layers of Hugging Face models under torch.compile.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report = commands.add_parser("report", help="say what is fused in a model, and why not, without its weights")
    verify = commands.add_parser("verify", help="compare the rewritten graphs of a model, random weights, with those that came")
    for command in (report, verify):
        command.add_argument(
            "model", metavar="MODEL_OR_CONFIG", help="preset (4b), config.json, model folder or hub id (owner/name)"
        )
        command.add_argument("--batch", type=_positive, default=1, metavar="N", help="sequences (default 1)")
        command.add_argument("--prompt", type=_positive, default=70, metavar="N", help="tokens to prefill (default 70)")
        command.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
        command.add_argument("--json", action="store_true", help="print the records as JSON")
        command.add_argument("--debug", action="store_true", help="show tracebacks and the library's warnings")
    verify.add_argument("--device", help="where to run (default: cuda if there is a GPU, else cpu)")
    verify.set_defaults(run=_verify)
    report.add_argument("--phase", choices=("decode", "prefill"), default="decode")
    report.add_argument("--target", choices=("cuda", "cpu"), default="cuda", help="device to choose kernels for (default cuda)")
    report.add_argument("--stop-after", choices=STAGES, help="stop after this stage and print the graph")
    report.set_defaults(run=_report)
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number, found {text!r}")
    return number


def _report(args: argparse.Namespace) -> None:
    import torch

    from gdnfuse import huggingface

    if not args.debug:
        _quiet()
    bar = tqdm(total=3, desc="read config", disable=None, delay=1, leave=False, bar_format="{desc} ({n}/{total}, {elapsed})")
    with bar:
        config = huggingface.load_config(args.model)
        _advance(bar, "build model")
        model = huggingface.meta_model(config, getattr(torch, args.dtype))
        _advance(bar, "trace one step")
        options = {"target": args.target, "stop_after": args.stop_after}
        reports = huggingface.trace(model, phase=args.phase, batch=args.batch, prompt=args.prompt, **options)
    if args.json:
        print(json.dumps([r.to_dict() for r in reports], indent=1))
    else:
        print("\n\n".join(render(r) for r in reports))


def _verify(args: argparse.Namespace) -> int:
    import torch

    from gdnfuse import huggingface

    if not args.debug:
        _quiet()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except Exception as e:  # no such device, or not in this build of torch
        raise GdnfuseError(f"Cannot use the device {device!r}: {str(e).splitlines()[0]}") from e
    bar = tqdm(total=3, desc="read config", disable=None, delay=1, leave=False, bar_format="{desc} ({n}/{total}, {elapsed})")
    with bar:
        config = huggingface.load_config(args.model)
        _advance(bar, "build model")
        model = huggingface.random_model(config, getattr(torch, args.dtype), device)
        _advance(bar, "run a prompt and one step")
        reports = huggingface.verify(model, batch=args.batch, prompt=args.prompt)
    if args.json:
        print(json.dumps([r.to_dict() for r in reports], indent=1))
    else:
        print("\n\n".join(f"{r.summary()}\n\n{_table(_comparison_rows(r))}" if r.comparisons else r.summary() for r in reports))
    verified = [r.rewritten and bool(r.comparisons) for r in reports]
    return 0 if verified and all(verified) else 1


def _comparison_rows(report: GraphReport) -> list[dict[str, Any]]:
    """Outputs, and inputs that are written, by what is compared: the worst of each kind."""
    kinds: dict[str, list[Comparison]] = {}
    for c in report.comparisons:
        kinds.setdefault(re.sub(r"\d+", "*", c.name, count=1), []).append(c)
    rows = []
    for kind, members in kinds.items():
        worst = max(members, key=lambda c: (not c.passed, c.error))
        errors = {"error": f"{worst.error:.1e}", "as it came": f"{worst.eager_error:.1e}"}
        rows.append({"compared": kind, "count": len(members), **errors, "passed": "yes" if worst.passed else "no"})
    return rows


def _advance(bar: tqdm, step: str) -> None:
    bar.set_description(step, refresh=False)
    bar.update()


def _quiet() -> None:
    """transformers advises to install kernels that a report has no use for."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def render(report: GraphReport) -> str:
    """The report as text: the summary, a table of layers, a table of rules, and the graph if a stage was asked for."""
    parts = [report.summary()]
    if report.layers:
        parts.append(_table(_layer_rows(report.layers)))
    if rows := report.rows():
        parts.append(_table([{**row, "proof error": _number(row["proof error"])} for row in rows]))
    if rows := _launch_rows(report):
        parts.append(_table(rows))
    if report.stage_code:
        parts.append(report.stage_code.strip())
    return "\n\n".join(parts)


def _table(rows: list[dict[str, Any]]) -> str:
    used = [k for k in rows[0] if any(row[k] != "" for row in rows)]
    widths = [WIDTH if k in ("reason", "why not", "layer") else None for k in used]
    cells = [[row[k] for k in used] for row in rows]
    return tabulate(cells, headers=used, maxcolwidths=widths, disable_numparse=True)


def _layer_rows(layers: Sequence[LayerReport]) -> list[dict[str, Any]]:
    """One row per kind of layer: those that differ in nothing but a number in their path share a row."""
    groups: dict[tuple[Any, ...], list[LayerReport]] = {}
    for layer in layers:
        nodes = f"{layer.nodes_before} → {layer.nodes_after}"
        launches = f"{layer.launches_before} → {layer.launches_after}"
        key = (_template(layer.path), layer.fused, _kernels(layer), nodes, launches, layer.why_not)
        groups.setdefault(key, []).append(layer)
    rows = []
    for (template, fused, kernels, nodes, launches, why_not), members in groups.items():
        errors = [r.proof_error for layer in members for r in layer.records if r.proof_error is not None]
        rows.append(
            {
                "layer": _label(template, [layer.path for layer in members]),
                "count": len(members),
                "fused": "yes" if fused else "no",
                "kernels": kernels,
                "nodes": nodes,
                "launches": launches,
                "proof error": _number(max(errors, default=None)),
                "why not": why_not,
            }
        )
    return rows


def _launch_rows(report: GraphReport) -> list[dict[str, Any]]:
    """One row per kernel and way of sharing out its work."""
    counts = Counter((r.rule, line, r.measured) for r in report.all_records for line in r.launches)
    return [{"op": rule, "launch": line, "count": n, "compared by": by} for (rule, line, by), n in counts.items()]


def _kernels(layer: LayerReport) -> str:
    return ", ".join(dict.fromkeys(f"{r.rule}: {r.chosen}" for r in layer.records if r.chosen))


def _template(path: str) -> str:
    return re.sub(r"\d+", "*", path, count=1)


def _label(template: str, paths: Sequence[str]) -> str:
    if len(paths) == 1:
        return paths[0]
    numbers = [int(re.search(r"\d+", path)[0]) for path in paths]
    ranges: list[list[int]] = []
    for n in numbers:
        if ranges and n == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], n]
        else:
            ranges.append([n])
    words = ["–".join(map(str, r)) for r in ranges]
    if len(words) > 6:
        words = [*words[:3], "…", words[-1]]
    return f"{template} ({', '.join(words)})"


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"
