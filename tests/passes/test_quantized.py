"""Linears of quantised weights: which become one, in what order, what is packed, and what a kernel is given."""

import pytest
import torch
import torch.nn.functional as F

from gdnfuse import formats, kernels
from gdnfuse.dialect import OPS
from gdnfuse.dialect import dequantize as dequantize_op
from gdnfuse.errors import Refused
from gdnfuse.passes import fuse, lift, lower, quantized
from gdnfuse.report.records import Status
from gdnfuse.rewrite.graph import op_name, value
from tests.models.zoo import by_loop, relative
from tests.rewrite.captured import Captured, copied

N = 136
dequantize = torch.ops.gdnfuse.dequantize.default


def stored(rows, format="fp8_block128", columns=N):
    data, scale = formats.named(format).quantize(torch.randn(rows, columns) / columns**0.5)
    return torch.nn.Parameter(data, requires_grad=False), torch.nn.Parameter(scale, requires_grad=False)


def plain(rows, columns=N):
    return torch.nn.Parameter((torch.randn(rows, columns) / columns**0.5).bfloat16(), requires_grad=False)


def linears(*weights, format="fp8_block128"):
    """A function of x and weights, each linear at once followed by what reads it, and its arguments."""
    flat = [t for w in weights for t in (w if isinstance(w, tuple) else (w,))]
    pairs = [isinstance(w, tuple) for w in weights]

    def f(x, *given):
        given, results = list(given), []
        for pair in pairs:
            w = dequantize(given.pop(0), given.pop(0), format, x.dtype) if pair else given.pop(0)
            results.append(F.linear(x, w).sin())
        return tuple(results)

    return f, flat


class Made:
    """The graph of f behind every pass, on whatever kernels there are."""

    def __init__(self, f, *args, target=None, linears=True):
        self.captured = Captured(f, *args).normalize()
        self.gm = self.captured.gm
        quantized.to_inputs(self.gm)
        for rules in (lift.RULES, fuse.RULES):
            self.captured.apply(*rules).normalize()
        self.lifted = [n for n in self.gm.graph.nodes if op_name(n) == "gdnfuse.packed_linear"]
        self.widths = [[value(w).shape[0] for w in n.args[1]] for n in self.lifted]
        self.kinds = [["fp8" if quantized.is_quantized(w) else "plain" for w in n.args[1]] for n in self.lifted]
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        self.packed = lower.pack_weights(self.gm, dict(zip(placeholders, self.captured.args, strict=True)))
        self.records = lower.lower(self.gm, target, linears=linears, ahead=False)
        self.gm.graph.lint()
        self.gm.recompile()

    def run(self, args):
        packed = [n.meta["gdnfuse_real"] for n in self.gm.graph.find_nodes(op="placeholder")[len(self.captured.args) :]]
        with torch.no_grad():
            return self.gm(*args, *packed)

    def right(self):
        """Values are those of the graph as it came, but for the order in which a row is added up."""
        for found, wanted in zip(self.run(copied(self.captured.args)), self.captured.results(self.captured.before), strict=False):
            assert found.dtype == wanted.dtype and relative(found, wanted) < 1e-2
        return self


def x_of(*lead, columns=N):
    return torch.randn(*lead, columns).bfloat16()


def test_quantised_siblings_come_first_and_each_kind_is_one_weight():
    parts = plain(5), stored(256), plain(3), stored(128), stored(40)
    f, given = linears(*parts)
    made = Made(f, x_of(2, 1), *given)
    assert made.kinds == [["fp8", "fp8", "fp8", "plain", "plain"]] and made.widths == [[256, 128, 40, 5, 3]]
    data, scale, rest = (n.meta["gdnfuse_real"] for n in made.gm.graph.find_nodes(op="placeholder")[-3:])
    assert data.shape == (424, N) and data.dtype == torch.float8_e4m3fn and scale.shape == (4, 2) and rest.shape == (8, N)
    # The Parameters are the buffers' rows.
    for (d, s), buffer, blocks in zip(
        (made.captured.args[i : i + 2] for i in (2, 5, 7)), data.split([256, 128, 40]), scale.split([2, 1, 1]), strict=True
    ):
        assert d.data_ptr() == buffer.data_ptr() and s.data_ptr() == blocks.data_ptr()
    for (d, s), at in zip((parts[1], parts[3], parts[4]), (2, 5, 7), strict=True):
        now = made.captured.args[at : at + 2]
        assert torch.equal(d.view(torch.uint8), now[0].view(torch.uint8)) and torch.equal(s, now[1])
    made.right()
    assert [r.chosen for r in made.records if r.rule == "dequantize"] == ["reference inlined"]


