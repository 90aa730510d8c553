"""CUDA graphs of steps on a CPU: what stands in for a graph runs the step again, and leaves nothing but what kernels write."""

from __future__ import annotations

import torch

from gdnfuse import compat
from gdnfuse.generation.mtp import Tap
from gdnfuse.generation.recorded import Recorded


def tensors(cache):
    """All tensors that the layers of a cache hold."""
    found = []
    for layer in cache.layers:
        for x in vars(layer).values():
            found += [y for y in (x.values() if isinstance(x, dict) else [x]) if isinstance(y, torch.Tensor)]
    return found


class StandIn:
    def __init__(self, model, cache):
        norm = getattr(model.get_decoder(), "norm", None) if isinstance(model, torch.nn.Module) else None
        hooks = () if norm is None else compat.hooks_of(norm).values()
        self.tap = next((hook for hook in hooks if isinstance(hook, Tap)), None)
        self.cache, self.replays = cache, 0

    def record(self, fn):
        held = [(x, x.clone()) for x in tensors(self.cache)]
        self.fn, self.out = fn, fn()
        self.hidden = getattr(self.tap, "hidden", None)
        for x, before in held:
            x.copy_(before)
        for x in self._results():
            x.fill_(torch.nan)  # they come with the first replay
        return self.out

    def _results(self):
        return [self.out.logits] + ([] if self.hidden is None else [self.hidden])

    def replay(self):
        self.replays += 1
        layers, before = self.cache.layers, [dict(vars(layer)) for layer in self.cache.layers]
        logits = self.fn().logits
        for x, new in zip(self._results(), [logits, getattr(self.tap, "hidden", None)], strict=False):
            x.copy_(new)
        if self.tap is not None:
            self.tap.hidden = None
        self.after = [{name: x for name, x in vars(layer).items() if isinstance(x, int | bool)} for layer in layers]
        for layer, known in zip(layers, before, strict=True):
            vars(layer).clear()
            vars(layer).update(known)


class Repeated(Recorded):
    """Recorded steps of a model that is not compiled."""

    def graph(self, device):
        self.made.append(StandIn(self._call, self._cache))
        return self.made[-1]

    def __call__(self, **arguments):
        out = super().__call__(**arguments)
        step = next((s for s in self._steps.values() if s is not None and s._out is out), None)
        if step is not None:  # Python holds what it would hold behind the step itself
            for layer, after in zip(self._cache.layers, step._graph.after, strict=True):
                assert {name: x for name, x in vars(layer).items() if isinstance(x, int | bool)} == after
        return out


def repeat_steps(monkeypatch):
    """Have generations in which only known code runs repeat their steps. Returns what stands in for their graphs."""
    from gdnfuse.generation import proposers, speculation

    made = []

    def steps(model, cache):
        found = Repeated(model, cache)
        found.made = made
        return found

    for module in (speculation, proposers):
        monkeypatch.setattr(module, "recorded_steps", steps)
    return made
