"""delta_rule_commit: tokens that a verify step has processed are replayed into the states, for all layers at once.

Checkpoint and replay are as in SGLang's PR 28695. The rule is that of Yang et al. 2024 (arXiv:2412.06464).
"""

from __future__ import annotations

import torch

from gdnfuse.dialect.delta_rule import reference as delta_rule
from gdnfuse.dialect.gating import reference as gating
from gdnfuse.dialect.op import acc_dtype, register


def reference(
    windows: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    accepted: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    conv_state: torch.Tensor,
    recurrent_state: torch.Tensor,
    l2norm_eps: float,
    beta_scale: float = 1.0,
) -> None:
    """The states of L layers after the first `accepted` of T tokens, from the states before all of them.

    The conv states are only written: `windows` contains what is read of them.

    Args:
        windows: [L, B, W + T, D], the conv state before the tokens and then their rows, q | k | v before the conv, with
            D = 2·H·K + HV·V channels.
        a, b: [L, B, T, HV], before the nonlinearities.
        accepted: [B], integers from 0 to T, how many tokens of each sequence to keep. With 0 its states do not change.
        conv_weight: [L, D, W], of a depthwise causal conv without bias, followed by SiLU.
        A_log, dt_bias: [L, HV].
        conv_state: [L, B, D, W], written.
        recurrent_state: [L, B, HV, K, V], written in place.
        l2norm_eps: eps of the l2norm of keys.
        beta_scale: 2 allows the state negative eigenvalues (Grazzi et al. 2024, arXiv:2411.12537).
    """
    L, B, HV, K, V = recurrent_state.shape
    W, D = conv_weight.shape[2], conv_weight.shape[1]
    T, H = a.shape[2], (D - HV * V) // (2 * K)
    acc = acc_dtype(windows, a, b, recurrent_state)
    x, weight = windows.to(acc), conv_weight.to(acc)
    # Token t uses column w of a weight for row t + 1 + w. Its own row is the last of W.
    rows = torch.stack([sum(weight[:, None, :, w] * x[:, :, t + 1 + w] for w in range(W)) for t in range(T)], 2)
    _, k, v = (part.flatten(0, 1) for part in torch.nn.functional.silu(rows).split([H * K, H * K, HV * V], -1))
    k, v = k.unflatten(-1, (H, K)), v.unflatten(-1, (HV, V))
    per_layer = [gating(a[i], A_log[i], dt_bias[i]) for i in range(L)]
    g, beta = torch.stack(per_layer).flatten(0, 1), beta_scale * b.to(acc).sigmoid().flatten(0, 1)
    state, window = recurrent_state.flatten(0, 1), conv_state.flatten(0, 1)
    rows, counts = windows.flatten(0, 1).mT, accepted.repeat(L)
    for t in range(T):
        at = slice(t, t + 1)
        _, after = delta_rule(k[:, at], k[:, at], v[:, at], g[:, at], beta[:, at], state, 1.0, l2norm_eps)
        state = torch.where((counts > t)[:, None, None, None], after, state.to(acc))
        window = torch.where((counts > t)[:, None, None], rows[..., t + 1 : t + 1 + W], window)
    recurrent_state.copy_(state.view(L, B, HV, K, V))
    conv_state.copy_(window.view(L, B, D, W))


def fake(
    windows, a, b, accepted, conv_weight, A_log, dt_bias, conv_state, recurrent_state, l2norm_eps, beta_scale=1.0
):  # fmt: skip
    return None


def example_tensors(L, B, T, W, H, HV, K, V, accepted, dtype=torch.float32, state_dtype=torch.float32):
    """Random inputs: windows, a, b, accepted, conv_weight, A_log, dt_bias, conv_state, recurrent_state."""
    D = 2 * H * K + HV * V
    windows = torch.randn(L, B, W + T, D, dtype=dtype)
    return (
        windows,
        torch.randn(L, B, T, HV, dtype=dtype),
        torch.randn(L, B, T, HV, dtype=dtype),
        torch.tensor(accepted, dtype=torch.int32),
        torch.randn(L, D, W, dtype=dtype) / 2,
        torch.rand(L, HV).add(0.1).log(),
        torch.randn(L, HV),
        windows[:, :, :W].mT.clone(),
        torch.randn(L, B, HV, K, V, dtype=state_dtype),
    )


def examples():
    calls = []
    for L, B, T, W, H, HV, K, V, accepted in (
        (1, 3, 2, 4, 2, 4, 8, 16, [0, 1, 2]), (2, 2, 5, 4, 1, 3, 16, 8, [3, 5]), (2, 1, 3, 2, 2, 2, 8, 8, [1]),
    ):  # fmt: skip
        calls.append((example_tensors(L, B, T, W, H, HV, K, V, accepted), {"l2norm_eps": 1e-6, "beta_scale": float(L)}))
    return calls


op = register(
    "delta_rule_commit",
    reference,
    fake,
    examples,
    equation="the first `accepted` tokens of a verify step, from their rows before the conv, replayed into states and windows",
    mutates=("conv_state", "recurrent_state"),
)
