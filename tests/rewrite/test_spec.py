"""What no stage may change of a graph: each kind of harm, done by hand, is found and named."""

import operator

import pytest
import torch

from gdnfuse.rewrite.edit import infer
from gdnfuse.rewrite.graph import op_name
from gdnfuse.rewrite.spec import Spec
from tests.rewrite.captured import Captured


def step(x, state):
    before = state.sum()
    state.copy_(state * 2 + x)
    after = state.exp()
    return before, after


def node(gm, name):
    return next(n for n in gm.graph.nodes if op_name(n) == name)


def added(gm, before, target, *args):
    with gm.graph.inserting_before(before):
        new = gm.graph.call_function(target, args)
    new.meta["example_value"] = infer(new)
    return new


def foreign(x):
    return x + 1


def a_write_is_lost(gm):
    copy = node(gm, "copy_")
    copy.replace_all_uses_with(copy.args[0])
    gm.graph.erase_node(copy)


def a_write_is_made(gm):
    added(gm, node(gm, "exp"), operator.iadd, *gm.graph.find_nodes(op="placeholder"))


def a_read_is_early(gm):
    node(gm, "copy_").prepend(node(gm, "exp"))


def a_read_is_late(gm):
    node(gm, "copy_").append(node(gm, "sum"))


def a_result_has_another_dtype(gm):
    node(gm, "exp").replace_all_uses_with(added(gm, gm.graph.output_node(), torch.Tensor.double, node(gm, "exp")))


def a_result_has_another_size(gm):
    exp = node(gm, "exp")
    gm.graph.output_node().replace_input_with(exp, added(gm, gm.graph.output_node(), operator.getitem, exp, 0))


def somebody_else_s_code_is_called(gm):
    exp = node(gm, "exp")
    gm.graph.output_node().replace_input_with(exp, added(gm, gm.graph.output_node(), foreign, exp))


def a_value_is_lost(gm):
    del node(gm, "exp").meta["example_value"]


def a_new_node_has_none(gm):
    del added(gm, gm.graph.output_node(), torch.neg, node(gm, "sum")).meta["example_value"]


HARM = {
    a_write_is_lost: "inputs must be written [1] times, found []",
    a_write_is_made: "inputs must be written [1] times, found [2]",
    a_read_is_early: "after must see [1] writes of what it reads, found [0]",
    a_read_is_late: "before must see [0] writes of what it reads, found [1]",
    a_result_has_another_dtype: "must be (torch.float32,",
    a_result_has_another_size: "found (torch.float32, device(type='cpu'), 3)",
    somebody_else_s_code_is_called: "foreign must be torch's or the dialect's",
    a_value_is_lost: "has no example value",
    a_new_node_has_none: "neg has no example value",
}


@pytest.mark.parametrize("harm", HARM, ids=lambda f: f.__name__)
def test_harm_is_found_and_named(harm):
    gm = Captured(step, torch.randn(2, 3), torch.randn(2, 3)).gm
    spec = Spec(gm)
    spec.check(gm)
    harm(gm)
    with pytest.raises(AssertionError) as e:
        spec.check(gm)
    assert HARM[harm] in str(e.value).split("\n")[0], e.value


def test_what_the_graph_came_with_is_left_alone():
    """Somebody else's code, and values that nobody knows."""
    gm = Captured(step, torch.randn(2, 3), torch.randn(2, 3)).gm
    somebody_else_s_code_is_called(gm)
    a_new_node_has_none(gm)
    spec = Spec(gm)
    added(gm, gm.graph.output_node(), torch.neg, node(gm, "sum"))
    spec.check(gm)


def test_a_size_reads_no_memory():
    """It may be asked for on either side of a write; with sizes of any number it is a node, and a fused op moves past it."""
    gm = Captured(step, torch.randn(2, 3), torch.randn(2, 3)).gm
    size = added(gm, node(gm, "exp"), torch.Tensor.size, node(gm, "copy_").args[0], 0)
    spec = Spec(gm)
    node(gm, "copy_").prepend(size)
    spec.check(gm)
