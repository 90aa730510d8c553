"""One row times a weight: y = x·Wᵀ, the linears of a decode step at batch 1, which only stream their weights.

Meaning: ``torch.nn.functional.linear`` without a bias. Each program owns up to four whole rows of the weight, so that no sum is
split over programs and results are deterministic. Products and sums are float32; one rounding, to x's dtype.

Layout: x [..., N_in] with one row, weight [N_out, N_in] with contiguous rows any distance apart; output [..., N_out] contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gdnfuse.kernels.implementation import kernel_of, register, require_dtypes, require_static
from gdnfuse.report import Refused

# N_in up to: rows per program, columns per step, warps. The first line that fits is taken. By benchmarks/gemm.py on an H200,
# bfloat16, cold weights (benchmarks/results/gemm.json): within 2 % of the best of its sweep on all of 0.8B, 4B and 9B.
CONFIGS = (
    (1024, (2, 1024, 4)),
    (2048, (2, 1024, 8)),
    (2560, (4, 2048, 4)),
    (4096, (1, 2048, 8)),
    (float("inf"), (1, 2048, 4)),
)

MAX_N_IN = 2**15  # the loop over columns is unrolled


def config(n_in: int) -> tuple[int, int, int]:
    """Rows per program, columns per step and warps for a weight of n_in columns."""
    rows, block, num_warps = next(c for width, c in CONFIGS if n_in <= width)
    return rows, min(block, triton.next_power_of_2(n_in)), num_warps


@triton.jit
def skinny_linear_kernel(
    x_ptr, weight_ptr, out_ptr,
    n_out, stride_wn,
    N: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, EVEN_ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)  # [R]
    live = row < n_out
    column = tl.arange(0, BLOCK)  # [BLOCK]
    w_ptrs = weight_ptr + row.to(tl.int64)[:, None] * stride_wn + column[None, :]  # [R, BLOCK]
    # Every row reads x for itself, from L1: loaded once, it would have to pass through shared memory to the rows' threads.
    x_ptrs = x_ptr + tl.broadcast_to(column[None, :], (R, BLOCK))

    acc = tl.zeros((R, BLOCK), tl.float32)
    for start in tl.static_range(0, N, BLOCK):
        if EVEN_ROWS and start + BLOCK <= N:
            w = tl.load(w_ptrs + start)  # [R, BLOCK]
            x = tl.load(x_ptrs + start)  # [R, BLOCK]
        else:
            inside = (column < N - start)[None, :] & live[:, None]  # [R, BLOCK]
            w = tl.load(w_ptrs + start, mask=inside, other=0.0)  # [R, BLOCK]
            x = tl.load(x_ptrs + start, mask=inside, other=0.0)  # [R, BLOCK]
        acc += w.to(tl.float32) * x.to(tl.float32)
    y = tl.sum(acc, 1).to(out_ptr.dtype.element_ty)  # [R]
    if EVEN_ROWS:
        tl.store(out_ptr + row, y)
    else:
        tl.store(out_ptr + row, y, mask=live)


def launch_with(x: torch.Tensor, weight: torch.Tensor, config: tuple[int, int, int]) -> torch.Tensor:
    """`launch` with a config of its own: rows per program and columns per step, powers of two, and warps."""
    n_out, n_in = weight.shape
    rows, block, num_warps = config
    out = torch.empty((*x.shape[:-1], n_out), dtype=x.dtype, device=x.device)
    kernel_of(skinny_linear_kernel)[(-(-n_out // rows),)](
        x, weight, out, n_out, weight.stride(0),
        N=n_in, R=rows, BLOCK=block, EVEN_ROWS=n_out % rows == 0, num_warps=num_warps,
    )  # fmt: skip
    return out


def launch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x·weightᵀ for one row.

    Args:
        x: [..., N_in] with N_in elements, the last axis contiguous.
        weight: [N_out, N_in] in x's dtype, rows contiguous and any distance apart.

    Returns:
        [..., N_out] in x's dtype, contiguous.
    """
    return launch_with(x, weight, config(weight.shape[1]))


def fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Shape, dtype and device of `launch`'s result."""
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def supports(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises Refused unless x is one row, sizes are static with 1 ≤ N_in ≤ MAX_N_IN, both have one dtype of float32, bfloat16 or
    float16, and rows are contiguous.
    """
    require_dtypes(x=x, weight=weight)
    if x.dtype != weight.dtype:
        both = " and ".join(str(t.dtype).removeprefix("torch.") for t in (x, weight))
        raise Refused(f"x and weight must have one dtype, got {both}.")
    if x.dim() < 1 or weight.dim() != 2:
        raise Refused(f"x must have at least one dimension and weight two, got {x.dim()} and {weight.dim()}.")
    require_static(N_out=weight.shape[0], N_in=weight.shape[1])
    require_static(**{"x's last size": x.shape[-1]})
    if x.shape[-1] != weight.shape[1]:
        raise Refused(f"x and weight must agree on N_in, got {x.shape[-1]} and {weight.shape[1]}.")
    for size in x.shape[:-1]:
        if not isinstance(size, int) or size != 1:
            raise Refused(f"x must be one row, got the sizes {list(x.shape)}.")
    if weight.numel() == 0 or weight.shape[1] > MAX_N_IN:
        raise Refused(f"weight must not be empty nor wider than {MAX_N_IN}, got the sizes {list(weight.shape)}.")
    for name, t in (("x", x), ("weight", weight)):
        if not isinstance(t.stride(-1), int) or t.stride(-1) != 1:
            raise Refused(f"{name} must have contiguous rows, got the strides {list(t.stride())}.")


implementation = register("skinny_linear", launch, supports, fake=fake)
