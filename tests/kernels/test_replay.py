"""Launches that are repeated without their Python: on CPU memory, with stand-ins for what Triton compiles."""

import ctypes
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from gdnfuse import compat
from gdnfuse.kernels.launch import codegen, recording, replay
from gdnfuse.kernels.launch.implementation import _standing_in, kernel_of
from gdnfuse.kernels.launch.recording import INT32, Differs, Launch, Line, Recorded, Result, common, longest
from gdnfuse.kernels.launch.replay import Replayed

NOTHING = Recorded([((1,), (1,), torch.float32, torch.device("cpu"))], [], [Result(0, None)], False)  # but an allocation


def memory(x, n):
    """n floats at a pointer, as a kernel is given one: a tensor, an address or a descriptor."""
    x = getattr(x, "base", x)
    address = x if isinstance(x, int) else x.data_ptr()
    return torch.frombuffer((ctypes.c_float * n).from_address(address), dtype=torch.float32)


@pytest.fixture
def gpu(monkeypatch):
    """A current device, which may be changed, as torch would tell of it."""
    current = [0]
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 70 + device, raising=False)
    compat.forget()
    yield current
    compat.forget()


class Kernel:
    """out[:n] = x[:n] + factor·y[:n], as Triton would launch it, counting how."""

    arg_names = ("x_ptr", "y_ptr", "out_ptr", "factor", "N")
    params = tuple(SimpleNamespace(name=name, default=None) for name in arg_names)

    def __init__(self):
        self.bound = self.repeated = 0

    def work(self, x, y, out, factor, n):
        memory(out, n)[:] = memory(x, n) + factor * memory(y, n)

    def __getitem__(self, grid):
        def launch(*args, N):
            assert grid == (3,)
            self.bound += 1
            self.work(*args, N)
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel):
        self.kernel, self.run = kernel, None

    def __getitem__(self, grid):
        assert grid == (3, 1, 1)

        def launch(*args):
            self.kernel.repeated += 1
            self.kernel.work(*args)

        return launch


def add(kernel, views=lambda x, y: (x, y), result=lambda out: out):
    def launch(x, y, factor=1.0, weights=(), *, overlap=False):
        a, b = views(x, y)
        out = torch.empty(a.shape, dtype=a.dtype)
        kernel_of(kernel)[(3,)](a, b, out, factor, N=a.numel())
        for w in weights:
            added, out = out, torch.empty_like(out)
            kernel_of(kernel)[(3,)](added, w, out, 1.0, N=a.numel())
        return result(out)

    return Replayed(launch, _standing_in)


def some(n=8):
    return torch.randn(n)


def test_the_third_call_repeats_the_second_with_its_own_tensors():
    kernel = Kernel()
    op = add(kernel)
    kept = []
    for call in range(5):
        x, y, w, v = some(), some(), some(), some()
        got = op(x, y, 2.0, [w, v], overlap=True)
        kept += [x, y, w, v, got]  # so that none is at an address that was another's
        torch.testing.assert_close(got, x + 2 * y + w + v)
        assert (kernel.bound, kernel.repeated) == (3 * min(call + 1, 2), 3 * max(call - 1, 0))
    assert len({t.data_ptr() for t in kept}) == len(kept)


def test_a_launch_without_a_result_is_repeated_too(monkeypatch, gpu):
    monkeypatch.setattr(replay, "OFTEN", 2)
    kernel = Kernel()

    def launch(x, y, out):
        kernel_of(kernel)[(3,)](x, y, out, 2.0, N=x.numel())

    op = Replayed(launch, _standing_in)
    for _ in range(8):
        x, y, out = some(), some(), torch.zeros(8)
        assert op(x, y, out) is None
        torch.testing.assert_close(out, x + 2 * y)
    assert (kernel.bound, kernel.repeated) == (2, 6) and op.matches


def test_another_layout_is_another_launch():
    kernel = Kernel()
    op = add(kernel, views=lambda x, y: (x.contiguous(), y))
    whole = torch.randn(9, 2)
    for x in (some(8), some(4), some(8).double().float(), whole.flatten()[1:9], whole[:8, 0], some(8)):
        if x.is_contiguous():
            for factor in (1.0, 3.0):
                for _ in range(4):
                    y = torch.randn(x.shape)
                    torch.testing.assert_close(op(x, y, factor), x + factor * y)
    assert {(0, 0), (4, 0)} <= {key[-2:] for key in op.layouts} and len(op.layouts) == 6


