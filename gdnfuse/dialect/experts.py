"""experts: the experts that a router chose for each row, with the shared expert, its gate and the residual, in one op."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from gdnfuse.dialect.dequantize import reference as dequantize
from gdnfuse.dialect.op import acc_dtype, register
from gdnfuse.dialect.rms_norm import reference as rms_norm
from gdnfuse.formats import named

ACTIVATIONS = {"silu": F.silu}
FEW = 256  # with at most so many choices, each reads the weights of its own expert


def reference(
    x: torch.Tensor,
    indices: torch.Tensor,
    routing_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str = "silu",
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    shared_gate: torch.Tensor | None = None,
    shared_up: torch.Tensor | None = None,
    shared_down: torch.Tensor | None = None,
    shared_expert_gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scales: list[torch.Tensor] | None = None,
    format: str = "",
) -> torch.Tensor:
    """Σⱼ wⱼ·Dₑ·(act(Gₑ·x)·Uₑ·x) with e = indices[j], + [σ(s·x)·] the shared expert's, + residual.

    The meaning is that of transformers' eager loop over experts. Weights are applied after the down projection. An index of E,
    with which expert parallelism masks a choice, adds nothing. The sum is rounded once.

    Args:
        x: [N, H].
        indices: [N, k] of int64, from 0 to E.
        routing_weights: [N, k].
        gate_up: [E, 2·I, H], the rows of each gate above those of its up.
        down: [E, H, I].
        activation: act; "silu".
        norm_weight: [H] for an RMSNorm of x, before all that reads x, or None.
        norm_eps, norm_offset: as for rms_norm.
        shared_gate, shared_up: [S, H] of an expert that takes every row, or None.
        shared_down: [H, S], or None.
        shared_expert_gate: s, [1, H], or None if the shared expert has no gate.
        residual: [N, H], or None.
        scales: of gate_up and of down, or of these and shared_gate, shared_up and shared_down, which then are data of quantised
            weights; they become weights of x's dtype, those of no more experts than are needed.
        format: of those, as of dequantize.

    Returns:
        [N, H] in x's dtype.

    Raises:
        ValueError: another activation.
    """
    act, dtype = _known(activation), x.dtype
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, norm_eps, norm_offset)
    acc = acc_dtype(x, routing_weights)
    choices = _one_by_one if few(indices) else _by_expert
    experts, shared = (scales or (None, None))[:2], (scales or ())[2:]
    of = [partial(_taken, w, s, format, dtype) for w, s in zip((gate_up, down), experts, strict=True)]
    if shared:
        stored = zip((shared_gate, shared_up, shared_down), shared, strict=True)
        shared_gate, shared_up, shared_down = (dequantize(w, s, format, dtype) for w, s in stored)
    wide = x.to(dtype if scales else gate_up.dtype)
    y = (choices(wide, indices, gate_up.shape[0], *of, act, acc) * routing_weights.to(acc)[..., None]).sum(1)
    if shared_down is not None:
        wide = x.to(shared_down.dtype)
        h = act(F.linear(wide, shared_gate).to(acc)) * F.linear(wide, shared_up).to(acc)
        shared = F.linear(h.to(shared_down.dtype), shared_down).to(acc)
        if shared_expert_gate is not None:
            shared = F.linear(x.to(shared_expert_gate.dtype), shared_expert_gate).to(acc).sigmoid() * shared
        y = y + shared
    return (y if residual is None else residual.to(acc) + y).to(dtype)


def _known(activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"experts needs one of the activations {', '.join(ACTIVATIONS)}, found {activation}.")
    return ACTIVATIONS[activation]


def few(indices: torch.Tensor) -> bool:
    """Whether there are so few choices that a compiler may trace the reference, which then depends only on sizes."""
    N, k = indices.shape
    return isinstance(N, int) and N * k <= FEW


def _taken(weight, scale, format, dtype, at):
    """Weights of the experts `at`, dequantised if they have a scale."""
    return weight[at] if scale is None else dequantize(weight[at], scale[at], format, dtype)


def _one_by_one(x, indices, E, gate_up, down, act, acc):
    """The result of each choice, [N, k, H]. Compiled, products, sums and lookup are one loop, and no weight is copied."""
    expert = indices.clamp(max=E - 1)
    gate, up = (gate_up(expert).to(acc) * x.to(acc)[:, None, None]).sum(-1).chunk(2, -1)
    w = down(expert)
    h = (act(gate) * up).to(w.dtype).to(acc)
    return (w.to(acc) * h[:, :, None]).sum(-1).masked_fill((indices >= E)[..., None], 0)


def _by_expert(x, indices, E, gate_up, down, act, acc):
    """The same, with the weights of each needed expert read once. For this the indices are read by the host."""
    N, k = indices.shape
    y = torch.zeros((N * k, x.shape[1]), dtype=acc, device=x.device)
    chosen = indices.reshape(-1)
    order, start = chosen.argsort(stable=True), 0
    for e, rows in enumerate(torch.bincount(chosen, minlength=E)[:E].tolist()):
        if rows:
            at = order[start : start + rows]
            gate, up = F.linear(x[at // k], gate_up(e)).to(acc).chunk(2, -1)
            w = down(e)
            y[at] = F.linear((act(gate) * up).to(w.dtype), w).to(acc)
        start += rows
    return y.view(N, k, -1)


def fake(
    x, indices, routing_weights, gate_up, down, activation="silu", norm_weight=None, norm_eps=0.0, norm_offset=0.0,
    shared_gate=None, shared_up=None, shared_down=None, shared_expert_gate=None, residual=None,
    scales=None, format="",
):  # fmt: skip
    _known(activation)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def example_call(
    N, H, E, top_k, intermediate, dtype=torch.float32, *, shared=0, gated=False, norm=False, residual=False, masked=False,
    format="",
):  # fmt: skip
    """A call with random inputs: `shared` columns of a shared expert, if any; `masked` gives the first row an index of E; with a
    format the experts are quantised, the shared one too."""
    draw = lambda *shape: (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)  # noqa: E731
    indices = torch.rand(N, E).topk(top_k, -1).indices
    if masked:
        indices[0, 0] = E
    options = {
        "norm_weight": torch.randn(H).to(dtype) if norm else None,
        "norm_eps": 1e-6 if norm else 0.0,
        "norm_offset": 1.0 if norm else 0.0,
        "shared_gate": draw(shared, H) if shared else None,
        "shared_up": draw(shared, H) if shared else None,
        "shared_down": draw(H, shared) if shared else None,
        "shared_expert_gate": draw(1, H) if gated else None,
        "residual": torch.randn(N, H).to(dtype) if residual else None,
    }
    weights = torch.rand(N, top_k).softmax(-1).to(dtype)
    stored = [draw(E, 2 * intermediate, H), draw(E, H, intermediate)]
    if format:
        pairs = [named(format).quantize(w) for w in stored]
        stored = [data for data, _ in pairs]
        names = ("shared_gate", "shared_up", "shared_down") if shared else ()
        of_shared = {name: named(format).quantize(options[name]) for name in names}
        options |= {name: data for name, (data, _) in of_shared.items()}
        options |= {"scales": [scale for _, scale in (*pairs, *of_shared.values())], "format": format}
    return (torch.randn(N, H).to(dtype), indices, weights, *stored), options


def examples():
    return [
        example_call(5, 8, 6, 2, 4, masked=True),
        example_call(1, 8, 6, 3, 4, torch.bfloat16, shared=6, gated=True, norm=True, residual=True),
        example_call(3, 8, 4, 2, 6, shared=4),
        example_call(3, 136, 4, 2, 64, torch.bfloat16, masked=True, format="fp8_block128"),
        example_call(2, 136, 4, 2, 64, torch.bfloat16, shared=32, gated=True, format="fp8_block128"),
        example_call(160, 8, 4, 2, 6, masked=True, format="fp8_block128"),
    ]


op = register(
    "experts",
    reference,
    fake,
    examples,
    equation="Σ wⱼ·Dₑ·(silu(Gₑ·x)·Uₑ·x), e = indices[j] [+ σ(s·x)·shared(x)] [+ residual]",
    # For many rows the reference loops over the needed experts, which are known only at run time.
    inline=lambda arguments: few(arguments["indices"]),
)
