"""Attention of a prompt on a GPU is torch's own, by FlashAttention-2 or cuDNN; elsewhere what torch chooses, with a sentence."""

import pytest
import torch
import torch.nn.functional as F

from gdnfuse.dialect import OPS
from gdnfuse.errors import Refused
from gdnfuse.kernels import causal_attention, implementations, tuned
from gdnfuse.kernels.causal_attention import EIGHTHS, LONG, planned
from gdnfuse.passes import lower
from gdnfuse.rewrite.graph import same, value
from tests.rewrite.captured import Captured

BF16 = torch.bfloat16
meant = OPS["causal_attention"].reference


def qkv(T=5, L=5, heads=4, keys=4, D=256, dtype=BF16, B=2):
    """q in memory as a projection leaves it, k and v as a cache does."""
    q = torch.randn(B, T, heads, D).to(dtype).transpose(1, 2)
    return q, torch.randn(B, keys, L, D).to(dtype), torch.randn(B, keys, L, D).to(dtype)


def chosen(function, *args, target="cuda"):
    """The graph behind the choice, and its records."""
    g = Captured(lambda *args: (function(*args),), *args).normalize()
    return g, lower.lower(g.gm, target, ahead=False)


@pytest.mark.parametrize(
    "sizes, options",
    [
        ({}, {"is_causal": True}),
        ({}, {"is_causal": True, "scale": 0.3, "dropout_p": 0.0}),
        ({"keys": 2, "dtype": torch.float16}, {"is_causal": True, "enable_gqa": True}),
        ({"D": 136}, {"attn_mask": None, "is_causal": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_torchs_causal_attention(sizes, options, dynamic):
    def function(q, k, v):
        assert q.shape[2] == k.shape[2] == v.shape[2]
        return F.scaled_dot_product_attention(q, k, v, **options) * 1.0

    args = qkv(**sizes)
    for t in args if dynamic else ():
        torch._dynamo.mark_dynamic(t, 2)
    g, (record,) = chosen(function, *args)
    assert (record.chosen, record.reason) == ("flash attention or cuDNN", "")
    (call,) = [n for n in g.gm.graph.nodes if n.target is implementations()["causal_attention"].op]
    assert [call.kwargs[name].op for name in "qkv"] == ["placeholder"] * 3
    assert call.args == () and call.kwargs["scale"] == options.get("scale")


@pytest.mark.parametrize("keys", [4, 2])
@pytest.mark.parametrize("D, how, reason", [(256, "flash attention or cuDNN", ""), (64, "reference inlined", "found 64, 64, 64")])
def test_the_last_tokens_of_a_sequence(keys, D, how, reason):
    torch._dynamo.reset()
    function = lambda q, k, v: torch.ops.gdnfuse.causal_attention.default(q, k, v, 0.3) * 1.0  # noqa: E731
    g, (record,) = chosen(function, *qkv(L=9, keys=keys, D=D))
    assert record.chosen == how and reason in record.reason, record.reason
    assert ("gdnfuse_triton.causal_attention" in g.ops()) == (D == 256)


def test_keys_and_values_may_have_a_symbol_each_for_their_length():
    """As a cache's have, whose last lengths differed from what was traced first."""

    def function(q, k, v, past, other):
        return torch.ops.gdnfuse.causal_attention.default(q, torch.cat([past, k], 2), torch.cat([other, v], 2)) * 1.0

    q, k, v = qkv()
    pasts = torch.randn(2, 4, 9, 256).to(BF16), torch.randn(2, 4, 9, 256).to(BF16)
    for t in pasts:
        torch._dynamo.mark_dynamic(t, 2)
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        g, (record,) = chosen(function, q, k, v, *pasts)
    found = next(n for n in g.gm.graph.nodes if n.target is implementations()["causal_attention"].op).kwargs
    k, v = (value(found[name]).shape[2] for name in "kv")
    assert record.chosen == "flash attention or cuDNN" and not same(k, v)
    unequal = qkv(L=9)
    with pytest.raises(Refused, match="of the same sequences and heads"):
        causal_attention.supports(*unequal[:2], unequal[2][:, :, 1:])


CAUSAL = {"is_causal": True}
REFUSED = {
    "a mask": (qkv(), {"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, "found a mask, that it is not causal."),
    "dropout": (qkv(), {**CAUSAL, "dropout_p": 0.1}, "without a mask and dropout, found dropout."),
    "all keys": (
        qkv(),
        {},
        "Attention must be causal, of as many queries as keys, without a mask and dropout, found that it is not",
    ),
    "more keys": (qkv(L=7), CAUSAL, "found 5 queries and 7 keys."),
    "float32": (qkv(dtype=torch.float32), CAUSAL, "found 4 axes of float32, 4 axes of float32, 4 axes of float32."),
    "three axes": ([t[0] for t in qkv()], CAUSAL, "found 3 axes of bfloat16, 3 axes of bfloat16, 3 axes of bfloat16."),
    "narrow heads": (qkv(D=128), CAUSAL, "above 128 and at most 256, found 128, 128, 128."),
    "wide heads": (qkv(D=264), CAUSAL, "above 128 and at most 256, found 264, 264, 264."),
    "odd heads": (qkv(D=132), CAUSAL, "must be a multiple of 8 wide, above 128 and at most 256, found 132, 132, 132."),
    "one sequence's keys": (
        [qkv()[0], *qkv(B=1)[1:]],
        CAUSAL,
        "of the same sequences and heads, found [2, 4, 5, 256], [1, 4, 5, 256]",
    ),
    "columns first": (
        [torch.randn(2, 4, 256, 256).to(BF16).transpose(2, 3) for _ in "qkv"],
        CAUSAL,
        "Rows must be contiguous, found the strides 256",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_left(name):
    args, options, reason = REFUSED[name]
    g, (record,) = chosen(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), *args)
    assert record.chosen == "library" and reason in record.reason, record.reason
    assert "scaled_dot_product_attention" in g.ops()


@pytest.mark.parametrize(
    "capability, hip, taken", [((9, 0), None, True), ((8, 0), None, False), ((10, 0), None, False), ((9, 4), "7.0", False)]
)
def test_only_where_it_was_measured(monkeypatch, capability, hip, taken):
    g = Captured(lambda *args: (F.scaled_dot_product_attention(*args, is_causal=True),), *qkv()).normalize()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuned, "standing", lambda by, *_: by)  # which asks the card for its name
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    (record,) = lower.lower(g.gm, "cuda", ahead=False)
    assert record.chosen == ("flash attention or cuDNN" if taken else "library")
    assert taken or record.reason.startswith("Which attention is faster was measured only on compute capability 9.0")


@pytest.mark.parametrize("built, on", [(True, True), (False, True), (True, False)])
def test_only_where_torch_has_it_and_may_take_it(monkeypatch, built, on):
    g = Captured(lambda *args: (F.scaled_dot_product_attention(*args, is_causal=True),), *qkv()).normalize()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuned, "standing", lambda by, *_: by)  # which asks the card for its name
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: on)
    (record,) = lower.lower(g.gm, "cuda", ahead=False)
    assert record.chosen == ("flash attention or cuDNN" if built and on else "library")
    assert built and on or "must be part of torch and enabled" in record.reason


def test_nothing_on_a_cpu():
    g, records = chosen(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *qkv(), target=None)
    assert records == [] and "scaled_dot_product_attention" in g.ops()


def test_lengths_that_are_planned_for():
    lengths = range(1, 4 * LONG)
    assert all(T <= planned(T) <= T + T // EIGHTHS + 1 for T in lengths)
    assert all(planned(planned(T)) == planned(T) for T in lengths)
    assert len({planned(T) for T in range(LONG + 1, 2 * LONG + 1)}) == EIGHTHS
    assert [planned(T) for T in (LONG, LONG + 1, 2 * LONG)] == [LONG, LONG + LONG // EIGHTHS, 2 * LONG]


@pytest.fixture
def stood_in(monkeypatch):
    """What has no CPU version, by torch's attention; answers which was called, of how many queries and keys."""
    called = []

    def like(name):
        def attention(q, k, v, *options, scale):
            called.append((name, q.shape[2], k.shape[2]))
            assert options in ((0.0, True, False), (None, False, 0.0, True, False))
            return meant(q, k, v, scale).contiguous(), None

        return attention

    monkeypatch.setattr(causal_attention, "FLASH", like("flash"))
    monkeypatch.setattr(causal_attention, "CUDNN", like("cuDNN"))
    monkeypatch.setattr(causal_attention, "LONG", 32)
    monkeypatch.setattr(causal_attention, "_cudnn_takes", lambda q, k, v: q.shape[-1] == 8)
    return called


@pytest.mark.parametrize("keys", [4, 2])
@pytest.mark.parametrize(
    "T, L, D, wanted",
    [
        (31, 31, 8, ("flash", 31, 31)),
        (32, 32, 8, ("cuDNN", 32, 32)),
        (33, 33, 8, ("cuDNN", 36, 36)),
        (63, 63, 8, ("cuDNN", 64, 64)),
        (100, 100, 8, ("cuDNN", 104, 104)),
        (33, 40, 8, ("flash", 33, 40)),
        (40, 40, 16, ("flash", 40, 40)),
    ],
)
def test_zeros_behind_a_long_prompt_change_nothing(stood_in, T, L, D, wanted, keys):
    args = *qkv(T, L, keys=keys, D=D, dtype=torch.float64), 0.3
    got = causal_attention.launch(*args)
    assert stood_in == [wanted]
    torch.testing.assert_close(got, meant(*args), rtol=1e-12, atol=1e-12)
    assert got.stride() == causal_attention.causal_attention.fake(*args).stride()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("B, T, L", [(2, 130, 130), (1, 64, 64), (2, 33, 130), (1, 1, 77), (1, 4096, 4096), (2, 4097, 4097)])
def test_on_a_gpu(B, T, L):
    q, k, v = (t.cuda() for t in qkv(T, L, heads=16, keys=4, B=B))
    if T >= LONG and torch.cuda.get_device_capability()[0] == causal_attention.HOPPER:
        assert causal_attention._cudnn_takes(q, k, v)
    # The exact scores of a long prompt are computed head by head.
    exact = torch.cat(
        [meant(q[:, i : i + 1].double(), *(x[:, i // 4][:, None].double() for x in (k, v)), 0.05) for i in range(16)], 1
    )
    error = lambda y: float((y.double() - exact).norm() / exact.norm())  # noqa: E731
    got = implementations()["causal_attention"].op(q, k, v, 0.05)
    assert error(got) <= 1.1 * error(meant(q, k, v, 0.05)) + 1e-4
    assert got.stride() == causal_attention.causal_attention.fake(q, k, v).stride()
