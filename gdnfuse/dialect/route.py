"""route: the router of a mixture of experts. It chooses experts and their weights for each row."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gdnfuse.dialect.op import acc_dtype, register
from gdnfuse.dialect.rms_norm import reference as rms_norm


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    top_k: int,
    normalize: bool,
    wide_logits: bool = False,
    wide_weights: bool = False,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k largest values of softmax(x·Wᵀ), largest first, and their experts (Shazeer et al., arXiv:1701.06538).

    The logits are rounded as in the model, because rounding changes which experts are chosen: with 8 bits of mantissa many of 256
    logits are equal. Among equal logits torch.topk may choose any, and the kernel chooses the lowest index.

    Args:
        x: [N, H].
        weight: [E, H].
        top_k: how many experts a row goes to.
        normalize: whether the weights of a row are divided by their sum.
        wide_logits: whether x·Wᵀ is computed in float32, as in Lara, instead of rounded to weight's dtype.
        wide_weights: whether the weights stay in float32, as in Mixtral, instead of rounded to x's dtype.
        norm_weight: [H] for an RMSNorm of x, or None.
        norm_eps, norm_offset: as for rms_norm.

    Returns:
        routing weights [N, top_k], and indices [N, top_k] of int64.

    Raises:
        ValueError: top_k is not between 1 and E.
    """
    need_experts(top_k, weight.shape[0])
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, norm_eps, norm_offset)
    acc = acc_dtype(x, weight)
    logits = F.linear(x.to(acc), weight.to(acc)) if wide_logits else F.linear(x.to(weight.dtype), weight)
    routing_weights, indices = torch.topk(torch.softmax(logits, -1, dtype=acc), top_k, -1)
    if normalize:
        routing_weights = routing_weights / routing_weights.sum(-1, keepdim=True)
    return routing_weights if wide_weights else routing_weights.to(x.dtype), indices


def need_experts(top_k: int, experts: int) -> None:
    """Raise ValueError if there are fewer experts than a row needs."""
    if not 1 <= top_k <= experts:
        raise ValueError(f"route needs top_k between 1 and the number of experts, {experts}, found {top_k}.")


def fake(
    x, weight, top_k, normalize, wide_logits=False, wide_weights=False, norm_weight=None, norm_eps=0.0, norm_offset=0.0
):  # fmt: skip
    need_experts(top_k, weight.shape[0])
    dtype = acc_dtype(x, weight) if wide_weights else x.dtype
    shape = (x.shape[0], top_k)
    return torch.empty(shape, dtype=dtype, device=x.device), torch.empty(shape, dtype=torch.int64, device=x.device)


def example_call(N, H, E, top_k, dtype=torch.float32, *, normalize=True, norm=False, **options):
    """A call with random inputs."""
    if norm:
        options |= {"norm_weight": torch.randn(H).to(dtype), "norm_eps": 1e-6, "norm_offset": 1.0}
    return (torch.randn(N, H).to(dtype), (torch.randn(E, H) * H**-0.5).to(dtype), top_k, normalize), options


def examples():
    return [
        example_call(3, 8, 6, 2),
        example_call(1, 8, 5, 3, torch.bfloat16, normalize=False, norm=True),
        example_call(2, 8, 4, 4, torch.bfloat16, wide_logits=True, wide_weights=True),
    ]


op = register("route", reference, fake, examples, equation="top-k of softmax(x·Wᵀ) [/ its sum]")
