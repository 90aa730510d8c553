"""Where the time of a decode step goes: each kernel's part of it, beside what its bytes take at the rate of a copy.

    python benchmarks/step.py --models 4b --json step_4b.json
    python benchmarks/step.py --models 0.8b,4b,9b --beside inductor
    python benchmarks/step.py --models 4b --batch 32
    python benchmarks/step.py --models 4b --quantize fp8
    python benchmarks/step.py --models 4b --lora 16:2
    python benchmarks/step.py --models 4b --lora 16:1:float32 --batch 8

Model, tokens, check of the logits and timing are those of benchmarks/decode.py, with a static cache and CUDA graphs; no step
whose logits are wrong is taken apart. Then some steps run under torch's profiler, again with nothing waited for inside.

Kernels overlap: one that starts while the one before it runs waits for it, so that their durations add up to more than the step.
A kernel's part is therefore by how much it moves the end: of the kernels in order of their ends, the time from the end of the one
before, or for the first one from the step's begin. What the device idles before a kernel is in that kernel's part. Parts add up
to the step; from the end of one step to the begin of the next is a row of its own. Figures are medians over the profiled steps of
each place in the step, which must all run the same kernels in the same order, or nothing is attributed. The profiler costs time,
so the parts add up to somewhat more than the step as it is timed without; both figures are given.

What a kernel of gdnfuse computes is read off gdnfuse's report: its operations in the order of the graph, with how many kernels
each launches. The bytes of an operation are the weights, states, keys and values that it has to move: states both ways, keys and
values up to the step's token. What kernels hand to each other stays in the L2. They stand with the longest of an operation's
kernels. Of other kernels, Inductor's and cuBLAS's, the bytes are not known and count as none. The gap of a row is its time less
that of its bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import routing
import torch
import transformers
from decode import DTYPES, SHARED, build, caches, checked, own_calls, rank_and_adapters, reference, room, timed
from tabulate import tabulate
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import gdnfuse
from gdnfuse.bench.measure import BLOCK, Decoder, experts_read
from gdnfuse.bench.workers import answer, run_sides, show_fla
from gdnfuse.errors import Refused
from gdnfuse.models import QUANTIZED
from gdnfuse.report.records import GraphReport

SIDE = "gdnfuse"
BESIDE = ("inductor", "max-autotune")
BETWEEN = "between steps"
OTHERS = "others"
OUTSIDE = "outside the layers"
PACKED = {
    "linear attention": "in_proj",
    "full attention": "q, k, v",
    "MLP": "gate and up",
}  # what the packed weight of a block is
STATES = ("conv_states", "recurrent_states")  # inputs that a step reads and writes
CACHED = ("keys", "values")  # inputs of which a step reads the tokens so far
BYTES = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "i64": 8, "i32": 4, "bool": 1, "e4m3": 1, "int8": 1}
NAME = 44  # characters of a kernel's name in the table


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel, or a copy, on the device; start and end in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Op:
    """An operation of the compiled graph that launches kernels of gdnfuse.

    layer: path of its decoder layer, empty outside of all. kind: of its block, as of a BlockReport. what: it is in there.
    kernels: how many it launches. bytes: it has to move. names: those that it may launch by the report, which may know none.
    """

    op: str
    layer: str
    kind: str
    what: str
    kernels: int
    bytes: int
    names: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Place:
    """What a kernel of a step is: the `nth` that an operation launches. layer: it stands in; of others that of the one before."""

    kind: str
    what: str
    nth: int = 0
    layer: str = ""
    bytes: int = 0


def steps_of(kernels: Sequence[Kernel], count: int) -> list[list[Kernel]]:
    """The kernels of each of `count` steps in order of their starts.

    Raises:
        Refused: the steps do not run the same kernels in the same order.
    """
    ordered = sorted(kernels, key=lambda k: (k.start, k.end))
    if not ordered or len(ordered) % count:
        raise Refused(f"{count} equal steps are a multiple of {count} kernels, found {len(ordered)}.")
    size = len(ordered) // count
    steps = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    for number, step in enumerate(steps[1:], 2):
        for i, (one, other) in enumerate(zip(steps[0], step, strict=True), 1):
            if one.name != other.name:
                raise Refused(f"Kernel {i} of {size} is {one.name} in step 1 and {other.name} in step {number}.")
    return steps


def shares(step: Sequence[Kernel]) -> list[float]:
    """By how many microseconds each kernel moves the end of its step, whose begin is its first start."""
    at, found = min(k.start for k in step), [0.0] * len(step)
    for i in sorted(range(len(step)), key=lambda i: step[i].end):
        found[i] = max(0.0, step[i].end - at)
        at = max(at, step[i].end)
    return found


def medians(steps: Sequence[Sequence[Kernel]]) -> tuple[list[float], float]:
    """The median share of each place in a step, and the median time between two steps."""
    places = [statistics.median(place) for place in zip(*map(shares, steps), strict=True)]
    gaps = [min(k.start for k in b) - max(k.end for k in a) for a, b in itertools.pairwise(steps)]
    return places, statistics.median(gaps) if gaps else 0.0


def operations(report: GraphReport, kernels: Collection[str], tokens: int, experts: float = 1.0) -> list[Op]:
    """A graph's operations that launch kernels of gdnfuse, in order.

    Args:
        report: of a decode step.
        kernels: names of operations that have a kernel.
        tokens: that keys and values of a step hold.
        experts: the share of a layer's experts that a step reads.
    """
    names: dict[str, set[tuple[str, ...]]] = {}
    for r in report.all_records:
        if r.stage == "lower" and r.chosen == "triton":
            known = names.setdefault(_family(r.rule), set())
            if r.launches:
                known.add(tuple(line.partition(",")[0] for line in r.launches))
    # Ours outside the layers are the last norm and the head: what embeds the tokens is Inductor's.
    blocks = sorted(report.blocks, key=lambda b: not b.path)
    found = []
    for block in blocks:
        for o in report.structures[block.after]:
            if o.kernels and o.op in kernels and _family(o.op) in names:
                needed = {given: _bytes(given, tokens, experts) for given in o.inputs if isinstance(given, str)}
                what = _what(o.op, block.kind, max(needed, key=needed.__getitem__, default=""))
                launched = tuple(sorted(n for n in names[_family(o.op)] if len(n) == o.kernels))
                found.append(Op(o.op, block.layer, block.kind, what, o.kernels, sum(needed.values()), launched))
    return found


def _family(op: str) -> str:
    """An operation or the rule that it comes from: linears become one another when they are lowered."""
    return "linear" if op.endswith("linear") else op


def _bytes(given: str, tokens: int, experts: float) -> int:
    """That a step moves of a graph's input, as the report describes it: "keys bf16[1, 4, 71, 256]"; none of what a block made."""
    match = re.search(r"(\S+) (\w+)\[([\d, ]*)\]$", given)
    if match is None or match[2] not in BYTES:
        return 0
    name, shape = match[1].rpartition(".")[2], [int(n) for n in match[3].split(", ") if n]
    if name in CACHED and len(shape) == 4:
        shape[2] = min(shape[2], tokens)
    moved = BYTES[match[2]] * math.prod(shape) * (2 if name in STATES else 1)
    return int(moved * experts) if ".experts." in match[1] else moved


