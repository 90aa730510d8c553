"""gdnfuse tune: what is searched, what is written, and who reads it. Clocks are fake, but on a GPU."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from gdnfuse import doctor, models, versions
from gdnfuse.bench import tune
from gdnfuse.bench.configs import near
from gdnfuse.cli import main
from gdnfuse.errors import GdnfuseError, Refused
from gdnfuse.generation.explain import Explanation
from gdnfuse.kernels import devices, linear_configs, skinny_linear, tuned
from gdnfuse.report.records import NOT_MEASURED, TUNE
from tests.models import zoo
from tests.pages import check_reference

CPU = torch.device("cpu")
FACTS = {"card": "Some GPU (40 GB)", "capability": "8.6", "multiprocessors": 82}
FACTS |= {"gdnfuse": "1", "triton": "3", "kernels": "abc", "torch": "2"}
KEY = tuned.Key("skinny_linear", "norm", (256, 0, 128, 1), "bfloat16")


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card and a folder for it. Returns the file that is read."""
    monkeypatch.setattr(tuned, "about", lambda index: dict(FACTS))
    monkeypatch.setattr(tuned, "card_of", lambda index: FACTS["card"])
    monkeypatch.setenv(tuned.FOLDER, str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    tuned.forget()
    yield tuned.file_of(FACTS["card"])
    tuned.forget()


def chosen(key=KEY, default=(8, 256, 4, 4)):
    def check(config):
        skinny_linear.require_config(config, 256, 128, None, "norm", 1)

    return tuned.choose(key, default, check, CPU)


@pytest.mark.parametrize(
    ("times", "found"),
    [
        ({0: [10.0], 1: [11.0], 2: [10.0]}, 0),
        ({0: [10.0], 1: [9.8], 2: [10.5]}, 0),  # less than three per cent
        ({0: [10.0], 1: [9.0], 2: [8.0]}, 2),
        ({0: [10.0, 8.0], 1: [9.0], 2: [8.0]}, 0),  # the default was slow once
        ({0: [10.0], 1: [9.0], 2: [8.0, 8.0, 9.9]}, 1),  # the fastest was fast by chance
        ({0: [10.0], 1: [], 2: [8.0]}, 2),  # one does not fit
    ],
)
def test_the_default_stays_unless_another_is_faster_each_time(times, found):
    left = {(n,): list(us) for n, us in times.items()}

    def time(config):
        if not left[config]:
            raise Refused("It does not fit.")
        return left[config].pop(0) if len(left[config]) > 1 else left[config][0]

    config, us, default_us, compared = tune.search((0,), [(1,), (2,)], time)
    assert compared == sum(map(bool, (times[1], times[2])))
    assert config == (found,) and us <= default_us and (found == 0 or default_us >= 1.03 * us)


def test_without_a_default_there_is_nothing_to_compare():
    with pytest.raises(ZeroDivisionError):
        tune.search((0,), [(1,)], lambda config: 1 / config[0])


def test_a_file_comes_back_and_is_read_once(card, caplog):
    assert chosen() == (8, 256, 4, 4) and not tuned.is_tuned()
    tuned.write(card, FACTS, {KEY: {"config": [2, 128, 2, 0], "us": 1.0}})
    assert chosen() == (8, 256, 4, 4)  # what a process once read stays, as do its compiled graphs
    tuned.forget()
    assert chosen() == (2, 128, 2, 0) and tuned.is_tuned()
    ((key, row),) = tuned.read(card, FACTS).items()
    assert key == KEY and row["us"] == 1.0
    assert chosen(KEY._replace(rows=2)) == (8, 256, 4, 4)
    with tuned.trying("skinny_linear", (4, 128, 2, 0)):
        assert chosen() == (4, 128, 2, 0)
    with tuned.trying("skinny_linear", (3, 128, 2, 0)), pytest.raises(Refused, match="rows must be a power of two"):
        chosen()
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"card": "Another"}, "Tuned choices must be made for card Some GPU (40 GB), found card Another in "),
        ({"gdnfuse": "0"}, "Tuned choices must be made for gdnfuse 1, found gdnfuse 0 in "),
        ({"kernels": "x", "triton": "2"}, "made for kernels abc, triton 3, found kernels x, triton 2 in "),
        ('{"schema": "gdnfuse.tuned/1"', "Tuned choices must be in a file that gdnfuse tune has written, found that "),
        ("[]", "is damaged. So the built-in choices are used: run gdnfuse tune again."),
        ('{"schema": "gdnfuse.tuned/1", "about": {}, "choices": [{"kernel": 1}]}', "is damaged."),
        ('{"schema": "gdnfuse.tuned/0"}', "Tuned choices must have the schema gdnfuse.tuned/1, found gdnfuse.tuned/0 in "),
    ],
    ids=str,
)
def test_a_file_that_does_not_fit_is_ignored_with_one_warning(change, sentence, card, caplog):
    if isinstance(change, str):
        card.write_text(change)
    else:
        tuned.write(card, FACTS | change, {KEY: {"config": [2, 128, 2, 0]}})
    assert chosen() == chosen(KEY._replace(kind="plain")) == (8, 256, 4, 4)
    assert len(caplog.messages) == 1 and sentence in caplog.messages[0] and str(card) in caplog.messages[0]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ([3, 128, 2, 0], "rows must be a power of two"),
        ([2, 128, 64, 0], "warps must be a power of two up to 32"),
        ([2, 128, 2], "A config of this kernel is like"),
        ([2, 128, 2, "0"], "A config of this kernel is like"),
    ],
)
def test_a_choice_that_does_not_fit_its_kernel_is_refused(config, sentence, card, caplog):
    tuned.write(card, FACTS, {KEY: {"config": config}})
    assert chosen() == chosen() == (8, 256, 4, 4)
    (message,) = caplog.messages
    found = f"found {config} for skinny_linear norm 256×0×128×1 bfloat16, so the built-in one is used"
    assert message.startswith(f"A tuned choice must fit its kernel, {found}")
    assert "run gdnfuse tune again" in message and sentence in message


