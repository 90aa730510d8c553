"""Real graphs of a tiny Qwen3.5, some with experts, to mutate: steps and prompts, captured and not, in float32 and bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.fx import GraphModule

import gdnfuse.backend  # noqa: F401  capture is installed with it
from tests.models import zoo

# Keys and values of one width, so that their axes can be exchanged; heads, sequences and tokens are of others.
SIZES = {
    "hidden_size": 24, "intermediate_size": 20, "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
# Fewer are chosen than there are, which a rounding can flip: in float32 none did.
EXPERTS = {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 10, **zoo.SMALL,
}  # fmt: skip
LENGTH = 96  # of a static cache


@dataclass(frozen=True)
class Source:
    """A call of the model. Several numbers of tokens give the graph for any number, called with the second and the third."""

    batch: int
    tokens: tuple[int, ...] = (1,)
    cache: str = "static"
    filled: bool = True
    capture: bool = False
    dtype: torch.dtype = torch.float32
    padded: bool = False
    experts: bool = False


BF16 = torch.bfloat16
SOURCES = {
    "step": Source(2),
    "step of one sequence": Source(1),
    "step of four, padded, bfloat16": Source(4, dtype=BF16, padded=True),
    "step of one, bfloat16": Source(1, cache="dynamic", dtype=BF16),
    "captured step": Source(4, cache="dynamic", capture=True),
    "captured prompt": Source(2, (13, 9, 70), filled=False, capture=True, padded=True),
    "captured continuation": Source(2, (11, 7, 66), cache="dynamic", capture=True, dtype=BF16),
    "captured prompt on a filled cache": Source(2, (70,), capture=True, padded=True),
    "prompt": Source(2, (70,), cache="dynamic", filled=False),
    "step of experts": Source(1, experts=True),
    "captured step of experts": Source(3, experts=True, capture=True),
}


@functools.cache
def graph_of(name: str) -> tuple[GraphModule, list[Sequence[Any]]]:
    """Dynamo's last graph, and the arguments of every call of it, from before the call."""
    source, graphs, calls = SOURCES[name], [], []

    def backend(gm, inputs):
        graphs.append(gm)
        calls.clear()

        def run(*args):
            calls.append([x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args])
            return gm(*args)

        return run

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = (zoo.moe(**SIZES, **EXPERTS) if source.experts else zoo.causal_lm(**SIZES)).to(source.dtype)
    with torch.no_grad(), mock.patch.dict("os.environ", {"GDNFUSE_DISABLE": "" if source.capture else "1"}):
        run = torch.compile(model, backend=backend, fullgraph=True)
        for length in source.tokens:
            run(**zoo.held((call := _call(model, source, length)).pop("cache")), **call)
    torch._dynamo.reset()
    assert len(calls) == max(1, len(source.tokens) - 1)
    return graphs[-1], calls


def _call(model: torch.nn.Module, source: Source, length: int) -> dict[str, Any]:
    cache, mask = zoo.new_cache(model, source.cache, LENGTH), None
    if source.filled:
        cache, mask = zoo.prefill(model, source.batch, source.cache, source.padded, LENGTH)
    ids, new = zoo.prompt(source.batch, length, padded=source.padded, seed=2)
    if source.padded:
        mask = new if mask is None else torch.cat([mask, mask.new_ones(source.batch, LENGTH - mask.shape[1])], 1)
    return {"cache": cache, "input_ids": ids, "attention_mask": mask}
