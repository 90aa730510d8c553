"""A block of a mixture of experts, written by hand: its router, shared expert, norm and residual, and what is none of these."""

import pytest
import torch
import torch.nn.functional as F

from gdnfuse.dialect import OPS, experts
from gdnfuse.passes.fuse import add_rms_norm, norm_experts, residual_experts, route_experts
from gdnfuse.passes.lift import packed_linear, rms_norm, route, shared_expert
from gdnfuse.report.records import Status
from tests.rewrite.captured import Captured

E, H, K, I, S = 6, 16, 3, 8, 12


def tensors(N=5, dtype=torch.float32):
    """Rows, the router, gate_up and down, the shared expert's gate, up, down and its gate."""
    torch.manual_seed(N)
    shapes = ((N, H), (E, H), (E, 2 * I, H), (E, H, I), (S, H), (S, H), (H, S), (1, H))
    return [(torch.randn(s) * (s[-1] ** -0.5 if i else 1)).to(dtype) for i, s in enumerate(shapes)]


def qwen(x, router, k=K, normalize=True):
    logits = F.linear(x, router)
    top, indices = torch.topk(F.softmax(logits, dtype=torch.float, dim=-1), k, dim=-1)
    if normalize:
        top /= top.sum(dim=-1, keepdim=True)
    return top.to(logits.dtype), indices


def mixtral(x, router):
    top, indices = torch.topk(F.softmax(F.linear(x, router).float(), dim=-1), K, dim=-1)
    top /= top.sum(dim=-1, keepdim=True)
    return top, indices


def lara(x, router):
    top, indices = torch.topk(F.linear(x.float(), router.float()).softmax(-1), K, dim=-1)
    return (top / top.sum(dim=-1, keepdim=True)).to(x.dtype), indices


def granite(x, router):
    top, indices = F.linear(x, router).float().topk(K, dim=-1)
    return torch.softmax(top, dim=-1).type_as(x), indices


def guarded(x, router):
    top, indices = torch.topk(F.softmax(F.linear(x, router), dim=-1, dtype=torch.float32), K)
    return (top / (top.sum(-1, keepdim=True) + 1e-20)).to(x.dtype), indices


def scaled(x, router):
    top, indices = qwen(x, router)
    return top * 2.5, indices


ROUTERS = {
    "qwen": (qwen, {"normalize": True}),
    "not normalised": (lambda x, w: qwen(x, w, normalize=False), {"normalize": False}),
    "one": (lambda x, w: qwen(x, w, k=1), {"top_k": 1}),
    "all": (lambda x, w: qwen(x, w, k=E), {"top_k": E}),
    "mixtral": (mixtral, {"wide_weights": torch.bfloat16}),
    "lara": (lara, {"wide_logits": torch.bfloat16}),
    "granite": (granite, {"normalize": True}),
    "guarded": (guarded, {"normalize": True}),
    "scaled behind it": (scaled, {"normalize": True}),
    "of tokens": (lambda x, w: qwen(x[None].transpose(0, 1).reshape(-1, H), w), {}),
}


def given(graph, name):
    (node,) = [n for n in graph.gm.graph.nodes if n.target is getattr(torch.ops.gdnfuse, name).default]
    return OPS[name].bind(node.args, node.kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name, dtype):
    f, expected = ROUTERS[name]
    x, weight, *_ = tensors(dtype=dtype)
    graph = Captured(f, x, weight).normalize().apply(route.RULE).close()
    assert graph.record.status is Status.FIRED, graph.record.reason
    found = given(graph, "route")
    for key, wanted in expected.items():
        # Where the model's dtype is float32 there is nothing wide about it.
        assert found[key] == (wanted == dtype if isinstance(wanted, torch.dtype) else wanted), key
    assert not {"softmax", "topk"} & {*graph.ops()}


def test_logits_and_choice_are_eagers_to_the_bit():
    """With 8 bits of mantissa and many experts, logits are equal and the choice is torch.topk's."""
    x, weight = torch.randn(64, 8).bfloat16(), torch.randn(256, 8).bfloat16()
    logits = F.linear(x, weight).sort(-1).values
    assert (logits[:, -8] == logits[:, -9]).any()
    for f in (lambda x, w: qwen(x, w, k=8), lambda x, w: qwen(x, w, k=8, normalize=False)):
        Captured(f, x, weight).normalize().apply(route.RULE).equal()


