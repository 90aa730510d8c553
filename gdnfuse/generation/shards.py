"""Shards: models whose weights transformers has split over ranks, as `from_pretrained` with a tp_plan does under torchrun.

transformers' plan for a Gated DeltaNet layer gathers the results of every projection. So each rank computes conv, rule and states
of all heads. With `gdnfuse.compile(model, tensor_parallel="heads")` a rank has the projections, conv channels, gates and states
of its key heads and of their value heads, and out_proj by rows. One all-reduce per mixer is left. The model's code does not
change: it takes its sizes from two attributes of the mixer, and everything else from its tensors.

Ranks agree before anything is changed (`agreement.py`), and before each layer. If one fails, all restore what they had and raise
its error.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gdnfuse import compat, versions
from gdnfuse.errors import GdnfuseError, one_line
from gdnfuse.generation.agreement import Agreement, Alone
from gdnfuse.generation.wrappers import gdn_layers

AS_LOADED, HEADS = "as_loaded", "heads"
WAYS = (AS_LOADED, HEADS)
TRACEABLE = (5, 23)  # the first such transformers: hooks of older ones break graphs, or torch cannot trace their embedding
CUT = "_gdnfuse_cut_by_heads"  # attribute of a model

K, V, HV = "key_dim", "value_dim", "num_v_heads"  # attributes of a mixer with the widths of parts of a projection


@dataclass(frozen=True)
class Kind:
    """The layout of a mixer's projections.

    Attributes:
        rows: for each projection of the input, the parts that follow each other in its rows. In each part the rows of a key head,
            with those of all its value heads, are adjacent.
        out: the projection of the output. Its columns are the value heads.
    """

    rows: dict[str, tuple[str, ...]]
    out: str


KINDS = (
    Kind({"in_proj_qkv": (K, K, V), "in_proj_z": (V,), "in_proj_b": (HV,), "in_proj_a": (HV,)}, "out_proj"),
    # Rows have q, k, v and z of one key head after the other; b and a likewise. So each projection is one part.
    Kind({"in_proj_qkvz": ("",), "in_proj_ba": ("",)}, "out_proj"),
    Kind({"q_proj": (K,), "k_proj": (K,), "v_proj": (V,), "g_proj": (V,), "b_proj": (HV,), "a_proj": (HV,)}, "o_proj"),
)
SIZES = (K, V, HV, "num_k_heads", "conv_dim")


def sharded(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter that is a DTensor, by name. If it has several names, it appears under each."""
    if not torch.distributed.is_available():
        return {}
    other = ((n, p) for n, p in model.named_parameters(remove_duplicate=False) if type(p) is not torch.nn.Parameter)
    return {n: p for n, p in other if compat.is_sharded(p)}


