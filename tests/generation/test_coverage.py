"""strict means strict: a call in which a GDN layer did not run fused raises or is said once, with its cause and what to do."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import gdnfuse
from gdnfuse.generation import coverage
from gdnfuse.generation.wrappers import gdn_layers
from gdnfuse.options import Options
from gdnfuse.report.text import render
from gdnfuse.runs import RUNS
from tests.models import zoo

X = torch.ones(1, 2, 4)


@pytest.fixture
def said(caplog):
    """What was logged as a warning of coverage, in sentences."""
    return lambda: [r.getMessage() for r in caplog.records if r.name == coverage.__name__ and r.levelname == "WARNING"]


class Layer(torch.nn.Module):
    """Owns what a GDN layer owns, so that it is asked for; what it computes is none."""

    def __init__(self, **shapes):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        for name, shape in (shapes or {"A_log": 4, "dt_bias": 4}).items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))

    def forward(self, x):
        return self.linear(x) * self.A_log.exp() + self.dt_bias


def model_of_one():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), Layer()).requires_grad_(False)


def disable(model):
    model[1].forward = torch.compiler.disable(model[1].forward)


def break_inside(model):
    model[1].linear.register_forward_pre_hook(lambda *args: torch._dynamo.graph_break())


def keep_gradients(model):
    model.requires_grad_(True)


def device_map(model):
    hooks = pytest.importorskip("accelerate.hooks")
    for module in (model[0], model[1].linear):  # every leaf, as for a device_map over several devices
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
    hooks.add_hook_to_module(model, hooks.ModelHook())  # with another one all stay


def nothing(model):
    pass


CAUSES = {  # what is done to the model, settings of Dynamo, and words of the cause and of what to do about it
    "disabled function": (disable, {}, "Graph break at", "remove its torch.compiler.disable"),
    "graph break": (break_inside, {}, "User-inserted graph break", "Remove the call of torch._dynamo.graph_break"),
    "gradients": (keep_gradients, {}, "must run without gradients", "Call under torch.no_grad()"),
    "errors suppressed": (keep_gradients, {"suppress_errors": True}, "must run without gradients", "Call under torch.no_grad()"),
    "no compilation": (nothing, {"disable": True}, "No graph was made of it", "TORCH_COMPILE_DISABLE"),
    "several devices": (device_map, {}, "found a ModelHook", "Load the model on one device"),
    "another rule": (nothing, {}, "no rule finds the gates", "gdnfuse.explain"),
}


@pytest.mark.parametrize("frozen", [False, True])
def test_collections_of_a_first_call_look_at_what_it_makes_alone(frozen):
    """Nobody else's objects that were set aside come back."""
    aside, collected = [], weakref.WeakSet()

    def fn(x):
        aside.append(gc.get_freeze_count())
        cycle = torch.nn.Module()
        object.__setattr__(cycle, "itself", cycle)
        collected.add(cycle)
        del cycle
        gc.collect()
        return x

    call = coverage.Coverage(model_of_one(), Options(), quiet=True).checked(fn, coverage.STEP)
    if not frozen:
        gc.unfreeze()  # what the tests began with
    try:
        for _ in range(2):
            call(X)
        assert aside[0] > 1000 and (aside[1] > 1000) == frozen == (gc.get_freeze_count() > 1000) and not collected
    finally:
        gc.freeze()