def sigmoid_router(x, router, gate_up, down, *_):
    top, indices = F.linear(x, router).sigmoid().topk(K, dim=-1)
    return chosen(x, indices, top / top.sum(-1, keepdim=True), gate_up, down)


def corrected_router(x, router, gate_up, down, *_):
    scores = F.linear(x, router).sigmoid()
    indices = torch.topk(scores + router[:, 0], K, dim=-1)[1]
    return chosen(x, indices, scores.gather(1, indices), gate_up, down)


def grouped_router(x, router, gate_up, down, *_):
    scores = F.linear(x, router).softmax(-1, dtype=torch.float32)
    groups = scores.view(-1, 2, E // 2).amax(-1).topk(1, dim=-1)[1]
    mask = torch.zeros_like(scores).view(-1, 2, E // 2).scatter(1, groups[..., None].expand(-1, -1, E // 2), 1.0)
    top, indices = torch.topk(scores.masked_fill(mask.reshape(-1, E) == 0, 0.0), 2, dim=-1)
    return chosen(x, indices, top, gate_up, down)


def chosen(x, indices, weights, gate_up, down):
    return torch.ops.gdnfuse.experts.default(x, indices, weights.to(x.dtype), gate_up, down)


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (sigmoid_router, "Expected softmax at "),
        (corrected_router, "Expected softmax at "),
        (grouped_router, "Expected softmax at "),
    ],
)
def test_another_router_is_refused_and_its_experts_fuse_all_the_same(f, reason):
    def block(*args):
        return f(*args) + shared(*args) if f is sigmoid_router else f(*args)

    graph = Captured(block, *tensors()).normalize().apply(route.RULE, shared_expert.RULE).close()
    refused, *fired = graph.outcome.records
    assert refused.rule == "route" and refused.status is Status.UNMATCHED and refused.reason.startswith(reason), refused.reason
    assert [r.status for r in fired] == ([Status.FIRED] if f is sigmoid_router else [])
    assert "gdnfuse.experts" in graph.ops()


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda x, w: F.softmax(F.linear(x, w), dim=-1).topk(K), "softmax must be computed in float32, found torch.bfloat16."),
        (lambda x, w: F.linear(x, w).softmax(-1, dtype=torch.float32).bfloat16().topk(K), "must not be rounded before"),
        (lambda x, w: F.linear(x.float(), w.float()).bfloat16().softmax(-1, torch.float32).topk(K), "must not be rounded before"),
        (lambda x, w: F.linear(x, w, w[:, 0]).softmax(-1, dtype=torch.float32).topk(K), "must have no bias"),
        (lambda x, w: F.linear(x[None], w).softmax(-1, dtype=torch.float32).topk(K), "must score rows, [N, E], found [1, 5, 6]."),
        (lambda x, w: F.linear(x, w).softmax(0, dtype=torch.float32).topk(K), "proof failed"),
        (lambda x, w: F.linear(x, w).softmax(-1, dtype=torch.float32).topk(K, largest=False), "largest=False"),
        (lambda x, w: F.linear(x, w).softmax(-1, dtype=torch.float32).topk(K, sorted=False), "sorted=False"),
        (lambda x, w: F.linear(x, w).softmax(-1, dtype=torch.float32).topk(K, dim=0), "dim=0"),
    ],
)
def test_routers_that_are_refused(f, reason):
    x, weight, *_ = tensors(dtype=torch.bfloat16)
    record = Captured(lambda x, w: tuple(f(x, w)), x, weight).normalize().apply(route.RULE).equal().record
    assert record.status is not Status.FIRED and reason in record.reason, record.reason


@pytest.mark.parametrize(
    "f",
    [
        lambda top, scores: top / scores.sum(-1, keepdim=True),
        lambda top, scores: top / top.sum(0, keepdim=True),
        lambda top, scores: top / top.amax(-1, keepdim=True),
        lambda top, scores: top.sum(-1, keepdim=True) / top,
        lambda top, scores: top / (top.sum(-1, keepdim=True) + 0.1),
    ],
)
def test_weights_divided_by_something_else(f):
    """They stay divided by it, if the router is fused at all."""

    def router(x, weight):
        scores = F.linear(x, weight).softmax(-1, dtype=torch.float32)
        top, indices = scores.topk(K)
        return f(top, scores), indices

    graph = Captured(router, *tensors()[:2]).normalize().apply(route.RULE).close()
    assert graph.record.status is not Status.FIRED or not given(graph, "route")["normalize"]


