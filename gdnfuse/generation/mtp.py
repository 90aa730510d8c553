"""MTP heads: an additional layer of a checkpoint, trained to predict the token after the next (DeepSeek-V3, arXiv:2412.19437).

transformers drops its weights, named `mtp.*`, when it loads a Qwen3-Next or Qwen3.5. They are loaded here, once, into a layer of
the model's own class:

    x = norm(decoder_layer(fc([norm(embedding of the next token) | norm(the model's last hidden state)])));  logits = head(x)

Embedding, head and rotary embedding are the model's. For each further token, x takes the place of the hidden state, so the head
continues from its own output. Tokens that the model has checked are fed to it again, with the model's own hidden states.
"""

from __future__ import annotations

import copy
import json
import re
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gdnfuse import compat
from gdnfuse.errors import GdnfuseError, one_line
from gdnfuse.generation.caches import cache_argument
from gdnfuse.generation.proposers import Drafting, Drafts, Run, check_count, drawn

PREFIX = "mtp."
PIECE = 1024  # tokens of a prompt that the head takes at a time
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class Head(torch.nn.Module):
    """The weights of one head. They are named as in checkpoints after `mtp.`.

    Args:
        config: of the model's text part, with the one layer of the head.
        layer: the class of the model's decoder layers.
        norm: the class of its norms.
    """

    def __init__(self, config: Any, layer: type[torch.nn.Module], norm: type[torch.nn.Module]):
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.fc = torch.nn.Linear(2 * H, H, bias=False)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = norm(H, eps=eps), norm(H, eps=eps)
        self.layers = torch.nn.ModuleList([layer(config, 0)])
        self.norm = norm(H, eps=eps)

    def forward(self, embedded: torch.Tensor, hidden: torch.Tensor, **of_layer: Any) -> torch.Tensor:
        """x [B, T, H] from the embeddings of the next tokens and the hidden states before them."""
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)], -1))
        return self.norm(self.layers[0](x, **of_layer))


def empty(model: torch.nn.Module) -> Head:
    """A head for a model, on the device "meta"."""
    layer = model.get_decoder().layers[-1]
    with torch.device("meta"):
        return Head(_config(model), type(layer), type(layer.input_layernorm))


def _config(model: torch.nn.Module) -> Any:
    config = copy.deepcopy(model.config.get_text_config(decoder=True))
    config.layer_types, config.num_hidden_layers = ["full_attention"], 1
    return config


def load(model: torch.nn.Module, folder: str | Path) -> Head:
    """Load the head of a model from the folder of its checkpoint.

    Raises:
        GdnfuseError: the folder has no such weights, or their shapes do not fit the model's layers.
    """
    head, layer = empty(model), model.get_decoder().layers[-1]
    weights = _stacked(dict(_read(Path(folder).expanduser(), PREFIX)))
    wanted = head.state_dict()
    if (missing := wanted.keys() - weights.keys()) or (missing := weights.keys() - wanted.keys()):
        what = "all of" if wanted.keys() - weights.keys() else "only"
        raise GdnfuseError(
            f"The weights {PREFIX}* in {folder} must be {what} those of a {type(layer).__name__} between norms, found "
            f"{'no ' if what == 'all of' else ''}{PREFIX}{min(missing)}."
        )
    for name, x in weights.items():
        if x.shape != wanted[name].shape or not x.is_floating_point() or x.itemsize == 1:
            raise GdnfuseError(
                f"The weight {PREFIX}{name} in {folder} must be {list(wanted[name].shape)} in full or half precision, found "
                f"{list(x.shape)} of {x.dtype}."
            )
    head.load_state_dict(weights, assign=True)
    like = next(p for p in layer.parameters() if p.is_floating_point())
    return head.to(like.device, model.dtype).eval().requires_grad_(False)


