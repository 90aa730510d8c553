"""Private APIs: each works with the installed versions, and what it costs where one is gone is what its entry says."""

import copy
import functools
import inspect
import logging
import os
import subprocess
import sys
import tempfile
import types
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.source import ConstantSource
from torch._guards import GuardSource, TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Shard
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

from gdnfuse import backend, capture, clear_reports, compat, packing, reports
from gdnfuse.errors import GdnfuseError, Refused
from gdnfuse.generation import causes, compile, stopping
from gdnfuse.kernels import causal_attention, implementations, linear_configs
from gdnfuse.kernels.launch import codegen, implementation, replay
from gdnfuse.kernels.launch.inductor import announce
from gdnfuse.kernels.launch.recording import Recorded, Result
from gdnfuse.options import Options
from gdnfuse.rewrite.graph import storage, writes
from tests.models import zoo

ON_GPUS = ("current_device", "current_stream")  # whose API is not in a build of torch for CPUs
CASES = {}  # of each entry: is given whether the API is there, and says what the entry then does


def case(function):
    CASES[function.__name__] = function
    return function


@contextmanager
def without(*names):
    """As if the libraries had not what these entries name, or no entry's where none is named."""
    gone, find = {path for name in names or compat.ENTRIES for path in compat.ENTRIES[name].paths}, compat.find

    def missing(path):
        if path in gone:
            raise AttributeError(f"no {path}")
        return find(path)

    compat.find = missing
    compat.forget()
    try:
        yield
    finally:
        compat.find = find
        compat.forget()


@pytest.mark.parametrize("name", compat.ENTRIES)
def test_an_entry_works_and_without_its_api_does_what_it_says(name, caplog):
    entry, here = compat.ENTRIES[name], name not in ON_GPUS or torch.version.cuda
    assert "Without it: " in " ".join(entry.__doc__.split()) and entry.cost.endswith(".")
    compat.forget()
    with caplog.at_level(logging.DEBUG, "gdnfuse.compat"):
        if here:
            assert len(entry.apis) == len(entry.paths) and not entry.missing()
            CASES[name](True)
            assert "gdnfuse.compat" not in {r.name for r in caplog.records}
        with without(name):
            CASES[name](False)
            assert bool(entry.missing()) == bool(here and entry.paths)
    said = "\n".join(r.getMessage() for r in caplog.records if r.name == "gdnfuse.compat")
    assert f"{(entry.paths or [name])[0].replace(':', '.')} must be as" in said and f"without it {entry.cost}" in said


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("on", ["cpu aot_eager", pytest.param("cuda inductor", marks=GPU)])
def test_without_any_of_them_a_model_is_imported_compiled_and_right(on):
    command = [sys.executable, "-c", WITHOUT_ANY, *on.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    in_generate = ["decode"] if "cuda" in on else []  # transformers compiles a static cache's steps on GPUs alone
    assert done.stdout.split() == [*in_generate, "prefill", "decode", "True"]
    for sentence in ("weights are not packed.", "functions are not captured.", "there are no CUDA graphs."):
        assert done.stderr.count(f"without it {sentence}") == 1


ROOT = Path(__file__).parent.parent
WITHOUT_ANY = """
import logging
import sys

from gdnfuse import compat

device, inner = sys.argv[1:]

def find(path):
    raise AttributeError(f"no {path}")

compat.find = find
logging.basicConfig(level=logging.WARNING)

import torch
import triton

import gdnfuse
from gdnfuse import kernels
from tests.models import zoo

model = zoo.causal_lm(**zoo.SMALL).to(device)
ids = zoo.prompt(2, 7)[0].to(device)
asked = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
wanted = model.generate(ids, **asked)
gdnfuse.compile(model, inner=inner)
assert torch.equal(model.generate(ids, **asked), wanted)

own = zoo.causal_lm(**zoo.SMALL).to(device)
run = torch.compile(own, backend="gdnfuse", options={"inner": inner})
tokens = zoo.tokens_for(2, 2).to(device)
with torch.no_grad():
    found, wanted = (call(ids, use_cache=True) for call in (run, own.forward))
    assert zoo.relative(found.logits, wanted.logits) < 1e-5
(theirs, _), (ours, _) = (zoo.prefill(own, 2, "static") for _ in range(2))
assert zoo.relative(zoo.decode(run, ours, None, tokens), zoo.decode(own, theirs, None, tokens)) < 1e-5
print(*(report.phase for report in gdnfuse.reports() if report.rewritten))

x, weight = torch.empty(2, 1, 64, device="meta"), torch.empty(64, device="meta")
(kernel,) = kernels.implementations()["add_rms_norm"].jit_kernels(x, x, weight, 1e-6, 1.0, overlap=True)
source = triton.compiler.ASTSource(kernel.kernel, kernel.signature, kernel.constexprs, kernel.attrs)
target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
print("cubin" in triton.compile(source, target=target, options=kernel.options).asm)
"""


def test_what_is_gone_is_said_once_and_listed(monkeypatch, caplog):
    assert compat.missing() == []
    entry = compat.ENTRIES["tensor_guards"]
    monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    compat.forget()
    try:
        assert compat.tensor_guards([], [], []) is None and compat.tensor_guards([], [], []) is None
        assert [r.levelname for r in caplog.records] == ["WARNING"] and "import of torch._C._dynamo.guards" in caplog.text
        assert entry in compat.missing()
        monkeypatch.undo()
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
        compat.forget()
        assert compat.tensor_guards([], [], []) is None and compat.missing() == [entry]
    finally:
        monkeypatch.undo()
        compat.forget()


def test_of_a_library_that_is_not_there_nothing_is_said_to_be_missing(monkeypatch, caplog):
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None if name == "triton" else True)
    with without("gluon", "dependent_launch"):
        assert compat.gluon() is None and compat.dependent_launch() == (None, None)
        assert compat.missing() == [] and not caplog.records


