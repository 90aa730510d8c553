"""Every option: its default, its bad values, and errors that name what is wrong and what would be right."""

import dataclasses

import pytest
import torch

import gdnfuse
from gdnfuse import cache_keys
from gdnfuse.backend import gdnfuse as backend
from gdnfuse.options import INNER, STAGES, Options, parse

BAD = {
    "inner": ["Inductor", None, 3, ["eager"]],
    "strict": [1, "yes", None],
    "capture": [1, "no", None],
    "stop_after": ["lifting", 3, True],
    "verify": [1, "yes", None],
    "activations": ["bf16", "e4m3", True, torch.float8_e4m3fn],
    "fuel": [-1, True, 1.5, "all"],
    "checkpoint_every": [-64, 100, 64.0, None],
    "one_shot_bytes": [-1, 2**21, 4096.0, True, None, "all"],
    "target": [0, torch.device("cpu")],
    "inductor": [None, ["max_autotune"], {1: 2}],
}


def compile_with(**kwargs):
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    return backend(gm, [torch.zeros(1)], **kwargs)


def test_defaults():
    assert parse(None) == parse({}) == Options()
    given = {"inner": "inductor", "inductor": {}, "strict": False, "capture": True, "stop_after": None, "target": None}
    assert Options() == Options(**given, verify=False, fuel=None)


def test_every_option_has_bad_values_here():
    assert BAD.keys() == {f.name for f in dataclasses.fields(Options)}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in BAD.items() for v in values])
def test_a_bad_value_is_named(name, value):
    with pytest.raises(gdnfuse.GdnfuseError) as e:
        parse({name: value})
    assert name in str(e.value) and repr(value) in str(e.value) and str(e.value).endswith(".")


@pytest.mark.parametrize(("name", "valid"), [("inner", INNER), ("stop_after", STAGES)])
def test_valid_values_are_accepted_and_listed(name, valid):
    for value in valid:
        assert getattr(parse({name: value}), name) == value
    with pytest.raises(gdnfuse.GdnfuseError) as e:
        parse({name: "nonsense"})
    assert all(repr(v) in str(e.value) for v in valid)


def test_unknown_keys_are_named_with_the_valid_ones():
    with pytest.raises(gdnfuse.GdnfuseError) as e:
        parse({"stric": True, "max_autotune": True, "inner": "eager"})
    message = str(e.value)
    assert "'stric'" in message and "'max_autotune'" in message and "'inner'" not in message
    assert all(f.name in message for f in dataclasses.fields(Options)) and "inductor" in message


def test_options_given_are_not_changed():
    given = {"inner": "inductor", "inductor": {"max_autotune": False}}
    parse(given)
    assert given == {"inner": "inductor", "inductor": {"max_autotune": False}}


def test_options_of_inductor_need_inductor():
    with pytest.raises(gdnfuse.GdnfuseError, match="inner='inductor', found inner='eager'"):
        parse({"inner": "eager", "inductor": {"max_autotune": True}})


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_mode_needs_inductor(inner):
    with pytest.raises(gdnfuse.GdnfuseError, match="reduce-overhead.*inductor"):
        compile_with(mode="reduce-overhead", options={"inner": inner})


def test_the_default_mode_is_everybodys():
    compile_with(mode="default", options={"inner": "eager"})


def test_an_unknown_mode_is_named_with_the_valid_ones():
    with pytest.raises(gdnfuse.GdnfuseError, match="'fast'.*reduce-overhead"):
        compile_with(mode="fast")


def test_an_unknown_option_of_inductor_is_named():
    with pytest.raises(gdnfuse.GdnfuseError, match="'max_autotunes'"):
        compile_with(options={"inductor": {"max_autotunes": True}})


def test_mode_and_options_of_inductor_reach_inductor(monkeypatch):
    seen = []
    monkeypatch.setattr("gdnfuse.compat.lookup_backend", lambda name: lambda gm, inputs, **kw: seen.append((name, kw)) or gm)
    compile_with(mode="reduce-overhead", options={"inductor": {"max_autotune": True}})
    compile_with()
    (name, with_mode), (_, plain) = seen
    assert name == "inductor" and plain.get("config_patches", {}).keys() <= {cache_keys.CACHEABLE}
    assert with_mode["config_patches"]["triton.cudagraphs"] is True and with_mode["config_patches"]["max_autotune"] is True


def test_errors_reach_the_user_through_torch_compile():
    with pytest.raises(Exception, match="Options must be among .*, found 'fuse'"):
        torch.compile(lambda x: x + 1, backend="gdnfuse", options={"fuse": True})(torch.zeros(1))
