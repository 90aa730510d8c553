"""The float64 proof: exact where the maths is equal, else a sentence with the worst element; once per structure."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from gdnfuse.errors import Refused
from gdnfuse.rewrite import proof
from gdnfuse.rewrite.driver import Outcome, run_rules
from gdnfuse.rewrite.graph import op_name, storage, writes
from gdnfuse.rewrite.rule import Match, Rule
from tests.rewrite.captured import Captured


@pytest.fixture(autouse=True)
def no_cached_proofs():
    proof.forget()
    yield
    proof.forget()


class Whole(Rule):
    """Replaces the whole of a function of x (and maybe state) by another function of the same."""

    name, stage, equation = "whole", "lift", ""

    def __init__(self, new, **extra):
        self.new, self.extra = new, extra

    def anchors(self, graph):
        yield next(iter(reversed(graph.output_node().args[0])))

    def match(self, anchor):
        named = {n.name: n for n in anchor.graph.nodes if n.op == "placeholder"}
        inputs = {k: named[f"l_{k}_"] for k in inspect.signature(self.new).parameters}
        copies = [n for n in anchor.graph.nodes if op_name(n) == "copy_"]
        written = {k: c for c in copies for k, n in inputs.items() if storage(n) in writes(c)}
        return Match(inputs, [anchor], writes=written, **self.extra)

    def rewrite(self, m, t):
        return self.new(**{k: getattr(t, k) for k in m.inputs})


def record_of(old, new, *args, **extra):
    return Captured(old, *args).normalize().apply(Whole(new, **extra)).record


X = torch.randn(3, 3, 3)


def test_the_same_maths_in_another_spelling_is_accepted():
    record = record_of(lambda x: (x * x).sum(-1), lambda x: (x.transpose(0, 1) ** 2).sum(2).transpose(0, 1), X)
    assert record.status == "fired" and record.proof_error < 1e-12 and not record.proof_cached


def test_where_the_model_rounds_is_not_part_of_the_proof():
    """Every floating dtype constant of both sides becomes float64, in all its spellings."""

    def old(x):
        y = x.float().to(torch.float16).bfloat16().to(dtype=torch.half)
        return (y * torch.ones(3, dtype=torch.bfloat16)).type(torch.float32) * torch.zeros_like(x, dtype=torch.float16).exp()

    assert record_of(old, lambda x: x.to(torch.float32) * 1, X).status == "fired"


def test_integers_and_double_stay_what_they_are():
    graph = Captured(lambda x: x.double().to(torch.int64).float(), X)
    wide = proof.in_float64(graph.gm.graph)
    (out,) = proof.evaluate(wide, [X.double() * 5])
    assert out.dtype == torch.float64 and torch.equal(out, (X.double() * 5).trunc())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (lambda x: x.sum(0), lambda x: x.sum(1)),
        (lambda x: x * 2 - x.transpose(1, 2), lambda x: x * 2 - x.transpose(0, 1)),
        (lambda x: F.rms_norm(x, (3,), eps=1e-6), lambda x: F.rms_norm(x, (3,), eps=1e-5)),
        (lambda x: F.softplus(x), lambda x: F.softplus(x, threshold=5)),
        (lambda x: x * 1.0000001, lambda x: x * 1),
        (lambda x: x.sum(0), lambda x: x.sum(0, keepdim=True)),
        (lambda x: x + 1, lambda x: x / 0 * 0),
    ],
    ids=["sum over another axis", "transposed equal axes", "eps", "threshold", "a small factor", "shape", "not finite"],
)
def test_other_maths_is_refused(old, new):
    graph = Captured(old, X).normalize()
    before = str(graph.gm.graph)
    record = graph.apply(Whole(new)).record
    assert record.status == "refused" and "float64 proof failed" in record.reason and record.reason.endswith(".")
    assert str(graph.gm.graph) == before
    graph.equal()


def test_the_sentence_names_the_worst_element():
    def new(x):
        return x + torch.tensor([[0.0, 0.5, 0.0, 0.25]], dtype=torch.float64)

    reason = record_of(lambda x: x + 0.0, new, torch.zeros(2, 4)).reason
    assert "output 0" in reason and "worst element" in reason and "model" in reason and "op" in reason
    worst = int(reason.split("worst element ")[1].split(":")[0])
    assert worst % 4 == 1


def test_a_proof_that_cannot_be_run_is_a_refusal():
    record = record_of(lambda x: x.reshape(-1), lambda x: x.reshape(-1, 1001), X)
    assert record.status == "refused" and "could not be run" in record.reason and record.reason.endswith(".")


def stepped(x, state):
    new = state * 2 + x
    state.copy_(new)
    return new.exp()


def right(x, state):
    new = state * 2 + x
    state.copy_(new)
    return new.exp()


def written_wrongly(x, state):
    new = state * 2 + x
    state.copy_(x + state)
    return new.exp()


def not_written(x, state):
    return (state * 2 + x).exp()


def test_a_cache_must_be_written_as_the_model_writes_it():
    assert record_of(stepped, right, X / 9, torch.randn(3, 3, 3) / 9).status == "fired"
    for new in (written_wrongly, not_written):
        reason = record_of(stepped, new, X, X.clone()).reason
        assert "state after the step differs" in reason


def test_an_input_that_is_not_written_may_not_be_written():
    def new(x):
        y = x * 3
        x.add_(1.0)
        return y

    assert "x, which must not be written," in record_of(lambda x: x * 3, new, X).reason


def test_integer_operands_cannot_be_proved():
    assert "floating" in record_of(lambda x: x * 2.0, lambda x: x * 2.0, torch.arange(4)).reason


def test_samplers_draw_what_the_motif_may_assume():
    """sqrt(x)² = x only where x ≥ 0."""

    def positive(shape, generator):
        return torch.rand(shape, dtype=torch.float64, generator=generator) + 0.1

    assert record_of(lambda x: x.sqrt() * x.sqrt(), lambda x: x * 1, X.abs()).status == "refused"
    assert record_of(lambda x: x.sqrt() * x.sqrt(), lambda x: x * 1, X.abs(), samplers={"x": positive}).status == "fired"


def test_equal_structures_are_proved_once():
    old, new = lambda x: x * 2.5, lambda x: x + x + 0.5 * x
    first = record_of(old, new, X)
    again = record_of(lambda x: x * 2.5, new, X + 1)
    assert (first.proof_cached, again.proof_cached) == (False, True) and again.proof_error == first.proof_error
    for other in (record_of(old, new, X[:2]), record_of(old, new, X.double()), record_of(old, lambda x: 2.5 * x, X)):
        assert other.status == "fired" and not other.proof_cached
    assert record_of(lambda x: x * 2.6, new, X).status == "refused"
    proof.forget()
    assert not record_of(old, new, X).proof_cached


def test_a_failed_proof_is_remembered_as_well(monkeypatch):
    first = record_of(lambda x: x * 2, lambda x: x * 3, X)
    monkeypatch.setattr(proof, "_run", lambda *a: pytest.fail("proved twice"))
    assert record_of(lambda x: x * 2, lambda x: x * 3, X).reason == first.reason


def test_proofs_are_counted_and_timed():
    graph = Captured(lambda x: x * 2, X).normalize()
    outcome = Outcome()
    run_rules(graph.gm, [Whole(lambda x: x + x)], outcome)
    assert outcome.proofs == 1 and outcome.proof_seconds > 0


def test_proofs_leave_the_random_state_and_the_threads_alone():
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    record_of(lambda x: x * 2, lambda x: x + x, torch.ones(3))
    assert torch.equal(torch.random.get_rng_state(), state) and torch.get_num_threads() == threads


def test_hint_of_a_static_size():
    assert proof.hint(3) == 3


def test_evaluate_refuses_what_it_does_not_know():
    graph = torch.fx.Graph()
    graph.output((graph.call_module("m", (graph.placeholder("x"),)),))
    with pytest.raises(TypeError, match="call_module"):
        proof.evaluate(graph, [X])


def test_refused_carries_the_sentence():
    assert (Refused("Why.", at="n").reason, Refused("Why.").at) == ("Why.", None)


def symbolic(*shapes):
    """Nodes of tensors whose sizes are symbols of their own, but for those given as strings, which are numbers."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    kinds = {True: DimDynamic.STATIC, False: DimDynamic.DYNAMIC}
    nodes = []
    for i, shape in enumerate(shapes):
        node = Graph().placeholder(f"x{i}")
        context = StatelessSymbolicContext([kinds[isinstance(size, str)] for size in shape])
        node.meta["example_value"] = mode.from_tensor(
            torch.empty([int(n) for n in shape]), symbolic_context=context, source=ConstantSource(node.name)
        )
        nodes.append((node.name, node))
    return nodes


def test_symbols_are_bound_far_from_each_other_but_equal_sizes_are_equal():
    (_, a), (_, b) = inputs = symbolic((5, "4", 20), (5, "4", 30))
    (B, _, T), (C, _, L) = (proof.value(n).shape for n in (a, b))
    bound = lambda **more: proof._bound(inputs, Match({}, [], small=37, **more))  # noqa: E731
    of = lambda numbers, size: numbers[size.node.expr]  # noqa: E731
    found = bound()
    assert [of(found, n) for n in (B, C, T, L)] == [proof.SEQUENCES, proof.SEQUENCES, 37, 149]
    assert of(bound(equal_sizes=[(T, L + 7)]), L) == 30
    with pytest.raises(Refused, match="Sizes must be above 1 where .* to be proved, found s.* = -13"):
        bound(equal_sizes=[(T, L + 50)])
    number = Graph().placeholder("n")
    number.meta["example_value"] = L
    with pytest.raises(Refused, match="Numbers must be made of sizes of the operands to be proved"):
        proof._bound([inputs[0], ("n", number)], Match({}, [], small=37))
