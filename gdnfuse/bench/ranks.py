"""Sides on several ranks: torchrun starts one process per rank, with its part of the model, and all measure together."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from gdnfuse import compat, versions
from gdnfuse.bench.measure import Collectives, bandwidth, link, state_bytes, weight_bytes
from gdnfuse.errors import GdnfuseError
from gdnfuse.generation import shards
from gdnfuse.generation.links import everywhere

ONE_SHOT = ":one_shot"  # suffix of a side of gdnfuse whose small sums go through symmetric memory where that is faster
BACKENDS = {"cuda": "nccl", "cpu": "gloo"}


def split(side: str) -> tuple[str, str | None]:
    """For "gdnfuse:heads": the side, and how the model is split. For a side on one device the second is None."""
    name, _, way = side.removesuffix(ONE_SHOT).partition(":")
    return name, way or None


def check(ranks: int, device: str) -> None:
    """Check whether so many ranks can be started here.

    Raises:
        GdnfuseError: they cannot.
    """
    if sentence := versions.older("transformers", shards.TRACEABLE):
        raise GdnfuseError(f"Sides on several ranks need tensor parallel that torch.compile can trace: {sentence}")
    if device not in BACKENDS:
        raise GdnfuseError(f"Sides on several ranks take the first devices of a kind, cuda or cpu, found the device {device!r}.")
    if device == "cuda" and torch.cuda.device_count() < ranks:
        raise GdnfuseError(f"{ranks} ranks need a GPU each, found {torch.cuda.device_count()}: give fewer, or --device cpu.")


def program(ranks: int) -> list[str]:
    """The arguments of Python that start this package's workers, one per rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = ["--master-addr", "127.0.0.1", "--master-port", str(port)]  # a host may not be able to resolve its own name
    return ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *where, "-m", "gdnfuse.bench"]


def join(device: str) -> str:
    """Join the process group of torchrun. Returns the device of this rank."""
    if device == "cpu":
        dist.init_process_group(BACKENDS[device])
        return device
    own = torch.device(device, int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    dist.init_process_group(BACKENDS[device], device_id=own)
    return str(own)


def shared_out(model: torch.nn.Module, way: str, device: str) -> torch.nn.Module:
    """Split a model that every rank has whole, by transformers' plan, or with its mixers cut by heads.

    Raises:
        GdnfuseError: on every rank, with the error of one rank.
    """
    mesh = dist.init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    shards.share_out(model, model.tp_plan, mesh)
    dist.barrier()
    agreement = shards.agreement(way)
    with agreement.reached():
        plan = shards.plan(way, model)
    shards.prepare(model, *plan, agreement)
    return model


def worst(found: dict[str, Any]) -> dict[str, Any]:
    """The result of `measure.compare_logits` over all ranks. Either all ranks go on or none."""
    each = everywhere(found)
    good = {name: all(one[name] for one in each) for name in ("finite", "accurate")}
    return {"error": max(one["error"] for one in each), **good}


def slowest(times: list[float]) -> list[float]:
    """For each time, the longest of all ranks."""
    return [max(same) for same in zip(*everywhere(times), strict=True)]


def held(model: torch.nn.Module) -> int:
    """Bytes of memory of this rank's parts of all weights."""
    parts = [p.to_local() if compat.is_sharded(p) else p for p in model.parameters()]
    return sum({s.data_ptr(): s.nbytes() for s in (part.untyped_storage() for part in parts)}.values())


def step_facts(model: torch.nn.Module, decoder: Callable[[], Any], token: torch.Tensor, tokens: int) -> dict[str, Any]:
    """What limits a step on several ranks, for the rank with the most bytes.

    Args:
        model: a split model.
        decoder: makes an eager decoder.
        token: [B, 1], of a step.
        tokens: tokens in the cache at a step of average length.
    """
    decode, device, B = decoder(), str(token.device), token.shape[0]
    seen = Collectives()
    with compat.seeing_ops(seen.see):
        decode(token)
    ranks = dist.get_world_size()
    facts: dict[str, Any] = {
        "weight_bytes": max(everywhere(weight_bytes(model, B))),
        "state_bytes": max(everywhere(state_bytes(decode.cache, tokens))),
        "collectives": dict(seen.found),
        "collective_bytes": seen.moved(ranks),
        "bytes_per_second": min(everywhere(bandwidth(device))),
        **link(device, (B, 1, model.config.hidden_size), model.dtype),
    }
    alone = (facts["weight_bytes"] + facts["state_bytes"]) / facts["bytes_per_second"]
    facts["limit_ms"] = 1e3 * (alone + facts["collective_bytes"] / facts["link_bytes_per_second"])
    return facts
