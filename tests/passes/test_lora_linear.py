"""Active low-rank adapters around linears of few rows, on code written by hand: what fires, what is declined, what is packed."""

import pytest
import torch
import torch.nn.functional as F

from gdnfuse.passes import lower
from gdnfuse.passes.fuse import add_rms_norm, norm_linear, residual_linear, swiglu_linear
from gdnfuse.passes.lift import gating, lora_linear, packed_linear, rms_norm
from gdnfuse.report.records import Status
from gdnfuse.rewrite.graph import op_name
from tests.passes.test_fuse_linears import N, call_in, of, qwen, records, right
from tests.rewrite.captured import Captured

BF16 = torch.bfloat16


def adapted(x, w, *pairs, scaling=0.5, back=True):
    """A projection under adapters, as peft computes it."""
    y = F.linear(x, w)
    for i, (A, B) in enumerate(pairs):
        x = x.to(A.dtype)
        y = y + F.linear(F.linear(x, A), B) * (scaling + i)
    return y.to(w.dtype) if back else y


def pair(rank, rows, columns=N, dtype=torch.float32):
    return of(rank, columns, dtype=dtype), of(rows, rank, dtype=dtype)


def lifted(f, *args, fusions=()):
    graph = Captured(f, *args).normalize()
    graph.apply(*(module.RULE for module in (rms_norm, packed_linear, lora_linear))).normalize()
    return right(graph.apply(*(module.RULE for module in fusions)).normalize())


def fires(f, *args, fusions=()):
    """The rule fires at its one anchor, and the values stay."""
    graph = lifted(f, *args, fusions=fusions)
    (record,) = records(graph, lora_linear)
    assert record.status is Status.FIRED and record.proof_error < 1e-9, record
    return graph


def declines(f, *args):
    (record,) = records(lifted(f, *args), lora_linear)
    assert record.status is not Status.FIRED
    return record.reason


