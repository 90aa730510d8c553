"""How the work of a few rows times a weight is divided, from static facts alone.

This file does not import triton, so the lowering can use it.

Chosen on an H200 for bfloat16, except for the ring. benchmarks/gemm.py sweeps the choices. Where whole decode steps gave another
result, that decided.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from gdnfuse import compat
from gdnfuse.errors import Refused
from gdnfuse.kernels.devices import H200, Device, index_of, require_shared
from gdnfuse.kernels.tuned import require_divides, require_powers

MAX_ROWS = 32
MULTIPROCESSORS = H200.multiprocessors
FILLED = 100  # with at least so many tiles of rows, splitting the columns is not worth the sum
MOST = 330  # with more programs than this, more parts are not worth the sum
PARTS = (8, 7, 6, 5, 4, 3, 2)


class FewRowsConfig(NamedTuple):
    """How a few rows are computed.

    Rows of the weight per tile, columns per step, warps, stages in flight, parts of the columns, and whether the first step is
    loaded early.
    """

    BM: int
    BK: int
    num_warps: int
    stages: int
    parts: int
    early: bool

    def shared_memory(self, rows: int, itemsize: int) -> int:
        """Bytes of shared memory per program for so many rows: the tiles of weight and x of all stages but the current one.

        On sm_90 and sm_100, where products read shared memory themselves, there are up to two more stages, for which there is
        room.
        """
        return max(self.stages - 1, 1) * (self.BM + columns_of(rows)) * self.BK * itemsize


class RingConfig(NamedTuple):
    """Tiles per program, rows of the weight in a tile (of gate and of up each with SwiGLU), steps in the ring, parts of the
    columns."""

    tiles: int
    live: int
    stages: int
    parts: int


class LowRankConfig(NamedTuple):
    """Rows of A and of x per program, columns per step, warps, steps of A that are loaded before x arrives, and steps of x whose
    loads are in flight together."""

    R: int
    BB: int
    BN: int
    num_warps: int
    ahead: int
    together: int


class TensorCoresConfig(NamedTuple):
    """Warps of a program, how many steps of weights it loads before the row arrives, and the rows of its tile."""

    warps: int
    ahead: int
    rows: int = 16


SCALED = 128  # columns of a quantised weight that share a scale
STEP = 128  # columns per step
TILE = 64  # rows of the weight per tile
MOST_TILES = 3  # the most tiles per program; more do not fit the shared memory
WAVES = 2  # waves of programs; weights with more rows, such as the head, stream as fast without a ring
LEAST_ROWS = 16  # the fewest rows per program, because x is copied for each program
SPLIT_ROWS = 48  # the most rows per program if columns are split
RESIDENT = 3  # programs per multiprocessor of a quantised weight, or of gate and up for many sequences
# Columns of adapters' B's that a ring multiplies at once, and the most of such slots that it takes, because each is code.
ADAPTER_SLOT, MAX_ADAPTER_SLOTS = 16, 32
# For A·x of adapters: rows of A and of x per program, the smallest first, and the most registers of a thread for either.
LOW_RANK_TILES, LOW_RANK_REGISTERS = ((1, 1), (1, 2), (1, 4), (2, 4), (4, 4)), 64
LOW_RANK_COLUMNS = 8  # columns of a thread at once


def rings(weight: torch.Tensor) -> bool:
    """Whether few_rows_hopper supports the device and the dtype of a weight.

    For a weight without a device, as in a report, that is the current GPU. So a report splits a linear like a step on this card.
    """
    if weight.dtype not in (torch.bfloat16, torch.float16) or weight.device.type not in ("cuda", "meta"):
        return False
    if torch.version.hip is not None or not torch.cuda.is_available() or compat.gluon() is None:
        return False
    return torch.cuda.get_device_capability(index_of(weight.device))[0] == 9


def rows_and_out(x: torch.Tensor, M: int, dtype: torch.dtype, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x as [B, N], and memory for M columns of a linear of a few rows: [parts, ..., M] in float32, or [..., M] in `dtype`."""
    shape = (*x.shape[:-1], M)
    shape, dtype = ((parts, *shape), torch.float32) if parts > 1 else (shape, dtype)
    return x.reshape(-1, x.shape[-1]), torch.empty(shape, dtype=dtype, device=x.device)


