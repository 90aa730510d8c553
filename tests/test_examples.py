"""Every example runs on the model that it makes where no hub is, with settings that keep it quick."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
import transformers

import gdnfuse
from gdnfuse.models import load_config
from gdnfuse.options import Options
from tests.models import zoo

ROOT = Path(__file__).parent.parent
QUICK = ["--inner", "eager"]
MOST_LINES = 40


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Without a hub, as a machine without a network is."""

    def offline(name, **_):
        raise OSError(f"We couldn't connect to load {name}.")

    for cls in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(cls, "from_pretrained", offline)
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    for name in ("num_hidden_layers", "full_attention_interval"):  # one layer of each kind
        monkeypatch.setitem(importlib.import_module("pretrained").SIZES, name, 2)
    torch.compiler.reset()
    gdnfuse.clear_reports()


def main_of(name: str):
    return importlib.import_module(name).main


def test_each_example_is_short_and_tested():
    here = Path(__file__).read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert f'main_of("{path.stem}")' in here or path.stem in ("pretrained", "handwritten_layer"), path
        assert len(path.read_text().splitlines()) < MOST_LINES, path


def test_a_model_is_loaded_where_there_is_one(monkeypatch, tmp_path):
    pretrained = importlib.import_module("pretrained")
    model, tokenizer = pretrained.load("nobody/nothing")
    ids = tokenizer("Δ rule").input_ids
    assert tokenizer.decode(ids) == "Δ rule" and 0 not in ids and max(ids) < model.config.vocab_size
    found = {}
    for cls, thing in ((transformers.AutoModelForCausalLM, model), (transformers.AutoTokenizer, tokenizer)):
        monkeypatch.setattr(
            cls, "from_pretrained", lambda name, thing=thing, **_: found.setdefault(name, []).append(thing) or thing
        )
    assert pretrained.load("some/model") == (model, tokenizer) and list(found) == ["some/model"]


def test_generate_and_static_loop_agree(capsys):
    looped = main_of("static_loop")(["--tokens", "6", *QUICK])
    generated = main_of("generate")(["--tokens", "6", *QUICK])
    assert torch.equal(generated[:, -6:], looped)
    assert "Qwen/Qwen3.5-0.8B cannot be loaded. Using a small model with random weights instead." in capsys.readouterr().out


def test_read_report(capsys):
    prompt, step = main_of("read_report")([*QUICK])
    assert prompt.fused_layers == step.fused_layers == 1
    assert "model.layers.0.linear_attn" in capsys.readouterr().out


@pytest.mark.sweep
def test_lora():
    pytest.importorskip("peft")
    tokens = main_of("lora")(["--tokens", "6", *QUICK])
    assert torch.equal(tokens["active"], tokens["merged"]) and torch.equal(tokens["active"], tokens["unmerged"])
    assert not torch.equal(tokens["active"], tokens["off"])


@pytest.mark.sweep
def test_prefixes():
    # The first question shows nothing new, the second where questions part from the document: the third begins there.
    assert main_of("prefixes")(QUICK, document="A document. " * 37) == [0, 0, 384]


@pytest.mark.sweep
def test_padded_batch(capsys):
    together, alone = main_of("padded_batch")(["--tokens", "6", *QUICK])
    assert [row.tolist() for row in together] == [single.tolist() for single in alone]
    assert "1/1 GDN layers fused" in capsys.readouterr().out


@pytest.mark.sweep
def test_speculate(capsys):
    tokens, plain = main_of("speculate")(["--tokens", "24", *QUICK])
    assert torch.equal(tokens, plain) and "drafts accepted" in capsys.readouterr().out


@pytest.mark.parametrize("layers", [4, pytest.param(24, marks=pytest.mark.sweep)])
def test_report_from_config(layers, tmp_path, capsys):
    """The preset whole, and its first layers."""
    config = load_config("0.8b")
    if layers < config.num_hidden_layers:
        config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
        config.save_pretrained(tmp_path)
    (report,) = main_of("report_from_config")(["--batch", "2", *([str(tmp_path)] if layers < 24 else [])])
    assert report.fused_layers == 3 * layers // 4 and capsys.readouterr().out.count(": fused") == 3 * layers // 4


@pytest.mark.parametrize(("batch", "ops"), [(1, ["in_proj_conv", "packed_decode", "fused_linear"]), (2, zoo.MANY_ROWS)])
def test_handwritten(batch, ops, capsys):
    report = main_of("handwritten")(["--batch", str(batch)])
    assert report.phase == "decode" and report.fused_layers == 1
    assert zoo.ops_without_views(report.layers[0]) == ops
    assert "outputs and both states are eager's after 16 tokens" in capsys.readouterr().out


def test_the_notebook_opens_the_page(monkeypatch, tmp_path, capsys):
    """Its cells, in order, without Jupyter. It is stored without outputs."""
    book = json.loads((ROOT / "examples" / "report.ipynb").read_text())
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert book["nbformat"] == 4 and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    init = Options.__init__  # Inductor is tested elsewhere; here it would only be slow
    monkeypatch.setattr(Options, "__init__", lambda self, **given: init(self, **{"inner": "eager", **given}))
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for cell in code:
        exec(compile("".join(cell["source"]), "report.ipynb", "exec"), scope)
    text = (tmp_path / "report.html").read_text()
    assert "Qwen3_5ForCausalLM" in text and "model.layers.0" in text and text.startswith("<!DOCTYPE html>")
    assert all(report.fused_layers == 1 for report in gdnfuse.reports()) and len(gdnfuse.reports()) == 2


DEMO = ["--layers", "2", "--hidden", "64", "--tokens", "8", *QUICK]


@pytest.mark.sweep
def test_demo(capsys):
    assert main_of("demo")(DEMO) == 0
    out = capsys.readouterr().out
    assert "1/1 GDN layers fused" in out
    assert "ms per token" in out


def test_demo_fails_when_tokens_differ(monkeypatch, capsys):
    demo = importlib.import_module("demo")
    honest = demo.decode
    calls = []

    def last_one_wrong(*args):
        tokens, seconds = honest(*args)
        calls.append(tokens)
        return (tokens if len(calls) < 6 else [t + 1 for t in tokens]), seconds

    monkeypatch.setattr(demo, "decode", last_one_wrong)
    assert demo.main(DEMO) == 1
    assert "gdnfuse differ from eager's" in capsys.readouterr().err
