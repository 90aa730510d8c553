"""The driver: what it refuses to touch, one record per anchor, and a graph that is valid and equal after every application."""

from dataclasses import dataclass

import pytest
import torch

from gdnfuse.dialect import OPS
from gdnfuse.errors import Refused
from gdnfuse.report.records import Status
from gdnfuse.rewrite.driver import Outcome, run_rules
from gdnfuse.rewrite.edit import call, infer
from gdnfuse.rewrite.graph import op_name, value
from gdnfuse.rewrite.pattern import Op, Var
from gdnfuse.rewrite.rule import Match, Operand, Rule, bring
from tests.rewrite.captured import Captured

X, S = torch.randn(2, 3), torch.randn(2, 3)


class Step(Rule):
    """new = state·2 + x; state.copy_(new); exp(new), told in another way."""

    name, stage, equation = "step", "lift", ""

    def anchors(self, graph):
        return [n for n in graph.nodes if op_name(n) == "exp"]

    def match(self, anchor):
        env = Op("exp", Op("add", Op("mul", Var("state")), Var("x"), bind="new")).match(anchor)
        (write,) = [u for u in env["new"].users if op_name(u) == "copy_"]
        return Match({"state": env["state"], "x": env["x"]}, [anchor], writes={"state": write})

    def rewrite(self, m, t):
        new = t.x + t.state + t.state
        t.state.copy_(new)
        return new.exp()


def step(x, state):
    new = state * 2 + x
    state.copy_(new)
    return new.exp()


@dataclass(frozen=True)
class Facts:
    factor: float


class Doubled(Rule[Facts]):
    """x·2 → x + x, at every product."""

    name, stage, equation = "doubled", "lift", ""

    def anchors(self, graph):
        return [n for n in graph.nodes if op_name(n) == "mul"]

    def match(self, anchor):
        env = Op("mul", Var("x")).match(anchor)
        return Match({"x": env["x"]}, [anchor], Facts(anchor.args[1]))

    def check(self, m):
        if m.facts.factor != 2:
            raise Refused(f"The factor must be 2, found {m.facts.factor}.", at=m.outputs[0])

    def rewrite(self, m, t):
        return t.x + t.x


def test_a_state_is_read_and_written_by_the_replacement():
    graph = Captured(step, X, S).normalize().apply(Step()).close()
    assert graph.record.status is Status.FIRED and graph.ops().count("copy_") == 1 and "mul" not in graph.ops()


def reads_the_state_before(x, state):
    seen = state.sum()
    return step(x, state) + seen


def reads_the_state_after(x, state):
    out = step(x, state)
    return out + state


def writes_the_state_before(x, state):
    state.add_(1.0)
    return step(x, state)


def writes_the_state_after(x, state):
    out = step(x, state)
    state[0] = 0.0
    return out


def reads_the_new_value(x, state):
    new = state * 2 + x
    state.copy_(new)
    return new.exp() + new


@pytest.mark.parametrize(
    "f",
    [reads_the_state_before, reads_the_state_after, writes_the_state_before, writes_the_state_after, reads_the_new_value],
    ids=lambda f: f.__name__,
)
def test_anyone_else_at_the_state_is_a_refusal(f):
    graph = Captured(f, X, S).normalize()
    before = str(graph.gm.graph)
    record = graph.apply(Step()).equal().record
    assert record.status is Status.REFUSED and "state" in record.reason and record.reason.endswith(".") and record.at
    assert "found that" in record.reason and str(graph.gm.graph) == before


def operand_written_between(x, state):
    y = x + 1
    doubled = state * 2
    y.neg_()
    new = doubled + y
    state.copy_(new)
    return new.exp()


def operand_written_after(x, state):
    out = step(x, state)
    x.zero_()
    return out


def inner_value_written(x, state):
    new = state * 2 + x
    state.copy_(new)
    new.mul_(3.0)
    return new.exp()


