"""Packed weights: views of one buffer, no doubled memory, and right whatever the user does to the parameters afterwards."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

import gdnfuse
from gdnfuse.packing import PackedWeight, PackedWeights, check, pack


def parameters(*rows, width=4, dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(r, width, dtype=dtype)) for r in rows]


def adjacent(weights):
    """Whether tensors lie one behind the other, each with a storage of its own bytes and no others."""
    ends = [w.data_ptr() + w.nbytes for w in weights]
    own = all(w.untyped_storage().nbytes() == w.nbytes and w.is_contiguous() for w in weights)
    return own and [w.data_ptr() for w in weights[1:]] == ends[:-1]


def ranges_of(buffer, weights):
    return adjacent(weights) and buffer.data_ptr() == weights[0].data_ptr() and buffer.nbytes == sum(w.nbytes for w in weights)


def test_parameters_become_views_and_keep_their_values():
    weights = parameters(3, 5, 1)
    values = [w.detach().clone() for w in weights]
    buffer = pack(weights)
    assert torch.equal(buffer, torch.cat(values))
    assert ranges_of(buffer, weights)
    for w, v in zip(weights, values, strict=True):
        assert isinstance(w, torch.nn.Parameter) and w.is_leaf and w.requires_grad and w.is_contiguous() and torch.equal(w, v)
    with torch.no_grad():
        weights[1].mul_(2.0)
    assert torch.equal(buffer[3:8], values[1] * 2)


def test_a_single_column_keeps_its_strides_which_dynamo_has_seen():
    weights = [torch.nn.Parameter(torch.randn(1, rows).t()) for rows in (3, 5)]
    assert ranges_of(pack(weights), weights) and [w.stride() for w in weights] == [(1, 3), (1, 5)]


@pytest.mark.parametrize("part", [slice(0, 3), slice(0, 2), slice(1, 3)])
def test_a_second_pack_reuses_the_buffer(part):
    weights = parameters(3, 5, 1)
    first = pack(weights)
    second = pack(weights[part])
    assert ranges_of(second, weights[part]) and ranges_of(first, weights)
    assert torch.equal(second, torch.cat([w.detach() for w in weights[part]]))


def test_another_order_gets_a_buffer_of_its_own_and_both_stay_right():
    weights = parameters(2, 3)
    values = [w.detach().clone() for w in weights]
    ahead, back = PackedWeight((0, 1)), PackedWeight((1, 0))
    for _ in range(2):
        for packed, wanted in ((ahead, values), (back, values[::-1])):
            buffer = packed.current(weights)
            assert torch.equal(buffer, torch.cat(wanted)) and ranges_of(buffer, weights if packed is ahead else weights[::-1])


def test_current_keeps_the_buffer_until_a_part_moves():
    weights = parameters(2, 3)
    packed = PackedWeight((1, 0))
    args = weights[::-1]
    buffer = packed.current(args)
    assert packed.current(args) is buffer
    new = torch.randn(3, 4)
    weights[1].data = new.clone()
    moved = packed.current(args)
    assert torch.equal(moved[2:], new) and ranges_of(moved, weights)


def test_two_parameters_swapped():
    weights = parameters(3, 3)
    packed = PackedWeight((0, 1))
    packed.current(weights)
    a, b = weights[0].detach().clone(), weights[1].detach().clone()
    assert torch.equal(packed.current(weights[::-1]), torch.cat([b, a]))
    assert torch.equal(weights[0], a) and torch.equal(weights[1], b)


def test_buffers_go_with_their_parameters(set_aside):
    weights = parameters(2, 3)
    buffer = weakref.ref(PackedWeight((0, 1)).current(weights).untyped_storage())
    gc.collect()
    assert buffer() is not None
    del weights
    gc.collect()
    assert buffer() is None


def test_a_buffer_goes_when_its_parameters_move_though_nobody_calls(set_aside):
    """A model that is moved off a device gives its memory back there."""
    weights = parameters(2, 3)
    buffer = weakref.ref(pack(weights).untyped_storage())
    weights[0].data = weights[0].data.double()
    assert buffer() is not None
    weights[1].data = weights[1].data.double()
    gc.collect()
    assert buffer() is None


@pytest.mark.parametrize("share", ["alias", "process"])
def test_shared_memory_is_not_packed_but_copied(share, caplog):
    """Packing would part the weight from whoever else writes it."""
    weights = parameters(2, 3)
    part = PackedWeight((0, 1))
    part.current(weights)
    weights[1].data = torch.randn(3, 4)
    alias = weights[1].detach() if share == "alias" else weights[1].data.share_memory_()
    weights[1].data = alias
    with pytest.raises(gdnfuse.Refused, match="2 tensors share it" if share == "alias" else "shared memory"):
        pack(weights)
    for _ in range(2):
        alias.mul_(2.0)
        assert torch.equal(part.current(weights), torch.cat([w.detach() for w in weights]))
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "copied at every call" in caplog.text
    assert weights[1].data_ptr() == alias.data_ptr()
    if share == "alias":
        del alias
        assert ranges_of(part.current(weights), weights)


def test_all_weights_of_a_graph_are_found_at_one_look_until_one_moves(monkeypatch):
    weights, held = parameters(2, 3, 4), parameters(5, 6)
    every = PackedWeights([PackedWeight((2, 0)), PackedWeight((1, held[0])), PackedWeight((held[1],))])
    parts = lambda: ((weights[2], weights[0]), (weights[1], held[0]), (held[1],))  # noqa: E731
    buffers = every.current(weights)
    with monkeypatch.context() as m:
        m.setattr(PackedWeight, "current", None)
        assert all(a is b for a, b in zip(every.current(weights), buffers, strict=True))
    weights[1].data = torch.randn(3, 4)
    moved = every.current(weights)
    assert all(ranges_of(buffer, part) for buffer, part in zip(moved, parts(), strict=True))
    assert [a is b for a, b in zip(moved, buffers, strict=True)] == [True, False, True]
    held[1].data = torch.ones(6, 4)
    assert torch.equal(every.current(weights)[2], torch.ones(6, 4))
    assert PackedWeights([]).current(weights) == []


def test_a_weight_that_had_to_be_copied_is_copied_anew_though_the_copy_lives():
    weights = parameters(2, 3)
    alias = weights[1].detach()
    every = PackedWeights([PackedWeight((0, 1))])
    (copy,) = every.current(weights)
    alias.mul_(2.0)
    (again,) = every.current(weights)
    assert again is not copy and torch.equal(again, torch.cat([w.detach() for w in weights]))


def test_a_weight_of_two_buffers_leaves_neither_stale_though_both_live():
    weights = parameters(2, 3, 4)
    every = PackedWeights([PackedWeight((0, 1)), PackedWeight((1, 2))])
    held = []
    for _ in range(3):
        held += every.current(weights)
        first, second = held[-2:]
        assert torch.equal(first, torch.cat([w.detach() for w in weights[:2]]))
        assert torch.equal(second, torch.cat([w.detach() for w in weights[1:]]))
        with torch.no_grad():
            weights[1].mul_(2.0)


def test_weights_that_are_no_argument_are_held():
    weights = parameters(2, 3)
    packed = PackedWeight(tuple(weights))
    packed.current([])
    weights[0].data = torch.ones(2, 4)
    assert torch.equal(packed.current([])[:2], torch.ones(2, 4))


def test_fake_and_meta_weights_are_packed_without_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode

    buffer = pack([torch.empty(2, 4, device="meta"), torch.empty(3, 4, device="meta")])
    assert buffer.is_meta and buffer.shape == (5, 4)
    with FakeTensorMode():
        fakes = [torch.empty(2, 4, dtype=torch.bfloat16), torch.empty(3, 4, dtype=torch.bfloat16)]
        buffer = pack(fakes)
    assert buffer.shape == (5, 4) and buffer.dtype == torch.bfloat16


class Subclass(torch.Tensor):
    pass


def test_check_refuses_what_cannot_be_a_view():
    check([torch.randn(2, 2), torch.nn.Parameter(torch.randn(2, 2))])
    with pytest.raises(gdnfuse.Refused, match="plain tensors, found Subclass"):
        check([torch.randn(2, 2), torch.randn(2, 2).as_subclass(Subclass)])
    with torch.inference_mode():
        frozen = torch.randn(2, 2)
        check([frozen])
    with pytest.raises(gdnfuse.Refused, match="inference_mode"):
        check([frozen])


class Gated(torch.nn.Module):
    """Three sibling linears and a gate, which makes its graph one with a GDN layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(8, n, bias=False) for n in (4, 6, 3))
        self.A_log, self.dt_bias = torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(4))

    def forward(self, x):
        a, b, c = self.a(x), self.b(x), self.c(x)
        return torch.cat([-self.A_log.exp() * F.softplus(a + self.dt_bias), b, c], -1)