# torch: tensors


def faked():
    with FakeTensorMode() as mode:
        return mode, torch.empty(2, 3)


@case
def is_fake(there):
    assert compat.is_fake(faked()[1]) and not compat.is_fake(torch.ones(1)) and not compat.is_fake(torch.ones(1, device="meta"))


@case
def fake(there):
    mode, real = faked()[0] if there else nullcontext(), torch.empty(2, 3, dtype=torch.bfloat16).T
    made = compat.fake(mode, real)
    assert compat.is_fake(made) == there and (made.shape, made.stride(), made.dtype) == ((3, 2), (1, 3), torch.bfloat16)


@case
def memory_of(there):
    for made in (torch.ones(2, 3), faked()[1]):
        assert compat.memory_of(made) == compat.memory_of(made[1:].T) != compat.memory_of(torch.ones(2, 3))


@case
def holders(there):
    weight = torch.nn.Parameter(torch.ones(2, 3))
    assert compat.holders(weight) == (1 if there else None)
    if there:
        packing.check([weight])
        view = weight[1:]
        assert compat.holders(view) == 2
    else:
        with pytest.raises(Refused, match="must be known, found that torch does not say"):
            packing.check([weight])


@contextmanager
def shared_out():
    """A tensor and a DTensor of it, on a group of one rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        tensor = torch.ones(2, 3)
        yield tensor, torch.nn.Parameter(DTensor.from_local(tensor, mesh, [Shard(0)]))
    finally:
        torch.distributed.destroy_process_group()


@case
def is_sharded(there):
    with shared_out() as (tensor, sharded):
        assert compat.is_sharded(sharded) and not compat.is_sharded(tensor) and not compat.is_sharded(3)


@case
def local_part(there):
    with shared_out() as (tensor, sharded):
        part = compat.local_part()
        assert getattr(sharded, part).data_ptr() == tensor.data_ptr() if there else part is None


@case
def say_to_ranks(there):
    with shared_out():
        compat.say_to_ranks("key", "message")
        assert compat.heard_from_rank("key", 0.1) == ("message" if there else None)


@case
def heard_from_rank(there):
    say_to_ranks(there)
    with shared_out():
        assert compat.heard_from_rank("nothing", 0.01) is None


@case
def summed_over_ranks(there):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    x = torch.ones(3)
    found = compat.summed_over_ranks(x, torch.distributed.group.WORLD.group_name)
    torch.distributed.destroy_process_group()
    assert found.tolist() == [1.0] * 3 and found is not x


@case
def gather_ops(there):
    if not there:
        assert compat.gather_ops() is None
        return
    gather, wait = compat.gather_ops()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    found = wait(gather(torch.ones(3), 1, torch.distributed.group.WORLD.group_name))
    torch.distributed.destroy_process_group()
    assert found.tolist() == [1.0] * 3


@case
def symmetric_memory(there):
    if not there:
        assert compat.symmetric_memory(4, "cpu", "group") is None
        return
    with pytest.raises(Exception, match="(?i)symm|backend|alloc|cuda|device"):  # there is none on a CPU
        compat.symmetric_memory(4, "cpu", "group")


@case
def start_fake_ranks(there):
    assert bool(compat.start_fake_ranks(3)) == there == torch.distributed.is_initialized()
    if there:
        assert torch.distributed.get_world_size() == 3
        torch.distributed.destroy_process_group()


@case
def mma_v2(there):
    assert callable(compat.mma_v2()) if there else compat.mma_v2() is None


@case
def tree_leaves(there):
    assert compat.tree_leaves([1, (2, {"a": None, "b": [3]}), Result(4, None)]) == [1, 2, None, 3, 4, None]
    assert compat.tree_leaves([torch.Size([5])]) == ([5] if there else [torch.Size([5])])


@case
def tree_map_only(there):
    changed = compat.tree_map_only(int, lambda n: n + 1, [1, ("a", {"b": 2.0, "c": 3}), Result(4, None)])
    assert changed == [2, ("a", {"b": 2.0, "c": 4}), Result(5, None)] and type(changed[2]) is Result


# torch: graphs


def symbolic():
    """A tensor [s, 4] of any number of rows, and its mode."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    return mode.from_tensor(torch.empty(5, 4), symbolic_context=context, source=ConstantSource("x")), mode


