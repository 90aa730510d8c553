"""Times our kernels in a chain of GDN layers with their MLPs, as a decode step launches them, without a model around them.

    python benchmarks/chain.py --model 4b
    python benchmarks/chain.py --model 27b --format fp8_block128 --vary gate,plain
    python benchmarks/chain.py --model 4b --batch 32 --vary norm,gated,ring --json chain_32.json

benchmarks/gemm.py times a kernel alone in a loop. There it follows a launch of itself. In a step it starts while another kernel
still runs, so another config may be best. Here each launch may overlap the one before it, as in a step. Neither Dynamo nor
Inductor is needed, so a config takes a second or two to try. Attention layers, the embedding and the head are left out.

A chain has so many layers that the weights of a layer have left the L2 before they are read again. One CUDA graph runs them all.
A figure is microseconds per layer, the median of REPLAYS replays. All variants are timed in turn, REPEATS times, so that a drift
of the device shows. The limit is the time to move a layer's weights and states at the rate of a copy.

`--vary` names the kernels whose configs are tried: each of them with its other configs, the rest as the tables say. The result of
each variant is compared with that of the tables. Rounding differs in every layer, so only a difference above WRONG is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from tqdm import tqdm

from gdnfuse import formats
from gdnfuse.bench.measure import COLD_BYTES, bandwidth, machine
from gdnfuse.kernels import (
    add_rms_norm,
    delta_rule,
    few_rows_linear,
    fused_linear,
    linear_configs,
    mixer_decode,
    quantized,
    skinny_linear,
    tuned,
)
from gdnfuse.kernels.linear_configs import RingConfig, TensorCoresConfig
from gdnfuse.models import load_config
from gdnfuse.progress import hidden

EPS, WINDOW = 1e-6, 4
REPLAYS, UNTIMED, REPEATS = 15, 3, 3
WRONG = 0.1  # relative difference of a chain's result from which it is called wrong
DEVICE = "cuda"
LINEARS = ("in_proj", "out_proj", "gate_up", "down")
Call = Callable[..., Any]
Change = contextlib.AbstractContextManager[Any]


@dataclass(frozen=True)
class Sizes:
    """hidden: columns of a row. H, HV, K, V: heads. intermediate: of the MLP."""

    hidden: int
    H: int
    HV: int
    K: int
    V: int
    intermediate: int

    @property
    def channels(self) -> int:
        """Of the conv: all of q, k and v."""
        return 2 * self.H * self.K + self.HV * self.V

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        values = self.HV * self.V
        rows = self.channels + values + 2 * self.HV
        return {
            "in_proj": (rows, self.hidden),
            "out_proj": (self.hidden, values),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


def sizes_of(model: str) -> Sizes:
    c = load_config(model).get_text_config()
    heads = (c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
    return Sizes(c.hidden_size, *heads, c.intermediate_size)


class Layer:
    """Random weights of a layer, its states for B sequences, and a step through it."""

    def __init__(self, of: Sizes, B: int, format: str):
        random = lambda *shape: torch.randn(shape, device=DEVICE).bfloat16()  # noqa: E731
        self.of, self.B, self.format = of, B, format
        self.norm, self.mlp_norm, self.gated_norm = random(of.hidden) / 8, random(of.hidden) / 8, 1 + random(of.V) / 8
        self.conv = random(of.channels, 1, WINDOW) / 2
        self.A_log, self.dt_bias = torch.rand(of.HV, device=DEVICE).log(), torch.randn(of.HV, device=DEVICE)
        self.conv_state = torch.zeros(B, of.channels, WINDOW, device=DEVICE, dtype=torch.bfloat16)
        self.state = torch.zeros(B, of.HV, of.K, of.V, device=DEVICE)
        self.linears = {name: self._linear(name, random(*shape) * shape[1] ** -0.5) for name, shape in of.shapes.items()}

    def _linear(self, name: str, weight: torch.Tensor) -> dict[str, Any]:
        """Arguments of a linear. Rows of b and a, which fill no block, stay as they are, as checkpoints have them."""
        if not self.format:
            return {"weights": [weight]}
        M = weight.shape[0] - (2 * self.of.HV if name == "in_proj" else 0)
        data, scale, *zero = formats.named(self.format).quantize(weight[:M].contiguous())
        plain = [weight[M:].contiguous()] if M < weight.shape[0] else []
        return {"weights": [data, *plain], "scales": [scale], "format": self.format} | ({"zeros": zero} if zero else {})

    @property
    def bytes(self) -> int:
        """That a step moves: weights once, states both ways."""
        tensors = [t for linear in self.linears.values() for t in (*linear["weights"], *linear.get("scales", ()))]
        return sum(t.nbytes for t in tensors) + 2 * (self.state.nbytes + self.conv_state.nbytes)

    def reset(self) -> None:
        self.state.zero_()
        self.conv_state.zero_()

    def one_row(self, h: torch.Tensor) -> torch.Tensor:
        """A step of one sequence: norms, residuals and SwiGLU are in the linears' launches."""
        of, z = self.of, self.of.channels + self.of.HV * self.of.V
        conv = (self.conv_state, self.conv, None, 0, "silu")
        names = ("conv_state", "conv_weight", "conv_bias", "conv_offset", "activation")
        norm = {"norm_eps": EPS, "norm_offset": 1.0, "overlap": True}
        row = fused_linear.launch_in_proj_conv(
            h, norm_weight=self.norm, **norm, **dict(zip(names, conv, strict=True)), **self.linears["in_proj"]
        )
        b, a = row[..., z : z + of.HV], row[..., z + of.HV :]
        rule = (self.A_log, self.dt_bias, self.state, of.K**-0.5, EPS)
        o = delta_rule.launch_packed_decode(row[..., : of.channels], a, b, *rule, overlap=True).flatten(-2)
        gate = {"norm_weight": self.gated_norm, "norm_eps": EPS, "gate": row[..., of.channels : z]}
        h = fused_linear.launch(o, **gate, residual=h, overlap=True, **self.linears["out_proj"])
        m = fused_linear.launch(h, norm_weight=self.mlp_norm, **norm, swiglu=True, **self.linears["gate_up"])
        return fused_linear.launch(m, residual=h, overlap=True, **self.linears["down"])

    def several_rows(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A step of several sequences. x: what the linear before left to be added to h."""
        of = self.of
        h, n = add_rms_norm.launch(x, h, self.norm, EPS, 1.0, overlap=True)
        widths = [of.H * of.K] * 2 + [of.HV * of.V] * 2 + [of.HV] * 2
        offsets, heads = [0, *itertools.accumulate(widths)][:6], [of.K, of.K, of.V, of.V, 1, 1]
        o = mixer_decode.launch(
            self._split("in_proj", n), self.conv_state, self.conv, None, self.A_log, self.dt_bias, self.state, self.gated_norm,
            offsets, heads, "silu", of.K**-0.5, EPS, EPS, overlap=True,
        )  # fmt: skip
        h, n = add_rms_norm.launch(self._split("out_proj", o), h, self.mlp_norm, EPS, 1.0, overlap=True)
        m = fused_linear.launch(n, swiglu=True, overlap=True, **self.linears["gate_up"])
        return self._split("down", m), h

    def _split(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A linear in as many parts as the lowering gives it."""
        linear = self.linears[name]
        ring = linear_configs.rings(x) and not self.format.startswith(("int4", "nf4", "fp4"))
        M, N = linear["weights"][0].shape[0], x.shape[-1]
        parts = 1 if len(linear["weights"]) > 1 else linear_configs.split(M, N, self.B, ring=ring, quantised=bool(self.format))
        return (fused_linear.launch_split if parts > 1 else fused_linear.launch)(
            x, **linear, **({"parts": parts} if parts > 1 else {}), overlap=True
        )


def step(layers: list[Layer], x: torch.Tensor) -> torch.Tensor:
    if layers[0].B == 1:
        for layer in layers:
            x = layer.one_row(x)
        return x
    h = x
    for layer in layers:
        x, h = layer.several_rows(x, h)
    return h


def table_line(table: dict[str, Any], kind: str, config: Any) -> Change:
    """A config for every width, instead of a kind's lines in a table."""
    return mock.patch.dict(table, {kind: ((math.inf, config),)})


def variants(of: Sizes, B: int, format: str) -> Iterator[tuple[str, str, Change]]:
    """What may be varied, the config, and how to have it taken."""
    for config in ((8, 1), (16, 1), (32, 1), (32, 2), (64, 2)):
        yield "rule", str(config), mock.patch.object(delta_rule, "RULE_CONFIGS", ((math.inf, config),))
    if B == 1:
        kind = quantized.stored(format).kind if format else ""
        cores = linear_configs.TENSOR_CORES.get(kind, {})
        for role in ("conv", "gate", "swiglu", "plain"):
            for warps, ahead, rows in itertools.product((2, 4, 8, 16), (2, 4, 6, 10, 12, 16), (16, 32)) if kind in SWEPT else ():
                if warps * ahead <= 64 and warps * rows >= 64:
                    yield role, f"{warps}, {ahead}, {rows}", table_line(cores, role, TensorCoresConfig(warps, ahead, rows))
            group = (8,) if kind == "e4m3" else (16,) if format else ()
            table = {"": skinny_linear.CONFIGS, "e4m3": skinny_linear.QUANTIZED_CONFIGS}.get(kind, skinny_linear.INT4_CONFIGS)
            for rows, block, warps, each in itertools.product((1, 2, 4, 8), (256, 512, 1024, 2048), (2, 4, 8), (0, 2, 3, 4)):
                if 64 <= rows * block // (32 * warps) <= 128 and not (group and each):
                    with_none = table_line(cores, role, None)
                    change = (with_none, table_line(table, role, (rows, block, warps, each, *group)))
                    yield role, str((rows, block, warps, each)), together(*change)
        return
    for warps in (8, 16, 32):
        yield "norm", str(warps), mock.patch.object(add_rms_norm, "_warps", lambda *of, warps=warps: warps)
    for config in ((64, 4, True), (64, 4, False), (128, 4, False), (128, 8, False), (32, 2, True)):
        yield "gated", str(config), mock.patch.object(delta_rule, "GATED_CONFIGS", ((math.inf, config),))
    chosen = few_rows_linear.ring_config
    for name in LINEARS if not format else ():
        (M, N), swiglu = of.shapes[name], name == "gate_up"
        M //= 2 if swiglu else 1
        for per_sm, tiles, stages in itertools.product((1, 2, 3), (1, 2, 3), (2, 3, 4, 5, 6)):
            if (ring := ring_of(chosen(M, N, swiglu), M, swiglu, per_sm, tiles, stages)) is None:
                continue

            def changed(m, n, s=False, parts=1, sequences=8, this=(M, N, swiglu), ring=ring):
                return ring if (m, n, s) == this and parts == 1 else chosen(m, n, s, parts, sequences)

            yield f"ring {name}", f"{per_sm} per SM, {ring}", mock.patch.object(few_rows_linear, "ring_config", changed)


SWEPT = ("e4m3", "int4", "nf4")  # kinds of data that skinny_tensor_cores has


def ring_of(chosen: RingConfig | None, M: int, swiglu: bool, per_sm: int, tiles: int, stages: int) -> RingConfig | None:
    """A ring with so many programs per multiprocessor, if its tiles are neither too large nor nearly empty and have memory."""
    most = linear_configs.TILE // (2 if swiglu else 1)
    live = math.ceil(math.ceil(M / (per_sm * linear_configs.MULTIPROCESSORS)) / tiles)
    room = per_sm * stages * (tiles * linear_configs.TILE + 32) * 2 * linear_configs.STEP
    return RingConfig(tiles, live, stages, 1) if chosen and most // 2 < live <= most and room <= 224 * 1024 else None


@contextlib.contextmanager
def together(*changes: Change) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        yield


def captured(layers: list[Layer], x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A CUDA graph of a step, and what it gives from states of zeros."""
    step(layers, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(layers, x)
    for layer in layers:
        layer.reset()
    graph.replay()
    torch.cuda.synchronize()
    return graph, out.float().clone()


def timed(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of a replay, the median."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    for _ in range(UNTIMED):
        graph.replay()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in events)


def measure(layers: list[Layer], vary: Sequence[str]) -> list[dict[str, Any]]:
    """A row for the tables' own configs and for each variant, with the figures of every round or why there are none."""
    of, B, format = layers[0].of, layers[0].B, layers[0].format
    x = torch.randn(B, 1, of.hidden, device=DEVICE).bfloat16()
    rows: list[dict[str, Any]] = [{"what": "as the tables say", "config": ""}]
    graphs = [captured(layers, x)]
    wanted = [v for v in variants(of, B, format) if v[0].split()[0] in vary]
    for what, config, change in tqdm(wanted, disable=hidden(), leave=False, delay=1):
        row: dict[str, Any] = {"what": what, "config": config}
        try:
            with change:
                graph = captured(layers, x)
        except Exception as e:  # one that does not fit the device or the kernel is not a choice
            rows.append(row | {"failed": f"{type(e).__name__}: {e}".splitlines()[0]})
            graphs.append(None)
            continue
        row["difference"] = ((graph[1] - graphs[0][1]).norm() / graphs[0][1].norm()).item()
        rows.append(row)
        graphs.append(graph if row["difference"] <= WRONG else None)
    for _ in range(REPEATS):
        for row, graph in zip(rows, graphs, strict=True):
            if graph is not None:
                row.setdefault("us", []).append(timed(graph[0]) / len(layers))
    return rows


def table(rows: list[dict[str, Any]], limit: float) -> str:
    ordered = [rows[0], *sorted((r for r in rows[1:] if "us" in r), key=lambda r: statistics.median(r["us"]))]
    figures = lambda us: [f"{n:.2f}" for n in (statistics.median(us), min(us), max(us))]  # noqa: E731
    lines = [[r["what"], r["config"], *figures(r["us"])] for r in ordered]
    why = lambda r: r.get("failed") or f"wrong by {r['difference']:.1e}"  # noqa: E731
    wrong = [f"{r['what']} {r['config']}: {why(r)}" for r in rows if "us" not in r]
    head = ["varied", "config", "µs a layer", "least", "most"]
    return "\n".join([tabulate(lines, head, disable_numparse=True), f"limit {limit:.2f} µs a layer", *wrong])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="4b", help="a preset or a folder with config.json")
    parser.add_argument("--batch", type=int, default=1, help="sequences, 1 to 32")
    parser.add_argument("--format", default="", help="of quantised weights, e.g. fp8_block128 or int4_group128")
    parser.add_argument(
        "--vary", default="", help="names of kernels: rule; of one sequence conv, gate, swiglu, plain; of more norm, gated, ring"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    if not 1 <= args.batch <= linear_configs.MAX_ROWS:
        parser.error(f"--batch must be 1 to {linear_configs.MAX_ROWS}, found {args.batch}")
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")

    of, vary = sizes_of(args.model), args.vary.split(",") if args.vary else []
    known = {what.split()[0]: None for what, *_ in variants(of, args.batch, args.format)}
    if unknown := [name for name in vary if name not in known]:
        parser.error(f"--vary must be some of {', '.join(known)} for this batch and format, found {unknown[0]}")

    torch.manual_seed(0)
    first = Layer(of, args.batch, args.format)
    layers = [first, *(Layer(of, args.batch, args.format) for _ in range(max(3, math.ceil(COLD_BYTES / first.bytes))))]
    rate = bandwidth(DEVICE)
    limit = 1e6 * first.bytes / rate
    command = shlex.join(["python", "benchmarks/chain.py", *(sys.argv[1:] if argv is None else argv)])
    data: dict[str, Any] = {"command": command, "machine": machine(), "arguments": vars(args), "bytes_per_second": rate}
    data |= {"layers": len(layers), "bytes": first.bytes, "limit_us": limit}
    # What was tuned on this card would be taken instead of what is varied.
    with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, {tuned.FOLDER: empty}):
        tuned.forget()
        data["results"] = measure(layers, vary)
    print(table(data["results"], limit))
    if args.json:
        with open(args.json, "w") as f:
            json.dump(data, f, indent=1)
    return 0 if "us" in data["results"][0] else 1


if __name__ == "__main__":
    sys.exit(main())
