"""Which kernels share out their work by the number of sequences, and may then round otherwise: what the README says of it."""

import itertools

import kernel_cases
import pytest
import torch
from kernel_cases import BF16

from gdnfuse.kernels import implementations
from gdnfuse.kernels.linear_configs import split

# Of Qwen3.5-4B: 16 key and 32 value heads of 128.
H, HV, K, V, D = 16, 32, 128, 128, 8192
ANY = [(1, 2, 5, 33, 300)]
# Of four queries a key head, 75 blocks of keys: as many programs as there may be in all.
SPLIT = [(1, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, 300)]
# For each op a call for B sequences, and the numbers of them that have one kernel and one way to share out its work.
OPS = {
    "causal_conv_update": (lambda B: kernel_cases.conv(B, D, 4, 4, BF16), ANY),
    "gated_rms_norm": (lambda B: kernel_cases.norm((B, 1, HV, V), torch.float32, BF16), ANY),
    "attention_decode": (lambda B: kernel_cases.attention(B, 16, 4, 256, 300, BF16), SPLIT),
    "attention_decode on a long cache": (
        lambda B: kernel_cases.attention(B, 16, 4, 256, 4096, BF16),
        [(1,), (2,), *SPLIT[1:-1], (129, 256)],
    ),
    "attention_growing": (lambda B: kernel_cases.growing(B, 16, 4, 256, 300, BF16), SPLIT),
    "attention_few_queries": (lambda B: kernel_cases.few_queries(B, 16, 4, 256, 300, BF16), SPLIT),
    "add_rms_norm": (lambda B: kernel_cases.added(2560, dtype=BF16, lead=(B, 1)), [(1, 2, 33, 132), (133, 300)]),
    "causal_conv": (lambda B: kernel_cases.prompt_conv(B, D, 70, 4, BF16), ANY),
    "packed_decode": (lambda B: kernel_cases.packed(B, H, HV, K, V, BF16), [(1, 2), (3, 16), (17, 33)]),
    "mixer_decode": (lambda B: kernel_cases.mixer(B, H, HV, K, V, dtype=BF16), [(1, 2, 16), (17, 32), (33, 64)]),
    "chunk_delta_rule": (lambda B: kernel_cases.chunked(B, 70, H, HV, K, V, BF16), [(1, 2), (3, 33)]),
    "fused_linear": (lambda B: kernel_cases.linear(64, 2560, BF16, (B, 1)), [(1,), (2, 8), (9, 16), (17, 32)]),
}


def shares(op, make):
    """Every static argument and number of warps of the kernels that a call launches."""
    with torch.device("meta"):  # shapes tell: the largest of these calls has gigabytes of keys
        args, kwargs = make()
    specs = implementations()[op.split()[0]].jit_kernels(*args, **kwargs)
    static = [[name for name, kind in spec.signature.items() if kind == "constexpr"] for spec in specs]
    return [
        (spec.kernel.__name__, spec.options["num_warps"], {name: spec.constexprs[name] for name in names if name.isupper()})
        for spec, names in zip(specs, static, strict=True)
    ]


@pytest.mark.parametrize("op", OPS)
def test_how_work_is_shared_out_by_the_number_of_sequences(op):
    make, groups = OPS[op]
    found = [[shares(op, make(batch)) for batch in group] for group in groups]
    for group in found:
        assert all(share == group[0] for share in group)
    assert all(a[0] != b[0] for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("op", ["attention_growing", "attention_few_queries"])
def test_keys_of_any_length_have_one_machine_code(op, B, mask):
    """Not one more argument is specialised, by its value or as a multiple of 16, than for the first length."""

    def specs(L):
        with torch.device("meta"):
            args, _ = getattr(kernel_cases, op.removeprefix("attention_"))(B, 16, 4, 256, L, BF16, mask=mask)()
        return implementations()[op].jit_kernels(*args)

    first = specs(1)
    assert len(first) == 2
    for L in (2, 15, 16, 17, 32, 100, 1000, 2048, 2049, 5003):
        assert specs(L) == first


def test_a_linear_has_its_parts_by_its_shape_and_by_whether_there_are_more_than_8_rows():
    for M, N in ((2560, 4096), (2560, 9216), (1024, 3584), (18432, 2560)):
        few, more = ({split(M, N, rows) for rows in group} for group in (range(2, 9), range(9, 33)))
        assert len(few) == len(more) == 1 and split(M, N, 1) == split(M, N, 33) == 1
