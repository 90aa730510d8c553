"""Tails: the few tokens of a prompt behind a known prefix, on a cache of fixed length, in one graph for any number of them.

Prompts are compiled for all lengths and so have no CUDA graph: of a few tokens the host's launches take longer than the GPU. Here
such tokens are padded at their end to a fixed number of rows, which one CUDA graph serves. It reads the real number from a
tensor. What a row behind the last token could change is this, and nothing else:

- the recurrent states: the rule is given the bounds of one sequence, which ends with the last token;
- the conv windows and the keys and values: `TailCache` writes those of the real tokens alone;
- the other rows: attention is causal, and all else treats each row separately.

Here too, what is proposed is proved. The first tail on caches of a length is also computed as a prompt, and must leave the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionLayer, StaticLayer

from gdnfuse import compat
from gdnfuse.errors import one_line
from gdnfuse.generation.caches import cache_argument
from gdnfuse.generation.wrappers import gdn_layers
from gdnfuse.runs import RUNS

log = logging.getLogger(__name__)

ROWS = 64  # of the graph: a chunk of the rule. A prompt ends a call at its last whole block, so its last part has no more.


# How far a tail may be off the same tokens as a prompt, relatively. They are added up in another order. A row too much or too
# few in a state is off by far more.
ERROR = {torch.float64: 1e-6, torch.float32: 1e-3}
ERROR_IN_HALF = 0.05


class TailStates(LinearAttentionLayer):
    """The states of a layer for one call of padded rows. The tensors are those of the layer.

    Args:
        layer: of the cache that `generate` has.
        bounds: [0, n], where the real tokens begin and end.
    """

    def __init__(self, layer: LinearAttentionLayer, bounds: torch.Tensor):
        vars(self).update(vars(layer))
        self.bounds, self.window = bounds, None

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        """The window and the new rows [B, D, W + T]. The window is written with the state, when the conv has read it."""
        held = self.conv_states[state_idx]
        width = held.shape[-1]
        at = torch.arange(width, device=held.device) + self.bounds[1]  # columns of [window | rows], up to the last token
        old = held.index_select(-1, at.clamp(max=width - 1))
        new = conv_states.index_select(-1, (at - width).clamp(min=0))
        self.window = torch.where(at < width, old, new)
        return torch.cat([held, conv_states], -1)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        window, self.window = self.window, None
        self.conv_states[state_idx].copy_(window)
        self.recurrent_states[state_idx].copy_(recurrent_states)
        return self.recurrent_states[state_idx]


class TailKeys(StaticLayer):
    """The keys and values of a layer for one call of padded rows. The tensors are those of the layer."""

    def __init__(self, layer: StaticLayer, bounds: torch.Tensor):
        vars(self).update(vars(layer))
        self.bounds = bounds

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write the rows of real tokens. Those behind write the last one again, so that they need no room."""
        n = self.bounds[1]
        row = torch.arange(key_states.shape[-2], device=key_states.device).minimum(n - 1)
        at = row + self.cumulative_length
        self.cumulative_length.add_(n)
        self.keys.index_copy_(2, at, key_states.index_select(2, row))
        self.values.index_copy_(2, at, value_states.index_select(2, row))
        return self.keys, self.values


KINDS = {LinearAttentionLayer: TailStates, StaticLayer: TailKeys}


class TailCache(Cache):
    """A cache of fixed length for one call of padded rows of one sequence."""

    def __init__(self, cache: Cache, bounds: torch.Tensor):
        super().__init__(layers=[KINDS[type(layer)](layer, bounds) for layer in cache.layers])


def rows_are_apart(model: torch.nn.Module) -> bool:
    """Whether linears treat each row separately, and attention is not given the bounds.

    Formats of quantised weights may scale all rows by the largest number, and flash attention reads `cu_seq_lens_q`.
    """
    plain = all(type(p) is torch.nn.Parameter for p in model.parameters()) and getattr(model, "hf_quantizer", None) is None
    return plain and "flash" not in compat.attention_of(model.config.get_text_config(decoder=True))


