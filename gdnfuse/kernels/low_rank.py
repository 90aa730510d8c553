"""A·x of low-rank adapters for a few rows x (Hu et al. 2021, arXiv:2106.09685): few rows of A, over all of their columns.

The launch of the linear that adds B·(A·x) waits for this one. So it must be short: it has about as many programs as there are
multiprocessors, each with a few rows of A and of x, and threads that read far ahead. On Hopper a program may start, and load its
rows of A, while the kernel before it still runs (programmatic dependent launch). It only waits for x.

Layout: x [B, N] with contiguous rows at any distance, A [R, N] contiguous, result [B, R]. Products, sums and the result are
float32. No sum is split over programs, so results are deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gdnfuse import compat
from gdnfuse.kernels.launch.implementation import kernel_of, overlap_options
from gdnfuse.kernels.linear_configs import LOW_RANK_COLUMNS, low_rank_config

gdc_launch_dependents, gdc_wait = compat.dependent_launch()
EACH = tl.constexpr(LOW_RANK_COLUMNS)
REGISTERS = 168  # of a thread. Without a bound ptxas saves registers: it loads a step only when it has used the one before.


@triton.jit
def _load_rows(ptr, first, rows, stride, start: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """A step of COUNT rows from `first` on, from column `start` on: a tuple of [BN]. The last row stands for those behind it."""
    loaded = ()
    for i in tl.static_range(COUNT):
        k = start + tl.arange(0, BN)  # [BN]
        ptrs = ptr + tl.cast(tl.minimum(first + i, rows - 1), tl.int64) * stride + k
        if start + BN <= N:
            loaded = loaded + (tl.load(ptrs),)
        else:
            loaded = loaded + (tl.load(ptrs, mask=k < N, other=0.0),)
    return loaded


@triton.jit
def low_rank_kernel(
    x_ptr, a_ptr, out_ptr, B, rows, stride_xb,
    N: tl.constexpr, R: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr, TOGETHER: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    first, first_b = tl.program_id(0) * R, tl.program_id(1) * BB
    a = ()
    for step in tl.static_range(AHEAD):
        a = a + _load_rows(a_ptr, first, rows, N, step * BN, R, N, BN)
    if OVERLAP:
        gdc_wait()
    sums = ()
    for _ in tl.static_range(R * BB):
        sums = sums + (tl.zeros((BN // EACH,), tl.float32),)
    STEPS: tl.constexpr = (N + BN - 1) // BN
    for begin in tl.static_range(0, STEPS, TOGETHER):
        x = ()
        for step in tl.static_range(begin, begin + TOGETHER):
            if step < STEPS:
                if step >= AHEAD:
                    a = a + _load_rows(a_ptr, first, rows, N, step * BN, R, N, BN)
                x = x + _load_rows(x_ptr, first_b, B, stride_xb, step * BN, BB, N, BN)
        for step in tl.static_range(begin, begin + TOGETHER):
            if step < STEPS:
                added = ()
                for n in tl.static_range(R * BB):
                    # The sum is of the columns that a thread has.
                    product = a[step * R + n // BB].to(tl.float32) * x[(step - begin) * BB + n % BB].to(tl.float32)  # [BN]
                    added = added + (sums[n] + tl.sum(tl.reshape(product, (BN // EACH, EACH)), 1),)
                sums = added
    # The sums side by side, so that threads add them up together.
    for _ in tl.static_range(4):
        if len(sums) > 1:
            joined = ()
            for n in tl.static_range(len(sums) // 2):
                joined = joined + (tl.join(sums[n], sums[n + len(sums) // 2]),)
            sums = joined
    y = tl.sum(tl.reshape(sums[0], (BN // EACH, R, BB)), 0)  # [R, BB]
    i, b = first + tl.arange(0, R), first_b + tl.arange(0, BB)
    out_ptrs = out_ptr + b.to(tl.int64)[None, :] * rows + i[:, None]  # [R, BB]
    tl.store(out_ptrs, y, mask=(i < rows)[:, None] & (b < B)[None, :])


def launch(x: torch.Tensor, A: torch.Tensor, overlap: bool = False) -> torch.Tensor:
    """A·x of each row x, not rounded.

    Args:
        x: [..., N], a few rows.
        A: [R, N], of all adapters on x.
        overlap: whether A may be read while kernels before this one run.

    Returns:
        [B, R] of all B rows, float32, contiguous.
    """
    (R, N), rows = A.shape, x.reshape(-1, x.shape[-1])
    B = rows.shape[0]
    chosen = low_rank_config(R, N, B, A.dtype, x.dtype)
    out = torch.empty(B, R, dtype=torch.float32, device=x.device)
    options = overlap_options(x) if overlap else {}
    if options:
        options["maxnreg"] = REGISTERS
    kernel_of(low_rank_kernel)[(-(-R // chosen.R), -(-B // chosen.BB))](
        rows, A, out, B, R, rows.stride(0),
        N=N, R=chosen.R, BB=chosen.BB, BN=chosen.BN, AHEAD=chosen.ahead, TOGETHER=chosen.together, OVERLAP=bool(options),
        num_warps=chosen.num_warps, **options,
    )  # fmt: skip
    return out