@pytest.mark.parametrize("f", [operand_written_between, operand_written_after, inner_value_written], ids=lambda f: f.__name__)
def test_memory_written_in_place_is_a_refusal(f):
    record = Captured(f, X, S).normalize().apply(Step()).equal().record
    assert record.status is Status.REFUSED and record.reason.endswith(".")
    assert "must not be written in place" in record.reason or "must stay inside" in record.reason


def test_the_result_may_depend_on_the_inputs_alone():
    class Forgetful(Step):
        def match(self, anchor):
            m = super().match(anchor)
            return Match({"state": m.inputs["state"]}, m.outputs, writes=m.writes)

        def rewrite(self, m, t):
            return t.state.exp()

    record = Captured(step, X, S).normalize().apply(Forgetful()).equal().record
    assert record.status is Status.REFUSED and "depend on state alone" in record.reason


def test_one_record_per_anchor_in_order_with_sentences():
    def f(x, y):
        return x * 2, x * 3, x * y, y * 2

    graph = Captured(f, X, S).normalize().apply(Doubled()).equal()
    records = graph.outcome.records
    assert [r.status for r in records] == ["fired", "refused", "refused", "fired"]
    assert records[1].reason == "The factor must be 2, found 3." and records[1].at == records[1].anchor
    assert all(r.rule == "doubled" and r.stage == "lift" for r in records)
    assert [r.proof_error is not None for r in records] == [True, False, False, True]
    assert len({r.anchor for r in records}) == 4


def test_an_unmatched_anchor_tells_what_was_expected_where():
    def f(x, state):
        new = state * 2 - x
        state.copy_(new)
        return new.exp()

    record = Captured(f, X, S).normalize().apply(Step()).equal().record
    assert (record.status, record.expected, record.got) == (Status.UNMATCHED, "add", "sub")
    assert record.at in record.reason and "add" in record.reason and "sub" in record.reason


def test_the_graph_is_valid_and_equal_after_every_single_application():
    def f(x, y):
        a = (x * 2).exp() * 2
        return (a.view(-1) * 2).sum() + (y * 2), a

    class One(Doubled):
        def __init__(self, i):
            self.i = i

        def anchors(self, graph):
            yield next(n for n in graph.nodes if op_name(n) == "mul")

    graph = Captured(f, X, S).normalize()
    for i in range(4):
        graph.apply(One(i)).equal()
        assert graph.ops().count("mul") == 3 - i
    assert all(r.status is Status.FIRED for r in graph.outcome.records)
    for n in graph.gm.graph.nodes:
        assert n.op in ("placeholder", "output") or "example_value" in n.meta


def test_an_anchor_that_a_match_swallowed_is_not_matched_again():
    class Twice(Doubled):
        """x·2·2 → x·4, from the outer product on."""

        def anchors(self, graph):
            return list(reversed([n for n in graph.nodes if op_name(n) == "mul"]))

        def match(self, anchor):
            return Match({"x": Op("mul", Op("mul", Var("x"))).match(anchor)["x"]}, [anchor], Facts(2))

        def rewrite(self, m, t):
            return t.x + t.x + t.x + t.x

    graph = Captured(lambda x: x * 2 * 2, X).normalize().apply(Twice()).equal()
    assert [r.status for r in graph.outcome.records if r.status is not Status.SHADOWED] == ["fired"]
    assert "mul" not in graph.ops()


def test_records_and_meta_name_the_module():
    class Inner(torch.nn.Module):
        def forward(self, x):
            return x * 2

    graph = Captured(torch.nn.Sequential(torch.nn.Identity(), Inner()), X).normalize().apply(Doubled()).equal()
    assert graph.record.modules[-1] == "1"
    assert any(n.meta.get("nn_module_stack") for n in graph.gm.graph.nodes if op_name(n) == "add")


