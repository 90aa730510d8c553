"""Weights of a compiled model: whatever is done to them, results are eager's, and no memory stays behind."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch.nn.utils import parametrize

import gdnfuse
from gdnfuse import packing
from tests.models import zoo


def small():
    return zoo.causal_lm(**zoo.SMALL)


def compiled(model):
    return torch.compile(model, backend="gdnfuse", options={"inner": "eager"})


@torch.no_grad()
def steps(model, call, batch=1):
    """Logits of two decode steps behind an eager prompt, in one vector."""
    cache = zoo.new_cache(model, "static")
    model(input_ids=zoo.prompt(batch)[0], **zoo.held(cache))
    return zoo.decode(call, cache, None, zoo.tokens_for(batch, 2)).flatten()


@torch.no_grad()
def outputs(model, call, batch=1):
    """Logits of a prompt and of two decode steps behind another, in one vector."""
    behind = steps(model, call, batch)
    return torch.cat([call(input_ids=zoo.prompt(batch)[0], use_cache=False).logits.flatten(), behind])


def nbytes(model):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}.values())


def storages(model):
    return [weakref.ref(p.untyped_storage()) for p in model.parameters()]


@pytest.fixture(autouse=True)
def buffers(set_aside):
    """Those made since the test began: models of other tests may live as long as their module."""
    before = set(packing._buffers)
    return lambda: [places for places in packing._buffers if places not in before]


def left_behind(model, buffers):
    """Addresses of what packing keeps alive for nobody: parts of buffers that are no weight, and weights of former buffers."""
    gc.collect()
    weights = {p.data_ptr() for p in model.parameters()}
    parts = {place[0] for places in buffers() for place in places}
    return (parts - weights) | ({p.data_ptr() for p in model.parameters() if p.untyped_storage() in packing._ranges} - parts)


def gdn(model):
    return model.model.layers[0].linear_attn


def new_values(model):
    """As many as the model has, none of them what it had; the same for a model with the same values, and of their size."""
    first = next(iter(model.state_dict().values())).flatten()[0].item()
    generator = torch.Generator().manual_seed(hash(first))
    return {k: v * (0.7 + 0.6 * torch.rand(v.shape, generator=generator)).to(v) for k, v in model.state_dict().items()}


def loaded(model):
    model.load_state_dict(new_values(model))


def assigned(model):
    model.load_state_dict(new_values(model), assign=True)


def data(model):
    for name, value in new_values(gdn(model)).items():
        gdn(model).get_parameter(name).data = value


def copied(model):
    with torch.no_grad():
        for name, value in new_values(gdn(model)).items():
            gdn(model).get_parameter(name).copy_(value)


def parameter(model):
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = torch.nn.Parameter(new_values(linear)["weight"], requires_grad=False)


def submodule(model):
    for parent, name in ((gdn(model), "in_proj_qkv"), (model.model.layers[0], "mlp")):
        new = copy.deepcopy(getattr(parent, name))
        new.load_state_dict(new_values(new))
        setattr(parent, name, new)


def dtype(model):
    loaded(model)
    model.double()


def dtype_and_back(model):
    loaded(model)
    model.bfloat16().float()


def device_and_back(model):
    """Without memory in between: what was there comes from a file or another process."""
    values = new_values(model)
    old = storages(model)
    model.to("meta")
    gc.collect()
    assert not any(storage() for storage in old), "nobody has called the model since, and its memory is free all the same"
    model.to_empty(device="cpu")
    model.load_state_dict(values, strict=False)
    # Of the buffers that no checkpoint has.
    model.model.rotary_emb.__init__(model.config)


def tied(model):
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.gate_proj.weight


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(model):
    parametrize.register_parametrization(gdn(model).in_proj_z, "weight", Doubled())


def swapped(model):
    mlps = [layer.mlp for layer in model.model.layers]
    for layer, mlp in zip(model.model.layers, mlps[::-1], strict=True):
        layer.mlp = mlp


# One after another on one compiled model: values and memory first, which compile nothing anew, then what a graph depends on.
EVENTS = {
    "values": [loaded, assigned, data, copied, parameter, submodule, swapped, dtype_and_back, device_and_back],
    "structure": [tied, parametrized, dtype],
}


@pytest.mark.parametrize("kind", EVENTS)
def test_after(kind, buffers):
    model = small()
    theirs = copy.deepcopy(model)
    run = compiled(model)
    before = outputs(theirs, theirs)
    assert zoo.relative(outputs(model, run), before) < 1e-5
    for event in EVENTS[kind]:
        old = storages(model)
        event(model)
        event(theirs)
        wanted = outputs(theirs, theirs)
        assert zoo.relative(wanted, before) > 1e-3, f"{event.__name__} must show in the results"
        for _ in range(2):
            assert zoo.relative(outputs(model, run), wanted) < 1e-5, event.__name__
        assert all(report.rewritten for report in gdnfuse.reports()), event.__name__
        assert nbytes(model) == nbytes(theirs) and not left_behind(model, buffers), event.__name__
        now = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert all(s() is None or s().data_ptr() in now for s in old), f"{event.__name__}: a weight's former memory stays behind"
        before = wanted


def saved(model, folder):
    model.save_pretrained(folder)
    return folder.joinpath("model.safetensors").stat().st_size


def torch_saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return len(file.getvalue())


def test_copies_and_files_are_no_larger_than_eagers(tmp_path, buffers):
    model = small()
    theirs = copy.deepcopy(model)
    gdnfuse.compile(model, inner="eager")
    wanted = outputs(theirs, theirs)
    assert zoo.relative(outputs(model, model), wanted) < 1e-5
    assert buffers(), "the weights are packed"
    assert saved(model, tmp_path / "ours") == saved(theirs, tmp_path / "theirs")
    part, their_part = gdn(model).in_proj_a, gdn(theirs).in_proj_a
    assert torch_saved(part.state_dict()) == torch_saved(their_part.state_dict())
    assert torch_saved(model.state_dict()) == torch_saved(theirs.state_dict())
    assert len(pickle.dumps(model)) < 1.01 * len(pickle.dumps(theirs))
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "reload": type(model).from_pretrained(tmp_path / "ours", dtype=torch.float32),
    }
    for name, twin in copies.items():
        assert nbytes(twin) == nbytes(theirs), name
        # Tensors of a file start anywhere in memory, which shows in a last bit; copies of them start where all others do.
        aligned = copy.deepcopy(twin)
        assert torch.equal(outputs(aligned, aligned), wanted), name
        assert zoo.relative(steps(twin, compiled(twin)), steps(theirs, theirs)) < 1e-5, name
    with torch.no_grad():
        for twin in copies.values():
            loaded(twin)
    assert zoo.relative(outputs(model, model), wanted) < 1e-5, "a copy has weights of its own"


@pytest.mark.parametrize("inner", [pytest.param("eager", marks=pytest.mark.sweep), "aot_eager"])
def test_a_deleted_model_leaves_nothing(inner, buffers):
    """Without a reset: the compiled graphs stay in torch, weights and caches do not."""
    model = small()
    run = torch.compile(model, backend="gdnfuse", options={"inner": inner})
    cache, _ = zoo.prefill(model, 1, "static")
    zoo.decode(run, cache, None, zoo.tokens_for(1, 2))
    run(input_ids=zoo.prompt(1)[0], use_cache=False)
    alive = [weakref.ref(model), *storages(model), *map(weakref.ref, zoo.states(cache)["recurrent"])]
    assert buffers()
    del model, run, cache
    gc.collect()
    assert not [ref for ref in alive if ref() is not None] and not buffers()


def test_two_models_share_modules(buffers):
    """One writes, both see it, and there is one copy of the weights."""
    first, second = small(), small()
    second.model = first.model
    twins = [(first, compiled(first)), (second, compiled(second))]
    for model, run in twins:
        assert zoo.relative(steps(model, run), steps(model, model)) < 1e-5
    assert nbytes(first) == nbytes(second) and not left_behind(first, buffers)
    copied(first)
    data(second)
    for model, run in twins:
        assert zoo.relative(steps(model, run), steps(model, model)) < 1e-5
    assert not left_behind(first, buffers)


@torch.no_grad()
def test_two_models_share_memory():
    """Parameters of their own on the same memory: packing would part them, so it is refused."""
    first, second = small(), small()
    second.load_state_dict(first.state_dict(), assign=True)
    run = compiled(first)
    before = outputs(first, run)
    reasons = {r.reason for g in gdnfuse.reports() for r in g.all_records if r.rule == "packed_linear"}
    assert reasons == {"The memory of a packed weight must be one tensor's, found that 2 tensors share it."}
    for p in second.parameters():
        p.mul_(1.5)
    after = outputs(first, run)
    assert zoo.relative(after, before) > 1e-3 and zoo.relative(after, outputs(second, second)) < 1e-5
    # Once the other is gone, a new compilation packs.
    del second, p
    torch._dynamo.reset()
    assert zoo.relative(outputs(first, compiled(first)), after) < 1e-5
    assert [g.fused_layers for g in gdnfuse.reports()[-2:]] == [1, 1]


class Int8(torch.Tensor):
    """An int8 matrix [M, N] with a scale per row that says it is a floating one, as torchao's weights do."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __repr__(self):
        return "Int8(…)"

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, size, stride):
        return Int8(tensors["values"], tensors["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Int8(args[0].values, args[0].scale)
        if func in (torch.ops.aten.t.default, torch.ops.aten.mm.default):
            return func(*(a.values * a.scale if isinstance(a, Int8) else a for a in args))
        raise NotImplementedError(f"{func}: this weight is for linears alone")


def rounded(weight):
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return (weight.detach() / scale).round().to(torch.int8), scale


class ScaledLinear(torch.nn.Module):
    """A linear that widens its weight in its forward, as modules for float8 checkpoints do."""

    def __init__(self, linear):
        super().__init__()
        values, scale = rounded(linear.weight)
        self.weight, self.scale = torch.nn.Parameter(values, requires_grad=False), scale

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@torch.library.custom_op("gdnfuse_test::int8_linear", mutates_args=())
def int8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight.to(x.dtype) * scale)


@int8_linear.register_fake
def _(x, weight, scale):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class OpaqueLinear(ScaledLinear):
    """A linear whose product is an operation of its own, as bitsandbytes' is."""

    def forward(self, x):
        return int8_linear(x, self.weight, self.scale)


def subclassed(linear):
    linear.weight = torch.nn.Parameter(Int8(*rounded(linear.weight)), requires_grad=False)
    return linear


PLAIN = "Packed weights must be plain tensors, found Int8."
QUANTIZED = {
    # How, and what is said of the weights that are left alone. Of an opaque operation nobody says that it is a linear.
    "subclass": (subclassed, {PLAIN}),
    "scaled in forward": (ScaledLinear, {"must be a parameter, found the result of mul"}),
    "opaque operation": (OpaqueLinear, set()),
}


@pytest.mark.parametrize(
    ("how", "batch"), [("subclass", 2), pytest.param("scaled in forward", 1, marks=pytest.mark.sweep), ("opaque operation", 1)]
)
def test_quantized_weights_are_left_alone_and_the_rest_is_fused(how, batch):
    """All but a and b are quantized, as in published checkpoints."""
    quantize, reasons = QUANTIZED[how]
    model = small()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and name not in ("in_proj_a", "in_proj_b", "lm_head"):
                setattr(parent, name, quantize(child))
    run = torch.compile(model, backend="gdnfuse", options={"inner": "aot_eager" if how == "subclass" else "eager"})
    assert zoo.relative(outputs(model, run, batch), outputs(model, model, batch)) < 1e-5
    decode, prompt = gdnfuse.reports()
    fused = {"causal_conv_update", "packed_decode", "gated_rms_norm", "packed_linear"}
    for report, ops in ((decode, fused), (prompt, {"causal_conv", "fused_gating_chunk_delta_rule", "gated_rms_norm"})):
        assert report.rewritten
        for layer in report.layers:
            lowered = {r.rule for r in layer.records if r.stage == "lower"}
            fired = {r.rule for r in layer.records if r.status == "fired" and r.stage != "lower"}
            assert ops <= lowered | fired and "packed_linear" in fired
            found = {r.reason for r in layer.records if r.rule == "packed_linear" and r.reason}
            assert len(found) >= len(reasons) and all(any(wanted in reason for wanted in reasons) for reason in found)
    assert gdn(model).in_proj_a.weight.untyped_storage() in packing._ranges


class Offloaded:
    """Keeps a linear's weight elsewhere and brings it for each call, as hooks for offloading do."""

    def __init__(self, linear, how):
        self.weight, self.how = linear.weight.detach().clone(), how
        self.after(linear, (), None)
        linear.register_forward_pre_hook(self.before)
        linear.register_forward_hook(self.after)

    def before(self, linear, args):
        if self.how == "written":
            linear.weight.copy_(self.weight)
        else:
            linear.weight = torch.nn.Parameter(self.weight, requires_grad=False)

    def after(self, linear, args, out):
        if self.how == "written":
            linear.weight.zero_()
        else:
            linear.weight = torch.nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)


