"""torch's scaled product is given what cuBLAS reads, and is left where it fails. A stand-in checks the layouts without a GPU."""

import logging

import pytest
import torch
import torch.nn.functional as F

from gdnfuse.dialect import fp8_linear as dialect
from gdnfuse.errors import Refused
from gdnfuse.kernels import devices, fp8_linear

BF16 = torch.bfloat16


def scaled_mm(a, b, scale_a, kind_a, scale_b, kind_b, output_dtype):
    """What torch documents, in float32, for the layouts that cuBLAS reads."""
    (T, N), M = a.shape, b.shape[1]
    kinds = F.ScalingType
    assert a.is_contiguous() and b.T.is_contiguous() and a.dtype == b.dtype == torch.float8_e4m3fn
    assert scale_a.dtype == scale_b.dtype == torch.float32
    if kind_a is kinds.RowWise and kind_b is kinds.RowWise:
        assert scale_a.shape == (T, 1) and scale_b.shape == (1, M) and scale_b.stride(1) == 1
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(output_dtype)
    assert (kind_a, kind_b) == (kinds.BlockWise1x128, kinds.BlockWise128x128)
    groups, padded = N // 128, -(-N // 512) * 4
    assert scale_a.shape == (T, groups) and scale_a.stride() == (1, T) and T % 16 == 0
    assert scale_b.shape == (padded, -(-M // 128)) and scale_b.stride() == (1, padded)
    wide_a = a.float() * scale_a.repeat_interleave(128, 1)
    wide_b = b.float() * scale_b[:groups].repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :M]
    return (wide_a @ wide_b).to(output_dtype)


@pytest.mark.parametrize("rows", [(40,), (1, 33), (3, 1), (2, 3, 5)])
@pytest.mark.parametrize(
    ("format", "M", "N"),
    [("fp8_block128", 256, 512), ("fp8_block128", 144, 384), ("fp8_channel", 48, 128), ("fp8_tensor", 48, 128)],
)
def test_torchs_scaled_product_gets_its_layouts(rows, format, M, N, monkeypatch):
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    (*args, _), _ = dialect.example_call(M, N, format, BF16, rows)
    if format != "fp8_tensor":
        args[3] = args[3].bfloat16()
    found, wanted = fp8_linear.by_torch(*args, BF16), dialect.reference(*args, BF16)
    assert found.shape == wanted.shape and found.stride() == wanted.stride()
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-7)


def test_where_torchs_scaled_product_fails_the_kernel_computes_and_says_so_once(monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand more")

    (*args, _), _ = dialect.example_call(32, 128)
    failed = set()
    monkeypatch.setattr(fp8_linear, "_failed", failed)
    monkeypatch.setattr(fp8_linear, "by_library", lambda x, *_: x.device not in failed)
    monkeypatch.setattr(fp8_linear, "by_torch", broken)
    monkeypatch.setattr(fp8_linear, "by_kernel", lambda *args: dialect.reference(*args))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(fp8_linear.launch(*args, BF16), dialect.reference(*args, BF16))
    (message,) = [r.getMessage() for r in caplog.records]
    assert "torch's scaled product failed" in message and "CUBLAS_STATUS_NOT_SUPPORTED" in message


def on_meta(format="fp8_block128", M=128, N=256, T=40):
    (*args, dtype), _ = dialect.example_call(M, N, format, lead=(T,))
    return [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args] + [dtype]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({4: "int8_channel"}, "The weight must be fp8_block128, fp8_channel, fp8_tensor, found int8_channel."),
        ({5: torch.float64}, "out must be float32, bfloat16 or float16, found float64."),
        ({1: torch.empty(1, 40, device="meta")}, "x must have 2 groups of columns for fp8_block128, found 1."),
    ],
)
def test_what_the_kernel_does_not_take_is_a_sentence(changed, reason):
    args = on_meta()
    fp8_linear.supports(*args)
    for place, value in changed.items():
        args[place] = value
    with pytest.raises(Refused) as e:
        fp8_linear.supports(*args)
    assert e.value.reason == reason


def test_columns_must_be_whole_steps():
    args = on_meta("fp8_channel", N=200)
    with pytest.raises(Refused, match=r"^N must be a multiple of 128, found 200\.$"):
        fp8_linear.supports(*args)


def test_without_a_gpu_nothing_is_torchs():
    args = on_meta()
    assert not fp8_linear.by_library(args[0], args[2], BF16)
    assert [fp8_linear._stages(devices.H200._replace(shared_memory=1024 * n)) for n in (227, 99, 64)] == [4, 3, 2]
