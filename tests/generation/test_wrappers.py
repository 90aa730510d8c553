"""Wrappers that hand their calls to a model inside: both their calls and their generate are compiled, or it is said that not."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from transformers import PreTrainedModel

import gdnfuse
from gdnfuse.generation import wrappers
from gdnfuse.generation.coverage import __name__ as log
from tests.models import zoo
from tests.sweeps import some

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
GENERATE = {"max_new_tokens": 3, "do_sample": False}


class Module(torch.nn.Module):
    """As DistributedDataParallel: the model is `module`, and there is no generate."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class ByForward(Module):
    """Goes round the model's call."""

    def forward(self, *args, **kwargs):
        return self.module.forward(*args, **kwargs)


class Chat(PreTrainedModel):
    """As models whose code comes with the checkpoint: transformers' class, and a generate that calls that of the model inside."""

    _supports_sdpa = True

    def __init__(self, model):
        super().__init__(model.config)
        self.language_model = model

    def forward(self, *args, **kwargs):
        return self.language_model(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.language_model.generate(*args, **kwargs)


def peft(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["in_proj_qkv", "out_proj", "q_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval().requires_grad_(False)


def hooked(model):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model, hooks.ModelHook())
    for layer in model.model.layers:
        hooks.add_hook_to_module(layer, hooks.ModelHook())
    return model


@torch.no_grad()
@pytest.mark.parametrize("wrap", [peft, hooked])
def test_calls_and_generate_of_a_wrapper_are_compiled(wrap):
    model = wrap(zoo.causal_lm(**zoo.SMALL))
    logits, tokens = model(IDS).logits, model.generate(input_ids=IDS, **GENERATE)
    assert gdnfuse.compile(model, inner="eager", strict=True) is model
    torch.testing.assert_close(model(IDS).logits, logits)
    assert [r.phase for r in gdnfuse.reports()] == ["prefill"]
    assert torch.equal(model.generate(input_ids=IDS, **GENERATE), tokens)
    assert gdnfuse.reports()[-1].phase == "decode" and all(r.fused_layers == 1 for r in gdnfuse.reports())


@pytest.mark.parametrize("wrap", [Module, torch.nn.DataParallel, Chat, lambda model: Module(Chat(model))])
def test_a_wrapper_reaches_the_compiled_call_of_the_model_inside(wrap):
    model = zoo.causal_lm(**zoo.SMALL)
    wrapper = gdnfuse.compile(wrap(model), inner="eager")
    assert wrappers.compiled_models(wrapper) == [model] and model._compiled_call_impl is not None
    model._compiled_call_impl = lambda *args, **kwargs: "compiled"
    assert wrapper(IDS) == wrapper(IDS) == "compiled"


@torch.no_grad()
def test_distributed_data_parallel(tmp_path):
    """Under it Dynamo's backend is one of torch's own, around ours."""
    model = zoo.causal_lm(**zoo.SMALL)
    wanted = model(IDS).logits
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ours = torch.nn.parallel.DistributedDataParallel(model.requires_grad_(True)).requires_grad_(False)
        torch.testing.assert_close(gdnfuse.compile(ours, inner="eager", strict=True)(IDS).logits, wanted)
    finally:
        torch.distributed.destroy_process_group()
    assert [(r.phase, r.fused_layers) for r in gdnfuse.reports()] == [("prefill", 1)]


def test_a_call_that_goes_round_the_model_is_said(caplog):
    model = ByForward(zoo.causal_lm(**zoo.SMALL))
    words = "A call of ByForward must reach the call of the Qwen3_5ForCausalLM inside it"
    with torch.no_grad():
        gdnfuse.compile(model, inner="eager")(IDS)
        model(IDS)
        assert [words in r.getMessage() for r in caplog.records if r.name == log] == [True]
        gdnfuse.compile(model, inner="eager", strict=True)
        with pytest.raises(gdnfuse.GdnfuseError, match=f"^strict: {words}"):
            model(IDS)
    assert not gdnfuse.reports()


def test_a_module_without_such_a_model_is_compiled_as_a_whole():
    model = Module(zoo.causal_lm(**zoo.SMALL).model)  # which cannot generate
    assert wrappers.compiled_models(model) == [model]


def test_several_models_inside_are_each_compiled():
    actor, reference = zoo.causal_lm(**zoo.SMALL), zoo.causal_lm(**zoo.SMALL)
    assert wrappers.compiled_models(torch.nn.ModuleDict({"actor": actor, "reference": reference})) == [actor, reference]


def on_two_devices(model):
    model = torch.nn.DataParallel(model)
    model.device_ids = [0, 1]
    return model


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (torch.compile, "a model that torch.compile has not wrapped, found an OptimizedModule"),
        (lambda model: Module(torch.compile(model)), "a model that torch.compile has not wrapped, found an OptimizedModule"),
        (on_two_devices, "a model that is not copied between devices, found DataParallel, which copies it to 2 devices"),
        (lambda model: "model", "a torch.nn.Module, found str"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(wrap, words):
    model = zoo.causal_lm(**zoo.SMALL)
    with pytest.raises(gdnfuse.GdnfuseError, match=f"^gdnfuse.compile needs {words}"):
        gdnfuse.compile(wrap(model), inner="eager")
    assert model._compiled_call_impl is None and "get_compiled_call" not in vars(model)


@torch.no_grad()
@pytest.mark.parametrize("everywhere", some([False, True], True))
def test_a_hook_that_is_registered_later_runs(everywhere, caplog):
    """Dynamo does not look; peft registers some for adapter_names."""
    model = zoo.causal_lm(**zoo.SMALL)
    ours = gdnfuse.compile(copy.deepcopy(model), inner="eager")
    doubled = lambda module, args: (2 * args[0],) if isinstance(module, torch.nn.Linear) else None  # noqa: E731

    def same():
        torch.testing.assert_close(ours(IDS).logits, model(IDS).logits)

    same()
    with contextlib.ExitStack() as hooks:
        if everywhere:
            hooks.enter_context(torch.nn.modules.module.register_module_forward_pre_hook(doubled))
        else:
            for one in (ours, model):
                hooks.enter_context(one.model.layers[0].mlp.down_proj.register_forward_pre_hook(doubled))
        same()
        same()
        assert ["hooks of Qwen3_5ForCausalLM" in r.getMessage() for r in caplog.records if r.name == log] == [True]
    same()
    assert len(gdnfuse.reports()) == 1


@torch.no_grad()
def test_hooks_of_transformers_that_give_hidden_states_do_not_count(caplog):
    """They are there from the first call that asks for hidden states on."""
    model = zoo.causal_lm(**zoo.SMALL)
    ours = gdnfuse.compile(copy.deepcopy(model), inner="eager", strict=True)
    for asked in (False, True, False):
        found, wanted = (m(IDS, output_hidden_states=asked) for m in (ours, model))
        torch.testing.assert_close(found.hidden_states, wanted.hidden_states)
    assert ours.model.layers[0]._forward_hooks and not [r for r in caplog.records if r.name == log]