@pytest.mark.parametrize("low", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize(("ranks", "lead"), [((2,), (1, 1)), ((3, 3), (5, 1)), ((2, 4), (1, 1)), ((2, 4, 4), (4, 8))])
def test_siblings(ranks, low, lead):
    """Two of three have adapters, in the base's dtype or in float32 on bfloat16; all are one linear."""
    adapters = [[pair(r, rows, dtype=low) for r in ranks] for rows in (6, 4)]

    def f(x, w, v, u, *flat):
        first, second = flat[: 2 * len(ranks)], flat[2 * len(ranks) :]
        of_w, of_u = (list(zip(p[::2], p[1::2], strict=True)) for p in (first, second))
        return adapted(x, w, *of_w), F.linear(x, v).exp(), adapted(x, u, *of_u, scaling=2.0)

    weights = [of(rows, N, dtype=BF16) for rows in (6, 5, 4)]
    graph = fires(f, of(*lead, N, dtype=BF16), *weights, *(t for several in adapters for p in several for t in p))
    found = call_in(graph)
    assert len(found["weights"]) == 3 and len(found["lora_A"]) == len(found["lora_B"]) == 2 * len(ranks)
    assert found["lora_scaling"] == [s for i in range(len(ranks)) for s in (0.5 + i, 2.0 + i)]


def test_between_a_norm_and_what_is_behind_it():
    """Norm and SwiGLU, and a residual, are fused as without adapters."""

    def f(x, norm, w, v, u, *flat):
        y = qwen(x, norm)
        y = F.silu(adapted(y, w, flat[:2])) * adapted(y, v, flat[2:4])
        return x + adapted(y, u, flat[4:])

    args = (of(N), of(6, N), of(6, N), of(N, 6), *pair(2, 6), *pair(2, 6), *pair(3, N, 6))
    graph = lifted(f, of(1, 1, N), *args, fusions=(norm_linear, swiglu_linear, residual_linear))
    assert [op for op in graph.ops() if op not in ("reshape", "to")] == ["gdnfuse.fused_linear"] * 2
    assert all(r.status is Status.FIRED for r in graph.outcome.records)


def test_between_the_norms_of_several_rows():
    """SwiGLU, and the norm of a residual's sum, are fused as without adapters."""

    def f(x, norm, w, v, u, *flat):
        y = F.silu(adapted(x, w, flat[:2])) * adapted(x, v, flat[2:4])
        y = x + adapted(y, u, flat[4:])
        return y, qwen(y, norm)

    args = (of(N), of(6, N), of(6, N), of(N, 6), *pair(2, 6), *pair(2, 6), *pair(3, N, 6))
    graph = lifted(f, of(3, 1, N), *args, fusions=(norm_linear, swiglu_linear, residual_linear, add_rms_norm))
    ops = [op for op in graph.ops() if op not in ("reshape", "to", "getitem")]
    assert ops == ["gdnfuse.fused_linear", "gdnfuse.fused_linear", "gdnfuse.add_rms_norm"]
    assert all(r.status is Status.FIRED for r in graph.outcome.records)


def test_wider_adapters_on_what_a_gate_is_of():
    """The sum is rounded before the gate reads it in float32, as of peft's adapters on in_proj_a, and fused as elsewhere."""

    def f(x, w, A, B, A_log, dt_bias):
        return -A_log.exp() * F.softplus(adapted(x, w, (A, B)).float() + dt_bias)

    graph = Captured(f, of(1, 1, N, dtype=BF16), of(6, N, dtype=BF16), *pair(2, 6), of(6), of(6)).normalize()
    right(graph.apply(*(module.RULE for module in (gating, packed_linear, lora_linear))).normalize())
    assert [r.status for r in graph.outcome.records] == [Status.FIRED] * 2
    assert [op for op in graph.ops() if op not in ("reshape", "to")] == ["gdnfuse.fused_linear", "gdnfuse.gating"]


def test_what_is_no_adapter_has_no_anchor():
    """Of many rows, a gate, an MLP between residuals, or nothing but two linears in a chain."""
    x, w, (A, B), down = of(1, 1, N), of(6, N), pair(2, 6), of(N, 6)
    for f in (
        lambda x, w, A, B, down: F.linear(x, w) * F.linear(F.linear(x, A), B),
        lambda x, w, A, B, down: x + F.linear(F.linear(F.linear(x, A), B).relu() * F.linear(x, w), down),
        lambda x, w, A, B, down: F.linear(F.linear(x, A), B),
    ):
        assert not records(lifted(f, x, w, A, B, down), lora_linear)
    assert not records(lifted(lambda x, w, A, B: adapted(x, w, (A, B)), of(33, 1, N), w, A, B), lora_linear)


def hooked(where, hook):
    """A projection under an adapter with a hook on one part."""

    def on(part, value):
        return hook(value) if part == where else value

    def f(x, w, A, B):
        y = on("base", F.linear(on("x of base", x), w))
        return y + on("B", F.linear(on("A", F.linear(on("x of A", x), A)), B)) * 0.5

    return f


HOOKED = {
    ("x of base", "must read what its projection reads, found mul before the projection. Remove"): lambda t: t * 2,
    ("x of A", "must read what its projection reads, found dropout before A. Call model.eval"): lambda t: F.dropout(t, 1.0),
    ("A", "must read A·x directly, found relu in between. Remove"): torch.relu,
    ("B", "which nothing else reads, as LoRA does; found that clamp reads B·A·x"): lambda t: t.clamp(-1, 1),
    ("base", "must be read by the sum with its adapter alone, found that exp reads it otherwise. Remove"): torch.exp,
}


@pytest.mark.parametrize(("where", "found"), HOOKED)
def test_a_hook_on_a_part_is_said(where, found):
    """Whatever it does, the values stay, and the other projection of the same x is fused with its adapter."""
    x, w, v, one, other = of(1, 1, N), of(6, N), of(4, N), pair(2, 6), pair(3, 4)
    f = hooked(where, HOOKED[where, found])
    graph = lifted(lambda x, w, v, A, B, C, D: (f(x, w, A, B), adapted(x, v, (C, D))), x, w, v, *one, *other)
    fired, refused = records(graph, lora_linear)
    assert (fired.status, refused.status) == (Status.FIRED, Status.REFUSED) and found in refused.reason


def test_declines():
    """A bias on B or the base, no rounding back, two dtypes, one B for two projections, what is read elsewhere, what is computed,
    another sum before, and DoRA."""
    x, w, v, (A, B), (C, D) = of(1, 1, N, dtype=BF16), *(of(6, N, dtype=BF16) for _ in "wv"), pair(2, 6), pair(2, 6, dtype=BF16)
    reason = declines(lambda x, w, A, B: adapted(x, w, (A, B), back=False), x, w, A, B)
    assert "must be torch.bfloat16 again, found torch.float32" in reason
    reason = declines(lambda x, w, v, A, B, C, D: (adapted(x, w, (A, B)), adapted(x, v, (C, D))), x, w, v, A, B, C, D)
    assert "of one dtype, found torch.bfloat16 and torch.float32" in reason
    reason = declines(lambda x, w, v, C, D, E: (adapted(x, w, (C, D)), adapted(x, v, (E, D))), x, w, v, C, D, C.clone())
    assert "must have weights of its own, found one twice" in reason

    def read_twice(x, w, C, D):
        low = F.linear(x, C)
        return F.linear(x, w) + F.linear(low, D), low.exp()

    assert "must be read by its B alone, found that exp" in declines(read_twice, x, w, C, D)
    reason = declines(lambda x, w, C, D, b: F.linear(x, w) + 0.5 * F.linear(F.linear(x, C), D, b), x, w, C, D, of(6, dtype=BF16))
    assert "B of an adapter must have no bias, found one" in reason

    reason = declines(lambda x, w, C, D, b: F.linear(x, w, b) + 0.5 * F.linear(F.linear(x, C), D), x, w, C, D, of(6, dtype=BF16))
    assert "A projection with adapters must have no bias, found one" in reason

    def base_read_twice(x, w, C, D):
        y = F.linear(x, w)
        return y + F.linear(F.linear(x, C), D), y.exp()

    assert "with its adapter alone, found that exp" in declines(base_read_twice, x, w, C, D)
    reason = declines(lambda x, w, C, D: F.linear(x, w) + F.linear(F.linear(x, C.abs()), D), x, w, C, D)
    assert "A and B of an adapter must be weights, found the result of abs" in reason
    reason = declines(lambda x, w, C, D, b: F.linear(x, w) + b + F.linear(F.linear(x, C), D), x, w, C, D, of(6, dtype=BF16))
    assert "with its adapter alone, found that add" in reason

    def dora(x, w, A, B, magnitude):
        y, delta = F.linear(x, w), F.linear(F.linear(x.to(A.dtype), A), B)
        return y + ((magnitude - 1) * y + magnitude * delta * 0.5)

    for E, G in ((A, B), (C, D)):
        assert "as LoRA does; found that mul" in declines(dora, x, w, E, G, of(6, dtype=E.dtype))


def test_packing():
    """All A's are one weight, and B's of one rank one behind the other are another; the parts say where."""

    def f(x, w, v, *flat):
        return adapted(x, w, flat[:2], flat[2:4]), adapted(x, v, flat[4:6], flat[6:])

    pairs = (*pair(2, 6), *pair(3, 6), *pair(2, 4), *pair(3, 4))
    graph = fires(f, of(1, 1, N), of(6, N), of(4, N), *pairs)
    before = graph.results(graph.gm)
    real = dict(zip(graph.gm.graph.find_nodes(op="placeholder"), graph.args, strict=True))
    packed = lower.pack_weights(graph.gm, real)
    found = call_in(graph)
    assert [len(p.where) for p in packed] == [2, 4, 2, 2] and len(found["lora_A"]) == 1 and len(found["lora_B"]) == 2
    assert found["lora_parts"] == [0, 6, 0, 0, 0, 6, 4, 5, 0, 6, 0, 6, 2, 1, 0, 6, 4, 7, 1, 6]
    graph.gm.recompile()
    after = graph.gm(*graph.args, *(p.current(graph.args) for p in packed))
    for got, want in zip(after, before, strict=False):
        torch.testing.assert_close(got, want)


def test_many_rows_have_base_weights_and_adapters_side_by_side():
    """So a prompt and a step find their packed weights in one memory, adapters on or off."""
    args = of(33, 1, N), of(6, N), of(4, N), *pair(2, 6), *pair(3, 4)
    graph = lifted(lambda x, w, v, *a: (adapted(x, w, a[:2]), adapted(x, v, a[2:])), *args)
    (node,) = [n for n in graph.gm.graph.nodes if op_name(n) == "gdnfuse.packed_linear"]
    assert [n.meta["example_value"].shape[0] for n in node.args[1]] == [6, 4, 2, 3]
