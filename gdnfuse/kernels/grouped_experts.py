"""The chosen experts of a prompt's rows: products grouped by expert, with gathering, SwiGLU, weighting and the sum around them.

It computes the dialect's experts (Shazeer et al. 2017, arXiv:1701.06538; SwiGLU: Shazeer 2020, arXiv:2002.05202) in four
launches: which choices belong to which expert, gate and up, down, and the sum over each row's choices. The host reads nothing
back. Grids are as large as they may have to be, and programs without rows end at once.

In the first launch there is one program per expert. It counts the choices of the experts before it and then writes down its own,
in order. So nothing is sorted and nothing is atomic. Programs of the products take a tile of an expert's choices, for which they
gather rows of x. The result of SwiGLU is ordered by expert. The result of down goes to the place of its choice, times the weight
of the choice. The shared expert is an additional expert that all rows choose; its gate is applied in the sum. Products are on
tensor cores with the weight's rows as the product's rows, so experts that few rows chose are no more work than needed.

Up to ROWS rows are taken at a time. So the memory for choices is bounded for prompts of any length.

Layout: as in experts.py. Products and sums are float32. The result of SwiGLU, the part of each choice and the final result are
rounded to the weights' dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from gdnfuse.kernels.few_rows_linear import OPERANDS
from gdnfuse.kernels.launch.implementation import kernel_of
from gdnfuse.kernels.quantized import dequantize, scales_of_rows

if TYPE_CHECKING:
    from gdnfuse.kernels.experts import Scales, Shared

ROWS = 8192  # how many rows are taken at a time
LISTED = 2048  # how many choices a program of the first launch reads at once


class GroupedConfig(NamedTuple):
    """Rows of the weight per tile (half of gate, half of up), choices per tile, columns per step, warps, stages in flight."""

    BM: int
    BB: int
    BK: int
    num_warps: int
    stages: int

    def shared_memory(self, itemsize: int) -> int:
        """The most bytes of shared memory per program."""
        return (self.BM + self.BB) * self.BK * self.stages * itemsize


# By the most choices that an expert has on average. Two programs fit on a multiprocessor of Hopper.
CONFIGS = (
    (12, GroupedConfig(128, 16, 128, 4, 3)),
    (24, GroupedConfig(128, 32, 64, 4, 3)),
    (64, GroupedConfig(128, 64, 64, 4, 3)),
    (float("inf"), GroupedConfig(128, 128, 64, 4, 3)),
)
WIDENED = 64  # the most choices per tile of quantised experts
WIDE = GroupedConfig(64, 32, 32, 4, 2)  # for float32, for which larger tiles would spill


@triton.jit
def group_choices_kernel(
    indices_ptr, order_ptr, tiles_ptr, NK, E, T, BB: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """Group choices by expert.

    order: the choices of each expert after those of the one before. tiles [3, T]: the expert of each tile of choices, and the
    range of its choices in that order, which may be empty.
    """
    expert = tl.program_id(0)
    i = tl.arange(0, BLOCK)  # [BLOCK]
    before = tl.zeros((BLOCK,), tl.int32)
    own = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, NK, BLOCK, num_stages=STAGES):
        index = tl.load(indices_ptr + start + i, mask=start + i < NK, other=-1)  # [BLOCK]
        before += ((index >= 0) & (index < expert)).to(tl.int32)
        own += (index == expert).to(tl.int32)
    first = tl.sum(before, 0)
    last = first + tl.sum(own, 0)
    # The tiles of the experts before end here at the latest, and those of this expert where the next one's begin.
    begin = first // BB + expert
    end = tl.where(expert == E - 1, T, last // BB + expert + 1)
    for start in range(begin, end, BLOCK):
        tile = start + i  # [BLOCK]
        place = first + (tile - begin) * BB
        tl.store(tiles_ptr + tile, expert, mask=tile < end)
        tl.store(tiles_ptr + T + tile, tl.minimum(place, last), mask=tile < end)
        tl.store(tiles_ptr + 2 * T + tile, tl.minimum(place + BB, last), mask=tile < end)
    if last > first:
        for start in tl.range(0, NK, BLOCK, num_stages=STAGES):
            mine = tl.load(indices_ptr + start + i, mask=start + i < NK, other=-1) == expert  # [BLOCK]
            rank = tl.cumsum(mine.to(tl.int32), 0)  # [BLOCK]
            tl.store(order_ptr + first + rank - 1, start + i, mask=mine)
            first += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def _tile(tiles_ptr, tile, T, N, SHARED: tl.constexpr, shared, shared_tile, BB: tl.constexpr):
    """The expert of a tile and the range of its choices, or the range of rows for the shared expert."""
    expert = tl.load(tiles_ptr + tile)
    first = tl.load(tiles_ptr + T + tile)
    last = tl.load(tiles_ptr + 2 * T + tile)
    if SHARED:
        first = tl.where(shared, shared_tile * BB, first)
        last = tl.where(shared, tl.minimum(first + BB, N), last)
    return expert, first, last


@triton.jit
def grouped_up_kernel(
    x_ptr, order_ptr, tiles_ptr, gate_up_ptr, shared_gate_ptr, shared_up_ptr, h_ptr, shared_h_ptr,
    scale_ptr, shared_gate_scale_ptr, shared_up_scale_ptr,
    N, T, I, S, columns, tiles, shared_tiles, shared_programs, stride_x, stride_e, stride_w, stride_sg, stride_su,
    K: tl.constexpr, OPERAND: tl.constexpr, BM: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    KIND: tl.constexpr, SCALED: tl.constexpr, COLUMNS: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """BM / 2 columns of SwiGLU for BB choices of an expert, or for BB rows of the shared one."""
    pid = tl.program_id(0)
    b = tl.arange(0, BB)  # [BB]
    k = tl.arange(0, BK)  # [BK]
    shared = pid < shared_programs
    tile = tl.maximum(pid - shared_programs, 0) // tiles
    expert, first, last = _tile(tiles_ptr, tile, T, N, shared_gate_ptr is not None, shared, pid // shared_tiles, BB)
    if first >= last:
        return
    at = first + b  # [BB]
    live = at < last
    gate_ptr = gate_up_ptr + expert.to(tl.int64) * stride_e
    up_ptr = gate_ptr + tl.cast(I, tl.int64) * stride_w
    stride_gate, stride_up = stride_w, stride_w
    out_ptr = h_ptr
    width = I
    BO: tl.constexpr = BM // 2
    row = tl.where(shared, pid % shared_tiles, (pid - shared_programs) % tiles) * BO + tl.arange(0, BO)  # [BO]
    n = tl.load(order_ptr + at, mask=live & (pid >= shared_programs), other=0) // K  # [BB]
    if shared_gate_ptr is not None:
        width = tl.where(shared, S, I)
        n = tl.where(shared & live, at, n)
        gate_ptr, up_ptr = tl.where(shared, shared_gate_ptr, gate_ptr), tl.where(shared, shared_up_ptr, up_ptr)
        stride_gate, stride_up = tl.where(shared, stride_sg, stride_w), tl.where(shared, stride_su, stride_w)
        out_ptr = tl.where(shared, shared_h_ptr, h_ptr)
    w_row = tl.where(row < width, row, 0).to(tl.int64)  # [BO]
    gate_ptrs = gate_ptr + w_row[:, None] * stride_gate + k[None, :]  # [BO, BK]
    up_ptrs = up_ptr + w_row[:, None] * stride_up + k[None, :]  # [BO, BK]
    x_ptrs = x_ptr + n.to(tl.int64)[None, :] * stride_x + k[:, None]  # [BK, BB]
    if KIND is not None:
        of_gate = scale_ptr + scales_of_rows(expert, 2 * I, w_row, columns, SCALED, COLUMNS)  # [BO]
        of_up = scale_ptr + scales_of_rows(expert, 2 * I, I + w_row, columns, SCALED, COLUMNS)  # [BO]
        if shared_gate_ptr is not None:
            place = scales_of_rows(0, S, w_row, columns, SCALED, COLUMNS)
            of_gate = tl.where(shared, shared_gate_scale_ptr + place, of_gate)
            of_up = tl.where(shared, shared_up_scale_ptr + place, of_up)
    gate = tl.zeros((BO, BB), tl.float32)
    up = tl.zeros((BO, BB), tl.float32)
    for start in tl.range(0, columns, BK, num_stages=STAGES):
        x = tl.load(x_ptrs + start, mask=live[None, :], other=0.0).to(OPERAND)
        if KIND is None:
            w, w_up = tl.load(gate_ptrs + start), tl.load(up_ptrs + start)
        else:
            block = start // COLUMNS
            w = dequantize(tl.load(gate_ptrs + start), tl.load(of_gate + block), KIND, CONVERTS)
            w_up = dequantize(tl.load(up_ptrs + start), tl.load(of_up + block), KIND, CONVERTS)
        gate = tl.dot(w.to(OPERAND), x, gate, input_precision="ieee")
        up = tl.dot(w_up.to(OPERAND), x, up, input_precision="ieee")
    y = gate * tl.sigmoid(gate) * up  # [BO, BB]
    out_ptrs = out_ptr + at.to(tl.int64)[None, :] * width + row[:, None]
    tl.store(out_ptrs, y.to(h_ptr.dtype.element_ty), mask=(row < width)[:, None] & live[None, :])


@triton.jit
def grouped_down_kernel(
    h_ptr, shared_h_ptr, order_ptr, tiles_ptr, weights_ptr, down_ptr, shared_down_ptr, parts_ptr,
    scale_ptr, shared_scale_ptr,
    N, NK, T, M, I, S, tiles, shared_programs, stride_e, stride_w, stride_s,
    OPERAND: tl.constexpr, BM: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    KIND: tl.constexpr, SCALED: tl.constexpr, COLUMNS: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """BM columns of BB choices' parts of the result, times their weights, or of the shared expert's for BB rows."""
    pid = tl.program_id(0)
    k = tl.arange(0, BK)  # [BK]
    shared = pid < shared_programs
    tile = tl.maximum(pid - shared_programs, 0) // tiles
    expert, first, last = _tile(tiles_ptr, tile, T, N, shared_down_ptr is not None, shared, pid // tiles, BB)
    if first >= last:
        return
    at = first + tl.arange(0, BB)  # [BB]
    live = at < last
    weight_ptr = down_ptr + expert.to(tl.int64) * stride_e
    width, stride = I, stride_w
    in_ptr = h_ptr
    choice = tl.load(order_ptr + at, mask=live & (pid >= shared_programs), other=0)  # [BB]
    factor = tl.load(weights_ptr + choice, mask=live & (pid >= shared_programs), other=1.0).to(tl.float32)  # [BB]
    row = pid % tiles * BM + tl.arange(0, BM)  # [BM]
    if shared_down_ptr is not None:
        width, stride = tl.where(shared, S, I), tl.where(shared, stride_s, stride_w)
        weight_ptr = tl.where(shared, shared_down_ptr, weight_ptr)
        in_ptr = tl.where(shared, shared_h_ptr, h_ptr)
        choice = tl.where(shared, NK + at, choice)
    w_row = tl.where(row < M, row, 0)
    w_ptrs = weight_ptr + w_row.to(tl.int64)[:, None] * stride + k[None, :]  # [BM, BK]
    if KIND is not None:
        scale_ptrs = scale_ptr + scales_of_rows(expert, M, w_row, I, SCALED, COLUMNS)  # [BM]
        if shared_down_ptr is not None:
            of_shared = shared_scale_ptr + scales_of_rows(0, M, w_row, S, SCALED, COLUMNS)
            scale_ptrs = tl.where(shared, of_shared, scale_ptrs)
    h_ptrs = in_ptr + tl.where(live, at, first).to(tl.int64)[None, :] * width + k[:, None]  # [BK, BB]
    acc = tl.zeros((BM, BB), tl.float32)
    for start in tl.range(0, width, BK, num_stages=STAGES):
        h = tl.load(h_ptrs + start, mask=live[None, :], other=0.0).to(OPERAND)
        w = tl.load(w_ptrs + start)
        if KIND is not None:
            w = dequantize(w, tl.load(scale_ptrs + start // COLUMNS), KIND, CONVERTS)
        acc = tl.dot(w.to(OPERAND), h, acc, input_precision="ieee")
    y = acc * factor[None, :]
    out_ptrs = parts_ptr + choice.to(tl.int64)[None, :] * M + row[:, None]  # [BM, BB]
    tl.store(out_ptrs, y.to(parts_ptr.dtype.element_ty), mask=(row < M)[:, None] & live[None, :])


@triton.jit
def grouped_sum_kernel(
    parts_ptr, indices_ptr, x_ptr, shared_expert_gate_ptr, residual_ptr, out_ptr, NK, E, M, stride_x, stride_r,
    K: tl.constexpr, SHARED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN columns of a row's result, over all choices that have an expert, plus the shared expert times its gate."""
    n = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
    live = column < M
    y = tl.zeros((BN,), tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + n * stride_r + column, mask=live, other=0.0).to(tl.float32)
    for j in tl.static_range(K):
        expert = tl.load(indices_ptr + n * K + j)
        inside = live & (expert >= 0) & (expert < E)
        y += tl.load(parts_ptr + (n * K + j) * M + column, mask=inside, other=0.0).to(tl.float32)
    if SHARED:
        part = tl.load(parts_ptr + (NK + n) * M + column, mask=live, other=0.0).to(tl.float32)
        if shared_expert_gate_ptr is not None:
            opening = tl.zeros((BN,), tl.float32)
            for start in range(0, M, BN):
                i = start + tl.arange(0, BN)  # [BN]
                s = tl.load(shared_expert_gate_ptr + i, mask=i < M, other=0.0).to(tl.float32)
                opening += s * tl.load(x_ptr + n * stride_x + i, mask=i < M, other=0.0).to(tl.float32)
            part = part * tl.sigmoid(tl.sum(opening, 0))
        y += part
    tl.store(out_ptr + n * M + column, y.to(out_ptr.dtype.element_ty), mask=live)