def test_calls_are_compared_with_a_layout_that_comes_often(monkeypatch):
    """Which takes no reading off; whatever differs is read off, and right."""
    monkeypatch.setattr(replay, "OFTEN", 2)
    kernel, read = Kernel(), []
    op = add(kernel, views=lambda x, y: (x.contiguous(), y))
    layout = replay._layout
    monkeypatch.setattr(replay, "_layout", lambda arguments, tensors: read.append(1) or layout(arguments, tensors))

    def call(x, y, factor=1.0, weights=None, **named):
        read.clear()
        given = () if weights is None else (weights,)
        torch.testing.assert_close(op(x, y, factor, *given, **named), x + factor * y + sum(weights or []))
        return bool(read)

    for n, factor, weights in ((8, 1.0, None), (8, 3.0, None), (4, 3.0, None), (8, 1.0, 1), (8, 1.0, 2), (8, 1.0, 0)):
        make = lambda count=weights: None if count is None else [some() for _ in range(count)]  # noqa: E731
        assert [call(some(n), some(n), factor, make()) for _ in range(6)] == [True] * 4 + [False] * 2, (n, factor, weights)
    assert [call(some(), some(), overlap=True) for _ in range(6)] == [True] * 4 + [False] * 2

    repeated = kernel.repeated
    misaligned, strided = torch.randn(9)[1:], torch.randn(8, 2)[:, 0]
    assert all(call(misaligned, some()) for _ in range(6)) and call(strided, some()) and call(some(12), some(12))
    assert call(some(), some(), 1.0, (some(),)) and not call(some(), some(), 1.0, [some()])
    assert not call(some(), some(), 1.0) and kernel.repeated > repeated
    # Another class and other dispatch keys are another function's, of the layout that is known.
    parameter = torch.nn.Parameter(some(), requires_grad=False)
    assert [call(parameter, some()) for _ in range(3)] == [True, True, False]
    with torch.inference_mode():
        assert [call(some(), some()) for _ in range(3)] == [True, True, False]
    op.forget()
    assert call(some(), some())


def test_optional_tensors_are_told_from_none(monkeypatch):
    monkeypatch.setattr(replay, "OFTEN", 1)
    kernel = Kernel()

    def launch(x, y=None):
        out = torch.empty_like(x)
        kernel_of(kernel)[(3,)](x, x if y is None else y, out, 1.0, N=x.numel())
        return out

    op = Replayed(launch, _standing_in)
    for y in (None, some(), None, some()):
        for _ in range(5):
            x = some()
            torch.testing.assert_close(op(x, y), x + (x if y is None else y))
    assert len(op.matches[2,]) == 2


def test_another_device_is_not_taken_for_the_one_recorded(gpu):
    x, y = some(), some()
    gpu[0] = 1
    match = codegen.repeating_function((x, y), {}, [x, y], 1, NOTHING)
    assert match(x, y).shape == (1,)
    gpu[0] = 0
    assert match(x, y) is replay.MISSED


def test_what_is_compared_is_bounded(monkeypatch):
    monkeypatch.setattr(replay, "OFTEN", 1)
    op = add(Kernel())
    for n in range(8, 8 + 4 * 30, 4):
        for _ in range(4):
            x, y = some(n), some(n)
            torch.testing.assert_close(op(x, y), x + y)
    assert [len(functions) for functions in op.matches.values()] == [replay.MOST_MATCHES]
    # One more each time costs twice as many readings as the last.
    assert op.often == {(2,): 4} and max(op.met.values()) < 4


def test_how_far_an_address_is_off_is_part_of_the_layout():
    """A view half of sixteen bytes on is aligned for one, and not for the other."""
    whole, given = torch.zeros(64), []
    start = -whole.data_ptr() % 16 // 4

    class Specialised:
        """Compiled for an address that is aligned or not."""

        run = None

        def __init__(self, aligned):
            self.aligned = aligned

        def __getitem__(self, grid):
            return lambda address: given.append((self.aligned, address % 16 == 0))

    class Compiling:
        arg_names, params = ("x",), (SimpleNamespace(name="x", default=None),)

        def __getitem__(self, grid):
            return lambda x: Specialised(x.data_ptr() % 16 == 0)

    def launch(x):
        kernel_of(Compiling())[(1,)](x[2:])
        return torch.empty(4)

    op = Replayed(launch, _standing_in)
    for off in (2, 2, 2, 1, 1, 1, 3, 3, 3):
        op(whole[start + off :][:8])
    assert given == [(True, True), (False, False), (False, False)]


