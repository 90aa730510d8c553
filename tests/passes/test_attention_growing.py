"""Attention of one token on a cache that grows becomes one op, cache and all; what is not that stays, with a sentence."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers

import gdnfuse
from gdnfuse import versions
from gdnfuse.passes import sdpa
from gdnfuse.passes.lift import attention_few_queries, attention_growing, rms_norm
from gdnfuse.report.records import Status
from gdnfuse.rewrite import proof
from gdnfuse.rewrite.graph import op_name
from tests.models import zoo
from tests.passes.test_lower import Lowered
from tests.rewrite.captured import Captured

B, H, HKV, D, R, EPS = 3, 4, 2, 8, 4, 1e-6
RULES = [rms_norm.RULE, attention_growing.RULE, attention_few_queries.RULE]


def normed(x, weight, eps=EPS):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * (1.0 + weight)


def turned(x, cos, sin, rest=True):
    """As transformers does: the first R columns, or all there are of cos."""
    width = cos.shape[-1]
    x, behind = (x[..., :width], x[..., width:]) if rest else (x, None)
    half = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1)
    x = x * cos + half * sin
    return torch.cat([x, behind], dim=-1) if rest else x


def longer(old, new):
    return torch.cat([old, new], dim=-2)


def repeated(x):
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, H // HKV, length, width).reshape(batch, H, length, width)


def attention(q, keys, values, mask):
    return F.scaled_dot_product_attention(q, repeated(keys), repeated(values), attn_mask=mask, scale=0.3)


def gated(o, gate):
    return o.transpose(1, 2).contiguous().reshape(-1, 1, H * D) * torch.sigmoid(gate)


def layer(
    norm_q=normed, norm_k=normed, turn_q=turned, turn_k=turned, keys_of=longer, values_of=longer, attend=attention, end=gated
):  # fmt: skip
    """A layer that differs from transformers' in some of its steps."""

    def f(q, k, v, gate, q_weight, k_weight, cos, sin, keys, values, mask):
        q, k, v = norm_q(q, q_weight).transpose(1, 2), norm_k(k, k_weight).transpose(1, 2), v.transpose(1, 2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = turn_q(q, cos, sin), turn_k(k, cos, sin)
        keys, values = keys_of(keys, k), values_of(values, v)
        return end(attend(q, keys, values, mask), gate), keys, values

    return f


def bare(x, weight):
    return x


def whole(x, cos, sin):
    return turned(x, cos, sin, rest=False)


SPELLINGS = {
    "transformers": layer(),
    "no norm": layer(bare, bare),
    "every column turned": layer(turn_q=whole, turn_k=whole),
    "groups": layer(attend=lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m, enable_gqa=True)),
    "no mask": layer(attend=lambda q, k, v, m: attention(q, k, v, None)),
    "one mask": layer(attend=lambda q, k, v, m: attention(q, k, v, m[:1])),
    "no gate": layer(end=lambda o, gate: o),
    "the third axis": layer(keys_of=lambda a, b: torch.cat((a, b), 2), values_of=lambda a, b: torch.concat([a, b], dim=2)),
    "a cache that the graph makes": layer(keys_of=lambda a, b: longer(a * 2.0, b), values_of=lambda a, b: longer(a.exp(), b)),
}


def arguments(L=21, dynamic=False, columns=R):
    torch.manual_seed(0)
    mask = torch.rand(B, 1, 1, L + 1) < 0.7
    mask[..., -1] = True
    heads = [torch.randn(B, 1, n, D) for n in (H, HKV, HKV)]
    keys, values = torch.randn(B, HKV, L, D), torch.randn(B, HKV, L, D)
    if dynamic:
        for t, axis in ((keys, 2), (values, 2), (mask, 3)):
            torch._dynamo.mark_dynamic(t, axis)
    angles = torch.rand(1, 1, columns) * 6
    gate, norms = torch.randn(B, 1, H * D), (torch.randn(D), torch.randn(D))
    return *heads, gate, *norms, angles.cos(), angles.sin(), keys, values, mask


def applied(function, *args):
    return Captured(function, *args).normalize().apply(*RULES)


def record(g, rule="attention_growing"):
    """The only record of a rule."""
    (found,) = [r for r in g.outcome.records if r.rule == rule]
    return found


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_one_op(name, dynamic):
    g = applied(SPELLINGS[name], *arguments(dynamic=dynamic, columns=D if name == "every column turned" else R))
    assert record(g).status is Status.FIRED, record(g).reason
    assert "gdnfuse.attention_growing" in g.ops()
    assert not {"cat", "sigmoid", "expand", "neg", "gdnfuse.rms_norm", "scaled_dot_product_attention"} & set(g.ops())
    assert [r for r in g.outcome.records if r.rule == "attention_few_queries"] == []
    g.close()


