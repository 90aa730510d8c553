"""device_map: hooks of accelerate inside a device's layers go, those at borders are traced, and graphs are cut between devices.

Here there is one CPU. So the devices of a model are names here, which nodes have by the module that they were traced in, and what
goes from one to another is a copy. `tests/passes/test_devices.py` cuts graphs of fake tensors on two GPUs.
"""

from __future__ import annotations

import copy

import pytest
import torch

import gdnfuse
from gdnfuse import models
from gdnfuse.generation import device_map
from gdnfuse.passes import devices
from gdnfuse.rewrite.graph import module_stack, op_name, tensors_of, value
from tests.models import zoo

hooks = pytest.importorskip("accelerate.hooks")

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
GENERATE = {"max_new_tokens": 3, "do_sample": False}
PARTS = ("model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "model.norm", "model.rotary_emb", "lm_head")
SECOND = ("model.layers.1", "model.layers.2", "model.norm", "lm_head")
AUTO = {  # where device_map="auto" has the rotary embedding, and a head that is the embedding; with attention on both devices
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "tie_word_embeddings": True,
}
DEVICES = torch.device("xla", 0), torch.device("xla", 1)  # which are names here


def dispatched(model):
    """As accelerate's dispatch_model leaves a model with these parts on devices that are one and the same."""
    parts = dict.fromkeys((*PARTS, *(f"model.layers.{i}" for i in range(len(model.model.layers)))), "cpu")
    places = {"execution_device": {**parts, "": "cpu"}, "offload": dict.fromkeys(parts, False)}
    hooks.attach_align_device_hook_on_blocks(model, **places, skip_keys=[zoo.CACHE])
    return model


def state(model):
    """All that we change of a model: the attributes of its modules and of their hooks."""
    return [(dict(vars(m)), dict(vars(m.__dict__.get("_hf_hook", torch)))) for m in model.modules()]


@pytest.fixture
def two_devices(monkeypatch):
    """The second and third layer, the last norm and the head of a model are on another device than all else, or other parts."""
    sent, second = device_map._sent, list(SECOND)

    def place(path):
        return DEVICES[any(path == part or path.startswith(f"{part}.") for part in second)]

    def of(node, numbers):
        if not tensors_of(value(node)):
            return []
        if node.op == "placeholder":  # it has no module, and what reads it has one
            node = next((user for user in node.users if tensors_of(value(user))), node)
        path = module_stack(node)[-1]
        read = [n for n in node.all_input_nodes if n.op != "placeholder"]
        return of(read[0], numbers) if path == "(root)" and op_name(node) != "to" and read else [place(path)]

    def named(model, *others):
        second[:] = others or SECOND
        home = {id(x): place(path) for given in (model.named_parameters(), model.named_buffers()) for path, x in given}
        home |= {id(m._hf_hook): place(path) for path, m in model.named_modules() if hasattr(m, "_hf_hook")}

        def of_module(module, recurse=True):
            return {home[id(x)] for held in (module.parameters(recurse), module.buffers(recurse)) for x in held}

        def copied(x, device, skipped):
            return x.to(x.device, copy=True) if isinstance(x, torch.Tensor) else sent(x, device, skipped)

        monkeypatch.setattr(devices, "_devices", of)
        monkeypatch.setattr(devices, "devices_of", lambda xs: sorted({str(home[id(x)]) for x in xs if id(x) in home}))
        monkeypatch.setattr(device_map, "_execution", lambda hook: home[id(hook)])
        monkeypatch.setattr(device_map, "_devices", of_module)
        monkeypatch.setattr(device_map, "_sent", copied)
        return model

    return named


GRAPHS = [(phase, f"xla:{i}", 1) for phase in ("prefill", "decode") for i in range(2)]


def graphs(reports):
    return [(r.phase, r.device, r.fused_layers) for r in reports]


def adapted(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["in_proj_qkv", "q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).base_model.model.eval().requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: dispatched(zoo.causal_lm()), None),
        pytest.param(lambda: dispatched(zoo.causal_lm()), "static", marks=pytest.mark.sweep),
        pytest.param(lambda: dispatched(zoo.moe()), "static", marks=pytest.mark.sweep),
        pytest.param(lambda: adapted(dispatched(zoo.causal_lm())), "static", marks=pytest.mark.sweep),
        pytest.param(lambda: dispatched(models.quantized(zoo.causal_lm(), "int8_channel")), "static", marks=pytest.mark.sweep),
    ],
    ids=["growing", "static", "experts", "adapters", "quantised"],
)
def test_layers_fuse_on_each_device(two_devices, make, kind):
    model = make()
    how = {"cache_implementation": kind, **GENERATE}
    tokens = model.generate(IDS, **how)  # with accelerate's hooks
    two_devices(model)
    if kind:
        before = state(model)
        assert graphs(gdnfuse.explain(model.generate, IDS, **how).reports) == GRAPHS and state(model) == before
    gdnfuse.compile(model, inner="aot_eager" if kind else "eager", strict=True)
    assert torch.equal(model.generate(IDS, **how), tokens)
    assert graphs(gdnfuse.reports()) == GRAPHS
    assert "(prefill, xla:0)" in gdnfuse.reports()[0].summary()
    assert torch.equal(copy.deepcopy(model).generate(IDS, **how), tokens)  # eager, with hooks at borders
    assert torch.equal(model.generate(IDS, **how), tokens) and len(gdnfuse.reports()) == 4


@torch.no_grad()
@pytest.mark.sweep
def test_parts_as_auto_places_them(two_devices):
    model = dispatched(zoo.causal_lm(**AUTO))
    tokens = model.generate(IDS, **GENERATE)
    two_devices(model, "model.layers.2", "model.layers.3", "model.norm", "model.rotary_emb")
    gdnfuse.compile(model, inner="aot_eager", strict=True)
    assert torch.equal(model.generate(IDS, **GENERATE), tokens)
    # What angles are made of is on the first, angles on the second, layers on the first and on the second, the head on the first.
    assert [r.device for r in gdnfuse.reports()] == [f"xla:{i}" for i in (0, 1, 0, 1, 0)] * 2
    assert graphs(r for r in gdnfuse.reports() if r.layers) == GRAPHS


def test_what_needs_one_device_is_refused(two_devices):
    model = two_devices(dispatched(zoo.causal_lm()))
    before = state(model)
    for name, given in {"speculate": gdnfuse.PromptLookup(), "prefixes": object()}.items():
        with pytest.raises(
            gdnfuse.GdnfuseError, match=f"^{name} needs a model on one device, found it on xla:0 and xla:1: leave"
        ):
            gdnfuse.compile(model, **{name: given})
    assert state(model) == before


def test_hooks_stay_at_borders_alone(two_devices):
    model = two_devices(dispatched(zoo.causal_lm()))
    before = state(model)
    borders = device_map.Borders(model)
    assert state(model) == before and borders.why_not is None
    borders.make()
    hooked = [path for path, m in model.named_modules() if hasattr(m, "_hf_hook")]
    assert sorted(hooked) == sorted(["", *PARTS]) == sorted(borders.kept) and borders.inside == 41
    assert "_old_forward" not in vars(model.model.layers[0].mlp) and "forward" not in vars(model.model.layers[0].mlp)
    again = device_map.Borders(model)
    assert sorted(again.kept) == sorted(borders.kept) and again.inside == 0
    borders.undo()
    assert state(model) == before


@torch.no_grad()
def test_a_traced_hook_does_what_accelerates_does():
    """A layer's inputs go where its hook says, all but its cache, and what the model answers goes where its inputs came from."""
    hook = hooks.AlignDevicesHook("meta", skip_keys="cache", io_same_device=True)
    args, kwargs = (
        (torch.ones(2), [torch.ones(1)]),
        {"cache": torch.ones(2), "mask": {"full": torch.ones(1), "cache": torch.ones(1)}},
    )
    theirs = hook.pre_forward(None, *args, **kwargs)
    ours = device_map.before_forward(hook, None, *args, **kwargs)

    def where(x):
        return torch.utils._pytree.tree_map(lambda t: str(t.device), x)

    assert where(ours) == where(theirs) and "meta" in str(where(ours)) and "cpu" in str(where(ours))
    assert hook.input_device == torch.device("cpu")
    x = torch.ones(2)
    assert device_map.after_forward(hook, None, {"logits": x, "cache": x})["logits"] is x  # which is there already


def offloaded(model):
    model.model.layers[0].mlp.up_proj._hf_hook.offload = True


def of_another_kind(model):
    hooks.add_hook_to_module(model.model.layers[1], hooks.SequentialHook(model.model.layers[1]._hf_hook))


def of_the_users_own(model):
    model.lm_head._hf_hook.pre_forward = lambda module, *args, **kwargs: (args, kwargs)


def without_a_device(model):
    model.lm_head._hf_hook.execution_device = None


def elsewhere(model):
    model.model.norm._hf_hook.execution_device = "meta"


REFUSED = {  # what is done to the hooks, and words of why they stay
    offloaded: "found some that are offloaded",
    of_another_kind: "found a SequentialHook",
    of_the_users_own: "must all be AlignDevicesHooks as it made them",
    without_a_device: "found one that does not",
    elsewhere: "its inputs, meta, found them on cpu",
}


@pytest.mark.parametrize("change", REFUSED)
def test_hooks_that_must_stay(change):
    model = dispatched(zoo.causal_lm())
    change(model)
    before = state(model)
    borders = device_map.Borders(model)
    why, fix = borders.why_not
    assert REFUSED[change] in why and "whole decoder layers on each" in fix
    borders.make()
    assert state(model) == before


def test_a_decoder_layer_on_two_devices(monkeypatch):
    model, two = dispatched(zoo.causal_lm()), {torch.device("cpu"), DEVICES[1]}
    monkeypatch.setattr(device_map, "_devices", lambda m, recurse=True: two if recurse else {torch.device("cpu")})
    why, fix = device_map.Borders(model).why_not
    assert why == "A decoder layer must be on one device, found it on cpu and xla:1." and "model.layers.0 is fused" in fix


def test_a_model_is_as_it_was_when_compile_raises(monkeypatch):
    model = dispatched(zoo.causal_lm())
    before = state(model)
    monkeypatch.setattr("gdnfuse.generation.compile._compile", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gdnfuse.compile(model, inner="eager")
    assert state(model) == before
