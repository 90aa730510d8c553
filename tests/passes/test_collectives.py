"""All-reduces in place become functional where nobody could tell, and the local parts of weights inputs.

One process: a group of one rank traces the same graphs, and another rank's part of a sum is made up where graphs run.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.fx import Interpreter

from gdnfuse.errors import Refused
from gdnfuse.passes import collectives, local_weights, verify
from gdnfuse.passes.collectives import ONE_SHOT, ONE_SHOT_NORM
from gdnfuse.rewrite.graph import calls, op_name, writes
from tests.rewrite.captured import Captured, copied

X, W = torch.randn(2, 1, 8), torch.randn(6, 8)


@pytest.fixture(autouse=True)
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TwoRanks(Interpreter):
    """Of which the other has twice what this one has."""

    def call_function(self, target, args, kwargs):
        if "all_reduce" in str(target):
            return args[0] * 3
        return args[0] if "wait_tensor" in str(target) else super().call_function(target, args, kwargs)


def normal(f, *args):
    """Whether the copy went, after checking that every result and argument is what it was, with another rank's part in it."""
    captured = Captured(f, *args)
    ops = [op_name(n) for n in calls(captured.gm)]
    assert ops.count("copy_") == ops.count("_c10d_functional.all_reduce") == 1
    captured.normalize()

    def results(gm):
        given = copied(captured.args)
        with torch.no_grad():
            return [*TwoRanks(gm).run(*given), *given]

    torch.testing.assert_close(results(captured.gm), results(captured.before), rtol=0, atol=0)
    after = captured.ops()
    assert [op for op in after if "c10d" in op] == [op for op in ops if "c10d" in op]
    return "copy_" not in after


def reduced(y):
    dist.all_reduce(y)
    return y


def viewed_after(x, w):
    y = reduced(F.linear(x, w))
    return y.view(2, -1)[:, :3] * 2, y


def read_between(x, w):
    y = F.linear(x, w)
    z = y * 2  # what was there before the sum
    return z + reduced(y)


@pytest.mark.parametrize("f", [lambda x, w: reduced(F.linear(x, w)) + x[..., :6], viewed_after, read_between])
def test_a_sum_of_what_the_graph_computes_is_read_where_it_is_made(f):
    assert normal(f, X, W)


def view_read_behind(x, w):
    y = F.linear(x, w)
    z = y.view(2, 6)
    return reduced(y) + 1, z * 2


def part_of_more(x, w):
    y = F.linear(x, w).view(2, 6)
    return reduced(y[0]) + 1, y * 2


def written_behind(x, w):
    y = reduced(F.linear(x, w))
    y.mul_(w[:, 0])
    return (y + 1,)


@pytest.mark.parametrize("f", [view_read_behind, part_of_more, written_behind, lambda x, w: reduced(x) + 1])
def test_a_sum_that_others_would_see_is_left(f):
    assert not normal(f, X, W)


def test_collectives_write_nothing_and_are_known():
    def f(x, w):
        return reduced(F.linear(x, w)) + 1

    (found,) = collectives.collectives(Captured(f, X, W).gm)
    assert op_name(found) == "_c10d_functional.all_reduce" and not writes(found)


def gated(x, gate, w, v, read=False, act=torch.sigmoid):
    """A block's routed experts and its shared one, each summed up over the ranks, the shared one's behind its gate."""
    shared = reduced(F.linear(x, v))
    out = reduced(F.linear(x, w)) + act(F.linear(x, gate)) * shared
    return (out, shared) if read else (out,)


