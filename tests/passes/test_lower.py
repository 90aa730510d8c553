"""lower for a GPU without one: which linears are split, who adds up their parts, which kernels may overlap those before."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F

import gdnfuse
from gdnfuse import models
from gdnfuse.dialect import OPS
from gdnfuse.dialect import attention_decode as attention_op
from gdnfuse.dialect import attention_growing as growing_op
from gdnfuse.dialect import mixer_decode as mixer_op
from gdnfuse.dialect import packed_decode as rule_op
from gdnfuse.kernels.linear_configs import FILLED, rings, split
from gdnfuse.passes import collectives, fuse, lift, lower
from gdnfuse.report.records import Status
from gdnfuse.rewrite.graph import op_name
from tests.models import zoo
from tests.rewrite.captured import Captured, copied

M, EPS = 6, 1e-6


def of(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def weight(rows, columns, dtype=torch.float32):
    return (torch.randn(rows, columns) / columns**0.5).to(dtype)


class References(torch.fx.Interpreter):
    """Runs a lowered graph with the dialect's references in the place of the kernels."""

    def call_function(self, target, args, kwargs):
        if is_kernel(target):
            target = OPS[target._schema.name.split("::")[1]].reference
            kwargs = {name: x for name, x in kwargs.items() if name != "overlap"}
        return super().call_function(target, args, kwargs)


def is_kernel(target):
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "gdnfuse_triton"


class Lowered:
    """The graph of f behind every pass, for a GPU."""

    def __init__(self, f, *args, linears=True, target="cuda", one_shot_bytes=0):
        self.captured = Captured(f, *args).normalize()
        for rules in (lift.RULES, fuse.RULES):
            self.captured.apply(*rules).normalize()
        self.gm = self.captured.gm
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        lower.pack_weights(self.gm, dict(zip(placeholders, self.captured.args, strict=True)))
        collectives.one_shot(self.gm, one_shot_bytes)
        self.records = lower.lower(self.gm, target, linears=linears)
        lower.check(self.gm)
        self.gm.graph.lint()
        self.kernels = [n for n in self.gm.graph.nodes if is_kernel(n.target)]

    @property
    def names(self):
        return [n.target._schema.name.split("::")[1] for n in self.kernels]

    @property
    def overlaps(self):
        """For each kernel whether it is told that it may overlap those before it."""
        assert all(n.kwargs.get("overlap", True) is True for n in self.kernels)
        return ["overlap" in n.kwargs for n in self.kernels]

    def ops(self):
        return [op_name(n) for n in self.gm.graph.nodes if n.op in ("call_function", "call_method") and n not in self.kernels]

    def right(self, tolerance=1e-5):
        """The graph's values, those it writes included, are those it had before."""
        packed = [n.meta["gdnfuse_real"] for n in self.gm.graph.find_nodes(op="placeholder")[len(self.captured.args) :]]
        args = copied(self.captured.args)
        outputs = References(self.gm).run(*args, *packed)
        found = [x for x in (*outputs, *args) if isinstance(x, torch.Tensor)]
        for ours, eager in zip(found, self.captured.results(self.captured.before), strict=True):
            assert (ours.dtype, ours.shape) == (eager.dtype, eager.shape)
            assert zoo.relative(ours, eager) < tolerance
        return self


def norm(x, w, eps=EPS):
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + w.float())).type_as(x)


def added(x, residual, w):
    """The op itself, which no rule puts where it stands here."""
    return torch.ops.gdnfuse.add_rms_norm.default(x, residual, w, EPS, 1.0)


# How a linear's result y is read; r [rows, 1, M] and n [M] are a residual and a norm's weight.
READERS = {
    "one": lambda y, r, n: y.sin(),
    "none but the caller": lambda y, r, n: y,
    "several": lambda y, r, n: (y.sin(), y * r, y),
    "one reader twice": lambda y, r, n: y * y,
    "a view": lambda y, r, n: y.narrow(-1, 1, 3).exp(),
    "a list": lambda y, r, n: torch.cat([r, y, y], -1),
    "a writer": lambda y, r, n: y.mul_(2.0) + r,
    "a sum": lambda y, r, n: r + y,
    "a norm": lambda y, r, n: norm(y, n),
    "a sum's norm and another": lambda y, r, n: (norm(y + r, n), y),
}

