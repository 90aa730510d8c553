"""What the fuzz found: each of these was rewritten wrongly, or raised, once."""

import pytest

from gdnfuse.pipeline import original
from gdnfuse.rewrite.graph import op_name, peel
from tests.fuzz import graphs, mutations, oracle


def graph(name):
    gm, calls = graphs.graph_of(name)
    return original(gm), calls


def nodes(gm, op):
    return [n for n in gm.graph.nodes if op_name(n) == op]


def edit(gm, make, *at):
    mutations.apply(gm, mutations.Edit(make, at))


def conv_of(gm):
    """The output of the first layer's convolution."""
    return next(n for n in nodes(gm, "silu") if op_name(peel(n.args[0])) == "getitem")


@pytest.mark.parametrize("name", ["step", "step of one sequence"])
def test_a_second_reader_of_the_convolution_would_update_its_state_twice(name):
    gm, calls = graph(name)
    edit(gm, mutations.look, conv_of(gm), conv_of(gm), mutations.itself)
    verdict = oracle.check(gm, calls)
    assert verdict.layers == 1 and verdict.declined["mixer_decode"] == 1


def test_outputs_stay_contiguous():
    """What the caller does next may be a view."""
    gm, calls = graph("step")
    linear = nodes(gm, "linear")[0]
    edit(gm, mutations.look, linear, linear, mutations.itself)
    assert oracle.check(gm, calls).layers == 2


@pytest.mark.parametrize("how", mutations.VIEWED)
def test_views_that_need_contiguous_memory(how):
    gm, calls = graph("step")
    linear = nodes(gm, "linear")[0]
    (reader,) = linear.users
    edit(gm, mutations.insert, reader, linear, how)
    oracle.check(gm, calls)


@pytest.mark.parametrize("name", ["step", "step of one sequence"])
@pytest.mark.parametrize("gated", [True, False])
def test_values_written_after_attention_has_read_them(name, gated):
    """The proof's mask hid the position that is written, by chance, and with it the order."""
    gm, calls = graph(name)
    (attention,) = nodes(gm, "scaled_dot_product_attention")
    if not gated:
        (reader,) = attention.users
        edit(gm, mutations.insert, reader, attention, mutations.scaled)
    write = nodes(gm, "index_copy_")[-1]
    edit(gm, mutations.move, write, attention)
    assert oracle.check(gm, calls).declined["attention_decode"] == 1
