"""Linears on e4m3 weights that quantise their input: which do, what is launched for it, and what is said of the others."""

import pytest
import torch
import torch.nn.functional as F

from gdnfuse import formats, kernels
from gdnfuse.dialect import OPS
from gdnfuse.errors import Refused
from gdnfuse.kernels import devices
from gdnfuse.passes import activations, lower, quantized
from gdnfuse.passes.lift import packed_linear as lift
from gdnfuse.rewrite.graph import op_name
from tests.models.zoo import relative
from tests.rewrite.captured import Captured

N, ROWS = 256, 40
dequantize = torch.ops.gdnfuse.dequantize.default


def stored(rows, format="fp8_block128", columns=N):
    data, scale, *more = formats.named(format).quantize(torch.randn(rows, columns) / columns**0.5)
    return tuple(torch.nn.Parameter(t, requires_grad=False) for t in (data, scale, *more))


def plain(rows, columns=N):
    return torch.nn.Parameter((torch.randn(rows, columns) / columns**0.5).bfloat16(), requires_grad=False)


def linears(*weights, format="fp8_block128", read=torch.neg):
    """A function of x and weights with a linear on x for each, and its arguments after x."""
    counts = [len(w) if isinstance(w, tuple) else 1 for w in weights]

    def f(x, *given):
        given, results = list(given), []
        for count in counts:
            data, *more = (given.pop(0) for _ in range(count))
            weight = dequantize(data, more[0], format, x.dtype, more[1:] or None) if more else data
            results.append(read(F.linear(x, weight)))
        return tuple(results)

    return f, [t for w in weights for t in (w if isinstance(w, tuple) else (w,))]


class Made:
    """The graph of f after the pass and the lowering."""

    def __init__(self, f, *args, step=False, target=None):
        self.captured = Captured(f, *args).normalize()
        gm = self.gm = self.captured.gm
        quantized.to_inputs(gm)
        self.captured.apply(lift.LiftPackedLinear()).normalize()
        placeholders = gm.graph.find_nodes(op="placeholder")
        lower.pack_weights(gm, dict(zip(placeholders, self.captured.args, strict=True)))
        self.records = activations.to_e4m3(gm, step, target)
        gm.graph.lint()
        self.ops = [op_name(n) for n in gm.graph.nodes if n.op.startswith("call") and n.users]
        self.lowered = lower.lower(gm, target, ahead=False)
        gm.recompile()

    def run(self):
        packed = [n.meta["gdnfuse_real"] for n in self.gm.graph.find_nodes(op="placeholder")[len(self.captured.args) :]]
        with torch.no_grad():
            return self.gm(*self.captured.args, *packed)

    @property
    def said(self):
        return [(r.chosen, r.reason) for r in self.records]


def x_of(*lead, columns=N, dtype=torch.bfloat16):
    return (3 * torch.randn(*lead, columns)).to(dtype)


def by_hand(x, weight, format):
    """The product of rounded rows with a weight, in float64."""
    columns = 128 if "block" in format else x.shape[-1]
    groups = x.float().unflatten(-1, (-1, columns))
    scale = groups.abs().amax(-1, keepdim=True) / 448
    rounded = ((groups / scale).to(torch.float8_e4m3fn).double() * scale.double()).flatten(-2)
    return rounded @ formats.named(format).dequantize(*weight, torch.float64).T


@pytest.mark.parametrize("format", ["fp8_block128", "fp8_channel", "fp8_tensor"])
def test_siblings_share_one_quantised_input_and_their_readers_read_no_copy(format):
    weights = [stored(256, format), stored(128, format)]
    f, given = linears(*weights, plain(6), format=format)
    x = x_of(1, ROWS)
    made = Made(f, x, *given)
    assert made.said == [("e4m3", "")]
    assert made.ops.count("gdnfuse.quantize_rows") == 1 and "cat" not in made.ops and "gdnfuse.dequantize" not in made.ops
    assert made.ops.count("gdnfuse.fp8_linear") == (2 if format == "fp8_tensor" else 1), "what shares its scales is not packed"
    *found, rest = made.run()
    for y, weight in zip(found, weights, strict=True):
        assert y.dtype == torch.bfloat16 and relative(y, by_hand(x, weight, format).neg()) < 2**-8
    assert torch.equal(rest, F.linear(x, given[-1]).neg())
    assert {(r.rule, r.chosen) for r in made.lowered} == {
        ("quantize_rows", "reference inlined"),
        ("fp8_linear", "reference inlined"),
    }


def test_a_reader_of_a_whole_row_gets_it_and_a_bias_is_added():
    def f(x, data, scale, other, bias):
        y = torch.ops.gdnfuse.packed_linear.default(x, [dequantize(data, scale, "fp8_block128", x.dtype), other])
        return y.neg(), F.linear(x, dequantize(data, scale, "fp8_block128", x.dtype), bias)

    (data, scale), other, bias = stored(130), plain(6), torch.randn(130).bfloat16()
    x = x_of(ROWS)
    made = Made(f, x, data, scale, other, bias)
    assert made.said == [("e4m3", "")] * 2 and made.ops.count("gdnfuse.quantize_rows") == 1
    whole, biased = made.run()
    wanted = by_hand(x, (data, scale), "fp8_block128")
    assert relative(whole, torch.cat([wanted, x.double() @ other.double().T], -1).neg()) < 2**-8
    assert relative(biased, wanted + bias.double()) < 2**-7


