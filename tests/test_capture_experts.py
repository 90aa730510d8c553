"""Capture of experts: which classes become gdnfuse.experts, by whichever function they are computed, and when they do not."""

import importlib
import inspect
import sys
import textwrap
import types

import pytest
import torch
import transformers
from torch._dynamo.testing import EagerAndRecordGraphs
from transformers.integrations import moe
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

import gdnfuse
from gdnfuse import capture, capture_experts
from tests.test_capture import Recorder, captured, close

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "deepgemm", "sonicmoe")


@pytest.fixture(autouse=True)
def installed():
    capture.install()
    yield
    capture.install()


def experts(cls=modeling.Qwen3_5MoeExperts, implementation="grouped_mm", dtype=torch.float32, E=6, **config):
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "num_experts": E, "num_experts_per_tok": 3}
    config = transformers.Qwen3_5MoeTextConfig(**sizes, **config)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    self = cls(config).to(dtype).requires_grad_(False)
    for weight in self.parameters():
        weight.normal_(std=0.3)
    return self


def call(N=5, k=3, dtype=torch.float32, E=6):
    generator = torch.Generator().manual_seed(N)
    chosen = torch.rand((N, E), generator=generator).topk(k, -1).indices
    x, weights = torch.randn((N, 16), generator=generator), torch.rand((N, k), generator=generator)
    return x.to(dtype), chosen, weights.to(dtype)


def run(self, args, backend=None, **options):
    """What a traced call gives, and the dialect ops in its graphs."""
    backend = backend or Recorder()
    found = torch.compile(lambda *a: self(*a), backend=backend, **{"fullgraph": True, **options})(*args)
    return found, captured(getattr(backend, "graphs", []))


def in_a_loop(self, args):
    """The class's own loop, whatever its config says."""
    with torch.no_grad():
        return type(self).forward.__wrapped__(self, *args)


