"""gdnfuse bench, from the command to its figures, on a model so small that a process takes longer to start than to measure."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import StaticCache

from gdnfuse.bench import measure, run, speculation, workers
from gdnfuse.cli import main
from gdnfuse.errors import GdnfuseError
from tests.generation.test_shards import traceable
from tests.models import zoo
from tests.pages import check_reference
from tests.terminal import Terminal

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with weights."""
    path = tmp_path_factory.mktemp("model")
    zoo.causal_lm(**zoo.SMALL).save_pretrained(path)
    return path


@pytest.fixture
def here(monkeypatch, capsys):
    """Workers in this process: starting one takes as long as all that a test has it do."""

    def spawn(program, side, model, argv, shared, *_):
        assert program == ["-m", "gdnfuse.bench"]
        try:
            run.worker([*argv, "--worker", side, model, shared])
        except SystemExit as e:
            return {"side": side, "failed": str(e), "step": "", "stderr": capsys.readouterr().err}
        return json.loads(capsys.readouterr().out.strip().rsplit("\n", 1)[-1])

    monkeypatch.setitem(sys.modules, "fla", None)  # as a worker sets it, and restored
    monkeypatch.setitem(measure.COPIED, "cpu", 2**20)
    monkeypatch.setattr(workers, "spawn", spawn)


QUICK = ["--inner", "eager", "--dtype", "float32", "--device", "cpu", "--new", "16"]