def test_weights_whose_blocks_are_not_filled_stay_several():
    f, given = linears(stored(40), stored(128), plain(3))
    made = Made(f, x_of(1, 1), *given).right()
    assert made.kinds == [["fp8", "fp8", "plain"]]
    assert not made.packed, "one plain weight has nothing to be packed with"
    assert sum(r.rule == "dequantize" for r in made.records) == 2


def test_weights_with_one_scale_stay_several():
    f, given = linears(stored(40, "fp8_tensor"), stored(24, "fp8_tensor"), format="fp8_tensor")
    made = Made(f, x_of(1, 1), *given).right()
    assert made.kinds == [["fp8", "fp8"]] and not made.packed


def test_a_dequantised_weight_stands_where_it_is_read():
    def f(x, a, a_scale, b, b_scale):
        wa, wb = dequantize(a, a_scale, "fp8_block128", x.dtype), dequantize(b, b_scale, "fp8_block128", x.dtype)
        y = F.linear(x, wa).sin()
        return F.linear(y, wb), F.linear(y.cos(), dequantize(b, b_scale, "fp8_block128", x.dtype))

    made = Made(f, x_of(40, 1), *stored(N), *stored(72)).right()
    names = [op_name(n) for n in made.gm.graph.nodes if n.op == "call_function" and "sin" not in op_name(n)]
    found = [n.target for n in made.gm.graph.nodes if n.target is dequantize_op.op.reference]
    assert len(found) == 2, "what is dequantised twice is dequantised once"
    order = [n for n in made.gm.graph.nodes if n.op == "call_function" or n.op == "call_method"]
    for n in order:
        if n.target is dequantize_op.op.reference:
            assert order[order.index(n) + 1] is min(n.users), names


def test_a_weight_that_is_written_is_dequantised_where_it_was():
    def f(x, data, scale):
        first = F.linear(x, dequantize(data, scale, "fp8_block128", x.dtype))
        scale.mul_(2)
        return first, F.linear(x, dequantize(data, scale, "fp8_block128", x.dtype))

    args = x_of(2, 1), *stored(128)
    made = Made(f, *args)
    first, second = made.run(copied(made.captured.args))
    assert relative(second, 2 * first.double()) < 1e-2
    assert {r.status for r in made.captured.outcome.records if r.rule == "packed_linear"} == {Status.REFUSED}


def test_siblings_of_two_formats_stay_apart():
    def f(x, a, a_scale, b, b_scale):
        first = F.linear(x, dequantize(a, a_scale, "fp8_block128", x.dtype)).sin()
        return first, F.linear(x, dequantize(b, b_scale, "fp8_tensor", x.dtype)).sin()

    made = Made(f, x_of(1, 1), *stored(128), *stored(24, "fp8_tensor")).right()
    (record,) = [r for r in made.captured.outcome.records if r.rule == "packed_linear"]
    assert record.reason == "Siblings that are quantised must be of one format, found fp8_block128 and fp8_tensor."


