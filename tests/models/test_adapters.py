"""Low-rank adapters around the projections, as peft puts them there: whatever is done to them, results are eager's."""

import copy

import pytest
import torch

import gdnfuse
from gdnfuse.report.records import Status
from tests.models import zoo
from tests.sweeps import ALL

TARGETS = {
    "GDN projections": ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"),
    "one gate": ("in_proj_a",),
    "MLP and attention": ("gate_proj", "up_proj", "down_proj", "q_proj", "v_proj"),
}


class LoRA(torch.nn.Module):
    """base(x) + scale·B·A·x of each active adapter, which may have another dtype, until they are merged into the base weight."""

    def __init__(self, base, dtype=None):
        super().__init__()
        self.base_layer, self.adapters, self.active, self.merged = base, torch.nn.ModuleDict(), (), False
        self.dtype = dtype or base.weight.dtype

    def add(self, name, rank=4, beside=False):
        wide, narrow = self.base_layer.in_features, self.base_layer.out_features
        down, up = torch.nn.Linear(wide, rank, bias=False), torch.nn.Linear(rank, narrow, bias=False)
        layers = torch.nn.Sequential(torch.nn.Dropout(0.1), down, up).eval()
        self.adapters[name] = layers.requires_grad_(False).to(self.dtype)
        self.active = (*self.active, name) if beside else (name,)

    def delta(self):
        deltas = [0.5 * up.weight @ down.weight for _, down, up in (self.adapters[name] for name in self.active)]
        return sum(deltas).to(self.base_layer.weight.dtype)

    def merge(self):
        self.base_layer.weight.data += self.delta()
        self.merged = True

    def unmerge(self):
        self.base_layer.weight.data -= self.delta()
        self.merged = False

    def forward(self, x):
        y = result = self.base_layer(x)
        for name in () if self.merged else self.active:
            result = result + self.adapters[name](x.to(self.dtype)) * 0.5
        return result.to(y.dtype)


def adapted(targets, dtype=None):
    model = zoo.causal_lm(**zoo.SMALL)
    wrapped = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in targets:
                lora = LoRA(child, dtype)
                lora.add("first")
                setattr(parent, name, lora)
                wrapped.append(lora)
    return model.requires_grad_(False), wrapped


CASES = [(where, batch) for where in TARGETS for batch in (1, 2)]


@pytest.mark.parametrize(("where", "batch"), CASES if ALL else [CASES[0], CASES[3]])
def test_adapters_stay_effective(where, batch):
    # Those of GDN's projections have a wider dtype, as peft's on bfloat16; of MLP and attention two are active at once.
    model, wrapped = adapted(TARGETS[where], torch.float64 if where == "GDN projections" else None)
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
    found = {
        rule: [r.status for r in gdnfuse.reports()[-1].all_records if r.rule == rule] for rule in ("lora_linear", "mixer_linears")
    }
    assert found["lora_linear"] == [Status.FIRED] * {"GDN projections": 2, "one gate": 1, "MLP and attention": 5}[where]
    assert found["mixer_linears"] == [Status.FIRED] * (batch == 1)
    for lora in wrapped:
        lora.merge()
    right()
    assert gdnfuse.reports()[-1].fused_layers == 1
    for lora in wrapped:
        lora.unmerge()
    right()
    for lora in wrapped:
        lora.add("second", rank=2, beside=where == "MLP and attention")
    right()
    for lora in wrapped:
        lora.active = ("first",)
    right()
    for lora in wrapped:
        lora.active = ()
    right()
    # What was done shows: a second adapter and none give something else, and going back is going back.
    first, merged, unmerged, second, again, none = seen
    assert all(zoo.relative(x, first) < 1e-4 for x in (merged, unmerged, again))
    assert all(zoo.relative(x, first) > 1e-3 for x in (second, none))


@torch.no_grad()
def test_adapters_are_fused_in_a_short_step():
    """Of several tokens, as of several sequences: float64 adapters on all projections, two of the MLP's active at once."""
    model, wrapped = adapted({name for names in TARGETS.values() for name in names}, torch.float64)
    for lora in wrapped:
        if lora.base_layer.out_features == zoo.text_config(model).intermediate_size:
            lora.add("second", rank=2, beside=True)
    tokens, plain = zoo.tokens_for(2, 3), copy.deepcopy(model)
    gdnfuse.compile(model, inner="eager", strict=True)
    caches = [zoo.prefill(plain, 2, "dynamic")[0] for _ in "12"]
    found, wanted = (m(tokens, **zoo.held(cache)).logits for m, cache in zip((model, plain), caches, strict=True))
    assert zoo.relative(found, wanted) < 1e-5
    report = gdnfuse.reports()[-1]
    # Linear attention's two inputs, full attention's one, whose o_proj has none, and two of each MLP.
    assert report.phase == "short" and report.fused_layers == 1
    assert [r.status for r in report.all_records if r.rule == "lora_linear"] == [Status.FIRED] * 7
