"""Every example runs, with settings that keep it quick."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.parametrize("name", ["chunk", "gemm", "mixer", "packing"])
def test_benchmarks_of_kernels_need_a_device(name, monkeypatch, capsys):
    main = main_of(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([])
    assert "a CUDA device is needed" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["gemm --roles", "gemm --models", "mixer --sides", "mixer --batches"])
def test_benchmarks_of_kernels_name_a_bad_argument(command, capsys):
    name, option = command.split()
    with pytest.raises(SystemExit):
        main_of(name)([option, "jax"])
    assert "jax" in capsys.readouterr().err


def test_gemm_benchmark_sweeps_configs_that_the_kernel_takes():
    gemm = importlib.import_module("gemm")
    for of in gemm.LINEARS:
        configs = list(gemm.configs(of))
        assert configs[0] == gemm.skinny_linear.config(of.role, of.columns)
        assert len(configs) == len({*configs}) > 10, of
        assert all(n == 1 << n.bit_length() - 1 for config in configs for n in config[:3]), of
        assert any(per_sm for *_, per_sm in configs) and not all(per_sm for *_, per_sm in configs), of
        if of.role == "gate":
            assert all(of.columns % block == 0 and block % gemm.HEAD == 0 for _, block, *_ in configs)


@pytest.mark.parametrize("role", ["conv", "norm", "gate", "swiglu", "plain"])
def test_gemm_benchmark_reports_no_speed_of_a_wrong_config(role, monkeypatch):
    gemm = importlib.import_module("gemm")
    of = gemm.Linear(role, "nobody", 48, 256, 16)

    def kernel(config, x, each):
        """The reference, of which the first config has another output, and the second does not write the conv state."""
        y, *states = gemm.exact(x, each)
        if states and config != configs[1]:
            each["conv"][0].copy_(states[0])
        return (1.1 * y if config == configs[0] else y).to(torch.float32 if role == "conv" else torch.bfloat16)

    configs = [(8, 256, 4, 4), (4, 256, 4, 0), (2, 256, 2, 0)]
    for name, stub in {
        "DEVICE": "cpu", "COLD_BYTES": 1e5, "run_with": kernel, "configs": lambda of: iter(configs),
        "microseconds": lambda function, x, sets: float(len([function(x, each) for each in sets])),
    }.items():  # fmt: skip
        monkeypatch.setattr(gemm, name, stub)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**30))
    torch.manual_seed(0)
    result = gemm.run(of)
    wrong = 2 if role == "conv" else 1
    assert result["wrong"] == [gemm.label(c) for c in configs[:wrong]]
    assert result["configs_us"] == {gemm.label(c): float(result["copies"]) for c in configs[wrong:]} and result["copies"] > 1
    assert f"{result['copies']:.2f}" in gemm.table([result])


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_mixer_benchmark_reports_no_speed_of_a_wrong_side(factor, monkeypatch):
    mixer = importlib.import_module("mixer")
    op = SimpleNamespace(op=lambda *args: factor * mixer.mixer_decode.reference(*args))
    for name, stub in {
        "DEVICE": "cpu", "COLD_BYTES": 1.0, "implementations": lambda: {"mixer_decode": op},
        "microseconds": lambda call, sets: [float(len(sets))],
    }.items():  # fmt: skip
        monkeypatch.setattr(mixer, name, stub)
    result = mixer.run_batch(1, ["mixer_decode"])
    (row,) = result["sides"]
    assert ("us" in row) == (factor == 1.0) and (row["error"] > 0.05) == (factor != 1.0)
    assert ("refused: wrong" in mixer.table([result])) == (factor != 1.0)