def module_of(monkeypatch, name, **members):
    module = types.ModuleType(f"transformers.models.{name}.modeling_{name}")
    for attribute, member in members.items():
        member.__module__ = module.__name__
        setattr(module, attribute, member)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def status(cls):
    (found,) = [c for c in capture.status() if c.function == f"{cls.__module__}.{cls.__name__}.forward"]
    return found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_computes_them_they_are_one_op(implementation, dtype):
    """The loop would break the graph, and two of the functions need GPUs that are not here."""
    self, args = experts(implementation=implementation, dtype=dtype), call(dtype=dtype)
    found, ops = run(self, args)
    assert ops == ["experts"]
    close([found], [in_a_loop(self, args)], 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("family", ["qwen3_next", "mixtral", "qwen3_moe", "olmoe", "lara_mini"])
def test_every_class_that_computes_the_same_is_proved(family):
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ModuleNotFoundError:
        pytest.skip(f"transformers {transformers.__version__} has no {family}.")
    capture.scan()
    (cls,) = [c for c in vars(module).values() if capture_experts.loop(c) and c.__module__ == module.__name__]
    found = status(cls)
    assert found.captured and found.op == "experts" and found.proof_error < 1e-9 and found.seconds < 1


def test_the_functions_that_run_here_are_proved_themselves():
    capture.scan()
    ours = [c for c in capture.status() if c.op == "experts" and "fp8" not in c.function.lower()]
    found = {c.function: c for c in ours if c.function.startswith(capture_experts.MODULES)}
    assert {name.rsplit(".", 1)[1] for name in found} == {*capture_experts.FUNCTIONS}
    for name, c in found.items():
        assert c.captured and (c.proof_error is None) == name.endswith(capture_experts.ON_GPU)


def test_rows_stay_symbolic_and_are_computed_as_they_come():
    self, recorder = experts(), Recorder()
    compiled = torch.compile(lambda *a: self(*a), backend=recorder, fullgraph=True, dynamic=True)
    for N in (2, 5, 33, 70):
        close([compiled(*call(N))], [in_a_loop(self, call(N))])
    assert len(recorder.graphs) == 1


def test_all_rows_on_one_expert_and_a_masked_choice():
    self, (x, chosen, weights) = experts(), call()
    close([run(self, (x, torch.full_like(chosen, 4), weights))[0]], [in_a_loop(self, (x, torch.full_like(chosen, 4), weights))])
    # As expert parallelism masks a choice, with any weight.
    masked = chosen.index_fill(1, torch.tensor([0]), 6)
    wanted = in_a_loop(self, (x, chosen, weights.index_fill(1, torch.tensor([0]), 0.0)))
    close([run(self, (x, masked, weights))[0]], [wanted])


def test_backends_of_torch_and_export_see_transformers_own_functions():
    self, args = experts(), call()
    for backend in (EagerAndRecordGraphs(), "aot_eager"):
        found, ops = run(self, args, backend)
        assert ops == []
        close([found], [in_a_loop(self, args)])
    with torch.autocast("cpu"):
        assert run(self, args)[1] == []
    assert captured([torch.export.export(self, args, strict=True).graph_module]) == []


@pytest.mark.parametrize("given", [True, False])
def test_the_option_decides_for_each_compilation(given):
    gdnfuse.clear_reports()
    run(experts(), call(), "gdnfuse", options={"inner": "eager", "capture": given})
    records = [r.rule for report in gdnfuse.reports() for r in report.all_records if r.stage == "capture"]
    assert records == (["experts"] if given else [])


def test_where_gradients_are_asked_for_the_function_keeps_them():
    self, args = experts().requires_grad_(), call()
    found, ops = run(self, args)
    found.square().sum().backward()
    assert ops == [] and self.down_proj.grad is not None and self.gate_up_proj.grad is not None
    with torch.no_grad():
        assert run(self, args)[1] == ["experts"]


def test_a_function_of_the_users_is_called(monkeypatch):
    monkeypatch.setattr(moe.ALL_EXPERTS_FUNCTIONS, "_local_mapping", {})
    for name in ("mine", "grouped_mm"):
        moe.ALL_EXPERTS_FUNCTIONS[name] = lambda self, x, chosen, weights: x * weights.sum(-1, keepdim=True)
        found, ops = run(experts(implementation=name), (args := call()))
        assert ops == []
        close([found], [args[0] * args[2].sum(-1, keepdim=True)])


def test_another_activation_is_not_captured():
    for activation, ops in (("gelu", []), ("gelu_pytorch_tanh", []), ("silu", ["experts"]), ("swish", ["experts"])):
        self = experts(hidden_act=activation)
        found, found_ops = run(self, call())
        assert found_ops == ops, activation
        close([found], [in_a_loop(self, call())])


def test_what_the_op_does_not_mean_is_computed_or_refused_as_without_us():
    self, (x, chosen, weights) = experts(), call()
    assert run(self, (x, chosen.int(), weights))[1] == []
    for wrong in (
        (x[:, :8], chosen, weights),
        (x.bfloat16(), chosen, weights),  # which grouped_mm casts
        (x, chosen, weights.to("meta")),
        (x, chosen[:, :2], weights),
    ):
        results = []
        for backend in (EagerAndRecordGraphs(), Recorder()):
            try:
                results.append(run(self, wrong, backend)[0])
            except Exception as e:
                results.append(type(e))
            assert captured(backend.graphs) == []
        if isinstance(results[0], type):
            assert results[0] is results[1]
        else:
            close(*([r] for r in results))


def test_weights_that_are_views_of_one_another_are_read_as_they_are():
    self, args = experts(), call()
    self.gate_up_proj = torch.nn.Parameter(self.gate_up_proj[:1].expand(6, -1, -1), requires_grad=False)
    self.down_proj = torch.nn.Parameter(self.gate_up_proj.transpose(1, 2)[:, :, :8], requires_grad=False)
    found, ops = run(self, args)
    assert ops == ["experts"]
    close([found], [in_a_loop(self, args)])


def test_weights_that_are_computed_are_not_captured():
    """As by an adapter on the experts: their class is then another one."""
    self = experts()

    class Doubled(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(self, "down_proj", Doubled())
    found, ops = run(self, call())
    assert ops == []
    close([found], [in_a_loop(self, call())])


EDITS = {
    "gate and up swapped": ("gate, up = nn", "up, gate = nn"),
    "weights left out": (" * top_k_weights[token_idx, top_k_pos, None]", ""),
    "weights before down": ("self.act_fn(gate) * up", "self.act_fn(gate * top_k_weights[token_idx, top_k_pos, None]) * up"),
    "activation behind the product": ("self.act_fn(gate) * up", "self.act_fn(gate * up)"),
    "another activation": ("self.act_fn(gate) * up", "torch.sigmoid(gate) * up"),
    "an expert left out": ("if expert_idx == self.num_experts:", "if expert_idx == self.num_experts - 1:"),
    "a limit": ("self.act_fn(gate) * up", "self.act_fn(gate.clamp(max=self.limit)) * up"),
    "the row is added": ("return final_hidden_states", "return final_hidden_states + hidden_states"),
}


@pytest.mark.parametrize("edit", [*EDITS, None])
def test_an_edited_class_is_not_captured(edit, monkeypatch):
    text = textwrap.dedent(inspect.getsource(modeling.Qwen3_5MoeExperts))
    if edit:
        old, new = EDITS[edit]
        assert text.count(old) == 1, f"{old!r} is not in the experts of this transformers"
        text = text.replace(old, new)
    scope = {}
    exec(compile(text, f"<{edit}>", "exec"), modeling.__dict__, scope)
    (cls,) = scope.values()
    cls.limit = 0.1
    module_of(monkeypatch, f"edited_{[*EDITS, None].index(edit)}", Qwen3_5MoeExperts=cls)
    assert run(experts(cls), call())[1] == ([] if edit else ["experts"])
    found = status(cls)
    assert found.captured == (edit is None) and (edit is None) == (found.reason == "")
    assert edit is None or "proof" in found.reason and found.reason.endswith(".")


def test_a_class_with_a_gate_of_its_own_is_not_captured(monkeypatch):
    """The loop is right, but grouped_mm would call this."""

    class Experts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            vars(self).update(vars(modeling.Qwen3_5MoeExperts(config)))

        forward = inspect.unwrap(modeling.Qwen3_5MoeExperts.forward)

        def _apply_gate(self, gate_up):
            up, gate = gate_up.chunk(2, -1)
            return self.act_fn(gate) * up

    cls = moe.use_experts_implementation(Experts)
    module_of(monkeypatch, "own_gate", Experts=cls)
    found, ops = run(experts(cls), call())
    assert ops == [] and "proof failed" in status(cls).reason
    assert not torch.allclose(found, in_a_loop(experts(cls), call()))


@pytest.mark.parametrize("said", [{"has_bias": True}, {"is_transposed": True}, {"is_concatenated": False}, {"has_gate": False}])
def test_another_layout_is_refused_with_a_sentence(said, monkeypatch):
    (name, value), *_ = said.items()
    cls = type("Experts", (torch.nn.Module,), {"__init__": lambda self, config: None, "forward": lambda self, x: x})
    cls = moe.use_experts_implementation(**said)(cls)
    module_of(monkeypatch, f"layout_{name}", Experts=cls)
    capture.scan()
    assert status(cls).reason == f"Experts must have {capture_experts.LAYOUT[name][1]}, found {name}={value} of Experts."


def test_uninstall_forgets_the_classes():
    capture.scan()
    assert capture_experts._classes
    capture.uninstall()
    assert not capture_experts._classes
    assert run(experts(), call())[1] == []
