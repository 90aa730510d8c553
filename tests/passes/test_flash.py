"""Attention of a prompt on a GPU takes FlashAttention-2 where that is as good; elsewhere what torch chooses, with a sentence."""

import pytest
import torch
import torch.nn.functional as F
from torch._functorch._aot_autograd.autograd_cache import check_node_safe

from gdnfuse.dialect import OPS
from gdnfuse.passes import flash
from gdnfuse.rewrite.graph import op_name, value
from tests.rewrite.captured import Captured

BF16 = torch.bfloat16


def qkv(T=5, L=5, heads=4, keys=4, D=256, dtype=BF16, B=2):
    return torch.randn(B, heads, T, D).to(dtype), torch.randn(B, keys, L, D).to(dtype), torch.randn(B, keys, L, D).to(dtype)


def chosen(function, *args, target="cuda"):
    """The graph behind the choice, and its records."""
    g = Captured(lambda *args: (function(*args),), *args).normalize()
    return g, flash.choose(g.gm, target)


def flashes(g):
    """The one call of it; what read the attention reads its first result, in the same layout."""
    (call,) = [n for n in g.gm.graph.nodes if n.target is flash.FLASH]
    (result,) = call.users
    assert op_name(result) == "getitem" and result.args == (call, 0)
    found, wanted = value(call)[0], value(result)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype and found.device == wanted.device
    check_node_safe(call)  # raises where AOTAutograd could not keep the graph on disk
    return call


@pytest.mark.parametrize(
    "sizes, options",
    [
        ({}, {"is_causal": True}),
        ({}, {"is_causal": True, "scale": 0.3, "dropout_p": 0.0}),
        ({"L": 9}, {}),
        ({"keys": 2, "dtype": torch.float16}, {"is_causal": True, "enable_gqa": True}),
        ({"D": 136}, {"attn_mask": None}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_chosen(sizes, options, dynamic):
    def function(q, k, v):
        if options.get("is_causal"):
            assert q.shape[2] == k.shape[2]
        assert k.shape[2] == v.shape[2]
        return F.scaled_dot_product_attention(q, k, v, **options) * 1.0

    args = qkv(**sizes)
    for t in args if dynamic else ():
        torch._dynamo.mark_dynamic(t, 2)
    g, (record,) = chosen(function, *args)
    assert (record.chosen, record.reason) == ("flash attention", "")
    call = flashes(g)
    assert [n.op for n in call.args[:3]] == ["placeholder"] * 3
    assert call.args[3:] == (0.0, options.get("is_causal", False), False) and call.kwargs == {"scale": options.get("scale")}


@pytest.mark.parametrize("keys", [4, 2])
def test_the_last_tokens_of_a_sequence(keys):
    function = lambda q, k, v: torch.ops.gdnfuse.causal_attention.default(q, k, v, 0.3) * 1.0  # noqa: E731
    g, (record,) = chosen(function, *qkv(L=9, keys=keys))
    assert record.chosen == "flash attention"
    call = flashes(g)
    assert call.args[3:] == (0.0, True, False) and call.kwargs == {"scale": 0.3}
    g, (record,) = chosen(function, *qkv(L=9, keys=keys, D=64))
    assert record.chosen == "library" and "gdnfuse.causal_attention" in g.ops()


REFUSED = {
    "a mask": (qkv(), {"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, "takes no mask, found one."),
    "dropout": (qkv(), {"dropout_p": 0.1}, "must have no dropout, found 0.1."),
    "float32": (qkv(dtype=torch.float32), {}, "found 4 axes of float32, 4 axes of float32, 4 axes of float32."),
    "three axes": ([t[0] for t in qkv()], {}, "found 3 axes of bfloat16, 3 axes of bfloat16, 3 axes of bfloat16."),
    "narrow heads": (qkv(D=128), {}, "above 128 and at most 256, found 128, 128, 128."),
    "wide heads": (qkv(D=264), {}, "above 128 and at most 256, found 264, 264, 264."),
    "odd heads": (qkv(D=132), {}, "must be a multiple of 8 wide, above 128 and at most 256, found 132, 132, 132."),
    "one sequence's keys": (
        [qkv()[0], *qkv(B=1)[1:]],
        {},
        "of the same sequences and heads, found [2, 4, 5, 256], [1, 4, 5, 256]",
    ),
    "more keys": (qkv(L=7), {"is_causal": True}, "must have as many queries as keys, found 5 and 7."),
    "columns first": (
        [t.transpose(2, 3) for t in qkv(T=256, L=256, D=256)],
        {},
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
    g = Captured(lambda *args: (F.scaled_dot_product_attention(*args),), *qkv()).normalize()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    (record,) = flash.choose(g.gm, "cuda")
    assert record.chosen == ("flash attention" if taken else "library")
    assert taken or record.reason.startswith("Which attention is faster was measured on compute capability 9.0 alone")


@pytest.mark.parametrize("built, on", [(True, True), (False, True), (True, False)])
def test_only_where_torch_has_it_and_may_take_it(monkeypatch, built, on):
    g = Captured(lambda *args: (F.scaled_dot_product_attention(*args),), *qkv()).normalize()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: on)
    (record,) = flash.choose(g.gm, "cuda")
    assert record.chosen == ("flash attention" if built and on else "library")
    assert record.chosen == "flash attention" or "must be part of torch and enabled" in record.reason


def test_nothing_on_a_cpu():
    g, records = chosen(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *qkv(), target=None)
    assert records == [] and op_name(list(g.gm.graph.nodes)[3]) == "scaled_dot_product_attention"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("T, L, causal", [(130, 130, True), (64, 64, True), (1, 77, False), (33, 130, False), (70, 300, True)])
def test_on_a_gpu(T, L, causal):
    q, k, v = (t.cuda() for t in qkv(T, L, heads=16, keys=4))
    meant = OPS["causal_attention"].reference
    if not causal:
        meant = lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=scale)  # noqa: E731
    exact, theirs = meant(q.double(), k.double(), v.double(), 0.05), meant(q, k, v, 0.05)
    error = lambda y: float((y.double() - exact).norm() / exact.norm())  # noqa: E731
    assert error(flash.FLASH(q, k, v, 0.0, causal, False, scale=0.05)[0]) <= 1.1 * error(theirs) + 1e-4