def together(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call of a split model. If another rank has gone, it raises a sentence, which collectives do not."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except RuntimeError as e:
            if not isinstance(e, torch.distributed.DistError) and "gloo" not in str(e):
                raise
            raise GdnfuseError(
                f"Every rank must take part in each call, found that a collective failed on rank {torch.distributed.get_rank()} "
                f"({one_line(e)}): end all ranks and start them again."
            ) from e

    return checked


def device_of(model: torch.nn.Module) -> str:
    """The device of this rank's part of the model."""
    return str(next(model.parameters()).device)


def agreement(way: Any) -> Agreement | Alone:
    """The agreement that the ranks need if a model is compiled in this way."""
    return Alone() if way is None or not _grouped() else Agreement()


def _grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def plan(way: Any, model: torch.nn.Module, **others: Any) -> tuple[Any, list[Mixer | KeyValues]]:
    """The layers that will be cut, after all checks. Nothing is changed.

    Args:
        way: "as_loaded", "heads" or None.
        model: a model of transformers.
        others: arguments of `gdnfuse.compile` that do not work on split models, by name.

    Returns:
        The device mesh, or None if nothing is cut, and the layers.

    Raises:
        GdnfuseError: the model cannot be compiled in this way.
    """
    if way is not None and way not in WAYS:
        raise GdnfuseError(f"tensor_parallel must be {' or '.join(map(repr, WAYS))} or None, found {way!r}.")
    if way is not None and not _grouped():
        raise GdnfuseError(
            f"tensor_parallel={way!r} needs a model that transformers has split over ranks, found no process group: start a "
            f"process for each GPU with torchrun and load with DistributedConfig(tp_plan='auto')."
        )
    given = [name for name, argument in others.items() if argument is not None]
    if given and (way is not None or sharded(model)):
        raise GdnfuseError(
            f"{given[0]} needs a model that is whole on one device, found weights that are split over ranks: leave "
            f"{given[0]} out, or load the model without a tp_plan."
        )
    if way is None or getattr(model, CUT, False):
        return None, []
    if sentence := versions.older("transformers", TRACEABLE):
        raise GdnfuseError(f"tensor_parallel={way!r} needs tensor parallel that torch.compile can trace: {sentence}")
    mesh = _mesh(way, model)
    return (mesh, [*_mixers(model, mesh.size()), *_repeated(model, mesh.size())]) if way == HEADS else (None, [])


def prepare(model: torch.nn.Module, mesh: Any, mixers: list[Mixer | KeyValues], agreement: Agreement | Alone) -> None:
    """Cut the weights of a model, as the plan says.

    Args:
        model: its parameters are changed in place.
        mesh, mixers: from `plan`. All ranks have agreed on them.
        agreement: by which ranks agree on each layer.

    Raises:
        GdnfuseError: on every rank, with the error of the rank that failed. Nothing is cut then.
    """
    own_memory(model)
    if mesh is not None:
        _cut_all(model, mixers, mesh, agreement)


def _mesh(way: str, model: torch.nn.Module) -> Any:
    """The device mesh that a model is split over. Experts may have their own, over the same ranks."""
    meshes = list(dict.fromkeys(p.device_mesh for p in sharded(model).values()))
    if not meshes:
        raise GdnfuseError(
            f"tensor_parallel={way!r} needs a model that transformers has split over ranks, found one that is whole on this "
            f"rank: load it on every rank with DistributedConfig(tp_plan='auto')."
        )
    mesh, ranks = min(meshes, key=lambda mesh: "ep" in (mesh.mesh_dim_names or ())), torch.distributed.get_world_size()
    if mesh.ndim != 1 or mesh.size() != ranks or any(one.mesh.tolist() != mesh.mesh.tolist() for one in meshes):
        raise GdnfuseError(
            f"tensor_parallel={way!r} needs one mesh of all {ranks} ranks, found {' and '.join(sorted(map(str, meshes)))}: load "
            f"the model with tensor parallelism alone."
        )
    return mesh


def share_out(model: torch.nn.Module, plan: dict[str, str], mesh: Any) -> None:
    """Split a model as `from_pretrained` does with a plan. Either every rank has all weights, or none has any.

    transformers' styles are applied to what the plan names. Until `own_memory`, a rank keeps the memory of the whole weights.
    """
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    found = {name: style for name in (*modules, *parameters) if (style := plan.get(_any_number(name)))}
    found |= {name: style for name in parameters if name not in found and (style := found.get(name.rpartition(".")[0]))}
    apply_tensor_parallelism(model, mesh, found)
    if model.config.tie_word_embeddings:
        model.tie_weights()


def _any_number(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


@torch.no_grad()
def own_memory(model: torch.nn.Module) -> None:
    """Copy each rank's part of a weight to its own memory, if it is a slice of the tensor that it was loaded from.

    Otherwise the rank keeps the memory of the whole tensor. Such a part cannot be packed either, because a DTensor knows where in
    its memory it starts. The parameter is a new one, with the same values and names.
    """
    names: dict[int, list[str]] = {}
    for name, p in sharded(model).items():
        names.setdefault(id(p), []).append(name)
    for several in names.values():
        p = model.get_parameter(several[0])
        part = p.to_local()
        if part.untyped_storage().nbytes() == part.nbytes:
            continue
        new = _Layout.of(p).parameter(part.clone(memory_format=torch.contiguous_format))
        for name in several:
            module, _, attribute = name.rpartition(".")
            model.get_submodule(module)._parameters[attribute] = new
        del p, part  # so that there is at most one additional whole weight


@dataclass(frozen=True)
class _Layout:
    """How a parameter is split, without a reference to its memory. `mesh` is None for a plain one."""

    mesh: Any
    placements: Any
    shape: torch.Size
    stride: tuple[int, ...]
    requires_grad: bool

    @classmethod
    def of(cls, p: Any) -> _Layout:
        mesh, placements = (p.device_mesh, p.placements) if compat.is_sharded(p) else (None, None)
        return cls(mesh, placements, p.shape, p.stride(), p.requires_grad)

    def parameter(self, part: torch.Tensor) -> torch.nn.Parameter:
        """The parameter of which this rank has `part`."""
        if self.mesh is not None:
            from torch.distributed.tensor import DTensor

            more = {"run_check": False, "shape": self.shape, "stride": self.stride}
            part = DTensor.from_local(part, self.mesh, self.placements, **more)
        return torch.nn.Parameter(part, requires_grad=self.requires_grad)


@dataclass(frozen=True)
class Mixer:
    """A GDN layer that can be cut.

    Attributes:
        path: path of the module.
        module: the layer, with the sizes of all heads.
        kind: the layout of its projections.
    """

    path: str
    module: Any
    kind: Kind

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of its linears."""
        return (*self.kind.rows, self.kind.out)

    @property
    def facts(self) -> list[Any]:
        """What must be equal on all ranks."""
        return [self.path, *self.kind.rows, *(getattr(self.module, size) for size in SIZES)]

    def cut(self, mesh: Any, undo: _Undo) -> None:
        """Keep only the heads of this rank."""
        _cut(self, mesh, undo)


@dataclass(frozen=True)
class KeyValues:
    """An attention layer with fewer key heads than ranks. Each rank gets one whole head, which others have too.

    Attributes:
        path: path of the module.
        module: the layer, with k_proj and v_proj.
        heads: number of key heads in all.
        queries: number of query heads in all.
    """

    path: str
    module: Any
    heads: int
    queries: int
    linears = ("k_proj", "v_proj")

    @property
    def facts(self) -> list[Any]:
        """What must be equal on all ranks."""
        return [self.path, self.heads, self.queries]

    def cut(self, mesh: Any, undo: _Undo) -> None:
        """Keep only the key head that this rank's queries use."""
        rank, ranks = mesh.get_local_rank(), mesh.size()
        new = [_whole(getattr(self.module, n).weight).chunk(self.heads)[rank * self.heads // ranks].clone() for n in self.linears]
        for name, part in zip(self.linears, new, strict=True):
            linear = getattr(self.module, name)
            undo.parameter(linear, "weight")
            linear._parameters["weight"] = torch.nn.Parameter(part, requires_grad=linear.weight.requires_grad)
            undo.attribute(linear, "forward")
            vars(linear).pop("forward", None)
            undo.attribute(linear, "out_features")
            linear.out_features = part.shape[0]
        undo.attribute(self.module, "num_key_value_groups")
        self.module.num_key_value_groups = self.queries // ranks


def _repeated(model: Any, ranks: int) -> Iterator[KeyValues]:
    """The attention layers with fewer key heads than ranks, if the plan splits them by heads.

    Raises:
        GdnfuseError: the number of key heads neither divides the number of ranks nor is a multiple of it.
    """
    plan = getattr(model, "tp_plan", None) or {}
    if not any(name.rpartition(".")[2] == "k_proj" and style == "colwise" for name, style in plan.items()):
        return
    config = model.config.get_text_config(decoder=True)
    heads, queries = config.num_key_value_heads, config.num_attention_heads
    for what, count, fits in (
        (
            "Key heads of attention must divide the ranks or be a multiple of them",
            heads,
            heads % ranks == 0 or ranks % heads == 0,
        ),
        ("Query heads of attention must be a multiple of the ranks", queries, queries % ranks == 0),
    ):
        if not fits:
            raise GdnfuseError(f"{what}, found {count} and {ranks} ranks: use another number of ranks.")
    if heads % ranks == 0:
        return
    for path, module in model.named_modules():
        if hasattr(module, "num_key_value_groups") and all(hasattr(module, name) for name in KeyValues.linears):
            for name in KeyValues.linears:
                _check_linear(f"{path}.{name}", getattr(module, name))
            yield KeyValues(path, module, heads, queries)


def _mixers(model: torch.nn.Module, ranks: int) -> Iterator[Mixer]:
    """The GDN layers of a model.

    Raises:
        GdnfuseError: one cannot be cut for so many ranks.
    """
    for path in gdn_layers(model):
        module = model.get_submodule(path)
        linears = {n for n, m in module.named_children() if "proj" in n}
        kind = next((k for k in KINDS if linears == {*k.rows, k.out}), None)
        if kind is None or not all(isinstance(getattr(module, size, None), int) for size in SIZES):
            raise GdnfuseError(
                f"tensor_parallel='heads' must know the layout of a mixer's projections, found {type(module).__name__} with "
                f"{', '.join(sorted(linears))}: use tensor_parallel='as_loaded'."
            )
        for name in (*kind.rows, kind.out):
            _check_linear(f"{path}.{name}", getattr(module, name))
        if module.num_k_heads % ranks:
            raise GdnfuseError(
                f"Key heads must be split evenly over ranks, found {module.num_k_heads} in {path} and {ranks} ranks: use a "
                f"number of ranks that divides {module.num_k_heads}, or tensor_parallel='as_loaded'."
            )
        yield Mixer(path, module, kind)


def _check_linear(path: str, linear: torch.nn.Module) -> None:
    forward = vars(linear).get("forward")
    theirs = forward is None or getattr(forward, "__module__", "").startswith("transformers.")
    if type(linear) is not torch.nn.Linear or linear.bias is not None or not theirs:
        bias = " with a bias" if getattr(linear, "bias", None) is not None else ""
        found = f"{type(linear).__name__}{bias}{'' if theirs else ' with a forward of its own'}"
        raise GdnfuseError(
            f"tensor_parallel='heads' cuts plain linears without bias, found {found} at {path}: leave adapters and quantisation "
            f"away, or use tensor_parallel='as_loaded'."
        )


class _Undo:
    """What a model had, to restore it if a rank fails. The host keeps copies of weights of a GPU, which has no room for both."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []

    def parameter(self, module: Any, name: str) -> None:
        self.steps.append(_putting_back(module, name, module._parameters[name]))

    def attribute(self, module: Any, name: str) -> None:
        had, before = name in vars(module), vars(module).get(name)
        self.steps.append(lambda: setattr(module, name, before) if had else vars(module).pop(name, None))

    def all(self) -> None:
        while self.steps:
            self.steps.pop()()


def _putting_back(module: Any, name: str, p: torch.nn.Parameter) -> Callable[[], None]:
    part, layout = p.to_local() if compat.is_sharded(p) else p.data, _Layout.of(p)
    if part.device.type in ("cpu", "meta"):
        return functools.partial(module._parameters.update, {name: p})
    device, kept = part.device, part.cpu()
    return lambda: module._parameters.update({name: layout.parameter(kept.to(device))})


@torch.no_grad()
def _cut_all(model: Any, mixers: list[Mixer | KeyValues], mesh: Any, agreement: Agreement) -> None:
    """Cut one layer after the other. All ranks must succeed before the next one."""
    undo, failed = _Undo(), None
    try:
        for mixer in mixers:
            with agreement.reached(failed=failed):
                _room_for(mixer)
            try:
                mixer.cut(mesh, undo)
            except Exception as e:  # for example out of memory; the others learn of it before the next layer
                failed = e
        with agreement.reached(failed=failed):
            pass
    except BaseException:
        undo.all()
        raise
    setattr(model, CUT, True)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _refuse_to_save


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise GdnfuseError(
        "A model to save must be whole or split by transformers alone, found one that was cut by heads: save it before "
        "gdnfuse.compile(tensor_parallel='heads'), or load it again."
    )


def _room_for(mixer: Mixer | KeyValues) -> None:
    """Raise if there is no room for a whole weight. Inside a collective the other ranks would wait for this one."""
    largest = max((getattr(mixer.module, name).weight for name in mixer.linears), key=lambda w: w.numel())
    torch.empty(largest.shape, dtype=largest.dtype, device=largest.device)


def _cut(mixer: Mixer, mesh: Any, undo: _Undo) -> None:
    """Leave a mixer with the heads of this rank. Collectives come first, so nothing has changed if another rank fails."""
    module, rank, ranks = mixer.module, mesh.get_local_rank(), mesh.size()

    def rows(x: torch.Tensor, parts: tuple[str, ...]) -> torch.Tensor:
        widths = [getattr(module, part) for part in parts] if parts != ("",) else [x.shape[0]]
        return torch.cat([part.chunk(ranks)[rank] for part in x.split(widths)])

    new: list[tuple[Any, str, torch.Tensor]] = []
    for name, parts in mixer.kind.rows.items():
        linear = getattr(module, name)
        new.append((linear, "weight", rows(_whole(linear.weight), parts)))
    conv, out = module.conv1d, getattr(module, mixer.kind.out)
    new += [(conv, name, rows(_whole(p), (K, K, V))) for name, p in conv.named_parameters()]
    new += [(module, name, rows(_whole(getattr(module, name)), (HV,))) for name in ("A_log", "dt_bias")]
    new.append((out, "weight", _whole(out.weight).chunk(ranks, 1)[rank].contiguous()))

    for owner, name, part in new:
        undo.parameter(owner, name)
        requires_grad = owner._parameters[name].requires_grad
        owner._parameters[name] = torch.nn.Parameter(part, requires_grad=requires_grad)
    for size in SIZES:
        undo.attribute(module, size)
        setattr(module, size, getattr(module, size) // ranks)
    for size in ("in_channels", "out_channels", "groups"):
        undo.attribute(conv, size)
        setattr(conv, size, module.conv_dim)
    for name in (*mixer.kind.rows, mixer.kind.out):
        linear = getattr(module, name)
        undo.attribute(linear, "forward")
        vars(linear).pop("forward", None)  # set by the style that gathered its result
        undo.attribute(linear, "out_features")
        linear.out_features = linear.weight.shape[0]
    _sum_up(out, mesh)


def _whole(p: torch.Tensor) -> torch.Tensor:
    return p.full_tensor() if compat.is_sharded(p) else p.data


def _sum_up(out: Any, mesh: Any) -> None:
    """Let a projection return the sum over all ranks, by transformers' own style for rows."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    ALL_PARALLEL_STYLES["rowwise"].install_forward(out, mesh)
    summed = out.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise GdnfuseError(
                "A model that was cut by heads must run under torch.no_grad(), found grad mode on: call it under torch.no_grad()."
            )
        return summed(x)

    out.forward = forward