def adapted(model):
    """With an adapter of peft on a parameter, which Dynamo does not trace."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=[], target_parameters=["layers.0.mlp.gate_proj.weight"])
    return peft.get_peft_model(model, config).base_model.model.requires_grad_(False)


def hooked(model):
    model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda *args: torch._dynamo.graph_break())
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "function", "fix"),
    [
        (hooked, "<lambda>", "Remove the call of torch._dynamo.graph_break"),
        pytest.param(adapted, "_maybe_set", "Merge the adapter with peft's merge_adapter()", marks=pytest.mark.sweep),
    ],
)
def test_a_break_inside_a_layer_raises_under_strict_where_all_layers_are_fused(change, function, fix):
    """What is fused around MLPs in one graph is not in pieces, and no rule sees why."""
    model, ids = change(zoo.causal_lm(**zoo.SMALL)), zoo.prompt(1)[0]
    gdnfuse.compile(model, inner="eager", strict=True)
    for _ in range(2):
        with pytest.raises(
            gdnfuse.GdnfuseError, match="^strict: Every layer of Qwen3_5ForCausalLM must be traced as a whole"
        ) as e:
            model(ids)
        assert f" in {function} in a prompt. " in str(e.value) and fix in str(e.value)
    assert sum(r.fused_layers for r in gdnfuse.reports()) == 1
    told = {r.graph_break for r in gdnfuse.reports()} - {""}
    assert told and all(" must go on to the end of its function, found a graph break at " in one for one in told)
    assert any(f" in {function}. " in one and fix in one for one in told)
    assert all(one in render(r) for r in gdnfuse.reports() if (one := r.graph_break))


class Decoder(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        torch._dynamo.graph_break()
        return x


def test_a_break_is_said_once_inside_the_layers_alone(said):
    """Behind them it costs nothing."""
    for broken in (False, True):
        torch._dynamo.reset()
        model = Decoder(model_of_one()).requires_grad_(False)
        if broken:
            break_inside(model.layers)
        run = torch.compile(model, backend="eager")

        def as_if_fused(x, run=run):
            RUNS.fused += 1
            return run(x)

        call = coverage.Coverage(model, Options()).checked(as_if_fused, coverage.STEP)
        for _ in range(2):
            call(X)
        assert len(said()) == broken
    sentence = said()[0]
    assert sentence.startswith("Every layer of Decoder must be traced as a whole, found that its graph breaks at ")
    assert " in a decode step. " in sentence
    assert "Nothing is fused across it. Remove the call of torch._dynamo.graph_break" in sentence


@pytest.mark.parametrize("cause", CAUSES)
def test_a_layer_in_no_fused_graph_is_said_once_and_raises_under_strict(cause, said):
    prepare, settings, why, fix = CAUSES[cause]
    model = model_of_one()
    prepare(model)
    gdnfuse.compile(model, inner="eager")
    with torch._dynamo.config.patch(settings):
        for _ in range(2):
            model(X)
        (sentence,) = said()
        assert sentence.startswith("Every GDN layer of Sequential must run fused, found 0 of 1 in a prompt (not 1). ")
        assert why in sentence and fix in sentence
        gdnfuse.compile(model, inner="eager", strict=True)
        for _ in range(2):
            with pytest.raises(gdnfuse.GdnfuseError, match=f"^strict: .*{why}"):
                model(X)
    assert len(said()) == 1


class GDN(torch.nn.Module):
    """The GDN layers of a model, each in a graph of its own."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(layer.linear_attn for layer in zoo.causal_lm().model.layers[: zoo.GDN_LAYERS])

    def forward(self, x):
        first, second = self.layers
        x = first(x)
        torch._dynamo.graph_break()
        return second(x)


@torch.no_grad()
def test_one_graph_for_two_layers_fuses_both(said):
    model = gdnfuse.compile(GDN(), inner="eager", strict=True)
    for _ in range(2):
        model(torch.ones(1, 5, 64))
    assert not said() and max(len(report.layers) for report in gdnfuse.reports()) == 1


@torch.no_grad()
def test_a_layer_that_a_later_call_loses(said):
    """Where torch gives up compiling anew, long after all was fused."""
    model, x = gdnfuse.compile(GDN(), inner="eager"), torch.ones(1, 5, 64)
    with torch._dynamo.config.patch(recompile_limit=1):
        model(x)
        assert not said()
        for _ in range(2):
            model(x.repeat(2, 1, 1))
    (sentence,) = said()
    assert "found 0 of 2 in a prompt (not layers.0 and 1 more). torch left it eager at recompile_limit. Last cause: " in sentence
    assert "raise torch._dynamo.config.recompile_limit" in sentence


def test_a_torch_compile_around_a_compiled_model(said):
    """Prompts leave it for their own compilation, unless fullgraph forbids; steps do not."""
    words = "must be left to gdnfuse.compile, found a torch.compile around them with backend 'eager'"
    outer = torch.compile(gdnfuse.compile(Layer().requires_grad_(False), inner="eager", fullgraph=True), backend="eager")
    for x in (X, X[:, :1]):  # traced twice
        outer(x)
    assert [words in sentence for sentence in said()] == [True]
    ours = gdnfuse.compile(Layer().requires_grad_(False), inner="eager", fullgraph=True, strict=True)
    with pytest.raises(Exception, match=f"strict: Calls of Layer {words}"):
        torch.compile(ours, backend="eager")(X)


LEFT_OUT = [{"stop_after": "lift"}, {"fuel": 0}, {"prefill": False}, {"capture": False, "prefill": True}]


@pytest.mark.parametrize("options", LEFT_OUT)
def test_nobody_asks_for_what_options_leave_out(options, said):
    gdnfuse.compile(model_of_one(), inner="eager", **options)(X)
    assert not said()


def test_explain_says_it_too(said):
    model = model_of_one()
    disable(model)
    (finding,) = [f for f in gdnfuse.explain(model, X).findings if f.kind == "layers not fused"]
    assert finding.where == "prompts" and finding.cause.startswith("0 of 1 in a prompt (not 1) run fused. Graph break at")
    assert "torch.compiler.disable" in finding.fix and not said()


def test_warmup_says_it_too():
    model = gdnfuse.compile(zoo.causal_lm(**zoo.SMALL), inner="eager")
    with torch._dynamo.config.patch(disable=True):
        warm = gdnfuse.warmup(model)
    assert warm.unfused == {"prompt": ["model.layers.0.linear_attn"], "decode step": ["model.layers.0.linear_attn"]}


def test_layers_are_known_by_what_they_own():
    model = torch.nn.ModuleDict({
        "gdn": Layer(A_log=4, dt_bias=4),
        "mamba2": Layer(A_log=4, dt_bias=4, D=4),
        "kda": Layer(A_log=(1, 1, 4, 1), dt_bias=64),
        "mamba": Layer(A_log=(8, 16), D=8),
    })  # fmt: skip
    assert list(gdn_layers(model)) == ["gdn"]
