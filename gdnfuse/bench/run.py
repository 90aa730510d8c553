"""gdnfuse bench MODEL: times decode steps and prompts of each side, as tables, as data, and as a plot."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import statistics
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import gdnfuse
from gdnfuse import compat
from gdnfuse.bench import ranks
from gdnfuse.bench.measure import (
    BLOCK,
    Decoder,
    bandwidth,
    compare_logits,
    difference,
    machine,
    seconds,
    state_bytes,
    synchronize,
    time_steps,
    weight_bytes,
    widen,
)
from gdnfuse.bench.workers import Interrupted, answer, fla_version, note, run_sides, say_failed, show_fla
from gdnfuse.capture_fp8 import dequantized_calls
from gdnfuse.errors import GdnfuseError, one_line
from gdnfuse.files import check_writable, replacing
from gdnfuse.generation import links
from gdnfuse.generation.caches import cache_argument
from gdnfuse.generation.compile import mode_or_options, with_own_code
from gdnfuse.generation.shards import WAYS
from gdnfuse.models import OF_TRANSFORMERS, QUANTIZED, load_config, preset, quantized, random_model
from gdnfuse.report.text import table

SCHEMA = "gdnfuse.bench/2"
SIDES = ("eager", "fla", "inductor", "gdnfuse")
DEVICES = ("cpu", "cuda")
COMPILED = ("inductor", "gdnfuse")
PHASES = ("decode", "prefill")
# Sides with ranks: one device, what transformers' users have on several, and both ways of gdnfuse.
SIDES_ON_RANKS = ("gdnfuse", "inductor:as_loaded", "gdnfuse:as_loaded", "gdnfuse:heads", "gdnfuse:heads:one_shot")
PREFIX = "prefix"  # replaces these phases if it is asked for
TAIL = 64  # tokens after a known prefix
CHECKED = 8  # how many steps, and last tokens of a prompt, are compared
WARMUP = 8  # untimed steps
EAGER_STEPS = 16  # timed steps of sides that are not compiled
PROMPTS = 5
SHARED = "reference.pt"  # tokens and logits that all sides share


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        model: a preset, config.json, model folder or hub id.
        sides: names in SIDES. With ranks also names such as "gdnfuse:heads", with a way of `gdnfuse.generation.shards.WAYS`.
        phases: names in PHASES, or only PREFIX.
        batch: numbers of sequences, each measured by itself.
        prompt: tokens of the prompt. As many are in the cache when decoding starts.
        new: decode steps to time.
        layers: how many of the model's first layers, or all.
        dtype: "bfloat16", "float16" or "float32".
        device: where to run.
        quantize: a format of `gdnfuse.models.QUANTIZED` for the linears, or None.
        inner: what compiles gdnfuse's graphs, see `gdnfuse.options.Options`.
        prefix: in the phase PREFIX, how many tokens of a prompt are known. It has TAIL more.
        tensor_parallel: number of ranks for sides with a way. Each is a process, with its own GPU if there are GPUs.
        timeout: seconds that a side, or the reference, may take for one number of sequences. None for no limit.
    """

    model: str
    sides: list[str]
    phases: list[str] = field(default_factory=lambda: list(PHASES))
    batch: list[int] = field(default_factory=lambda: [1])
    prompt: int = 512
    new: int = 128
    layers: int | None = None
    dtype: str = "bfloat16"
    quantize: str | None = None
    device: str = "cpu"
    inner: str = "inductor"
    prefix: int | None = None
    tensor_parallel: int | None = None
    timeout: int | None = None


def default_sides(device: str, quantize: str | None = None, tensor_parallel: int | None = None) -> list[str]:
    """All sides that can run here. flash-linear-attention needs to be installed, and needs a GPU."""
    if tensor_parallel:
        return [*SIDES_ON_RANKS]
    gpu = torch.device(device).type == "cuda"
    if QUANTIZED.get(quantize) in OF_TRANSFORMERS and not (gpu and importlib.util.find_spec("kernels")):
        return ["gdnfuse"]
    fla = importlib.util.find_spec("fla") is not None and gpu
    return [side for side in SIDES if side != "fla" or fla]


