"""What layers of a step read is made once, and the step gives and leaves what it did, to the bit."""

import pytest
import torch

import gdnfuse
from gdnfuse.passes import step_inputs
from gdnfuse.passes.survey import CHOSEN
from gdnfuse.rewrite.graph import op_name
from gdnfuse.rewrite.spec import Spec
from tests.models import zoo
from tests.passes.test_verify_step import traced
from tests.rewrite.captured import Captured


def layers(lengths, caches, x, *, T=3, before=lambda lengths: 0, behind=lambda lengths: 0):
    x = x + before(lengths)
    for length, cache in zip(lengths, caches, strict=True):
        position = torch.arange(T, device=x.device) + length
        length.add_(T)
        cache.index_copy_(0, position, x)
        x = x + cache.sum(0)
    return (x + behind(lengths),)


def arguments(T=3):
    torch.manual_seed(0)
    return [torch.tensor(n) for n in (2, 5, 4)], [torch.randn(24, 4) for _ in range(3)], torch.randn(T, 4)


def joined(function, *args):
    g = Captured(function, *args).normalize()
    spec = Spec(g.gm)
    step_inputs.join(g.gm)
    g.gm.graph.lint()
    spec.check(g.gm)
    return g.equal()


@pytest.mark.parametrize("T", [1, 3, 8])
def test_positions_and_lengths_of_all_layers_are_one_each(T):
    found = joined(lambda *args: layers(*args, T=T), *arguments(T)).ops()
    assert [found.count(name) for name in ("arange", "stack", "_foreach_add_", "add_", "index_copy_")] == [1, 1, 1, 0, 3]


def test_lengths_that_others_read_before_are_joined_and_those_read_behind_are_not():
    found = joined(lambda *args: layers(*args, before=lambda lengths: lengths[0] * 2), *arguments()).ops()
    assert (found.count("stack"), found.count("_foreach_add_"), found.count("add_")) == (1, 1, 0)
    found = joined(lambda *args: layers(*args, behind=lambda lengths: lengths[1] * 2), *arguments()).ops()
    assert (found.count("stack"), found.count("_foreach_add_"), found.count("add_")) == (1, 1, 1)


def test_what_is_no_such_length_or_position_is_left():
    def twice(lengths, caches, x):
        for length in lengths:
            length.add_(1)
        return layers(lengths, caches, x)

    def from_one(lengths, caches, x):
        found = [torch.arange(1, 4) + length for length in lengths]
        for length in lengths:
            length.mul_(2)
        return tuple(found)

    def only_one(lengths, caches, x):
        return layers(lengths[:1], caches[:1], x)

    for function in (twice, from_one, only_one):
        found = joined(function, *arguments()).ops()
        assert not {"stack", "_foreach_add_"} & {*found}
    _, *rest = arguments()
    found = joined(lambda whole, caches, x: layers(whole.unbind(), caches, x), torch.tensor([2, 5, 4]), *rest).ops()
    assert not {"stack", "_foreach_add_"} & {*found}


def test_what_several_kernels_read_has_a_layout_and_what_one_reads_or_somebody_writes_has_not():
    def function(x, y):
        shared, single, written = x > 0, x + 1, x * 2
        written.add_(1)
        parts = [torch.where(shared.expand(2, 4), t, t) for t in (x, y)]
        return *parts, y.mul(single), written.sub(x), written.sub(y), shared.t().logical_not()

    g = Captured(function, torch.randn(1, 4).expand(2, 4).contiguous(), torch.randn(2, 4)).normalize()
    for node in g.gm.graph.nodes:
        if op_name(node) in ("where", "mul", "sub", "logical_not"):
            node.meta[CHOSEN] = "triton"
    step_inputs.keep(g.gm)
    g.gm.graph.lint()
    g.equal()
    kept = [op_name(n.args[0]) for n in g.gm.graph.nodes if op_name(n) == "as_strided"]
    assert kept == ["gt"]


def test_a_step_of_a_model_has_one_kernel_for_its_masks():
    gdnfuse.capture.install()
    kinds = ["linear_attention", "full_attention", "full_attention"]
    model = zoo.causal_lm(num_hidden_layers=3, layer_types=kinds, hidden_size=128).bfloat16()
    cache = gdnfuse.RollbackCache(model, 32)
    with torch.no_grad():
        model(zoo.prompt(1, 6)[0], **zoo.held(cache))
    cache.activate_past_recording()
    report = traced(model, cache, zoo.tokens_for(1, 5))
    ops = [op.op for block in report.blocks for op in report.structures[block.after]]
    assert ops.count("attention_decode") == 2 and ops.count("_foreach_add_") == 1 and "add_" not in ops
    assert ops.count("stack") == 1 and "index_copy_" not in ops and "as_strided" in ops