@pytest.mark.sweep
def test_a_quantised_model_is_compared_with_its_dequantised_weights(folder, here, capsys):
    command = ["bench", str(folder / "config.json"), *QUICK, "--quantize", "fp8", "--prompt", "20", "--json"]
    assert main(command) == 0
    data = json.loads(capsys.readouterr().out)
    (result,) = data["results"]
    (row,) = result["sides"]
    assert row["side"] == "gdnfuse" and data["arguments"]["quantize"] == "fp8", "transformers' kernels are not for a CPU"
    for phase in ("decode", "prefill"):
        assert row[phase]["error"] < 1e-5 and row[phase]["ms"] > 0
    assert "fp8 and float32" in run.tables(data)
    assert main(["bench", str(folder / "config.json"), *QUICK, "--prompt", "20", "--sides", "gdnfuse", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)["results"][0]
    assert result["weight_bytes"] < 0.6 * plain["weight_bytes"]


def test_figures(folder, here, capsys):
    command = ["bench", str(folder / "config.json"), *QUICK, "--sides", "eager,gdnfuse", "--prompt", "20", "--batch", "1,2"]
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == "gdnfuse.bench/2" and data["machine"]["torch"] == torch.__version__
    assert [r["batch"] for r in data["results"]] == [1, 2]
    for result in data["results"]:
        moved = result["weight_bytes"] + result["state_bytes"]
        assert result["limit_ms"] == pytest.approx(1e3 * moved / result["bytes_per_second"])
        assert result["weights"] == "random" and [row["side"] for row in result["sides"]] == ["eager", "gdnfuse"]
        for row in result["sides"]:
            assert row["decode"]["tokens_per_second"] == pytest.approx(1e3 * result["batch"] / row["decode"]["ms"])
            assert row["prefill"]["tokens_per_second"] == pytest.approx(20e3 * result["batch"] / row["prefill"]["ms"])
            for phase in ("decode", "prefill"):
                fused = [f"({phase}): 1/1 GDN layers fused" in line for line in row[phase]["graphs"]]
                assert fused == ([True] if row["side"] == "gdnfuse" else [])
                assert row[phase]["error"] < 1e-5 and row[phase]["first_call_seconds"] > 0
    print(run.tables(data))
    out = capsys.readouterr().out
    assert out.startswith(f"{folder / 'config.json'}, 2 layers, random weights, float32, CPU, ")
    assert "ms per step" in out and "of the limit" in out and "Prefill, 20 tokens" in out and "wrong" not in out
    assert re.search(r"^batch 2, graph \d+ \(decode\): 1/1 GDN layers fused, ", out, re.MULTILINE)


@pytest.mark.sweep
def test_speculation_at_forced_acceptances(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speculation, "GENERATIONS", 1)
    torch.compiler.reset()
    zoo.causal_lm(**zoo.SMALL).config.save_pretrained(tmp_path)
    model = str(tmp_path / "config.json")
    how = speculation.Settings(model, ["lookup:3"], (0.0, 0.5, 1.0), 2, 20, 16, "float32", "cpu", "eager")
    monkeypatch.setattr(speculation, "Settings", lambda *args, **given: how)
    command = ["bench", model, *QUICK, "--prompt", "20", "--batch", "2", "--speculate", "lookup:3"]
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    (result,) = data["results"]
    assert data["schema"] == "gdnfuse.bench.speculation/1"
    assert min(result[name] for name in ("step_ms", "verify_ms", "replay_ms", "replay_limit_ms")) > 0
    assert result["plain"]["tokens_per_step"] == 1 and result["plain"]["steps_with_drafts"] == 0
    _, none, half, all_ = result["drafts"]
    assert none["tokens_per_step"] == 1 and none["accepted"] == 0 and none["steps_with_drafts"] > 0.9
    assert 1 < half["tokens_per_step"] < all_["tokens_per_step"] == 15 / 4  # of four steps the last has but three tokens to give
    assert all(row["speedup"] == row["tokens_per_second"] / result["plain"]["tokens_per_second"] for row in result["drafts"])
    assert any("(verify): 1/1 GDN layers fused" in line for line in result["graphs"])
    assert "tokens per second" in speculation.tables(data) and "its own" in speculation.tables(data)


def test_sides_on_ranks_that_cannot_be_are_a_sentence(folder, capsys):
    for wrong, sentence in (
        (["--sides", "gdnfuse:heads"], "A side must be one of eager, fla, inductor, gdnfuse, found 'gdnfuse:heads'."),
        (["--tensor-parallel", "2", "--sides", "gdnfuse:rows"], "A side must be one of eager, fla, "),
        (
            ["--tensor-parallel", "2", "--quantize", "fp8"],
            "measures steps and prompts of plain weights, found --quantize with it.",
        ),
        (["--tensor-parallel", "2", "--speculate", "lookup:3"], "must be used without it, found --tensor-parallel: "),
    ):
        assert main(["bench", str(folder / "config.json"), *QUICK, *wrong]) == 2
        assert sentence in capsys.readouterr().err


@traceable
@pytest.mark.sweep
def test_sides_on_ranks_are_started_by_the_command(tmp_path, capsys):
    """One process, two ranks that are right, and two of which one cannot cut the model: its sentence is the side's."""
    zoo.causal_lm(**zoo.SMALL, linear_num_key_heads=3, linear_num_value_heads=3).config.save_pretrained(tmp_path)
    command = ["bench", str(tmp_path / "config.json"), *QUICK, "--prompt", "20", "--phase", "decode", "--tensor-parallel", "2"]
    assert main([*command, "--sides", "gdnfuse,gdnfuse:as_loaded,gdnfuse:heads", "--json"]) == 1
    out, err = capsys.readouterr()
    data = json.loads(out)
    one, ours, refused = data["results"][0]["sides"]
    assert one["decode"]["accurate"] and ours["decode"]["accurate"] and ours["ranks"] == 2
    assert "Key heads must be split evenly over ranks, found 3" in refused["failed"] and refused["failed"] in err
    assert "each of 2 ranks holds" in run.tables(data)


def test_speculation_of_no_kind_is_a_sentence(folder, capsys):
    for wrong, sentence in (
        (["--speculate", "lookup"], "Drafts are lookup:N, mtp:N or draft:N:MODEL, found 'lookup'."),
        (["--speculate", "lookup:9"], "lookup drafts 1 to 7 tokens at a time, found 9."),
        (["--speculate", "lookup:3,mtp:5"], "mtp drafts 1 to 4 tokens at a time, found 5."),
        (["--speculate", "lookup:3", "--sides", "eager"], "--speculate must be used without it, found --sides: "),
    ):
        assert main(["bench", str(folder / "config.json"), *QUICK, *wrong]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.sweep
def test_the_first_token_behind_a_known_prefix(folder, here, capsys):
    command = ["bench", str(folder), *QUICK, "--sides", "eager,gdnfuse", "--batch", "2", "--prefix", "128"]
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    (result,) = data["results"]
    eager, ours = (row["prefix"] for row in result["sides"])
    assert eager["accurate"] and ours["accurate"] and ours["tokens_taken"] == 128 and ours["unknown_ms"] > 0
    # Two rows: each has its prefix once, and of each prompt the states behind 128 tokens and all 192.
    assert ours["blocks"] == 2 * (2 + 7) and ours["states"] == 2 * (1 + 7)
    assert ours["store_bytes"] == ours["blocks"] * ours["block_bytes"] + ours["states"] * ours["state_bytes"]
    assert "First token of generate, 128 tokens of a known prefix and 64 others\n" in run.tables(data)
    assert main(["bench", str(folder), *QUICK, "--prefix", "100"]) == 2
    assert "The known prefix must be a multiple of 64 tokens, found 100." in capsys.readouterr().err


def doubled(side, phase, model, settings):
    def call(*args, **kwargs):
        output = model(*args, **kwargs)
        output.logits = 2 * output.logits if side == "gdnfuse" else output.logits
        return output

    return call


def test_no_speed_of_what_is_wrong(folder, here, monkeypatch, capsys):
    monkeypatch.setattr(run, "compiled", doubled)
    assert main(["bench", str(folder), *QUICK, "--sides", "eager,gdnfuse", "--prompt", "9"]) == 1
    out, err = capsys.readouterr()
    assert ", the folder's weights, " in out
    rows = [line.split() for line in out.splitlines() if " gdnfuse " in line]
    assert len(rows) == 2 and all(row[2] == "wrong" and row[-3] == "1.0e+00" for row in rows)  # of 2·x, the error is 1
    lines = [line for line in err.splitlines() if line.startswith("No speed of gdnfuse, batch 1, ")]
    assert len(lines) == 2 and all("its logits must be float32's" in line for line in lines)
    assert "No speed of eager" not in err


def test_a_phase_that_fails_has_no_speed(folder, here, monkeypatch, capsys):
    def broken(side, phase, model, settings):
        if side == "gdnfuse" and phase == "decode":
            raise ValueError("not compiled\nand more")
        return model

    monkeypatch.setattr(run, "compiled", broken)
    assert main(["bench", str(folder), *QUICK, "--sides", "eager,gdnfuse", "--prompt", "9"]) == 1
    out, err = capsys.readouterr()
    decode, prefill = [line.split() for line in out.splitlines() if " gdnfuse " in line]
    assert decode[2] == "failed" and float(prefill[2]) > 0
    assert err.splitlines()[-1] == "No speed of gdnfuse, batch 1, decode: ValueError: not compiled and more"


def test_the_docs_list_exactly_the_fields_of_the_json(folder, here, monkeypatch):
    """Those of flash-linear-attention, of a side that fails and of a phase that does among them."""
    monkeypatch.setattr(run, "show_fla", lambda side: side == "inductor" and sys.exit("no compiler"))
    monkeypatch.setattr(run, "fla_version", lambda: "0")
    monkeypatch.setattr(run, "compiled", lambda side, phase, model, _: 1 // 0 if (side, phase) == ("fla", "prefill") else model)
    data = run.run(run.Settings(str(folder), ["eager", "fla", "inductor"], dtype="float32", prompt=4, new=16))
    data = json.loads(json.dumps(data))
    for row in data["results"][0]["sides"]:
        if "decode" in row:  # one table has both, and says what is not of prompts
            assert "steps" in row["decode"] and "steps" not in row["prefill"]
            row["decode"] = row["prefill"] = row["decode"] | row["prefill"]
    check_reference(data, "bench")


def test_a_model_that_does_not_run_is_one_line(folder, here, monkeypatch, capsys):
    monkeypatch.setattr(run, "build", lambda settings: 1 // 0)
    assert main(["bench", str(folder), *QUICK, "--sides", "eager,gdnfuse"]) == 2
    assert capsys.readouterr().err.startswith("gdnfuse: The model could not be run: ZeroDivisionError: ")


def test_a_process_of_its_own_is_a_worker(monkeypatch):
    called = []
    monkeypatch.setattr(run, "worker", called.append)
    monkeypatch.setattr(sys, "argv", ["gdnfuse.bench", "--worker", "eager"])
    runpy.run_module("gdnfuse.bench", run_name="__main__")
    assert called == [["--worker", "eager"]]


@pytest.mark.sweep
def test_processes_of_its_own(folder, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["bench", str(folder), *QUICK, "--sides", "gdnfuse", "--phase", "decode", "--prompt", "4"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if " gdnfuse " in line]
    assert float(row.split()[2]) > 0


WORKER = """
import json, os, sys, tempfile, time
side, folder = sys.argv[-3], sys.argv[-1]
print(side, file=sys.stderr, flush=True)
if side != "reference":
    open(os.path.join(folder, "step"), "w").write("decode, first call")
open(os.path.join(tempfile.gettempdir(), "compiled"), "w").close()
if side == "slow":
    open(os.path.join(folder, "so_far"), "w").write(json.dumps({"side": side, "error": 0.5}))
if side == "killed":
    os.kill(os.getpid(), 9)
time.sleep({"eager": 2, "slow": 60}.get(side, 0))
if side != "silent":
    print(json.dumps({"side": side, "machine": {}}))
"""


@pytest.fixture
def program(tmp_path):
    """A worker that does nothing but what its side is called."""
    file = tmp_path / "worker.py"
    file.write_text(WORKER)
    return [str(file)]


@pytest.mark.parametrize("off", [False, True])
def test_a_terminal_shows_what_runs_unless_it_is_told_not_to(off, program, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TQDM_DISABLE", "1" if off else "")
    workers.run_sides(program, "tiny", ["eager"], [], title="tiny, batch 1")
    line = "tiny, batch 1, eager (2 of 2): decode, first call (00:01)"
    assert line in terminal.shown() if not off else terminal.shown() == ""
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    workers.run_sides(program, "tiny", ["eager"], [], title="tiny, batch 1")
    lines = ["", *(f"tiny, batch 1, {side}" for side in ("reference (1 of 2)", "eager (2 of 2)")), line.removesuffix(" (00:01)")]
    assert set(log.getvalue().split("\n")) == set(lines) if not off else log.getvalue() == ""


def test_a_side_that_crashes_or_takes_too_long_costs_its_own_row_alone(program, tmp_path, monkeypatch, capsys):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", tempfile.tempdir)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    found = []

    def note(first, rows):
        found.append([dict(row) for row in rows])

    _, rows = workers.run_sides(program, "tiny", ["slow", "killed", "silent", "eager"], [], timeout=4, found=note)
    # What a side has found before it fails stays, and is known while it runs.
    assert [len(f) for f in found] == [1, 1, 2, 3, 4] and found[0] == [{"side": "slow", "error": 0.5}] and found[-1] == rows
    assert rows == [
        {"side": "slow", "error": 0.5, "failed": "It was ended after 4 seconds, at 'decode, first call'."},
        {"side": "killed", "failed": "The process ended with signal 9 (Killed)."},
        {"side": "silent", "failed": "The process ended without an answer."},
        {"side": "eager", "machine": {}},
    ]
    assert capsys.readouterr().err.split() == ["slow", "killed", "silent"]  # what those who failed printed
    assert not list((tmp_path / "temporary").iterdir())


def test_what_a_side_fails_in_does_not_cost_it_the_rest(program):
    def again(step):
        return ("decode", ["others"]) if step.startswith("decode") else None

    _, rows = workers.run_sides(program, "tiny", ["killed", "eager"], [], quiet=True, again=again)
    failed = "The process ended with signal 9 (Killed)."
    assert rows == [{"side": "killed", "failed": failed, "decode": {"failed": failed}}, {"side": "eager", "machine": {}}]


def test_the_other_phase_of_a_side_that_crashes(folder, here, monkeypatch, capsys):
    """Each attempt is a process; here it is a call that ends as one does."""
    real, attempts = workers.spawn, []

    def spawn(program, side, model, argv, folder, *more):
        phases = json.loads(argv[0])["phases"]
        if side == "eager":
            attempts.append(phases)
            if "prefill" in phases:
                return {"side": side, "failed": "It was ended after 1 seconds.", "step": "prefill, first call"}
        return real(program, side, model, argv, folder, *more)

    monkeypatch.setattr(workers, "spawn", spawn)
    assert main(["bench", str(folder), *QUICK, "--sides", "eager", "--prompt", "4"]) == 1
    out, err = capsys.readouterr()
    assert attempts == [["decode", "prefill"], ["decode"]]
    decode, prefill = [line.split() for line in out.splitlines() if " eager " in line]
    assert float(decode[2]) > 0 and prefill[2] == "failed"
    assert err.splitlines()[-1] == "No speed of eager, batch 1, prefill: It was ended after 1 seconds."


@pytest.mark.parametrize("when", ["reference", "eager", "later"])
def test_an_interrupted_run_keeps_what_it_measured(when, folder, monkeypatch, capsys):
    """In the reference there is nothing yet; then in the second side; then in the reference of the second batch."""
    figures = {"accurate": True, "ms": 2.0, "tokens_per_second": 500.0, "first_call_seconds": 1.0, "error": 0.0, "graphs": []}

    def spawn(program, side, model, argv, *more):
        batch = json.loads(argv[0])["this_batch"]
        if side == when or when == "later" and batch == 2:
            raise KeyboardInterrupt
        facts = {"machine": {"cpu_threads": 2}, "facts": {"layers": 3, "weights": "random", "eager_error": {"prefill": 0.0}}}
        return facts if side == "reference" else {"side": side, "prefill": {**figures, "peak_bytes": None}}

    monkeypatch.setattr(workers, "spawn", spawn)
    command = ["bench", str(folder), *QUICK, "--phase", "prefill", "--sides", "inductor,eager", "--batch", "1,2"]
    if when == "reference":
        assert main(command) == 130
        return
    assert main(command) == (1 if when == "eager" else 0)
    out, err = capsys.readouterr()
    rows = [line.split()[:3] for line in out.splitlines() if line.startswith("1 ")]
    assert rows == [["1", "inductor", "2"], ["1", "eager", "failed" if when == "eager" else "2"]]
    assert ("No speed of eager, batch 1: It was interrupted." in err) == (when == "eager")


def test_a_worker_that_is_interrupted_does_not_go_on(program, tmp_path):
    def interrupt(step):
        if step:
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        workers.spawn(program, "slow", "tiny", [], str(tmp_path), interrupt)
    assert time.monotonic() - start < 30


def test_only_the_first_layers(folder):
    settings = run.Settings(str(folder / "config.json"), ["eager"], layers=1, dtype="float32")
    model = run.build(settings)
    assert len(model.get_decoder().layers) == 1 and not run.has_weights(settings.model)
    with pytest.raises(GdnfuseError, match="must be at most that, found 4"):
        run.check(run.Settings(str(folder), ["eager"], layers=4))


def test_weights_of_a_folder(folder, tmp_path):
    model = run.build(run.Settings(str(folder), [], dtype="float32"))
    expected = zoo.causal_lm(**zoo.SMALL).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(GdnfuseError, match=r"must hold all weights of the model, found no model\.norm\.weight"):
        run.build(run.Settings(str(tmp_path), [], dtype="float32"))


def test_bandwidth_is_that_of_a_copy(monkeypatch):
    monkeypatch.setitem(measure.COPIED, "cpu", 1000)
    monkeypatch.setitem(measure.COPIES, "cpu", 3)
    times = iter([99.0, *[2.0] * 9, 50.0])  # what is done once is not counted, nor what is seldom
    monkeypatch.setattr(measure, "seconds", lambda call, device: (call(), next(times))[1])
    assert measure.bandwidth("cpu") == 3 * 2 * 1000 / 2.0


def test_state_bytes_are_those_of_a_step():
    model = zoo.causal_lm()
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(torch.ones(2, 4, dtype=torch.long), **zoo.held(cache))
    recurrent, conv = 2 * 4 * 16 * 16 * 4, 2 * (2 * 2 * 16 + 4 * 16) * 4 * 4
    keys = 2 * 2 * 8 * 16 * 4  # of 8 tokens
    assert measure.state_bytes(cache, 8) == 2 * zoo.GDN_LAYERS * (recurrent + conv) + 2 * keys


def test_plot(here, folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    target = tmp_path / "figure.png"
    assert main(["bench", str(folder), *QUICK, "--sides", "eager", "--prompt", "4", "--plot", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("launches", "passes", "untimed"), [(1, 1, 1), (3, 1, 2), (4, 2, 1), (7, 3, 1)])
def test_calls_of_a_graph_go_through_all_sets_in_turn(launches, passes, untimed, keep, monkeypatch):
    """And are timed by replays behind some that are not, whose results are there all along where they are kept."""
    events, alive = [], []

    class Result:
        def __init__(self, each):
            events.append(each)
            alive.append(weakref.ref(self))

    def event(enable_timing):
        return SimpleNamespace(
            record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: float(events.count("replay"))
        )

    def replay():
        events.append("replay")
        assert sum(ref() is not None for ref in alive) == (3 * passes if keep else 0)

    for name, stub in {
        "synchronize": lambda: events.append("waited"),
        "CUDAGraph": lambda: SimpleNamespace(replay=replay),
        "graph": lambda graph, capture_error_mode: contextlib.nullcontext(),
        "Event": event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    times = measure.replayed(Result, "abc", launches, replays=2, keep=keep, untimed=untimed)
    assert events == [*"abc", "waited", *"abc" * passes, *(untimed + 2) * ["replay"]]
    assert times == [1e3 * (untimed + n) / (3 * passes) for n in (1, 2)]
