"""chunk_delta_rule: the gated delta rule over many tokens, in chunks of 64 (Yang et al. 2024, arXiv:2412.06464, section 3.3)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from gdnfuse.dialect.delta_rule import example_tensors
from gdnfuse.dialect.l2norm import reference as l2norm
from gdnfuse.dialect.op import acc_dtype, need_tokens, register

CHUNK = 64


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    scale: float,
    l2norm_eps: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    checkpoint_every: int = 0,
    beta_max: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """delta_rule for any T ≥ 1 tokens: a triangular system inside each chunk, and one step of the state per chunk.

    Args:
        q, k: [B, T, H, K]; key head h serves value heads h·HV/H … (h+1)·HV/H − 1.
        v: [B, T, HV, V].
        g: [B, T, HV], log decay, ≤ 0.
        beta: [B, T, HV].
        state: [N, HV, K, V], the recurrent state before the first token, zero if None. N is B, or the number of sequences.
        scale: factor on q.
        l2norm_eps: if given, q and k are l2-normalised with it first.
        cu_seqlens: [N + 1] integers from 0 to T. B is then 1, and tokens cu_seqlens[n] … cu_seqlens[n + 1] − 1 are sequence n.
            None: each row is a sequence.
        checkpoint_every: if n > 0, the states after every n·64 tokens are returned too.
        beta_max: the largest possible β. Above 1 nothing is damped, so kernels must round less. The maths is the same.

    Returns:
        o [B, T, HV, V] in v's dtype; the last states [N, HV, K, V]; and the checkpoints [B, T // (64·n), HV, K, V], none if n is
        0. States are float32 (float64 for float64 inputs).

    Raises:
        ValueError: no tokens; a batch or checkpoints together with cu_seqlens; a state without one row per sequence.
    """
    check(v, state, cu_seqlens, checkpoint_every)
    if cu_seqlens is None:
        return _rows(q, k, v, g, beta, state, scale, l2norm_eps, checkpoint_every)
    outs, states = v.new_empty(v.shape), []
    bounds = cu_seqlens.tolist()
    for n, (start, end) in enumerate(pairwise(bounds)):
        s = None if state is None else state[n : n + 1]
        part = (x[:, start:end] for x in (q, k, v, g, beta))
        outs[:, start:end], last, none = _rows(*part, s, scale, l2norm_eps, 0)
        states.append(last)
    return outs, torch.cat(states), none


def check(v: torch.Tensor, state: torch.Tensor | None, cu_seqlens: torch.Tensor | None, checkpoint_every: int) -> None:
    """Raise ValueError as described at `reference`."""
    need_tokens("chunk_delta_rule", v.shape[1])
    if checkpoint_every < 0:
        raise ValueError(f"checkpoint_every must not be negative, found {checkpoint_every}.")
    if cu_seqlens is not None and (v.shape[0] != 1 or checkpoint_every):
        raise ValueError(f"With cu_seqlens B must be 1 and checkpoint_every 0, found B = {v.shape[0]} and {checkpoint_every}.")
    rows = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if state is not None and state.shape[0] != rows:
        raise ValueError(f"The state must have a row for each of the {rows} sequences, found {state.shape[0]}.")


def _rows(q, k, v, g, beta, state, scale, l2norm_eps, checkpoint_every):
    acc = acc_dtype(q, k, v, g, beta) if state is None else acc_dtype(q, k, v, g, beta, state)
    B, T, HV, V = v.shape
    K = k.shape[-1]
    s = torch.zeros(B, HV, K, V, dtype=acc, device=v.device) if state is None else state.to(acc).contiguous()
    if T == 0:
        return v.new_empty(v.shape), s.clone(), s.new_empty(B, 0, HV, K, V)
    if l2norm_eps is not None:
        q, k = l2norm(q, l2norm_eps), l2norm(k, l2norm_eps)
    groups = HV // q.shape[2]
    if groups > 1:
        q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    # [B, HV, N, 64, …]. The last chunk is padded with tokens that change nothing: k = 0, v = 0, g = 0.
    pad = -T % CHUNK
    q, k, v_, g, beta = (x.transpose(1, 2).to(acc) for x in (q, k, v, g, beta))
    q, k, v_ = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, CHUNK)) for x in (q * scale, k, v_))
    g, beta = (F.pad(x, (0, pad)).unflatten(2, (-1, CHUNK)) for x in (g, beta))
    g = g.cumsum(-1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=v.device).triu(1)
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(later, -torch.inf).exp()  # [.., i, j], of token j by token i
    system = (k * beta[..., None]) @ k.mT * decay  # the diagonal is not read
    solve = lambda rhs: torch.linalg.solve_triangular(system, rhs, upper=False, unitriangular=True)  # noqa: E731
    u, w = solve(v_ * beta[..., None]), solve(k * (beta * g.exp())[..., None])
    attention = (q @ k.mT) * decay
    q = q * g.exp()[..., None]
    k = k * (g[..., -1:] - g).exp()[..., None]
    outs, checkpoints = [], []
    for n in range(u.shape[2]):
        new = u[:, :, n] - w[:, :, n] @ s
        outs.append(q[:, :, n] @ s + attention[:, :, n] @ new)
        s = s * g[:, :, n, -1].exp()[..., None, None] + k[:, :, n].mT @ new
        if checkpoint_every and (n + 1) % checkpoint_every == 0 and (n + 1) * CHUNK <= T:
            checkpoints.append(s)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device).copy_(torch.cat(outs, 2)[:, :, :T].transpose(1, 2))
    return o, s, torch.stack(checkpoints, 1) if checkpoints else s.new_empty(B, 0, HV, K, V)


def fake(q, k, v, g, beta, state, scale, l2norm_eps=None, cu_seqlens=None, checkpoint_every=0, beta_max=2.0):
    check(v, state, cu_seqlens, checkpoint_every)
    acc = acc_dtype(q, k, v, g, beta) if state is None else acc_dtype(q, k, v, g, beta, state)
    B, T, HV, V = v.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    K, checkpoints = k.shape[-1], T // (CHUNK * checkpoint_every) if checkpoint_every else 0
    like = {"dtype": acc, "device": v.device}
    o = torch.empty((B, T, HV, V), dtype=v.dtype, device=v.device)
    return o, torch.empty((N, HV, K, V), **like), torch.empty((B, checkpoints, HV, K, V), **like)


def examples():
    calls = []
    for B, T, H, HV, K, V, eps, every in [(2, 70, 1, 2, 8, 4, 1e-6, 1), (1, 5, 2, 2, 4, 8, None, 0)]:
        q, k, v, a, b, _, _, s = example_tensors(B, T, H, HV, K, V)
        kwargs = {"scale": K**-0.5, "l2norm_eps": eps, "checkpoint_every": every}
        k = k if eps is not None else k * 0.3
        calls.append(((q, k, v, -a.exp(), b.sigmoid(), s if every else None), kwargs))
    q, k, v, a, b, _, _, s = example_tensors(1, 70, 2, 2, 4, 8)
    packed = {"scale": 0.5, "l2norm_eps": 1e-6, "cu_seqlens": torch.tensor([0, 3, 70])}
    calls.append(((q, k, v, -a.exp(), b.sigmoid(), s.repeat(2, 1, 1, 1)), packed))
    return calls


op = register(
    "chunk_delta_rule",
    reference,
    fake,
    examples,
    equation="delta_rule(q, k, v, g, β, state) in chunks of 64 tokens",
    inline=False,
)
