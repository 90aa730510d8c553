"""The command line.

- `gdnfuse report MODEL_OR_CONFIG` says what would be fused. It needs no weights and no GPU.
- `gdnfuse verify` runs a prompt and a decode step with random weights, and compares the rewritten graphs with the original ones.
- `gdnfuse bench` times steps and prompts of eager, Inductor and gdnfuse.
- `gdnfuse warmup` compiles into a file for other processes.
- `gdnfuse tune` measures the choices of kernels on this card once, and keeps the faster ones.
- `gdnfuse rules` lists what is matched.
- `gdnfuse doctor` says what this machine has, and what to do next.

An error is one line on stderr and an exit code that is not 0. With `--debug`, before or after the command, there is a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tabulate import tabulate

from gdnfuse import doctor, versions
from gdnfuse.errors import GdnfuseError, Refused, one_line
from gdnfuse.files import check_writable, replacing
from gdnfuse.options import INNER, STAGES
from gdnfuse.progress import listening, progress
from gdnfuse.report.page import page
from gdnfuse.report.records import BANDWIDTH, Comparison, GraphReport, document
from gdnfuse.report.text import Style, render, table

DTYPES = ("bfloat16", "float16", "float32")
FORMATS = ("fp8", "fp8-tensor", "int8", "int4", "nf4")  # keys of gdnfuse.models.QUANTIZED, which parsing need not import
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile
VERIFICATION = "gdnfuse.verification/1"  # the schema of what verify prints as JSON


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code. 0: success. 2: bad input. 1: an error in gdnfuse, too little memory, a graph that was not verified, or a
        side without a speed. 130: interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt) as e:
        if args.debug:
            traceback.print_exc()
        code, sentence = _sentence(e)
        if not isinstance(e, BrokenPipeError):  # the reader has closed the pipe, as `head` does
            print(f"gdnfuse: {sentence}", file=sys.stderr)
        _give_up_output()
        return code


def _give_up_output() -> None:
    """Drop what could not be written. Otherwise Python would try again at its end, and print a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _sentence(e: BaseException) -> tuple[int, str]:
    """The exit code and the line for an error."""
    text = " ".join(str(e).split())
    if isinstance(e, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(e, GdnfuseError):
        return 2, text
    if isinstance(e, OSError) and e.errno is not None:
        return 2, f"Cannot {f'read or write {e.filename}' if e.filename else 'write the output'}: {e.strerror}."
    if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError":
        return 1, f"Out of memory. {text[:200]}".strip()
    return 1, f"internal error, {one_line(e)} (--debug shows where)"


def _parser() -> _Parser:
    parser = _Parser(prog="gdnfuse", description="Fuses the Gated DeltaNet layers of Hugging Face models under torch.compile.")
    parser.add_argument("--debug", action="store_true", help="show tracebacks, and warnings of torch and transformers")
    packages = " ".join(f"{package} {versions.version(package)}" for package in ("gdnfuse", "torch", "transformers", "triton"))
    parser.add_argument(
        "--version", action="version", version=packages, help="show the versions of gdnfuse, torch, transformers and triton"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report = commands.add_parser("report", help="say what would be fused in a model and why the rest would not; needs no weights")
    verify = commands.add_parser(
        "verify", help="run a model with random weights and compare its rewritten graphs with the original ones"
    )
    bench = commands.add_parser("bench", help="time decode steps and prompts: eager, Inductor and gdnfuse")
    warmup = commands.add_parser(
        "warmup", help="compile what generate needs, with random weights, into a file for other processes"
    )
    tune = commands.add_parser("tune", help="measure the choices of kernels on this card once, and keep those that are faster")
    for command in (report, verify, bench, warmup, tune):
        command.add_argument(
            "model", metavar="MODEL_OR_CONFIG", help="preset (4b), config.json, model folder or hub id (owner/name)"
        )
        command.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights (default bfloat16)")
        command.add_argument("--quantize", choices=FORMATS, help="quantise the linears of the model to this format first")
    for command in (report, verify, warmup):
        command.add_argument("--batch", type=_positive, default=1, metavar="N", help="sequences (default 1)")
    for command in (report, verify):
        command.add_argument("--prompt", type=_positive, default=70, metavar="N", help="tokens of the prompt (default 70)")
    for command in (verify, bench, warmup):
        command.add_argument("--device", help="where to run (default: cuda if there is a GPU, else cpu)")
    verify.set_defaults(run=_verify)
    warmup.add_argument(
        "--save", type=Path, metavar="FILE", required=True, help="file to write; gdnfuse.compile(model, artifacts=FILE) reads it"
    )
    warmup.add_argument("--mode", choices=MODES, help="mode that gdnfuse.compile will be given")
    warmup.add_argument("--short", action="store_true", help="also compile calls of 2 to 8 tokens on a filled cache")
    warmup.set_defaults(run=_warmup)
    for command in (bench, tune):
        command.add_argument(
            "--batch", type=_numbers, default=[1], metavar="N,…", help="numbers of sequences, each measured by itself (default 1)"
        )
    tune.add_argument("--save", type=Path, metavar="FILE", help="file to write (default: the one that kernels read)")
    tune.set_defaults(run=_tune)
    bench.add_argument("--prompt", type=_positive, default=512, metavar="N", help="tokens of the prompt (default 512)")
    bench.add_argument("--new", type=_positive, default=128, metavar="N", help="decode steps to time (default 128)")
    bench.add_argument(
        "--sides",
        type=_words,
        metavar="SIDE,…",
        help="what to measure: eager, fla, inductor, gdnfuse (default: all that are installed)",
    )
    bench.add_argument("--phase", choices=("decode", "prefill"), help="measure only this phase")
    bench.add_argument(
        "--prefix",
        type=_positive,
        metavar="N",
        help="instead, time the first token of a prompt of which N tokens are in a prefix store",
    )
    bench.add_argument(
        "--speculate", type=_words, metavar="KIND,…", help="instead, time speculative decoding: lookup:N, mtp:N, draft:N:MODEL"
    )
    bench.add_argument(
        "--tensor-parallel",
        type=_positive,
        metavar="N",
        help="also measure on N GPUs, with sides such as gdnfuse:heads and inductor:as_loaded; starts torchrun",
    )
    bench.add_argument("--layers", type=_positive, metavar="N", help="only the first layers of the model")
    bench.add_argument("--inner", choices=INNER, default=INNER[0], help="what compiles the rewritten graphs")
    bench.add_argument(
        "--timeout", type=_positive, metavar="SECONDS", help="stop a side that takes longer; it then gets no speed"
    )
    bench.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times into this file")
    bench.set_defaults(run=_bench)
    report.add_argument("--phase", choices=("decode", "prefill"), default="decode", help="a step or a prompt (default decode)")
    report.add_argument("--target", choices=("cuda", "cpu"), default="cuda", help="device to choose kernels for (default cuda)")
    report.add_argument("--stop-after", choices=STAGES, help="stop after this stage and print the graph")
    report.add_argument("--html", metavar="FILE", type=Path, help="also write the report as a web page, in one file")
    report.add_argument(
        "--bandwidth", type=_rate, default=BANDWIDTH, metavar="TB/S", help="memory bandwidth for the limit (default 4.3, an H200)"
    )
    report.add_argument(
        "--tensor-parallel", type=_positive, metavar="N", help="report what one of N GPUs runs, with layers split by heads"
    )
    report.set_defaults(run=_report)
    rules = commands.add_parser("rules", help="list every rule with its equation")
    rules.set_defaults(run=_rules)
    checked = commands.add_parser("doctor", help="say what this machine has, what gdnfuse uses of it, and what to do next")
    checked.set_defaults(run=_doctor)
    for command in (report, verify, bench, warmup, tune, rules, checked):
        command.add_argument("--json", action="store_true", help="print the data as JSON")
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number, found {text!r}")
    return number


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _words(text: str) -> list[str]:
    return text.split(",")


def _rate(text: str) -> float:
    """A rate in TB/s as bytes per second."""
    try:
        rate = float(text) * 1e12
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of TB/s, found {text!r}")
    return rate


def _report(args: argparse.Namespace) -> None:
    if args.html:
        check_writable(args.html)

    from gdnfuse import models

    if not args.debug:
        _quiet()
    with progress() as announce, listening(announce):
        model = _meta_model(args, announce)
        options = {"target": args.target, "stop_after": args.stop_after}
        with models.on_ranks(model, args.tensor_parallel) if args.tensor_parallel else contextlib.nullcontext():
            reports = models.trace(model, phase=args.phase, batch=args.batch, prompt=args.prompt, **options)
    names = ("model", "phase", "batch", "prompt", "dtype", "quantize", "target", "tensor_parallel")
    asked = {name: getattr(args, name) for name in names}
    about = asked | {package: versions.version(package) for package in ("gdnfuse", "torch", "transformers", "triton")}
    if args.html:
        with replacing(args.html) as partial:
            partial.write_text(page(reports, about, args.bandwidth), encoding="utf-8")
        print(f"Wrote {args.html}.", file=sys.stderr)
    if args.json:
        print(json.dumps(document(reports, about, args.bandwidth), indent=1))
    else:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        style = Style(color, sys.stdout.encoding or "ascii")
        print("\n\n".join(render(r, style, args.bandwidth) for r in reports))


def _verify(args: argparse.Namespace) -> int:
    import torch

    from gdnfuse import models
    from gdnfuse.bench.measure import machine

    if not args.debug:
        _quiet()
    device = _device(args.device)
    with progress() as announce, listening(announce):
        announce("read config")
        config = models.load_config(args.model)
        announce("build model")
        torch.manual_seed(0)
        model = models.random_model(config, getattr(torch, args.dtype), device)
        if args.quantize:
            models.quantized(model, models.QUANTIZED[args.quantize])
        announce("run a prompt and one step")
        reports = models.verify(model, batch=args.batch, prompt=args.prompt)
    verified = bool(reports) and all(r.rewritten and r.comparisons for r in reports)
    if args.json:
        about = {name: getattr(args, name) for name in ("model", "batch", "prompt", "dtype", "quantize")} | {"device": device}
        graphs = [r.to_dict() for r in reports]
        data = {"schema": VERIFICATION, "about": about, "machine": machine(device), "verified": verified, "graphs": graphs}
        print(json.dumps(data, indent=1))
    else:
        print("\n\n".join(f"{r.summary()}\n\n{table(_comparison_rows(r))}" if r.comparisons else r.summary() for r in reports))
    return 0 if verified else 1


def _warmup(args: argparse.Namespace) -> None:
    check_writable(args.save)
    import torch

    from gdnfuse import models
    from gdnfuse.generation import compile, warmup

    if not args.debug:
        _quiet()
    device = _device(args.device)
    with progress() as announce, listening(announce):
        announce("read config")
        config = models.load_config(args.model)
        announce("build model")
        model = models.random_model(config, getattr(torch, args.dtype), device)
        if args.quantize:
            models.quantized(model, models.QUANTIZED[args.quantize])
        announce("compile")
        short = [T for T in compile.FEW_TOKENS if args.short and T * args.batch <= compile.MOST_ROWS]
        made = warmup.warmup(compile.compile(model, mode=args.mode), batch=args.batch, short=short, save=args.save)
    if args.json:
        print(json.dumps({"file": str(args.save), **dataclasses.asdict(made)}, indent=1))
        return
    graphs = ", ".join(f"{count} {phase}" for phase, count in made.graphs.items())
    print(f"Wrote {args.save}, {made.saved / 2**20:.1f} MiB: {graphs} graphs, compiled in {made.seconds:.0f} s.")


def _meta_model(args: argparse.Namespace, announce: Callable[[str], None]) -> Any:
    """The model of a command without its weights, in the dtype or format that was asked for."""
    import torch

    from gdnfuse import models

    announce("read config")
    config = models.load_config(args.model)
    announce("build model")
    model = models.meta_model(config, getattr(torch, args.dtype))
    if args.quantize:
        models.quantized(model, models.QUANTIZED[args.quantize])
    return model


def _tune(args: argparse.Namespace) -> None:
    if args.save:
        check_writable(args.save)
    import torch

    from gdnfuse import kernels

    try:
        kernels.implementations()
    except Refused as e:
        raise GdnfuseError(f"gdnfuse tune measures kernels. {e.reason}") from e
    from gdnfuse.bench import tune

    if not args.debug:
        _quiet()
    tune.require_gpu()
    with progress() as announce, listening(announce), torch.no_grad():
        model = _meta_model(args, announce)
        data = tune.tune(model, args.batch, args.save)
    print(json.dumps(data, indent=1) if args.json else tune.table(data))


def _bench(args: argparse.Namespace) -> int:
    from gdnfuse.bench import run

    if not args.debug:
        _quiet()
    device = _device(args.device)
    if args.speculate:
        return _speculate(args, device)
    settings = run.Settings(
        model=args.model,
        sides=args.sides or run.default_sides(device, args.quantize, args.tensor_parallel),
        phases=[run.PREFIX] if args.prefix else [args.phase] if args.phase else list(run.PHASES),
        batch=args.batch,
        prompt=args.prompt,
        new=args.new,
        layers=args.layers,
        dtype=args.dtype,
        quantize=args.quantize,
        device=device,
        inner=args.inner,
        prefix=args.prefix,
        tensor_parallel=args.tensor_parallel,
        timeout=args.timeout,
    )
    run.check(settings)
    if args.plot:
        run.check_plot(args.plot)
    data = run.run(settings, args.debug)
    print(json.dumps(data, indent=1) if args.json else run.tables(data))
    if args.plot:
        run.plot(data, args.plot)
    without_speed = run.sides_without_speed(data)
    for sentence in without_speed:
        print(sentence, file=sys.stderr)
    return 1 if without_speed else 0


def _speculate(args: argparse.Namespace, device: str) -> int:
    from tqdm import tqdm

    from gdnfuse.bench import speculation

    unused = ("sides", "phase", "prefix", "layers", "quantize", "plot", "timeout", "tensor_parallel")
    if found := [name for name in unused if getattr(args, name) is not None] or ["batch"] * (len(args.batch) > 1):
        option = f"--{found[0].replace('_', '-')}"
        wanted = "with one --batch" if option == "--batch" else "without it"
        raise GdnfuseError(f"--speculate must be used {wanted}, found {option}: measure that in a command of its own.")
    how = {name: getattr(args, name) for name in ("prompt", "new", "dtype", "inner")}
    with progress() as announce, listening(announce):
        announce("speculate")
        settings = speculation.Settings(args.model, args.speculate, batch=args.batch[0], device=device, **how)
        data = speculation.run(settings, lambda data, line: tqdm.write(line, file=sys.stderr))
    print(json.dumps(data, indent=1) if args.json else speculation.tables(data))
    return 0


def _device(name: str | None) -> str:
    """The device to run on. The default is the GPU if there is one."""
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except Exception as e:  # no such device, or not in this build of torch
        raise GdnfuseError(f"Cannot use the device {device!r}: {one_line(e)}.") from e
    return device


def _comparison_rows(report: GraphReport) -> list[dict[str, Any]]:
    """A row for each kind of output and each kind of written input, with the worst error of the kind."""
    kinds: dict[str, list[Comparison]] = {}
    for c in report.comparisons:
        kinds.setdefault(re.sub(r"\d+", "*", c.name, count=1), []).append(c)
    rows = []
    for kind, members in kinds.items():
        worst = max(members, key=lambda c: (not c.passed, c.error))
        errors = {"error": f"{worst.error:.1e}", "original": f"{worst.eager_error:.1e}"}
        rows.append({"compared": kind, "count": len(members), **errors, "passed": "yes" if worst.passed else "no"})
    return rows


def _rules(args: argparse.Namespace) -> None:
    from gdnfuse.passes import fuse, last_rows, lift

    rows = [{"stage": r.stage, "rule": r.name, "equation": r.equation} for r in (*lift.RULES, *fuse.RULES)]
    rows.append({"stage": "fuse", "rule": last_rows.NAME, "equation": last_rows.EQUATION})
    print(json.dumps(rows, indent=1, ensure_ascii=False) if args.json else tabulate(rows, "keys", disable_numparse=True))


def _doctor(args: argparse.Namespace) -> None:
    rows = [dict(zip(("what", "found", "effect", "remedy"), found, strict=True)) for found in doctor.findings()]
    if args.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for row in rows:
        print(f"{'to do' if row['remedy'] else 'ok':5}  {row['what']}, {row['found']}. {row['effect']} {row['remedy']}".rstrip())
    left = sum(bool(row["remedy"]) for row in rows)
    print(f"\n{left} to do." if left else f"\nNothing to do. Next: gdnfuse {doctor.next_command()}")


def _quiet() -> None:
    """Silence transformers' advice to install kernels, which a report does not need, and Dynamo's warnings, which it contains."""
    for name in ("torchao", "torch.utils._pytree"):  # what importing torchao prints, as transformers does if it is installed
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if "TORCH_LOGS" not in os.environ:
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
