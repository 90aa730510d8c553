"""What kernels make of four bits: the PTX that chooses entries of a table, run word by word, and how near the tables are."""

import re

import pytest
import torch

from gdnfuse.formats.four_bit import TABLES
from gdnfuse.kernels import four_bit

HALF = [torch.bfloat16, torch.float16]


def run(ptx, results, *given):
    """The results of straight-line PTX. The operands behind them are given; a sequence is what lanes have."""
    registers = {f"${results + i}": value for i, value in enumerate(given)}

    def read(name):
        return registers[name] if name in registers else int(name, 0)

    def prmt(a, b, selector):
        both = b << 32 | a
        return sum((both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i for i in range(4) if not selector >> 4 * i & 8)

    ops = {
        "mov.b32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "shr.u32": lambda a, b: a >> b,
        "lop3.b32": lambda a, b, c, table: {0xEA: a & b | c}[table],
        "prmt.b32": prmt,
        "shfl.sync.idx.b32": lambda of, lane, how, mask: {(0x101F, 0xFFFFFFFF): of}[how, mask][lane % 16],
    }
    for op, operands in re.findall(r"^(\w[\w.]+) ([^;]+);$", ptx, re.M):
        to, *of = operands.split(", ")
        registers[to] = ops[op](*map(read, of))
    return [registers[f"${i}"] for i in range(results)]


WORDS = [0x76543210, 0xFEDCBA98, 0x0F1E2D3C, 0x80018FF8]


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("word", WORDS)
def test_ptx_chooses_the_entries_of_eight_codes(word, kind):
    codes = [word >> 4 * i & 15 for i in range(8)]
    assert run(four_bit.fetch(), 8, word, TABLES[kind]) == [TABLES[kind][code] for code in codes]
    for dtype in HALF:
        entries = four_bit.entries(kind, dtype).view(torch.int16).tolist()
        pairs = run(four_bit.choose(kind, dtype), 4, word)
        found = [n >> 16 * i & 0xFFFF for n in pairs for i in range(2)]
        assert found == [entries[code] & 0xFFFF for code in codes[1::2] + codes[::2]]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_half_precision_are_nearer_than_weights_that_are_rounded(kind, dtype):
    """Weights in float64 as they are stored, against entries that were rounded and against weights that were."""
    table, factor = torch.tensor(TABLES[kind], dtype=torch.float64), four_bit.FACTORS[kind, dtype]
    scale = torch.rand(1000, 1, dtype=torch.float64) + 0.5
    wanted, found = table * scale, four_bit.entries(kind, dtype).double() / factor * scale
    theirs = (wanted.to(dtype).double() - wanted).norm()
    assert (found - wanted).norm() < (0.6 if kind == "nf4" else 1e-3) * theirs