@pytest.mark.parametrize(
    ("lead", "columns", "format", "reason"),
    [
        ((1, 32), N, "fp8_block128", "Activations are quantised for more than 32 rows, found 32."),
        ((ROWS,), 136, "fp8_block128", "Activations are quantised in rows of a multiple of 128 columns, found 136."),
        (
            (ROWS,),
            N,
            "int8_channel",
            "Activations are quantised for weights of fp8_block128, fp8_channel, fp8_tensor, found ",
        ),
        (
            (ROWS,),
            N,
            "int4_group64",
            "Activations are quantised for weights of fp8_block128, fp8_channel, fp8_tensor, found ",
        ),
        (
            (ROWS,),
            N,
            "nf4_block64",
            "Activations are quantised for weights of fp8_block128, fp8_channel, fp8_tensor, found ",
        ),
    ],
)
def test_what_stays_as_it_was_has_a_reason(lead, columns, format, reason):
    f, given = linears(stored(256, format, columns), stored(128, format, columns), format=format)
    x = x_of(*lead, columns=columns)
    made = Made(f, x, *given)
    ((chosen, found),) = made.said
    assert chosen == "the model's dtype" and found.startswith(reason) and found.endswith(".")
    assert not any("fp8" in op or "quantize_rows" in op for op in made.ops)
    for y, wanted in zip(made.run(), f(x, *given), strict=True):
        assert relative(y, wanted) < 1e-2


def test_one_sentence_for_a_graph_without_such_linears_and_for_a_step():
    f, given = linears(plain(8), plain(4))
    assert Made(f, x_of(ROWS), *given).said == [
        ("the model's dtype", "Activations are quantised for linears whose weights are e4m3, found none in this graph.")
    ]
    f, given = linears(stored(128))
    made = Made(f, x_of(ROWS), *given, step=True)
    assert made.said == [
        ("the model's dtype", "A step of few rows is as fast as its weights are read, so its activations are not quantised.")
    ]
    assert made.ops.count("gdnfuse.dequantize") == 1


def test_what_is_no_linear_is_named():
    f = lambda x, data, scale: x @ dequantize(data, scale, "fp8_block128", x.dtype).T  # noqa: E731
    made = Made(f, x_of(ROWS), *stored(128))
    ((chosen, reason),) = made.said
    assert chosen == "the model's dtype" and reason.startswith("Activations are quantised for linears, found ")


class Kernel:
    """Stands in for the kernel."""

    name, op, by, early, measured, arg_names = "fp8_linear", OPS["fp8_linear"].overload, "cuBLAS or triton", (), "", ()

    def __init__(self, refuses=""):
        self.refuses, self.given = refuses, []

    def supports(self, *args, **arguments):
        if self.refuses:
            raise Refused(self.refuses)
        self.given.append(args or tuple(arguments.values()))

    def plan(self, arguments):
        return []


@pytest.mark.parametrize("refuses", ["", "Tensor cores must multiply e4m3, found none."])
def test_on_a_gpu_it_is_asked_before_anything_is_quantised(refuses, monkeypatch):
    kernel = Kernel(refuses)
    monkeypatch.setattr(kernels, "implementations", lambda: {"fp8_linear": kernel})
    f, given = linears(stored(256), stored(128), plain(6))
    made = Made(f, x_of(1, ROWS), *given, target="cuda")
    assert made.said == [("the model's dtype", refuses) if refuses else ("e4m3", "")]
    assert ("gdnfuse.fp8_linear" in made.ops) == (not refuses)
    if not refuses:
        data, scales, weight, scale, format, dtype = kernel.given[0]
        assert (data.shape, data.dtype, scales.shape) == ((1, ROWS, N), torch.float8_e4m3fn, (2, ROWS))
        assert (weight.shape, scale.shape, format, dtype) == ((384, N), (3, 2), "fp8_block128", torch.bfloat16)
        assert {r.rule: r.chosen for r in made.lowered} == {"quantize_rows": "reference inlined", "fp8_linear": kernel.by}


def test_without_a_gpu_a_report_assumes_one_that_has_such_tensor_cores(monkeypatch):
    f, given = linears(stored(256))
    assert Made(f, x_of(1, ROWS), *given, target="cuda").said == [("e4m3", "")]
    monkeypatch.setattr(devices, "of", lambda device: devices.H200._replace(widens_e4m3=False))
    ((chosen, reason),) = Made(f, x_of(1, ROWS), *given, target="cuda").said
    assert chosen == "the model's dtype" and reason.endswith("8.9 on, found an older GPU.")


@pytest.mark.parametrize("first", [50, 64])
def test_one_graph_is_for_all_lengths(first):
    """Quantising adds no guards on the number of rows."""
    f, given = linears(stored(256), stored(128), plain(6))
    made = []

    def backend(gm, inputs):
        made.append(gm)
        return compiled(gm)

    torch._dynamo.reset()
    run = torch.compile(f, backend=backend)
    for rows in (first, 65, 96, 33):
        torch._dynamo.mark_dynamic(x := x_of(1, rows), 1)
        with torch.no_grad():
            found = run(x, *given)
        for y, w in zip(found[:2], (given[:2], given[2:4]), strict=True):
            assert relative(y, by_hand(x, w, "fp8_block128").neg()) < 2**-8
    assert len(made) == 1
    torch._dynamo.reset()


def compiled(gm):
    """A dynamic graph after the pass."""
    quantized.to_inputs(gm)
    records = activations.to_e4m3(gm, False, None)
    assert [r.chosen for r in records] == ["e4m3"] * 2
    lower.lower(gm, None, ahead=False)
    gm.recompile()
    return gm