def check(settings: Settings) -> None:
    """Check before any work whether everything can be measured.

    Raises:
        GdnfuseError: something cannot be measured.
    """
    quantize = [settings.quantize] if settings.quantize else []
    on_ranks = [f"{side}:{way}" for side in SIDES for way in WAYS] + [f"gdnfuse:{way}{ranks.ONE_SHOT}" for way in WAYS]
    valid_sides = (*SIDES, *on_ranks) if settings.tensor_parallel else SIDES
    given = (
        ("side", settings.sides, valid_sides),
        ("phase", settings.phases, (*PHASES, PREFIX)),
        ("format", quantize, tuple(QUANTIZED)),
    )
    for what, found, valid in given:
        for name in found:
            if name not in valid:
                raise GdnfuseError(f"A {what} must be one of {', '.join(valid)}, found {name!r}.")
    if torch.device(settings.device).type not in DEVICES:
        raise GdnfuseError(f"The device must be of {' or '.join(DEVICES)}, found {settings.device!r}.")
    if settings.prefix is not None and (settings.prefix <= 0 or settings.prefix % TAIL):
        raise GdnfuseError(f"The known prefix must be a multiple of {TAIL} tokens, found {settings.prefix}.")
    if "fla" in settings.sides and importlib.util.find_spec("fla") is None:
        raise GdnfuseError(
            "The side fla needs flash-linear-attention, found none: pip install flash-linear-attention, or name other sides."
        )
    if settings.tensor_parallel:
        for name in ("quantize", "prefix"):
            if getattr(settings, name):
                raise GdnfuseError(f"--tensor-parallel measures steps and prompts of plain weights, found --{name} with it.")
        ranks.check(settings.tensor_parallel, settings.device)
    config_of(settings)


def config_of(settings: Settings) -> Any:
    """The config of the text model, with only its first `layers` layers."""
    config = load_config(settings.model).get_text_config(decoder=True)
    if settings.layers is not None:
        if settings.layers > config.num_hidden_layers:
            raise GdnfuseError(
                f"The model has {config.num_hidden_layers} layers: --layers must be at most that, found {settings.layers}."
            )
        config.num_hidden_layers = settings.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: settings.layers]
    return config


def has_weights(model: str) -> bool:
    """Whether a model is a folder with weights. Other models get random weights."""
    folder = Path(model).expanduser()
    return preset(model) is None and any(file for kind in ("*.safetensors", "pytorch_model*.bin") for file in folder.glob(kind))


def build(settings: Settings) -> torch.nn.Module:
    model = _plain(settings)
    return quantized(model, QUANTIZED[settings.quantize]) if settings.quantize else model


def _plain(settings: Settings) -> torch.nn.Module:
    dtype = getattr(torch, settings.dtype)
    if not has_weights(settings.model):
        torch.manual_seed(0)
        return random_model(config_of(settings), dtype, settings.device)
    folder = str(Path(settings.model).expanduser())
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, config=config_of(settings), dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as e:  # a checkpoint may be wrong in any way
        raise GdnfuseError(f"Cannot load {folder}: {one_line(e)}.") from e
    if missing := sorted(found["missing_keys"]):
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise GdnfuseError(f"{folder} must hold all weights of the model, found no {missing[0]}{others}.")
    return model.to(settings.device).eval().requires_grad_(False)


def compiled(side: str, phase: str, model: torch.nn.Module, settings: Settings) -> Callable[..., Any]:
    """The function that a side calls.

    On a GPU a step is compiled for CUDA graphs. A prompt is not, because it keeps a GPU busy anyway. Prompts have their own code,
    so that their sizes do not make sizes of steps dynamic.
    """
    (side, _), summed = ranks.split(side), side.endswith(ranks.ONE_SHOT)
    if side not in COMPILED:
        return model
    graphs = phase == "decode" and torch.device(settings.device).type == "cuda"
    how: dict[str, Any] = {"mode": "reduce-overhead" if graphs else None}
    if side == "gdnfuse":
        options = {"inner": settings.inner} if settings.inner != "inductor" else {}
        if summed and (most := links.one_shot_bytes(settings.device)):
            options["one_shot_bytes"] = most
        how = mode_or_options(how["mode"] if settings.inner == "inductor" else None, options)
    return torch.compile(with_own_code(model) if phase == "prefill" else model, backend=side, **how)