def _what(op: str, kind: str, largest: str) -> str:
    """What an operation is in its block, by the largest input that it has to read."""
    name = largest.partition(" ")[0]
    if name.startswith("packed_weight"):
        return PACKED.get(kind, "a packed linear")
    if not name.endswith(".weight"):
        return op
    if "norm" in name.split(".")[-2]:
        return "norm"
    return "head" if kind == OUTSIDE else name.split(".")[-2]


def places(names: Sequence[str], ours: Collection[str], ops: Sequence[Op]) -> list[Place]:
    """What each kernel of a step is.

    Args:
        names: of the kernels, in order.
        ours: those that are gdnfuse's.
        ops: all that launch them, in order.

    Raises:
        Refused: the operations launch other kernels than these.
    """
    wanted = [(op, nth) for op in ops for nth in range(op.kernels)]
    count = sum(name in ours for name in names)
    if count != len(wanted):
        raise Refused(f"The report's operations launch {len(wanted)} kernels of gdnfuse, found {count} in the step.")
    found, layer, rest = [], "", iter(wanted)
    for name in names:
        if name not in ours:
            found.append(Place(OTHERS, OTHERS, layer=layer))
            continue
        op, nth = next(rest)
        known = sorted({launched[nth] for launched in op.names})
        if known and name.removesuffix("_kernel") not in known:
            raise Refused(f"Kernel {nth + 1} of {op.op} in {op.layer or OUTSIDE} must be of {', '.join(known)}, found {name}.")
        layer = op.layer
        found.append(Place(op.kind, op.what, nth, layer, op.bytes))
    return found


