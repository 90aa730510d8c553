"""The router of a mixture of experts: top-k of softmax(x·Wᵀ) (Shazeer et al. 2017, arXiv:1701.06538).

There are two launches. The first computes logits: for one row as skinny_linear streams a weight, for several in parts of the
columns as in few_rows_linear, for many in tiles of rows. The second has a program per row, which adds up the parts and finds the
largest. Nothing is sorted. A logit and its expert are one integer, so finding the largest of a row is one reduction. Of equal
logits the lower expert comes first. NaN counts as larger than all.

If experts follow (experts.py), there is no second launch for one row: programs find their experts from the logits.

Layout: x [N, H] with contiguous rows, weight [E, H] with contiguous rows at any distance; logits [parts, N, E] in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gdnfuse import compat
from gdnfuse.errors import Refused
from gdnfuse.kernels import few_rows_linear
from gdnfuse.kernels.few_rows_linear import OPERANDS
from gdnfuse.kernels.launch.implementation import kernel_of, overlap_options, register, require_dtypes, require_static
from gdnfuse.kernels.linear_configs import FewRowsConfig
from gdnfuse.kernels.skinny_linear import MAX_N, dot_rows, load_row, load_rows

gdc_launch_dependents, gdc_wait = compat.dependent_launch()

MAX_ROWS = 64
MAX_EXPERTS = 4096  # a program holds the logits of a row
MAX_TOP_K = 32  # the loop over them is unrolled
LOWEST, HIGHEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)
ROUNDED = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Rows of the weight per program, columns per step and warps, for one row of x.
ONE_ROW = (8, 256, 4)
# For several rows: rows of the weight per tile, and into how many parts the columns are split.
TILE, PARTS = 32, (8, 4, 2)
# For many rows: experts and rows per tile, and bytes per step.
MANY, BYTES = (64, 64), 128


@triton.jit
def keys(logit, e, E, ROUND: tl.constexpr):
    """An integer for each logit, in the same order, with the largest for NaN. For 16 bits it also contains the expert."""
    if ROUND == tl.float32:
        bits = logit.to(tl.int32, bitcast=True)
        key = tl.where(logit == logit, bits ^ ((bits >> 31) & 0x7FFFFFFF), HIGHEST)
    else:
        bits = logit.to(ROUND).to(tl.int16, bitcast=True).to(tl.int32)
        key = tl.where(logit == logit, bits ^ ((bits >> 15) & 0x7FFF), 0x7FFF)
        key = (key << 16) | (0xFFFF - e)
    return tl.where(e < E, key, LOWEST)


@triton.jit
def largest(key, e, ROUND: tl.constexpr):
    """The logit and the expert of the largest key."""
    top = tl.max(key, 0)
    if ROUND == tl.float32:
        bits = top ^ ((top >> 31) & 0x7FFFFFFF)
        return bits.to(tl.float32, bitcast=True), tl.min(tl.where(key == top, e, HIGHEST), 0)
    else:
        high = top >> 16
        bits = (high ^ ((high >> 15) & 0x7FFF)).to(tl.int16)
        return bits.to(ROUND, bitcast=True).to(tl.float32), 0xFFFF - (top & 0xFFFF)


@triton.jit
def router_logits_kernel(
    x_ptr, weight_ptr, norm_weight_ptr, logits_ptr, norm_eps, norm_offset, E, stride_w,
    H: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0) * R + tl.arange(0, R)  # [R]
    w = load_rows(weight_ptr, row, row < E, stride_w, H, BN, EVEN)
    if norm_weight_ptr is not None:
        norm_weight = load_row(norm_weight_ptr, H, BN)
    else:
        norm_weight = ()
    if OVERLAP:
        gdc_wait()
    x, factor = normed(load_row(x_ptr, H, BN), norm_weight, norm_eps, norm_offset, H, BN)
    tl.store(logits_ptr + row, dot_rows(w, x, R, BN) * factor, mask=row < E)


@triton.jit
def router_logits_rows_kernel(
    x_ptr, weight_ptr, logits_ptr, N, E, H, stride_x, stride_w,
    OPERAND: tl.constexpr, BM: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Logits of BM experts for BB rows, with the weight's rows as the product's rows."""
    experts = tl.cdiv(E, BM)
    e = tl.program_id(0) % experts * BM + tl.arange(0, BM)  # [BM]
    n = tl.program_id(0) // experts * BB + tl.arange(0, BB)  # [BB]
    k = tl.arange(0, BK)  # [BK]
    w_ptrs = weight_ptr + tl.where(e < E, e, 0).to(tl.int64)[:, None] * stride_w + k[None, :]  # [BM, BK]
    x_ptrs = x_ptr + tl.where(n < N, n, 0).to(tl.int64)[None, :] * stride_x + k[:, None]  # [BK, BB]
    acc = tl.zeros((BM, BB), tl.float32)
    for start in tl.range(0, H, BK, num_stages=STAGES):
        w = tl.load(w_ptrs + start)
        x = tl.load(x_ptrs + start)
        acc = tl.dot(w.to(OPERAND), x.to(OPERAND), acc, input_precision="ieee")
    logits_ptrs = logits_ptr + n.to(tl.int64)[None, :] * E + e[:, None]
    tl.store(logits_ptrs, acc, mask=(e < E)[:, None] & (n < N)[None, :])