# Rows, columns and parts, whichever the tables choose.
SPLITS = [(2, 1024, 2), (8, 1536, 3), (3, 3584, 7), (9, 512, 2), (32, 1792, 7), (2, 4096, 8), (32, 1024, 8)]


@pytest.fixture
def parts(request, monkeypatch):
    monkeypatch.setattr(lower, "split", lambda M, N, rows, *_: request.param)
    return request.param


@pytest.mark.parametrize(("rows", "columns", "parts"), SPLITS, indirect=["parts"])
@pytest.mark.parametrize("name", READERS)
def test_a_linear_is_split_and_added_up(name, rows, columns, parts):
    reader = READERS[name]
    graph = Lowered(
        lambda x, w, r, n: reader(F.linear(x, w), r, n), of(rows, 1, columns), weight(M, columns), of(rows, 1, M), of(M)
    )
    assert graph.right().names == ["split_linear"] and graph.kernels[0].kwargs["parts"] == parts
    # Inductor takes a sum of at most seven terms where it is read.
    steps = ["sum", "to"] if parts <= 7 else ["unflatten", "sum", "sum", "to"]
    assert [op for op in graph.ops() if op in ("unflatten", "sum", "to")] == steps


@pytest.mark.parametrize(("rows", "columns", "parts"), SPLITS, indirect=["parts"])
def test_the_norm_that_alone_reads_a_sum_adds_up_itself(rows, columns, parts):
    def f(x, w, r, n):
        return norm(h := r + F.linear(x, w), n), h

    graph = Lowered(f, of(rows, 1, columns), weight(M, columns), of(rows, 1, M), of(M)).right()
    assert graph.names == ["split_linear", "add_rms_norm"] and set(graph.ops()) == {"getitem"}
    first, second = graph.kernels
    assert first.kwargs["parts"] == parts and second.kwargs["x"] is first


def summed_over_ranks(x, w, r, n):
    torch.distributed.all_reduce(y := F.linear(x, w))
    return r + y


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("parts", [3], indirect=True)
def test_a_small_sum_over_ranks_adds_up_itself(parts, group):
    """With a residual, and with its norm; without either Inductor does."""
    args = of(8, 1, 1536), weight(M, 1536), of(8, 1, M), of(M)
    for f, found in (
        (summed_over_ranks, {"gdnfuse.one_shot_all_reduce"}),
        (lambda *given: norm(summed_over_ranks(*given), given[-1]), {"gdnfuse.one_shot_add_rms_norm", "getitem"}),
        (lambda *given: summed_over_ranks(*given).sin() - given[2].exp(), {"gdnfuse.one_shot_all_reduce", "sin", "exp", "sub"}),
        (lambda x, w, r, n: summed_over_ranks(x, w, 0, n), {"gdnfuse.one_shot_all_reduce", "sum", "to", "add"}),
    ):
        graph = Lowered(f, *args, one_shot_bytes=1024).right()
        assert graph.names == ["split_linear"] and set(graph.ops()) == found, graph.ops()


@pytest.mark.parametrize("parts", [2], indirect=True)
def test_a_norm_that_its_kernel_does_not_take_adds_up_too(parts):
    width = 2**14 + 64
    args = of(2, 1, 64), weight(width, 64), of(2, 1, width), of(width)
    graph = Lowered(lambda x, w, r, n: norm(r + F.linear(x, w), n), *args).right()
    (reason,) = [r.reason for r in graph.records if r.rule == "add_rms_norm"]
    assert graph.names == ["split_linear"] and "at most 16384 wide" in reason


def test_a_split_linear_keeps_the_dtype_of_its_weight():
    bf16 = torch.bfloat16
    args = of(2, 1, 4096, dtype=bf16), weight(M, 4096, bf16), of(2, 1, M, dtype=bf16), of(M, dtype=bf16)
    plain = Lowered(lambda x, w, r, n: F.linear(x, w), *args).right(2.0**-8)
    normed = Lowered(lambda x, w, r, n: norm(r + F.linear(x, w), n), *args).right(2.0**-7)
    assert plain.names == ["split_linear"] and normed.names == ["split_linear", "add_rms_norm"]


