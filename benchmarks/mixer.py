"""The mixer of a GDN layer for one token, op against op: all between in_proj and out_proj, bfloat16 rows.

    python benchmarks/mixer.py --json mixer.json
    python benchmarks/mixer.py --batches 1,64 --sides mixer_decode,packed_decode
    python benchmarks/mixer.py --state bfloat16 --overlap
    python benchmarks/mixer.py --sweep --batches 1,4,16,32,64,256 --json mixer_sweep.json

Sides, at the sizes of a 4B model (16 key heads, 32 value heads, K = V = 128, a conv of four taps):

    mixer_decode         gdnfuse: conv update, gated delta rule, gated norm
    packed_decode        gdnfuse's rule alone, on a row that is float32 as in_proj_conv leaves it
    packed_decode_gated  gdnfuse's rule with the gated norm in one launch, the second of mixer_decode's two: float32 q, k, v
    fla                  flash-linear-attention: causal_conv1d_update, fused_recurrent_gated_delta_rule with gates and l2norm
                         inside and the state as its own layer keeps it, and rms_norm_gated; left out where the package is not
                         installed

The recurrent state is float32, or with --state bfloat16, of which fla's returns the last in float32. With --overlap each of
gdnfuse's kernels may start while the one before it runs, as they may in a decode step; without, every launch is waited for.

A CUDA graph runs the side over state sets that together exceed the L2 four times, so that every state is cold; fla's returns the
last state in memory of its own, which each call gets. The figure is the median of REPLAYS replays, in microseconds per call. The
limit reads and writes the state once at the rate of a copy, which is measured on the same device; the marks, set for an H200, are
what the kernels are to reach with float32 states. No speed is reported for a side whose output or states are off float64's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from gdnfuse.bench.measure import COLD_BYTES, bandwidth, machine, replayed
from gdnfuse.dialect import gated_rms_norm, mixer_decode, packed_decode
from gdnfuse.kernels import implementations
from gdnfuse.progress import hidden

H, HV, K, V, W = 16, 32, 128, 128, 4
KEYS, VALUES = H * K, HV * V
D = 2 * KEYS + VALUES
OFFSETS = {"qkv": 0, "z": D, "b": D + VALUES, "a": D + VALUES + HV}
SCALE, EPS = K**-0.5, 1e-6
SIDES = ("fla", "mixer_decode", "packed_decode", "packed_decode_gated")
STATES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MARKS_US = {1: 4, 16: 20, 64: 68, 256: 265}
LAUNCHES, REPLAYS = 24, 15
# ‖found − wanted‖ / ‖wanted‖ against float64 for bfloat16 rows, by the state's dtype: a narrower one is rounded when stored.
TOLERANCE = {torch.float32: 2e-2, torch.bfloat16: 2e-2 + 2.0**-8}
DEVICE = "cuda"


# By side: the kernel whose configs are compared, and its table in kernels/delta_rule.py.
SWEEP = {"packed_decode": ("delta_rule", "RULE_CONFIGS"), "packed_decode_gated": ("delta_rule_gated", "GATED_CONFIGS")}


@dataclass(frozen=True)
class Weights:
    """conv [D, 1, W], A_log and dt_bias [HV], norm [V]."""

    conv: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    norm: torch.Tensor


@dataclass(frozen=True)
class Step:
    """row [B, 1, D + HV·V + 2·HV] with the parts qkv, z, b, a; conv_state [B, D, W]; state [B, HV, K, V]."""

    row: torch.Tensor
    conv_state: torch.Tensor
    state: torch.Tensor

    def copy(self) -> Step:
        return Step(self.row, self.conv_state.clone(), self.state.clone())


@dataclass(frozen=True)
class Side:
    """prepare: a side's own arguments of a step. call: the step. results: output and states by name, of arguments and result.
    reference: the same in float64, of a step.
    """

    prepare: Callable[[Step], Any]
    call: Callable[[Any], Any]
    results: Callable[[Any, Any], dict[str, torch.Tensor]]
    reference: Callable[[Step], dict[str, torch.Tensor]]


def weights() -> Weights:
    of = lambda *shape: torch.randn(shape, device=DEVICE).bfloat16()  # noqa: E731
    return Weights(of(D, 1, W) / 2, torch.rand(HV, device=DEVICE).add(0.1).log(), torch.randn(HV, device=DEVICE), of(V))


def step(B: int, state: torch.dtype, seed: int = 0) -> Step:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    of = lambda *shape: torch.randn(shape, device=DEVICE, generator=generator)  # noqa: E731
    return Step(of(B, 1, OFFSETS["a"] + HV).bfloat16(), of(B, D, W).bfloat16(), of(B, HV, K, V).to(state))


def part(row: torch.Tensor, name: str, width: int) -> torch.Tensor:
    return row.narrow(-1, OFFSETS[name], width)


def mixer_arguments(s: Step, w: Weights) -> tuple[Any, ...]:
    offsets, strides, _ = mixer_decode.layout("qkvzba", H, HV, K, V)
    return s.row, s.conv_state, w.conv, None, w.A_log, w.dt_bias, s.state, w.norm, offsets, strides, "silu", SCALE, EPS, EPS


def rule_arguments(row: torch.Tensor, state: torch.Tensor, w: Weights) -> tuple[Any, ...]:
    return part(row, "qkv", D), part(row, "a", HV), part(row, "b", HV), w.A_log, w.dt_bias, state, SCALE, EPS


def wide(arguments: Sequence[Any]) -> list[Any]:
    return [x.double() if isinstance(x, torch.Tensor) else x for x in arguments]


def mixer_reference(s: Step, w: Weights) -> dict[str, torch.Tensor]:
    arguments = wide(mixer_arguments(s, w))
    return {"output": mixer_decode.reference(*arguments), "conv_state": arguments[1], "state": arguments[6]}


def rule_reference(s: Step, w: Weights) -> dict[str, torch.Tensor]:
    arguments = wide(rule_arguments(s.row, s.state, w))
    return {"output": packed_decode.reference(*arguments), "state": arguments[5]}


def gated_arguments(qkv: torch.Tensor, row: torch.Tensor, state: torch.Tensor, w: Weights) -> tuple[Any, ...]:
    """Those of the rule with its norm: q, k, v as the conv leaves them, and a row with the rest."""
    parts = part(row, "z", VALUES), part(row, "a", HV), part(row, "b", HV)
    return qkv, *parts, w.A_log, w.dt_bias, state, w.norm, SCALE, EPS, EPS


def gated_reference(s: Step, w: Weights) -> dict[str, torch.Tensor]:
    found = rule_reference(s, w)
    o, z = found["output"], part(s.row, "z", VALUES).double()
    return {**found, "output": gated_rms_norm.reference(o, z.unflatten(-1, (HV, V)), w.norm.double(), EPS).flatten(-2)}


def side_of(name: str, w: Weights, overlap: bool = False) -> Side:
    if name == "fla":
        return fla_side(w)
    options = {"overlap": True} if overlap else {}
    if name == "packed_decode_gated":
        from gdnfuse.kernels.delta_rule import launch_gated

        return Side(
            prepare=lambda s: (part(s.row, "qkv", D).float(), s.row, s.state),
            call=lambda given: launch_gated(*gated_arguments(*given, w), **options),
            results=lambda given, o: {"output": o, "state": given[2]},
            reference=lambda s: gated_reference(s, w),
        )
    if name == "mixer_decode":
        op = partial(implementations()[name].op, **options)
        return Side(
            prepare=lambda s: s,
            call=lambda s: op(*mixer_arguments(s, w)),
            results=lambda s, y: {"output": y, "conv_state": s.conv_state, "state": s.state},
            reference=lambda s: mixer_reference(s, w),
        )
    # Not its op, which repeats what it has recorded, whatever --sweep tries next.
    launch = partial(implementations()[name].launch, **options)
    return Side(
        prepare=lambda s: (s.row.float(), s.state),
        call=lambda given: launch(*rule_arguments(*given, w)),
        results=lambda given, o: {"output": o, "state": given[1]},
        reference=lambda s: rule_reference(s, w),
    )


def fla_side(w: Weights) -> Side:
    from fla.modules.convolution import causal_conv1d_update
    from fla.modules.fused_norm_gate import rms_norm_gated
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    taps = w.conv.squeeze(1)
    inside = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}

    def call(s: Step) -> tuple[torch.Tensor, torch.Tensor]:
        mixed, _ = causal_conv1d_update(part(s.row, "qkv", D), s.conv_state, weight=taps, activation="silu")
        q, k, v = mixed.split([KEYS, KEYS, VALUES], -1)
        o, last = fused_recurrent_gated_delta_rule(
            q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (HV, V)),
            g=part(s.row, "a", HV), beta=part(s.row, "b", HV), A_log=w.A_log, dt_bias=w.dt_bias, scale=SCALE,
            initial_state=s.state, output_final_state=True, state_v_first=True, **inside,
        )  # fmt: skip
        z = part(s.row, "z", VALUES).unflatten(-1, (HV, V))
        return rms_norm_gated(o, z, w.norm, None, activation="swish", eps=EPS).flatten(-2), last

    return Side(
        prepare=lambda s: Step(s.row, s.conv_state, s.state.mT.contiguous()),
        call=call,
        results=lambda s, found: {"output": found[0], "conv_state": s.conv_state, "state": found[1].mT},
        reference=lambda s: mixer_reference(s, w),
    )


def error(side: Side, s: Step) -> float:
    """The largest of the errors of output and states; the call before the one that is compared may tune itself."""
    side.call(side.prepare(s.copy()))
    own = side.prepare(s.copy())
    if DEVICE == "cuda":
        torch.cuda.synchronize()  # a kernel that may overlap reads the state before what wrote it need have ended
    found, wanted = side.results(own, side.call(own)), side.reference(s)
    return max(float((found[name].double() - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def microseconds(call: Callable[[Any], Any], sets: Sequence[Any]) -> list[float]:
    return replayed(call, sets, LAUNCHES, REPLAYS, keep=True)


def run_batch(
    B: int, sides: Sequence[str], rate: float, state: torch.dtype = torch.float32, overlap: bool = False
) -> dict[str, Any]:
    """Each side's times, and their limit at a rate in bytes per second."""
    size = state.itemsize * B * HV * K * V
    count = max(2, math.ceil(COLD_BYTES / size))
    limit = 1e6 * 2 * size / rate
    mark = MARKS_US.get(B) if state == torch.float32 else None
    result: dict[str, Any] = {"batch": B, "sets": count, "limit_us": limit, "mark_us": mark, "sides": []}
    shared = weights()
    for name in sides:
        torch.cuda.empty_cache()
        side = side_of(name, shared, overlap)
        row: dict[str, Any] = {"side": name, "error": error(side, step(B, state))}
        if row["error"] <= TOLERANCE[state]:
            times = microseconds(side.call, [side.prepare(step(B, state, seed)) for seed in range(count)])
            row |= {"us": statistics.median(times), "us_min": min(times), "us_max": max(times)}
        result["sides"].append(row)
    return result