def ring_config(M: int, N: int, swiglu: bool = False, parts: int = 1, sequences: int = 8) -> RingConfig | None:
    """The config of few_rows_hopper for a weight [M, N], with `swiglu` [2·M, N], or None if few_rows_linear is better.

    Every multiprocessor gets equally many rows: in one program; in two if the columns are split; in two, or three with SwiGLU, of
    one tile each for more than 16 sequences. Chosen on an H200 in chains of layers (docs/trials.md). With adapters, which need
    memory beside the ring, `sequences` is 0.
    """
    if N % (STEP * parts):
        return None
    rows = TILE // 2 if swiglu else TILE
    programs = 2 * MULTIPROCESSORS // parts if parts > 1 else MULTIPROCESSORS * -(-M // (MULTIPROCESSORS * MOST_TILES * rows))
    if programs > WAVES * MULTIPROCESSORS:
        return None
    more = (RESIDENT if swiglu else 2) * MULTIPROCESSORS
    if parts == 1 and sequences > 16 and LEAST_ROWS <= M / more <= rows:
        programs = more
    each = max(-(-M // programs), LEAST_ROWS)
    tiles = -(-each // rows)
    if tiles > MOST_TILES:
        return None
    stages = 3 if tiles > 2 or programs > 2 * MULTIPROCESSORS else 5 if tiles == 2 and 0 < sequences <= 16 else 4
    return RingConfig(tiles, -(-each // tiles), min(stages, N // parts // STEP + 1), parts)


def slots_at_once(chosen: RingConfig, rows: int, slots: int, numbers: int) -> int:
    """How many slots of adapters are in shared memory next to the ring, of `slots` in all. It is at most 64 columns.

    There is room for one program per multiprocessor, or two if the columns are split. `numbers` in bfloat16 are one of B.
    """
    ring = chosen.stages * STEP * 2 * (chosen.tiles * TILE + columns_of(rows))
    each = ADAPTER_SLOT * 2 * (chosen.tiles * TILE * numbers + columns_of(rows) * 3)
    room = (H200.shared_memory + 1024) // (2 if chosen.parts > 1 else 1) - 1024 - ring
    return max(min(slots, 64 // ADAPTER_SLOT, room // each), 1)


def quantized_ring_config(M: int, N: int, rows: int, swiglu: bool = False, parts: int = 1) -> RingConfig | None:
    """The config of few_rows_hopper_quantized for so many rows times a weight [M, N], with `swiglu` [2·M, N].

    None if the columns do not fill blocks of scales. A program spends as long on moving weights to the tensor cores as on loading
    them. So three programs of one tile each run on a multiprocessor, to keep both busy. Chosen on an H200 with benchmarks/gemm.py
    --format fp8_block128.
    """
    if N % (STEP * parts):
        return None
    most = TILE // 2 if swiglu else TILE
    programs = RESIDENT * MULTIPROCESSORS // parts
    programs *= max(-(-M // (programs * most)), 1)
    steps = N // parts // STEP
    return RingConfig(1, max(-(-M // programs), LEAST_ROWS), 3 if steps < 6 else min(6 if rows <= 8 else 4, steps + 1), parts)


# For the kind of data and what is fused around the linear of one row: the largest N, and the config. If no line fits,
# skinny_linear is better, and so it is if the config is None. Chosen on an H200 with benchmarks/gemm.py --format and in
# chains of layers (docs/trials.md), for four bits at a 4B model's sizes alone.
TENSOR_CORES = {
    "e4m3": {
        "conv": (
            (2048, TensorCoresConfig(4, 4)),
            (3072, TensorCoresConfig(2, 12)),
            (8192, TensorCoresConfig(4, 10)),
        ),
        "norm": ((8192, TensorCoresConfig(4, 6)),),
        "gate": ((4096, TensorCoresConfig(4, 16)), (8192, TensorCoresConfig(4, 6, 32))),
        "swiglu": ((3072, TensorCoresConfig(4, 6)), (4096, TensorCoresConfig(4, 16)), (8192, TensorCoresConfig(4, 12))),
        "plain": ((8192, None), (9216, TensorCoresConfig(4, 10))),
    },
    "int4": {
        "conv": ((3072, TensorCoresConfig(2, 4, 32)), (16384, TensorCoresConfig(4, 4, 32))),
        "norm": ((16384, TensorCoresConfig(4, 4, 32)),),
        "gate": ((4096, TensorCoresConfig(16, 2, 32)), (16384, TensorCoresConfig(8, 4, 32))),
        "swiglu": ((3072, TensorCoresConfig(4, 6, 32)), (16384, TensorCoresConfig(4, 4, 32))),
        "plain": ((6144, TensorCoresConfig(8, 4)), (16384, TensorCoresConfig(4, 10))),
    },
    # Values of nf4 and fp4 are rounded to float16, which is not enough for a conv, because its result is float32.
    "nf4": {
        "norm": ((8192, TensorCoresConfig(4, 8)),),
        "swiglu": ((8192, TensorCoresConfig(4, 6)),),
        "plain": ((6144, TensorCoresConfig(8, 4)),),
    },
}
TENSOR_CORES["fp4"] = TENSOR_CORES["nf4"]


def tensor_cores_config(kind: str, N: int, of: str) -> TensorCoresConfig | None:
    """The config of skinny_tensor_cores for a weight of N columns, or None if skinny_linear is better.

    Args:
        kind: what is fused around the linear, named as in `skinny_linear.kind`.
        N: columns of the weight.
        of: the kind of data, as in `quantized.Stored`.
    """
    return next((chosen for width, chosen in TENSOR_CORES.get(of, {}).get(kind, ()) if N <= width), None)


def require_tensor_cores(config: TensorCoresConfig) -> None:
    """Refuse a config that skinny_tensor_cores cannot be launched with."""
    require_powers(warps=config.warps)
    if config.rows not in (16, 32) or not 1 <= config.ahead <= 64:
        raise Refused(f"Tiles must have 16 or 32 rows, and 1 to 64 steps be loaded ahead, found {list(config)}.")


def columns_of(rows: int) -> int:
    """Columns of a product on tensor cores with so many rows of x."""
    return max(8, 1 << (rows - 1).bit_length())


def few_rows_config(
    N: int, rows: int, swiglu: bool = False, parts: int = 1, dtype: torch.dtype = torch.bfloat16, device: Device = H200,
    scaled: int = SCALED,
) -> FewRowsConfig:  # fmt: skip
    """The config for `rows` rows times a weight of N columns, with as many stages as fit the shared memory of the device.

    Args:
        swiglu: whether the weight is of gate and up.
        parts: of split_linear.
        device: the device that it runs on.
        scaled: columns that share a scale, for a quantised weight with one byte per element.

    Raises:
        Refused: N, or a part of it, does not fill the steps over columns, or a step does not fit the shared memory.
    """
    few = rows <= 8
    if parts > 1 and few:
        config = FewRowsConfig(64, 256, 4, 4, parts, True)
    elif parts > 1:
        config = FewRowsConfig(64, 128, 4, 2 if N <= 4 * 128 * parts else 3, parts, True)
    elif swiglu and rows <= 16:
        config = FewRowsConfig(32, 256, 4, 4 if few else 2, 1, True)
    elif swiglu:
        config = FewRowsConfig(64, 128, 4, 4, 1, False)
    else:
        config = FewRowsConfig(64, 256 if few else 128, 4, 4 if few else 3, 1, few)
    block = config.BK * 2 // dtype.itemsize
    if dtype.itemsize > 2:
        config = config._replace(BM=32)  # more rows would spill
    if dtype.itemsize < 2:
        config, block = FewRowsConfig(64, scaled, 4, 4, parts, False), scaled
    while block > 32 and N % (block * parts):
        block //= 2
    if N % (block * parts):
        raise Refused(f"The columns of a weight for several rows must be a multiple of {block * parts}, found {N}.")
    config = config._replace(BK=block)
    itemsize = max(dtype.itemsize, 2)  # x has at least two bytes per element
    while config.stages > 2 and config.shared_memory(rows, itemsize) > device.shared_memory:
        config = config._replace(stages=config.stages - 1)
    require_shared("few_rows_linear", config.shared_memory(rows, itemsize), device)
    return config


def require_few_rows(
    config: FewRowsConfig, N: int, rows: int, itemsize: int, parts: int, device: Device, scaled: int = 0
) -> None:
    """Refuse a config that few_rows_linear cannot be launched with.

    Args:
        itemsize: bytes of an element of the weight, at least 1.
        scaled: columns of a quantised weight that share a scale; 0 for another weight.
    """
    require_powers(BM=config.BM, BK=config.BK, warps=config.num_warps)
    _require_parts(config.parts, parts)
    require_divides(N, config.BK * parts, "The columns of the weight")
    if min(config.BM // 2, config.BK, 16 * config.stages) < 16:
        raise Refused(f"Tiles must have at least 32 rows and steps of 16 columns, in a stage or more, found {list(config)}.")
    if scaled and (config.early or scaled % config.BK):
        raise Refused(f"Steps of a quantised weight must share a scale and not be early, found {list(config)}.")
    require_shared("few_rows_linear", config.shared_memory(rows, max(itemsize, 2)), device)


def require_ring(config: RingConfig, N: int, rows: int, itemsize: int, swiglu: bool, parts: int, device: Device) -> None:
    """Refuse a config that few_rows_hopper and few_rows_hopper_quantized cannot be launched with."""
    _require_parts(config.parts, parts)
    require_divides(N, STEP * parts, "The columns of the weight")
    most, steps = TILE // 2 if swiglu else TILE, N // parts // STEP
    if not (1 <= config.tiles <= MOST_TILES and 1 <= config.live <= most and 2 <= config.stages <= steps + 1):
        limits = f"up to {MOST_TILES} tiles, up to {most} rows in each, and 2 to {steps + 1} stages"
        raise Refused(f"A ring must have {limits}, found {list(config)}.")
    needed = STEP * config.stages * (itemsize * TILE * config.tiles + 2 * columns_of(rows))
    require_shared("few_rows_hopper", needed, device)


def _require_parts(found: int, parts: int) -> None:
    """The number of parts belongs to the graph."""
    if found != parts:
        raise Refused(f"The columns must be in {parts} parts, found {found}.")


def low_rank_config(R: int, N: int, rows: int, dtype: torch.dtype, x_dtype: torch.dtype) -> LowRankConfig:
    """The config of low_rank for A [R, N] of this dtype and so many rows of x. Not measured.

    It has as many programs as fit with two on each multiprocessor.
    """
    tiles = [(r, b) for r, b in LOW_RANK_TILES if -(-R // r) * -(-rows // b) <= 2 * MULTIPROCESSORS]
    r, b = tiles[0] if tiles else LOW_RANK_TILES[-1]
    warps = 4 if N <= 3072 else 8
    step = 32 * warps * LOW_RANK_COLUMNS
    of_a, of_x = (n * LOW_RANK_COLUMNS * d.itemsize // 4 for n, d in ((r, dtype), (b, x_dtype)))  # registers of a step
    ahead, together = (min(-(-N // step), LOW_RANK_REGISTERS // n) for n in (of_a, of_x))
    return LowRankConfig(r, b, step, warps, ahead, together)


def split(M: int, N: int, rows: int, ring: bool = False, quantised: bool = False) -> int:
    """Into how many parts the columns of a weight [M, N] are split, so that there are enough programs to stream it.

    It is the number for which multiprocessors idle least while the last programs run; of equal ones the largest. For a ring,
    whose programs need not take whole tiles, it is the largest with which they have few rows.
    """
    if not 1 < rows <= MAX_ROWS:
        return 1
    if ring:
        if M >= MULTIPROCESSORS * TILE // 2:
            return 1
        whole = [n for n in PARTS if N % (STEP * n) == 0 and N >= 2 * STEP * n]
        resident, most = (RESIDENT, TILE) if quantised else (2, SPLIT_ROWS)
        return next((n for n in whole if -(-M // (resident * MULTIPROCESSORS // n)) <= most), 1)
    tiles, step = -(-M // 64), 256 if rows <= 8 else 128
    if tiles >= FILLED:
        return 1
    valid = [n for n in PARTS if N % (step * n) == 0 and N >= 2 * step * n and tiles * n <= MOST]
    idle = {n: round(-(-tiles * n // MULTIPROCESSORS) * MULTIPROCESSORS / (tiles * n), 2) for n in valid}
    return min(valid, key=lambda n: (idle[n], -n), default=1)
