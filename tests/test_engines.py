"""benchmarks/engines.py with an engine that answers at a rate of its own, and without one."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import types

import pytest

from tests.pages import ROOT

pytestmark = pytest.mark.sweep  # as in test_benchmarks
STEP, TOKEN = 2e-3, 1e-5  # seconds of a step, and of a token of a prompt


@pytest.fixture
def engines(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("engines")


@pytest.fixture
def vllm(monkeypatch, engines):
    """A module that stands for vLLM; its clock is the benchmark's."""
    fake, now = types.ModuleType("vllm"), [0.0]
    fake.made, fake.short_by = [], 0

    class LLM:
        def __init__(self, model, **arguments):
            with open(f"{model}/config.json") as file:
                fake.made.append((json.load(file), arguments))

        def generate(self, prompts, sampling, use_tqdm):
            now[0] += len(prompts[0]["prompt_token_ids"]) * TOKEN + sampling.max_tokens * STEP
            tokens = [0] * (sampling.max_tokens - fake.short_by)
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tokens)]) for _ in prompts]

    fake.LLM, fake.SamplingParams = LLM, lambda **given: types.SimpleNamespace(**given)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(engines.time, "perf_counter", lambda: now[0])
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == "vllm" else version(name))
    return fake


def test_steps_and_first_tokens(engines, vllm, tmp_path, capsys):
    file = tmp_path / "vllm.json"
    how = ["--models", "0.8b", "--batches", "1,3", "--lengths", "100", "--repeats", "1"]
    assert engines.main([*how, "--engine-args", '{"max_num_seqs": 7}', "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    (result,) = data["results"]
    assert [(row["batch"], round(row["ms"], 6)) for row in result["decode"]] == [(1, 2.0), (3, 2.0)]
    assert [(row["tokens"], round(row["ms"], 6)) for row in result["prompt"]] == [(100, 3.0)]
    ((config, arguments),) = vllm.made
    assert config["architectures"] == ["Qwen3_5ForCausalLM"] and arguments["load_format"] == "dummy"
    assert arguments["max_num_seqs"] == 7 and arguments == result["engine_arguments"]
    assert data["machine"]["vllm"] == "0.0.1" and data["settings"] == engines.WHAT and data["engine"] == "vllm"
    out = capsys.readouterr().out
    assert "a step at batch 3" in out and "2.00" in out and "a first token of 100" in out
    figures = importlib.import_module("figures")
    text = figures.rendered("engines", ["vllm.json"], tmp_path, ROOT / "README.md")
    assert "| vLLM | Qwen3.5-0.8B | a step of 3 sequences | 2.00 |" in text and "vLLM 0.0.1" in text


def test_answers_of_another_length_give_no_time(engines, vllm, capsys):
    vllm.short_by = 1
    assert engines.main(["--models", "0.8b", "--batches", "1", "--lengths", "", "--repeats", "1"]) == 1
    assert "1 answers of 64 tokens are required for a time, found [63]." in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [["--batches", "0"], ["--lengths", "x"], ["--repeats", "0"], ["--batches", "", "--lengths", ""], ["--engine-args", "[]"]],
)
def test_wrong_arguments_are_refused(wrong, engines, vllm, capsys):
    with pytest.raises(SystemExit):
        engines.main(wrong)
    assert "error: " in capsys.readouterr().err and not vllm.made


def test_without_vllm_it_is_one_sentence(engines, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert engines.main([]) == 1
    assert capsys.readouterr().err == "engines.py needs vLLM, which is not installed here. Install it: pip install vllm\n"
