"""Which results of a prompt's graph are keys and values that the next step finds longer."""

import torch
import torch.nn.functional as F
from torch._dynamo.backends.registry import lookup_backend

from gdnfuse.passes.growing_keys import growing_keys, lay_out, mark
from tests.rewrite.captured import Captured

B, HKV, T, D = 2, 2, 5, 4


def places(function):
    x, weight = torch.randn(B, T, HKV * D), torch.randn(HKV * D, HKV * D)
    return growing_keys(Captured(function, x, weight).gm.graph)


def heads(x):
    return x.view(B, -1, HKV, D).transpose(1, 2)


def test_keys_and_values_that_are_returned_are():
    def attention(x, w):
        k, v = heads(x @ w), heads(x.exp())
        return F.scaled_dot_product_attention(heads(x), k, v, is_causal=True), x + 1, k, heads(x).sin(), v

    assert places(attention) == [2, 4]


def test_keys_behind_copies_for_groups_of_queries_are():
    def attention(x, w):
        k = torch.cat([heads(x), heads(x @ w)], 2)
        copied = k[:, :, None].expand(B, HKV, 2, 2 * T, D).reshape(B, 2 * HKV, 2 * T, D)
        q = torch.cat([heads(x), heads(x)], 1)
        return k, F.scaled_dot_product_attention(q, copied, copied)

    assert places(attention) == [0]


def test_a_view_with_its_tokens_elsewhere_is_not():
    def attention(x, w):
        k = (x @ w).view(B, T, HKV, D)
        return k, k.transpose(1, 2), F.scaled_dot_product_attention(heads(x), k.transpose(1, 2), k.transpose(1, 2))

    found = places(attention)
    assert 0 not in found


def test_what_no_attention_reads_is_not():
    assert places(lambda x, w: (heads(x @ w) + 1, heads(x))) == []


def test_they_are_contiguous_behind_a_prompt_as_behind_a_step():
    def attention(x, w):
        y = x.sin()
        shared, given = heads(y), heads(x)
        k, v = heads(x @ w).exp().contiguous(), heads(x.exp())
        shown = [F.scaled_dot_product_attention(heads(x), *pair) for pair in ((k, v), (shared, given))]
        return k, v, *shown, y, shared, given

    x, weight = torch.randn(B, T, HKV * D), torch.randn(HKV * D, HKV * D)
    g = Captured(attention, x, weight)
    wanted, before = attention(x, weight), len(g.gm.graph.nodes)
    found = growing_keys(g.gm.graph)
    lay_out(g.gm, found)
    g.gm.graph.lint()
    g.gm.recompile()
    results = g.gm(x, weight)
    assert found == [0, 1, 5] and len(g.gm.graph.nodes) == before + 2
    assert [results[i].is_contiguous() for i in (0, 1, 5, 6)] == [True, True, False, False]
    assert all(map(torch.equal, results, wanted)) and results[4].data_ptr() == results[5].data_ptr()


def test_behind_empty_keys_they_are_contiguous_with_inductor_s_decompositions_too():
    """Of a cat with nothing before it Inductor makes a copy that is laid out as what it copies."""

    def attention(x, empty):
        v = torch.cat([empty, heads(x.exp())], -2)
        return v, F.scaled_dot_product_attention(heads(x), v, v)

    args, laid_out = (torch.randn(B, T, HKV * D), torch.empty(0)), []
    for places in ([], [0]):
        gm = Captured(attention, *args).gm
        lay_out(gm, places)
        gm.recompile()
        with torch.no_grad():
            results = lookup_backend("aot_eager_decomp_partition")(gm, list(args))(*args)
        laid_out.append(results[0].is_contiguous())
        assert torch.equal(results[0], heads(args[0].exp()))
    assert laid_out == [False, True]


def test_the_mark_is_a_hint():
    x, n = torch.randn(B, HKV, T, D), []
    mark([None, x], [1])

    def backend(gm, inputs):
        n.append([type(s) for i in inputs if isinstance(i, torch.Tensor) for s in i.shape])
        return gm.forward

    step = torch.compile(lambda x: x * x.shape[2] if x.shape[2] == T else x, backend=backend, fullgraph=True)
    assert torch.equal(step(x), x * T) and n  # Dynamo has to specialise, and does without an error