class Compiled:
    """A model compiled and packed, and checks that it gives what its parameters say, without another compilation."""

    def __init__(self):
        self.model = Gated()
        self.run = torch.compile(self.model, backend="gdnfuse", fullgraph=True, options={"inner": "eager"})
        self.x = torch.randn(2, 8)
        self.right(graphs=1)
        assert adjacent(self.linears)

    @property
    def linears(self):
        return [self.model.a.weight, self.model.b.weight, self.model.c.weight]

    @torch.no_grad()
    def right(self, graphs=None, packed=True):
        wanted = copy.deepcopy(self.model)(self.x)
        for _ in range(2):
            torch.testing.assert_close(self.run(self.x), wanted)
        assert adjacent(self.linears) is packed
        torch.testing.assert_close(self.model(self.x), wanted)
        assert graphs is None or len(gdnfuse.reports()) == graphs


def new_values(model):
    return {k: torch.randn_like(v) for k, v in model.state_dict().items()}


def test_in_place_updates_are_seen():
    c = Compiled()
    with torch.no_grad():
        c.model.b.weight.add_(torch.randn_like(c.model.b.weight))
    c.right(graphs=1)


def test_data_assigned():
    c = Compiled()
    c.model.a.weight.data = torch.randn(4, 8)
    c.right(graphs=1)
    c.model.a.weight.data, c.model.c.weight.data = torch.randn(4, 8), torch.randn(3, 8)
    c.right(graphs=1)