# Kernels that read the sum of a linear that was split: what they take depends on its shape and dtype.
KERNELS_BEHIND = {
    "a linear": lambda y, v, r, n: F.linear(y, v),
    "a linear and others": lambda y, v, r, n: (F.linear(y, v), y),
    "a norm's residual": lambda y, v, r, n: norm(y + F.linear(r.sin(), v), n),
    "a norm's residual and others": lambda y, v, r, n: (norm(h := y + F.linear(r.sin(), v), n), h, y),
    "a residual by hand": lambda y, v, r, n: added(r, y, n),
    "a residual and x": lambda y, v, r, n: added(y, y, n),
    "x by name": lambda y, v, r, n: torch.ops.gdnfuse.add_rms_norm.default(x=y, residual=r, weight=n, eps=EPS, offset=1.0),
    "a linear's weight": lambda y, v, r, n: F.linear(v, y[:, 0]),
}


@pytest.mark.parametrize("parts", [2, 8], indirect=True)
@pytest.mark.parametrize("name", KERNELS_BEHIND)
def test_kernels_read_what_a_split_linear_gives(name, parts):
    reader = KERNELS_BEHIND[name]
    args = of(2, 1, 1024), weight(1024, 1024), weight(1024, 1024), of(2, 1, 1024), of(1024)
    graph = Lowered(lambda x, w, v, r, n: reader(F.linear(x, w), v, r, n), *args).right()
    assert graph.names[0] == "split_linear"


@pytest.mark.parametrize("broken", ["_kernel", "_add_up"])
def test_a_kernel_whose_choice_fails_leaves_its_op(broken, monkeypatch):
    """Also where the op had become a call of the kernel by then."""

    def fails(*args):
        raise ZeroDivisionError("broken on purpose")

    monkeypatch.setattr(lower, broken, fails)
    graph = Lowered(lambda x, w: F.linear(x, w).exp(), of(2, 1, 4096), weight(M, 4096))
    (record,) = graph.right().records
    assert graph.names == [] and graph.ops() == ["linear", "exp"] and (record.chosen, record.failed) == ("library", True)
    assert record.reason == "The rule linear failed: ZeroDivisionError: broken on purpose."


def test_a_mixer_reads_what_a_split_linear_gives():
    """The in_proj of a small model has few tiles too."""
    args, _ = mixer_op.example_call(2, 1, 2, 16, 16)
    row, tensors, constants = args[0], args[1:8], args[8:]

    def f(x, w, *tensors):
        return torch.ops.gdnfuse.mixer_decode.default(F.linear(x, w), *tensors, *constants)

    graph = Lowered(f, of(2, 1, 1024), weight(row.shape[-1], 1024), *tensors).right()
    assert graph.names == ["split_linear", "mixer_decode"]


@pytest.mark.parametrize(("rows", "columns"), [(2, 4096), (8, 1024), (9, 1024), (32, 2048)])
def test_a_linear_of_few_tiles_is_split(rows, columns):
    graph = Lowered(lambda x, w: F.linear(x, w), of(rows, 1, columns), weight(M, columns)).right()
    assert graph.names == ["split_linear"] and graph.kernels[0].kwargs["parts"] == split(M, columns, rows)


def test_where_weights_come_through_a_ring_its_parts_are_taken(monkeypatch):
    monkeypatch.setattr("gdnfuse.passes.lower.rings", lambda weight: True)
    graph = Lowered(lambda x, w: F.linear(x, w), of(2, 1, 4096), weight(2560, 4096)).right()
    assert graph.names == ["split_linear"] and graph.kernels[0].kwargs["parts"] == 4 != split(2560, 4096, 2)


@pytest.mark.parametrize("parts", [3], indirect=True)
def test_a_linear_with_adapters_is_split_and_its_norm_adds_up(parts):
    """As without them: the first part has what they add. With SwiGLU behind it, it is whole."""

    def under(x, w, A, B, C, D):
        return F.linear(x, w) + 0.5 * F.linear(F.linear(x, A), B) + 2.0 * F.linear(F.linear(x, C), D)

    def f(x, r, n, w, u, *adapters):
        h = r + under(x, w, *adapters[:4])
        y = under(norm(h, n), u, *adapters[4:])
        return F.silu(y.narrow(-1, 0, width)) * y.narrow(-1, width, width), h

    width = 64
    of_w = weight(4, 1536), weight(width, 4), weight(2, 1536), weight(width, 2)
    of_u = weight(4, width), weight(2 * width, 4), weight(4, width), weight(2 * width, 4)
    args = of(9, 1, 1536), of(9, 1, width), of(width), weight(width, 1536), weight(2 * width, width)
    graph = Lowered(f, *args, *of_w, *of_u).right()
    split, add, whole = graph.kernels
    assert graph.names == ["split_linear", "add_rms_norm", "fused_linear"] and add.kwargs["x"] is split
    assert split.kwargs["parts"] == 3 and split.kwargs["lora_scaling"] == whole.kwargs["lora_scaling"] == [0.5, 2.0]
    assert whole.kwargs["swiglu"] and graph.overlaps == [False, True, True]