def config_for(rows: int, top_k: int, E: int, itemsize: int, shared_memory: int) -> GroupedConfig:
    """The config for so many rows, with as many stages and as long steps as fit the shared memory."""
    if itemsize > 2:
        return WIDE
    config = next(config for most, config in CONFIGS if rows * top_k <= most * E)
    while config.shared_memory(itemsize) > shared_memory:
        config = config._replace(stages=config.stages - 1) if config.stages > 2 else config._replace(BK=config.BK // 2)
    return config


def fitting(config: GroupedConfig, *columns: int) -> GroupedConfig:
    """The config with the most columns per step such that all these numbers of columns are multiples of it."""
    block = config.BK
    while any(n % block for n in columns):
        block //= 2
    return config._replace(BK=block)


def launch(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared: Shared,
    scales: Scales,
    residual: torch.Tensor | None,
    shared_memory: int,
) -> torch.Tensor:
    """The dialect's experts without norm for any number of rows, on a device with so much shared memory per program."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    indices, weights = indices.contiguous(), weights.contiguous()
    N = x.shape[0]
    for start in range(0, N, ROWS):
        given = (x, indices, weights, residual, out)
        part = (None if t is None else t.narrow(0, start, min(ROWS, N - start)) for t in given)
        _launch(*part, gate_up, down, shared, scales, shared_memory)
    return out


def _launch(x, indices, weights, residual, out, gate_up, down, shared: Shared, scales: Scales, shared_memory: int) -> None:
    """The same for rows that are taken at a time, into `out`."""
    (N, K), (E, _, H), I, S = indices.shape, gate_up.shape, down.shape[2], shared.width
    empty = lambda *shape, dtype=x.dtype: torch.empty(shape, dtype=dtype, device=x.device)  # noqa: E731
    config, operand = config_for(N, K, E, x.dtype.itemsize, shared_memory), OPERANDS[x.dtype]
    if scales.format:
        config = config._replace(BB=min(config.BB, WIDENED))  # widened weights take registers
    how = {"SCALED" if name == "ROWS" else name: value for name, value in scales.how(x.device).items()}
    T = N * K // config.BB + E  # the most tiles of choices
    order, of_tiles = empty(N * K, dtype=torch.int32), empty(3, T, dtype=torch.int32)
    kernel_of(group_choices_kernel)[(E,)](
        indices, order, of_tiles, N * K, E, T, BB=config.BB, BLOCK=LISTED, STAGES=3, num_warps=8,
    )  # fmt: skip

    shared_groups = -(-N // config.BB) if S else 0
    BM, BB, BK, num_warps, stages = fitting(config, H)
    h, shared_h = empty(N * K, I), empty(N, S) if S else None
    tiles, shared_tiles = -(-I // (BM // 2)), max(-(-S // (BM // 2)), 1)
    shared_programs = shared_groups * shared_tiles
    kernel_of(grouped_up_kernel)[(shared_programs + T * tiles,)](
        x, order, of_tiles, gate_up, shared.gate, shared.up, h, shared_h, scales.gate_up, scales.shared_gate, scales.shared_up,
        N, T, I, S, H, tiles, shared_tiles, shared_programs, x.stride(0), gate_up.stride(0), gate_up.stride(1),
        *shared.strides()[:2], K=K, OPERAND=operand, BM=BM, BB=BB, BK=BK, STAGES=stages, **how, num_warps=num_warps,
    )  # fmt: skip

    BM, BB, BK, num_warps, stages = fitting(config, *(n for n in (I, S) if n))
    parts = empty(N * K + (N if S else 0), H)
    tiles = -(-H // BM)
    shared_programs = shared_groups * tiles
    kernel_of(grouped_down_kernel)[(shared_programs + T * tiles,)](
        h, shared_h, order, of_tiles, weights, down, shared.down, parts, scales.down, scales.shared_down,
        N, N * K, T, H, I, S, tiles, shared_programs, down.stride(0), down.stride(1), shared.strides()[2],
        OPERAND=operand, BM=BM, BB=BB, BK=BK, STAGES=stages, **how, num_warps=num_warps,
    )  # fmt: skip

    BN = min(SUMMED, triton.next_power_of_2(H))
    kernel_of(grouped_sum_kernel)[(N, -(-H // BN))](
        parts, indices, x, shared.expert_gate, residual, out,
        N * K, E, H, x.stride(0), 0 if residual is None else residual.stride(0),
        K=K, SHARED=S > 0, BN=BN, num_warps=4,
    )  # fmt: skip


SUMMED = 2048  # columns per program of the sum