def test_load_state_dict_in_place():
    c = Compiled()
    new = new_values(c.model)
    c.model.load_state_dict(new)
    c.right(graphs=1)
    assert torch.equal(c.model.b.weight, new["b.weight"])


def test_load_state_dict_assign():
    c = Compiled()
    new = new_values(c.model)
    c.model.load_state_dict(new, assign=True)
    c.right(packed=False)  # the user's dict has the same memory, and what it writes is seen
    new["b.weight"].mul_(2.0)
    assert torch.equal(c.model.b.weight, new["b.weight"])
    c.right(packed=False)
    del new
    c.right()
    c.model.load_state_dict(new_values(c.model), assign=True)
    c.right()


def test_a_parameter_replaced_on_the_module():
    c = Compiled()
    for _ in range(2):
        c.model.b.weight = torch.nn.Parameter(torch.randn(6, 8))
        c.right()


def test_moved_to_another_dtype_and_back():
    c = Compiled()
    c.model.double()
    c.x = c.x.double()
    with torch.no_grad():
        torch.testing.assert_close(c.run(c.x), c.model(c.x))
    c.model.float()
    c.x = c.x.float()
    c.right()


def test_state_dict_round_trip(tmp_path):
    c = Compiled()
    torch.save(c.model.state_dict(), tmp_path / "weights.pt")
    fresh = Gated()
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt"))
    for (name, a), (_, b) in zip(fresh.state_dict().items(), c.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert list(c.model.state_dict()) == list(Gated().state_dict())


def test_a_deepcopy_of_a_packed_model_is_independent():
    c = Compiled()
    twin = copy.deepcopy(c.model)
    before = c.model(c.x).detach()
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2.0)
        torch.testing.assert_close(c.run(c.x), before)
        assert twin.a.weight.untyped_storage().nbytes() == twin.a.weight.nbytes
    c.right()


def test_a_second_graph_of_the_same_model_shares_the_buffer():
    c = Compiled()
    address = c.model.a.weight.data_ptr()
    c.x = torch.randn(3, 5, 8)
    c.right(graphs=2)
    assert c.model.a.weight.data_ptr() == address
    c.model.a.weight.data = torch.randn(4, 8)
    c.right()
    c.x = torch.randn(2, 8)
    c.right()


def test_gradients_flow_in_eager_training_after_packing():
    c = Compiled()
    c.model(c.x).sum().backward()
    grads = [p.grad.clone() for p in c.model.parameters()]
    twin = copy.deepcopy(c.model)
    twin.zero_grad()
    twin(c.x).sum().backward()
    for g, p in zip(grads, twin.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad)
    torch.optim.SGD(c.model.parameters(), lr=0.1).step()
    c.right()


@torch.no_grad()
def test_a_second_model_that_runs_the_same_graph_leaves_the_first_one_alone():
    """Dynamo shares one graph among modules of one class: parameters are inputs."""
    c = Compiled()
    before = c.model(c.x)
    twin = copy.deepcopy(c.model)
    for p in twin.parameters():
        p.mul_(2.0)
    run = torch.compile(twin, backend="gdnfuse", options={"inner": "eager"})
    for _ in range(2):
        torch.testing.assert_close(run(c.x), twin(c.x))
        torch.testing.assert_close(c.model(c.x), before)
        c.right()


@torch.no_grad()
def test_a_parameter_taken_out_and_put_back_keeps_its_values():
    c = Compiled()
    mine, other = c.model.a.weight, torch.nn.Parameter(torch.randn(4, 8))
    was, others = mine.detach().clone(), other.detach().clone()
    c.model.a.weight = other
    c.right()
    assert torch.equal(mine, was)
    c.model.a.weight = mine
    c.right()
    assert torch.equal(mine, was) and torch.equal(other, others)


@torch.no_grad()
def test_tensor_subclasses_are_left_alone_with_a_reason():
    model = Gated()
    for linear in (model.a, model.b, model.c):
        linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Subclass), requires_grad=False)
    x = torch.randn(2, 8)
    wanted = model(x)
    found = torch.compile(model, backend="gdnfuse", options={"inner": "eager"})(x)
    torch.testing.assert_close(torch.Tensor(found), torch.Tensor(wanted))
    assert not [r for g in gdnfuse.reports() for r in g.all_records if r.rule == "packed_linear" and r.status == "fired"]
