"""How a few rows times a weight is shared out, by static facts alone; no triton, so that the lowering may ask before it launches.

Chosen on an H200 for bfloat16. benchmarks/gemm.py sweeps them; where whole decode steps said otherwise, it was they that decided.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from gdnfuse.report import Refused

MAX_ROWS = 32
MULTIPROCESSORS = 132  # of an H200
FILLED = 100  # tiles of rows from which on splitting the columns too is not worth the sum
MOST = 330  # programs beyond which more parts are not worth the sum
PARTS = (8, 7, 6, 5, 4, 3, 2)


class FewRowsConfig(NamedTuple):
    """Rows of the weight per tile, columns per step, warps, stages in flight, parts of the columns, first step loaded early."""

    BM: int
    BK: int
    num_warps: int
    stages: int
    parts: int
    early: bool


def few_rows_config(
    N: int, rows: int, swiglu: bool = False, parts: int = 1, dtype: torch.dtype = torch.bfloat16
) -> FewRowsConfig:
    """The config for `rows` rows times a weight of N columns.

    Args:
        swiglu: whether the weight is of gate and up.
        parts: of split_linear.

    Raises:
        Refused: N, or a part of it, does not fill the steps over columns.
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
        config = config._replace(BM=32)  # more would spill
    while block > 32 and N % (block * parts):
        block //= 2
    if N % (block * parts):
        raise Refused(f"The columns of a weight for several rows must be a multiple of {block * parts}, got {N}.")
    return config._replace(BK=block)


def split(M: int, N: int, rows: int) -> int:
    """Into how many parts the columns of a weight [M, N] go, so that there are programs enough to stream it.

    That number of them which leaves multiprocessors idle least while the last ones run; of equals the largest.
    """
    tiles, step = -(-M // 64), 256 if rows <= 8 else 128
    if not 1 < rows <= MAX_ROWS or tiles >= FILLED:
        return 1
    valid = [n for n in PARTS if N % (step * n) == 0 and N >= 2 * step * n and tiles * n <= MOST]
    idle = {n: round(-(-tiles * n // MULTIPROCESSORS) * MULTIPROCESSORS / (tiles * n), 2) for n in valid}
    return min(valid, key=lambda n: (idle[n], -n), default=1)
