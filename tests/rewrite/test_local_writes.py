"""Regions that write in place to memory they make themselves: what may be cut out, and that the proof runs as the model does."""

import pytest
import torch
from torch.fx import Graph

from gdnfuse.report.records import Status
from gdnfuse.rewrite.evaluate import evaluate, in_float64
from gdnfuse.rewrite.graph import op_name
from gdnfuse.rewrite.rule import Match, Rule
from tests.rewrite.captured import Captured

X = torch.randn(3, 4)


class Doubling(Rule):
    """Everything between the input x and the exp  →  exp(2·x)"""

    name, stage, equation = "doubling", "lift", "exp(2·x)"

    def anchors(self, graph):
        return [n for n in graph.nodes if op_name(n) == "exp"]

    def match(self, anchor):
        (x,) = (n for n in anchor.graph.nodes if n.op == "placeholder")
        return Match({"x": x}, [anchor], local_writes=True)

    def rewrite(self, m, t):
        return (t.x * 2).exp()


def record_of(f, x=X):
    return Captured(f, x).normalize().apply(Doubling()).equal().record


def filled(x):
    buffer = x * 0
    for i in range(3):
        buffer[i] = x[i] + x[i]
    return buffer.exp()


def added_in_place(x):
    y = x + 0
    y.add_(x)
    return y.exp()


def through_a_view(x):
    y = x.clone()
    y[1:].mul_(2)
    y[:1] *= 2
    return y.exp()


def identity_of_default_dtype(x):
    y = x @ torch.eye(4)
    y += x
    return y.exp()


@pytest.mark.parametrize("f", [filled, added_in_place, through_a_view, identity_of_default_dtype], ids=lambda f: f.__name__)
def test_writes_inside_are_taken_along(f):
    graph = Captured(f, X).normalize().apply(Doubling()).close()
    assert graph.record.status is Status.FIRED, graph.record
    assert graph.ops() == ["mul", "exp"]


def written_too_little(x):
    y = x.clone()
    y[1:].mul_(2)
    return y.exp()


def seen_before_complete(x):
    y = x.clone()
    y[1:].mul_(2)
    early = y.sum()
    y[:1].mul_(2)
    return y.exp(), early


def seen_after(x):
    y = x.clone()
    y.mul_(2)
    return y.exp(), y


def derived_seen(x):
    y = x.clone()
    y.mul_(2)
    z = y + 0
    return z.exp(), z.sum()


def output_written_after(x):
    y = x.clone()
    y.mul_(2)
    z = y.exp()
    z.neg_()
    return z


def operand_written(x):
    y = x[1:]
    y.mul_(2)
    return torch.cat([x[:1] * 2, y]).exp()


@pytest.mark.parametrize(
    ("f", "found"),
    [
        (written_too_little, "float64 proof failed"), (seen_before_complete, "must be read in the motif"),
        (seen_after, "must be read in the motif"), (derived_seen, "must be read in the motif"),
        (output_written_after, "must not be written in place"), (operand_written, "must not be written in place"),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)  # fmt: skip
def test_what_must_not_be_cut_out(f, found):
    record = record_of(f)
    assert record.status is Status.REFUSED and found in record.reason and record.reason.endswith("."), record


def test_an_output_read_before_it_is_complete():
    """The output itself is the memory that is written."""

    class Buffer(Doubling):
        def anchors(self, graph):
            return [n for n in graph.nodes if op_name(n) == "clone"]

        def match(self, anchor):
            m = super().match(anchor)
            (end,) = (n for n in anchor.graph.nodes if op_name(n) == "neg")
            return Match(m.inputs, [anchor, end], local_writes=True)

        def rewrite(self, m, t):
            return t.x * 2, -(t.x * 2)

    def f(x, early):
        y = x.clone()
        seen = y.sum() if early else None
        y.mul_(2)
        return (y.neg(), y.sum(), seen) if early else (y.neg(), y.sum())

    graph = Captured(lambda x: f(x, False), X).normalize().apply(Buffer()).equal()
    assert graph.record.status is Status.FIRED, graph.record
    record = Captured(lambda x: f(x, True), X).normalize().apply(Buffer()).equal().record
    assert record.status is Status.REFUSED and "before it is complete" in record.reason


def test_memory_is_shared_in_the_proof_as_in_the_model():
    """Reshaping a transposed tensor copies it, a contiguous one not: only in the proof does the write reach x."""

    def f(x):
        y = x.reshape(-1)
        y.mul_(2)
        return y.exp()

    class Flat(Doubling):
        def rewrite(self, m, t):
            return (t.x.reshape(-1) * 2).exp()

    record = Captured(f, torch.randn(4, 3).T).normalize().apply(Flat()).equal().record
    assert record.status is Status.REFUSED and "shared as in the model" in record.reason


def test_a_region_of_any_device_is_proved_on_the_cpu_in_float64():
    graph = Graph()
    graph.output((graph.call_function(torch.zeros, (3,), {"device": torch.device("meta"), "dtype": torch.float32}),))
    (zeros,) = evaluate(in_float64(graph), [])
    assert zeros.device.type == "cpu" and zeros.dtype == torch.float64