def test_a_symbolic_batch_gets_no_guard():
    graph = Captured(lambda x, y: (x * 2).reshape(x.shape[0], -1) * 2, torch.randn(3, 4), S, dynamic=True).normalize()
    x = next(value(n) for n in graph.gm.graph.nodes if n.op == "placeholder" and isinstance(value(n), torch.Tensor))
    env = x.fake_mode.shape_env
    before = len(env.guards), dict(env.replacements), env._get_key()
    graph.apply(Doubled()).equal()
    assert [r.status for r in graph.outcome.records] == ["fired", "fired"]
    assert (len(env.guards), dict(env.replacements), env._get_key()) == before
    assert any(isinstance(s, torch.SymInt) for n in graph.gm.graph.nodes if op_name(n) == "add" for s in value(n).shape)


def test_rules_are_applied_in_their_order():
    class Summed(Doubled):
        name = "summed"

        def anchors(self, graph):
            return [n for n in graph.nodes if op_name(n) == "add"]

        def match(self, anchor):
            return Match({"x": Op("add", Var("x"), Var("x")).match(anchor)["x"]}, [anchor], Facts(2))

        def rewrite(self, m, t):
            return t.x / 0.5

    graph = Captured(lambda x: x * 2, X).normalize()
    run_rules(graph.gm, [Doubled(), Summed()], graph.outcome)
    assert [r.rule for r in graph.outcome.records] == ["doubled", "summed"] and graph.ops() == ["div"]
    assert run_rules(graph.gm, [], Outcome()) is None
    graph.equal()


@torch.library.custom_op("gdnfuse_tests::no_fake", mutates_args=())
def no_fake(x: torch.Tensor) -> torch.Tensor:
    """Runs in a proof; what it gives in a graph nobody can tell."""
    return x.exp()


class Broken(Step):
    """A rule with a bug, at the second of its anchors or at `where` it is asked for them."""

    def __init__(self, where, error=ZeroDivisionError):
        self.where, self.error, self.matched = where, error, 0

    def _at(self, where):
        if where == self.where and self.matched == 2:
            raise self.error

    def anchors(self, graph):
        if self.where == "anchors":
            raise self.error
        return super().anchors(graph)

    def match(self, anchor):
        self.matched += 1
        self._at("match")
        return super().match(anchor)

    def check(self, m):
        self._at("check")

    def rewrite(self, m, t):
        self._at("rewrite")
        new = t.x + t.state + t.state
        t.state.copy_(new)
        return torch.ops.gdnfuse_tests.no_fake(new) if (self.where, self.matched) == ("a value", 2) else new.exp()


def three_steps(x, y, z, s, t, u):
    return step(x, s), step(y, t), step(z, u)


@pytest.mark.parametrize("where", ["match", "check", "rewrite", "a value"])
def test_a_rule_that_fails_costs_one_anchor_and_leaves_the_graph_there_as_it_was(where, caplog):
    graph = Captured(three_steps, *(torch.randn(2, 3) for _ in range(6))).normalize()
    graph.apply(Broken(where), Step()).close()
    first, broken, third, *others = graph.outcome.records
    (again,) = [r for r in others if r.status is Status.FIRED]  # by the rule without the bug, at the anchor that is left
    assert (first.status, broken.status, third.status) == ("fired", "refused", "fired")
    assert [r for r in graph.outcome.records if r.failed] == [broken]
    assert again.anchor == broken.anchor == broken.at and broken.reason.startswith("The rule step failed: ")
    assert "mul" not in graph.ops() and graph.ops().count("copy_") == 3 and "gdnfuse_tests.no_fake" not in graph.ops()
    (logged,) = [r for r in caplog.records if r.name == "gdnfuse.rewrite.driver"]
    assert logged.exc_info and broken.anchor in logged.getMessage()


def test_a_rule_that_cannot_say_where_it_looks_costs_nobody_else_a_rewrite():
    graph = Captured(step, X, S).normalize().apply(Broken("anchors"), Step()).close()
    broken, fired = graph.outcome.records
    assert broken.failed and broken.reason == "The rule step failed: ZeroDivisionError: no message." and fired.status == "fired"


