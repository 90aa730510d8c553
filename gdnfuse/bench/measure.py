"""What is measured and how: a decode step, a prompt, their logits, and the bandwidth that limits a step.

Times are medians. Decode steps are timed in blocks in which the host waits for nothing, like a decode loop that reads no token.
On a GPU a block is between two events, and an untimed step comes before it. Otherwise the device would idle until the host has
launched the first step, which happens only once in a long loop. The time of a step that the host waits for, as `generate` does to
see whether a text has ended, is a separate figure. Prompts are waited for. Calls of a kernel are timed in a CUDA graph.
"""

from __future__ import annotations

import itertools
import math
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from gdnfuse import compat
from gdnfuse.capture_fp8 import dequantized_calls
from gdnfuse.generation.caches import cache_argument
from gdnfuse.versions import version

SLACK = 1.5  # allowed error as a multiple of eager's, because the error of a few steps is random
FLOOR = 1e-5  # relative error that is always allowed, because a float32 model is its own reference
BLOCK = 8
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes, more than caches hold
REDUCED = {"cuda": 2**28, "cpu": 2**20}  # bytes of a large all-reduce
SETTLING = 40  # untimed replays in a sweep: after one, what was measured first took up to a tenth longer than later
COLD_BYTES = 4 * 60e6  # four times the L2 of an H200: after reading so many other bytes, data come from memory
COPIES, ROUNDS = {"cuda": 10, "cpu": 1}, 10  # how many copies are timed together, and how often


class Decoder:
    """The decode loop of one side: a cache filled by an eager prompt, of fixed length or growing, and steps over given tokens."""

    def __init__(self, model: torch.nn.Module, step: Callable[..., Any], prompt: torch.Tensor, room: int, dynamic: bool = False):
        self.step, self.prompt = step, prompt
        static = {} if dynamic else {"max_cache_len": prompt.shape[1] + room}
        self.cache = (DynamicCache if dynamic else StaticCache)(config=model.config, **static)
        self.held = cache_argument(model, self.cache)
        # Eager, so that states exist at fixed addresses before a CUDA graph is recorded.
        with dequantized_calls(model):
            model(prompt, **self.held, use_cache=True, logits_to_keep=1)

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self.step(token, **self.held, use_cache=True).logits


def weight_bytes(model: torch.nn.Module, batch: int = 1) -> int:
    """Bytes of weights that one step must read on this rank. Only rows of the embedding are read, unless the head is tied to it.

    For a mixture of experts, each token chooses `num_experts_per_tok` experts per layer. If tokens choose by chance, they share
    some.
    """
    config, total = model.config, 0
    seen: set[int] = set()
    for name, p in model.named_parameters():
        embedding = name.endswith("embed_tokens.weight") and not config.tie_word_embeddings
        p = p.to_local() if compat.is_sharded(p) else p
        if p.data_ptr() in seen or embedding:
            continue
        seen.add(p.data_ptr())
        share = experts_read(config, batch) if ".experts." in name else 1
        total += int(p.numel() * p.element_size() * share)
    return total


def experts_read(config: Any, batch: int) -> float:
    """The share of a model's experts that a step with so many tokens reads if each chooses by chance. 1 without experts."""
    experts = getattr(config, "num_experts", None)
    return 1 - (1 - config.num_experts_per_tok / experts) ** batch if experts else 1.0


def state_bytes(cache: Any, tokens: int) -> int:
    """Bytes of a cache that a step reads and writes: states twice, and the keys and values of `tokens` tokens."""
    total = 0
    for layer in cache.layers:
        for held in ("conv_states", "recurrent_states"):
            total += sum(2 * t.nbytes for t in getattr(layer, held, {}).values() if isinstance(t, torch.Tensor))
        for t in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(t, torch.Tensor) and t.ndim == 4:
                total += t.nbytes * min(tokens, t.shape[2]) // t.shape[2]
    return total