def test_one_tensor_twice_is_read_off(monkeypatch):
    monkeypatch.setattr(replay, "OFTEN", 1)
    op = add(Kernel())
    for _ in range(6):
        x, y = some(), some()
        torch.testing.assert_close(op(x, y), x + y)
    ours = op.matches[2,]
    for _ in range(6):
        x = some()
        torch.testing.assert_close(op(x, x), 2 * x)
    assert op.matches[2,] == ours


def test_what_is_plain_is_compared_with_its_class(monkeypatch):
    monkeypatch.setattr(replay, "OFTEN", 1)
    x, y = some(), some()
    shape = [5, 1]
    match = codegen.repeating_function((x, y, 1.0, shape), {"flag": True}, [x, y], -1, NOTHING)
    assert match(x, y, 1.0, [5, 1], flag=True).shape == (1,)
    shape[1] = 2
    for plain, sizes, flag in (
        (1, [5, 1], True),
        (1.0, [5, 2], True),
        (1.0, (5, 1), True),
        (1.0, [5, 1], 1),
        (torch.ones(3), [5, 1], True),
    ):
        assert match(x, y, plain, sizes, flag=flag) is replay.MISSED
    match = codegen.repeating_function((x, y, torch.bfloat16), {}, [x, y], -1, NOTHING)
    assert match(x, y, torch.bfloat16).shape == (1,)
    assert match(x, y, torch.float16) is match(x, y, "torch.bfloat16") is replay.MISSED


def test_an_argument_of_another_kind_is_read_off(monkeypatch):
    monkeypatch.setattr(replay, "OFTEN", 1)
    op = add(Kernel())
    for device in [torch.device("cpu")] * 4:
        x, y = some(), some()
        torch.testing.assert_close(op(x, y, 1.0, [], overlap=device), x + y)
    assert not op.matches


def test_views_follow_the_tensor_they_are_of_not_the_memory():
    kernel = Kernel()
    op = add(kernel, views=lambda x, y: (x.narrow(-1, 2, 4), y.unflatten(-1, (2, 4))[1]))
    row = some(16)
    for _ in range(3):
        torch.testing.assert_close(op(row[:8], row[8:]), row[2:6] + row[12:16])
    assert kernel.repeated == 1
    x, y = some(), some()
    torch.testing.assert_close(op(x, y), x[2:6] + y[4:8])
    torch.testing.assert_close(op(row[8:], row[:8]), row[10:14] + row[4:8])
    assert kernel.repeated == 3


@pytest.mark.parametrize(
    "why, views, result",
    [
        ("a copy", lambda x, y: (x.clone(), y), lambda out: out),
        ("a sum", lambda x, y: (x + 0, y), lambda out: out),
        ("a write", lambda x, y: (x.mul_(1.0), y), lambda out: out),
        ("computed behind the kernel", lambda x, y: (x, y), lambda out: out * 1),
    ],
)
def test_what_does_more_is_never_repeated(why, views, result):
    kernel = Kernel()
    op = add(kernel, views, result)
    for _ in range(4):
        x, y = some(), some()
        torch.testing.assert_close(op(x, y), x + y)
    assert (kernel.bound, kernel.repeated) == (4, 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch._C._AutoDispatchBelowAutograd])
@pytest.mark.parametrize(
    "may_copy, copied",
    [
        (lambda x: x.contiguous(), lambda: torch.randn(8, 2)[:, 0]),
        (lambda x: x.reshape(8), lambda: torch.randn(4, 4)[:, :2]),
        (lambda x: x.to(torch.float32), lambda: torch.randn(8).double()),
    ],
    ids=["contiguous", "reshape", "to"],
)
def test_what_may_copy_is_repeated_only_where_it_does_not(may_copy, copied, mode):
    """Below autograd, as in inference mode, composite ops come whole, and these declare a view."""
    for make, repeated in ((some, 2), (copied, 0)):
        kernel, kept = Kernel(), []
        op = add(kernel, views=lambda x, y: (may_copy(x), y))
        with mode():
            for _ in range(4):
                x, y = make(), some()
                kept += [x, y, op(x, y)]  # so that none is at an address that was another's
                torch.testing.assert_close(kept[-1], may_copy(x) + y)
        assert kernel.repeated == repeated