@pytest.mark.parametrize(
    ("f", "sums"),
    [
        (gated, 1),
        (lambda *args: gated(*args, read=True), 2),
        (lambda *args: gated(*args, act=torch.tanh), 2),
        (lambda x, gate, w, v: gated(x, reduced(gate * 1), w, v), 3),
        (lambda x, gate, w, v: gated(x, gate[0], w, v), 2),
    ],
    ids=["as of experts", "read by others too", "no sigmoid", "no whole weight", "no gate of a row"],
)
def test_two_sums_of_a_block_become_one(f, sums):
    """With the other rank's part three times as much is summed, before as behind."""
    captured = Captured(f, X, torch.randn(1, 8), torch.randn(8, 8), torch.randn(8, 8))
    captured.normalize()
    before = [op_name(n) for n in collectives.collectives(captured.gm)]
    joined = collectives.join_sums(captured.gm)
    captured.gm.graph.lint()
    found = [op_name(n) for n in collectives.collectives(captured.gm)]
    assert found == [collectives.SUM] * sums and len(before) == sums + joined
    given = copied(captured.args)
    torch.testing.assert_close(TwoRanks(captured.gm).run(*given), TwoRanks(captured.before).run(*copied(captured.args)))


@pytest.mark.parametrize(("most", "ways"), [(64, 1), (63, 0), (0, 0)])
def test_small_sums_go_through_symmetric_memory(most, ways):
    """Those of at most so many bytes, here 2 of 8 numbers; on a CPU they are summed as always."""
    captured = Captured(lambda x, w: (reduced(F.linear(x, w)) + reduced(torch.cat([x, x]).flatten(0, 1)).sum(),), X, torch.eye(8))
    captured.normalize()
    assert collectives.one_shot(captured.gm, most) == ways == captured.ops().count(ONE_SHOT)
    captured.gm.graph.lint()
    found = [op_name(n) for n in collectives.collectives(captured.gm)]
    assert found == [ONE_SHOT if ways else collectives.SUM, collectives.SUM]
    torch.testing.assert_close(captured.gm(*captured.args), captured.before(*copied(captured.args)))


def with_norm(x, w):
    weight = w[0]
    hidden = x + reduced(F.linear(x, w))
    return torch.ops.gdnfuse.rms_norm(hidden, weight, 1e-6, 1.0), hidden * 2


def weight_made_behind(x, w):
    hidden = x + reduced(F.linear(x, w))
    return torch.ops.gdnfuse.rms_norm(hidden, w[0] * 2, 1e-6, 1.0), hidden


def residual_made_behind(x, w):
    y = reduced(F.linear(x, w))
    return (x * 2 + y,)


def residual_written_between(x, w):
    y = reduced(F.linear(x, w))
    x.mul_(2)
    return (x + y,)


def read_twice(x, w):
    y = reduced(F.linear(x, w))
    return x + y, y * 2


def doubled(x, w):
    y = reduced(F.linear(x, w))
    return (y + y,)


@pytest.mark.parametrize(
    ("f", "found"),
    [
        (lambda x, w: (reduced(F.linear(x, w)) + x,), [ONE_SHOT]),
        (lambda x, w: (x + reduced(F.linear(x[:, 0], w)).unsqueeze(1),), ["reshape", ONE_SHOT]),
        (with_norm, [ONE_SHOT_NORM, "mul"]),
        (weight_made_behind, [ONE_SHOT, "mul", "gdnfuse.rms_norm"]),
        (residual_made_behind, [ONE_SHOT, "mul", "add"]),
        (residual_written_between, [ONE_SHOT, "mul_", "add"]),
        (read_twice, [ONE_SHOT, "add", "mul"]),
        (doubled, [ONE_SHOT, "add"]),
        (lambda x, w: (x + reduced(F.linear(x, w)).double(),), [ONE_SHOT, "to", "add"]),
    ],
    ids=lambda f: getattr(f, "__name__", None),
)
def test_what_stands_behind_a_small_sum_goes_with_it(f, found):
    captured = Captured(f, X, torch.randn(8, 8))
    captured.normalize()
    assert collectives.one_shot(captured.gm, 64) == 1
    captured.gm.graph.lint()
    assert [op for op in captured.ops() if op not in ("getitem", "linear")] == found
    captured.equal()