@triton.jit
def normed(row, norm_weight, eps, offset, N: tl.constexpr, BN: tl.constexpr):
    """A row in steps of [BN], in float32, times the weights of its norm, if any.

    Also returns the factor of the norm that is still missing.
    """
    x = ()
    factor = 1.0
    square = tl.zeros((BN,), tl.float32)
    for i in tl.static_range(len(row)):
        step = row[i].to(tl.float32)  # [BN]
        if len(norm_weight) > 0:
            square += step * step
            step = step * (tl.cast(offset, tl.float32) + norm_weight[i].to(tl.float32))
        x = x + (step,)
    if len(norm_weight) > 0:
        factor = tl.rsqrt(tl.sum(square, 0) / N + tl.cast(eps, tl.float32))
    return x, factor


@triton.jit
def top_k_kernel(
    logits_ptr, weights_ptr, indices_ptr, N, E,
    K: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr, PARTS: tl.constexpr, ROUND: tl.constexpr, NORMALIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    n = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BE)  # [BE]
    logit = tl.load(logits_ptr + n * E + e, mask=e < E, other=-float("inf")).to(tl.float32)  # [BE]
    for part in tl.static_range(1, PARTS):
        logit += tl.load(logits_ptr + (part * N + n) * E + e, mask=e < E, other=0.0)
    logit = logit.to(ROUND).to(tl.float32)
    key = keys(logit, e, E, ROUND)
    j = tl.arange(0, BK)  # [BK]
    experts = tl.zeros((BK,), tl.int32)
    values = tl.full((BK,), -float("inf"), tl.float32)
    for i in tl.static_range(K):
        value, expert = largest(key, e, ROUND)
        key = tl.where(e == expert, LOWEST, key)
        experts = tl.where(j == i, expert, experts)
        values = tl.where(j == i, value, values)
        if i == 0:
            most = value
    weights = tl.exp(values - most)
    total = tl.sum(weights, 0) if NORMALIZE else tl.sum(tl.exp(logit - most), 0)
    at = n * K + j
    tl.store(weights_ptr + at, (weights / total).to(weights_ptr.dtype.element_ty), mask=j < K)
    tl.store(indices_ptr + at, experts.to(tl.int64), mask=j < K)