def test_what_kernels_ask_of_their_configs():
    few, ring = linear_configs.FewRowsConfig(64, 128, 4, 4, 2, True), linear_configs.RingConfig(2, 48, 3, 1)
    small, cores = devices.H200._replace(shared_memory=99 * 1024), linear_configs.TensorCoresConfig(4, 6)
    linear_configs.require_few_rows(few, 1024, 8, 2, 2, devices.H200)
    linear_configs.require_ring(ring, 1024, 8, 2, False, 1, devices.H200)
    linear_configs.require_tensor_cores(cores)
    int4, e4m3 = (skinny_linear.quantized.stored(name) for name in ("int4_group32", "fp8_block128"))
    skinny_linear.require_config((8, 512, 4, 0, 16), 256, 1024, e4m3, "norm", 1)

    def refused(sentence, require, *args):
        with pytest.raises(Refused, match=sentence):
            require(*args)

    refused("in 1 parts, found 2", linear_configs.require_few_rows, few, 1024, 8, 2, 1, devices.H200)
    refused("multiple of 256, found 640", linear_configs.require_few_rows, few, 640, 8, 2, 2, devices.H200)
    refused("shared memory", linear_configs.require_few_rows, few._replace(BK=512), 1024, 8, 2, 2, small)
    refused("share a scale", linear_configs.require_few_rows, few, 1024, 8, 1, 2, devices.H200, 128)
    refused("at least 32 rows", linear_configs.require_few_rows, few._replace(BM=16), 1024, 8, 2, 2, devices.H200)
    refused("up to 32 rows", linear_configs.require_ring, ring, 1024, 8, 2, True, 1, devices.H200)
    refused("shared memory", linear_configs.require_ring, ring._replace(stages=8), 1024, 8, 2, False, 1, devices.H200)
    refused("16 or 32 rows", linear_configs.require_tensor_cores, cores._replace(rows=64))
    for config, M, how, kind, head, sentence in (
        ((8, 512, 4, 0, 64), 256, int4, "norm", 1, "share a scale must be a multiple of 64"),
        ((8, 512, 4, 0, 16), 252, e4m3, "norm", 1, "rows of a quantised weight must be a multiple of 8, found 252"),
        ((8, 512, 4, 0), 256, e4m3, "norm", 1, "A config must"),
        ((8, 1024, 4, -1), 256, None, "norm", 1, "no negative numbers"),
        ((8, 256, 4, 0), 256, None, "gate", 512, "columns of a step must be a multiple of 512, found 256"),
    ):
        refused(sentence, skinny_linear.require_config, config, M, 1024, how, kind, head)


