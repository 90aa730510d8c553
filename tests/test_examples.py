"""Every example runs, with settings that keep it quick."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

import gdnfuse

ROOT = Path(__file__).parent.parent
QUICK = ["--inner", "eager"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
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
    assert report.fused_layers == 3
    assert "model.layers.0.linear_attn" in capsys.readouterr().out


DEMO = ["--layers", "4", "--hidden", "64", "--tokens", "8", *QUICK]


def test_demo(capsys):
    assert main_of("demo")(DEMO) == 0
    out = capsys.readouterr().out
    assert "3/3 GDN layers fused" in out
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


BENCHMARK = ["--models", "tiny", "--dtype", "float32", "--prompt", "4", "--warmup", "1", "--steps", "16", "--device", "cpu"]


def test_decode_benchmark_of_eager(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main_of("decode")([*BENCHMARK, "--sides", "eager", "--json", str(file)]) == 0
    (result,) = json.loads(file.read_text())["results"]
    assert result["sides"][0]["ms"] > 0
    assert "ms per step" in capsys.readouterr().out


def test_decode_benchmark_refuses_a_wrong_side(monkeypatch, capsys):
    decode = importlib.import_module("decode")
    monkeypatch.setattr(decode, "compiled", lambda side, model, mode: lambda *a, **k: _doubled(model(*a, **k)))
    assert decode.main([*BENCHMARK, "--sides", "eager"]) == 1
    assert "No speed reported" in capsys.readouterr().err


def _doubled(output):
    output.logits = 2 * output.logits
    return output


def test_weight_bytes_counts_what_a_step_reads():
    decode = importlib.import_module("decode")
    model = decode.build("tiny", torch.float32, "cpu")
    assert model.config.tie_word_embeddings
    assert decode.weight_bytes(model) == sum(4 * p.numel() for p in model.parameters())


def test_unknown_side_is_refused(capsys):
    with pytest.raises(SystemExit):
        main_of("decode")(["--sides", "eager,jax"])
    assert "jax" in capsys.readouterr().err
