"""Bad input to every command and option: one line that says what was wrong and an exit code, nothing on stdout, no traceback."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gdnfuse import cli, models
from gdnfuse.cli import main

ROOT = Path(__file__).parent.parent
TINY = {
    "model_type": "qwen3_5_text", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "linear_num_key_heads": 1,
    "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
FILES = {
    "tiny.json": json.dumps(TINY),
    "broken.json": "{",
    "empty.json": "",
    "list.json": "[1]",
    "number.json": '{"model_type": 3}',
    "unknown.json": '{"model_type": "no_such_type"}',
    "wrong.json": json.dumps({**TINY, "hidden_size": "wide"}),
    "layers.json": json.dumps({**TINY, "layer_types": ["linear_attention"]}),
    "heads.json": json.dumps({**TINY, "linear_num_key_heads": 2, "linear_num_value_heads": 3}),
    "encoder.json": '{"model_type": "t5"}',
}

MODELS = {
    "nothing-like-it": "'nothing-like-it' is not a file, folder, hub id (owner/name) or one of the presets qwen3.5-0.8b",
    "5b": "No such model: '5b'",
    "absent.json": "No such model: 'absent.json'",
    "absent/folder/config.json": "No such model",
    "broken.json": "broken.json is not JSON",
    "empty.json": "empty.json is not JSON",
    "binary.json": "Cannot read binary.json: 'utf-8' codec",
    "list.json": 'list.json is not a model config: it has no "model_type"',
    "number.json": 'number.json is not a model config: it has no "model_type"',
    "unknown.json": "no_such_type",
    "wrong.json": "Validation error for field 'hidden_size'",
    "layers.json": "layer_type",
    "empty": "The folder empty has no config.json.",
}
OPTIONS = {
    "report tiny.json --batch 0": "argument --batch: must be a positive number, found '0'",
    "report tiny.json --batch two": "must be a positive number, found 'two'",
    "report tiny.json --batch -1": "argument --batch",
    "report tiny.json --prompt 1.5": "argument --prompt: must be a positive number, found '1.5'",
    "report tiny.json --dtype int8": "argument --dtype: invalid choice: 'int8'",
    "report tiny.json --quantize fp4": "argument --quantize: invalid choice: 'fp4'",
    "report tiny.json --tensor-parallel 0": "argument --tensor-parallel: must be a positive number, found '0'",
    "report tiny.json --phase sideways": "argument --phase: invalid choice: 'sideways'",
    "report tiny.json --target tpu": "argument --target: invalid choice: 'tpu'",
    "report tiny.json --stop-after lunch": "argument --stop-after: invalid choice: 'lunch'",
    "report tiny.json --bandwidth fast": "argument --bandwidth: must be a positive number of TB/s, found 'fast'",
    "report tiny.json --html no/such/page.html": "Cannot write no/such/page.html: there is no folder no/such.",
    "report tiny.json --colour": "unrecognized arguments: --colour",
    "report tiny.json 4b": "unrecognized arguments: 4b",
    "report encoder.json": "Cannot build a causal language model from this config",
    "report heads.json": "The model does not run a prompt of 70 tokens and a step: RuntimeError",
    "verify heads.json --device cpu": "The model does not run a prompt of 70 tokens and a step: RuntimeError",
    "verify encoder.json --device cpu": "Cannot build a causal language model from this config",
    "verify tiny.json --batch none": "argument --batch",
    "verify tiny.json --prompt 0": "argument --prompt",
    "verify tiny.json --dtype float8": "argument --dtype",
    "verify tiny.json --quantize int3": "argument --quantize: invalid choice: 'int3'",
    "verify tiny.json --device quantum": "Cannot use the device 'quantum'",
    "verify tiny.json --device cuda:99": "Cannot use the device 'cuda:99'",
    "verify tiny.json --device meta": "Cannot use the device 'meta'",
    "verify tiny.json --phase decode": "unrecognized arguments: --phase decode",
    "bench tiny.json --batch 1,0": "argument --batch: must be a positive number, found '0'",
    "bench tiny.json --batch 1,,2": "argument --batch: must be a positive number, found ''",
    "bench tiny.json --quantize 8": "argument --quantize: invalid choice: '8'",
    "bench tiny.json --prefix x": "argument --prefix: must be a positive number, found 'x'",
    "bench tiny.json --speculate nothing:4 --device cpu": "Drafts are lookup:N, mtp:N or draft:N:MODEL, found 'nothing:4'.",
    "bench tiny.json --prompt x": "argument --prompt",
    "bench tiny.json --new 0": "argument --new",
    "bench tiny.json --layers 0": "argument --layers",
    "bench tiny.json --tensor-parallel 0": "argument --tensor-parallel: must be a positive number, found '0'",
    "bench tiny.json --timeout 0": "argument --timeout: must be a positive number, found '0'",
    "bench tiny.json --layers 5 --device cpu": "The model has 4 layers: --layers must be at most that, found 5.",
    "bench tiny.json --sides eager,jax --device cpu": "A side must be one of eager, fla, inductor, gdnfuse, found 'jax'.",
    "bench tiny.json --sides fla --device cpu": "The side fla needs flash-linear-attention, found none",
    "bench tiny.json --phase both": "argument --phase: invalid choice: 'both'",
    "bench tiny.json --inner tvm": "argument --inner: invalid choice: 'tvm'",
    "bench tiny.json --dtype int8": "argument --dtype",
    "bench tiny.json --device quantum": "Cannot use the device 'quantum'",
    "bench tiny.json --device meta": "Cannot use the device 'meta'",
    "bench tiny.json --device cpu --plot figure.jpeg": "A plot's file must end in .png, .pdf or .svg, found 'figure.jpeg'.",
    "bench tiny.json --device cpu --plot no/figure.png": "Cannot write no/figure.png: there is no folder no.",
    "bench tiny.json --device cpu --plot folder.png": "Cannot write folder.png: it is a folder.",
    "warmup tiny.json": "the following arguments are required: --save",
    "warmup tiny.json --save no/file": "Cannot write no/file: there is no folder no.",
    "warmup tiny.json --save folder.png": "Cannot write folder.png: it is a folder.",
    "warmup tiny.json --save figure --mode fast": "argument --mode: invalid choice: 'fast'",
    "warmup tiny.json --save figure --batch 0": "argument --batch: must be a positive number, found '0'",
    "warmup tiny.json --save figure --dtype int8": "argument --dtype",
    "warmup tiny.json --save figure --quantize 8": "argument --quantize: invalid choice: '8'",
    "warmup tiny.json --save figure --device quantum": "Cannot use the device 'quantum'",
    "warmup encoder.json --save figure --device cpu": "Cannot build a causal language model from this config",
    "tune": "the following arguments are required: MODEL_OR_CONFIG",
    "tune tiny.json --save no/file": "Cannot write no/file: there is no folder no.",
    "tune tiny.json --batch 1,0": "argument --batch: must be a positive number, found '0'",
    "tune tiny.json --dtype int8": "argument --dtype",
    "tune tiny.json --quantize 8": "argument --quantize: invalid choice: '8'",
    "rules all": "unrecognized arguments: all",
    "rules --stage lift": "unrecognized arguments: --stage lift",
    "doctor 4b": "unrecognized arguments: 4b",
    "doctor --device cuda": "unrecognized arguments: --device cuda",
    "explain 4b": "invalid choice: 'explain'",
    "report": "the following arguments are required: MODEL_OR_CONFIG",
    "verify": "the following arguments are required: MODEL_OR_CONFIG",
    "bench": "the following arguments are required: MODEL_OR_CONFIG",
    "": "the following arguments are required: COMMAND",
}


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)


def run(argv, capsys):
    """Exit code and the one line."""
    try:
        code = main(argv)
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n"), (out, err)
    assert err.startswith("gdnfuse") and "Traceback" not in err and "internal error" not in err
    return code, err


@pytest.mark.parametrize("command", ["report", "verify", "bench"])
@pytest.mark.parametrize("model", MODELS)
def test_not_a_model(command, model, capsys):
    code, line = run([command, model], capsys)
    assert code == 2 and MODELS[model] in line


@pytest.mark.parametrize("command", OPTIONS)
def test_bad_options(command, capsys):
    code, line = run(command.split(), capsys)
    assert code == 2 and OPTIONS[command] in line
    assert not list(Path.cwd().glob("figure*"))


def test_every_command_and_option_is_in_the_table():
    (commands,) = [a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    tried = " ".join(OPTIONS)
    for name, parser in commands.choices.items():
        assert f" {name} " in f" {tried} "
        valued = [a for a in parser._actions if a.option_strings and a.nargs != 0]
        for action in valued:
            assert any(c.startswith(f"{name} ") and action.option_strings[-1] in c for c in OPTIONS), (name, action)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_gpu_that_is_not_there(command, capsys):
    code, line = run([command, "tiny.json", "--device", "cuda"], capsys)
    assert code == 2 and line.startswith("gdnfuse: Cannot use the device 'cuda': ")


def test_a_plot_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, line = run(["bench", "tiny.json", "--device", "cpu", "--plot", "figure.png"], capsys)
    assert code == 2 and "pip install 'gdnfuse[plot]'" in line


def test_a_hub_that_does_not_answer(monkeypatch, capsys):
    from transformers import AutoConfig

    def unreachable(name):
        raise OSError(f"We couldn't connect to the hub.\nCheck {name}.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    for command in ("report", "verify", "bench"):
        code, line = run([command, "nobody/nothing"], capsys)
        assert code == 2 and "Cannot get the config of 'nobody/nothing' from the hub: OSError: We couldn't connect" in line


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB."), 1, "Out of memory. CUDA out of memory. Tried"),
        (MemoryError(), 1, "Out of memory."),
        (PermissionError(13, "Permission denied", "config.json"), 2, "config.json: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_can_happen_meanwhile(error, code, words, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(models, "meta_model", fail)
    found, line = run(["report", "tiny.json"], capsys)
    assert found == code and words in line


def test_an_error_of_ours_says_so(monkeypatch, capsys):
    monkeypatch.setattr(models, "trace", lambda *args, **kwargs: 1 // 0)
    assert main(["report", "tiny.json"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        "gdnfuse: internal error, ZeroDivisionError: integer division or modulo by zero (--debug shows where)\n",
    )


@pytest.mark.parametrize("argv", [["--debug", "report", "5b"], ["report", "5b", "--debug"], ["report", "--debug", "5b"]])
def test_debug_shows_where(argv, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "load_config" in err and err.splitlines()[-1].startswith("gdnfuse: No such model")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_cannot_be_written():
    command = [sys.executable, "-m", "gdnfuse.cli", "doctor"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (2, "gdnfuse: Cannot write the output: No space left on device.\n")