def test_a_result_in_another_dtype_is_never_repeated():
    kernel = Kernel()
    op = add(kernel, result=lambda out: out.view(torch.int32))
    for _ in range(4):
        x, y = some(), some()
        torch.testing.assert_close(op(x, y), (x + y).view(torch.int32))
    assert kernel.repeated == 0


def test_a_tensor_on_another_device_is_never_repeated():
    """Triton says whether a kernel can read it, for this one of the layout."""

    def launch(x, y, elsewhere):
        out = torch.empty_like(x)
        kernel_of(kernel)[(3,)](x, y, out, 1.0, N=8)
        return out

    kernel = Kernel()
    op = Replayed(launch, _standing_in)
    for _ in range(4):
        x, y = some(), some()
        torch.testing.assert_close(op(x, y, torch.empty(8, device="meta")), x + y)
    assert kernel.repeated == 0


def test_a_tuple_of_tensors_as_argument_is_never_repeated():
    class OfTuple(Kernel):
        def work(self, x, y, *rest):
            super().work(x, *y, *rest)

    def launch(x, y):
        out = torch.empty_like(x)
        kernel_of(kernel)[(3,)](x, (y,), out, 1.0, N=8)
        return out

    kernel = OfTuple()
    op = Replayed(launch, _standing_in)
    for _ in range(4):
        x, y = some(), some()
        torch.testing.assert_close(op(x, y), x + y)
    assert kernel.repeated == 0


def test_an_input_as_result_is_never_repeated():
    def launch(x, y):
        kernel_of(kernel)[(3,)](x, y, x, 1.0, N=8)
        return x

    kernel = Kernel()
    op = Replayed(launch, _standing_in)
    for _ in range(4):
        x, y = some(), some()
        want = x + y
        torch.testing.assert_close(op(x, y), want)
    assert kernel.repeated == 0


def test_one_tensor_given_twice_does_not_decide_for_two():
    kernel = Kernel()
    op = add(kernel)
    x = some()
    for _ in range(3):
        torch.testing.assert_close(op(x, x), 2 * x)
    y = some()
    torch.testing.assert_close(op(x, y), x + y)
    torch.testing.assert_close(op(y, x, 2.0), y + 2 * x)


def test_results_may_be_views_and_several():
    kernel = Kernel()
    op = add(kernel, result=lambda out: (out, out.view(2, 4).mT, out[2:], out[8:]))
    for _ in range(4):
        x, y = some(), some()
        got, want = op(x, y), x + y
        torch.testing.assert_close(got, (want, want.view(2, 4).mT, want[2:], want[8:]))
        assert [t.stride() for t in got] == [(1,), (1, 4), (1,), (1,)]
    assert kernel.repeated == 2


def test_what_is_written_in_place_is():
    def launch(x, state):
        out = torch.empty_like(x)
        kernel_of(kernel)[(3,)](x, state[0], out, 1.0, N=8)
        kernel_of(kernel)[(3,)](out, x, state[0], 0.0, N=8)
        return out

    kernel = Kernel()
    op = Replayed(launch, _standing_in)
    state, sum_ = torch.zeros(1, 8), torch.zeros(8)
    for _ in range(5):
        x = some()
        sum_ += x
        torch.testing.assert_close(op(x, state), sum_)
        torch.testing.assert_close(state[0], sum_)
    assert kernel.repeated == 6


def test_descriptors_get_the_call_s_own_base():
    class Descriptor:
        def __init__(self, base):
            self.base, self.shape = base, list(base.shape)

    def launch(x, y):
        out = torch.empty_like(x)
        kernel_of(kernel)[(3,)](Descriptor(x), y, Descriptor(out), 1.0, N=8)
        return out

    kernel = Kernel()
    op = Replayed(launch, _standing_in)
    for _ in range(4):
        x, y = some(), some()
        torch.testing.assert_close(op(x, y), x + y)
    assert kernel.repeated == 2


def test_nothing_of_the_caller_is_kept(monkeypatch):
    monkeypatch.setattr(replay, "OFTEN", 1)
    op = add(Kernel())
    x, y = some(), some()
    for _ in range(5):
        out = op(x, y)
    assert op.matches
    kept = [weakref.ref(t.untyped_storage()) for t in (x, y, out)]
    del x, y, out
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_layouts_are_bounded(monkeypatch):
    monkeypatch.setattr(replay, "MOST", 4)
    op = add(Kernel())
    for n in [*range(1, 12), 3, 3, 3]:
        x, y = some(n), some(n)
        torch.testing.assert_close(op(x, y), x + y)
        assert len(op.layouts) <= 4