def test_configs_nearby_are_of_the_same_kernel_and_split_alike():
    few, ring = linear_configs.FewRowsConfig(64, 128, 4, 3, 2, True), linear_configs.RingConfig(2, 48, 3, 1)
    cores = linear_configs.TensorCoresConfig(4, 6)
    for key, default in {
        KEY._replace(sizes=(12352, 0, 2560, 1)): (2, 512, 2, 0),
        KEY._replace(sizes=(12352, 0, 2560, 1), of="int4_group128"): (16, 512, 4, 0, 32),
        KEY._replace(kernel="skinny_tensor_cores", sizes=(2560, 0, 4096, 1), of="fp8_block128"): cores,
        KEY._replace(kernel="few_rows_linear", kind="plain", sizes=(2560, 0, 4096, 2), rows=8): few,
        tuned.Key("delta_rule_gated", "", (32, 128, 128), "float32"): (128, 4, False),
    }.items():  # fmt: skip
        found = near(key, default, 6)
        assert 4 <= len(found) <= 6 and default not in found and {type(config) for config in found} == {type(default)}, key
        assert {getattr(config, "parts", 0) for config in found} == {getattr(default, "parts", 0)}
        assert len({len(config) for config in [*found, default]}) == 1
    assert near(KEY._replace(kernel="few_rows_hopper", rows=8), ring, 6) == []  # on no Hopper