@pytest.mark.parametrize(
    ("how", "reason"),
    [("written", "must not be written in place, found that copy_ writes it"), ("meta", "")],
)
def test_hooks_that_bring_a_weight_for_each_call(how, reason):
    model = small()
    theirs = copy.deepcopy(model)
    hook = Offloaded(gdn(model).in_proj_z, how)
    run = compiled(model)
    for _ in range(2):
        wanted = steps(theirs, theirs)
        assert zoo.relative(steps(model, run), wanted) < 1e-5
        hook.weight.mul_(1.5)
        gdn(theirs).in_proj_z.weight.mul_(1.5)
    decode = next(report for report in gdnfuse.reports() if report.phase == "decode")
    # The linear stays as it is and the rest is fused around it. Where the hook breaks the graph, there is nothing to refuse: no
    # other linear reads what the offloaded one reads.
    assert decode.fused_layers == 1
    reasons = [record.reason for record in decode.layers[0].records if record.status == "refused"]
    assert any(reason in r for r in reasons) if reason else not reasons, reasons


class Spread(torch.nn.Module):
    """A gate, which makes it a GDN layer, and a linear on another device."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(8, 4, bias=False, device="meta")
        self.A_log = torch.nn.Parameter(torch.randn(4))

    def forward(self, x):
        return -self.A_log.exp() * torch.nn.functional.softplus(self.a(x) + self.A_log), self.b(x.to("meta"))


@torch.no_grad()
def test_parameters_on_several_devices_are_in_a_graph_for_each():
    model, x = Spread(), torch.randn(2, 8)
    found, _ = compiled(model)(x)
    assert torch.equal(found, model(x)[0])
    assert [(len(report.layers), report.note) for report in gdnfuse.reports()] == [(1, ""), (0, "")]
