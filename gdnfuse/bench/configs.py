"""Which configs of our kernels are worth measuring. `gdnfuse tune` takes those next to the one of our tables.

benchmarks/gemm.py and benchmarks/mixer.py sweep all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from gdnfuse import formats
from gdnfuse.kernels import devices, quantized, skinny_linear
from gdnfuse.kernels.linear_configs import (
    STEP,
    FewRowsConfig,
    RingConfig,
    TensorCoresConfig,
    columns_of,
    quantized_ring_config,
    ring_config,
    rings,
    split,
    tensor_cores_config,
)
from gdnfuse.kernels.tuned import Key

DEVICE = "cuda"
HEAD = 128  # columns of a head of a gated norm
BLOCK = 128  # rows and columns that share a scale
Config = skinny_linear.Config | TensorCoresConfig | FewRowsConfig | RingConfig
# For the kernels of the rule of one token, by name: value columns and warps, and whether the next tile is loaded early.
RULES: dict[str, list[tuple[Any, ...]]] = {
    "delta_rule": [(16, 1), (16, 2), (32, 1), (32, 2), (32, 4), (64, 2), (64, 4), (128, 4)],
    "delta_rule_gated": [
        (128, 4, False), (128, 8, False), (64, 2, False), (64, 4, False), (64, 4, True), (32, 2, False), (32, 2, True)
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Linear:
    """role: of ROLES. rows, columns: of the weight. channels: of the conv behind it. models: whose decode steps have it.

    sequences: rows that the weight is multiplied with. format: of a quantised weight.
    """

    role: str
    whose: str
    rows: int
    columns: int
    channels: int = 0
    models: tuple[str, ...] = ()
    sequences: int = 1
    format: str = ""

    @property
    def bits(self) -> int:
        return formats.named(self.format).bits if self.format else 16

    @property
    def itemsize(self) -> int:
        """Bytes of an element, at least one."""
        return max(self.bits // 8, 1)

    @property
    def plain(self) -> int:
        """How many rows behind those of a quantised weight are not."""
        return self.rows % BLOCK if self.format and self.role == "conv" else 0

    @property
    def size(self) -> int:
        """Bytes of the weight, and of its scales."""
        quantised = self.rows - self.plain
        scales = self.scale_dtype.itemsize * math.prod(self.scales) if self.format else 0
        return (quantised * self.bits // 8 + 2 * self.plain) * self.columns + scales

    @property
    def scale_dtype(self) -> torch.dtype:
        """What checkpoints of the format have."""
        return torch.bfloat16 if quantized.stored(self.format).kind == "int4" else torch.float32

    @property
    def scales(self) -> tuple[int, int]:
        """The shape of a quantised weight's scale."""
        how = quantized.stored(self.format)
        return -(-(self.rows - self.plain) // how.rows), -(-self.columns // (how.columns or self.columns))

    @property
    def outputs(self) -> int:
        return self.rows // (2 if self.role == "swiglu" else 1)

    def of_rows(self, sequences: int) -> Linear:
        """The same for so many rows."""
        role = self.role if sequences == 1 or self.role == "swiglu" or self.plain else "plain"
        return replace(self, role=role, sequences=sequences)

    def __str__(self) -> str:
        return f"{self.rows}×{self.columns}"


ROWS, BLOCKS, WARPS, PER_SM = (1, 2, 4, 8, 16), (256, 512, 1024, 2048, 4096), (2, 4, 8), (0, 1, 2, 3, 4)
LOAD = 16  # bytes per thread and load
TILE = 64  # bytes of weight per thread at least: fewer leave the memory idle
# Bytes of weight and of the row in float32 per thread at most, for one tile per program and for several: with more, most of them
# spill on sm_90.
REGISTERS, LOOPED_REGISTERS = 768, 512
PADDING = 1.25  # columns loaded per column there is, at most

# For several rows: rows of the weight per tile and warps, columns per step, stages in flight, parts of the columns.
TILES, STEPS, STAGES, PARTS = ((32, 4), (64, 4), (128, 8)), (64, 128, 256), (2, 3, 4, 6), range(1, 9)
SHARED = range(30 * 1024, 150 * 1024 + 1)  # bytes of shared memory per program: less is idle, more does not fit beside another

# For a ring of shared memory: programs per multiprocessor, tiles per program, stages; bytes of shared memory per program at most.
PROGRAMS_PER_SM, RING_TILES, RING_STAGES, RING_BYTES = (1, 2, 3, 4), (1, 2, 3), (2, 3, 4, 6, 8), 220 * 1024

# For one row of a quantised weight on tensor cores: rows of a tile, warps, steps loaded ahead, and the most registers for them.
TENSOR_ROWS, TENSOR_WARPS, AHEAD, HELD = (16, 32), (2, 4, 8, 16), (2, 4, 6, 8, 10, 12, 16, 20), 128


def multiprocessors() -> int:
    """Of the device. They tell apart configs that launch alike."""
    return devices.of(torch.device(DEVICE)).multiprocessors


def on_a_ring() -> bool:
    """Whether there is few_rows_hopper on this machine."""
    return torch.cuda.is_available() and rings(torch.empty(0, dtype=torch.bfloat16, device=DEVICE))


def ring_takes(of: Linear) -> bool:
    """Whether there is a ring for the format."""
    how = quantized.stored(of.format)
    return how is None or (how.kind, how.columns) == ("e4m3", STEP)


def kind_on_tensor_cores(of: Linear) -> str:
    """The kind of data of one row that there is skinny_tensor_cores for, or nothing."""
    how = quantized.stored(of.format)
    if how is None or how.kind == "int8" or not on_a_ring():
        return ""
    exact = how.kind in ("e4m3", "int4") or of.role != "conv"  # a conv's result is float32
    return how.kind if how.columns and exact else ""


def chosen(of: Linear) -> Config:
    """The config that a decode step takes."""
    if of.sequences == 1:
        kind = kind_on_tensor_cores(of)
        taken = tensor_cores_config(of.role, of.columns, kind) if kind else None
        return taken or skinny_linear.config_of(of.role, one_of(of), of.format)
    ring = on_a_ring() and ring_takes(of)
    quantised = bool(of.format)
    parts = 1 if of.role == "swiglu" or of.plain else split(of.rows, of.columns, of.sequences, ring, quantised)
    taken, swiglu = None, of.role == "swiglu"
    if ring and quantised:
        taken = quantized_ring_config(of.outputs - of.plain, of.columns, of.sequences, swiglu, parts)
    elif ring:
        taken = ring_config(of.outputs, of.columns, swiglu, parts, of.sequences)
    device = devices.of(torch.device(DEVICE))
    return taken or quantized.config_of_rows(one_of(of), of.format, of.sequences, of.role == "swiglu", parts, device)


def stored_dtype(of: Linear) -> torch.dtype:
    kinds = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.int32, "nf4": torch.uint8, "fp4": torch.uint8}
    return kinds[quantized.stored(of.format).kind] if of.format else torch.bfloat16