def logits_of(
    x: torch.Tensor, weight: torch.Tensor, norm_weight: torch.Tensor | None, norm_eps: float, norm_offset: float, overlap: bool
) -> torch.Tensor:
    """x·Wᵀ in float32, not rounded: [parts, N, E]."""
    (N, H), E = x.shape, weight.shape[0]
    if N > MAX_ROWS:
        logits = torch.empty((1, N, E), dtype=torch.float32, device=x.device)
        BM, BB = MANY
        kernel_of(router_logits_rows_kernel)[(-(-E // BM) * -(-N // BB),)](
            x, weight, logits, N, E, H, x.stride(0), weight.stride(0),
            OPERAND=OPERANDS[weight.dtype], BM=BM, BB=BB, BK=step(H, weight.dtype, BYTES), STAGES=3, num_warps=4,
        )  # fmt: skip
        return logits
    if N > 1:
        parts = next(n for n in PARTS if H % (n * SMALLEST_STEP) == 0)
        config = FewRowsConfig(TILE, step(H // parts, weight.dtype), 4, 2, parts, True)
        return few_rows_linear.launch_with(config, x, weight, overlap=overlap)
    R, BN, num_warps = ONE_ROW
    logits = torch.empty((1, 1, E), dtype=torch.float32, device=x.device)
    options = overlap_options(x, norm_weight) if overlap else {}
    kernel_of(router_logits_kernel)[(-(-E // R),)](
        x, weight, None if norm_weight is None else norm_weight.contiguous(), logits, norm_eps, norm_offset, E, weight.stride(0),
        H=H, R=R, BN=min(BN, triton.next_power_of_2(H)), EVEN=E % R == 0, OVERLAP=bool(options), num_warps=num_warps, **options,
    )  # fmt: skip
    return logits


SMALLEST_STEP = 32  # the fewest columns of a step


def step(columns: int, dtype: torch.dtype, most: int = 512) -> int:
    """The most columns of a step with at most so many bytes that divide the columns."""
    block = most // dtype.itemsize
    while columns % block:
        block //= 2
    return block


def rounded(weight: torch.Tensor, wide_logits: bool) -> tl.dtype:
    """The dtype that logits are rounded to."""
    return tl.float32 if wide_logits else ROUNDED[weight.dtype]


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    top_k: int,
    normalize: bool,
    wide_logits: bool = False,
    wide_weights: bool = False,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    *,
    overlap: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The dialect's route.

    Args:
        x, weight, top_k, normalize, wide_logits, wide_weights, norm_weight, norm_eps, norm_offset: as in the dialect.
        overlap: whether weight and norm_weight may be read while kernels before this one run.

    Returns:
        routing weights and indices, contiguous.
    """
    (N, _), E = x.shape, weight.shape[0]
    logits = logits_of(x, weight, norm_weight, norm_eps, norm_offset, overlap)
    weights = torch.empty((N, top_k), dtype=torch.float32 if wide_weights else x.dtype, device=x.device)
    indices = torch.empty((N, top_k), dtype=torch.int64, device=x.device)
    options = overlap_options(x) if overlap else {}
    kernel_of(top_k_kernel)[(N,)](
        logits, weights, indices, N, E,
        K=top_k, BK=triton.next_power_of_2(top_k), BE=triton.next_power_of_2(E), PARTS=logits.shape[0],
        ROUND=rounded(weight, wide_logits), NORMALIZE=normalize, OVERLAP=bool(options), num_warps=1, **options,
    )  # fmt: skip
    return weights, indices


def require_rows(x: torch.Tensor) -> None:
    """Refuse an empty x. A symbolic number of rows is accepted."""
    if isinstance(x.shape[0], int) and x.shape[0] < 1:
        raise Refused(f"x must have at least one row, found the sizes {list(x.shape)}.")


def supports(
    x, weight, top_k, normalize, wide_logits=False, wide_weights=False, norm_weight=None, norm_eps=0.0, norm_offset=0.0
) -> None:
    """Raise Refused unless the kernels support the arguments.

    There must be rows. All sizes but their number must be static, x and weight must have one dtype of float32, bfloat16 and
    float16, rows must be contiguous, and E and top_k must fit a program. Several rows must have no norm.
    """
    require_dtypes(x=x, weight=weight, norm_weight=norm_weight)
    if x.dtype != weight.dtype:
        both = " and ".join(str(t.dtype).removeprefix("torch.") for t in (x, weight))
        raise Refused(f"x and the router's weight must have one dtype, found {both}.")
    if x.dim() != 2 or weight.dim() != 2:
        raise Refused(f"x and the router's weight must have two dimensions, found {x.dim()} and {weight.dim()}.")
    N, (E, H) = x.shape[0], weight.shape
    require_static(E=E, H=H)
    require_static(**{"x's last size": x.shape[-1]})
    if x.shape[-1] != H:
        raise Refused(f"x and the router's weight must agree on H, found {x.shape[-1]} and {H}.")
    if not 1 <= top_k <= min(E, MAX_TOP_K) or E > MAX_EXPERTS:
        raise Refused(f"A row must go to 1 to {MAX_TOP_K} of at most {MAX_EXPERTS} experts, found {top_k} of {E}.")
    for name, t in (("x", x), ("The router's weight", weight)):
        if not isinstance(t.stride(-1), int) or t.stride(-1) != 1:
            raise Refused(f"{name} must have contiguous rows, found the strides {list(t.stride())}.")
    require_rows(x)
    one, few = isinstance(N, int) and N == 1, not isinstance(N, int) or N <= MAX_ROWS
    if not one and norm_weight is not None:
        raise Refused("Several rows take no norm before the router, found one.")
    if not one and H % (PARTS[-1] * SMALLEST_STEP):
        raise Refused(f"The columns of a router for several rows must be a multiple of {PARTS[-1] * SMALLEST_STEP}, found {H}.")
    if few and H > MAX_N:
        raise Refused(f"One row must be at most {MAX_N} wide, found {H}.")


implementation = register("route", launch, supports, early=("weight", "norm_weight"), measured="benchmarks/experts.py")