def test_an_error_leaves_the_layout_to_be_recorded():
    kernel = Kernel()
    fail = [False, True, False]

    def views(x, y):
        if fail.pop(0):
            raise RuntimeError("out of memory")
        return x, y

    op = add(kernel, views)
    x, y = some(), some()
    op(x, y)
    with pytest.raises(RuntimeError, match="out of memory"):
        op(x, y)
    for _ in range(3):
        torch.testing.assert_close(op(x, y), x + y)
    assert kernel.repeated == 2 and not fail


class Append(Kernel):
    """out[:, :L] = keys, out[:, L] = new: [2, L, D] and [2, D] to [2, L + 1, D]."""

    arg_names = ("keys_ptr", "new_ptr", "out_ptr", "stride", "L", "odd", "D")

    def __init__(self, free=("L", "odd"), odd=lambda L: 3 * L + 1):
        super().__init__()
        self.params = tuple(SimpleNamespace(name=n, default=None, do_not_specialize=n in free) for n in self.arg_names)
        self.odd = odd

    def work(self, keys, new, out, stride, L, odd, D):
        assert odd == self.odd(L)
        old, made = memory(keys, stride + L * D), memory(out, 2 * (L + 1) * D).view(2, L + 1, D)
        made[:, :L] = old.as_strided((2, L, D), (stride, D, 1))
        made[:, L] = memory(new, 2 * D).view(2, D)

    def __getitem__(self, grid):
        def launch(*args, D):
            self.bound += 1
            self.work(*args, D)
            return self.compiled

        self.compiled = getattr(self, "compiled", None) or Compiled(self)
        return launch


def append(kernel):
    def launch(new, keys, scale=1.0, *, mask=None):
        L, D = keys.shape[1:]
        out = torch.empty(2, L + 1, D)
        kernel_of(kernel)[(3,)](keys, new, out, keys.stride(0), L, kernel.odd(L), D=D)
        return new.new_empty(2), out, out[:, 1:]

    return Replayed(launch, _standing_in, {"keys": 1, "mask": 0})


def appended(op, L, D=16, room=0, **named):
    """A call at this length, which must be right."""
    new, keys = torch.randn(2, D), torch.randn(2, L + room, D)[:, :L]
    _, whole, rest = op(new, keys, **named)
    torch.testing.assert_close(whole, torch.cat([keys, new[:, None]], 1), rtol=0, atol=0)
    assert rest.data_ptr() == whole[:, 1:].data_ptr() and rest.shape == (2, L, D) and rest.stride() == whole.stride()


@pytest.mark.parametrize(("layers", "first"), [(1, (5, 6, 7, 8)), (3, (5, 6, 7))])
def test_what_grows_is_recorded_at_three_lengths_and_repeated_at_all(layers, first):
    kernel = Append()
    op = append(kernel)
    for L in first:
        for _ in range(layers):
            appended(op, L)
    assert kernel.bound == 4  # the first call compiles
    repeated = kernel.repeated
    for L in (8, 9, 10, 500, 1, 3, 7):
        appended(op, L)
    assert (kernel.bound, kernel.repeated) == (4, repeated + 7)


def test_a_function_for_all_lengths_is_one_for_its_layout():
    kernel = Append()
    op = append(kernel)
    for L in (5, 6, 7, 8):
        appended(op, L)
    layouts = len(op.layouts)
    appended(op, 9)
    assert len(op.layouts) == layouts and len(op.matches) == 1
    for L in (5, 9):
        appended(op, L, room=3)  # strides that go with another length
        appended(op, L, D=32)
        appended(op, L, mask=torch.ones(L))
    assert len(op.layouts) == layouts + 6
    for L in (10, 11, 12, 13, 14):
        appended(op, L, mask=torch.ones(L + 1))
    (keyword,) = (functions for given, functions in op.matches.items() if "mask" in given)
    assert len(keyword) == 1
    appended(op, 40, mask=torch.ones(41))
    layouts = len(op.layouts)
    appended(op, 41, mask=torch.ones(41))  # a length of its own
    assert len(op.layouts) == layouts + 1
    op.forget()
    assert not op.matches and not op.at_lengths


