"""delta_rule: the gated delta rule in recurrent form (Yang et al. 2024, arXiv:2412.06464), any T.

The definition of all others.
"""

from __future__ import annotations

import torch

from gdnfuse.dialect.l2norm import reference as l2norm
from gdnfuse.dialect.op import acc_dtype, need_tokens, register


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float,
    l2norm_eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S ← exp(g)·S;  S ← S + k ⊗ β(v − Sᵀk);  o = Sᵀ(q·scale), token by token.

    Args:
        q, k: [B, T, H, K], T ≥ 1; key head h serves value heads h·HV/H … (h+1)·HV/H − 1.
        v: [B, T, HV, V].
        g: [B, T, HV], log decay.
        beta: [B, T, HV], in (0, 1), or (0, 2) where the state may have negative eigenvalues.
        state: [B, HV, K, V], the recurrent state before the first token; not written.
        scale: factor on q.
        l2norm_eps: if given, q and k are l2-normalised with it first.

    Returns:
        o [B, T, HV, V] and the new state [B, HV, K, V], both float32 (float64 for float64 inputs).

    Raises:
        ValueError: no tokens.
    """
    need_tokens("delta_rule", v.shape[1])
    acc = acc_dtype(q, k, v, g, beta, state)
    if l2norm_eps is not None:
        q, k = l2norm(q, l2norm_eps), l2norm(k, l2norm_eps)
    groups = v.shape[2] // q.shape[2]
    q, k, v, g, beta = (x.to(acc) for x in (q, k, v, g, beta))
    if groups > 1:
        q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    q = q * scale
    s = state.to(acc)
    out = []
    for t in range(v.shape[1]):
        s = s * g[:, t].exp()[..., None, None]
        delta = (v[:, t] - (s * k[:, t, :, :, None]).sum(-2)) * beta[:, t, :, None]
        s = s + k[:, t, :, :, None] * delta[:, :, None, :]
        out.append((s * q[:, t, :, :, None]).sum(-2))
    return torch.stack(out, 1), s.contiguous()


def fake(q, k, v, g, beta, state, scale, l2norm_eps=None):
    need_tokens("delta_rule", v.shape[1])
    acc = acc_dtype(q, k, v, g, beta, state)
    return torch.empty(v.shape, dtype=acc, device=v.device), torch.empty(state.shape, dtype=acc, device=v.device)


def example_tensors(B, T, H, HV, K, V, dtype=torch.float32, state_dtype=torch.float32):
    """Random inputs of a rule, gates before their nonlinearities: q, k, v, a, b, A_log, dt_bias, state."""
    return (
        torch.randn(B, T, H, K, dtype=dtype),
        torch.randn(B, T, H, K, dtype=dtype),
        torch.randn(B, T, HV, V, dtype=dtype),
        torch.randn(B, T, HV, dtype=dtype),
        torch.randn(B, T, HV, dtype=dtype),
        torch.rand(HV).add(0.1).log(),
        torch.randn(HV),
        torch.randn(B, HV, K, V, dtype=state_dtype),
    )


def examples():
    calls = []
    for B, T, H, HV, K, V, eps in [(2, 1, 2, 4, 8, 16, 1e-6), (1, 5, 2, 2, 16, 8, None)]:
        q, k, v, a, b, _, _, s = example_tensors(B, T, H, HV, K, V)
        calls.append(((q, k, v, -a.exp(), b.sigmoid(), s), {"scale": K**-0.5, "l2norm_eps": eps}))
    return calls


op = register("delta_rule", reference, fake, examples, equation="S ← e^g·S; S ← S + k ⊗ β(v − Sᵀk); o = Sᵀ(q·scale)")
