"""Patterns: either order with backtracking, repeated variables, the deepest failure, sight through views and casts."""

import pytest
import torch
from torch.fx import Node

from gdnfuse.rewrite.graph import op_name, peel
from gdnfuse.rewrite.pattern import Alt, Const, Mismatch, Op, Var
from tests.rewrite.captured import Captured

x, y = Var("x"), Var("y")
ARGS = torch.rand(2, 3), torch.rand(2, 3)


def root(f, *args):
    graph = Captured(f, *(args or ARGS)).normalize().gm.graph
    return peel(graph.output_node().args[0][0])


@pytest.mark.parametrize("f", [lambda a, b: a.exp() * b.neg(), lambda a, b: b.neg() * a.exp()])
def test_products_match_in_either_order(f):
    env = Op("mul", Op("exp", x), Op("neg", y)).match(root(f))
    assert env.keys() == {"x", "y"} and env["x"] is not env["y"]
    assert peel(env["x"]).users.keys() != peel(env["y"]).users.keys()


def test_differences_do_not_commute():
    pattern = Op("sub", Op("exp", x), y)
    pattern.match(root(lambda a, b: a.exp() - b))
    with pytest.raises(Mismatch):
        pattern.match(root(lambda a, b: b - a.exp()))


def test_backtracks_when_the_first_order_fits_only_at_first():
    """x binds to the left factor, and only the sum outside shows that it had to be the right one."""
    env = Op("add", Op("mul", x, y), Op("exp", x)).match(root(lambda a, b: a * b + b.exp()))
    assert peel(env["x"]) is not peel(env["y"])
    assert any(op_name(u) == "exp" for u in peel(env["x"]).users)


def test_a_repeated_variable_must_be_the_same_elements():
    square = Op("sum", Op("mul", x, x))
    square.match(root(lambda a, b: (a * a).sum()))
    square.match(root(lambda a, b: (a.view(3, 2).double() * a.reshape(3, 2)).sum()))
    with pytest.raises(Mismatch, match="x again"):
        square.match(root(lambda a, b: (a * b).sum()))


def test_sees_through_views_and_casts_but_not_slices():
    pattern = Op("exp", Op("neg", x))
    env = pattern.match(root(lambda a, b: a.neg().double().unsqueeze(0).transpose(1, 2).reshape(6).exp()))
    assert peel(env["x"]).op == "placeholder"
    with pytest.raises(Mismatch) as e:
        pattern.match(root(lambda a, b: a.neg()[:1].exp()))
    assert e.value.got == "getitem"


def test_var_binds_the_node_as_written():
    env = Op("exp", x).match(root(lambda a, b: a.unsqueeze(0).exp()))
    assert env["x"].op == "call_method" and peel(env["x"]).op == "placeholder"


def test_mismatch_names_the_deepest_node_reached():
    pattern = Op("mul", Op("exp", Op("add", Op("sqrt", x), y)), y)
    with pytest.raises(Mismatch) as e:
        pattern.match(root(lambda a, b: (a.log() + b.log()).exp() * b.log()))
    assert (e.value.expected, e.value.got) == ("sqrt", "log")
    assert isinstance(e.value.node, Node) and "sqrt" in str(e.value) and str(e.value.node) in str(e.value)


def test_alternatives_are_tried_in_order_and_all_of_them():
    pattern = Alt(Op("exp", Op("neg", x)), Op("neg", Op("exp", x)), Op("exp|log", x))
    assert "x" in pattern.match(root(lambda a, b: a.exp().neg()))
    assert "x" in pattern.match(root(lambda a, b: a.log()))
    with pytest.raises(Mismatch):
        pattern.match(root(lambda a, b: a.sin()))


def test_constants():
    pattern = Op("mul", Op("add", x, Const("c")), Const("c"))
    assert pattern.match(root(lambda a, b: (a + 2) * 2.0))["c"] == 2.0
    assert pattern.match(root(lambda a, b: 2.0 * (2 + a)))["c"] == 2.0
    with pytest.raises(Mismatch):
        pattern.match(root(lambda a, b: (a + 2) * 3))
    with pytest.raises(Mismatch):
        pattern.match(root(lambda a, b: (a + 2) * b))


def test_bind_names_the_op_itself():
    node = root(lambda a, b: a.exp() * b)
    assert Op("mul", x, y, bind="product").match(node)["product"] is node


def test_patterns_print_as_maths():
    assert str(Op("mul", x, Op("exp|exp2", y))) == "mul(x, exp|exp2(y))"
    assert str(Alt(x, Const("eps"))) == "x or eps"
