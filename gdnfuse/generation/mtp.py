"""MTP heads: a layer of a checkpoint besides the model's, trained to say the token after next (DeepSeek-V3, arXiv:2412.19437).

transformers drops its weights, named `mtp.*`, when it loads a Qwen3-Next or Qwen3.5. They are loaded here, once, into the model's
own kind of layer:

    x = norm(decoder_layer(fc([norm(embedding of the next token) | norm(the model's last hidden state)])));  logits = head(x)

Embedding, head and rotary embedding are the model's. For a token further on x takes the hidden state's place: the head goes again
over what it made itself. What the model has checked is fed to it anew, with the model's own hidden states.
"""

from __future__ import annotations

import copy
import json
import re
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
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class Head(torch.nn.Module):
    """The weights of one head, named as in checkpoints behind `mtp.`.

    Args:
        config: of the model's text part, with the head's one layer.
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
        """x [B, T, H] of the embeddings of the next tokens and the hidden states before them."""
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
    """The head of a model from its checkpoint's folder.

    Raises:
        GdnfuseError: the folder has no such weights, or others than the model's layers want.
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
    """Tensors of a checkpoint in safetensors whose names begin so, without that."""
    from safetensors import SafetensorError, safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file() and not single.is_file():
        raise GdnfuseError(
            f"MTP reads the folder of a checkpoint in safetensors, found none in {folder}: MTP(n, folder) says where it is."
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
        raise GdnfuseError(f"MTP needs a checkpoint with weights named {PREFIX}*, found none in {folder}.")


def _stacked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts that are stored one by one as transformers holds them, gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""
    parts: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name in list(weights):
        if m := EXPERT.fullmatch(name):
            parts.setdefault(m[1], {}).setdefault(m[3], {})[int(m[2])] = weights.pop(name)
    for of, kinds in parts.items():
        gate, up, down = (torch.stack([x for _, x in sorted(kinds.get(k, {}).items())]) for k in ("gate", "up", "down"))
        weights |= {f"{of}.gate_up_proj": torch.cat([gate, up], 1), f"{of}.down_proj": down}
    return weights


class Tap:
    """A hook of a model's last norm, which holds the hidden states of a call on to whoever wants them.

    Attributes:
        wanted: whether anybody does.
        hidden: [B, T, H] of the last call.
    """

    def __init__(self) -> None:
        self.wanted, self.hidden = False, None

    def __call__(self, module: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
        if self.wanted:
            self.hidden = out

    def __getstate__(self) -> dict[str, Any]:
        return {"wanted": False, "hidden": None}


def tap_of(model: torch.nn.Module) -> Tap:
    """The one of a model, made and registered at first."""
    norm = model.get_decoder().norm
    found = next((hook for hook in compat.hooks_of(norm).values() if isinstance(hook, Tap)), None)
    if found is None:
        norm.register_forward_hook(found := Tap())
    return found


_heads: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, Head]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class MTP:
    """Drafts what the checkpoint's own head says, the layer named `mtp.*`.

    It runs eager, on a cache of its own that grows.

    Args:
        n: tokens per draft, 1 to 4; for more than the first the head goes over what it made itself.
        folder: of the checkpoint; None takes where the model was loaded from.

    Raises:
        GdnfuseError: another number.
    """

    n: int = 3
    folder: str | Path | None = None
    most: int = field(default=4, init=False, repr=False)

    def __post_init__(self) -> None:
        check_count(self.n, "MTP", self.most)

    def check(self, model: torch.nn.Module) -> None:
        """Load the head, and have the model hand on its hidden states. Raises GdnfuseError where that cannot be."""
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
        """Take a head for the one of the folder."""
        _heads.setdefault(model, {})[self._where(model)] = head
        tap_of(model)

    def head(self, model: torch.nn.Module) -> Head:
        return _heads[model][self._where(model)]

    def _where(self, model: torch.nn.Module) -> str:
        return str(self.folder or model.config.name_or_path)

    def start(self, run: Run) -> Drafting:
        return _Chain(self, run)


class _Chain:
    """One generation's drafts of a head."""

    def __init__(self, of: MTP, run: Run):
        from transformers import DynamicCache

        self.n, self.run, self.head = of.n, run, of.head(run.model)
        self.cache, self.tap = DynamicCache(config=_config(run.model)), tap_of(run.model)
        self.tap.wanted, self.parts = True, []
        self.first: int | None = None  # the place among all tokens of the first that the head has seen

    def hear(self) -> None:
        """Take the hidden states of the model's last call."""
        if self.tap.hidden is None:
            raise GdnfuseError(
                "MTP reads the model's last hidden states, found that its graphs were traced before anybody wanted them: "
                "gdnfuse.compile(model, speculate=gdnfuse.MTP(...))."
            )
        self.parts.append(self.tap.hidden.clone())
        self.tap.hidden = None

    def close(self) -> None:
        self.tap.wanted, self.tap.hidden = False, None

    def propose(self, ids: torch.Tensor, rows: Sequence[Sequence[int]]) -> Drafts | None:
        hidden, self.parts = torch.cat(self.parts, 1), []
        known = self.cache.get_seq_length()
        if self.first is None:
            self.first = ids.shape[1] - 1 - hidden.shape[1]  # of a prompt, all of whose tokens stand
        new = ids.shape[1] - 1 - self.first - known
        x = self._fed(ids[:, ids.shape[1] - new :], hidden[:, :new], known)[:, -1:]
        tokens, probabilities, so_far = [], [], ids
        for i in range(self.n):
            if i:
                x = self._fed(tokens[-1], x, known + new + i - 1)
            logits = self.run.model.get_output_embeddings()(x)[:, -1].float()
            token, p = drawn(self.run, so_far, logits)
            tokens.append(token)
            probabilities += [] if p is None else [p]
            so_far = torch.cat([so_far, token], 1)
        self.cache.crop(-(self.n - 1))  # which were made of its own hidden states
        return Drafts(torch.cat(tokens, 1), torch.stack(probabilities, 1) if probabilities else None)

    def _fed(self, tokens: torch.Tensor, hidden: torch.Tensor, known: int) -> torch.Tensor:
        embedded = self.run.model.get_input_embeddings()(tokens)
        B, T = tokens.shape
        L = known + T
        keys = torch.arange(L, device=tokens.device)
        seen = (keys[None] <= keys[known:, None])[None].expand(B, T, L)
        places = (self.first + keys[known:]).expand(B, T)
        if self.run.mask is not None:
            real = self.run.mask[:, self.first : self.first + L].bool()
            real = torch.cat([real, real.new_ones(B, L - real.shape[1])], 1)
            # A row of padding sees itself, so that it is a number.
            seen = seen & real[:, None] | (keys[None] == keys[known:, None])[None]
            places = (places - (self.run.mask == 0).sum(1, keepdim=True)).clamp(min=0)
        mask = torch.zeros(B, 1, T, L, dtype=embedded.dtype, device=tokens.device)
        mask = mask.masked_fill(~seen[:, None], torch.finfo(embedded.dtype).min)
        decoder = self.run.model.get_decoder()
        rotary = decoder.rotary_emb(embedded, places[None].expand(3, B, T) if _several(decoder) else places)
        layer = self.head.layers[0]
        return self.head(
            embedded, hidden, position_embeddings=rotary, attention_mask=mask, position_ids=places, use_cache=True,
            **cache_argument(layer, self.cache),
        )  # fmt: skip


def _several(decoder: torch.nn.Module) -> bool:
    """Whether positions have three axes, as with images."""
    return hasattr(decoder.rotary_emb, "mrope_section")
