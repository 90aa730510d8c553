"""With dynamic=True a model's own numbers are numbers all the same; what may change from call to call stays a symbol."""

import torch
import torch.nn.functional as F

import gdnfuse
from gdnfuse import compat
from gdnfuse.passes import constants
from gdnfuse.rewrite.graph import op_name, storage, value
from tests.rewrite.captured import Captured

SCALE = 0.25


class Gate(torch.nn.Module):
    """A decay of a norm of x [B, T, 4], and a state [B, 4] that is written."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-6
        self.A_log, self.dt_bias = torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(4))

    def forward(self, x, state, slope=2.0):
        state.copy_(state * self.dt_bias)
        normed = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + self.eps) * SCALE
        return -self.A_log.exp() * F.softplus(normed + self.dt_bias) * slope


def given(rows=3, tokens=5):
    return torch.randn(rows, tokens, 4), torch.randn(rows, 4)


@torch.no_grad()
def test_a_number_of_the_model_is_guarded_and_an_argument_stays_a_symbol():
    model = Gate().requires_grad_(False)
    run = torch.compile(model, backend="gdnfuse", dynamic=True, fullgraph=True, options={"inner": "eager"})
    for i, (eps, slope, rows, graphs) in enumerate([(1e-6, 2.0, 3, 1), (1e-6, 3.0, 6, 1), (1e-1, 3.0, 6, 2), (1e-1, -1.0, 7, 2)]):
        model.eps = eps
        x, state = given(rows, 8 + i)
        theirs = state.clone()
        torch.testing.assert_close(run(x, state, slope), model(x, theirs, slope))
        torch.testing.assert_close(state, theirs)
        assert len(gdnfuse.reports()) == graphs
        assert {r.rule for r in gdnfuse.reports()[-1].all_records if r.status == "fired" and r.stage == "lift"} == {
            "gating",
            "l2norm",
        }


def captured():
    return Captured(Gate().requires_grad_(False), *given(), 2.0, dynamic=True)


def test_values_keep_their_memory_and_their_symbols():
    graph = captured()
    state = next(n for n in graph.gm.graph.nodes if "state" in n.name)
    x = next(n for n in graph.gm.graph.nodes if n.name == "l_x_")
    before = {n: storage(n) for n in graph.gm.graph.nodes}
    assert not any(isinstance(n, int) for n in value(state).shape)  # though its second is that of dt_bias, and guarded to be
    assert constants.make_numbers(graph.gm) and not constants.make_numbers(graph.gm)
    assert [type(n) for n in value(state).shape] == [torch.SymInt, int] and type(value(state).stride(0)) is int
    assert [type(n) for n in value(x).shape] == [torch.SymInt, torch.SymInt, int]
    assert {n: storage(n) for n in graph.gm.graph.nodes} == {n: s for n, s in before.items() if not n._erased}
    (item,) = [n for n in graph.gm.graph.nodes if op_name(n) == "item"]
    assert item.args[0].name == "l_slope_"
    graph.equal()


def test_without_dynamic_sizes_there_is_nothing_to_do():
    assert not constants.make_numbers(Captured(Gate().requires_grad_(False), *given()).gm)


def test_where_torch_does_not_say_whose_a_number_is_it_stays_a_symbol(monkeypatch):
    monkeypatch.setattr(constants.compat, "of_the_model", compat.of_the_model.instead)
    graph = captured()
    constants.make_numbers(graph.gm)
    assert [op_name(n) for n in graph.gm.graph.nodes].count("item") == 3
    graph.equal()