@case
def known_true(there):
    rows = symbolic()[0].shape[0]
    assert compat.known_true(True) and not compat.known_true(False) and not compat.known_true(rows == 3)
    assert compat.known_true(rows + 1 == rows + 1) == there


@case
def without_guards(there):
    x, mode = symbolic()
    with compat.without_guards(mode if there else object()):
        assert x.shape[0] > 3
    assert (mode.shape_env.guards == []) == there


@case
def is_contiguous(there):
    x, _ = symbolic()
    assert all(map(compat.is_contiguous, (x, x[:1], torch.empty(2, 1, 3))))
    assert not any(map(compat.is_contiguous, (x.T, x[:, :2], x[:, :1])))


@case
def written_by(there):
    assert compat.written_by(torch.ops.aten.add_.Tensor) == [(0, "self")]
    assert compat.written_by(torch.ops.aten.add.out) == [(None, "out")] and compat.written_by(torch.ops.aten.add.Tensor) == []
    if not there:
        assert compat.written_by(object()) is None
        graph = torch.fx.Graph()
        x, y = graph.placeholder("x"), graph.placeholder("y")
        x.meta["example_value"], y.meta["example_value"] = torch.ones(2), torch.ones(2)
        node = graph.call_function(torch.ops.aten.add_.Tensor, (x, y))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gdnfuse.rewrite.graph._written", lambda overload: None)
            assert writes(node) == {storage(x), storage(y)}
        assert writes(node) == {storage(x)}


@case
def is_higher_order(there):
    assert compat.is_higher_order(torch.ops.higher_order.cond)
    assert not any(map(compat.is_higher_order, (torch.add, torch.ops.aten.add, "add", torch.nn.functional.silu, compat.find)))


@case
def is_erased(there):
    graph = torch.fx.Graph()
    nodes = [graph.placeholder("x"), graph.get_attr("w")]
    nodes += [graph.call_function(torch.add, (nodes[0], 1)), graph.call_method("add", (nodes[0], 1))]
    nodes += [graph.call_function(torch.add, (nodes[0], 1)), graph.call_method("add", (nodes[0], 1))]
    for node in nodes[2:4]:
        graph.erase_node(node)
    assert list(map(compat.is_erased, nodes)) == [False, False, True, True, False, False]


@case
def fake_result(there):
    mode, x = faked()
    with mode:
        op = torch.ops.gdnfuse.rms_norm.default
        made = compat.fake_result(op, (x, torch.empty(3), 1e-6, 0.0), {})
    assert compat.is_fake(made) and made.shape == (2, 3)


@case
def graph_module(there):
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    made = compat.graph_module(gm, gm.graph)
    assert made(1) == 2 and (type(made).__mro__[1] is torch.fx.GraphModule) != there


@functools.cache
def model():
    return zoo.causal_lm(**zoo.SMALL)


def static_inputs():
    """How many inputs of a decode step AOTAutograd finds at fixed addresses. Its logits are eager's, and all layers fused."""
    found = []

    def inner(name):
        return aot_autograd(fw_compiler=lambda gm, _: found.append(TracingContext.get().fw_metadata.static_input_indices) or gm)

    tokens = zoo.tokens_for(2, 1)
    (theirs, mask), (ours, _) = zoo.prefill(model(), 2, "static"), zoo.prefill(model(), 2, "static")
    torch._dynamo.reset()
    clear_reports()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "lookup_backend", inner)
        run = torch.compile(model(), backend="gdnfuse", fullgraph=True, options={"strict": True})
        assert zoo.relative(zoo.decode(run, ours, mask, tokens), zoo.decode(model(), theirs, mask, tokens)) < 1e-5
    (report,) = reports()
    assert report.fused_layers == 1 and report.rewritten
    return len(found[0])


@case
def keep_sources(there):
    assert there or static_inputs() == 0  # with it: as the next