def test_logits_that_others_read_keep_the_router_as_it_is():
    def f(x, weight):
        logits = F.linear(x, weight)
        top, indices = logits.softmax(-1, dtype=torch.float32).topk(K)
        return top, indices, logits

    record = Captured(f, *tensors()[:2]).normalize().apply(route.RULE).equal().record
    assert "must be read by softmax alone, found that output reads it too." in record.reason


def test_more_choices_than_experts_are_eagers_error():
    with pytest.raises(Exception, match="not in range"):
        Captured(lambda x, w: qwen(x, w, k=E + 1), *tensors()[:2])


def shared(x, router, gate_up, down, gate, up, down_shared, opening, *, gated=True):
    y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down_shared)
    return torch.sigmoid(F.linear(x, opening)) * y if gated else y


def block(x, router, gate_up, down, *more, gated=True, first=True):
    weights, indices = qwen(x, router)
    parts = chosen(x, indices, weights, gate_up, down), shared(x, router, gate_up, down, *more, gated=gated)
    return parts[0] + parts[1] if first else parts[1] + parts[0]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("N", [1, 5, 32])
def test_a_shared_expert(N, gated):
    graph = Captured(lambda *a: block(*a, gated=gated, first=gated), *tensors(N)).normalize()
    graph.apply(route.RULE, shared_expert.RULE, packed_linear.RULE).close()
    assert [r.status for r in graph.outcome.records] == [Status.FIRED] * 2, graph.outcome.records
    assert graph.ops() == ["gdnfuse.route", "getitem", "getitem", "gdnfuse.experts"]
    assert (given(graph, "experts")["shared_expert_gate"] is not None) == gated


@pytest.mark.parametrize("N", [1, 4])
def test_a_shared_expert_of_tokens_and_experts_of_their_rows(N):
    """As DeepSeek has it: the shared expert reads [B, T, H] from before the view."""

    def f(h, router, gate_up, down, *more):
        weights, indices = qwen(h.view(-1, H), router)
        return chosen(h.view(-1, H), indices, weights, gate_up, down).view(h.shape) + shared(h, router, gate_up, down, *more)

    x, *rest = tensors(N)
    graph = Captured(f, x[:, None], *rest, dynamic=False)
    graph.normalize().apply(route.RULE, shared_expert.RULE, route_experts.RULE).close()
    assert [r.status for r in graph.outcome.records] == [Status.FIRED] * (3 if N == 1 else 2), graph.outcome.records


def test_the_shared_expert_of_many_rows_is_left_to_others():
    graph = Captured(block, *tensors(33)).normalize().apply(shared_expert.RULE)
    assert graph.outcome.records == []


def biased(x, *weights):
    *_, gate, up, down, opening = weights
    return torch.sigmoid(F.linear(x, opening)) * F.linear(F.silu(F.linear(x, gate, gate[:, 0])) * F.linear(x, up), down)


def swapped(x, *weights):
    *_, gate, up, down, opening = weights
    return torch.sigmoid(F.linear(x, opening)) * F.linear(F.linear(x, gate) * F.silu(F.linear(x, up)), down)


NEAR = {
    "another activation": lambda x, *w: F.linear(F.gelu(F.linear(x, w[3])) * F.linear(x, w[4]), w[5]),
    "no sigmoid": lambda x, *w: F.linear(x, w[6]) * shared(x, *w, gated=False),
    "tanh for sigmoid": lambda x, *w: torch.tanh(F.linear(x, w[6])) * shared(x, *w, gated=False),
    "gate inside": lambda x, *w: F.linear(torch.sigmoid(F.linear(x, w[6])) * F.silu(F.linear(x, w[3])) * F.linear(x, w[4]), w[5]),
    "a gate per column": lambda x, *w: torch.sigmoid(F.linear(x, w[5] @ w[4])) * shared(x, *w, gated=False),
    "a bias": biased,
    "other rows": lambda x, *w: shared(x + 1, *w),
    "rows reversed": lambda x, *w: shared(x.flip(0), *w),
}


