"""The command line, run in this process; and what importing the package costs, in fresh ones."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gdnfuse
from gdnfuse import cli, files, models, versions
from gdnfuse.cli import main
from gdnfuse.dialect import OPS
from gdnfuse.generation import shards
from gdnfuse.models import presets
from gdnfuse.passes import fuse, last_rows, lift
from gdnfuse.progress import progress
from tests.pages import REPORT, check_reference, documented
from tests.terminal import Terminal


@pytest.fixture
def config_file(tmp_path):
    config = {
        "model_type": "qwen3_5_text", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "linear_num_key_heads": 1,
        "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def two_layers(config_file):
    """The same with one layer of each kind."""
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | layers))
    return config_file


def test_report_prints_summary_layers_and_rules(config_file, capsys):
    assert main(["report", str(config_file), "--target", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "(decode): 3/3 GDN layers fused" in out
    assert re.search(r"^0–2 +linear attention +✓", out, re.MULTILINE) and re.search(r"^0–3 +MLP +✓", out, re.MULTILINE)
    assert "Estimated limit of the step: " in out
    assert "mixer_decode" in out


@pytest.mark.skipif(bool(versions.older("transformers", shards.TRACEABLE)), reason="tensor parallel is not traced")
def test_report_of_one_of_several_ranks(two_layers, capsys):
    """Each layer has an all-reduce behind its mixer or attention and one behind its MLP, of a row of 64 in bfloat16."""
    config = json.loads(two_layers.read_text()) | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    two_layers.write_text(json.dumps(config))
    assert main(["report", str(two_layers), "--tensor-parallel", "2"]) == 0
    out = capsys.readouterr().out
    assert "(decode): 1/1 GDN layers fused" in out and "Between ranks: 4 all_reduce, 512 B in all." in out
    assert main(["report", str(two_layers), "--tensor-parallel", "3"]) == 2
    assert "Key heads must be split evenly over ranks, found 2 in" in capsys.readouterr().err
    assert not torch.distributed.is_initialized()


def test_report_of_a_folder_is_that_of_its_config(two_layers, capsys):
    assert main(["report", str(two_layers.parent), "--json", "--target", "cpu", "--dtype", "float32", "--batch", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["graphs"][0]["fused_layers"] == 1


def test_json_is_all_of_stdout(config_file, capsys):
    assert main(["report", str(config_file), "--json", "--bandwidth", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    (graph,) = found["graphs"]
    assert (found["schema"], found["bandwidth"], found["about"]["batch"]) == ("gdnfuse.report/2", 2e12, 1)
    assert list(found["about"]) == documented(REPORT)["document.about"]
    assert graph["limit_seconds"] == graph["limit_bytes"] / 2e12 > 0
    assert graph["phase"] == "decode"
    assert [layer["path"] for layer in graph["layers"]] == [f"model.layers.{i}.linear_attn" for i in range(3)]
    assert all(layer["fused"] for layer in graph["layers"])


OPS_AFTER = {
    "normalize": set(),
    "lift": {"delta_rule", "gating", "packed_linear"},
    "fuse": {"in_proj_conv", "packed_decode", "fused_linear"},
}


@pytest.mark.parametrize("stage", OPS_AFTER)
def test_stop_after_prints_the_graph(two_layers, capsys, stage):
    assert main(["report", str(two_layers), "--stop-after", stage]) == 0
    graph = capsys.readouterr().out.split("graph():")[1]
    found = {name for name in OPS if f"gdnfuse.{name}" in graph}
    assert found >= OPS_AFTER[stage]
    assert ("delta_rule" in found) == (stage in ("normalize", "lift"))  # captured, so there before anything is lifted


def test_prefill_says_why_layers_are_left(two_layers, capsys):
    assert main(["report", str(two_layers), "--phase", "prefill", "--prompt", "8", "--json"]) == 0
    (graph,) = json.loads(capsys.readouterr().out)["graphs"]
    assert graph["phase"] == "prefill" and graph["limit_seconds"] is None
    assert all(layer["fused"] or layer["why_not"] for layer in graph["layers"])


def bad_inputs(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "unknown.json").write_text('{"model_type": "no_such_type"}')
    (tmp_path / "wrong.json").write_text('{"model_type": "qwen3_5_text", "hidden_size": "wide"}')
    (tmp_path / "encoder.json").write_text('{"model_type": "vit"}')
    (tmp_path / "empty").mkdir()
    return {
        "nothing-like-it": "presets",
        str(tmp_path / "absent.json"): "No such model",
        str(tmp_path / "broken.json"): "not JSON",
        str(tmp_path / "list.json"): "model_type",
        str(tmp_path / "unknown.json"): "no_such_type",
        str(tmp_path / "wrong.json"): "hidden_size",
        str(tmp_path / "encoder.json"): "causal language model",
        str(tmp_path / "empty"): "no config.json",
    }


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    for model, expected in bad_inputs(tmp_path).items():
        assert main(["report", model]) == 2, model
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1, captured.err
        assert expected in captured.err
        assert "Traceback" not in captured.err


def test_version_names_what_it_builds_on(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    found = re.fullmatch(r"gdnfuse (\S+) torch \S+ transformers \S+ triton \S+\n", capsys.readouterr().out)
    assert found and found[1] == gdnfuse.__version__ == importlib.metadata.version("gdnfuse")


def test_debug_shows_the_traceback(capsys):
    assert main(["report", "nothing-like-it", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["report", "4b", "--batch", "0"],
        ["report", "4b", "--phase", "sideways"],
        ["report"],
        [],
        ["report", "4b", "--bandwidth", "0"],
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as e:
        main(argv)
    assert e.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_preset_names():
    assert presets() == [f"qwen3.5-{size}" for size in ("0.8b", "27b", "2b", "35b-a3b", "4b", "9b")]


def unwritable(tmp_path):
    (tmp_path / "file").write_text("a file")
    return {tmp_path: "folder", tmp_path / "absent" / "page.html": "no folder", tmp_path / "file" / "page.html": "no folder"}


def test_a_page_that_cannot_be_written_is_said_before_any_work(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gdnfuse.models.load_config", lambda name: pytest.fail("work was done"))
    for file, expected in unwritable(tmp_path).items():
        assert main(["report", str(config_file), "--html", str(file)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"gdnfuse: Cannot write {file}: ") and expected in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "file"]


def test_a_page_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "page.html"
    file.write_text("old")

    def full(self, text, **options):
        self.write_bytes(b"ne")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(gdnfuse.GdnfuseError, match="No space left on device"), files.replacing(file) as partial:
        partial.write_text("new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_what_is_there_stays_until_it_is_replaced_and_links_stay_links(tmp_path):
    old, link = tmp_path / "old.png", tmp_path / "link.png"
    old.touch()
    link.symlink_to(old)
    files.check_writable(link)
    assert old.exists() and not old.read_bytes()
    with files.replacing(link) as partial:
        partial.write_text("new")
    assert link.is_symlink() and old.read_text() == "new" and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(gdnfuse.GdnfuseError, match="not a regular file"):
        files.check_writable(Path("/dev/null"))


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_output_that_cannot_be_written_is_one_line(two_layers, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["report", str(two_layers)]) == 2
    assert capsys.readouterr().err == "gdnfuse: Cannot write the output: No space left on device.\n"


def test_a_terminal_gets_colours_unless_it_wants_none(two_layers, monkeypatch):
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(sys, "stdout", terminal := Terminal("ascii"))
        assert main(["report", str(two_layers)]) == 0
        monkeypatch.undo()
        out = terminal.shown()
        assert ("\x1b[" in out) != bool(no_color)
        assert "1/1 GDN layers fused" in out and "+ done, x refused" in out


@pytest.mark.parametrize("off", [False, True])
def test_progress_shows_each_step_of_what_takes_long(off, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TQDM_DISABLE", "1" if off else "")
    with progress() as announce:
        announce("short")
        announce("long")
        time.sleep(1.3)
    assert ("long (00:01)" in terminal.shown()) != off and "short" not in terminal.shown()


def test_progress_shows_nothing_without_a_terminal(capsys):
    with progress() as announce:
        announce("long")
        time.sleep(1.2)
    assert capsys.readouterr().err == ""


def fresh_process(code: str) -> None:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr


def test_importing_the_package_imports_neither_triton_nor_transformers():
    fresh_process("import sys, gdnfuse; assert not {'triton', 'transformers'} & set(sys.modules), sorted(sys.modules)")


def test_verify_compares_a_prompt_and_a_step(config_file, capsys):
    assert main(["verify", str(config_file), "--batch", "2", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "(prefill): 3/3 GDN layers fused" in out and "(decode): 3/3 GDN layers fused" in out
    assert re.search(r"recurrent_states_\S+ +3 +\d\.\de[+-]\d\d +\d\.\de[+-]\d\d +yes", out)


def test_a_model_that_is_quantised(two_layers, capsys):
    assert list(models.QUANTIZED) == list(cli.FORMATS)
    assert main(["verify", str(two_layers), "--device", "cpu", "--quantize", "fp8", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["about"]["quantize"] == "fp8"
    for graph in data["graphs"]:
        assert graph["fused_layers"] == 1 and any(r["rule"] == "dequantize" for r in graph["records"])
    assert main(["report", str(two_layers), "--quantize", "fp8-tensor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (graph,) = report["graphs"]
    assert report["about"]["quantize"] == "fp8-tensor" and graph["fused_layers"] == 1
    plain = sum(p.nbytes for p in models.meta_model(models.load_config(str(two_layers))).parameters())
    assert graph["limit_bytes"] < plain, "of the weights as they are stored"


def test_verify_as_json_has_every_comparison(two_layers, capsys):
    assert main(["verify", str(two_layers), "--device", "cpu", "--dtype", "float32", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == cli.VERIFICATION and data["verified"] is True and data["machine"]["torch"] == torch.__version__
    about = {"model": str(two_layers), "batch": 1, "prompt": 70, "dtype": "float32", "quantize": None, "device": "cpu"}
    assert data["about"] == about
    check_reference(data, "verification", absent=["fla"])
    graphs = data["graphs"]
    assert [g["phase"] for g in graphs] == ["prefill", "decode"]
    assert all(c["passed"] and c["error"] < 1e-5 for g in graphs for c in g["comparisons"])


def test_verify_fails_where_a_graph_does(two_layers, capsys, monkeypatch):
    op = OPS["packed_decode"]
    # Not another size: the norm behind the rule would take that away.
    wrong = dataclasses.replace(op, reference=lambda *args, **kwargs: op.reference(*args, **kwargs).roll(1, -1))
    monkeypatch.setitem(OPS, "packed_decode", wrong)
    assert main(["verify", str(two_layers), "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "(decode): not rewritten. Not verified: " in out and re.search(r"mixer_linears at \w+", out)
    assert re.search(r" no\b", out)


@pytest.mark.parametrize("device", ["quantum", "cuda:99", "meta0"])
def test_verify_on_no_such_device_is_one_line(config_file, capsys, device):
    assert main(["verify", str(config_file), "--device", device]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"gdnfuse: Cannot use the device {device!r}: ")


def test_rules_lists_every_rule_once(capsys):
    assert main(["rules", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["rule"] for row in rows] == [*(rule.name for rule in (*lift.RULES, *fuse.RULES)), last_rows.NAME]
    assert all(row["equation"] and row["stage"] in ("lift", "fuse") for row in rows)
    assert main(["rules"]) == 0
    out = capsys.readouterr().out
    assert all(rule.equation in out for rule in (*lift.RULES, *fuse.RULES))