@case
def like_an_input(there):
    gm, node = SimpleNamespace(_param_name_to_source={}), torch.fx.Graph().placeholder("x")
    compat.like_an_input(gm, node)
    assert hasattr(node, "_dynamo_source") == there == hasattr(gm, "_param_name_to_source")


@case
def like_a_parameter(there):
    assert static_inputs() > 10 if there else static_inputs() == 0


@case
def source_name(there):
    node = torch.fx.Graph().placeholder("x")
    assert compat.source_name(node) == "x"
    node._dynamo_source = SimpleNamespace(name="L['self'].weight") if there else object()
    assert compat.source_name(node) == ("L['self'].weight" if there else "x")


@case
def grouped_mm(there):
    assert (compat.grouped_mm() is torch._grouped_mm) == there


# Dynamo


@case
def mark_static_address(there):
    x = torch.ones(2)
    compat.mark_static_address(x)
    assert compat.is_marked(x) == there == (getattr(x, "_dynamo_static_input_type", None) == "unguarded")


@case
def mark_any_length(there):
    x = torch.ones(2, 3)
    compat.mark_any_length(x, 1)
    assert compat.is_marked(x) == there and getattr(x, "_dynamo_weak_dynamic_indices", set()) == ({1} if there else set())


@case
def dynamo_setting(there):
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        assert compat.dynamo_setting("automatic_dynamic_shapes", True) != there


@case
def dynamo_settings(there):
    before = torch._dynamo.config.recompile_limit
    with compat.dynamo_settings(recompile_limit=77):
        assert torch._dynamo.config.recompile_limit == (77 if there else before)
    assert torch._dynamo.config.recompile_limit == before


def broken():
    """What is found of a function that breaks its graph, and is compiled twice."""

    def breaks(x):
        torch._dynamo.graph_break()
        return x + 1

    with causes.noted() as found:
        run = torch.compile(breaks, backend="eager")
        for dtype in (torch.float32, torch.float64):
            run(torch.ones(2, dtype=dtype))
        most = torch._dynamo.utils._compilation_metrics.maxlen
    return found, most


@case
def compilation_notes(there):
    found, _ = broken()
    assert bool(found.breaks()) == bool(found.recompilations({})) == there


@case
def graph_break(there):
    def broken(x):
        torch._dynamo.graph_break()
        return x.cos()

    def noting(gm, inputs):
        found.append(compat.graph_break(gm))
        return gm.forward

    found = []
    torch.compile(lambda x: broken(x.sin()), backend=noting)(torch.ones(3))
    broke = [bool(reason and reason.reason and reason.user_stack) for reason in found]
    assert broke == [there, *[False] * (len(found) - 1)] and len(found) > 1


@case
def remembering_compilations(there):
    before = torch._dynamo.utils._compilation_metrics.maxlen
    found, most = broken()
    assert bool(found.breaks()) == (most == causes.METRICS) == there
    assert torch._dynamo.utils._compilation_metrics.maxlen == before


@contextmanager
def captured(**options):
    """A function of a model is loaded, and gives what is captured when it is compiled."""
    name = "torch_chunk_gated_delta_rule"
    late = types.ModuleType("transformers.models.late.modeling_late")
    old = inspect.unwrap(getattr(modeling, name))
    function = types.FunctionType(old.__code__, old.__globals__, old.__name__, old.__defaults__)
    setattr(late, name, function)
    q, k, v = (torch.randn(1, 5, 2, 4) for _ in range(3))
    g, beta = -torch.rand(1, 5, 2), torch.rand(1, 5, 2)

    def run(backend="gdnfuse"):
        torch._dynamo.reset()
        clear_reports()
        options = {"inner": "eager"} if backend == "gdnfuse" else None
        compiled = torch.compile(lambda: function(q, k, v, g=g, beta=beta), backend=backend, fullgraph=True, options=options)
        torch.testing.assert_close(compiled()[0], function(q, k, v, g=g, beta=beta)[0])
        return [r.rule for report in reports() for r in report.all_records if r.stage == "capture"]

    capture.uninstall()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, late.__name__, late)
        capture.install()
        yield run
        capture.uninstall()
    capture.install()


@case
def at_compile_start(there):
    with captured() as run:  # what is there when the backend is loaded is captured in any case
        assert run() == ["chunk_delta_rule"]
    calls = []
    note = lambda *_: calls.append(1)  # noqa: E731
    assert compat.at_compile_start(note) == there
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    assert calls == [1, 1] * there
    compat.not_at_compile_start(note)
    if there:
        capture.install()


@case
def not_at_compile_start(there):
    note = lambda *_: None  # noqa: E731
    if there:
        compat.at_compile_start(note)
    compat.not_at_compile_start(note)
    assert note not in torch._dynamo.callback.callback_handler.start_callbacks


