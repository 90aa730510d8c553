"""Every example runs, with settings that keep it quick."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import Qwen3_5TextConfig

import gdnfuse
from tests.models import zoo

ROOT = Path(__file__).parent.parent
QUICK = ["--inner", "eager"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    small = importlib.import_module("small_model")  # with one layer of each kind
    monkeypatch.setitem(small.small_model.__kwdefaults__, "layers", 2)
    monkeypatch.setattr(small, "Qwen3_5TextConfig", partial(Qwen3_5TextConfig, full_attention_interval=2))
    torch.compiler.reset()
    gdnfuse.clear_reports()


def main_of(name: str):
    return importlib.import_module(name).main


def test_each_example_is_tested():
    here = Path(__file__).read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert f'main_of("{path.stem}")' in here or path.stem == "small_model", path


def test_generate_and_static_loop_agree():
    looped = main_of("static_loop")(["--tokens", "6", *QUICK])
    generated = main_of("generate")(["--tokens", "6", *QUICK])
    assert torch.equal(generated[:, -6:], looped)


def test_read_report(capsys):
    (report,) = main_of("read_report")([])
    assert report.fused_layers == 1
    assert "model.layers.0.linear_attn" in capsys.readouterr().out


def test_lora():
    tokens = main_of("lora")(["--tokens", "6", *QUICK])
    assert torch.equal(tokens["active"], tokens["merged"]) and torch.equal(tokens["active"], tokens["unmerged"])
    assert not torch.equal(tokens["active"], tokens["off"])


def test_prefixes():
    # The first question shows nothing new, the second where questions part from the document: the third begins there.
    assert main_of("prefixes")(["--document", "440", *QUICK]) == [0, 0, 384]


def test_padded_batch(capsys):
    together, alone = main_of("padded_batch")(["--tokens", "6", *QUICK])
    assert [row.tolist() for row in together] == [single.tolist() for single in alone]
    assert "1/1 GDN layers fused" in capsys.readouterr().out


def test_speculate(capsys):
    tokens, plain = main_of("speculate")(["--tokens", "24", *QUICK])
    assert torch.equal(tokens, plain) and "drafts accepted" in capsys.readouterr().out


def test_report_from_config(capsys):
    (report,) = main_of("report_from_config")(["--batch", "2"])
    assert report.fused_layers == 18 and capsys.readouterr().out.count(": fused") == 18


@pytest.mark.parametrize(("batch", "ops"), [(1, ["in_proj_conv", "packed_decode", "fused_linear"]), (2, zoo.MANY_ROWS)])
def test_handwritten(batch, ops, capsys):
    report = main_of("handwritten")(["--batch", str(batch)])
    assert report.phase == "decode" and report.fused_layers == 1
    assert zoo.ops_without_views(report.layers[0]) == ops
    assert "outputs and both states are eager's after 16 tokens" in capsys.readouterr().out


DEMO = ["--layers", "2", "--hidden", "64", "--tokens", "8", *QUICK]


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