def _read(folder: Path, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a safetensors checkpoint whose names begin with `prefix`. It is cut off the names."""
    from safetensors import SafetensorError, safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file() and not single.is_file():
        raise GdnfuseError(
            f"MTP reads the folder of a checkpoint in safetensors, found none in {folder}: pass the folder as MTP(n, folder)."
        )
    try:
        where = json.loads(index.read_text())["weight_map"] if index.is_file() else None
        files = {single.name} if where is None else {file for name, file in where.items() if name.startswith(prefix)}
        found = 0
        for file in sorted(files):
            with safe_open(folder / file, "pt") as opened:
                for name in opened.keys():
                    if name.startswith(prefix):
                        found += 1
                        yield name.removeprefix(prefix), opened.get_tensor(name)
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        raise GdnfuseError(f"The checkpoint in {folder} cannot be read: {one_line(e)}.") from e
    if not found:
        raise GdnfuseError(
            f"MTP needs a checkpoint with weights named {PREFIX}*, found none in {folder}: use a checkpoint that has them."
        )


def _stacked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack experts that are stored one by one, as transformers holds them: gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""
    parts: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name in list(weights):
        if m := EXPERT.fullmatch(name):
            parts.setdefault(m[1], {}).setdefault(m[3], {})[int(m[2])] = weights.pop(name)
    for of, kinds in parts.items():
        gate, up, down = (torch.stack([x for _, x in sorted(kinds.get(k, {}).items())]) for k in ("gate", "up", "down"))
        weights |= {f"{of}.gate_up_proj": torch.cat([gate, up], 1), f"{of}.down_proj": down}
    return weights


class Tap:
    """A hook on a model's last norm. It passes the hidden states of a call on.

    Attributes:
        wanted: whether anybody wants them.
        hidden: [B, T, H] of the last call.
    """

    def __init__(self) -> None:
        self.wanted, self.hidden = False, None

    def open(self) -> None:
        """Pass hidden states on until `close`.

        Raises:
            GdnfuseError: somebody else has opened it.
        """
        with _opening:
            if self.wanted:
                raise GdnfuseError(
                    "MTP drafts for one generation of a model at a time, found a second one, of another thread or inside the "
                    "first: give each thread a copy of the model, or other drafts."
                )
            self.wanted = True

    def close(self) -> None:
        self.wanted, self.hidden = False, None

    def __call__(self, module: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
        if self.wanted:
            self.hidden = out

    def __getstate__(self) -> dict[str, Any]:
        return {"wanted": False, "hidden": None}


_opening = threading.Lock()


def tap_of(model: torch.nn.Module) -> Tap:
    """The tap of a model. The first call makes and registers it."""
    norm = model.get_decoder().norm
    found = next((hook for hook in compat.hooks_of(norm).values() if isinstance(hook, Tap)), None)
    if found is None:
        norm.register_forward_hook(found := Tap())
    return found


_heads: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, Head]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class MTP:
    """Drafts with the multi-token prediction head of the checkpoint, the layer named `mtp.*`.

    The head has its own cache. If the model's cache has a fixed length, so has this one, and drafts of a compiled model are
    compiled. If drafts are the likeliest tokens, all drafts of a round are one graph. If they are sampled, there is one graph for
    the tokens of a round and one for each further draft. On a cache that grows the head runs eager.

    Args:
        n: tokens per draft, 1 to 4. After the first draft the head continues from its own output.
        folder: folder of the checkpoint. None is the one that the model was loaded from.

    Raises:
        GdnfuseError: `n` is out of range.

    Source:
        Gloeckle et al. 2024, arXiv:2404.19737; DeepSeek-V3, arXiv:2412.19437, whose form this head has.
    """

    n: int = 3
    folder: str | Path | None = None
    most: int = field(default=4, init=False, repr=False)

    def __post_init__(self) -> None:
        check_count(self.n, "MTP", self.most)

    def check(self, model: torch.nn.Module) -> None:
        """Load the head, and have the model pass on its hidden states.

        Raises:
            GdnfuseError: one of the two is not possible.
        """
        decoder = model.get_decoder()
        parts = all(hasattr(decoder, name) for name in ("norm", "layers", "rotary_emb"))
        if not parts or not hasattr(decoder.layers[-1], "input_layernorm") or "flash" in compat.attention_of(model.config):
            raise GdnfuseError(
                "MTP needs a model whose decoder has layers with input_layernorm, norm and rotary_emb, and attention that takes "
                f"masks, found {type(model).__name__} with {compat.attention_of(model.config) or 'others'}."
            )
        if self._where(model) not in _heads.get(model, ()):
            self.hold(model, load(model, self._where(model)))

    def hold(self, model: torch.nn.Module, head: Head) -> None:
        """Use a head that is not loaded from the folder."""
        _heads.setdefault(model, {})[self._where(model)] = head
        tap_of(model)

    def head(self, model: torch.nn.Module) -> Head:
        """The head of a model that `check` has seen."""
        return _heads[model][self._where(model)]

    def _where(self, model: torch.nn.Module) -> str:
        return str(self.folder or model.config.name_or_path)

    def start(self, run: Run) -> Drafting:
        """The drafter of one generation."""
        return _Chain(self, run)


class _Chain:
    """Drafts with a head during one generation."""

    def __init__(self, of: MTP, run: Run):
        from transformers import DynamicCache, StaticCache

        self.n, self.run, self.tap, self.parts = of.n, run, tap_of(run.model), []
        config, self.capacity = _config(run.model), run.most if run.static else None
        self.cache = StaticCache(config=config, max_cache_len=run.most) if run.static else DynamicCache(config=config)
        self.steps = _Steps(run.model, of.head(run.model))
        # Drafts that are the likeliest tokens need no host code between them, so they are one graph.
        self.at_once = run.compiled is not None and run.static and run.scores is None
        self.known = 0  # accepted tokens that the cache holds
        self.first: int | None = None  # index of the first token that the head has seen
        self.ahead: torch.Tensor | None = None  # drafts [B, n] that were made before the host knew what they follow
        # A prompt may begin after a known prefix and run in several calls. These are the states of the last call.
        self.in_parts = getattr(vars(run.model).get("generate"), "prefixes", None) is not None
        self.tap.open()

    def hear(self, tokens: torch.Tensor) -> None:
        """Take the hidden states of the model's last call, whose tokens were [B, T]."""
        hidden = self.tap.hidden
        if hidden is None:
            raise GdnfuseError(
                "MTP reads the model's last hidden states, found that its graphs were traced without them: "
                "call gdnfuse.compile(model, speculate=gdnfuse.MTP(...))."
            )
        if self.in_parts and self.first is None and hidden.shape[0] == len(tokens) and hidden.shape[1] < tokens.shape[1]:
            self.parts = []  # so that there is no gap
        elif hidden.shape[:2] != tokens.shape:
            raise GdnfuseError(
                f"MTP reads the hidden states of its own generation, {list(tokens.shape)} tokens, found those of "
                f"{list(hidden.shape[:2])}: another thread called the model meanwhile, so give each a copy."
            )
        self.parts.append(hidden.clone())
        self.tap.hidden = None

    def close(self) -> None:
        self.tap.close()

    def draft_ahead(self, picked: torch.Tensor, standing: torch.Tensor) -> Drafts | None:
        """As in `Drafting`."""
        heard = [x.shape[1] for x in self.parts]
        if not self.at_once or self.first is None or heard != [self.n + 1] or picked.shape[1] != self.n + 1:
            return None
        (hidden,), self.parts = self.parts, []
        self.ahead = self._all(picked, hidden, standing.reshape(1).clone())
        return Drafts(self.ahead)

    def propose(self, ids: torch.Tensor, rows: Sequence[Sequence[int]]) -> Drafts | None:
        if self.ahead is not None:
            ahead, self.ahead, self.known = self.ahead, None, ids.shape[1] - 1 - self.first
            return Drafts(ahead)
        hidden, self.parts = torch.cat(self.parts, 1), []
        prompt = self.first is None
        if prompt:
            self._begin(ids, ids.shape[1] - 1 - hidden.shape[1])  # all of its tokens are accepted
        new = ids.shape[1] - 1 - self.first - self.known
        tokens = ids[:, ids.shape[1] - new :]
        if not prompt and self.capacity is not None and hidden.shape[1] == self.n + 1:
            # All rounds have one shape. What is fed after the accepted tokens is overwritten.
            tokens = torch.cat([tokens, tokens[:, -1:].expand(-1, self.n + 1 - new)], 1)
        else:
            hidden = hidden[:, :new]
        if self.at_once and not prompt:
            drafts = self._all(tokens, hidden, torch.full((1,), new - 1, device=tokens.device))
            self.known += new
            return Drafts(drafts)
        done = 0
        while tokens.shape[1] - done > PIECE:  # the mask of a long prompt is as wide as the prompt
            piece = slice(done, done + PIECE)
            self._fed(tokens[:, piece], hidden[:, piece], self.known + done, prompt=True)
            done += PIECE
        x, logits = self._fed(tokens[:, done:], hidden[:, done:], self.known + done, new - 1 - done, prompt)
        self._crop(tokens.shape[1] - new)
        self.known += new
        drafts, probabilities, so_far = [], [], ids
        for i in range(self.n):
            if i:
                x, logits = self._fed(drafts[-1], x, self.known + i - 1, prompt=self.at_once)
            token, p = drawn(self.run, so_far, logits)
            drafts.append(token)
            probabilities += [] if p is None else [p]
            so_far = torch.cat([so_far, token], 1)
        self._crop(self.n - 1)  # they were made from its own hidden states
        return Drafts(torch.cat(drafts, 1), torch.stack(probabilities, 1) if probabilities else None)

    def _all(self, tokens: torch.Tensor, hidden: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """The drafts [B, n] after one of the tokens [B, T], whose index is `last` [1]."""
        steps = _AllSteps(self.steps.model, self.steps.head, self.n)
        call = self.run.compiled(f"mtp_{id(steps.head)}_{tokens.shape[1]}_{self.n}", steps)
        drafts = call(*self._step_arguments(tokens, hidden, self.known, last), self.cache, self.capacity)
        return drafts.clone()  # the next run of a CUDA graph overwrites its results

    def _begin(self, ids: torch.Tensor, first: int) -> None:
        self.first, mask = first, self.run.mask
        self.shift, self.real = torch.full((ids.shape[0], 1), first, device=ids.device), None
        if mask is not None:
            self.shift = self.shift - (mask == 0).sum(1, keepdim=True)
            real = mask[:, first:].bool()
            missing = (self.capacity or real.shape[1]) - real.shape[1]
            self.real = torch.cat([real, real.new_ones(ids.shape[0], missing)], 1)

    def _crop(self, tokens: int) -> None:
        from gdnfuse.generation.rollback import take_back

        take_back(self.cache.layers, tokens)

    def _fed(
        self, tokens: torch.Tensor, hidden: torch.Tensor, known: int, last: int = 0, prompt: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's hidden state [B, 1, H] and logits [B, V] after one of the tokens [B, T]."""
        T, step = tokens.shape[1], self.steps
        if self.run.compiled is not None and self.capacity is not None and not prompt:
            step = self.run.compiled(f"mtp_{id(step.head)}_{T}", step)
        place = torch.full((1,), last, device=tokens.device)
        x, logits = step(*self._step_arguments(tokens, hidden, known, place), self.cache, self.capacity or known + T)
        # The next run of a CUDA graph overwrites its results.
        return (x, logits.float()) if step is self.steps else (x.clone(), logits.to(torch.float32, copy=True))

    def _step_arguments(
        self, tokens: torch.Tensor, hidden: torch.Tensor, known: int, last: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """The arguments of a step, except cache and length."""
        B, T = tokens.shape
        L, real = self.capacity or known + T, self.real
        if real is not None and real.shape[1] < L:
            real = torch.cat([real, real.new_ones(B, L - real.shape[1])], 1)
        at = torch.full((1,), known, device=tokens.device)
        tokens, hidden = tokens.clone(memory_format=torch.contiguous_format), hidden.contiguous()
        return tokens, hidden, at, last, self.shift, None if real is None else real[:, :L]


class _Steps:
    """What a head computes in a step."""

    def __init__(self, model: torch.nn.Module, head: Head):
        self.model, self.head = model, head

    def __call__(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        at: torch.Tensor,
        last: torch.Tensor,
        shift: torch.Tensor,
        real: torch.Tensor | None,
        cache: Any,
        L: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden state [B, 1, H] and the logits [B, V] of one place.

        Args:
            tokens: [B, T].
            hidden: [B, T, H], before each token.
            at: [1], the place in the cache of the first token.
            last: [1], which token to give logits for.
            shift: [B, 1], the position of the first entry of the cache.
            real: [B, L], False where the cache has padding; None if it has none.
            cache: of the head.
            L: number of keys that the layer will see.
        """
        decoder, embedded = self.model.get_decoder(), self.model.get_input_embeddings()(tokens)
        B, T = tokens.shape
        keys = torch.arange(L, device=tokens.device)
        own = at + torch.arange(T, device=tokens.device)
        seen = (keys <= own[:, None])[None].expand(B, T, L)
        if real is not None:
            # A row of padding sees itself, so that its result is finite.
            seen = seen & real[:, None] | (keys == own[:, None])[None]
        mask = seen[:, None]
        if compat.attention_of(self.model.config) != "sdpa":  # other kinds may add their masks
            mask = torch.zeros_like(mask, dtype=embedded.dtype).masked_fill(~mask, torch.finfo(embedded.dtype).min)
        places = (own + shift).clamp(min=0)
        rotary = decoder.rotary_emb(embedded, places[None].expand(3, B, T) if _several(decoder) else places)
        x = self.head(
            embedded, hidden, position_embeddings=rotary, attention_mask=mask, position_ids=places, use_cache=True,
            **cache_argument(self.head.layers[0], cache),
        )  # fmt: skip
        x = x.index_select(1, last)
        return x, self.model.get_output_embeddings()(x)[:, -1]


class _AllSteps(_Steps):
    """All steps of a round on a cache of fixed length: n drafts, each the likeliest token."""

    def __init__(self, model: torch.nn.Module, head: Head, n: int):
        super().__init__(model, head)
        self.n = n

    def __call__(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        at: torch.Tensor,
        last: torch.Tensor,
        shift: torch.Tensor,
        real: torch.Tensor | None,
        cache: Any,
        L: int,
    ) -> torch.Tensor:
        """The drafts [B, n] after one of the places; arguments as in `_Steps`. Later entries of the cache are dropped."""
        x, logits = super().__call__(tokens, hidden, at, last, shift, real, cache, L)
        for layer in cache.layers:
            layer.cumulative_length.sub_(tokens.shape[1] - 1 - last.view(()))
        drafts, place = [logits.float().argmax(-1, keepdim=True)], torch.zeros_like(last)
        for i in range(1, self.n):
            x, logits = super().__call__(drafts[-1], x, at + last + i, place, shift, real, cache, L)
            drafts.append(logits.float().argmax(-1, keepdim=True))
        for layer in cache.layers:
            layer.cumulative_length.sub_(self.n - 1)
        return torch.cat(drafts, 1)


def _several(decoder: torch.nn.Module) -> bool:
    """Whether positions have three axes, as with images."""
    return hasattr(decoder.rotary_emb, "mrope_section")