class Tails:
    """Calls of a few tokens behind a known prefix.

    Args:
        model: of transformers.
        compiled: its compiled call for `ROWS` rows.
        used: whether such calls are made at all.
        few: calls of so many tokens and fewer have graphs of their own.

    Attributes:
        why_not: why none are made any more, after one that was not right.
        proved: lengths of caches on which a tail was compared with a prompt.
        beside: a stream for tails that are launched ahead.
        ahead: those that nothing has waited for yet.
    """

    def __init__(self, model: torch.nn.Module, compiled: Callable[..., Any], used: bool, few: int):
        self._model, self._compiled, self.used, self._few, self.why_not = model, compiled, used, few, ""
        self._layers = len(gdn_layers(model))
        (self._keyword,) = cache_argument(model, None)
        self.proved: set[int] = set()
        self.beside: torch.cuda.Stream | None = None
        self.ahead: set[Any] = set()

    def takes(self, tokens: int, ids: torch.Tensor, cache: Any = None) -> bool:
        """Whether so many tokens of a prompt [B, T] on a filled cache are computed here. Without one, whether they may be."""
        return self._few < tokens <= ROWS and ids.shape[0] == 1 and (cache is None or self.knows(cache))

    def knows(self, cache: Any) -> bool:
        """Whether tokens behind known prefixes in this cache may be computed here."""
        return self.used and not self.why_not and all(type(x) in KINDS for x in cache.layers)

    def __call__(self, ids: torch.Tensor, cache: Any, have: int) -> Any:
        """What the model answers to the tokens [1, T] behind `have` others: logits of the last, and the cache.

        None if a layer did not keep to the bounds. Then the cache is of no use, and `takes` says no from now on.
        """
        T = ids.shape[1]
        # One copy from the host for where tokens begin and end, and which row has the last one.
        numbers = torch.tensor([0, T, T - 1], pin_memory=ids.is_cuda).to(ids.device, non_blocking=True)
        padded, before = TailCache(cache, numbers[:2]), RUNS.bounded
        # Of one layout whatever they are a part of: Dynamo compiles a call anew for other strides.
        rows = ids.new_zeros(1, ROWS)
        rows[:, :T] = ids
        try:
            out = self._compiled(
                input_ids=rows,
                position_ids=torch.arange(have, have + ROWS, device=ids.device)[None],
                cu_seq_lens_q=numbers[:2],
                logits_to_keep=numbers[2:],
                use_cache=True,
                return_dict=True,
                **{self._keyword: padded},
            )
            found = "" if (n := RUNS.bounded - before) == self._layers else f"{n} that do"
        except ValueError as e:  # by transformers, whose own rule knows no bounds
            found = one_line(e)
        if found:
            self.why_not = f"The rules of {self._layers} layers must keep to the bounds of a tail, found {found}"
            log.warning("%s, so tokens behind known prefixes are computed as other prompts.", self.why_not)
            return None
        for name, x in out.items():
            if x is padded:
                out[name] = cache
        return out

    def join(self) -> None:
        """Have what comes next on this stream come behind all tails that were launched ahead."""
        if self.ahead and self.beside is not None:
            torch.cuda.current_stream(self.beside.device).wait_stream(self.beside)

    def is_proved(self, cache: Any) -> bool:
        """Whether a tail on a cache of this length has been compared with a prompt."""
        return cache.get_max_length() in self.proved

    def prove(self, cache: Any, tail: list[torch.Tensor], prompt: list[torch.Tensor]) -> None:
        """Compare what a tail and a prompt of the same tokens have `left`. If they differ, `takes` says no from now on."""
        worst = max(_error(x, y).item() for x, y in zip(tail, prompt, strict=True))
        most = ERROR.get(next(self._model.parameters()).dtype, ERROR_IN_HALF)
        self.proved.add(cache.get_max_length())
        if not worst <= most:  # nor if it is not a number
            self.why_not = f"A tail must leave what a prompt leaves up to {most:.0e}, found an error of {worst:.1e}"
            log.warning("%s, so tokens behind known prefixes are computed as other prompts.", self.why_not)


def left(out: Any, cache: Any, start: int, stop: int) -> list[torch.Tensor]:
    """What the call of the tokens start … stop − 1 has left: logits, states, keys and values, and lengths."""
    found = [out["logits"][:, -1:]]
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            found += [layer.keys[:, :, start:stop], layer.values[:, :, start:stop], layer.cumulative_length]
        else:
            found += [x for of in (layer.recurrent_states, layer.conv_states) for x in of.values() if x is not None]
    return [x.clone() for x in found]


def _error(x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The relative error; of lengths, which must be equal, infinity if they are not."""
    if not wanted.is_floating_point():
        return torch.where((x == wanted).all(), 0.0, torch.inf)
    x, wanted = (y if y.dtype == torch.float64 else y.float() for y in (x, wanted))
    return (x - wanted).norm() / wanted.norm().clamp(min=1e-30)
