"""gdnfuse.delta_rule_slots: the rule over a few tokens, for code that keeps its states in slots of its own."""

from __future__ import annotations

import functools
import logging

import torch

from gdnfuse import kernels
from gdnfuse.dialect import delta_rule_slots as dialect
from gdnfuse.errors import GdnfuseError, Refused

log = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def delta_rule_slots(
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
    """The gated delta rule over T tokens, which writes a state after each token into slots of a pool.

    A sequence keeps its T slots from call to call, and says how many tokens of its last call were accepted. The rule starts from
    the state after the last accepted token, and writes the state after token t into slot slots[b, t]. So nothing is copied to
    take tokens back. On a GPU this is one kernel. If the kernel cannot run, plain PyTorch runs, and one warning says why.
    Compiled code may call it.

    Args:
        q, k: [B, T, H, K], after the conv. float32, bfloat16 or float16, as all tensors below, or float64 on a CPU.
        v: [B, T, HV, V]; HV is a multiple of H.
        a, b: [B, T, HV], inputs of the decay −exp(A_log)·softplus(a + dt_bias) and of β = beta_scale·σ(b).
        A_log, dt_bias: [HV].
        states: [slots, HV, K, V], at least one slot, with any strides except those of an expanded tensor; written in place.
        slots: [B, T], int32 or int64, below the number of slots. Two may be equal only if they are negative. A negative one
            stands for no slot: no state is written there, and a state that is read there is zero.
        accepted: [B], int32 or int64, from 0 to T: how many tokens of the last call were accepted. 0 starts from a state of
            zeros.
        scale: factor on q, usually K^−½.
        l2norm_eps: if given, q and k are l2-normalised with it first.
        beta_scale: 2 allows the state negative eigenvalues (Grazzi et al. 2024, arXiv:2411.12537).

    Returns:
        o [B, T, HV, V] in float32, or float64 for float64 inputs.

    Raises:
        GdnfuseError: shapes, dtypes or devices do not fit together, or the pool is expanded. Values of `slots` and `accepted` are
            checked only on a CPU, because on a GPU the check would have to wait.

    Source:
        Yang et al. 2024, Gated Delta Networks, arXiv:2412.06464; slots as in vLLM's PR 35777.
    """
    arguments = q, k, v, a, b, A_log, dt_bias, states, slots, accepted, scale, l2norm_eps, beta_scale
    _check(*arguments[:-3])
    if v.device.type == "cuda" and not torch.compiler.is_compiling():
        try:
            kernel = kernels.implementations()[dialect.op.name]
            kernel.supports(*arguments)
        except Refused as e:
            _say(str(e))
        else:
            return kernel.op(*arguments)
    return dialect.op.overload(*arguments)


@functools.cache
def _say(why: str) -> None:
    log.warning("delta_rule_slots runs as plain PyTorch: %s", why)


def _check(
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
) -> None:
    floats = {"q": q, "k": k, "v": v, "a": a, "b": b, "A_log": A_log, "dt_bias": dt_bias, "states": states}
    for name, x in {**floats, "slots": slots, "accepted": accepted}.items():
        if not isinstance(x, torch.Tensor):
            raise GdnfuseError(f"{name} must be a tensor, found {type(x).__name__}.")
        if name in floats and x.dtype not in DTYPES:
            raise GdnfuseError(
                f"{name} must be float32, bfloat16, float16 or float64, found {str(x.dtype).removeprefix('torch.')}."
            )
        if x.device != v.device:
            raise GdnfuseError(f"{name} must be on {v.device}, as v, found {x.device}.")
    B, T, HV, V = v.shape if v.ndim == 4 else (0, 0, 0, 0)
    H, K = q.shape[2:] if q.ndim == 4 else (0, 0)
    if not B or not T or not H or not HV or HV % H:
        raise GdnfuseError(
            "q must be [B, T, H, K] and v [B, T, HV, V] with at least one sequence, one token and HV a multiple of H, found "
            f"{list(q.shape)} and {list(v.shape)}."
        )
    pairs = {"q": (q, (B, T, H, K)), "k": (k, (B, T, H, K)), "a": (a, (B, T, HV)), "b": (b, (B, T, HV))}
    pairs |= {"A_log": (A_log, (HV,)), "dt_bias": (dt_bias, (HV,))}
    pairs |= {"slots": (slots, (B, T)), "accepted": (accepted, (B,)), "states": (states, (*states.shape[:1], HV, K, V))}
    for name, (x, wanted) in pairs.items():
        if x.shape != wanted:
            raise GdnfuseError(f"{name} must be {list(wanted)}, found {list(x.shape)}.")
    for name, x in (("slots", slots), ("accepted", accepted)):
        if x.dtype not in (torch.int32, torch.int64):
            raise GdnfuseError(f"{name} must be int32 or int64, found {str(x.dtype).removeprefix('torch.')}.")
    if not states.shape[0] or any(n > 1 and step == 0 for n, step in zip(states.shape, states.stride(), strict=True)):
        raise GdnfuseError(
            "states must be at least one, each in memory of its own, found the shape "
            f"{list(states.shape)} with strides {list(states.stride())}."
        )
    if slots.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if int(slots.max()) >= states.shape[0]:
        raise GdnfuseError(f"slots must be below {states.shape[0]}, the number of states, found {int(slots.max())}.")
    if int(accepted.min()) < 0 or int(accepted.max()) > T:
        raise GdnfuseError(f"accepted must be from 0 to {T}, found {int(accepted.min())} to {int(accepted.max())}.")
    used = slots[slots >= 0]
    if used.unique().numel() < used.numel():
        raise GdnfuseError("No two tokens may have the same slot, found a repeated one.")
