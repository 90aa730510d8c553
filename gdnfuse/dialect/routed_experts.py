"""routed_experts: route and the experts that it chooses in one op, for one row.

Experts can start before the choice is complete.
"""

from __future__ import annotations

import torch

from gdnfuse.dialect.experts import FEW
from gdnfuse.dialect.experts import example_call as experts_call
from gdnfuse.dialect.experts import fake as experts_fake
from gdnfuse.dialect.experts import reference as experts
from gdnfuse.dialect.op import register
from gdnfuse.dialect.route import need_experts
from gdnfuse.dialect.route import reference as route


def reference(
    x: torch.Tensor,
    router: torch.Tensor,
    top_k: int,
    normalize: bool,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str = "silu",
    wide_logits: bool = False,
    wide_weights: bool = False,
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
    """The experts that route chooses. Both read x after one norm.

    Args:
        x: [N, H].
        router: [E, H], route's weight.
        top_k, normalize, wide_logits, wide_weights: as for route.
        gate_up, down, activation, shared_gate, shared_up, shared_down, shared_expert_gate, residual, scales, format: as for
            experts.
        norm_weight, norm_eps, norm_offset: as for both.

    Returns:
        [N, H] in x's dtype.

    Raises:
        ValueError: top_k is not between 1 and E, or another activation.
    """
    norm = (norm_weight, norm_eps, norm_offset)
    weights, indices = route(x, router, top_k, normalize, wide_logits, wide_weights, *norm)
    shared = (shared_gate, shared_up, shared_down, shared_expert_gate)
    return experts(x, indices, weights, gate_up, down, activation, *norm, *shared, residual, scales, format)


def fake(x, router, top_k, normalize, gate_up, down, activation="silu", *args, **kwargs):
    need_experts(top_k, router.shape[0])
    return experts_fake(x, None, None, gate_up, down, activation)


def example_call(N, H, E, top_k, intermediate, dtype=torch.float32, *, normalize=True, wide_logits=False, **options):
    """A call with random inputs; options as of experts."""
    (x, _, _, gate_up, down), options = experts_call(N, H, E, top_k, intermediate, dtype, **options)
    router = (torch.randn(E, H) * H**-0.5).to(dtype)
    return (x, router, top_k, normalize, gate_up, down), {"wide_logits": wide_logits, **options}


def examples():
    return [
        example_call(1, 8, 6, 2, 4),
        example_call(1, 8, 6, 3, 4, shared=6, gated=True, norm=True, residual=True, normalize=False),
        example_call(1, 8, 6, 2, 4, torch.bfloat16, wide_logits=True, shared=4),
        example_call(1, 136, 6, 2, 64, torch.bfloat16, shared=4, norm=True, format="fp8_block128"),
    ]


op = register(
    "routed_experts",
    reference,
    fake,
    examples,
    equation="experts of the top-k of softmax(x·Wᵀ) [+ σ(s·x)·shared(x)] [+ residual]",
    inline=lambda arguments: arguments["x"].shape[0] * arguments["top_k"] <= FEW,  # as experts
)