def test_symbolic_numbers_of_sequences():
    args = arguments(dynamic=True)
    for t in (*args[:4], *args[-3:]):
        torch._dynamo.mark_dynamic(t, 0)
    g = applied(SPELLINGS["groups"], *args)
    assert record(g).status is Status.FIRED, record(g).reason
    g.close()


def test_of_a_cache_of_one_token_the_turned_one_is_the_new_one():
    """By its length either could be."""
    g = applied(layer(), *arguments(1))
    assert record(g).status is Status.FIRED, record(g).reason
    g.close()
    behind = layer(keys_of=lambda a, b: longer(b, a), values_of=lambda a, b: longer(b, a))
    g = applied(behind, *arguments(1))
    assert record(g).status is Status.UNMATCHED and "a rotary embedding of k" in record(g).reason
    g.close()


def windowed(old, new):
    """What attention reads, of what the cache then keeps the last."""
    return longer(old, new)[:, :, 1:]


def sliding(*args):
    """As transformers' cache of a sliding window has it: attention reads all, and the cache keeps the last of it."""
    o, keys, values = layer()(*args)
    return o, keys[:, :, 1:], values[:, :, 1:]


def read_twice(*args):
    q, k, v, gate, *others = args
    keys = longer(others[4], turned(k.transpose(1, 2), others[2][:, None], others[3][:, None]))
    return layer(norm_k=bare, keys_of=lambda old, new: keys)(q, k, v, gate * keys.sum(), *others)


def written(*args):
    o, keys, values = layer()(*args)
    return o, keys.mul_(2.0), values


UNMATCHED = {
    "attention in a window": (
        layer(keys_of=windowed, values_of=windowed, attend=lambda q, k, v, m: attention(q, k, v, None)),
        "put",
    ),
    "a cache behind the token": (
        layer(keys_of=lambda a, b: longer(b, a), values_of=lambda a, b: longer(b, a)),
        "keys of all tokens so far, [B, HKV, L, D], followed by those of one",
    ),
    "two tokens": (
        layer(
            keys_of=lambda a, b: torch.cat([a, b, b], 2),
            values_of=lambda a, b: torch.cat([a, b, b], 2),
            attend=lambda q, k, v, m: attention(q, k, v, None),
        ),
        "keys of all tokens so far",
    ),
    "values of another kind": (layer(values_of=lambda a, b: longer(a, b) * 2.0), "values that are put together"),
    "keys that are not turned": (layer(turn_k=lambda x, cos, sin: x * 1.5), "a rotary embedding of k"),
    "another angle": (layer(turn_q=lambda x, cos, sin: turned(x, cos * 2, sin)), "the cos that k is turned with"),
    "a norm of q alone": (layer(norm_k=bare), "the same norm of q and k"),
    "another eps": (layer(norm_k=lambda x, w: normed(x, w, 1e-3)), "the same norm of q and k"),
}
REFUSED = {
    "a sliding window": (sliding, "The keys must stay in the cache whole, found that"),
    "heads in another order": (
        layer(attend=lambda q, k, v, m: F.scaled_dot_product_attention(q, *(x.repeat(1, 2, 1, 1) for x in (k, v)), attn_mask=m)),
        None,
    ),
    "a mask of numbers": (layer(attend=lambda q, k, v, m: attention(q, k, v, m * 1.0)), "The mask must be [3, 1, 1, 22] or"),
    "dropout": (
        layer(attend=lambda q, k, v, m: F.scaled_dot_product_attention(q, repeated(k), repeated(v), m, 0.5)),
        "Attention must have no dropout, found 0.5.",
    ),
    "causal": (
        layer(attend=lambda q, k, v, m: F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True)),
        "Attention of few queries must not have is_causal",
    ),
    "keys that the gate is made of": (read_twice, None),
    "keys that are written": (written, "must not be written in place"),
    "a wider result": (layer(end=lambda o, gate: gated(o, gate.double())), "The result must have the dtype of q"),
    "a cache in half precision": (
        layer(keys_of=lambda a, b: longer(a.half(), b), values_of=lambda a, b: longer(a.half(), b)),
        "keys must have the dtype of q, torch.float32, found torch.float16.",
    ),
}


@pytest.mark.parametrize("name", UNMATCHED | REFUSED)
def test_what_is_not_that_stays(name):
    function, reason = (UNMATCHED | REFUSED)[name]
    g = applied(function, *arguments())
    assert record(g).status in (Status.UNMATCHED, Status.REFUSED) and (reason or "") in record(g).reason, record(g).reason
    assert "gdnfuse.attention_growing" not in g.ops()
    if name != "dropout":
        g.close()


@pytest.mark.parametrize("name", ["a sliding window", "attention in a window", "another angle", "a cache in half precision"])
def test_attention_alone_has_its_chance_behind_it(name):
    function, _ = (UNMATCHED | REFUSED)[name]
    g = applied(function, *arguments())
    assert record(g, "attention_few_queries").status is Status.FIRED, record(g, "attention_few_queries").reason
    g.close()


