"""RollbackCache: a cache that takes tokens back, recurrent states included.

A rejected token cannot be taken out of a recurrent state, and a copy of the state for each token would take much memory. So a
call of several tokens on a recording cache reads states and conv windows and writes neither. The cache keeps the inputs of these
tokens instead, a few kilobytes each. `crop` then replays the accepted tokens, in the recurrent form, into the states of all
layers at once (`delta_rule_commit`; checkpoint and replay as in SGLang's PR 28695).

`update_conv_state` gives the cache what enters the conv. Nothing gives it the inputs of the gates. So two forward hooks on each
GDN layer do. They do nothing on any other cache. When the layer ends, all that was given is recorded at once (`record`), so that
one kernel can do it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer, StaticCache, StaticLayer

from gdnfuse import compat, kernels
from gdnfuse.capture_fp8 import dequantized_calls
from gdnfuse.dialect import delta_rule_commit, record
from gdnfuse.errors import GdnfuseError, Refused
from gdnfuse.generation.caches import cache_finder, mark_lengths, rope_that_looks_ahead
from gdnfuse.generation.rooms import apart
from gdnfuse.generation.wrappers import gdn_layers

MOST_TOKENS = 8
L2NORM_EPS = 1e-6  # a constant in transformers' rules


class RollbackLayer(LinearAttentionLayer):
    """The states of one GDN layer, and the inputs of the tokens that are not in them yet.

    Attributes:
        pending: how many tokens are recorded.
        given: of the current call, what enters the conv ("x") and the gates ("a" and "b").
        recorded: whether all of it was recorded.
        windows: [B, W + tokens, D], the conv state, followed by the recorded rows before the conv.
        a, b: [B, tokens, HV], the inputs of the recorded tokens' gates.
    """

    # Since 5.24 transformers says False while a layer records, because its conv states grow then. Ours do not.
    is_compileable = True

    def __init__(self) -> None:
        super().__init__()
        self.pending, self.recorded = 0, False
        self.given: dict[str, torch.Tensor] = {}
        self.windows: torch.Tensor | None = None
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can restore the layer."""
        return self.record_past

    def begin(self, rows: int, tokens: int) -> None:
        """Record the next call.

        Raises:
            GdnfuseError: a call is already recorded, or this one is too long.
        """
        if self.pending:
            raise GdnfuseError(
                f"A RollbackCache that records must be cropped after each call, found a second call after {self.pending} tokens: "
                "call crop first, with 0 to keep them."
            )
        held, most = self.a.shape[:2]
        if tokens > most or rows != held:
            raise GdnfuseError(
                f"A RollbackCache that records takes up to {most} tokens of {held} sequences in a call, found {tokens} of "
                f"{rows}: make it with more tokens, or call stop_past_recording first."
            )
        self.pending, self.recorded, self.given = tokens, False, {}

    def hear(self, name: str, gate: torch.Tensor) -> None:
        """Take `a` or `b`, [B, T, HV], of the current call."""
        self.given[name] = gate  # the layer of an adapter gives it a second time, which is the final value

    def record(self) -> None:
        """Record what was given of the current call, if it is complete."""
        given, self.given = self.given, {}
        if len(given) == 3:
            record.op.overload(given["x"], self.conv_states[0], given["a"], given["b"], self.windows, self.a, self.b)
            self.recorded = True

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        """The window and the new rows [B, D, W + T]. While recording, the window does not change."""
        if not self.record_past:
            return super().update_conv_state(conv_states, state_idx, **kwargs)
        if self.pending != conv_states.shape[-1]:
            raise GdnfuseError(
                "A RollbackCache must be used with the model that it was made for, or a copy of it, found a model that does not "
                "give it its gates: make a RollbackCache for this model."
            )
        self.given["x"] = conv_states
        return torch.cat([self.conv_states[0], conv_states], -1)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        """Write the state. While recording, the state does not change."""
        if self.record_past:
            return recurrent_states
        return super().update_recurrent_state(recurrent_states, state_idx, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        raise GdnfuseError(
            "Layers of a RollbackCache must be cropped together, found one that is cropped alone: call cache.crop."
        )

    def reset(self) -> None:
        super().reset()
        self.pending, self.given, self.record_past = 0, {}, False

    def __getstate__(self) -> dict[str, Any]:
        # These buffers are parts of tensors over all layers. Those of a copy would not be.
        return {**vars(self), "windows": None, "a": None, "b": None, "given": {}, "record_past": False}


class CroppableStaticLayer(StaticLayer):
    """Keys and values of fixed length that can be cropped. transformers' can since 5.24."""

    is_croppable = True

    def crop(self, tokens_to_remove: int) -> None:
        self.cumulative_length.sub_(abs(tokens_to_remove))


class GrowingLayer(DynamicLayer):
    """Keys and values that grow. After a crop they have the same layout as after a step, so that no step is compiled again."""

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.keys, self.values = (x.clone(memory_format=torch.contiguous_format) for x in (self.keys, self.values))
            mark_lengths(self)


LAYERS = (RollbackLayer, CroppableStaticLayer, GrowingLayer)


class RollbackCache(Cache):
    """A cache of transformers for a model with GDN layers, which can take tokens back.

    Fill it with a prompt, then call `activate_past_recording`. The next call of up to `tokens` tokens is recorded: its logits are
    as usual and keys and values are stored, but recurrent states and conv windows are not written. `crop(-n)` then drops the last
    n of these tokens and replays the others into the states. Up to rounding, the states are those after steps of one token. Each
    recorded call needs one crop.

    Args:
        model: the model that will use the cache. Hooks are registered on its GDN layers, once.
        max_cache_len: how many tokens the cache can hold, at a fixed place in memory. None lets it grow.
        tokens: the most tokens of a recorded call. Each takes about (D + 2·HV) numbers of the model's dtype in each layer, which
            is 0.4 MiB in a 4B model.

    Raises:
        GdnfuseError: the model has layers that cannot be rolled back.

    Source:
        The states that are rebuilt: Yang et al. 2024, Gated Delta Networks, arXiv:2412.06464.
    """

    def __init__(self, model: torch.nn.Module, max_cache_len: int | None = None, *, tokens: int = MOST_TOKENS):
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise GdnfuseError(f"tokens must be at least 1, found {tokens!r}.")
        if isinstance(max_cache_len, bool) or not (max_cache_len is None or isinstance(max_cache_len, int) and max_cache_len > 0):
            raise GdnfuseError(f"max_cache_len must be None or at least 1, found {max_cache_len!r}.")
        if (rope := rope_that_looks_ahead(model)) is not None:
            raise GdnfuseError(
                f"A RollbackCache needs a rotary embedding that is the same at all lengths, found rope_type {rope!r}, which "
                "changes with the longest position of a call."
            )
        config = model.config.get_text_config(decoder=True)
        like = DynamicCache(config=config) if max_cache_len is None else StaticCache(config=config, max_cache_len=max_cache_len)
        super().__init__(layers=[_layer(layer, max_cache_len) for layer in like.layers])
        self.tokens, self.capacity, self.replayed_by = tokens, max_cache_len, ""
        self._mixers = _mixers(model, len(self.layers))
        if not self._mixers or sorted(self._mixers) != [
            i for i, layer in enumerate(self.layers) if isinstance(layer, RollbackLayer)
        ]:
            raise GdnfuseError(
                f"A RollbackCache needs a model whose linear attention is Gated DeltaNet, found {type(model).__name__} with "
                f"such layers at {sorted(self._mixers)}."
            )
        for i in self._mixers:
            _install(self._mixers[i])
        self._begin()
        mixer = self._mixers[min(self._mixers)]
        with dequantized_calls(mixer):
            _prove(mixer)

    def _begin(self) -> None:
        """Forget all buffers that calls record into."""
        self._all: dict[str, torch.Tensor] = {}
        self._addresses: list[int] = []  # addresses of the layers' states
        self._hooked: list[int] = []  # ids of the linears that have hooks
        self._sources: list[torch.Tensor] = []  # the weights that tokens are replayed with, and their versions
        self._replayed_with: tuple[list[int], list[int]] | None = None

    @property
    def pending(self) -> int:
        """How many tokens are recorded and not in the states yet."""
        return max(layer.pending for layer in self._linear())

    @property
    def rows(self) -> int | None:
        """How many sequences the cache holds. None before its prompt."""
        state = self._linear()[0].conv_states.get(0)
        return None if state is None else state.shape[0]

    @property
    def is_recording(self) -> bool:
        """Whether the next call of few tokens is recorded."""
        return any(layer.record_past for layer in self._linear())

    def activate_past_recording(self) -> None:
        """Record the next call. Nothing is copied, except at the first time after a prompt.

        Raises:
            GdnfuseError: the cache is empty.
        """
        if self.is_recording:
            return
        linear = self._linear()
        if not all(layer.has_previous_state[0] for layer in linear):
            raise GdnfuseError("A RollbackCache must hold a prompt before it records, found it empty: run a prompt first.")
        gates = _gates_of(self._mixers[min(self._mixers)])
        linears = [getattr(m, name) for m in self._mixers.values() for name in gates]
        if list(map(id, linears)) != self._hooked:  # an adapter has replaced one, or this is the first time
            for mixer in self._mixers.values():
                _install(mixer)
            self._hooked = list(map(id, linears))
        sources = _sources(self._mixers.values())
        if not self._states_in_place() or not self._unchanged() or list(map(id, sources)) != list(map(id, self._sources)):
            self._stack_states()
        for layer in linear:
            layer.record_past = True
        for layer in self.layers:
            if type(layer) is GrowingLayer:
                mark_lengths(layer)

    def stop_past_recording(self) -> None:
        """Let calls write the states again. Recorded tokens are kept."""
        if self.pending:
            self.crop(0)
        for layer in self._linear():
            layer.record_past = False

    def record_again(self, tokens: int) -> None:
        """Note that a CUDA graph has repeated a recorded call of so many tokens, without the model's code.

        Raises:
            GdnfuseError: a call is already recorded, or this one is too long.
        """
        for layer in self._linear():
            layer.begin(layer.a.shape[0], tokens)
            layer.recorded = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of the recorded call, and put the others into the states.

        Args:
            tokens_to_remove: how many tokens, as a negative number, as in transformers. 0 keeps all.

        Raises:
            GdnfuseError: more tokens than were recorded, or a positive number. The cache is unchanged then.
        """
        if isinstance(tokens_to_remove, bool) or not isinstance(tokens_to_remove, int) or tokens_to_remove > 0:
            raise GdnfuseError(
                f"crop needs the number of tokens to remove as a negative number, or 0, found {tokens_to_remove!r}."
            )
        pending = self.pending
        keep = pending + tokens_to_remove
        if keep < 0:
            raise GdnfuseError(
                f"A RollbackCache takes back what it recorded since the last crop, {pending} tokens, found {-tokens_to_remove}."
            )
        self._require_complete()
        if keep:
            self._require_replayable()
            self._commit(self._all["counts"][keep], pending)
        for layer in self._linear():
            layer.pending = 0
        take_back(self.layers, -tokens_to_remove)

    def crop_to(self, kept: torch.Tensor) -> None:
        """Like `crop`, for a number of tokens that only the device knows yet. The host does not wait for it.

        Args:
            kept: [B], int32 or int64, all the same: how many tokens of the recorded call to keep, from 1 on.

        Raises:
            GdnfuseError: as `crop` does, or the cache grows, so that its length must be known. The cache is unchanged then.
        """
        pending = self.pending
        if self.capacity is None or not pending:
            found = "one that grows" if self.capacity is None else "none recorded"
            raise GdnfuseError(f"crop_to needs a RollbackCache of fixed length with recorded tokens, found {found}: call crop.")
        self._require_complete()
        self._require_replayable()
        self._commit(kept, pending)
        for layer in self._linear():
            layer.pending = 0
        take_back(self.layers, (pending - kept[0]).long())

    def _require_complete(self) -> None:
        """Check that all layers have recorded the same call, with all that a replay needs."""
        linear = self._linear()
        counts = {layer.pending for layer in linear}
        if len(counts) > 1:
            raise GdnfuseError(
                f"All layers of a RollbackCache must have recorded the same call, found layers with "
                f"{sorted(counts)} tokens: the call did not run to its end, so call cache.abandon(length)."
            )
        if max(counts) and not all(layer.recorded for layer in linear):
            raise GdnfuseError(
                "Both gates of a recorded call must be handed to its RollbackCache, found layers without: their hooks are gone, "
                "or threads share a model whose graphs break inside a layer. cache.abandon(length) forgets the call."
            )

    def _require_replayable(self) -> None:
        """Check that the weights are those that the call was recorded with, and have all states in one tensor."""
        if self._all and not self._unchanged():
            raise GdnfuseError(
                "The weights of GDN layers must be the same when a RollbackCache records a call and when it is cropped, "
                "found that they were written: cache.abandon(length) forgets the call."
            )
        if not self._states_in_place():
            self._stack_states()

    def abandon(self, length: int) -> None:
        """Forget the recorded call, even if it did not run to its end. The cache is as before the call.

        Args:
            length: how many tokens the cache held before the call.
        """
        for layer in self._linear():
            layer.pending, layer.given = 0, {}
        for layer in self.layers:
            if isinstance(layer, StaticLayer):
                layer.cumulative_length.fill_(length)
            elif not isinstance(layer, RollbackLayer):
                layer.crop(min(length - layer.get_seq_length(), 0))

    def _commit(self, kept: torch.Tensor, pending: int) -> None:
        self.replayed_by = commit(*self.replay(kept, pending))

    def replay(self, kept: torch.Tensor, pending: int) -> tuple[Any, ...]:
        """The arguments of `delta_rule_commit` that put the first `kept` [B] of `pending` recorded tokens into the states."""
        of = self._all
        windows, W = of["windows"], of["conv_weight"].shape[-1]
        mixer = next(iter(self._mixers.values()))
        return (
            windows[:, :, : W + pending], of["a"][:, :, :pending], of["b"][:, :, :pending], kept,
            of["conv_weight"], of["A_log"], of["dt_bias"], of["conv_state"], of["recurrent_state"],
            L2NORM_EPS, beta_scale_of(mixer),
        )  # fmt: skip

    def _unchanged(self) -> bool:
        """Whether the weights that tokens are replayed with are unchanged, by torch's version counters."""
        found = [x.data_ptr() for x in self._sources], compat.version_counters(self._sources)
        return found == self._replayed_with

    def _linear(self) -> list[RollbackLayer]:
        return [self.layers[i] for i in self._mixers]

    def _states_in_place(self) -> bool:
        """Whether the layers' states are still parts of the tensors over all layers."""
        states = [x for layer in self._linear() for x in (layer.recurrent_states[0], layer.conv_states[0])]
        return bool(self._all) and [x.data_ptr() for x in states] == self._addresses

    def _stack_states(self) -> None:
        """Put the states of all layers into one tensor for one launch, and make the buffers to record into."""
        linear, mixers = self._linear(), list(self._mixers.values())
        kinds = {(x.shape, x.dtype, x.device) for layer in linear for x in (layer.recurrent_states[0], layer.conv_states[0])}
        if len(kinds) != 2:
            raise GdnfuseError(
                "The GDN layers of a RollbackCache must have states of one shape, dtype and device, found "
                f"{', '.join(sorted({f'{list(shape)} {dtype} on {device}' for shape, dtype, device in kinds}))}."
            )
        B, D, W = linear[0].conv_states[0].shape
        HV, like = mixers[0].A_log.shape[0], linear[0].conv_states[0]
        recorded = linear[0].pending and {name: torch.stack([getattr(x, name) for x in linear]) for name in ("windows", "a", "b")}
        self._all = {
            "recurrent_state": torch.stack([layer.recurrent_states[0] for layer in linear]),
            "conv_state": torch.stack([layer.conv_states[0] for layer in linear]),
            "windows": like.new_zeros(len(linear), B, W + self.tokens, D),
            "a": like.new_zeros(len(linear), B, self.tokens, HV),
            "b": like.new_zeros(len(linear), B, self.tokens, HV),
            "counts": torch.arange(self.tokens + 1, dtype=torch.int32, device=like.device)[:, None].repeat(1, B),
            "conv_weight": torch.stack([m.conv1d.weight.detach().squeeze(1) for m in mixers]),
            "A_log": torch.stack([m.A_log.detach() for m in mixers]),
            "dt_bias": torch.stack([m.dt_bias.detach() for m in mixers]),
        } | (recorded or {})
        self._sources = _sources(mixers)
        self._replayed_with = [x.data_ptr() for x in self._sources], compat.version_counters(self._sources)
        for i, layer in enumerate(linear):
            part = {name: apart(self._all[name][i]) for name in RECORDED}
            layer.recurrent_states[0], layer.conv_states[0] = part["recurrent_state"], part["conv_state"]
            layer.windows, layer.a, layer.b = part["windows"], part["a"], part["b"]
            for x in part.values():
                compat.mark_static_address(x)
        self._addresses = [x.data_ptr() for layer in linear for x in (layer.recurrent_states[0], layer.conv_states[0])]

    def __getstate__(self) -> dict[str, Any]:
        if self.pending:
            raise GdnfuseError(
                f"A RollbackCache must hold no recorded tokens when it is copied, found {self.pending} tokens: crop first."
            )
        return {**vars(self), "_all": {}, "_sources": [], "_replayed_with": None}


RECORDED = ("recurrent_state", "conv_state", "windows", "a", "b")


def _sources(mixers: Iterable[torch.nn.Module]) -> list[torch.Tensor]:
    """The weights that tokens are replayed with."""
    return [x for m in mixers for x in (m.conv1d.weight, m.A_log, m.dt_bias)]


def _layer(like: Any, max_cache_len: int | None) -> Any:
    if type(like) is LinearAttentionLayer:
        return RollbackLayer()
    if type(like) is StaticLayer:
        return CroppableStaticLayer(max_cache_len=max_cache_len)
    if type(like) is DynamicLayer:
        return GrowingLayer()
    raise GdnfuseError(
        f"A RollbackCache holds layers of linear and of full attention, found a {type(like).__name__}, from which tokens "
        "cannot be taken back: generate without drafts."
    )


def commit(*arguments: Any) -> str:
    """Replay on a device, by our kernel if it supports the case, else by the reference. Returns which of them ran."""
    if arguments[0].device.type == "cuda":
        with contextlib.suppress(Refused):  # no Triton, or heads that are too wide for the kernel
            kernel = kernels.implementations()["delta_rule_commit"]
            kernel.supports(*arguments)
            kernel.op(*arguments)
            return kernel.by
    delta_rule_commit.op.overload(*arguments)
    return "reference"


# Arguments of the GDN layers of a model


def _mixers(model: torch.nn.Module, layers: int) -> dict[int, torch.nn.Module]:
    """The GDN layers of a model, by their index among its layers."""
    modules = dict(model.named_modules())
    found = {getattr(modules[path], "layer_idx", None): modules[path] for path in gdn_layers(model)}
    for m in found.values():
        _check(m)
    return _Shared({i: found[i] for i in range(layers) if i in found})


class _Shared(dict[int, torch.nn.Module]):
    """Modules that are shared with a copy of their owner, and not copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


def _check(mixer: torch.nn.Module) -> None:
    conv, name = getattr(mixer, "conv1d", None), type(mixer).__name__
    if conv is not None and type(conv) is not torch.nn.Conv1d:
        raise GdnfuseError(f"The conv1d of a GDN layer that is rolled back must be torch's, found a {type(conv).__name__}.")
    if conv is None or conv.bias is not None or getattr(mixer, "activation", None) not in ("silu", "swish"):
        raise GdnfuseError(
            f"A GDN layer that is rolled back must have a conv1d without bias, followed by SiLU, found {name} with "
            f"{'no conv1d' if conv is None else 'a bias' if conv.bias is not None else getattr(mixer, 'activation', None)!r}."
        )
    if not _gates_of(mixer):
        names = [n for n, child in mixer.named_children() if isinstance(child, torch.nn.Linear)]
        raise GdnfuseError(
            "The gates of a GDN layer that is rolled back must come from in_proj_b and in_proj_a, b_proj and a_proj, or "
            f"in_proj_ba, found {name} with {', '.join(names)}."
        )


def beta_scale_of(mixer: torch.nn.Module) -> float:
    return 2.0 if getattr(mixer, "allow_neg_eigval", False) else 1.0


PACKED = "in_proj_ba"
GATES = ({"in_proj_b": "b", "in_proj_a": "a"}, {"b_proj": "b", "a_proj": "a"}, {PACKED: "ba"})


def _gates_of(mixer: torch.nn.Module) -> dict[str, str]:
    """Which linears of a GDN layer make its gates."""
    return next((names for names in GATES if all(hasattr(mixer, n) for n in names)), {})


class Recorder:
    """The hooks of one GDN layer. A copy of the model has its own copy of them.

    While the layer runs on a recording cache, they know that cache's layer. Each thread has its own state. Traced code has its
    own too (`traced`), because Dynamo follows it through one whole call of the layer.

    Attributes:
        key_heads: of the layer.
        traced: the cache's layer, for traced code.
    """

    def __init__(self, key_heads: int = 1) -> None:
        self.key_heads = key_heads
        self.traced: RollbackLayer | None = None
        self._of_thread = threading.local()
        self._find_cache = cache_finder()  # made here, because Dynamo of torch 2.11 breaks the graph at an import

    def __reduce__(self) -> tuple[Any, ...]:
        return Recorder, (self.key_heads,)

    def enter(self, mixer: torch.nn.Module, args: Any, kwargs: Any) -> None:
        cache = self._find_cache([*args, *kwargs.values()])
        layer = cache.layers[mixer.layer_idx] if isinstance(cache, RollbackCache) else None
        if layer is not None and layer.record_past:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            layer.begin(*hidden_states.shape[:2])
        else:
            layer = None
        self.traced = layer
        if not torch.compiler.is_dynamo_compiling():
            self._of_thread.layer = layer

    def leave(self, mixer: torch.nn.Module, args: Any, out: Any) -> None:
        if (layer := self.layer()) is not None:
            layer.record()
        self.traced = None
        if not torch.compiler.is_dynamo_compiling():
            vars(self._of_thread).clear()

    def layer(self) -> RollbackLayer | None:
        # If a graph breaks inside the layer, only a part of the call is traced.
        return self.traced if torch.compiler.is_dynamo_compiling() else getattr(self._of_thread, "layer", self.traced)

    def b(self, linear: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
        if (layer := self.layer()) is not None:
            layer.hear("b", out)

    def a(self, linear: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
        if (layer := self.layer()) is not None:
            layer.hear("a", out)

    def ba(self, linear: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
        """Take both gates from a linear that computes both, ordered by key head."""
        if (layer := self.layer()) is not None:
            HV = layer.b.shape[-1]
            heads = out.shape[-1] - HV  # as many columns as value heads, twice
            B, T, _ = out.shape
            parts = out.view(B, T, self.key_heads, 2, heads // self.key_heads)
            layer.hear("b", parts[..., 0, :].reshape(B, T, HV))
            layer.hear("a", parts[..., 1, :].reshape(B, T, HV))


def _install(mixer: torch.nn.Module) -> None:
    """Register the hooks of a GDN layer if they are missing. An adapter replaces a linear by another module."""

    def recorder_of(module: torch.nn.Module) -> Recorder | None:
        owners = (getattr(hook, "__self__", None) for hook in compat.hooks_of(module).values())
        return next((owner for owner in owners if isinstance(owner, Recorder)), None)

    recorder = recorder_of(mixer)
    if recorder is None:
        recorder = Recorder(getattr(mixer, "num_k_heads", 1))
        mixer.register_forward_pre_hook(recorder.enter, with_kwargs=True)
        mixer.register_forward_hook(recorder.leave)
    for name, what in _gates_of(mixer).items():
        linear = getattr(mixer, name)
        if recorder_of(linear) is not recorder:
            linear.register_forward_hook(getattr(recorder, what))


# The proof that the replay computes what the layer computes


_proved: set[tuple[type, torch.dtype]] = set()
TOLERANCE = {torch.float32: 1e-4}
HALF_TOLERANCE = 0.1  # for bfloat16 on random inputs; swapped operands give errors near 1


class _One(Cache):
    """A cache with only the states of one GDN layer."""

    def __init__(self, layer: Any, place: int):
        super().__init__(layers=[layer] * (place + 1))


@torch.no_grad()
def _prove(mixer: torch.nn.Module) -> None:
    """Compare the replay of a GDN layer's tokens with the layer's own steps on random inputs, once per class.

    Raises:
        GdnfuseError: they differ.
    """
    weight = mixer.conv1d.weight
    kind = (type(mixer), weight.dtype)
    if kind in _proved or any(p.is_meta for p in mixer.parameters()):
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, mixer.hidden_size, generator=generator).to(weight.device, weight.dtype)
    wanted = LinearAttentionLayer()
    mixer(x[:, :3], _One(wanted, mixer.layer_idx))
    for t in (3, 4):
        mixer(x[:, t : t + 1], _One(wanted, mixer.layer_idx))
    cache = RollbackCache.__new__(RollbackCache)
    Cache.__init__(cache, layers=[RollbackLayer()] * (mixer.layer_idx + 1))
    cache.tokens, cache._mixers = 3, _Shared({mixer.layer_idx: mixer})
    cache._begin()
    mixer(x[:, :3], cache)
    cache.activate_past_recording()
    mixer(x[:, 3:], cache)
    cache.crop(-1)
    found = cache.layers[-1]
    pairs = {
        "state": (found.recurrent_states[0], wanted.recurrent_states[0]),
        "conv window": (found.conv_states[0], wanted.conv_states[0]),
    }
    for what, (f, w) in pairs.items():
        f, w = f.double(), w.double()
        error = float((f - w).norm() / w.norm().clamp_min(1e-30))
        if not error <= TOLERANCE.get(weight.dtype, HALF_TOLERANCE):
            raise GdnfuseError(
                f"A replay of tokens must give what the GDN layer computes, found a relative error of {error:.1e} in the {what} "
                f"of {type(mixer).__name__}: this model cannot have a RollbackCache."
            )
    _proved.add(kind)


def take_back(layers: Sequence[Any], tokens: int | torch.Tensor) -> None:
    """Crop the keys and values of attention layers by so many tokens, in any cache of transformers.

    A tensor [] in int64 is a number that only the device knows yet. Then all layers must be of fixed length.
    """
    if isinstance(tokens, int) and not tokens:
        return
    names = ("cumulative_length", "indexer_cumulative_length")
    lengths = [vars(layer).get(name) for layer in layers if isinstance(layer, StaticLayer) for name in names]
    lengths = [x for x in lengths if x is not None]
    compat.subtract_from_all(lengths, tokens if isinstance(tokens, int) else [tokens] * len(lengths))
    for layer in layers:
        if isinstance(layer, LinearAttentionLayer) and isinstance(layer, DynamicLayer):  # whose own crop refuses its states
            DynamicLayer.crop(layer, -tokens)
        elif not isinstance(layer, StaticLayer | LinearAttentionLayer):
            layer.crop(-tokens)