def test_an_interrupted_rewrite_leaves_the_graph_as_it_was(monkeypatch):
    graph = Captured(step, X, S).normalize()
    before = str(graph.gm.graph)

    def interrupted(node):
        if op_name(node) == "exp":
            raise KeyboardInterrupt
        return infer(node)

    monkeypatch.setattr("gdnfuse.rewrite.driver.infer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        graph.apply(Step())
    assert str(graph.gm.graph) == before


def test_call_runs_on_tensors_and_records_on_proxies():
    op = OPS["l2norm"].overload
    torch.testing.assert_close(call(op, X, 1e-6), torch.nn.functional.normalize(X, dim=-1))
    tracer = torch.fx.proxy.GraphAppendingTracer(torch.fx.Graph())
    proxy = torch.fx.Proxy(tracer.graph.placeholder("x"), tracer)
    assert call(op, proxy, 1e-6).node.target is op
    assert call(OPS["packed_linear"].overload, X, [proxy, proxy]).node.target is OPS["packed_linear"].overload


def test_infer_knows_shape_and_dtype():
    graph = Captured(lambda x: x.double().sum(0), X).gm.graph
    for n in graph.nodes:
        if n.op == "call_method":
            assert (infer(n).shape, infer(n).dtype) == (value(n).shape, value(n).dtype)


@pytest.mark.parametrize(
    ("f", "shape", "found"),
    [
        (lambda x: x.unsqueeze(0), (2, 3, 4), (2, 3, 4)),
        (lambda x: x.transpose(1, 2).double(), (2, 4, 3), (2, 4, 3)),
        (lambda x: x.transpose(1, 2), (2, 3, 4), (2, 3, 4)),
        (lambda x: x.reshape(6, 4), (2, 12), (2, 12)),
    ],
)
def test_bring_finds_or_makes_the_layout(f, shape, found):
    x = torch.randn(2, 3, 4)
    graph = Captured(f, x).gm.graph
    operand = bring(graph.output_node().args[0][0], shape, "x")
    assert tuple(operand.how(torch.zeros([int(s) for s in value(operand.node).shape])).shape) == found


def test_bring_refuses_another_number_of_elements():
    node = Captured(lambda x: x[:1], X).gm.graph.output_node().args[0][0]
    with pytest.raises(Refused, match=r"q must have the shape \[2, 3\], found \[1, 3\]\."):
        bring(node, (2, 3), "q")


class Gathered(Rule):
    """(a + b) + c → the sum of its operands: a list, one that is brought, and one that is not there."""

    name, stage, equation = "gathered", "lift", ""

    def anchors(self, graph):
        return [n for n in graph.nodes if op_name(n) == "exp"]

    def match(self, anchor):
        env = Op("exp", Op("add", Op("add", Var("a"), Var("b")), Var("c"))).match(anchor)
        a, b, c = (env[name] for name in "abc")
        return Match({"terms": [a, b], "c": Operand(c, lambda x: x.reshape(2, 3)), "d": None}, [anchor])

    def rewrite(self, m, t):
        return (sum([*t.terms, t.c], t.d or 0.0)).exp()


def test_operands_come_brought_in_lists_or_not_at_all():
    graph = Captured(lambda a, b, c: (a + b + c.reshape(2, 3)).exp(), X, S, torch.randn(6)).normalize().apply(Gathered()).equal()
    assert graph.record.status is Status.FIRED
    names = list(Gathered().match(next(n for n in graph.before.graph.nodes if op_name(n) == "exp")).inputs)
    assert names == ["terms_0", "terms_1", "c"]


def test_a_tensor_may_be_two_operands_but_not_a_state():
    graph = Captured(lambda a, b: (a + a + b).exp(), X, S).normalize().apply(Gathered()).equal()
    assert graph.record.status is Status.FIRED

    def twice(x):
        new = x * 2 + x
        x.copy_(new)
        return new.exp()

    record = Captured(twice, X).normalize().apply(Step()).equal().record
    assert record.status is Status.REFUSED
    assert record.reason == "l_x_ must be one operand, because it is written, found that it is state and x."