def groups(names: Sequence[str], us: Sequence[float], at: Sequence[Place], between: float, rate: float) -> list[dict[str, Any]]:
    """Rows of the table by gap, the largest first: kernels of one name that are the same in their blocks.

    Args:
        names, us, at: of each kernel of a step its name, its share and what it is.
        between: microseconds from one step to the next.
        rate: bytes per second.
    """
    total = sum(us) + between
    members: dict[tuple[str, str, int, str], list[int]] = {}
    for i, (name, place) in enumerate(zip(names, at, strict=True)):
        members.setdefault((place.kind, place.what, place.nth, name), []).append(i)
    longest: dict[tuple[str, str], tuple[float, int]] = {}
    for (kind, what, nth, _), of in members.items():
        longest[kind, what] = max(longest.get((kind, what), (-1.0, 0)), (statistics.median(us[i] for i in of), nth))
    rows = [_row(BETWEEN, "", "", [between], 0, total, rate)]
    for (kind, what, nth, name), of in members.items():
        moved = sum(at[i].bytes for i in of) if longest[kind, what][1] == nth else 0
        rows.append(_row(kind, what, name, [us[i] for i in of], moved, total, rate))
    return sorted(rows, key=lambda row: -row["gap_us"])


def _row(kind: str, what: str, kernel: str, us: Sequence[float], moved: int, total: float, rate: float) -> dict[str, Any]:
    limit = 1e6 * moved / rate
    row = {"kind": kind, "what": what, "kernel": kernel, "count": len(us), "us_each": statistics.median(us), "us": sum(us)}
    return row | {"share": sum(us) / total, "bytes": moved, "limit_us": limit, "gap_us": sum(us) - limit}


def per_layer(at: Sequence[Place], ops: Sequence[Op]) -> list[dict[str, Any]]:
    """How many kernels a layer of each kind runs, its MLP's among them; outside are those before the first layer's own too."""
    kinds = {}
    for op in ops:
        kinds.setdefault(op.layer, op.kind if op.layer else OUTSIDE)
    counts = Counter(place.layer for place in at)
    found: dict[str, list[int]] = {}
    for layer, kind in kinds.items():
        found.setdefault(kind, []).append(counts[layer])
    return [{"kind": kind, "layers": len(n), "kernels": statistics.median(n), "most": max(n)} for kind, n in found.items()]


def attributed(kernels: Sequence[Kernel], count: int, ops: Sequence[Op], ours: Collection[str], rate: float) -> dict[str, Any]:
    """Of a row all that the profiled kernels of `count` steps say; the first of them warms the profiler up.

    If they say nothing, "refused" with a sentence, and all kernels as they ran; if they cannot be named, "unknown" with one.
    """
    try:
        steps = steps_of(kernels, count)[1:]
    except Refused as e:
        return {"refused": str(e), "trace": [asdict(k) for k in sorted(kernels, key=lambda k: k.start)]}
    names = [k.name for k in steps[0]]
    us, between = medians(steps)
    found: dict[str, Any] = {"profiled_steps": len(steps), "profiled_us": sum(us) + between, "kernels_per_step": len(names)}
    try:
        at = places(names, ours, ops)
        found["layers"] = per_layer(at, ops)
    except Refused as e:
        at, found["unknown"] = [Place(OTHERS, OTHERS)] * len(names), str(e)
    return found | {"rows": groups(names, us, at, between, rate)}


def kernels_of(decode: Decoder, tokens: Sequence[torch.Tensor]) -> list[Kernel]:
    """All that a GPU runs in steps over these tokens, the kernels of CUDA graphs included."""
    if not tokens[0].is_cuda:
        return []
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for token in tokens:
            decode(token)
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    return [Kernel(e.name, e.time_range.start, e.time_range.end) for e in events]


def own_kernels() -> tuple[Collection[str], Collection[str]]:
    """The names of gdnfuse's kernels that this process has launched, and of the operations that have one."""
    from gdnfuse.kernels import implementations, loaded

    return loaded(), implementations()


