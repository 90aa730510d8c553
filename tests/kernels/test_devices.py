"""What kernels ask of a device: its shared memory, before they say yes, and no more programs on an axis than a grid takes."""

from types import SimpleNamespace

import pytest
import torch

from gdnfuse.errors import Refused
from gdnfuse.kernels import devices, implementations
from gdnfuse.kernels.devices import H200, Device
from gdnfuse.kernels.launch import implementation

BF16 = torch.bfloat16
OPTED_IN = {"shared_memory_per_block": 48 * 1024, "shared_memory_per_block_optin": 99 * 1024}


def of(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture
def gpu(monkeypatch):
    """Makes the current GPU one of these properties."""

    def make(hip=None, capability=(8, 6), **properties):
        major, minor = capability
        found = SimpleNamespace(multi_processor_count=82, major=major, minor=minor, **properties)
        for name, result in {"is_available": True, "current_device": 3, "get_device_properties": found}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *args, result=result: result)
        monkeypatch.setattr(torch.version, "hip", hip)

    devices._of.cache_clear()
    yield make
    devices._of.cache_clear()


@pytest.mark.parametrize(
    ("properties", "hip", "device"),
    [
        (OPTED_IN, None, Device(99 * 1024, 82, widens_e4m3=False)),
        (OPTED_IN | {"capability": (8, 9)}, None, Device(99 * 1024, 82, widens_e4m3=True)),
        ({"shared_memory_per_block": 64 * 1024, "capability": (9, 4)}, "7.0", Device(64 * 1024, 82, True, False)),
        ({}, "7.0", Device(devices.EVERY, 82, True, False)),  # torch for ROCm before it said so
    ],
)
def test_a_device_is_asked_for_its_shared_memory_and_whether_it_widens_e4m3(properties, hip, device, gpu):
    gpu(hip, **properties)
    assert devices.of(torch.device("cuda", 0)) == device


def test_a_report_is_made_for_the_current_gpu_or_an_h200(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.of(torch.device("meta")) == devices.of(torch.device("cuda", 0)) == H200
    devices._of.cache_clear()
    gpu(**OPTED_IN)
    asked = []
    properties = torch.cuda.get_device_properties
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: asked.append(index) or properties(index))
    for device in ("meta", "cpu", "cuda", "cuda:3"):
        assert devices.of(torch.device(device)).shared_memory == 99 * 1024
    assert asked == [3]  # once per device, and the current one


def linear(rows=2):
    return "fused_linear", (of(rows, 1, 2560), [of(12352, 2560)])


def chunks(K, dtype=BF16):
    q, v, gate = of(1, 70, 2, K, dtype=dtype), of(1, 70, 4, 128, dtype=dtype), of(1, 70, 4)
    return "chunk_delta_rule", (q, q, v, gate, gate, None, 0.1, None, None, 0, 1.0)


@pytest.mark.parametrize(
    ("call", "device", "sentence"),
    [
        (linear(), Device(36863, 82), "few_rows_linear needs 36864 bytes of shared memory per program"),
        (linear(32), Device(24575, 82), "few_rows_linear needs 24576 bytes of shared memory per program"),
        (chunks(128), Device(48 * 1024, 82), "The chunked rule with K = 128 needs 57344 bytes of shared memory per program"),
        (chunks(256), Device(64 * 1024, 82), "The chunked rule with K = 256 needs 98304 bytes of shared memory per program"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_too_little_shared_memory_is_refused(call, device, sentence, monkeypatch):
    op, args = call
    monkeypatch.setattr(devices, "of", lambda _: device)
    with pytest.raises(Refused) as refusal:
        implementations()[op].supports(*args)
    assert refusal.value.reason == f"{sentence}, found a device with {device.shared_memory}."
    monkeypatch.setattr(devices, "of", lambda _: Device(int(sentence.split(" needs ")[1].split()[0]), 82))
    implementations()[op].supports(*args)


@pytest.mark.parametrize("call", [chunks(256), chunks(128, torch.float32), linear(), linear(32)], ids=lambda call: call[0])
def test_all_is_supported_on_amd(call, monkeypatch):
    op, args = call
    monkeypatch.setattr(devices, "of", lambda _: Device(64 * 1024, 304, True))
    implementations()[op].supports(*args)


def test_fewer_stages_are_in_the_report(monkeypatch):
    plans = {}
    for shared_memory in (227, 99, 64):
        monkeypatch.setattr(devices, "of", lambda _, n=shared_memory: H200._replace(shared_memory=n * 1024))
        with torch._subclasses.FakeTensorMode():
            x, weight = torch.empty(2, 1, 2560, dtype=BF16), torch.empty(12352, 2560, dtype=BF16)
            (plans[shared_memory],) = implementations()["fused_linear"].plan({"x": x, "weights": [weight]})
    assert [plan.split("STAGES ")[1].split(",")[0] for plan in plans.values()] == ["4", "3", "2"]


def prompt(B, T, HV=32, K=64, cu_seqlens=None):
    q, v, gate = of(B, T, HV, K), of(B, T, HV, K), of(B, T, HV)
    return (q, q, v, gate, gate, None, 0.1, None, cu_seqlens, 0, 1.0)


def decoded(B, H=16, K=64):
    D, F = 3 * H * K, H * K
    states = of(B, D, 4), of(D, 1, 4), None, of(H), of(H), of(B, H, K, K, dtype=torch.float32)
    offsets, strides = [0, H * K, 2 * H * K, D, D + F, D + F + H], [K, K, K, K, 1, 1]
    return of(B, 1, D + F + 2 * H), *states, of(K), offsets, strides, "silu", 0.1, 1e-6, 1e-6


MANY = {
    "causal_conv of a long prompt": (of(1, 512, 2**21), of(512, 4), None, "silu"),
    "causal_conv of many prompts": (of(2**17, 512, 3), of(512, 4), None, "silu"),
    "chunk_delta_rule of a long prompt": prompt(1, 2**22),
    "chunk_delta_rule of many prompts": prompt(4096, 65),
    "chunk_delta_rule of many packed prompts": prompt(1, 2**19, cu_seqlens=of(4097, dtype=torch.int32)),
    "gated_rms_norm": (of(4, 2**21, 32, 64), of(4, 2**21, 32, 64), of(64), 1e-6),
    "attention_few_queries": (of(4096, 16, 1, 64), of(4096, 16, 100, 64), of(4096, 16, 100, 64), None, None, 0.1),
    "mixer_decode": decoded(4096),
}


@pytest.mark.parametrize("call", MANY)
def test_no_axis_of_a_grid_has_more_programs_than_it_takes(call, monkeypatch):
    """The first takes 2³¹ − 1 programs, the others 65535."""
    grids = []

    class Noted(implementation._Recorder):
        def __getitem__(self, grid):
            grids.append(grid)
            return self.record

    monkeypatch.setattr(implementation, "_Recorder", Noted)
    implementations()[call.split()[0]].jit_kernels(*MANY[call])
    assert grids and all(n <= (65535 if axis else 2**31 - 1) for grid in grids for axis, n in enumerate(grid))
