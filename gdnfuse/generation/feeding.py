"""Feeding: tokens of padded rows into a model with a cache, one stretch after the other, as `generate` would."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from gdnfuse.generation.caches import cache_argument
from gdnfuse.generation.hooks import hooks_now
from gdnfuse.generation.recorded import Recorded, others_generate


def compiled_steps(model: torch.nn.Module, static: bool) -> Callable[..., Any] | None:
    """What `generate` would call for steps of a model that gdnfuse.compile has compiled, on a GPU with CUDA graphs if the cache
    stays where it is; None for the model itself."""
    asked = vars(model).get("get_compiled_call")  # ours, if the model is compiled
    return asked() if static and asked is not None and next(model.parameters()).device.type == "cuda" else None


def recorded_steps(model: torch.nn.Module, cache: Any) -> Recorded | None:
    """What steps on a cache of fixed length go to if only code of transformers and of gdnfuse runs between them. None if they are
    not compiled, have no CUDA graphs, if a hook must see them, or if another thread generates too."""
    uncaptured = getattr(compiled_steps(model, True), "uncaptured", None)
    return None if uncaptured is None or others_generate() or hooks_now(model.modules()) else Recorded(uncaptured, cache)


class Fed:
    """A model and a cache that has been fed so many tokens.

    Args:
        model: a causal language model.
        cache: of transformers, which the model fills.
        mask: [B, L], of the prompt, 0 where it is padding, or None where it is nowhere.
        capacity: how many tokens a cache of fixed length holds, so that the mask has one shape; None where it grows.
        length: tokens in the cache already.
        call: what the model's calls go to; the model itself if None.

    Attributes:
        length: tokens in the cache. Whoever crops the cache sets it.
        after: called behind each call with its tokens, if given.
        recorded: what calls of `few` tokens on the filled cache go to, if given and as long as it can record them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        cache: Any,
        mask: torch.Tensor | None = None,
        capacity: int | None = None,
        length: int = 0,
        call: Callable[..., Any] | None = None,
    ):
        self.cache, self.length, self._call = cache, length, call or model
        self.after: Callable[[torch.Tensor], None] | None = None
        self.recorded: Recorded | None = None
        self.few = range(0)
        self._arguments = {**cache_argument(model, cache), "use_cache": True, "return_dict": True}
        named = inspect.signature(model.forward).parameters
        self._keeps, self._places = "logits_to_keep" in named, "position_ids" in named
        self._mask, self._grows = mask, capacity is None
        self._places_of_prompt = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        self._padding = 0 if mask is None else (mask == 0).sum(1, keepdim=True)
        if mask is not None and capacity is not None:
            self._mask = torch.cat([mask, mask.new_ones(mask.shape[0], capacity - mask.shape[1])], 1)

    def __call__(self, tokens: torch.Tensor, last: bool = False, start: torch.Tensor | None = None, **more: Any) -> Any:
        """What the model answers to the next tokens [B, T].

        Args:
            tokens: their ids.
            last: logits of the last of them are enough.
            start: [1], how many tokens the cache holds, if only the device knows it yet. Whoever calls sets `length` when the
                host knows it too. The cache has a fixed length then.
            more: arguments of the model's.
        """
        arguments = {**self._arguments, **more}
        end = self.length + tokens.shape[1]
        if self._places:  # which a model with images would count from its last ones
            arguments["position_ids"] = self._positions(tokens, end) if start is None else self._positions_from(tokens, start)
        if self._mask is not None:
            # Linear attention takes the last columns for those of the tokens, so the mask of a prompt ends where the prompt does.
            # Behind it all tokens are real.
            of_prompt = end <= self._places_of_prompt.shape[1]
            arguments["attention_mask"] = self._of_length(end) if self._grows or of_prompt else self._mask
        if last and self._keeps:
            arguments["logits_to_keep"] = 1
        # Of one layout whatever they are a part of: Dynamo compiles a call anew for other strides.
        arguments["input_ids"] = tokens.clone(memory_format=torch.contiguous_format)
        call, recorded = self._call, self.recorded
        if recorded is not None and not recorded.why_not and self.length and tokens.shape[1] in self.few:
            call = recorded
        out = call(**arguments)
        self.length = end
        if self.after is not None:
            self.after(tokens)
        return out

    def _positions(self, tokens: torch.Tensor, end: int) -> torch.Tensor:
        known = self._places_of_prompt
        if known is not None and end <= known.shape[1]:
            return known[:, self.length : end].contiguous()
        return torch.arange(self.length, end, device=tokens.device).expand(tokens.shape) - self._padding

    def _positions_from(self, tokens: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return (torch.arange(tokens.shape[1], device=tokens.device) + start).expand(tokens.shape) - self._padding

    def _of_length(self, length: int) -> torch.Tensor:
        missing = length - self._mask.shape[1]
        if missing <= 0:
            return self._mask[:, :length].contiguous()
        return torch.cat([self._mask, self._mask.new_ones(self._mask.shape[0], missing)], 1)