def run_side(side: str, name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The row of a side: checked, timed, profiled and attributed."""
    show_fla(side)
    model = build(name, getattr(torch, args.dtype), args.device, args.quantize, args.lora, hold_routing=True)
    shared = torch.load(folder / SHARED, map_location="cpu")
    row: dict[str, Any] = {"side": side}
    with caches(None), own_calls(side, model):
        decode, tokens, found = checked(side, model, args, shared, room(args) + args.profiled + 1)
        row |= found
        routing.put_back(model)
        if found["accurate"]:
            row |= timed(decode, args, tokens, args.steps)
            profiled = kernels_of(decode, tokens[: args.profiled + 1])
            ours, ops = own_kernels() if side == SIDE else ((), ())
            step = next((r for r in reversed(gdnfuse.reports()) if r.phase == "decode"), None)
            share = experts_read(model.config, args.batch)
            known = operations(step, ops, args.prompt + room(args), share) if step else []
            row |= attributed(profiled, args.profiled + 1, known, ours, shared["bytes_per_second"])
    return row


def table(result: dict[str, Any]) -> str:
    """A step's rows by gap with their sum, and what the sides beside it run."""
    rate, parts = result["bytes_per_second"], []
    for row in result["sides"]:
        stored = f" in {result['quantize']}" if result.get("quantize") else ""
        rank, adapters, *dtype = result.get("lora") or (0, 0)
        lora = " ".join([f" with {adapters} × rank {rank}", *(f"in {d}" for d in dtype)]) if rank else ""
        head = f"{result['model']}{stored}{lora}, batch {result['batch']}, {row['side']}: "
        if "ms" not in row:
            parts.append(head + row.get("failed", "its logits are too far from float32's or not finite."))
            continue
        head += f"{row['ms']:.3f} ms a step, {row['waited_ms']:.3f} where each is waited for"
        if "refused" in row:
            parts.append(f"{head}; nothing is attributed. {row['refused']}")
            continue
        head += f", {row['profiled_us'] / 1e3:.3f} ms under the profiler, {row['kernels_per_step']} kernels"
        if row["side"] != SIDE:
            parts.append(head)
            continue
        head += f"; limit {result['limit_with_states_ms']:.3f} ms at {rate / 1e9:.0f} GB/s, a copy's rate here"
        kinds = "; ".join(
            f"{k['layers']} × {k['kind']}: {k['kernels']:g} kernels"
            + (f", at most {k['most']}" if k["most"] > k["kernels"] else "")
            for k in row.get("layers", ())
        )
        parts.append("\n".join(filter(None, [head, kinds, row.get("unknown", ""), _lines(row["rows"])])))
    return "\n\n".join(parts)


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    sums = {name: sum(row[name] for row in rows) for name in ("us", "share", "bytes", "limit_us", "gap_us")}
    count = sum(row["count"] for row in rows if row["kernel"])
    lines = []
    for row in [*rows, {"kind": "total", "what": "", "kernel": "", "count": count, **sums}]:
        where = ", ".join(dict.fromkeys(filter(None, (row["kind"], row["what"]))))
        each = f"{row['us_each']:.2f}" if "us_each" in row else ""
        moved = [f"{row['bytes'] / 1e6:.1f}", f"{row['limit_us']:.1f}"] if row["bytes"] else ["", ""]
        figures = [f"{row['us']:.1f}", f"{100 * row['share']:.1f} %", *moved, f"{row['gap_us']:.1f}"]
        lines.append([where, row["kernel"][:NAME], row["count"], each, *figures])
    headers = ["what", "kernel", "count", "µs each", "µs a step", "share", "MB a step", "limit µs", "gap µs"]
    align = ("left", "left", *["right"] * 7)
    return tabulate(lines, headers, disable_numparse=True, colalign=align)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="4b", help="presets, config files or `tiny`, by comma")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--quantize", choices=[*QUANTIZED], help="turn linears into those of a checkpoint of this format")
    parser.add_argument(
        "--lora", type=rank_and_adapters, metavar="RANK[:ADAPTERS[:DTYPE]]", help="active adapters on every projection"
    )
    parser.add_argument("--beside", default="", help=f"count the kernels of these too, by comma: {', '.join(BESIDE)}")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--steps", type=int, default=64, help="that are timed")
    parser.add_argument("--profiled", type=int, default=7, help="steps that are profiled, behind one that warms up")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="that a side's process may take, or the reference's")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu has no kernels to show")
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    worker, sides = args.__dict__.pop("worker"), [SIDE, *filter(None, args.beside.split(","))]
    if unknown := set(sides[1:]) - set(BESIDE):
        parser.error(f"--beside must be of {', '.join(BESIDE)}, got {', '.join(sorted(unknown))}")
    if args.steps < 2 * BLOCK or not 2 <= args.profiled <= args.steps:
        parser.error(f"--steps must be at least {2 * BLOCK}, and --profiled 2 to as many")
    if min(args.batch, args.prompt) < 1 or args.warmup < 0:
        parser.error("--batch and --prompt must be at least 1, and --warmup at least 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    transformers.utils.logging.set_verbosity_error()
    how = argparse.Namespace(**vars(args), cache="static", mode="reduce-overhead")
    if worker:
        side, name, folder = worker
        answer(lambda: (reference if side == "reference" else lambda *a: run_side(side, *a))(name, how, Path(folder)))
        return 0

    command = shlex.join(["python", "benchmarks/step.py", *argv])
    data: dict[str, Any] = {"command": command, "machine": {}, "arguments": vars(args), "results": []}
    for name in args.models.split(","):
        first, rows = run_sides([__file__], name, sides, argv, timeout=args.timeout)
        data["machine"] |= first["machine"]
        data["results"].append(
            {
                "model": name,
                "batch": args.batch,
                "quantize": args.quantize,
                "lora": args.lora,
                **first.get("facts", {}),
                "sides": rows,
            }
        )
        print(table(data["results"][-1]), end="\n\n", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(data, indent=1))
    complete = all("rows" in row and "unknown" not in row for r in data["results"] for row in r["sides"])
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