def weights_like(of: Linear, copies: int, device: str) -> torch.Tensor:
    """As many weights, without rows that are not quantised, as they are stored: uninitialised."""
    dtype = stored_dtype(of)
    width = of.columns * of.bits // (8 * dtype.itemsize)
    return torch.empty(copies, of.rows - of.plain, width, dtype=dtype, device=device)


def one_of(of: Linear) -> torch.Tensor:
    return weights_like(of, 1, "meta")[0]


def configs(of: Linear, sweep: bool = True) -> Iterator[Config]:
    """The chosen config, and with `sweep` all others worth measuring."""
    first = chosen(of)
    yield first
    if not sweep:
        return
    others = one_row_configs(of) if of.sequences == 1 else itertools.chain(ring_configs(of), few_rows_configs(of))
    yield from (config for config in others if config != first)


def few_rows_configs(of: Linear) -> Iterator[FewRowsConfig]:
    """Whole steps, two or more of them, as much shared memory as it takes to stream, and a sensible number of programs."""
    sm = multiprocessors()
    width = columns_of(of.sequences)
    most = (quantized.stored(of.format).columns or BLOCK) if of.format else 0  # columns of a step, which share a scale
    for (tile, warps), step, stages, parts in itertools.product(TILES, STEPS, STAGES, PARTS if of.role == "plain" else (1,)):
        if of.columns % (step * parts) or of.columns // parts < 2 * step or of.format and step > most:
            continue
        if (
            (of.itemsize * tile + 2 * width) * step * stages not in SHARED
            or parts > 1
            and -(-of.rows // tile) * parts not in range(sm // 4, 4 * sm + 1)
        ):
            continue
        for early in (False, True)[: of.itemsize]:
            yield FewRowsConfig(tile, step, warps, stages, parts, early)


def ring_configs(of: Linear) -> Iterator[RingConfig]:
    """One or two programs per multiprocessor, with equally many rows each."""
    sm = multiprocessors()
    if not on_a_ring() or not ring_takes(of):
        return
    most, width = 32 if of.role == "swiglu" else 64, columns_of(of.sequences)
    sizes = itertools.product(PROGRAMS_PER_SM, RING_TILES, RING_STAGES, PARTS if of.role == "plain" else (1,))
    itemsize = of.itemsize
    for per_sm, tiles, stages, parts in sizes:
        live = -(-(of.outputs - of.plain) // (per_sm * sm // parts * tiles))
        if of.columns % (STEP * parts) or stages > of.columns // parts // STEP + 1 or not most // 4 <= live <= most:
            continue
        if STEP * stages * (itemsize * 64 * tiles + 2 * width) * per_sm <= RING_BYTES:
            yield RingConfig(tiles, live, stages, parts)


def one_row_configs(of: Linear) -> Iterator[skinny_linear.Config]:
    """Whole loads, no spills, little padding, one tile per program or more."""
    if kind_on_tensor_cores(of):
        yield from tensor_cores_configs(of)
    yield from plain_configs(of)


def plain_configs(of: Linear) -> Iterator[skinny_linear.Config]:
    """The same without tensor cores."""
    sm = multiprocessors()
    groups = ((),) if not of.format else ((8,), (16,), (32,)) if of.bits == 4 else ((8,), (16,))
    for rows, block, warps, per_sm, group in itertools.product(ROWS, BLOCKS, WARPS, PER_SM, groups):
        padded, threads = -(-of.columns // block) * block, 32 * warps
        tile = of.itemsize * rows * padded * (2 if of.role == "swiglu" else 1) / threads
        held = max(4 * padded / threads, LOAD // of.itemsize * 4 * padded / block)  # of the row
        most = LOOPED_REGISTERS if per_sm else REGISTERS
        if padded > PADDING * of.columns or of.role == "gate" and (of.columns % block or block % HEAD):
            continue
        if of.itemsize * rows * block < LOAD * threads or tile < TILE // 2 * of.itemsize or tile + held > most:
            continue
        if per_sm * sm < -(-of.outputs // rows):
            yield (rows, block, warps, per_sm, *group)


def tensor_cores_configs(of: Linear) -> Iterator[TensorCoresConfig]:
    """As many steps ahead as registers hold, where there are so many, and no more columns than fill a step."""
    width = 64 * (2 if of.bits == 4 else 1)
    for rows, warps, ahead in itertools.product(TENSOR_ROWS, TENSOR_WARPS, AHEAD):
        steps = -(-of.columns // (width * warps))
        held = 8 * rows // 16 * min(ahead, steps)  # registers
        if steps * width * warps <= PADDING * of.columns and held <= HELD and held * 32 * warps < 65536:
            if ahead <= steps or ahead == min((a for a in AHEAD if a >= steps), default=0):  # the first that loads all ahead
                yield TensorCoresConfig(warps, ahead, rows)


def near(key: Key, default: tuple[Any, ...], most: int) -> list[tuple[Any, ...]]:
    """Other configs of the same kernel, which need not fit it, nearest first.

    Args:
        key: what the config is for.
        default: the config of our tables. The others have as many parts, because their number belongs to the graph.
        most: how many.
    """
    found: Iterator[tuple[Any, ...]] = iter(RULES.get(key.kernel, ()))
    if key.kernel not in RULES:
        rows, _, columns, _ = key.sizes
        format = key.of if key.of in quantized.STORED else ""
        of = Linear(key.kind, "", rows * (2 if key.kind == "swiglu" else 1), columns, sequences=key.rows, format=format)
        if isinstance(default, TensorCoresConfig):
            found = tensor_cores_configs(of)
        elif key.rows == 1:
            found = plain_configs(of)
        else:
            found = ring_configs(of) if isinstance(default, RingConfig) else few_rows_configs(of)
    parts = getattr(default, "parts", 1)
    others = {config for config in found if config != default and getattr(config, "parts", 1) == parts}

    def distance(config: tuple[Any, ...]) -> float:
        return sum(abs(math.log2((n + 1) / (m + 1))) for n, m in zip(config, default, strict=True))

    return sorted(sorted(others), key=distance)[:most]
