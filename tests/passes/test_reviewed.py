"""Graphs around a layer written by hand that were rewritten wrongly, without a word, until somebody read the rules."""

import copy
import importlib
import inspect
import textwrap
from pathlib import Path

import pytest
import torch

import gdnfuse

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture
def handwritten(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch.compiler.reset()
    gdnfuse.clear_reports()
    torch.manual_seed(0)
    return importlib.import_module("handwritten_layer")


def variant(handwritten, old, new, **names):
    """The layer with a piece of its forward replaced."""
    source = textwrap.dedent(inspect.getsource(handwritten.Memory.forward))
    assert old in source
    scope = vars(handwritten) | names
    exec(source.replace(old, new), scope)
    return type("Variant", (handwritten.Memory,), {"forward": scope["forward"]})()


@torch.no_grad()
def compare(module, empty, batch):
    """Three steps, compiled and eager; the report."""
    theirs = copy.deepcopy(module)
    step = torch.compile(module, backend="gdnfuse", fullgraph=True, options={"inner": "eager"})
    ours_at, theirs_at = empty(batch), empty(batch)
    for _ in range(3):
        x = torch.randn(batch, 64)
        pairs = zip(_tuple(step(x, *ours_at)), _tuple(theirs(x, *theirs_at)), strict=True)
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            assert found.stride() == wanted.stride()
    torch.testing.assert_close(ours_at, theirs_at, rtol=1e-5, atol=1e-5)
    return gdnfuse.reports()[-1]


def _tuple(out):
    return out if isinstance(out, tuple) else (out,)


def swap(x):
    """Sequences in another order, by slices that change nothing of two sequences, nor of three."""
    return torch.cat([x[3:], x[:3]], 0)


@pytest.mark.parametrize("batch", [4, 6])
@pytest.mark.parametrize("old", ["F.linear(x, self.inner)", "gate.view_as(loud)"])
def test_sequences_that_change_places(old, batch, handwritten):
    layer = variant(handwritten, old, f"swap({old})", swap=swap)
    report = compare(layer, layer.empty, batch)
    (record,) = [r for r in report.all_records if r.rule == "mixer_decode" and r.reason]
    assert record.reason.startswith("Expected the same columns of every sequence, each in its place")


@pytest.mark.parametrize("batch", [1, 3])
def test_one_projection_for_q_and_k(batch, handwritten):
    """The mixer reads its columns twice; in_proj would have to write them to two places."""
    old = "q, k, v = mixed.unflatten(-1, (HEADS, -1)).split(HEAD, -1)"
    layer = variant(handwritten, old, old.replace("q, k, v", "q, _, v") + "; k = q")
    report = compare(layer, layer.empty, batch)
    reasons = [r.reason for r in report.all_records if r.rule == "mixer_linears"]
    wanted = "Parts must share no columns for in_proj to concatenate them, found two that do."
    assert report.fused_layers == 1 and reasons == ([wanted] if batch == 1 else [])


class Around(torch.nn.Module):
    def __init__(self, handwritten, after):
        super().__init__()
        self.memory, self.after = handwritten.Memory(), after
        self.a, self.b, self.c = (torch.nn.Linear(64, 8, bias=False) for _ in range(3))

    def forward(self, x, *states):
        return self.after(self, self.memory(x, *states))


def written(m, y):
    q, k = m.a(y), m.b(y)
    c = torch.cat([q, k], -1)
    c.mul_(2.0)
    return c, q + 1


def columns_written(m, y):
    c = torch.cat([y.narrow(-1, 0, 8), y.narrow(-1, 8, 8)], -1)
    c.mul_(2.0)
    return c, y + 0


def row_written(m, y):
    c = torch.cat([y.narrow(-1, 0, 8), y.narrow(-1, 8, 8)], -1)
    y.mul_(2.0)
    return c + 0, y + 0


def in_place(m, y):
    q, k = m.a(y), m.b(y)
    return torch.nn.functional.relu(torch.cat([q, k], -1), inplace=True), q + 1


def returned(m, y):
    q, k, v = m.a(y), m.b(y), m.c(y)
    return torch.cat([q, k], -1), v + 0, q + 0


@pytest.mark.parametrize("after", [written, columns_written, row_written, in_place, returned], ids=lambda f: f.__name__)
def test_columns_put_together_are_memory_of_their_own(after, handwritten):
    module = Around(handwritten, after)
    assert compare(module, module.memory.empty, 2).fused_layers == 1