def sweep_batch(B: int) -> dict[str, Any]:
    """Microseconds of the rule alone, and of the rule with its norm, for every way in which its kernel may share out the work."""
    from gdnfuse.bench.configs import RULES
    from gdnfuse.kernels import delta_rule, tuned

    count = max(2, math.ceil(COLD_BYTES / (4 * B * HV * K * V)))
    shared, result = weights(), {"batch": B, "sets": count}
    for name, (kernel, table_name) in SWEEP.items():
        side = side_of(name, shared, True)
        sets = [side.prepare(step(B, torch.float32, seed)) for seed in range(count)]
        times = {}
        for config in RULES[kernel]:
            with tuned.trying(kernel, config):
                if error(side, step(B, torch.float32)) <= TOLERANCE[torch.float32]:
                    times["×".join(map(str, config))] = statistics.median(microseconds(side.call, sets))
        chosen = next(config for heads, config in getattr(delta_rule, table_name) if B * HV <= heads)
        result[name] = {"chosen": "×".join(map(str, chosen)), "configs_us": times}
        del sets
        torch.cuda.empty_cache()
    return result


def sweep_table(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        for name in SWEEP:
            times = sorted(result[name]["configs_us"].items(), key=lambda item: item[1])
            rows.append([result["batch"], name, result[name]["chosen"], "  ".join(f"{c}: {us:.2f}" for c, us in times)])
    return tabulate(rows, ["B", "side", "chosen", "columns×warps[×ahead]: µs"], disable_numparse=True)


def table(results: Sequence[dict[str, Any]], rate: float) -> str:
    rows = []
    for result in results:
        first = result["sides"][0].get("us")
        for row in result["sides"]:
            us, limit, mark = row.get("us"), result["limit_us"], result["mark_us"]
            figures = ["refused: wrong", "", ""]
            if us:
                figures = [f"{us:.2f}", f"{first / us:.2f} ×" if first else "", f"{100 * limit / us:.0f} %"]
            rows.append([result["batch"], row["side"], *figures, f"{limit:.2f}", mark or "", f"{row['error']:.1e}"])
    headers = ["B", "side", "µs", "of the first", "of the limit", "limit µs", "mark µs", "error"]
    head = f"Microseconds; the limit moves the state at {rate / 1e9:.0f} GB/s, a copy's rate here; the marks were set for an H200"
    return f"{head}\n{tabulate(rows, headers, disable_numparse=True)}"


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,4,16,64,256", help="numbers of sequences, by comma")
    parser.add_argument("--sides", default=",".join(SIDES), help=f"of {', '.join(SIDES)}")
    parser.add_argument("--state", default="float32", choices=STATES, help="dtype of the recurrent state")
    parser.add_argument("--overlap", action="store_true", help="let gdnfuse's kernels start while the one before them runs")
    parser.add_argument("--sweep", action="store_true", help="instead: every config of the rule's kernels, with overlap")
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    sides = args.sides.split(",")
    if unknown := set(sides) - set(SIDES):
        parser.error(f"unknown sides {', '.join(sorted(unknown))}; the valid ones are {', '.join(SIDES)}")
    try:
        batches = [int(batch) for batch in args.batches.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        parser.error(f"--batches must be like 1,16, got {args.batches}")
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")

    torch.manual_seed(0)
    command = shlex.join(["python", "benchmarks/mixer.py", *(sys.argv[1:] if argv is None else argv)])
    data: dict[str, Any] = {"command": command, "machine": machine(), "arguments": vars(args)}
    if args.sweep:
        data["results"] = [sweep_batch(B) for B in tqdm(batches, disable=hidden(), leave=False, delay=1)]
        print(sweep_table(data["results"]))
        if args.json:
            with open(args.json, "w") as f:
                json.dump(data, f, indent=1)
        return 0
    if "fla" in sides and importlib.util.find_spec("fla") is None:
        print("flash-linear-attention is not installed, so the side fla is left out.", file=sys.stderr)
        sides.remove("fla")
    elif "fla" in sides:
        import fla

        data["machine"]["fla"] = fla.__version__
    bar = tqdm(batches, disable=hidden(), leave=False, delay=1)
    rate = data["bytes_per_second"] = bandwidth(DEVICE)
    data["results"] = [run_batch(B, sides, rate, STATES[args.state], args.overlap) for B in bar]
    print(table(data["results"], rate))
    if args.json:
        with open(args.json, "w") as f:
            json.dump(data, f, indent=1)
    return 0 if all("us" in row for result in data["results"] for row in result["sides"]) else 1


if __name__ == "__main__":
    sys.exit(main())
