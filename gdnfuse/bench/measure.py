"""What is measured and how: a decode step, a prompt, the logits that must be right first, and the bandwidth that limits a step.

Times are medians. A decode step is timed in blocks of steps with nothing waited for inside, as a decode loop runs that reads no
token back. On a GPU a block is between two events, and a step that is not timed goes before it: otherwise the device would idle
until the host has launched the first one, which a long loop meets once. What a step takes where each is waited for, as `generate`
does to see whether a text has ended, is a figure of its own. A prompt is waited for; a kernel's calls are timed in a CUDA graph.
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

SLACK = 1.5  # error allowed, in units of eager's own: of a few steps it is a draw
FLOOR = 1e-5  # relative error allowed whatever eager's is: a float32 model is its own reference
BLOCK = 8
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes, more than caches hold
REDUCED = {"cuda": 2**28, "cpu": 2**20}  # bytes of a large all-reduce
COLD_BYTES = 4 * 60e6  # four times an H200's L2: what is read behind so many other bytes comes from memory
COPIES, ROUNDS = {"cuda": 10, "cpu": 1}, 10  # copies that are timed together, and how many times


class Decoder:
    """One side's decode: a cache filled by an eager prefill, with room for more tokens or dynamic, and steps over given ones."""

    def __init__(self, model: torch.nn.Module, step: Callable[..., Any], prompt: torch.Tensor, room: int, dynamic: bool = False):
        self.step, self.prompt = step, prompt
        static = {} if dynamic else {"max_cache_len": prompt.shape[1] + room}
        self.cache = (DynamicCache if dynamic else StaticCache)(config=model.config, **static)
        self.held = cache_argument(model, self.cache)
        # Eager, so that the cached states exist, at static addresses, before a CUDA graph is recorded.
        with dequantized_calls(model):
            model(prompt, **self.held, use_cache=True, logits_to_keep=1)

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self.step(token, **self.held, use_cache=True).logits


def weight_bytes(model: torch.nn.Module, batch: int = 1) -> int:
    """Bytes of weights that one step must read on this rank. Of the embedding only rows are read, unless the head is tied to it.

    A mixture of experts reads the experts that the step chooses: `num_experts_per_tok` per token and layer, of which several
    tokens, choosing by chance, have some in common.
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
    """The share of a model's experts that a step of so many tokens reads if each chooses by chance; 1 where there are none."""
    experts = getattr(config, "num_experts", None)
    return 1 - (1 - config.num_experts_per_tok / experts) ** batch if experts else 1.0


def state_bytes(cache: Any, tokens: int) -> int:
    """Bytes that a step reads and writes of a cache: its states both ways, and of keys and values those of `tokens` tokens."""
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

    On a GPU several copies stand in the stream between two events, behind one that is not timed, so that the device never waits
    for the host.
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
    """The collectives of eager calls: how many there are of a name, and the bytes of their results."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def moved(self, ranks: int) -> int:
        """Bytes that a rank receives at least: of a sum there are two ways, a gather brings the others' parts."""
        return int(sum(b * (1 + (name == "all_reduce")) * (ranks - 1) / ranks for name, b in self.bytes.items()))

    def see(self, op: Any, result: Any) -> None:
        name = str(op).split(".")[1]
        if op.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor" and not name.startswith("_"):
            name = {"allreduce_": "all_reduce", "all_gather_into_tensor": "all_gather"}.get(name, name)
            self.found[name] += 1
            self.bytes[name] += sum(t.nbytes for t in compat.tree_leaves(result) if isinstance(t, torch.Tensor))


def link(device: str, shape: Sequence[int], dtype: torch.dtype) -> dict[str, float]:
    """What the ranks' connection does: the rate of a large all-reduce, and the microseconds of one of a tensor as a step has.

    The rate is what each rank sends and receives at least, 2 (ranks - 1) / ranks of the tensor, in bytes per second. On a GPU
    the small one is timed inside a CUDA graph, as steps run.
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
    call: Callable[[Any], Any], sets: Sequence[Any], launches: int = 1, replays: int = 15, keep: bool = False
) -> list[float]:
    """Microseconds per call of each replay of a CUDA graph that calls with one set of arguments after another.

    The host has no part in it, and a set is cold when its turn comes if all of them together exceed COLD_BYTES.

    Args:
        call: takes a set.
        sets: of arguments, in turn.
        launches: calls in the graph at least; the sets are gone through as often as that takes, whole.
        replays: that are timed, after one that is not.
        keep: whether each result has memory of its own; else a call may write where an earlier result was.
    """
    for each in sets:
        call(each)
    torch.cuda.synchronize()
    passes = math.ceil(launches / len(sets))
    graph, kept = torch.cuda.CUDAGraph(), []
    # Of this thread alone: NCCL's own asks its events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for each in itertools.chain.from_iterable(itertools.repeat(sets, passes)):
            kept.append(call(each))
            if not keep:
                kept.clear()
    times = []
    for _ in range(replays + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / (passes * len(sets)))
    return times[1:]


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: str) -> float:
    """Of a call that is waited for."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def time_steps(
    decode: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, device: str, size: int = BLOCK
) -> list[float]:
    """Milliseconds per step of each block of `size` steps, by CUDA events and behind one more step on a GPU."""
    times: list[float] = []
    cuda = torch.device(device).type == "cuda"
    for block in tokens.split(size + cuda):
        if cuda:
            if len(block) > 1:
                decode(block[0])
                block = block[1:]
            elif times:  # a step that is left over has none before it
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
    """The median of milliseconds per step where each step is waited for."""
    return statistics.median(1e3 * seconds(partial(decode, token), device) for token in tokens)


def widen(model: torch.nn.Module) -> None:
    """Turn a model to float32, but each decoder layer only while it runs: the largest fit the device in bfloat16 alone."""
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

        def behind(*_: Any, narrow=narrow) -> None:
            for w, data in narrow:
                w.data = data

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(behind)


def weights_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [t for t in itertools.chain(module.parameters(), module.buffers()) if t.is_floating_point()]


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    return float((found.double() - wanted).norm() / wanted.double().norm())


def compare_logits(found: torch.Tensor, wanted: torch.Tensor, eager_error: float) -> dict[str, Any]:
    """Whether logits are near enough to those in float32: {"error", "finite", "accurate"}."""
    finite, error = bool(torch.isfinite(found).all()), difference(found, wanted)
    return {"error": error, "finite": finite, "accurate": finite and error <= SLACK * eager_error + FLOOR}


def machine(device: str | None = None) -> dict[str, Any]:
    """What the figures were measured on; `device` says on which GPU, if it is not the first."""
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
