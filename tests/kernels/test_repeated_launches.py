"""For every kernel case what is launched when it is repeated is what its launch does with the same tensors; without a device."""

import random

import kernel_cases
import pytest
import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gdnfuse.errors import Refused
from gdnfuse.kernels import chunk_scan_hopper, few_rows_hopper, implementations
from gdnfuse.kernels.launch import replay
from gdnfuse.kernels.launch.implementation import _stand_in, _standing_in
from gdnfuse.kernels.launch.replay import Recorded, Replayed


class Kernel:
    """In place of a kernel: notes what it is launched with, as what it is compiled to does."""

    def __init__(self, kernel, noted, codes=None):
        self.codes = {} if codes is None else codes
        self.arg_names, self.params, self.name, self.noted = kernel.arg_names, kernel.params, kernel.__name__, noted

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            given = dict(zip(self.arg_names, args, strict=False)) | kwargs
            options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
            arguments = [given.get(p.name, p.default) for p in self.params]
            code = self.name, str(options), *map(specialised, self.params, arguments)
            compiled = self.codes.setdefault(code, Compiled(self, options))
            compiled[(*grid, 1, 1)[:3]](*arguments)
            return compiled

        return launch


def specialised(parameter, x):
    """What Triton makes a machine code for, of an argument."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if parameter.is_constexpr or not isinstance(x, int) or isinstance(x, bool):
        return x if parameter.is_constexpr or x is None else type(x)
    return x < 2**31, None if parameter.do_not_specialize else (x == 1, x % 16 == 0)


class Compiled:
    run = None

    def __init__(self, kernel, options):
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid):
        return lambda *args: self.kernel.noted.append((self.kernel.name, grid, self.options, args))


class Allocations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made.append(func(*args, **(kwargs or {})))
        return self.made[-1]


def noted_call(function, noted, args, kwargs):
    """What it returns and launches, addresses as the storage they are in, in order of allocation, and the place there."""
    noted.clear()
    with Allocations() as mode:
        results = function(*args, **kwargs)
    all_of = [t.untyped_storage() for t in pytree.tree_leaves((args, kwargs, mode.made)) if isinstance(t, torch.Tensor)]
    storages = list({s.data_ptr(): s for s in all_of if s.data_ptr()}.values())

    def placed(x):
        if hasattr(x, "base"):
            return [placed(x.base), *(value for name, value in vars(x).items() if name != "base")]
        address = x.data_ptr() if hasattr(x, "data_ptr") else x
        if not isinstance(address, int):
            return x
        inside = [(i, address - s.data_ptr()) for i, s in enumerate(storages) if 0 <= address - s.data_ptr() < s.nbytes()]
        return ("memory", *inside[0]) if inside else address

    made = [t for t in pytree.tree_leaves(results) if t is not None]  # of an op that only writes
    layouts = [(t.shape, t.stride(), t.dtype, t.storage_offset()) for t in made]
    return layouts, [(*launched, [placed(x) for x in launched_args]) for *launched, launched_args in noted]


def elsewhere(value):
    """A tensor of the same layout in other memory, as far off 16 bytes."""
    if not isinstance(value, torch.Tensor):
        return [elsewhere(v) for v in value] if isinstance(value, list) else value
    memory = torch.zeros(kernel_cases.whole(value).numel() + 64, dtype=value.dtype)
    start = random.choice([i for i in range(32) if (memory.data_ptr() + i * value.itemsize - value.data_ptr()) % 16 == 0])
    return memory.as_strided(value.shape, value.stride(), start)


def otherwise(value):
    """Sometimes with other strides, or where it is not aligned."""
    if isinstance(value, list):
        return [otherwise(v) for v in value]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or random.random() < 0.6:
        return value
    ways = [
        lambda t: kernel_cases.strided(t, 2, 0),
        lambda t: kernel_cases.strided(t, 1, random.choice([1, 4, 16])),
        lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
        lambda t: kernel_cases.strided(t.flatten(), 1, random.choice([1, 2, 4])).view(t.shape),
    ]
    return random.choice(ways)(value)


def check(op, args, kwargs):
    implementation, noted = implementations()[op], []

    def launch(*args, **kwargs):
        if _stand_in.get():
            return implementation.launch(*args, **kwargs)
        with _standing_in(lambda kernel: Kernel(kernel, noted)):
            return implementation.launch(*args, **kwargs)

    replayed = Replayed(launch, lambda noting: _standing_in(lambda kernel: noting(Kernel(kernel, noted))))
    for _ in range(2):
        replayed(*map(elsewhere, args), **kwargs)
    for _ in range(3):
        args = [elsewhere(a) for a in args]
        assert noted_call(replayed, noted, args, kwargs) == noted_call(launch, noted, args, kwargs) and noted
    (recorded,) = replayed.layouts.values()
    return type(recorded) is Recorded


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)], ids=["heads", "tokens"])
@pytest.mark.parametrize("options", [{}, {"mask": False}, {"shared": True, "gate": False}], ids=str)
@pytest.mark.parametrize("name", ["attention_growing", "attention_few_queries"])
def test_keys_that_grow(name, options, wrap, monkeypatch):
    """Three lengths are recorded, and repeated at all others, with what the launch hands on at those."""
    implementation, noted, codes = implementations()[name], [], {}

    def launch(*args, **kwargs):
        if _stand_in.get():
            return implementation.launch(*args, **kwargs)
        with _standing_in(lambda kernel: Kernel(kernel, noted, codes)):
            return implementation.launch(*args, **kwargs)

    stand_in = lambda noting: _standing_in(lambda kernel: noting(Kernel(kernel, noted, codes)))  # noqa: E731
    replayed = Replayed(launch, stand_in, implementation.replayed.grows)
    replayed.names = implementation.replayed.names
    make = getattr(kernel_cases, name.removeprefix("attention_"))
    for B, H, HKV, D in ((2, 8, 2, 32), (1, 3, 1, 64)):
        for L in (7, 8, 9, 10, 400, 3, 33, 8):
            args, kwargs = make(B, H, HKV, D, L, kernel_cases.BF16, wrap=wrap, **options)()
            with monkeypatch.context() as patch:
                if L > 10 or L == 3:
                    patch.setattr(replayed, "_by_layout", None)
                assert noted_call(replayed, noted, args, kwargs) == noted_call(launch, noted, args, kwargs) and noted
    assert len(codes) == 4  # two kernels at each size; no length asks for another


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_case(mode, monkeypatch):
    monkeypatch.setattr(replay, "OFTEN", 1)  # so that the last calls are compared with the layout
    random.seed(0)
    with mode():
        repeated = [check(case.op, *case.call()) for case in kernel_cases.CASES]
    assert sum(repeated) > 0.9 * len(repeated)


def test_every_case_in_any_strides():
    random.seed(0)
    repeated = []
    with torch.inference_mode():
        for case in kernel_cases.CASES * 2:
            args, kwargs = case.call()
            args = [otherwise(a) for a in args]
            try:
                implementations()[case.op].supports(*args, **kwargs)
            except Refused:
                continue
            repeated.append(check(case.op, args, kwargs))
    assert 50 < sum(repeated) < len(repeated) - 50


def test_windows_at_eight_bytes():
    """Read at once or one by one is not a matter of where in its storage a tensor starts, but of its alignment."""
    random.seed(0)
    case = kernel_cases.conv(
        2, 50, 4, 4, kernel_cases.BF16, wrap_state=lambda s: kernel_cases.strided(s.flatten(), 1, 4).view(s.shape)
    )
    assert all(check("causal_conv_update", *case()) for _ in range(5))


def test_the_scan_for_hopper(monkeypatch):
    monkeypatch.setattr(chunk_scan_hopper, "supports_here", lambda *args: True)
    monkeypatch.setattr(chunk_scan_hopper, "_config", lambda *args: (64, 3))
    for T, how in ((130, {}), (128, {}), (130, {"lengths": (1, 64, 65)}), (130, {"every": 1})):
        assert check("chunk_delta_rule", *kernel_cases.chunked(1, T, 2, 4, 128, 128, kernel_cases.BF16, **how)())


def test_the_ring_for_hopper(monkeypatch):
    """It takes the place of the other kernel for a few rows where it may, and is repeated as that one is."""
    monkeypatch.setattr(few_rows_hopper, "supports_here", lambda *args: True)
    for case, grid in (
        (kernel_cases.linear(4300, 256, kernel_cases.BF16, (3, 1)), (131, 1)),
        (kernel_cases.linear(300, 256, kernel_cases.BF16, (3, 1), swiglu=True), (19, 1)),
        (kernel_cases.split(300, 512, 4, kernel_cases.BF16, (3, 1)), (19, 4)),
    ):
        args, kwargs = case()
        op = "split_linear" if grid[1] > 1 else "fused_linear"
        noted = []
        with _standing_in(lambda kernel, noted=noted: Kernel(kernel, noted)):
            implementations()[op].launch(*args, **kwargs)
        assert [(name, where) for name, where, *_ in noted] == [("few_rows_hopper_kernel", (*grid, 1))]
        assert check(op, args, kwargs)


@pytest.mark.parametrize(("rows", "apart", "taken"), [(3, 512, True), (3, 528, True), (3, 520, False), (3, 515, False)])
def test_the_ring_takes_rows_whose_sixteen_bytes_are_together(rows, apart, taken, monkeypatch):
    monkeypatch.setattr(few_rows_hopper, "rings", lambda weight: True)
    x = torch.empty(rows, apart, dtype=torch.bfloat16)[:, :512]
    weight = torch.empty(300, 512, dtype=torch.bfloat16)
    assert few_rows_hopper.supports_here(x, weight) == taken
    of_rank = {n: ([weight.new_empty(300, n)], [0, 300, 0, 0, 0]) for n in (512, 513)}
    assert few_rows_hopper.supports_here(x, weight, *of_rank[512]) == taken
    assert not few_rows_hopper.supports_here(x, weight, *of_rank[513])  # more slots than it takes
    shifted = torch.empty(300 * 512 + 1, dtype=torch.bfloat16)[1:].view(300, 512)
    assert not few_rows_hopper.supports_here(x, shifted) and not few_rows_hopper.supports_here(x.half(), weight)
