"""benchmarks/step.py: what is made of a profile, on kernels that never ran, and of reports of real graphs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import gdnfuse
from gdnfuse.bench import measure
from gdnfuse.models import load_config, meta_model, trace
from gdnfuse.passes import survey

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.sweep  # as in test_benchmarks
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("step")


def kernels(step, text, begin=0.0):
    """Of "name start end, …"."""
    found = (part.split() for part in text.split(","))
    return [step.Kernel(name, begin + float(start), begin + float(end)) for name, start, end in found]


def test_parts_of_overlapping_kernels_add_up_to_the_step(step):
    of = kernels(step, "a 10 20, b 12 30, c 29 33, d 40 45")
    assert step.shares(of) == [10, 10, 3, 12]  # what is idle before d is d's
    assert sum(step.shares(of)) == 45 - 10


def test_a_kernel_that_ends_within_another_moves_the_end_before_it_does(step):
    assert step.shares(kernels(step, "a 0 10, b 1 4, c 2 12")) == [6, 4, 2]
    assert step.shares(kernels(step, "a 0 10, b 1 10")) == [10, 0]


def test_steps_are_told_apart_and_figures_are_medians(step):
    profile = [k for i, last in enumerate([9, 7, 5]) for k in kernels(step, f"a 0 2, b 1 {last}", 20.0 * i)]
    steps = step.steps_of(reversed(profile), 3)
    assert [[k.name for k in s] for s in steps] == [["a", "b"]] * 3
    assert step.medians(steps) == ([2, 5], 12.0)  # from 9 to 20, from 27 to 40
    assert step.medians(steps[:1]) == ([2, 7], 0.0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a 0 1, b 1 2, a 2 3", "2 equal steps are a multiple of 2 kernels, found 3."),
        ("a 0 1, b 1 2, a 2 3, c 3 4", "Kernel 2 of 2 is b in step 1 and c in step 2."),
        (None, "2 equal steps are a multiple of 2 kernels, found 0."),
    ],
)
def test_nothing_is_attributed_of_steps_that_differ(text, sentence, step):
    given = kernels(step, text) if text else []
    found = step.attributed(given, 2, [], [], 1e12)
    assert found["refused"] == sentence and [k["name"] for k in found["trace"]] == [k.name for k in given]
    assert "rows" not in found


def ops(step):
    """A layer of one kind, one of another, and the head."""
    attention = step.Op("attention", "l.1", "full attention", "attention", 2, 500, (("prepare", "split"),))
    return [
        step.Op("linear", "l.0", "MLP", "down", 1, 1000),
        attention,
        step.Op("linear", "", "outside the layers", "head", 1, 3000),
    ]


OURS = {"linear_kernel", "prepare_kernel", "split_kernel"}
NAMES = ["embed", "linear_kernel", "triton_poi", "prepare_kernel", "split_kernel", "linear_kernel"]


def test_kernels_are_what_the_report_says_and_others_stand_in_the_layer_before(step):
    at = step.places(NAMES, OURS, ops(step))
    assert [p.what for p in at] == ["others", "down", "others", "attention", "attention", "head"]
    assert [p.nth for p in at] == [0, 0, 0, 0, 1, 0] and [p.layer for p in at] == ["", "l.0", "l.0", "l.1", "l.1", ""]
    assert step.per_layer(at, ops(step)) == [
        {"kind": "MLP", "layers": 1, "kernels": 2, "most": 2},
        {"kind": "full attention", "layers": 1, "kernels": 2, "most": 2},
        {"kind": "outside the layers", "layers": 1, "kernels": 2, "most": 2},
    ]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (NAMES[:-1], "The report's operations launch 4 kernels of gdnfuse, found 3 in the step."),
        (
            ["linear_kernel", "linear_kernel", "split_kernel", "linear_kernel"],
            "Kernel 1 of attention in l.1 must be of prepare, found linear_kernel.",
        ),
    ],
)
def test_kernels_other_than_the_reports_are_not_named(names, sentence, step):
    text = ", ".join(f"{name} {i} {i + 1}" for i, name in enumerate([*names, *names]))
    found = step.attributed(kernels(step, text), 2, ops(step), OURS, 1e12)
    assert found["unknown"] == sentence and {row["kind"] for row in found["rows"]} == {"others", "between steps"}
    assert sum(row["count"] for row in found["rows"] if row["kernel"]) == len(names)


def test_rows_are_by_gap_and_bytes_stand_with_the_longest(step):
    us = [1.0, 4.0, 2.0, 1.5, 3.0, 5.0]
    rows = step.groups(NAMES, us, step.places(NAMES, OURS, ops(step)), 0.5, 1e9)  # 1000 bytes a microsecond
    assert [(r["what"], r["kernel"], r["us"], r["bytes"], r["gap_us"]) for r in rows] == [
        ("down", "linear_kernel", 4.0, 1000, 3.0),
        ("attention", "split_kernel", 3.0, 500, 2.5),
        ("others", "triton_poi", 2.0, 0, 2.0),
        ("head", "linear_kernel", 5.0, 3000, 2.0),
        ("attention", "prepare_kernel", 1.5, 0, 1.5),
        ("others", "embed", 1.0, 0, 1.0),
        ("", "", 0.5, 0, 0.5),
    ]
    assert sum(r["share"] for r in rows) == pytest.approx(1.0)
    lines = step._lines(rows).splitlines()
    assert lines[2].startswith("MLP, down") and lines[-1].split() == ["total", "6", "17.0", "100.0", "%", "0.0", "4.5", "12.5"]


def test_equal_kernels_of_a_block_are_one_row(step):
    place = step.Place("MLP", "down", 0, "l.0", 100)
    (row, _) = step.groups(["k", "k", "k"], [1.0, 3.0, 8.0], [place] * 3, 0.0, 1e9)
    assert (row["count"], row["us_each"], row["us"], row["bytes"]) == (3, 3.0, 12.0, 300)


def test_bytes_are_those_of_weights_states_and_tokens_so_far(step):
    assert step._bytes("mlp.down_proj.weight bf16[2560, 9216]", 9, 1.0) == 2 * 2560 * 9216
    assert step._bytes("recurrent_states f32[1, 32, 128, 128]", 9, 1.0) == 2 * 4 * 32 * 128 * 128
    assert step._bytes("keys bf16[2, 4, 71, 256]", 9, 1.0) == 2 * 2 * 4 * 9 * 256
    assert step._bytes("keys bf16[2, 4, 71, 256]", 99, 1.0) == 2 * 2 * 4 * 71 * 256
    assert step._bytes("cumulative_length i64[]", 9, 1.0) == 8
    assert step._bytes("mlp.experts.down_proj bf16[256, 2048, 512]", 9, 1 / 32) == 2 * 8 * 2048 * 512
    assert step._bytes("input 1", 9, 1.0) == step._bytes("x bf16[s0, 4]", 9, 1.0) == 0


@pytest.mark.parametrize("batch", [1, 4])
def test_operations_of_a_graph_stand_in_its_order(batch, step, monkeypatch):
    """By the calls of the lowered graph, which the report has by blocks; a step that runs what they launch is named by them."""
    from gdnfuse.kernels import implementations

    config, taken = load_config("0.8b"), []
    config.num_hidden_layers, config.layer_types = 5, config.layer_types[:5]
    take = survey.take
    monkeypatch.setattr(survey, "take", lambda gm: taken.append(take(gm)) or taken[-1])
    torch.compiler.reset()
    (report,) = trace(meta_model(config), batch=batch, target="cuda")
    calls = [c for c in taken[-1].calls if c.operation.op in implementations() and c.operation.kernels]
    found = step.operations(report, implementations(), 10)
    assert [(o.op, o.kernels) for o in found] == [(c.operation.op, c.operation.kernels) for c in calls]

    whats = [o.what for o in found if o.layer == "model.layers.3"]
    assert [w for w in whats if w != "norm"] == ["q, k, v", "attention_decode", "o_proj", "gate and up", "down_proj"]
    mixer = [o.what for o in found if o.layer == "model.layers.1" and o.what != "norm"]
    rule = "packed_decode" if batch == 1 else "mixer_decode"
    assert mixer == ["in_proj", rule, "out_proj", "gate and up", "down_proj"] and found[-1].what == "head"
    weights = sum(2 * p.numel() for n, p in meta_model(config).named_parameters())
    moved = sum(o.bytes for o in found)
    states = 2 * 4 * batch * (4 * (16 * 128 * 128 * 4 + 6144 * 4 * 2)) // 4 + 2 * 2 * batch * 2 * 10 * 256
    assert moved == pytest.approx(weights + states, rel=0.01)

    names = [name for op in found for name in (op.names or ((f"{op.op}_kernel",) * op.kernels,))[0][: op.kernels]]
    at = step.places(["embed", *names], set(names), found)
    assert [p.what for p in at[1:]] == [o.what for o in found for _ in range(o.kernels)]


def test_a_step_of_a_model(step, monkeypatch, tmp_path, capsys):
    """Its workers in this process, its kernels made up: two steps of different order are refused, equal ones are named."""
    decode, workers = importlib.import_module("decode"), importlib.import_module("gdnfuse.bench.workers")
    command = ["--models", "tiny", "--dtype", "float32", "--device", "cpu", "--prompt", "4", "--warmup", "1", "--steps", "16"]

    def spawn(program, side, model, argv, folder, *_):
        step.main([*argv, "--worker", side, model, folder])
        return json.loads(capsys.readouterr().out.strip().rsplit("\n", 1)[-1])

    def compiled(side, model, mode):
        assert mode == "reduce-overhead"
        return torch.compile(model, backend=side, options={"inner": "eager"} if side == "gdnfuse" else None, fullgraph=True)

    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setitem(measure.COPIED, "cpu", 2**20)
    monkeypatch.setattr(workers, "spawn", spawn)
    monkeypatch.setattr(decode, "compiled", lambda side, *rest: compiled("gdnfuse", *rest))
    torch.compiler.reset()
    gdnfuse.clear_reports()
    profile = [k for i in range(4) for k in kernels(step, "a 0 2, b 1 9", 20.0 * i)]
    file = tmp_path / "step.json"
    with mock.patch.object(step, "kernels_of", lambda decode, tokens: (profile, [decode(t) for t in tokens])[0]):
        assert step.main([*command, "--profiled", "3", "--beside", "inductor", "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    (result,) = data["results"]
    ours, beside = result["sides"]
    assert ours["ms"] and ours["kernels_per_step"] == beside["kernels_per_step"] == 2 and ours["profiled_steps"] == 3
    assert ours["profiled_us"] == 20.0 and [row["us"] for row in ours["rows"]] == [11.0, 7.0, 2.0]
    assert data["machine"]["torch"] == torch.__version__ and result["bytes_per_second"] > 0 and "worker" not in data["arguments"]
    out = capsys.readouterr().out
    assert "tiny, batch 1, gdnfuse: " in out and "tiny, batch 1, inductor: " in out and "between steps" in out

    assert step.main([*command, "--json", str(file)]) == 1
    assert "nothing is attributed. 8 equal steps are a multiple of 8 kernels, found 0." in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--beside jax", "--profiled 1", "--batch 0", "--steps 3"])
def test_bad_arguments_are_named(option, step, capsys):
    with pytest.raises(SystemExit):
        step.main([*option.split(), "--device", "cpu"])
    assert option.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_a_device_is_needed(step, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        step.main([])
    assert "a CUDA device is needed" in capsys.readouterr().err


@needs_gpu
@pytest.mark.gpu
def test_kernels_of_a_gpu(step):
    tokens = [torch.ones(4, device="cuda") for _ in range(3)]
    steps = step.steps_of(step.kernels_of(lambda t: (t + 1) * 2, tokens), 3)
    assert [len(s) for s in steps] == [2, 2, 2] and all(k.start < k.end for s in steps for k in s)


@needs_gpu
@pytest.mark.gpu
def test_bandwidth_of_a_gpu():
    assert 1e11 < measure.bandwidth("cuda") < 2e13