def test_ops_of_small_sums_are_what_they_say():
    """Their schema, fake tensors and layouts; partial sums too."""
    group, (x, residual, weight) = dist.group.WORLD.group_name, (X, torch.randn(2, 1, 8), torch.randn(8))
    one, normed = torch.ops.gdnfuse.one_shot_all_reduce.default, torch.ops.gdnfuse.one_shot_add_rms_norm.default
    for args in ((x, group), (x, group, residual), (torch.stack([x, x]), group, residual)):
        torch.library.opcheck(one, args)
    torch.library.opcheck(normed, (x, residual, weight, 1e-6, 1.0, group))


def test_a_maximum_stays():
    def f(x):
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return (x,)

    captured = Captured(lambda x, w: f(F.linear(x, w)), X, W)
    captured.normalize()
    assert collectives.one_shot(captured.gm, 2**20) == 0


def test_a_graph_that_waits_for_other_ranks_is_not_verified():
    captured = Captured(lambda x, w: (reduced(F.linear(x, w)) + 1,), X, W)
    with pytest.raises(Refused, match="^A graph must wait for no other rank to be verified, found _c10d_functional.all_reduce."):
        verify.verify(captured.before, captured.gm, captured.args, [])


def shared_out(tensor):
    mesh = init_device_mesh("cpu", (1,))
    return torch.nn.Parameter(DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False), requires_grad=False)


class Graph:
    """A function's graph with a shared-out weight, and what became of it."""

    def __init__(self, f, weight, change=lambda gm: None):
        graphs = []
        torch.compile(lambda x: f(x, weight), backend=lambda gm, inputs: graphs.append((gm, inputs)) or gm, fullgraph=True)(X)
        ((self.gm, self.inputs),) = graphs
        change(self.gm)
        self.real = dict(zip(self.gm.graph.find_nodes(op="placeholder"), self.inputs, strict=True))
        self.local = local_weights.to_inputs(self.gm, self.real)
        self.gm.graph.lint()


@torch.no_grad()
def test_the_local_part_of_a_weight_is_an_input():
    weight = shared_out(W.clone())
    graph = Graph(lambda x, w: F.linear(x, w.to_local()) + F.linear(x * 2, w.to_local()), weight)
    new = graph.gm.graph.find_nodes(op="placeholder")[-1]
    # And no view of it, which would share its memory.
    assert graph.real[new] is weight._local_tensor and [x.current(graph.inputs) for x in graph.local] == [weight._local_tensor]
    assert "to_local" not in [op_name(n) for n in calls(graph.gm)] and len(new.users) == 2
    graph.gm.recompile()
    (found,) = graph.gm(*graph.inputs, weight._local_tensor)
    torch.testing.assert_close(found, F.linear(X, W) + F.linear(X * 2, W))


def as_torch_2_11_has_it(gm):
    """Methods of DTensors called by a function that Dynamo makes."""
    for node in gm.graph.find_nodes(op="call_method", target="to_local"):
        method = lambda x: x.to_local()  # noqa: E731
        method.__name__, method.__module__ = "prim_to_local", "torch._dynamo.variables.tensor"
        node.op, node.target = "call_function", method


@torch.no_grad()
def test_the_local_part_is_an_input_whatever_reads_it():
    graph = Graph(lambda x, w: F.linear(x, w.to_local()), shared_out(W.clone()), as_torch_2_11_has_it)
    assert len(graph.local) == 1 and not any("to_local" in op_name(n) for n in calls(graph.gm))


def written(x, w):
    part = w.to_local()
    part.mul_(2)
    return F.linear(x, part)


@torch.no_grad()
@pytest.mark.parametrize("f", [written, lambda x, w: F.linear(x, w.to_local()) + w.full_tensor().sum()])
def test_a_weight_that_is_written_or_read_otherwise_stays(f):
    assert Graph(f, shared_out(W.clone())).local == []


@torch.no_grad()
def test_a_part_that_starts_inside_its_memory_stays():
    """Its place is the DTensor's too, for which torch.compile looks."""
    weight = shared_out(torch.cat([W, W])[6:])
    assert weight.storage_offset() and Graph(lambda x, w: F.linear(x, w.to_local()), weight).local == []
