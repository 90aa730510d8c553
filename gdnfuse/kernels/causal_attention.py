"""A prompt's attention by torch's own kernels, each where it is faster. There is no kernel of ours.

cuDNN's makes a plan for the length of a prompt, and again for each new length, which takes 37 ms. After that it takes half the
time of FlashAttention-2 (Dao 2023, arXiv:2307.08691), which needs no plan (benchmarks/prompt.py). In short prompts attention
takes little of the time, so they use FlashAttention-2. Long prompts use cuDNN's and are padded with rows of zeros, so that there
are EIGHTHS lengths between one power of two and the next. A token does not see what is after it, so the padding changes nothing.

Layout: q [B, H, T, D], k and v [B, HKV, L, D] with any strides but contiguous rows; output [B, H, T, D], in memory as [B, T, H,
D].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from gdnfuse import compat
from gdnfuse.dialect import causal_attention
from gdnfuse.errors import Refused
from gdnfuse.kernels.launch.implementation import launching, register
from gdnfuse.rewrite.graph import same, same_shape
from gdnfuse.rewrite.rule import shown

LONG, EIGHTHS = 4096, 8
WIDER_THAN, WIDEST = 128, 256  # columns per head
HOPPER = 9
FLASH, CUDNN = compat.flash_attention(), compat.cudnn_attention()


def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """The dialect's causal_attention.

    Args:
        q, k, v, scale: as in the dialect.

    Returns:
        [B, H, T, D] in q's dtype, in memory as [B, T, H, D].
    """
    if not launching():
        return causal_attention.fake(q, k, v, scale)
    T, L = q.shape[2], k.shape[2]
    if L != v.shape[2]:
        raise ValueError(f"causal_attention needs as many keys as values, found {L} and {v.shape[2]}.")
    if T == L >= LONG and CUDNN is not None and _cudnn_takes(q, k, v):
        more = planned(T) - T
        if more:
            q = F.pad(q.transpose(1, 2), (0, 0, 0, 0, 0, more)).transpose(1, 2)
            k, v = (F.pad(x, (0, 0, 0, more)) for x in (k, v))
        out = CUDNN(q, k, v, None, False, 0.0, True, False, scale=scale)[0][:, :, :T]
    else:
        out = FLASH(q, k, v, 0.0, True, False, scale=scale)[0]
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def planned(T: int) -> int:
    """The length that cuDNN plans for: T rounded up to one of EIGHTHS steps between powers of two."""
    step = max(2 ** ((T - 1).bit_length() - 1) // EIGHTHS, 1)
    return -(-T // step) * step


def _cudnn_takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    return can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1]), False)


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: Any = None) -> None:
    """Raise Refused unless FlashAttention-2 supports the arguments and was measured for them.

    They must be bfloat16 or float16 with contiguous rows and equal sequences and heads. Heads must be wider than 128 columns, and
    the device a Hopper GPU.
    """
    if any(t.ndim != 4 for t in (q, k, v)) or {t.dtype for t in (q, k, v)} not in ({torch.bfloat16}, {torch.float16}):
        found = ", ".join(f"{t.ndim} axes of {str(t.dtype).removeprefix('torch.')}" for t in (q, k, v))
        raise Refused(f"FlashAttention-2 takes four axes of bfloat16 or of float16, found {found}.")
    if not isinstance(scale, int | float | None):
        raise Refused(f"The scale must be a number, found {scale}.")
    D = q.shape[-1]
    if not isinstance(D, int) or not WIDER_THAN < D <= WIDEST or D % 8 or not same(v.shape[-1], D):
        found = ", ".join(str(t.shape[-1]) for t in (q, k, v))
        raise Refused(f"Heads must be a multiple of 8 wide, above {WIDER_THAN} and at most {WIDEST}, found {found}.")
    B, H = q.shape[:2]
    HKV, L = k.shape[1:3]
    shared = isinstance(H, int) and isinstance(HKV, int) and H % HKV == 0
    # Keys and values of a cache may have different symbols for their length. If they differ, attention fails at run time.
    lengths = same(L, v.shape[2]) or not isinstance(L, int) and not isinstance(v.shape[2], int)
    sizes = all(same_shape((*t.shape[:2], t.shape[3]), (B, HKV, D)) for t in (k, v))
    if not (sizes and lengths and (same(H, HKV) or shared)):
        found = ", ".join(shown(t.shape) for t in (q, k, v))
        raise Refused(f"Queries, keys and values must be of the same sequences and heads, found {found}.")
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        raise Refused(f"Rows must be contiguous, found the strides {', '.join(str(t.stride(-1)) for t in (q, k, v))}.")
    built = not torch.cuda.is_available() or torch.backends.cuda.is_flash_attention_available()
    if FLASH is None or not built or not torch.backends.cuda.flash_sdp_enabled():
        raise Refused("FlashAttention-2 must be part of torch and enabled, found it missing or disabled.")
    if not _on_hopper(q.device):
        raise Refused("Which attention is faster was measured only on compute capability 9.0, found another device.")


def _on_hopper(device: torch.device) -> bool:
    """Whether a device is a Hopper GPU. True without a GPU, because a report assumes one."""
    if torch.version.hip is not None:
        return False
    return (
        not torch.cuda.is_available() or torch.cuda.get_device_capability(device if device.type == "cuda" else None)[0] == HOPPER
    )


implementation = register("causal_attention", launch, supports, measured="benchmarks/prompt.py", by="flash attention or cuDNN")