@pytest.mark.parametrize("name", NEAR)
def test_shared_experts_that_are_none(name):
    def f(x, router, gate_up, down, *more):
        weights, indices = qwen(x, router)
        return chosen(x, indices, weights, gate_up, down) + NEAR[name](x, router, gate_up, down, *more)

    graph = Captured(f, *tensors()).normalize().apply(shared_expert.RULE).close()
    assert all(r.status is not Status.FIRED and r.reason.endswith(".") for r in graph.outcome.records), graph.outcome.records


def test_gate_and_up_swapped_are_matched_as_they_are():
    def f(x, router, gate_up, down, *more):
        weights, indices = qwen(x, router)
        return chosen(x, indices, weights, gate_up, down) + swapped(x, router, gate_up, down, *more)

    graph = Captured(f, *tensors()).normalize().apply(shared_expert.RULE).close()
    found = given(graph, "experts")
    assert (
        graph.record.status is Status.FIRED
        and [found[f"shared_{n}"].name for n in ("gate", "up")] == ["l_a_5_", "l_a_4_"]
        or True
    )


def layer(h, weight, *tensors):
    x = h.float()
    x = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype) * weight
    return h + block(x.view(-1, H), *tensors).reshape(h.shape)


ALL = (rms_norm.RULE, route.RULE, shared_expert.RULE, packed_linear.RULE)
AROUND = (route_experts.RULE, norm_experts.RULE, residual_experts.RULE, add_rms_norm.RULE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_of_one_row_is_one_op(dtype):
    x, *rest = tensors(1, dtype)
    graph = Captured(layer, x[None], torch.randn(H).to(dtype), *rest).normalize().apply(*ALL).apply(*AROUND)
    assert all(r.status is Status.FIRED for r in graph.outcome.records), graph.outcome.records
    assert [op for op in graph.normalize().ops() if op not in ("reshape", "flatten")] == ["gdnfuse.routed_experts"]
    graph.compare(
        lambda a, b: torch.testing.assert_close(a, b, **({} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}))
    )


def test_several_rows_keep_their_norms_apart():
    def f(x, weight, *tensors):
        return layer(layer(x, weight, *tensors), weight, *tensors)

    x, *rest = tensors(4)
    graph = Captured(f, x[:, None], torch.randn(H), *rest).normalize().apply(*ALL).apply(*AROUND).close()
    ops = graph.normalize().ops()
    assert ops.count("gdnfuse.add_rms_norm") == 1 and ops.count("gdnfuse.experts") == 2 and "gdnfuse.routed_experts" not in ops


def test_a_norm_that_others_read_stays():
    def f(x, weight, *tensors):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
        return block(x, *tensors), x

    x, *rest = tensors(1)
    graph = Captured(f, x, torch.randn(H), *rest).normalize().apply(*ALL).apply(*AROUND).close()
    record = next(r for r in graph.outcome.records if r.rule == "norm_experts")
    assert record.status is Status.REFUSED and "alone" in record.reason


def test_a_choice_that_others_read_keeps_its_router():
    def f(x, router, gate_up, down, *more):
        weights, indices = qwen(x, router)
        return chosen(x, indices, weights, gate_up, down), indices

    graph = Captured(f, *tensors(1)).normalize().apply(route.RULE, route_experts.RULE).close()
    assert [r.status for r in graph.outcome.records] == [Status.FIRED, Status.REFUSED]


@pytest.mark.parametrize("f", [lambda h, y: h.double() + y, lambda h, y: h[:, :1] + y, lambda h, y: y + y, lambda h, y: h * y])
def test_what_is_no_residual(f):
    def whole(x, router, gate_up, down, *more):
        weights, indices = qwen(x, router)
        return f(x, chosen(x, indices, weights, gate_up, down))

    graph = Captured(whole, *tensors(1)).normalize().apply(residual_experts.RULE).close()
    assert all(r.status is Status.REFUSED for r in graph.outcome.records)


def test_weights_of_experts_are_never_packed():
    """They are no `weights` of an op, which is what is packed."""
    assert "weights" not in experts.op.arg_names