def test_a_model_is_tuned_and_its_report_says_so(card, monkeypatch, capsys):
    """From a config without weights to the file, and from the file to what the next report says."""
    zoo.causal_lm(**zoo.SMALL).config.save_pretrained(card.parent)
    folder, measured = str(card.parent), []

    def launches(*options):
        assert main(["report", folder, "--json", *options]) == 0
        graph = json.loads(capsys.readouterr().out)["graphs"][0]
        records = [r for part in (graph, *graph["layers"]) for r in part["records"] if r["stage"] == "lower" and r["launches"]]
        return {(r["launches"][0], r["measured"]) for r in records if r["rule"].endswith(("linear", "conv", "packed_decode"))}

    before = launches()
    assert {where for _, where in before} == {f"{NOT_MEASURED}: {TUNE}"}

    def clock(call):
        assert call.kernel.name in ("fused_linear", "in_proj_conv", "split_linear", "packed_decode", "mixer_decode")
        measured.append(call.choice.key)
        return lambda config: 2.0 if config == call.choice.default else 1.0

    monkeypatch.setattr(tune, "require_gpu", lambda: dict(FACTS))
    monkeypatch.setattr(tune, "DEVICE", "meta")
    monkeypatch.setattr(tune.tune, "__defaults__", (None, clock))
    assert main(["tune", folder, "--batch", "1,3", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == tuned.SCHEMA and data["file"] == str(card) and json.loads(card.read_text())["about"] == FACTS
    assert {key.rows for key in measured} == {1, 3} and len(measured) == len(set(measured)) == len(data["choices"])
    assert {"skinny_linear", "few_rows_linear", "delta_rule"} <= {key.kernel for key in measured}
    check_reference(data, "tuned")
    changed = [row for row in data["choices"] if row["config"] != row["default"]]
    assert changed and all(row["us"] == 1.0 and row["default_us"] == 2.0 for row in changed)
    after = launches()
    assert {where for _, where in after} == {tuned.BY_TUNE} and {line for line, _ in before} != {line for line, _ in after}

    assert main(["tune", folder, "--batch", "2"]) == 0  # what is in the file stays
    out = capsys.readouterr().out
    assert f"Wrote {card}: " in out and out.endswith(f"differ from the built-in ones on {FACTS['card']}.\n")
    assert {key.rows for key in tuned.read(card, FACTS)} == {1, 2, 3}


def test_where_choices_were_measured(card, monkeypatch):
    default = tuned.Choice(KEY, (1,), (1,), False, True)
    ours, unknown = tuned.Choice(KEY, (1,), (2,), True, True), tuned.Choice(KEY, (1,), (1,), False, False)
    assert tuned.standing("a.py", [default], CPU) == f"{NOT_MEASURED}: {TUNE}" and tuned.standing("a.py", [], CPU) == NOT_MEASURED
    assert tuned.standing("a.py", [ours], CPU) == tuned.BY_TUNE and tuned.standing("", [], CPU) == ""
    monkeypatch.setattr(tuned, "card_of", lambda index: "NVIDIA H200")
    assert tuned.standing("a.py", [default, ours], CPU) == tuned.standing("a.py", [], CPU) == "a.py on an H200"
    assert tuned.standing("a.py", [unknown], CPU) == f"{NOT_MEASURED}: {TUNE}"


def test_an_explanation_names_the_command(decode_report):
    (record, *_) = [r for r in decode_report.all_records if r.launches]
    assert TUNE not in Explanation([decode_report], []).summary()
    before, record.measured = record.measured, f"{NOT_MEASURED}: {TUNE}"
    try:
        assert f"Choices of some kernels were {NOT_MEASURED}: {TUNE}." in Explanation([decode_report], []).summary()
    finally:
        record.measured = before


def test_doctor_names_the_command(card):
    assert doctor._untuned(0) == "Measure the choices of its kernels once: gdnfuse tune MODEL."
    tuned.write(card, FACTS, {KEY: {"config": [2, 128, 2, 0]}})
    tuned.forget()
    assert doctor._untuned(0) == ""


def test_without_a_gpu_or_a_choice_there_is_nothing_to_tune(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "4b"]) == 2
    assert capsys.readouterr().err.startswith("gdnfuse: gdnfuse tune measures kernels and needs a GPU, found none: run it where")
    assert tuned.card_of(0) == "" and not tuned.is_tuned()
    monkeypatch.setattr(tune, "require_gpu", lambda: dict(FACTS))
    monkeypatch.setattr(tune, "calls", lambda *_: [])
    with pytest.raises(GdnfuseError, match="found none"):
        tune.tune(torch.nn.Identity(), [1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantize", [None, "fp8_block128", "int4_group128"])
def test_on_a_gpu(quantize, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "gdnfuse.bench.tune")
    monkeypatch.setenv(tuned.FOLDER, str(tmp_path))
    monkeypatch.setattr(tune, "NEAREST", 3)
    monkeypatch.setattr(tune, "COLD_BYTES", 1e6)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    model = models.meta_model(zoo.causal_lm(**zoo.SMALL | sizes).config)
    if quantize:
        models.quantized(model, quantize)
    with torch.no_grad():
        data = tune.tune(model, [1, 4])
    assert data["about"]["gdnfuse"] == versions.version("gdnfuse") and all(row["us"] > 0 for row in data["choices"])
    assert {row["rows"] for row in data["choices"]} == {1, 4} and tuned.is_tuned(torch.cuda.current_device())
    assert "Its results must be" not in caplog.text
    tuned.forget()