@pytest.mark.parametrize("name", ["keys", "values"])
def test_a_size_of_the_longer_cache_is_read_before_there_is_one(name):
    """A view in the region may have it as a number, which then no operand gives."""
    g = Captured(layer(), *arguments(dynamic=True)).normalize()
    cats = [n for n in g.gm.graph.nodes if op_name(n) == "cat" and n.args[1] == -2]
    cat = cats[["keys", "values"].index(name)]
    (expand,) = [n for u in cat.users if op_name(u) == "getitem" for n in u.users]
    with g.gm.graph.inserting_before(expand):
        size = g.gm.graph.call_method("size", (cat, 2))
    size.meta["example_value"] = cat.meta["example_value"].shape[2]
    expand.args = (*expand.args[:4], size, *expand.args[5:])
    g.apply(*RULES)
    assert record(g).reason == f"{cat.name} must not be read before all operands exist, found that size reads it."
    assert record(g, "attention_few_queries").status is Status.FIRED
    g.close()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_long_cache_is_proved_where_its_length_is_symbolic(dynamic, monkeypatch):
    monkeypatch.setattr(sdpa, "PROVED", B * HKV * 40 * D)
    g = applied(layer(), *arguments(50, dynamic))
    if dynamic:
        assert record(g).status is Status.FIRED, record(g).reason
    else:
        assert record(g).reason == "The keys must have at most 1920 elements to be proved, found 2400."
    g.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0.31},
        {"norm_eps": 1e-2},
        {"norm_offset": 0.0},
        {"gate": None},
        {"mask": None},
        {"q_norm_weight": None, "k_norm_weight": None},
        lambda given: {"cos": given["sin"], "sin": given["cos"]},
        lambda given: {"k": given["v"], "v": given["k"]},
        lambda given: {"keys": given["values"], "values": given["keys"]},
        lambda given: {"q": given["q"].flip(2)},
        lambda given: {"k": given["k"].flip(2)},
        lambda given: {"keys": given["keys"].flip(2)},
    ],
)
def test_the_proof_bites(wrong, monkeypatch):
    bites(lambda call, target, given: call(target, **{**given, **(wrong(given) if callable(wrong) else wrong)}), monkeypatch)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda o, keys, values: (o, values, keys),
        lambda o, keys, values: (o, keys, values.flip(2)),
        lambda o, k, v: (o, k * 1.0001, v),
    ],
    ids=["exchanged", "values in another order", "keys that are off a little"],
)
def test_the_proof_bites_where_only_the_cache_is_wrong(wrong, monkeypatch):
    def changed(call, target, given):
        results = call(target, **given)
        return wrong(*(results[i] for i in range(3)))

    bites(changed, monkeypatch)


def bites(changed, monkeypatch):
    proof.forget()
    right = attention_growing.call
    monkeypatch.setattr(attention_growing, "call", lambda target, **given: changed(right, target, given))
    g = applied(layer(), *arguments(dynamic=True))
    proof.forget()
    assert record(g).status is Status.REFUSED and "The float64 proof failed" in record(g).reason, record(g).reason
    g.close()


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_is_a_kernel_on_a_gpu(dynamic):
    args = arguments(dynamic=dynamic)
    graph = Lowered(layer(), *args)
    assert graph.names == ["attention_growing"] and graph.overlaps == [False]
    for found, wanted in zip(graph.captured.results(graph.captured.before), layer()(*args), strict=False):
        torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_a_model_on_a_cache_with_a_sliding_window_is_left_to_attention_alone():
    """Where it is full: before that the cache keeps all that attention reads."""
    model = zoo.causal_lm(**zoo.SMALL)
    ours, tokens, sides = copy.deepcopy(model), zoo.tokens_for(2, 9), []
    run = torch.compile(ours, backend="gdnfuse", fullgraph=True, options={"inner": "eager"})
    for owner, call in ((ours, run), (model, model)):
        cache = zoo.new_cache(owner, "dynamic")
        cache.layers[-1] = transformers.cache_utils.DynamicSlidingWindowLayer(sliding_window=8)
        owner(input_ids=zoo.prompt(2)[0], **zoo.held(cache))
        sides.append((zoo.decode(call, cache, None, tokens), cache.layers[-1].keys, cache.layers[-1].values))
    assert sides[0][1].shape[2] == 7
    for found, wanted in zip(*sides, strict=True):
        assert zoo.relative(found, wanted) < 1e-5
    first, *others = [
        {r.rule: r.reason for r in report.all_records if r.rule.startswith("attention") and r.stage == "lift"}
        for report in gdnfuse.reports()
    ]
    assert first["attention_growing"] == "" and others
    # Torch 2.11 and transformers 5.17 have the length of what stays as a symbol of its own.
    older = versions.older("torch", (2, 12)) or versions.older("transformers", (5, 19))
    for reasons in others:
        why = reasons["attention_growing"]
        assert "must stay in the cache whole" in why or older and "must have the shape" in why
        assert reasons["attention_few_queries"] == "" or older
