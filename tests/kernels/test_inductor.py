"""Inductor's code calls the function behind an op of ours; on a CPU, with the references in the kernels' place."""

import kernel_cases
import pytest
import torch
import torch.utils._pytree as pytree
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.lowering import lowerings

from gdnfuse import compat
from gdnfuse.dialect import OPS
from gdnfuse.kernels import implementations
from gdnfuse.kernels.launch.inductor import REPLAYED, announce

CASES = {
    "fused_linear": kernel_cases.linear(24, 40, norm=True, residual=True),
    "split_linear": kernel_cases.split(24, 64, 2, kernel_cases.F32, (3, 1)),
    "add_rms_norm": kernel_cases.added(48, lead=(3, 1)),
    "in_proj_conv": kernel_cases.in_proj(24, 40, 16),
    "mixer_decode": kernel_cases.mixer(2, 1, 2, 16, 16),
}


GONE = [("add_rms_norm", "known_to_inductor"), ("add_rms_norm", "called_by_inductor")]


@pytest.mark.parametrize(("name", "gone"), [*((name, "") for name in CASES), *GONE])
def test_inductor_calls_past_the_dispatcher(name, gone, monkeypatch):
    """And through it where Inductor is another one inside."""
    op, meaning = implementations()[name].op, OPS[name]
    dispatched, direct = [], []

    def reference(to):
        def call(*args, overlap=False, **kwargs):
            to.append(overlap)
            return meaning.reference(*args, **kwargs)

        return call

    def backend(gm, inputs):
        announce(gm)
        return compile_fx(gm, inputs)

    def function(first, *rest):
        results = op(first + 1, *rest, overlap=True)
        return tuple(r * 2 for r in kernel_cases.tensors(results))

    args, _ = CASES[name]()
    copies = lambda: pytree.tree_map_only(torch.Tensor, torch.clone, args)  # noqa: E731
    monkeypatch.setattr(op, REPLAYED, reference(direct))
    if gone:
        monkeypatch.delitem(lowerings, op, raising=False)
        monkeypatch.setattr(compat.ENTRIES[gone], "paths", ["torch._inductor:nothing"])
        compat.forget()
    torch._dynamo.reset()
    # Code that another version left in Inductor's cache calls what that version did.
    uncached = inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False)
    with uncached[0], uncached[1], torch.library._scoped_library("gdnfuse_triton", "FRAGMENT") as library, torch.no_grad():
        library.impl(name, reference(dispatched), "CPU")
        theirs = copies()
        wanted = function(*theirs)
        assert dispatched == [True]
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        for calls in (1, 2):
            ours = copies()
            got = compiled(*ours)
            assert (direct, dispatched) == (([], [True] * (1 + calls)) if gone else ([True] * calls, [True]))
            for mine, want in zip(pytree.tree_leaves((got, ours)), pytree.tree_leaves((wanted, theirs)), strict=True):
                if isinstance(want, torch.Tensor):
                    torch.testing.assert_close(mine, want)
        if gone:
            monkeypatch.undo()
            lowerings.pop(op, None)
            compat.forget()
            return
        # Code from a cache, run by a version that has no such function, means the op.
        monkeypatch.delattr(op, REPLAYED)
        compiled(*copies())
        assert (direct, dispatched) == ([True] * 2, [True] * 2)