class Kernel:
    """Stands in for a kernel of ours, whose op is the dialect's."""

    by, early, measured = "triton", (), ""

    def __init__(self, name, reads=True, refuses=""):
        self.name, self.op, self.refuses, self.given = name, OPS[name].overload, refuses, []
        self.arg_names = tuple(a for a in OPS[name].arg_names if reads or a not in lower.QUANTIZED)

    def supports(self, **arguments):
        assert arguments.keys() <= set(self.arg_names)
        if self.refuses:
            raise Refused(self.refuses)
        self.given.append(arguments)

    def plan(self, arguments):
        return []


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Lowering for a GPU whose kernels are these."""

    def with_kernels(*found):
        monkeypatch.setattr(kernels, "implementations", lambda: {k.name: k for k in found})

    return with_kernels


def targets(made):
    return [n.target for n in made.gm.graph.nodes if n.op == "call_function"]


def test_a_kernel_is_given_data_and_scale(on_a_gpu):
    kernel = Kernel("fused_linear")
    on_a_gpu(kernel)
    f, given = linears(stored(256), plain(5), stored(128))
    made = Made(f, x_of(1, 1), *given, target="cuda")
    (arguments,) = kernel.given
    assert [tuple(w.shape) for w in arguments["weights"]] == [(384, N), (5, N)] and arguments["format"] == "fp8_block128"
    assert [tuple(s.shape) for s in arguments["scales"]] == [(3, 2)]
    (record,) = made.records
    assert (record.rule, record.chosen) == ("packed_linear", "triton"), "and nothing is left that dequantises"
    made.right()


def test_one_weight_of_a_step_is_a_kernels_too(on_a_gpu):
    kernel = Kernel("fused_linear")
    on_a_gpu(kernel)
    f, given = linears(stored(256))
    made = Made(f, x_of(1, 1), *given, target="cuda").right()
    assert [r.chosen for r in made.records] == ["triton"] and len(kernel.given[0]["scales"]) == 1


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (Kernel("fused_linear", reads=False), "The kernel of fused_linear must be given plain weights, found fp8_block128."),
        (Kernel("fused_linear", refuses="No."), "No."),
    ],
    ids=["reads plain ones alone", "refuses"],
)
def test_where_no_kernel_reads_it_all_is_a_compilers(on_a_gpu, kernel, reason):
    on_a_gpu(kernel)
    f, given = linears(stored(256), plain(5))
    made = Made(f, x_of(1, 1), *given, target="cuda").right()
    assert {r.rule: (r.chosen, r.reason) for r in made.records} == {
        "packed_linear": ("reference inlined", reason),
        "dequantize": ("reference inlined", "No kernel reads this weight of fp8_block128 as it is stored."),
    }


def test_plain_weights_are_given_as_ever(on_a_gpu):
    kernel = Kernel("fused_linear", reads=False)
    on_a_gpu(kernel)
    f, given = linears(plain(256), plain(5))
    Made(f, x_of(1, 1), *given, target="cuda").right()
    assert kernel.given and not kernel.given[0].keys() & set(lower.QUANTIZED)


def test_a_linear_of_several_rows_is_split_where_that_kernel_reads_it(on_a_gpu, monkeypatch):
    monkeypatch.setattr(lower, "split", lambda *sizes: 2)
    f, given = linears(stored(256))
    for split, taken in ((Kernel("split_linear"), "split_linear"), (Kernel("split_linear", reads=False), "fused_linear")):
        whole = Kernel("fused_linear")
        on_a_gpu(split, whole)
        made = Made(f, x_of(4, 1), *given, target="cuda").right()
        assert OPS[taken].overload in targets(made) and [r.chosen for r in made.records] == ["triton"]


def test_a_weight_of_another_dtype_than_the_kernels_is_a_compilers(on_a_gpu):
    """What the op is given must say what the weight's dtype is."""
    on_a_gpu(Kernel("fused_linear"))

    def f(x, data, scale):
        y = torch.ops.gdnfuse.fused_linear.default(x, [dequantize(data, scale, "fp8_block128", torch.bfloat16)])
        return y.sin()

    made = Made(f, torch.randn(1, 1, N), *stored(128), target="cuda")
    assert "A quantised weight must be used in torch.float32, as kernels make it here, found torch.bfloat16." in {
        r.reason for r in made.records
    }
    made.right()


def test_a_kernel_of_an_op_with_scales_has_the_dialects_meaning():
    """As a gated norm's x may be in float32, the weight's dtype comes from what else is there."""
    examples = ((args, kwargs) for args, kwargs in OPS["fused_linear"].examples() if kwargs.get("format") == "fp8_block128")
    ((x, (data,)), kwargs), *_ = (e for e in examples if e[0][0].dtype == torch.float32 and e[1].get("residual") is not None)
    args = x, [data]
    assert kwargs["residual"].dtype == torch.bfloat16
    found = OPS["fused_linear"].overload(*args, **kwargs)
    weight = by_loop(data, kwargs["scales"][0]).bfloat16()
    plain_kwargs = {k: v for k, v in kwargs.items() if k not in lower.QUANTIZED}
    assert torch.equal(found, OPS["fused_linear"].overload(x, [weight], **plain_kwargs))
