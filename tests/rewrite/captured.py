"""Dynamo's graph of a small function, with the arguments it was called with, to run passes on and compare before with after."""

from __future__ import annotations

import torch

from gdnfuse.passes import normalize
from gdnfuse.pipeline import original
from gdnfuse.rewrite.driver import Outcome, run_rules


class Captured:
    """`before` is the graph as Dynamo made it, `gm` the copy that passes work on."""

    def __init__(self, fn, *args, dynamic=None):
        graphs, calls = [], []

        def backend(gm, example_inputs):
            graphs.append(gm)

            def run(*given):
                calls.append(copied(given))
                return gm(*given)

            return run

        with torch.no_grad():
            torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
        (self.before,), (self.args,) = graphs, calls
        self.gm = original(self.before)
        self.outcome = Outcome()

    def normalize(self):
        normalize.normalize(self.gm)
        normalize.check(self.gm)
        return self

    def apply(self, *rules):
        run_rules(self.gm, list(rules), self.outcome)
        self.gm.graph.lint()
        return self

    @property
    def record(self):
        """The only record."""
        (record,) = self.outcome.records
        return record

    def results(self, gm):
        """Every output and every argument after the call."""
        gm.recompile()
        args = copied(self.args)
        with torch.no_grad():
            outputs = gm(*args)
        return [x for x in (*outputs, *args) if isinstance(x, torch.Tensor)]

    def compare(self, check):
        for found, wanted in zip(self.results(self.gm), self.results(self.before), strict=True):
            assert found.dtype == wanted.dtype and found.shape == wanted.shape
            check(found, wanted)
        return self

    def equal(self):
        """No value changed, not even its rounding."""
        return self.compare(lambda found, wanted: torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True))

    def close(self):
        return self.compare(lambda found, wanted: torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5))

    def ops(self):
        from gdnfuse.rewrite.graph import calls, op_name

        return [op_name(n) for n in calls(self.gm)]


def copied(args):
    return [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