@pytest.mark.parametrize(
    "kernel",
    [
        Append(odd=lambda L: L * L),  # on no line
        Append(odd=lambda L: L // 2),
        Append(free=("L",)),  # a machine code of its own for multiples of 16
        Append(odd=lambda L: 100 - L),
    ],
    ids=["square", "half", "specialised", "falling"],
)
def test_what_does_not_go_with_the_length_is_read_off(kernel):
    op = append(kernel)
    for L in [*range(5, 25), 7, 7, 40]:
        appended(op, L)
        assert not op.matches


def test_a_length_whose_numbers_need_more_bits_is_read_off(monkeypatch):
    monkeypatch.setattr(recording, "INT32", 1000)
    kernel = Append()
    op = append(kernel)
    for L in (5, 6, 7, 8, 9):
        appended(op, L)
    assert kernel.bound == 4
    appended(op, 62)  # with a stride of 16 L
    assert kernel.bound == 4
    appended(op, 63)
    assert kernel.bound == 5


def test_threads_that_meet_lengths_at_once():
    """However they take turns, all is right, and in the end a function is found."""
    kernel = Append()
    op = append(kernel)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda L: appended(op, L), [*range(5, 40)] * 3))
    for L in range(40, 50):
        appended(op, L)
    assert op.matches and all(len(known) < replay.LENGTHS for known in op.at_lengths.values())


def test_what_two_lengths_share():
    assert common([1, 2, 4], [[5, (1, "a", 3)], [5, (3, "a", 3)], [5, (7, "a", 3)]]) == [5, (Line(-1, 2), "a", 3)]
    for values in ([1, 2, 3], [1, 1.0, 1], [(1,), (1, 2), (1,)], ["a", "b", "a"], [True, False, True], [0, 1, 1]):
        with pytest.raises(Differs):
            common([1, 2, 4], values)


def test_numbers_are_of_32_bits_and_specialised_as_they_were():
    def launch(*arguments, specialised=()):
        return Launch(None, (1, 1, 1), None, [*arguments], [], [], frozenset(specialised))

    assert longest([launch(Line(5, 1), 7), launch(Line(0, 1000))]) == INT32 // 1000
    assert longest([launch(Line(32, 16), specialised=[0])]) == (INT32 - 32) // 16
    for line in (Line(8, 16), Line(16, 8), Line(0, -16), Line(-16, 16)):
        with pytest.raises(Differs):
            longest([launch(line, specialised=[0])])
    for off in (
        {"grid": (Line(0, 1), 1, 1)},
        {"pointers": [(0, 0, Line(0, 16))]},
        {"descriptors": [(0, 0, Line(0, 16))]},
        {"arguments": [(1, [Line(0, 16)])]},
    ):
        with pytest.raises(Differs):
            longest([launch(1)._replace(**off)])


def compiled(spy):
    """Triton's own class, with a launcher that notes how it is called."""
    from triton.compiler import CompiledKernel

    made = object.__new__(CompiledKernel)
    made.module, made.function, made.packed_metadata, made._run = "module", "function", "packed", lambda *a: spy.append(a)
    made.launch_metadata = lambda *a: None
    return made


def test_triton_s_launcher_is_called_as_its_runner_calls_it(gpu):
    import triton

    hooks, spy, x = triton.knobs.runtime, [], some()
    launch = Launch(compiled(spy), (2, 3, 1), None, [None, 5, 0.5], [(0, 0, 4)], [], frozenset())
    match = codegen.repeating_function((x,), {}, [x], 0, NOTHING._replace(launches=[launch]))
    assert match(x).shape == (1,)
    launch.compiled[launch.grid](x.data_ptr() + 4, 5, 0.5, stream=70)
    ours, theirs = spy
    assert ours == (2, 3, 1, 70, "function", "packed", None, None, None, x.data_ptr() + 4, 5, 0.5)
    assert theirs == (*ours[:7], hooks.launch_enter_hook, hooks.launch_exit_hook, *ours[9:])

    noted = lambda *a: None  # noqa: E731
    hooks.launch_enter_hook.add(noted)
    try:
        assert match(x) is replay.MISSED and len(spy) == 2  # a profiler has itself called by Triton's runner
    finally:
        hooks.launch_enter_hook.remove(noted)


@pytest.mark.parametrize("runner", [lambda self, grid: lambda *a, stream: self.run(stream, *grid, *a), lambda self, grid: None])
def test_another_runner_of_triton_s_is_called_itself(runner):
    class Other:
        function = packed_metadata = run = None
        __getitem__ = runner

    launch = Launch(Other(), (2, 3, 1), None, [], [], [], frozenset())
    assert compat.launcher(launch.compiled, launch.grid) is None
    assert compat.launcher(compiled([]), launch.grid)[1:] == ("function", "packed")
