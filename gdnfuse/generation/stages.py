"""Stages: models that transformers' pipeline parallel (`pp_size`) splits over ranks, each with some of the layers.

A call of such a model receives hidden states from the rank before, calls the model inside and sends on what that answers. No
graph can send, so the model inside is what is compiled. To the cache the layers of other ranks look as if they had seen nothing.
transformers makes masks by the first attention layer, and on later ranks those would be wrong: another rank has it. So a cache
keeps only the layers of this rank, and in place of others transformers' own layers that hold nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from gdnfuse import compat, versions
from gdnfuse.errors import GdnfuseError
from gdnfuse.generation.caches import cache_finder
from gdnfuse.generation.shards import sharded, together

NEEDED = (5, 24)  # of transformers


def inside(model: torch.nn.Module) -> torch.nn.Module:
    """The module whose calls make graphs: the model itself, or of a stage the model without its head."""
    return model if compat.pipeline_stage(model) is None else getattr(model, model.base_model_prefix)


def check(model: torch.nn.Module, **others: Any) -> None:
    """Check that a model can be compiled if it is a stage of a pipeline. All ranks find the same.

    Args:
        model: of transformers.
        others: arguments of `gdnfuse.compile` that do not work on stages, by their names.

    Raises:
        GdnfuseError: it cannot.
    """
    if (stage := compat.pipeline_stage(model)) is None:
        return
    if sentence := versions.older("transformers", NEEDED):
        raise GdnfuseError(f"A model of pp_size={stage.pp_size} needs caches that leave out layers: {sentence}")
    given = [name for name, argument in others.items() if argument is not None]
    if given or sharded(model):
        found, instead = ("tp_size", "load it with pp_size alone") if not given else (given[0], f"leave {given[0]} away")
        raise GdnfuseError(f"A model of pp_size={stage.pp_size} is compiled without other splits, found {found}: {instead}.")
    kinds = model.config.get_text_config(decoder=True).layer_types
    for rank in range(stage.pp_size):
        start, end = stage.layer_range_for_rank(rank, len(kinds))
        if all(kind == "linear_attention" for kind in kinds[start:end]):
            raise GdnfuseError(
                "Each stage of a pipeline needs an attention layer, by which transformers counts the tokens in a cache, found "
                f"none in the layers {start} to {end - 1} of rank {rank}: load the model with a pp_size below {stage.pp_size}."
            )


def enter(model: torch.nn.Module) -> None:
    """Have the caches of a stage's calls hold its own layers alone."""
    if compat.pipeline_stage(model) is not None:
        call = _with_own_layers(model, compat.call_of(model))
        vars(call).update(vars(compat.compiled_call(inside(model)) or call))
        compat.set_compiled_call(model, call)


def through(model: torch.nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """A call of a model during which calls of the module inside go to `call`. Of a model that is no stage that is `call`."""
    inner = inside(model)
    if inner is model:
        return call
    plain = _with_own_layers(model, compat.call_of(model))

    @functools.wraps(call)
    def passing(*args: Any, **kwargs: Any) -> Any:
        own = compat.compiled_call(inner)
        compat.set_compiled_call(inner, call)
        try:
            return plain(*args, **kwargs)
        finally:
            compat.set_compiled_call(inner, own)

    return passing


def _with_own_layers(model: torch.nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    from transformers.cache_utils import DummyLayer

    stage, find_cache = compat.pipeline_stage(model), cache_finder()
    layers = len(inside(model).layers)
    start, end = stage.layer_range_for_rank(stage.pp_rank, layers)
    others = [i for i in range(layers) if not start <= i < end]

    def called(*args: Any, **kwargs: Any) -> Any:
        if (cache := find_cache([*args, *kwargs.values()])) is not None and len(cache.layers) == layers:
            for i in others:
                if not isinstance(cache.layers[i], DummyLayer):
                    cache.layers[i] = DummyLayer()
        return call(*args, **kwargs)

    return together(called)