class Work:
    """What all workers of one batch have in common.

    Args:
        settings: with the device of this process.
        batch: number of sequences.
        folder: a folder that all workers share.
        way: how the model is split over the ranks of this process group; None if it is not split.
    """

    def __init__(self, settings: Settings, batch: int, folder: str, way: str | None = None):
        self.settings, self.batch, self.device, self.way = settings, batch, settings.device, way
        self.note = partial(note, folder)
        self.shared = Path(folder) / SHARED
        self.note("build the model")
        self.model = build(settings)
        if way:
            self.note("share the model out")
            self.model = ranks.shared_out(self.model, way, self.device)
        self.block = min(BLOCK, max(settings.new // 2, 1))
        self.steps = CHECKED + WARMUP + settings.new
        generator = torch.Generator(self.device).manual_seed(1)
        shape = (settings.prompt + self.steps, batch, 1)
        self.tokens = torch.randint(0, self.model.config.vocab_size, shape, device=self.device, generator=generator)

    def decoder(self, step: Callable[..., Any]) -> Decoder:
        return Decoder(self.model, step, self.prompt(), self.steps)

    def prompt(self) -> torch.Tensor:
        """The tokens of the prompt [B, prompt]."""
        return self.tokens[: self.settings.prompt].squeeze(-1).T.contiguous()

    def step_tokens(self, first: int, count: int) -> torch.Tensor:
        """The tokens [count, B, 1] of steps from the step `first` on."""
        return self.tokens[self.settings.prompt + first :][:count]

    def fill(self, call: Callable[..., Any]) -> torch.Tensor:
        """The logits of the last tokens of a prompt."""
        held = cache_argument(self.model, DynamicCache(config=self.model.config))
        return call(self.prompt(), **held, use_cache=True, logits_to_keep=CHECKED).logits

    def logits(self, phase: str, call: Callable[..., Any]) -> torch.Tensor:
        """The logits that are compared, in float32 on the CPU."""
        if phase == PREFIX:
            return self.first_token(0).float().cpu()
        if phase == "prefill":
            return self.fill(call).float().cpu()
        decode = self.decoder(call)
        return torch.stack([decode(t).float().cpu() for t in self.step_tokens(0, CHECKED)])

    def first_token(self, tail: int) -> torch.Tensor:
        """The logits of the first token from `generate`. All prompts have the same prefix and a different tail."""
        generator = torch.Generator(self.device).manual_seed(2)
        draw = lambda n: torch.randint(  # noqa: E731
            0, self.model.config.vocab_size, (self.batch, n), device=self.device, generator=generator
        )
        prefix = draw(self.settings.prefix)
        generator.manual_seed(3 + tail)
        wanted = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        prompt = torch.cat([prefix, draw(TAIL)], 1)
        return self.model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **wanted).logits[0]

    def reference(self) -> dict[str, Any]:
        """Write the logits in float32 that all sides are compared with. Returns the machine and what limits a step."""
        settings, model = self.settings, self.model
        facts: dict[str, Any] = {"weights": "the folder's" if has_weights(settings.model) else "random"}
        facts["layers"] = model.config.num_hidden_layers
        self.note("eager logits")
        with dequantized_calls(model):
            eager = {phase: self.logits(phase, model) for phase in settings.phases}
        if "decode" in settings.phases:
            facts["weight_bytes"] = weight_bytes(model, self.batch)
            facts["experts"] = getattr(model.config, "num_experts", None)
            facts["state_bytes"] = state_bytes(self.decoder(model).cache, settings.prompt + self.steps // 2)
            facts["bytes_per_second"] = bandwidth(self.device)
            facts["limit_ms"] = 1e3 * (facts["weight_bytes"] + facts["state_bytes"]) / facts["bytes_per_second"]
        self.note("logits in float32")
        widen(model)
        with dequantized_calls(model):
            exact = {phase: self.logits(phase, model) for phase in settings.phases}
        errors = {phase: difference(eager[phase], exact[phase]) for phase in settings.phases}
        torch.save({"exact": exact, "errors": errors}, self.shared)
        return {"machine": machine(self.device), "facts": {**facts, "eager_error": errors}}

    def side(self, side: str) -> dict[str, Any]:
        """Compile, check and time each phase. A phase that fails or is inaccurate gets no speed."""
        row: dict[str, Any] = {"side": side}
        if ranks.split(side)[0] == "fla":
            row["fla"] = fla_version()
        if self.way:
            row |= self.rank_facts()
        if side.endswith(ranks.ONE_SHOT):
            row["one_shot_bytes"] = links.one_shot_bytes(self.device)
        shared = torch.load(self.shared)
        # Prompts first, because CUDA graphs of steps keep their memory.
        for phase in sorted(self.settings.phases, reverse=True):
            with compat.fresh_cache():
                try:
                    row[phase] = self.measure(phase, side, shared["exact"][phase], shared["errors"][phase])
                except Exception as e:  # the other phase may still be measured
                    if self.way:
                        raise  # other ranks wait in a collective
                    traceback.print_exc()
                    row[phase] = {"failed": one_line(e)}
        return row

    def measure(self, phase: str, side: str, exact: torch.Tensor, eager_error: float) -> dict[str, Any]:
        self.note(f"{phase}, first call")
        known = len(gdnfuse.reports())
        if phase == PREFIX:
            figures = self.time_prefix(side, exact, eager_error)
            figures["graphs"] = [report.summary() for report in gdnfuse.reports()[known:]]
            figures["peak_bytes"] = self.peak()
            return figures
        call = compiled(side, phase, self.model, self.settings)
        if phase == "prefill":
            figures = self.time_prefill(call, exact, eager_error)
        else:
            new = self.settings.new
            steps = new if ranks.split(side)[0] in COMPILED else min(EAGER_STEPS, new)
            figures = self.time_decode(call, exact, eager_error, steps)
        figures["graphs"] = [report.summary() for report in gdnfuse.reports()[known:]]
        figures["peak_bytes"] = self.peak()
        return figures

    def time_prefill(self, call: Callable[..., Any], exact: torch.Tensor, eager_error: float) -> dict[str, Any]:
        self.forget_peak()
        got: list[torch.Tensor] = []
        figures: dict[str, Any] = {"first_call_seconds": seconds(lambda: got.append(self.fill(call)), self.device)}
        figures |= self.compare_logits(got.pop().float().cpu(), exact, eager_error)
        if figures["accurate"]:
            self.note(f"prefill, {PROMPTS} prompts")
            times = [1e3 * seconds(lambda: self.fill(call), self.device) for _ in range(PROMPTS)]
            figures |= speed(self.slowest(times), self.batch * self.settings.prompt)
        return figures

    def time_prefix(self, side: str, exact: torch.Tensor, eager_error: float) -> dict[str, Any]:
        """Time `generate` from call to return, for prompts whose prefix is known to sides that have a store."""
        store = None
        if side == "gdnfuse":
            store = gdnfuse.PrefixStore(self.model, max_bytes=1 << 40)
            gdnfuse.compile(self.model, inner=self.settings.inner, prefixes=store)
        elif side in COMPILED:
            self.model.compile()
        self.forget_peak()
        figures: dict[str, Any] = {"first_call_seconds": seconds(lambda: self.first_token(0), self.device)}
        figures |= compare_logits(self.first_token(0).float().cpu(), exact, eager_error)
        if not figures["accurate"]:
            return figures
        self.note(f"{PREFIX}, {PROMPTS} prompts")
        tails = itertools.count(1)
        self.first_token(next(tails))  # a new tail, like all that are timed
        taken = store.stats().tokens_taken if store else 0
        times = [1e3 * seconds(lambda: self.first_token(next(tails)), self.device) for _ in range(PROMPTS)]
        figures |= speed(times, self.batch * (self.settings.prefix + TAIL))
        if store:
            stats = store.stats()
            figures["tokens_taken"] = (stats.tokens_taken - taken) // (PROMPTS * self.batch)
            figures |= {"states": stats.states, "blocks": stats.blocks, "store_bytes": stats.device_bytes}
            figures |= {"state_bytes": store.state_bytes, "block_bytes": store.block_bytes}
            unknown = []
            for _ in range(PROMPTS):
                store.clear()
                unknown.append(1e3 * seconds(lambda: self.first_token(next(tails)), self.device))
            figures["unknown_ms"] = statistics.median(unknown)
        return figures

    def time_decode(self, call: Callable[..., Any], exact: torch.Tensor, eager_error: float, steps: int) -> dict[str, Any]:
        decode = self.decoder(call)
        self.forget_peak()
        got: list[torch.Tensor] = []
        first, *rest = self.step_tokens(0, CHECKED)
        figures: dict[str, Any] = {"first_call_seconds": seconds(lambda: got.append(decode(first).float().cpu()), self.device)}
        got += [decode(t).float().cpu() for t in rest]
        figures |= self.compare_logits(torch.stack(got), exact, eager_error)
        if figures["accurate"]:
            self.note(f"decode, {steps} steps")
            for t in self.step_tokens(CHECKED, WARMUP):
                decode(t)
            synchronize(self.device)
            times = time_steps(decode, self.step_tokens(CHECKED + WARMUP, steps), self.device, self.block)
            figures |= speed(self.slowest(times), self.batch) | {"steps": steps}
        return figures

    def compare_logits(self, found: torch.Tensor, exact: torch.Tensor, eager_error: float) -> dict[str, Any]:
        return ranks.worst(compare_logits(found, exact, eager_error)) if self.way else compare_logits(found, exact, eager_error)

    def slowest(self, times: list[float]) -> list[float]:
        return ranks.slowest(times) if self.way else times

    def rank_facts(self) -> dict[str, Any]:
        """For a side on several ranks: how many there are, what each holds, and what limits a step."""
        facts: dict[str, Any] = {
            "ranks": self.settings.tensor_parallel,
            "held_bytes": max(ranks.everywhere(ranks.held(self.model))),
        }
        if "decode" in self.settings.phases:
            tokens = self.settings.prompt + self.steps // 2
            facts |= ranks.step_facts(self.model, lambda: self.decoder(self.model), self.step_tokens(0, 1)[0], tokens)
        return facts

    def forget_peak(self) -> None:
        if torch.device(self.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        """The peak of the device's memory that tensors took since `forget_peak`, in bytes."""
        return torch.cuda.max_memory_allocated(self.device) if torch.device(self.device).type == "cuda" else None


def speed(times: list[float], tokens: int) -> dict[str, float]:
    """The figures of calls of `tokens` tokens each that took these milliseconds."""
    ms = statistics.median(times)
    return {"ms": ms, "ms_min": min(times), "ms_max": max(times), "tokens_per_second": 1e3 * tokens / ms}


def worker(argv: Sequence[str]) -> None:
    """The program of a worker. Its arguments are settings and batch as JSON, `--worker`, side, model, folder."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    given, _, side, _, folder = argv
    data = json.loads(given)
    batch = data.pop("this_batch")
    name, way = ranks.split(side)
    show_fla(name)

    def work() -> dict[str, Any]:
        with torch.no_grad():
            task = Work(Settings(**data), batch, folder, way)
            return task.reference() if side == "reference" else task.side(side)

    if way is None:
        answer(work)
        return
    try:
        data["device"] = ranks.join(data["device"])
        row = work()
    except Exception as e:
        say_failed(folder, e)
        raise
    if torch.distributed.get_rank() == 0:
        answer(lambda: row)
    torch.compiler.reset()  # NCCL does not end while a CUDA graph holds a collective
    torch.distributed.destroy_process_group()


def run(settings: Settings, debug: bool = False) -> dict[str, Any]:
    """Measure all sides, one process after another. If interrupted, it ends with the figures so far.

    If the process of a side fails in one phase or takes too long, another process measures the other phase.

    Args:
        settings: settings that were checked.
        debug: show what failed processes print.

    Returns:
        Plain data for JSON: "schema", "machine", "arguments" and "results". There is one result per batch, with the facts of the
            reference and a row per side. A row has "decode" and "prefill", or "failed". So may a phase. A phase with neither "ms"
            nor "failed" was inaccurate.

    Raises:
        GdnfuseError: the model itself does not run.
    """
    data: dict[str, Any] = {"schema": SCHEMA, "machine": {}, "arguments": dataclasses.asdict(settings)}
    data["results"] = []
    for batch in settings.batch:
        again = partial(without_failed, settings, batch)
        how = {"quiet": not debug, "title": f"{settings.model}, batch {batch}", "timeout": settings.timeout, "again": again}
        interrupted = False
        try:
            first, rows = run_sides(
                partial(program, settings), settings.model, settings.sides, worker_argv(settings, batch), **how
            )
        except Interrupted as e:
            first, rows, interrupted = e.first, e.rows, True
        except KeyboardInterrupt:
            if not data["results"]:
                raise
            break
        if not first["machine"] and not data["results"]:
            raise GdnfuseError(f"The model could not be run: {rows[0]['failed'].removeprefix('GdnfuseError: ')}")
        data["machine"] |= first["machine"]
        data["results"].append({"batch": batch, **first.get("facts", {}), "sides": rows})
        if interrupted:
            break
    return data


def program(settings: Settings, side: str) -> list[str]:
    """The arguments of Python that start the worker of a side, or all its ranks."""
    return ranks.program(settings.tensor_parallel) if ranks.split(side)[1] else ["-m", "gdnfuse.bench"]


def worker_argv(settings: Settings, batch: int, **changes: Any) -> list[str]:
    """The arguments of a worker before `--worker`."""
    return [json.dumps({**dataclasses.asdict(settings), "this_batch": batch, **changes})]


def without_failed(settings: Settings, batch: int, step: str) -> tuple[str, list[str]] | None:
    """The phase whose step failed, and the arguments of a worker for the other phase."""
    failed = next((phase for phase in settings.phases if step.startswith(phase)), None)
    others = [phase for phase in settings.phases if phase != failed]
    return (failed, worker_argv(settings, batch, phases=others)) if failed and others else None


def tables(data: dict[str, Any]) -> str:
    """The machine, the limit, and one table per phase."""
    arguments, parts = data["arguments"], []
    where = data["machine"].get("gpu") if torch.device(arguments["device"]).type == "cuda" else None
    where = where or f"CPU, {data['machine'].get('cpu_threads')} threads"
    known = next((r for r in data["results"] if "weights" in r), None)
    weights = f", {known['layers']} layers, {known['weights']} weights" if known else ""
    dtype = f"{arguments['quantize']} and {arguments['dtype']}" if arguments["quantize"] else arguments["dtype"]
    parts.append(f"{arguments['model']}{weights}, {dtype}, {where}")
    for result in data["results"]:
        if "limit_ms" in result:
            gb, rate = [result[k] / 1e9 for k in ("weight_bytes", "state_bytes")], result["bytes_per_second"] / 1e9
            chosen = ", of the experts those that it chooses," if result["experts"] else ""
            parts[0] += (
                f"\nbatch {result['batch']}: a step reads {gb[0]:.3g} GB of weights{chosen} and moves {gb[1]:.3g} GB of states, "
                f"keys and values: {result['limit_ms']:.3g} ms at the {rate:.4g} GB/s of a copy here"
            )
        parts[0] += "".join(f"\nbatch {result['batch']}, {on_ranks(row)}" for row in result["sides"] if "limit_ms" in row)
    for phase in arguments["phases"]:
        rows = [row for result in data["results"] for row in phase_rows(result, phase)]
        parts.append(f"{titles(arguments)[phase]}\n{table(rows)}")
    ours = [(r["batch"], row.get(phase, {})) for r in data["results"] for row in r["sides"] for phase in arguments["phases"]]
    parts.append("\n".join(f"batch {batch}, {line}" for batch, found in ours for line in found.get("graphs", ())))
    return "\n\n".join(filter(None, parts))


def on_ranks(row: dict[str, Any]) -> str:
    """What limits a step of a side on several ranks, in words."""
    gb = [row[k] / 1e9 for k in ("held_bytes", "weight_bytes", "state_bytes")]
    found = " and ".join(f"{count} {name}" for name, count in row["collectives"].items())
    return (
        f"{row['side']}: each of {row['ranks']} ranks holds {gb[0]:.3g} GB of weights, and in a step reads {gb[1]:.3g} GB, moves "
        f"{gb[2]:.3g} GB of states, keys and values, and waits for {found}: {row['limit_ms']:.3g} ms with "
        f"{row['collective_bytes'] / 1e6:.3g} MB at the {row['link_bytes_per_second'] / 1e9:.4g} GB/s of a large all-reduce; one "
        f"of a step's size takes {row['all_reduce_us']:.3g} µs"
    )


def titles(arguments: dict[str, Any]) -> dict[str, str]:
    """What the figures of each phase measure."""
    return {
        "decode": f"Decode, {arguments['new']} steps",
        "prefill": f"Prefill, {arguments['prompt']} tokens",
        PREFIX: f"First token of generate, {arguments['prefix']} tokens of a known prefix and {TAIL} others",
    }


def phase_rows(result: dict[str, Any], phase: str) -> list[dict[str, str]]:
    rows = []
    for row in result["sides"]:
        found = row.get(phase, {})
        ms, peak, error = found.get("ms"), found.get("peak_bytes"), found.get("error")
        limit = row.get("limit_ms", result.get("limit_ms")) if phase == "decode" else None
        rows.append(
            {
                "batch": str(result["batch"]),
                "side": row["side"],
                "ms per step" if phase == "decode" else "ms": f"{ms:.4g}" if ms else "failed" if error is None else "wrong",
                "tokens/s": f"{found['tokens_per_second']:.4g}" if ms else "",
                "of the limit": f"{100 * limit / ms:.0f} %" if ms and limit else "",
                "cold first call (s)": f"{found['first_call_seconds']:.1f}"
                if error is not None and ranks.split(row["side"])[0] in COMPILED
                else "",
                **({"unknown (ms)": f"{found['unknown_ms']:.4g}" if "unknown_ms" in found else ""} if phase == PREFIX else {}),
                **({"tokens taken": str(found.get("tokens_taken", ""))} if phase == PREFIX else {}),
                "peak GiB": f"{peak / 2**30:.2f}" if peak else "",
                "error / eager's": f"{error:.1e} / {result['eager_error'][phase]:.1e}" if error is not None else "",
            }
        )
    return rows


def sides_without_speed(data: dict[str, Any]) -> list[str]:
    """A sentence for each missing speed, with the reason."""
    sentences = []
    for result in data["results"]:
        for row in result["sides"]:
            at = f"{row['side']}, batch {result['batch']}"
            if "failed" in row:
                sentences.append(f"No speed of {at}: {row['failed']}")
            for phase in data["arguments"]["phases"]:
                found = row.get(phase, {})
                if "failed" in found:
                    sentences.append(f"No speed of {at}, {phase}: {found['failed']}")
                elif found and not found["accurate"]:
                    error = f"their error is {found['error']:.1e}, eager's {result['eager_error'][phase]:.1e}"
                    sentences.append(f"No speed of {at}, {phase}: its logits must be float32's, but {error}.")
    return sentences


def plot(data: dict[str, Any], target: Path) -> None:
    """Plot the milliseconds of each phase by side and batch. The suffix of the file decides the format."""
    from matplotlib.figure import Figure

    from gdnfuse.bench.plot import caption, grouped_bars, save

    arguments, results = data["arguments"], data["results"]
    figure = Figure(figsize=(6 * len(arguments["phases"]) + 2, 4.5), layout="constrained")
    for axes, phase in zip(figure.subplots(1, len(arguments["phases"]), squeeze=False)[0], arguments["phases"], strict=True):
        rows = [{row["side"]: row.get(phase, {}).get("ms") for row in r["sides"]} for r in results]
        limits = [r.get("limit_ms") if phase == "decode" else None for r in results]
        grouped_bars(axes, [f"batch {r['batch']}" for r in results], rows, limits, 2)
        what = {"decode": "Decode step", "prefill": f"Prompt of {arguments['prompt']} tokens"}.get(
            phase, titles(arguments)[phase]
        )
        axes.set(title=what, ylabel="ms (lower is better)")
    rate = next((r["bytes_per_second"] for r in results if "bytes_per_second" in r), None)
    limit = f"limit: weights, states, keys and values once at {rate / 1e9:.4g} GB/s, measured with a copy" if rate else ""
    conditions = [arguments["model"], arguments["dtype"], f"{arguments['prompt']} tokens in the cache", limit, "median"]
    with replacing(target) as partial:
        save(figure, caption(data, conditions), partial)


def check_plot(target: Path) -> None:
    """Check before any work whether a plot can be drawn and written.

    Raises:
        GdnfuseError: it cannot.
    """
    if target.suffix not in (".png", ".pdf", ".svg"):
        raise GdnfuseError(f"A plot's file must end in .png, .pdf or .svg, found {str(target)!r}.")
    check_writable(target)
    if importlib.util.find_spec("matplotlib") is None:
        raise GdnfuseError("A plot needs matplotlib, which is not installed: pip install 'gdnfuse[plot]'.")
