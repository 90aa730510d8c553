"""delta_rule_slots: the gated delta rule over a few tokens, gates inside, with a state for each token in slots of a pool.

It is for code with its own slots (vLLM PR 35777). Tokens are taken back by saying how many of the last call were accepted.
"""

from __future__ import annotations

import torch

from gdnfuse.dialect.delta_rule import example_tensors
from gdnfuse.dialect.delta_rule import reference as delta_rule
from gdnfuse.dialect.gating import reference as gating
from gdnfuse.dialect.op import acc_dtype, need_tokens, register


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    accepted: torch.Tensor,
    scale: float,
    l2norm_eps: float | None = None,
    beta_scale: float = 1.0,
) -> torch.Tensor:
    """fused_gating_delta_rule from the state in slot slots[b, accepted[b] − 1]. The state after token t goes to slot slots[b, t].

    A sequence keeps its slots from call to call. `accepted` is how many tokens of its last call were accepted. All states are
    read before any is written. Between tokens a state is at least float32. It is rounded when it is written.

    Args:
        q, k: [B, T, H, K], T ≥ 1.
        v: [B, T, HV, V].
        a, b: [B, T, HV], before the nonlinearities.
        A_log, dt_bias: [HV].
        states: [slots, HV, K, V], written in place.
        slots: [B, T], int32 or int64, below the number of slots. Two may be equal only if they are negative. A negative one
            stands for no slot: no state is written there, and a state that is read there is zero.
        accepted: [B], int32 or int64, from 0 to T. 0 starts from a state of zeros.
        scale: factor on q.
        l2norm_eps: if given, q and k are l2-normalised with it first.
        beta_scale: 2 allows the state negative eigenvalues (Grazzi et al. 2024, arXiv:2411.12537).

    Returns:
        o [B, T, HV, V] in float32 (float64 for float64 inputs).

    Raises:
        ValueError: no tokens.
    """
    T = v.shape[1]
    need_tokens("delta_rule_slots", T)
    first = slots.gather(1, (accepted.long() - 1).clamp(min=0)[:, None]).squeeze(1).long()
    there = (accepted > 0) & (first >= 0)
    state = torch.where(there[:, None, None, None], states[first.clamp(min=0)], 0).to(acc_dtype(q, v, states))
    g, beta = gating(a, A_log, dt_bias), beta_scale * b.to(acc_dtype(b, v)).sigmoid()
    out = []
    for t in range(T):
        at = slice(t, t + 1)
        o, state = delta_rule(q[:, at], k[:, at], v[:, at], g[:, at], beta[:, at], state, scale, l2norm_eps)
        out.append(o)
        # Slots that no token writes keep their values. So the number of written slots need not be known.
        slot = slots[:, t].long()
        hit = slot[:, None] == torch.arange(states.shape[0], device=slot.device)  # [B, slots]
        written = state.to(states.dtype)[hit.long().argmax(0)]  # [slots, HV, K, V]
        states.copy_(torch.where(hit.any(0)[:, None, None, None], written, states))
    return torch.cat(out, 1)


def fake(q, k, v, a, b, A_log, dt_bias, states, slots, accepted, scale, l2norm_eps=None, beta_scale=1.0):
    need_tokens("delta_rule_slots", v.shape[1])
    return torch.empty(v.shape, dtype=acc_dtype(q, v, a, b, A_log, dt_bias, states), device=v.device)


def slot_tensors(T, H, HV, K, V, slots, accepted, dtype=torch.float32, state_dtype=torch.float32):
    """Random inputs with slots [B][T], in a pool of some more: q, k, v, a, b, A_log, dt_bias, states, slots, accepted."""
    *tokens, _ = example_tensors(len(slots), T, H, HV, K, V, dtype)
    states = torch.randn(max(map(max, slots)) + 3, HV, K, V, dtype=state_dtype)
    return *tokens, states, torch.tensor(slots, dtype=torch.int32), torch.tensor(accepted, dtype=torch.int32)


def examples():
    calls = []
    for T, H, HV, K, V, eps, slots, accepted in (
        (3, 2, 4, 8, 16, 1e-6, [[4, 0, 2], [1, -1, 3], [-1, -1, -1]], [2, 3, 1]),
        (1, 1, 3, 16, 8, None, [[1], [0]], [1, 0]),
    ):
        options = {"scale": K**-0.5, "l2norm_eps": eps, "beta_scale": float(T)}
        calls.append((slot_tensors(T, H, HV, K, V, slots, accepted), options))
    return calls


op = register(
    "delta_rule_slots",
    reference,
    fake,
    examples,
    equation="fused_gating_delta_rule from states[slots[b, accepted − 1]], the state after token t to states[slots[b, t]]!",
    mutates=("states",),
)