@case
def undo_substitution(there):
    with captured() as run:
        assert run() == ["chunk_delta_rule"]
        capture.uninstall()
        assert run() == [] and bool(capture._originals) != there
        capture.install()
        assert run() == ["chunk_delta_rule"]


@case
def trace_instead(there):
    class Box:
        def __getitem__(self, x):
            return x - 1

    box, x = Box(), torch.ones(2)
    for instead, traced in ((lambda self, x: x + 1, 2.0), (None, 0.0)):
        assert compat.trace_instead(Box.__getitem__, instead) == there
        torch._dynamo.reset()
        found = torch.compile(lambda x: box[x], backend="eager", fullgraph=True)(x)
        assert torch.equal(found, x * (traced if there else 0.0)) and torch.equal(box[x], x - 1)


@case
def under_functorch(there):
    with captured() as run:
        assert run() == ["chunk_delta_rule"] * there


@case
def compiling_for(there):
    assert compat.compiling_for() is None
    seen = []
    with captured() as run, pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "compiling_for", lambda: seen.append(found()) or seen[-1])
        found = compat.ENTRIES["compiling_for"]
        assert run() == ["chunk_delta_rule"] and run("eager") == []
    assert all(x is not None for x in seen) == there


@case
def lookup_backend(there):
    gm, x = torch.fx.symbolic_trace(lambda x: (x @ x,)), torch.ones(2, 2)  # no code for Inductor to compile
    for name in ("eager", "aot_eager", "inductor"):
        assert compat.lookup_backend(name)(gm, [x])(x)[0].tolist() == [[2, 2]] * 2
    if there:
        with pytest.raises(Exception, match="nonsense"):
            compat.lookup_backend("nonsense")


@case
def inductor(there):
    gm, x = torch.fx.symbolic_trace(lambda x: (x @ x,)), torch.ones(2, 2)
    run = compat._lookup("inductor")(gm, [x], config_patches={"max_autotune": False})
    assert run(x)[0].tolist() == [[2, 2]] * 2 and (run == gm.forward) != there


@case
def add_to_trace(there):
    found = []
    with pytest.MonkeyPatch.context() as patch:
        if there:
            patch.setattr(compat.ENTRIES["add_to_trace"], "apis", (lambda *args, **kwargs: found.append(kwargs["payload_fn"]()),))
        compat.add_to_trace("gdnfuse_report", "json", lambda: {"a": 1})
    assert found == [{"a": 1}] * there


# Inductor


@case
def modes(there):
    assert compat.modes()["reduce-overhead"] == {"triton.cudagraphs": True} and compat.modes()["default"] == {}
    assert compat.MODES.items() <= torch._inductor.list_mode_options().items()


@case
def inductor_options(there):
    known = compat.inductor_options()
    assert "triton.cudagraphs" in known if there else known is None
    with pytest.raises(GdnfuseError, match="Unknown Inductor option") if there else nullcontext():
        patches = backend._inductor_patches(None, Options(inductor={"nonsense": 1}))
        assert patches == {"nonsense": 1}


@case
def fresh_cache(there):
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with compat.fresh_cache():
        within = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert within != before and os.path.isdir(within)
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before


@case
def of_the_model(there):
    node = torch.fx.Graph().placeholder("eps")
    assert not compat.of_the_model(node)
    source = GuardSource.LOCAL_UNSPECIALIZED_NN_MODULE
    for said in (source, lambda: source):  # an attribute, or a method as in torch 2.11
        node._dynamo_source = SimpleNamespace(guard_source=said)
        assert compat.of_the_model(node) == there
    node._dynamo_source = SimpleNamespace(guard_source=GuardSource.LOCAL)
    assert not compat.of_the_model(node)


@case
def is_number(there):
    module = torch.nn.LayerNorm(4, eps=1e-5).requires_grad_(False)
    module.forward = lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + module.eps)
    gate = lambda x: -x[0].exp() * F.softplus(module(x) + x[1])  # noqa: E731
    torch._dynamo.reset()
    clear_reports()
    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(gate, backend="gdnfuse", dynamic=True, options={"inner": "aot_eager"})(x), gate(x))
    assert len(reports()) == (1 if there else 2)


# Triton


