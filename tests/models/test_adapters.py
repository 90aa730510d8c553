"""Low-rank adapters around the projections, as peft puts them there: whatever is done to them, results are eager's."""

import pytest
import torch

import gdnfuse
from tests.models import zoo
from tests.sweeps import ALL

TARGETS = {
    "GDN projections": ("in_proj_qkv", "in_proj_z", "out_proj"),
    "one gate": ("in_proj_a",),
    "MLP and attention": ("gate_proj", "up_proj", "down_proj", "q_proj", "v_proj"),
}


class LoRA(torch.nn.Module):
    """base(x) + scale·B·A·x of the active adapter, until it is merged into the base weight."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.adapters, self.active, self.merged = base, torch.nn.ModuleDict(), None, False

    def add(self, name, rank=4):
        wide, narrow = self.base_layer.in_features, self.base_layer.out_features
        down, up = torch.nn.Linear(wide, rank, bias=False), torch.nn.Linear(rank, narrow, bias=False)
        self.adapters[name] = torch.nn.Sequential(down, up).requires_grad_(False).to(self.base_layer.weight.dtype)
        self.active = name

    def delta(self):
        down, up = self.adapters[self.active]
        return 0.5 * up.weight @ down.weight

    def merge(self):
        self.base_layer.weight.data += self.delta()
        self.merged = True

    def unmerge(self):
        self.base_layer.weight.data -= self.delta()
        self.merged = False

    def forward(self, x):
        y = self.base_layer(x)
        return y if self.active is None or self.merged else y + 0.5 * self.adapters[self.active](x)


def adapted(targets):
    model = zoo.causal_lm(**zoo.SMALL)
    wrapped = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in targets:
                lora = LoRA(child)
                lora.add("first")
                setattr(parent, name, lora)
                wrapped.append(lora)
    return model.requires_grad_(False), wrapped


CASES = [(where, batch) for where in TARGETS for batch in (1, 2)]


@pytest.mark.parametrize(("where", "batch"), CASES if ALL else [CASES[0], CASES[3]])
def test_adapters_stay_effective(where, batch):
    model, wrapped = adapted(TARGETS[where])
    run = torch.compile(model, backend="gdnfuse", options={"inner": "eager"})
    seen = []

    def right():
        cache, mask = zoo.prefill(model, batch, "static")
        found = zoo.decode(run, cache, mask, zoo.tokens_for(batch, 3))
        cache, mask = zoo.prefill(model, batch, "static")
        wanted = zoo.decode(model, cache, mask, zoo.tokens_for(batch, 3))
        assert zoo.relative(found, wanted) < 1e-5
        seen.append(wanted)

    right()
    assert gdnfuse.reports()[-1].fused_layers == 1
    for lora in wrapped:
        lora.merge()
    right()
    assert gdnfuse.reports()[-1].fused_layers == 1
    for lora in wrapped:
        lora.unmerge()
    right()
    for lora in wrapped:
        lora.add("second", rank=2)
    right()
    for lora in wrapped:
        lora.active = "first"
    right()
    for lora in wrapped:
        lora.active = None
    right()
    # What was done shows: a second adapter and none give something else, and going back is going back.
    first, merged, unmerged, second, again, none = seen
    assert all(zoo.relative(x, first) < 1e-4 for x in (merged, unmerged, again))
    assert all(zoo.relative(x, first) > 1e-3 for x in (second, none))