WIDE = 64 * FILLED  # rows of a weight with programs enough
WHOLE = {
    "one row": (lambda x, w: F.linear(x, w), (1, 1, 1024), (M, 1024)),
    "many tiles": (lambda x, w: F.linear(x, w), (2, 1, 1024), (WIDE, 1024)),
    "few columns": (lambda x, w: F.linear(x, w), (2, 1, 256), (M, 256)),
    "swiglu": (lambda x, w: F.silu((y := F.linear(x, w)).narrow(-1, 0, M)) * y.narrow(-1, M, M), (2, 1, 1024), (2 * M, 1024)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_linears_that_are_not_split(name):
    f, x, w = WHOLE[name]
    graph = Lowered(f, of(*x), weight(*w)).right()
    assert graph.names == ["fused_linear"] and "sum" not in graph.ops()


LIBRARY = {
    "33 rows": (lambda x, w, b: F.linear(x, w), (33, 1, 1024), torch.float32, "at most 32 rows"),
    "33 tokens": (lambda x, w, b: F.linear(x, w), (3, 11, 1024), torch.float32, "at most 32 rows"),
    "float64": (lambda x, w, b: F.linear(x, w), (2, 1, 1024), torch.float64, "found float64"),
    "bias": (lambda x, w, b: F.linear(x, w, b), (2, 1, 1024), torch.float32, "takes no bias"),
    "bias by name": (lambda x, w, b: F.linear(x, w, bias=b), (2, 1, 1024), torch.float32, "takes no bias"),
    "every second column": (lambda x, w, b: F.linear(x[..., ::2], w[:, :512]), (2, 1, 1024), torch.float32, "contiguous rows"),
    "transposed weight": (lambda x, w, b: F.linear(x, w.t().contiguous().t()), (2, 1, 1024), torch.float32, "contiguous rows"),
    "half a step": (lambda x, w, b: F.linear(x[..., :1000], w[:, :1000]), (2, 1, 1024), torch.float32, "a multiple of"),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_linears_that_stay_torchs(name):
    f, x, dtype, reason = LIBRARY[name]
    graph = Lowered(f, of(*x, dtype=dtype), weight(M, 1024, dtype), of(M, dtype=dtype)).right()
    (record,) = graph.records
    assert graph.names == [] and "linear" in graph.ops() and "sum" not in graph.ops()
    assert record.chosen == "library" and reason in record.reason


def test_a_linear_of_any_number_of_rows_stays_torchs():
    x = of(3, 1, 1024)
    torch._dynamo.mark_dynamic(x, 0)
    graph = Lowered(lambda x, w: F.linear(x, w), x, weight(M, 1024)).right()
    assert graph.names == [] and "at most 32 rows" in graph.records[0].reason


@pytest.mark.parametrize("options", [{"linears": False}, {"target": "cpu"}, {"target": None}], ids=str)
def test_linears_are_left_alone_in_a_prefill_and_on_a_cpu(options):
    graph = Lowered(lambda x, w: F.linear(x, w), of(2, 1, 1024), weight(M, 1024), **options).right()
    assert graph.names == [] and graph.records == [] and graph.ops() == ["linear"]


# Overlap: a kernel that reads an argument early must find in it what was there before the first kernel of the graph.

N = 8
SQUARE = (N, N)


def chain(change=lambda v: v, before=lambda v: None, after=lambda v: None):
    """Two linears in a row; the second's weight is `change` of v, with something done to v before and after."""

    def f(x, w, v):
        y = F.linear(x, w).sin()
        found = before(v)
        z = F.linear(y, change(v))
        return z, found, after(v)

    return f


def second_overlaps(f, *args):
    graph = Lowered(f, *args).right()
    assert len(graph.kernels) == 2 and not graph.overlaps[0]
    return graph.overlaps[1]


@pytest.mark.parametrize("x", [(1, 1, N), (2, 1, 1024)], ids=["one row", "split"])
def test_all_kernels_but_the_first_overlap(x):
    square = (x[-1], x[-1])

    def f(x, u, v, w):
        return F.linear(F.linear(F.linear(x, u).sin(), v) + 1, w)

    graph = Lowered(f, of(*x), *(weight(*square) for _ in range(3))).right()
    assert graph.overlaps == [False, True, True]


def test_kernels_that_depend_on_no_kernel_do_not_overlap():
    """Each may be the first of the graph to run."""

    def f(x, y, w, v):
        a, b = F.linear(x, w), F.linear(y, v)
        return a, b, F.linear(a + b, v)

    assert Lowered(f, of(1, 1, N), of(1, 1, N), of(*SQUARE), of(*SQUARE)).right().overlaps == [False, False, True]


def test_a_kernel_behind_another_that_is_not_ours_overlaps():
    """It waits for all of that one, which has waited for ours."""

    def f(x, w, v, u, b):
        return F.linear(F.linear(F.linear(x, w), v, b), u)

    args = of(1, 1, N), *(of(*SQUARE) for _ in range(3)), of(N)
    graph = Lowered(f, *args).right()
    assert "linear" in graph.ops() and graph.overlaps == [False, True]


VIEWS = {
    "itself": lambda v: v,
    "view": lambda v: v.view(-1).view(SQUARE),
    "reshape": lambda v: v.reshape(2, -1).reshape(SQUARE),
    "rows": lambda v: v[2:],
    "columns and all rows": lambda v: v.expand(SQUARE),
    "chunk": lambda v: v.chunk(2)[1],
    "detached": lambda v: v.detach(),
    "twice transposed": lambda v: v.t().t(),
    "cast to its own dtype": lambda v: v.float(),
    "contiguous already": lambda v: v.contiguous(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_weight_that_is_a_view_of_an_input_may_be_read_early(name):
    assert second_overlaps(chain(VIEWS[name]), of(1, 1, N), of(*SQUARE), of(*SQUARE))


COMPUTED = {
    "low rank": lambda v: v + v[:, :2] @ v[:2],
    "scaled": lambda v: v * 2,
    "clone": lambda v: v.clone(),
    "copied by contiguous": lambda v: v.t().contiguous(),
    "copied by reshape": lambda v: v.t().reshape(-1).view(SQUARE),
    "cat": lambda v: torch.cat([v[:4], v[4:]]),
    "stack": lambda v: torch.stack(list(v)),
    "cast there and back": lambda v: v.bfloat16().float(),
    "ones": lambda v: torch.ones(SQUARE),
    "view of a product": lambda v: (v * 2).view(-1).view(SQUARE),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_the_graph_computes_may_not_be_read_early(name):
    assert not second_overlaps(chain(COMPUTED[name]), of(1, 1, N), of(*SQUARE), of(*SQUARE))


def test_a_weight_that_a_kernel_computes_may_not_be_read_early():
    def f(x, w, v, u):
        """The second linear's weight is the first's result, the third reads it as x too."""
        y = F.linear(v[:1], w)
        return F.linear(x, y), F.linear(y, u)

    graph = Lowered(f, of(1, 1, N), of(*SQUARE), of(*SQUARE), of(*SQUARE)).right()
    assert graph.names == ["fused_linear"] * 3 and graph.overlaps == [False, False, True]


@torch.library.custom_op("gdnfuse_test::halve", mutates_args=("t",))
def halve(t: torch.Tensor) -> torch.Tensor:
    return t.mul_(0.5).sum()


@torch.library.custom_op("gdnfuse_test::halve_all", mutates_args=("ts",))
def halve_all(ts: list[torch.Tensor]) -> torch.Tensor:
    return sum(t.mul_(0.5).sum() for t in ts)


halve.register_fake(lambda t: t.new_empty(()))
halve_all.register_fake(lambda ts: ts[0].new_empty(()))


def set_item(v):
    v[0] = 1.0


WRITERS = {
    "add_": lambda v: v.add_(1.0),
    "operator": lambda v: operator.imul(v, 2.0),
    "copy_": lambda v: v.copy_(v + 1),
    "setitem": set_item,
    "out": lambda v: torch.mul(v, 2.0, out=v),
    "through a view": lambda v: v.view(-1)[3:5].zero_(),
    "through a part": lambda v: v.chunk(2)[0].mul_(3.0),
    "through detach": lambda v: v.detach().mul_(3.0),
    "inplace keyword": lambda v: F.relu(v, inplace=True),
    "aten": lambda v: torch.ops.aten.mul_.Tensor(v, 2.0),
    "foreach": lambda v: torch._foreach_mul_([v], 0.5),
    "foreign op": lambda v: torch.ops.gdnfuse_test.halve(v),
    "overload of a foreign op": lambda v: torch.ops.gdnfuse_test.halve.default(v),
    "foreign op on a list": lambda v: torch.ops.gdnfuse_test.halve_all([v]),
    "overload of a foreign op on a list": lambda v: torch.ops.gdnfuse_test.halve_all.default([v]),
    "renorm of an embedding": lambda v: F.embedding(torch.tensor([0, 3]), v, max_norm=0.5),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_weight_that_the_graph_writes_may_not_be_read_early(name, place):
    def write(v):
        WRITERS[name](v)

    f = chain(**{place: write})
    assert not second_overlaps(f, of(1, 1, N), of(*SQUARE), of(*SQUARE))


def test_a_weight_that_shares_memory_with_what_the_graph_writes_may_not_be_read_early():
    base = of(2 * N, N)

    def f(x, w, v, r):
        y = F.linear(x, w)
        r.add_(1)
        return F.linear(y, v)

    graph = Lowered(f, of(1, 1, N), of(*SQUARE), base[:N], base[N:])
    assert graph.overlaps == [False, False]
    assert Lowered(f, of(1, 1, N), of(*SQUARE), of(*SQUARE), of(*SQUARE)).overlaps == [False, True]


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_weight_may_be_read_by_others_too(place):
    assert second_overlaps(chain(**{place: lambda v: v.sum()}), of(1, 1, N), of(*SQUARE), of(*SQUARE))


def test_what_a_kernel_waits_for_may_be_computed_and_written():
    """x and residual are read late."""

    def f(x, w, v, r):
        y = F.linear(x, w).exp()
        r.mul_(2.0)
        return torch.ops.gdnfuse.fused_linear.default(y, [v], residual=r), r.sum()

    assert second_overlaps(f, of(1, 1, N), of(*SQUARE), of(*SQUARE), of(1, 1, N))


@pytest.mark.parametrize(("change", "given"), [(lambda n: n, True), (lambda n: n.exp(), False)], ids=["input", "computed"])
def test_the_weight_of_a_norm_is_read_early_too(change, given):
    def before_a_linear(x, w, v, n):
        return torch.ops.gdnfuse.fused_linear.default(F.linear(x, w), [v], change(n), EPS, 1.0)

    def behind_a_sum(x, w, v, n):
        return added(F.linear(x, w).sin(), x, change(n))

    for f in (before_a_linear, behind_a_sum):
        assert second_overlaps(f, of(1, 1, N), of(*SQUARE), of(*SQUARE), of(N)) == given


def conv_call():
    return (of(1, 12, 1), of(1, 12, 4), of(12, 1, 4), of(12), "silu"), {}


def attention_call():
    return attention_op.example_call(1, 4, 2, 8, 5, R=4, filled=3, padded=1)


def growing_call():
    return growing_op.example_call(1, 4, 2, 8, 5, R=4)


def rule_call():
    mixed, a, b, A_log, dt_bias, state = rule_op.example_tensors(1, 1, 2, 4, 6)
    return (mixed, a, b, A_log, dt_bias, state, 0.5, 1e-6), {}


# Kernels that read and write a state before they wait: a call whose first argument a linear computes, and where the state is.
STATEFUL = {
    "causal_conv_update": (conv_call, 1),
    "packed_decode": (rule_call, 5),
    "mixer_decode": (lambda: mixer_op.example_call(1, 1, 2, 4, 6, bias=True), 1),
    "attention_decode": (attention_call, 10),
    "attention_decode ": (attention_call, 11),
    "mixer_decode ": (lambda: mixer_op.example_call(1, 1, 2, 4, 6), 6),
}
STATES = pytest.mark.parametrize("name", STATEFUL)
# And one that reads early what it does not write.
CALLS = {**STATEFUL, "attention_growing": (growing_call, 10)}


def stateful(name, change=lambda s: s, before=lambda s: None, after=lambda s: None, at=None):
    """A kernel behind a linear, that is given `change` of its state (or of its argument `at`), and what it is called with."""
    make, state = CALLS[name]
    given, _ = make()
    at = state if at is None else at

    def f(x, w, *tensors):
        remaining = iter(tensors)
        args = [next(remaining) if isinstance(a, torch.Tensor) else a for a in given[1:]]
        first = F.linear(x, w).reshape(given[0].shape)
        s = args[at - 1]
        found = before(s)
        args[at - 1] = change(s)
        y = getattr(torch.ops.gdnfuse, name.strip()).default(first, *args)
        return y, found, after(s)

    return f, of(1, 1, N), of(given[0].numel(), N), *(a for a in given[1:] if isinstance(a, torch.Tensor))


STATE_VIEWS = {
    "itself": lambda s: s,
    "view": lambda s: s.view(-1).view(s.shape),
    "twice transposed": lambda s: s.transpose(-1, -2).transpose(-1, -2),
    "all of it": lambda s: s[:],
    "detached": lambda s: s.detach(),
    "contiguous already": lambda s: s.contiguous(),
    "unsqueezed": lambda s: s[None].squeeze(0),
}


@STATES
@pytest.mark.parametrize("view", STATE_VIEWS)
def test_a_state_that_is_a_view_of_an_input_may_be_read_early(view, name):
    assert second_overlaps(*stateful(name, STATE_VIEWS[view]))


STATE_COPIES = {
    "clone": lambda s: s.clone(),
    "scaled": lambda s: s * 0.5,
    "copied by contiguous": lambda s: s.transpose(-1, -2).contiguous().transpose(-1, -2),
    "zeros": lambda s: torch.zeros_like(s),
    "cat": lambda s: torch.cat([s[:, :1], s[:, 1:]], 1),
    "view of a clone": lambda s: s.clone().view(-1).view(s.shape),
}


@STATES
@pytest.mark.parametrize("copied_by", STATE_COPIES)
def test_a_state_that_the_graph_makes_may_not_be_read_early(copied_by, name):
    assert not second_overlaps(*stateful(name, STATE_COPIES[copied_by]))


STATE_USES = {
    "read": lambda s: s.sum(),
    "partly read": lambda s: s[..., 0].exp(),
    "copied": lambda s: s.clone(),
    "read behind a view": lambda s: s.view(-1).exp(),
    "written": lambda s: s.mul_(0.5).sum(),
    "partly written": lambda s: s[..., 0].mul_(0.5).sum(),
}


@STATES
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("use", STATE_USES)
def test_a_state_that_others_use_may_not_be_read_early(use, place, name):
    assert not second_overlaps(*stateful(name, **{place: STATE_USES[use]}))


@STATES
def test_a_state_that_the_graph_returns_a_view_of_may_not_be_read_early(name):
    assert not second_overlaps(*stateful(name, after=lambda s: s[..., :1]))


@STATES
def test_a_state_that_is_copied_and_copied_back_may_not_be_read_early(name):
    copies = []

    def change(s):
        copies.append(s.clone())
        return copies[-1]

    assert not second_overlaps(*stateful(name, change, after=lambda s: s.copy_(copies.pop()).sum()))


@STATES
def test_a_state_that_two_kernels_write_may_not_be_read_early(name):
    f, x, w, *tensors = stateful(name)

    def twice(x, w, *tensors):
        y, *_ = f(x, w, *tensors)
        return y, f(x + y.sum(), w, *tensors)[0]

    assert Lowered(twice, x, w, *tensors).right().overlaps == [False, False, True, False]


def test_states_that_share_memory_may_not_be_read_early():
    """Where both are inputs, whoever makes writes explicit gives the kernel a copy of one."""
    f, x, w, conv, taps, A_log, dt_bias, state, weight = stateful("mixer_decode ")
    buffer = torch.cat([conv.flatten(), state.flatten()])
    pieces = [piece.view(t.shape) for piece, t in zip(buffer.split([conv.numel(), state.numel()]), (conv, state), strict=True)]
    rest = taps, A_log, dt_bias
    assert Lowered(f, x, w, pieces[0], *rest, pieces[1], weight).overlaps == [False, False]
    assert Lowered(f, x, w, conv, *rest, state, weight).overlaps == [False, True]


# What else these kernels read early and do not write.
EARLY = [("causal_conv_update", 2), ("causal_conv_update", 3), ("packed_decode", 3), ("packed_decode", 4)]
EARLY += [("mixer_decode", at) for at in (2, 3, 4, 5)] + [("attention_growing", at) for at in (10, 11)]


@pytest.mark.parametrize(("name", "at"), EARLY)
def test_the_parameters_beside_a_state_are_read_early_too(name, at):
    assert second_overlaps(*stateful(name, lambda p: p.view(-1).view(p.shape), before=lambda p: p.sum(), at=at))
    for changes in ({"change": lambda p: p * 2}, {"before": lambda p: p.mul_(2)}, {"after": lambda p: p.mul_(2)}):
        assert not second_overlaps(*stateful(name, at=at, **changes))


def test_the_weight_of_the_norm_behind_a_mixer_is_read_late():
    assert second_overlaps(*stateful("mixer_decode", lambda p: p * 2, at=7))


def test_in_proj_conv_waits_for_its_state():
    def f(x, w, v, n, state, taps):
        state.mul_(0.5)
        y = torch.ops.gdnfuse.in_proj_conv.default(F.linear(x, w), [v], n, EPS, 1.0, state, taps, None, 0, "silu")
        return y, state.sum()

    assert second_overlaps(f, of(1, 1, N), of(*SQUARE), of(*SQUARE), of(N), of(1, N, 4), of(N, 1, 4))


# Whole models.


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.sweep), 32])
def test_every_kernel_of_a_decode_step_that_can_but_the_first_overlaps(batch, monkeypatch):
    graphs, honest = [], lower.lower
    monkeypatch.setattr(lower, "lower", lambda gm, *args, **kwargs: (graphs.append(gm), honest(gm, *args, **kwargs))[1])
    config = models.load_config("qwen3.5-0.8b")
    config.num_hidden_layers, config.layer_types = 3, config.layer_types[2:5]
    models.trace(models.meta_model(config), batch=batch, target="cuda")
    (gm,) = graphs
    able = [n for n in gm.graph.nodes if is_kernel(n.target) and "overlap" in [a.name for a in n.target._schema.arguments]]
    assert len(able) > 3 * 3 and ["overlap" in n.kwargs for n in able] == [False] + [True] * (len(able) - 1)
    names = [n.target._schema.name.split("::")[1] for n in able]
    # Two per layer, but for the norm in front of the first.
    assert names.count("add_rms_norm") == (0 if batch == 1 else 2 * 3)
    splits = [n for n in able if n.target._schema.name.endswith("split_linear")]
    assert bool(splits) == (batch > 1)
    for n in splits:
        (v,) = n.kwargs["weights"]
        weight = v.meta["example_value"]
        assert n.kwargs["parts"] == split(*weight.shape, batch, rings(weight))


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.sweep), 9])
def test_a_model_gives_the_same_with_references_for_its_kernels(batch, monkeypatch):
    """Wide enough for its linears to be split, decoded for some tokens on a CPU."""
    torch.manual_seed(0)
    heads = {"linear_num_value_heads": 8, "linear_value_head_dim": 128}
    model = zoo.causal_lm(**zoo.SMALL, hidden_size=1024, intermediate_size=1024, **heads)
    ours, tokens, graphs = copy.deepcopy(model), zoo.tokens_for(batch, 3), []

    def references(gm, *rest):
        graphs.append(gm)
        return References(gm).run

    monkeypatch.setattr("gdnfuse.backend._inner", references)
    cache, mask = zoo.prefill(ours, batch, "static")
    wanted_cache, _ = zoo.prefill(model, batch, "static")
    run = torch.compile(ours, backend="gdnfuse", fullgraph=True, options={"inner": "eager", "target": "cuda"})
    found, wanted = zoo.decode(run, cache, mask, tokens), zoo.decode(model, wanted_cache, mask, tokens)
    (report,) = gdnfuse.reports()
    assert report.rewritten and report.fused_layers == 1, report.note
    assert zoo.relative(found, wanted) < 1e-5
    for kind in ("recurrent", "conv"):
        assert zoo.relative(zoo.flat_states(cache, kind), zoo.flat_states(wanted_cache, kind)) < 1e-5
    (gm,) = graphs
    targets = [n.target._schema.name.split("::")[1] for n in gm.graph.nodes if is_kernel(n.target)]
    assert ("split_linear" in targets) == ("add_rms_norm" in targets) == (batch > 1)
    assert all(r.status is Status.FIRED for r in report.all_records if r.stage == "lower")