@case
def dependent_launch(there):
    assert [f is not None for f in compat.dependent_launch()] == [there, there]
    x = SimpleNamespace(device=torch.device("cuda"), is_contiguous=lambda: True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert implementation.overlap_options(x) == ({"launch_pdl": True} if there else {})


@case
def gluon(there):
    assert (compat.gluon() is not None) == there
    weight = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda", 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert linear_configs.rings(weight) == there


@case
def gluon_tiles(there):
    assert (compat.gluon_tiles() is not None) == there


@case
def interpreting(there):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TRITON_INTERPRET", "1")
        assert compat.interpreting()
        patch.delitem(os.environ, "TRITON_INTERPRET")
        assert not compat.interpreting()


@case
def parameters(there):
    from gdnfuse.kernels.add_rms_norm import add_rms_norm_kernel

    found = compat.parameters(add_rms_norm_kernel if there else object())
    assert [p.name for p in found if p.is_constexpr] == ["N", "PARTS", "BN", "OVERLAP"] if there else found is None
    arguments = {"x": torch.empty(1, 8), "residual": torch.empty(1, 8), "weight": torch.empty(8), "eps": 1e-6}
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        if not there:
            patch.setattr(compat, "parameters", lambda kernel: None)
        assert implementations()["add_rms_norm"].plan(arguments) == []


@case
def machine_codes(there):
    from gdnfuse.kernels.add_rms_norm import add_rms_norm_kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(add_rms_norm_kernel, "device_caches", {0: ({"a": 1, "b": 2}, None)})
        assert compat.machine_codes(add_rms_norm_kernel) == (2 if there else 0)
    assert compat.machine_codes(None) == 0


@case
def machine_code_files(there):
    from gdnfuse.kernels.add_rms_norm import add_rms_norm_kernel

    gone = SimpleNamespace(hash="b", metadata_group={"b.json": "/no/such/file"})
    code = SimpleNamespace(hash="a", metadata_group={"this.py": __file__})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(add_rms_norm_kernel, "device_caches", {0: ({1: code, 2: gone}, None)})
        found = compat.machine_code_files(add_rms_norm_kernel)
    assert found == ({"a": {"this.py": Path(__file__).read_bytes()}} if there else {})
    assert compat.machine_code_files(None) == {}


@case
def keep_machine_code(there):
    from triton.runtime.cache import get_cache_manager

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", folder)
        compat.keep_machine_code("ab" * 32, {"k.json": b"{}", "k.cubin": b"code"}, 0)
        found = get_cache_manager("ab" * 32).get_group("k.json")
        assert (found or {}).keys() == ({"k.json", "k.cubin"} if there else set())
        assert not there or Path(found["k.cubin"]).read_bytes() == b"code"


@case
def cache_folder(there):
    assert Path(compat.cache_folder()).is_dir() if there else compat.cache_folder() is None


class Compiled:
    function, packed_metadata, run = "function", "packed", "run"

    def __getitem__(self, grid):
        hooks = compat.launch_hooks()
        enter, leave = (hooks.launch_enter_hook, hooks.launch_exit_hook) if hooks else (None, None)
        return lambda *args, stream: self.run(*grid, stream, self.function, self.packed_metadata, None, enter, leave, *args)


@case
def runner(there):
    compiled = Compiled() if there else SimpleNamespace(run=None)
    assert (compat.runner(compiled, (1, 1, 1)) is not None) == there


@case
def launch_hooks(there):
    assert (compat.launch_hooks() is not None) == there
    assert (compat.launcher(Compiled(), (2, 3, 1)) == ("run", "function", "packed")) == there


@case
def launcher(there):
    compiled = Compiled() if there else SimpleNamespace(run=None)
    assert compat.launcher(compiled, (2, 3, 1)) == (("run", "function", "packed") if there else None)


# torch: launches that are repeated


@case
def dispatch_mode(there):
    assert [x is not None for x in compat.dispatch_mode()] == [there, there]
    op, x = replay.Replayed(lambda x: torch.empty_like(x).fill_(2), implementation._standing_in), torch.ones(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "Mode", compat.dispatch_mode()[0])
        if not there:
            patch.setattr(replay, "_Recording", None)
        assert [op(x).tolist() for _ in range(4)] == [[2.0] * 3] * 4
    assert list(op.layouts.values()) == [replay.NOT_RECORDED]


@case
def seeing_ops(there):
    seen = []
    with compat.seeing_ops(lambda op, result: seen.append((op.name(), result.shape))):
        torch.ones(2).mul(3)
    assert (("aten::mul.Tensor", (2,)) in seen) == there


NOTHING = Recorded([((1,), (1,), torch.float32, torch.device("cpu"))], [], [Result(0, None)], False)  # but an allocation


@case
def tensor_guards(there):
    x = torch.ones(2, 3)
    match = codegen.repeating_function((x,), {}, [x], -1, NOTHING)
    assert match(x).shape == (1,) and match(x.T) is codegen.MISSED if there else match is None


@case
def current_device(there):
    assert callable(compat.current_device()) and (there or compat.current_device() is torch.cuda.current_device)


@case
def current_stream(there):
    assert callable(compat.current_stream())


@case
def empty(there):
    made = compat.empty(torch.device("cpu"))((2, 3), (1, 2), torch.bfloat16)
    assert (made.shape, made.stride(), made.dtype, made.device.type) == ((2, 3), (1, 2), torch.bfloat16, "cpu")
    assert (compat.empty(torch.device("cuda")) is torch._C._dynamo.guards._empty_strided_cuda) == there


@case
def known_to_inductor(there):
    from torch._inductor.lowering import lowerings

    op = implementations()["add_rms_norm"].op
    before = lowerings.pop(op, None)
    announce(SimpleNamespace(graph=SimpleNamespace(nodes=[SimpleNamespace(op="call_function", target=op)])))
    assert (op in lowerings) == there
    lowerings.pop(op, None)
    if before is not None:
        lowerings[op] = before


@case
def called_by_inductor(there):
    """See tests/kernels/test_inductor.py."""
    made = SimpleNamespace(op_overload="op", python_kernel_name="dispatched")
    if there:
        from torch._inductor.ir import FallbackKernel
        from torch._inductor.virtualized import V

        operation = object.__new__(FallbackKernel)
        operation.__dict__.update(vars(made))
        with V.set_graph_handler(SimpleNamespace(cpp_wrapper=False, operations=[operation, object()])):
            assert compat.called_by_inductor("op", "direct") is None
        assert operation.python_kernel_name == "direct"
    else:
        assert compat.called_by_inductor("op", "direct") is None


@case
def triton_key(there):
    assert callable(compat.triton_key()) == there


# torch: attention of prompts


@case
def flash_attention(there):
    assert (compat.flash_attention() is not None) == there
    q, kv = torch.empty(1, 4, 8, 256, dtype=torch.bfloat16), torch.empty(1, 2, 8, 256, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_attention, "FLASH", compat.flash_attention())
        patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        if there:
            causal_attention.supports(q, kv, kv)
        else:
            with pytest.raises(causal_attention.Refused, match="FlashAttention-2 must be part of torch"):
                causal_attention.supports(q, kv, kv)


@case
def cudnn_attention(there):
    assert (compat.cudnn_attention() is not None) == there
    q = torch.randn(1, 2, 4, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_attention, "CUDNN", there and (lambda *args, scale: (q + 1,)) or compat.cudnn_attention())
        patch.setattr(causal_attention, "FLASH", lambda *args, scale: (q,))
        patch.setattr(causal_attention, "LONG", 4)
        patch.setattr(causal_attention, "_cudnn_takes", lambda q, k, v: True)
        torch.testing.assert_close(causal_attention.launch(q, q, q), q + there)


# torch: modules


@case
def global_hooks(there):
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert compat.global_hooks() == ((handle.id,) if there else ())
    handle.remove()
    assert compat.global_hooks() == ()


@case
def call_of(there):
    module, calls = torch.nn.Linear(2, 2), []
    module.register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(compat.call_of(module)(torch.ones(2)), module(torch.ones(2)))
    assert len(calls) == 2 and (compat.call_of(module) == module._call_impl) == there


@case
def set_compiled_call(there):
    """A model's calls are compiled, or eager."""
    ours, ids = copy.deepcopy(model()), zoo.prompt(2)[0]
    clear_reports()
    compile.compile(ours, inner="eager")
    asked = {"max_new_tokens": 2, "do_sample": False, "cache_implementation": "static"}
    assert torch.equal(ours.generate(ids, **asked), model().generate(ids, **asked))
    assert [r.phase for r in reports()] == ["prefill", "decode"] * there
    torch.testing.assert_close(ours(ids).logits, model()(ids).logits)
    assert (compat.compiled_call(ours) is not None) == there
    with nullcontext() if there else pytest.raises(GdnfuseError, match="strict: torch must let a model's call be replaced"):
        compile.compile(ours, inner="eager", strict=True)
    compat.set_compiled_call(ours, None)
    assert compat.compiled_call(ours) is None


@case
def python_dispatcher(there):
    """What torch 2.11 cannot multiply in C++, the last rows of some whose number is symbolic, has a value where it is there."""
    sizes = StatelessSymbolicContext([DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    x = mode.from_tensor(torch.randn(2, 7, 6), symbolic_context=sizes)
    with mode, compat.python_dispatcher():
        if there:
            assert F.linear(x[:, -1:], torch.empty(6, 6)).shape == (2, 1, 6)


@case
def replace_stop_check(there):
    """On a GPU generate asks one step late whether to stop (tests/generation/test_stopping.py), or at every step."""
    assert compat.replace_stop_check(stopping.stop_check) == there
    assert compat.replace_stop_check(lambda theirs: pytest.fail("it is replaced once")) == there


@case
def compiled_call(there):
    module = torch.nn.Linear(2, 2)
    module.compile(backend="eager")
    assert (compat.compiled_call(module) is not None) == there


@case
def storage_holders(there):
    x = torch.zeros(2)
    before = compat.storage_holders([x])
    assert (compat.storage_holders([x]) == before) == there
    view = x[:1]
    assert compat.storage_holders([x]) == [before[0] + 1] or not there
    del view


@case
def everything_of(there):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    if not there:  # what has the public interface alone
        names = ("modules", "parameters", "buffers")
        module = SimpleNamespace(**{name: getattr(module, name) for name in names})
    modules, tensors = compat.everything_of(module)
    assert len(modules) == 3 and len(tensors) == 2 + 2 + 3


@case
def version_counters(there):
    x = torch.zeros(2)
    if not there:
        assert compat.version_counters([object()]) == [0]
        return
    (before,) = compat.version_counters([x])
    x.add_(1)
    with torch.inference_mode():
        assert compat.version_counters([x, torch.zeros(2)]) == [before + 1, 0]


@case
def not_cast(there):
    class Stored(torch.nn.Linear):
        def stored(self):
            return (self.weight,)

    assert compat.not_cast(Stored) is Stored
    module = Stored(2, 2).half()
    assert module.weight.dtype == (torch.float32 if there else torch.float16) and module.bias.dtype == torch.float16
    assert module.to("meta").weight.is_meta


@case
def hooks_of(there):
    if not there:
        assert compat.hooks_of(object()) == {}
        return
    module = torch.nn.Linear(2, 2)
    handles = [module.register_forward_pre_hook(lambda *a: None), module.register_forward_hook(lambda *a: None)]
    assert [*compat.hooks_of(module)] == [handle.id for handle in handles]
    for handle in handles:
        handle.remove()
    assert compat.hooks_of(module) == {}


@case
def add_to_all(there):
    tensors, add = [torch.tensor(7), torch.tensor(9)], compat.add_to_all()
    assert (add is not None) == there
    if there:
        add(tensors, 3)
        assert tensors == [10, 12]


@case
def subtract_from_all(there):
    tensors = [torch.tensor(7), torch.tensor(9)]
    compat.subtract_from_all(tensors, 3)
    assert tensors == [4, 6]
    compat.subtract_from_all([], 3)


@case
def copy_all(there):
    to, tensors = [torch.zeros(2), torch.zeros(3, 1)], [torch.rand(2), torch.rand(3, 1)]
    compat.copy_all(to, tensors)
    assert all(map(torch.equal, to, tensors))
    compat.copy_all([], [])


@case
def pipeline_stage(there):
    if not there:
        assert compat.pipeline_stage(object()) is None
        return
    model = torch.nn.Linear(2, 2)
    assert compat.pipeline_stage(model) is None
    model._pp_stage = stage = object()
    assert compat.pipeline_stage(model) is stage


@case
def hook_of_accelerate(there):
    if not there:
        assert compat.hook_of_accelerate(object()) is None
        return
    hooks, module = pytest.importorskip("accelerate.hooks"), torch.nn.Linear(2, 2)
    assert compat.hook_of_accelerate(module) is None
    hooks.add_hook_to_module(module, hook := hooks.ModelHook())
    assert compat.hook_of_accelerate(module) is hook


@case
def aligns_devices(there):
    hooks = pytest.importorskip("accelerate.hooks")
    assert compat.aligns_devices(hooks.AlignDevicesHook()) == there
    assert not compat.aligns_devices(hooks.ModelHook()) and not compat.aligns_devices(hooks.SequentialHook())


@case
def without_hook(there):
    if not there:
        assert compat.without_hook(object()) == {}
        return
    hooks, module = pytest.importorskip("accelerate.hooks"), torch.nn.Linear(2, 2)
    hooks.add_hook_to_module(module, hooks.ModelHook())
    assert compat.without_hook(module) == dict.fromkeys(("forward", "_hf_hook", "_old_forward"))
    own = torch.nn.Linear(2, 2)
    own.forward = forward = lambda x: x
    hooks.add_hook_to_module(own, hooks.ModelHook())
    assert compat.without_hook(own)["forward"] is forward


@case
def attention_of(there):
    assert compat.attention_of(model().config if there else object()) == ("sdpa" if there else "")


@case
def uncompiled(there):
    module, function = torch.nn.Linear(2, 2), lambda x: x
    for given in (module, function):
        assert compat.uncompiled(torch.compile(given)) is given is compat.uncompiled(given)