def bandwidth(device: str) -> float:
    """Bytes per second that copies of a large tensor read and write on a device.

    On a GPU several copies are between two events, after an untimed one, so the device never waits for the host.
    """
    kind = torch.device(device).type
    source = torch.ones(COPIED[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies, times = COPIES[kind], []
    for _ in range(ROUNDS + 1):  # one to warm up
        if kind == "cuda":
            with torch.cuda.device(device):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                target.copy_(source)
                start.record()
                for _ in range(copies):
                    target.copy_(source)
                end.record()
                end.synchronize()
            times.append(1e-3 * start.elapsed_time(end))
        else:
            times.append(seconds(lambda: [target.copy_(source) for _ in range(copies)], device))
    return copies * 2 * source.nbytes / statistics.median(times[1:])


class Collectives:
    """The collectives of eager calls: how many there are of each name, and the bytes of their results."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def moved(self, ranks: int) -> int:
        """The least bytes that a rank receives: a sum is moved twice, and a gather brings the parts of the others."""
        return int(sum(b * (1 + (name == "all_reduce")) * (ranks - 1) / ranks for name, b in self.bytes.items()))

    def see(self, op: Any, result: Any) -> None:
        name = str(op).split(".")[1]
        if op.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor" and not name.startswith("_"):
            name = {"allreduce_": "all_reduce", "all_gather_into_tensor": "all_gather"}.get(name, name)
            self.found[name] += 1
            self.bytes[name] += sum(t.nbytes for t in compat.tree_leaves(result) if isinstance(t, torch.Tensor))


def link(device: str, shape: Sequence[int], dtype: torch.dtype) -> dict[str, float]:
    """The speed of the connection between ranks: the rate of a large all-reduce, and the time of one of the size of a step's.

    The rate counts what each rank must send and receive, 2 (ranks - 1) / ranks of the tensor, in bytes per second. The time is in
    microseconds. On a GPU it is measured inside a CUDA graph, as in steps.
    """
    ranks, kind = torch.distributed.get_world_size(), torch.device(device).type
    large = torch.zeros(REDUCED[kind], dtype=torch.uint8, device=device)
    small = torch.zeros(*shape, dtype=dtype, device=device)
    reduce = lambda x: torch.distributed.all_reduce(x)  # noqa: E731
    times = [seconds(lambda: reduce(large), device) for _ in range(ROUNDS + 1)]
    rate = 2 * (ranks - 1) / ranks * large.nbytes / statistics.median(times[1:])
    if kind == "cuda":
        us = statistics.median(replayed(reduce, [small], launches=50))
    else:
        us = 1e6 * statistics.median(seconds(lambda: reduce(small), device) for _ in range(ROUNDS))
    return {"link_bytes_per_second": rate, "all_reduce_us": us}


def replayed(
    call: Callable[[Any], Any], sets: Sequence[Any], launches: int = 1, replays: int = 15, keep: bool = False, untimed: int = 1
) -> list[float]:
    """Microseconds per call, for each replay of a CUDA graph that calls with one set of arguments after another.

    The host is not involved. A set is cold when its turn comes, if all sets together exceed COLD_BYTES.

    Args:
        call: a function of a set.
        sets: sets of arguments, used in turn.
        launches: the least number of calls in the graph. All sets are used equally often.
        replays: timed replays.
        keep: whether each result has its own memory. Otherwise a call may write where an earlier result was.
        untimed: replays before them, at least one. After other work a device is slower at first. Their number is given, and not
            their time, because ranks that send to each other must all do as many.
    """
    for each in sets:
        call(each)
    torch.cuda.synchronize()
    passes = math.ceil(launches / len(sets))
    graph, kept = torch.cuda.CUDAGraph(), []
    # Only for this thread, because NCCL's own thread queries its events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for each in itertools.chain.from_iterable(itertools.repeat(sets, passes)):
            kept.append(call(each))
            if not keep:
                kept.clear()
    times = []
    for _ in range(untimed + replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / (passes * len(sets)))
    return times[untimed:]


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: str) -> float:
    """Seconds of a call that the host waits for."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def time_steps(
    decode: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, device: str, size: int = BLOCK
) -> list[float]:
    """Milliseconds per step, for each block of `size` steps. On a GPU by CUDA events, after one more step."""
    times: list[float] = []
    cuda = torch.device(device).type == "cuda"
    for block in tokens.split(size + cuda):
        if cuda:
            if len(block) > 1:
                decode(block[0])
                block = block[1:]
            elif times:  # a remaining single step has no step before it
                break
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for token in block:
                decode(token)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / len(block))
        else:
            begin = time.perf_counter()
            for token in block:
                decode(token)
            times.append(1e3 * (time.perf_counter() - begin) / len(block))
    return times


def time_waited(decode: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, device: str) -> float:
    """The median of milliseconds per step if the host waits for each step."""
    return statistics.median(1e3 * seconds(partial(decode, token), device) for token in tokens)


def widen(model: torch.nn.Module) -> None:
    """Turn a model to float32, each decoder layer only while it runs. The largest models fit the device only in bfloat16."""
    layers = model.get_decoder().layers
    everything, in_layers = weights_of(model), {id(w) for layer in layers for w in weights_of(layer)}
    for w in everything:
        if id(w) not in in_layers:
            w.data = w.data.float()
    for layer in layers:
        narrow = [(w, w.data) for w in weights_of(layer)]

        def before(*_: Any, narrow=narrow) -> None:
            for w, data in narrow:
                w.data = data.float()

        def narrow_again(*_: Any, narrow=narrow) -> None:
            for w, data in narrow:
                w.data = data

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(narrow_again)


def weights_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [t for t in itertools.chain(module.parameters(), module.buffers()) if t.is_floating_point()]


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    return float((found.double() - wanted).norm() / wanted.double().norm())


def compare_logits(found: torch.Tensor, wanted: torch.Tensor, eager_error: float) -> dict[str, Any]:
    """Compare logits with those in float32: {"error", "finite", "accurate"}."""
    finite, error = bool(torch.isfinite(found).all()), difference(found, wanted)
    return {"error": error, "finite": finite, "accurate": finite and error <= SLACK * eager_error + FLOOR}


def machine(device: str | None = None) -> dict[str, Any]:
    """What the figures were measured on. `device` is the GPU, if it is not the first."""
    gpu = device if device and torch.device(device).type == "cuda" else None
    return {
        "gpu": torch.cuda.get_device_name(gpu) if torch.cuda.is_available() else None,
        "cpu": platform.processor() or platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{package: version(package) for package in ("triton", "transformers", "gdnfuse")},
    }
