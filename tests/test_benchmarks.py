"""Every benchmark runs, with settings that keep it quick, and reports no speed of what is wrong.

They are no part of the product, so `make trust` runs these tests and `make test` does not.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gdnfuse
from gdnfuse import formats
from gdnfuse.bench import measure
from gdnfuse.dialect import OPS
from gdnfuse.errors import GdnfuseError
from gdnfuse.kernels import linear_configs
from tests.models import zoo
from tests.test_examples import main_of

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.sweep


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    torch.compiler.reset()
    gdnfuse.clear_reports()


BENCHMARK = ["--models", "tiny", "--dtype", "float32", "--prompt", "4", "--warmup", "1", "--steps", "16", "--device", "cpu"]
PREFILL = ["--models", "tiny", "--dtype", "float32", "--lengths", "70", "--device", "cpu"]


@pytest.fixture
def workers(monkeypatch, capsys):
    """The workers of benchmarks, in this process: starting one takes as long as all that a test has it do."""
    workers = importlib.import_module("gdnfuse.bench.workers")

    def spawn(program, side, model, argv, folder, *_):
        try:
            main_of(Path(program[0]).stem)([*argv, "--worker", side, model, folder])
        except SystemExit as e:
            return {"side": side, "failed": str(e)}
        return json.loads(capsys.readouterr().out.strip().rsplit("\n", 1)[-1])

    monkeypatch.setitem(sys.modules, "fla", None)  # as a worker sets it, and restored
    monkeypatch.setitem(measure.COPIED, "cpu", 2**20)
    monkeypatch.setattr(workers, "spawn", spawn)
    return workers


def quickly_compiled(side, model, mode):
    return model if side in ("eager", "fla") else torch.compile(model, backend=side, options={"inner": "eager"}, fullgraph=True)


def test_decode_benchmark(workers, tmp_path, monkeypatch, capsys):
    decode, file = importlib.import_module("decode"), tmp_path / "figures.json"
    monkeypatch.setattr(decode, "compiled", quickly_compiled)
    lora = ["--lora", "4:2:float32"]
    assert decode.main([*BENCHMARK, *lora, "--batch", "2", "--sides", "eager,gdnfuse", "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    (result,) = data["results"]
    assert sum(isinstance(m, decode.LoRALinear) for m in decode.build("tiny", torch.float32, "cpu", lora=(4, 2)).modules()) == 31
    wide = decode.build("tiny", torch.bfloat16, "cpu", lora=(4, 1, "float32")).model.layers[0].mlp.up_proj
    given = torch.randn(1, wide.base_layer.in_features).bfloat16()
    assert wide.lora_A[0].weight.dtype == torch.float32 and wide(given).dtype == torch.bfloat16
    assert [decode.rank_and_adapters(given) for given in ("8", "8:3", "8:3:float16")] == [(8, 1), (8, 3), (8, 3, "float16")]
    for wrong in ("0", "8:0", "8:1:float8", "8:1:float32:1", "a"):
        with pytest.raises(ValueError):
            decode.rank_and_adapters(wrong)
    assert data["machine"]["torch"] == torch.__version__ and "worker" not in data["arguments"]
    assert [row["side"] for row in result["sides"]] == ["eager", "gdnfuse"]
    assert "3/3 GDN layers fused" in result["sides"][1]["summary"]
    for row in result["sides"]:
        assert row["tokens_per_second"] == pytest.approx(2 * 1e3 / row["ms"])
    weights, states, rate = (result[name] for name in ("weight_bytes", "state_bytes", "bytes_per_second"))
    assert result["limit_ms"] == pytest.approx(1e3 * weights / rate)
    assert result["limit_with_states_ms"] == pytest.approx(1e3 * (weights + states) / rate)
    recurrent = 2 * 3 * 2 * 4 * 32 * 32 * 4  # both ways, layers, sequences, heads, sizes of a head, bytes
    assert recurrent < states < 2 * recurrent
    out = capsys.readouterr().out
    assert "ms per step" in out and "tokens/s" in out and f"{rate / 1e9:.0f} GB/s, a copy's rate here" in out
    assert "second process" not in out


def test_quantized_benchmark(workers, tmp_path, monkeypatch, capsys):
    quantized, decode, file = importlib.import_module("quantized"), importlib.import_module("decode"), tmp_path / "figures.json"
    for module in (quantized, decode):
        monkeypatch.setattr(module, "compiled", quickly_compiled)
    monkeypatch.setattr(quantized, "SHORT", (5, 7))
    monkeypatch.setattr(quantized, "PROMPTS", 1)
    monkeypatch.setattr(quantized, "SIDES", ("eager", "gdnfuse"))  # Inductor takes minutes here
    how = ["--formats", "bf16,fp8,int8", "--prompts", "70", "--json", str(file), "--sides", "eager,gdnfuse"]
    assert quantized.main([*BENCHMARK, *how]) == 0
    results = json.loads(file.read_text())["results"]
    assert [(r["format"], [row["side"] for row in r["sides"]]) for r in results] == [
        (format, ["eager", "gdnfuse"]) for format in ("bf16", "fp8", "int8")
    ]
    for r in results:
        assert all(row["ms"] > 0 and row["prompt_ms"]["70"] > 0 for row in r["sides"])
        assert "3/3 GDN layers fused" in r["sides"][1]["summary"]
    plain, *others = (r["weight_bytes"] for r in results)
    assert all(bytes < 0.6 * plain for bytes in others)
    out = capsys.readouterr().out
    assert "70 tokens (ms)" in out and "ms per step" in out
    assert quantized.sides_of("fp8", ("inductor", "gdnfuse")) == ["gdnfuse"]
    assert quantized.sides_of("int4", ("inductor", "gdnfuse")) == ["inductor", "gdnfuse"]


def test_prefix_benchmark(workers, tmp_path, monkeypatch, capsys):
    prefix, file = importlib.import_module("prefix"), tmp_path / "prefix.json"
    monkeypatch.setattr(prefix, "REPEATS", 2)
    tiny = ["--models", "tiny", "--dtype", "float32", "--device", "cpu", "--inner", "eager"]
    how = ["--prefix", "128", "--turn", "70", "--turns", "3", "--sides", "eager,gdnfuse,prefixes", "--json", str(file)]
    assert prefix.main([*tiny, *how]) == 0
    (result,) = json.loads(file.read_text())["results"]
    ours = result["sides"][2]
    assert [row["side"] for row in result["sides"]] == ["eager", "gdnfuse", "prefixes"]
    assert all(len(row["chat_ms"]) == 3 and row["first_token"]["static"]["ms"] > 0 for row in result["sides"])
    assert {first["tokens_taken"] for first in ours["first_token"].values()} == {128}
    kept = ours["store"]
    for name in ("state_bytes", "block_bytes", "bytes"):
        assert kept[name] == kept[f"{name}_of_shapes"]
    assert "turn 3 (ms)" in capsys.readouterr().out
    plots = importlib.import_module("plot")
    plots.plot("prefix", file, tmp_path / "prefix.png")
    assert (tmp_path / "prefix.png").stat().st_size > 0


def test_speculation_benchmark(tmp_path, monkeypatch, capsys):
    benchmark, bench = (importlib.import_module(name) for name in ("speculation", "gdnfuse.bench.speculation"))
    monkeypatch.setattr(bench, "GENERATIONS", 1)
    zoo.causal_lm(**zoo.SMALL).config.save_pretrained(tmp_path)
    model, file = str(tmp_path / "config.json"), tmp_path / "speculation.json"
    how = ["--acceptances", "0.5", "--prompt", "12", "--new", "10", "--dtype", "float32", "--device", "cpu", "--inner", "eager"]
    assert benchmark.main(["--models", model, "--speculate", f"draft:2:{model},mtp:2", *how, "--json", str(file)]) == 0
    ((result, head),) = (data["results"] for data in json.loads(file.read_text())["results"])
    assert [row["tokens_per_step"] for row in head["drafts"]][1] > 1 and head["speculate"] == "mtp:2"
    # One model drafts for the other, and both are of one seed.
    assert result["drafts"][0]["accepted"] == 1 and result["drafts"][1]["accepted"] < 1
    assert "draft:2" in capsys.readouterr().out


def test_decode_benchmark_starts_a_second_process_that_finds_the_caches(workers, tmp_path, monkeypatch, capsys):
    decode, file, found = importlib.import_module("decode"), tmp_path / "figures.json", []

    def compiled(side, model, mode):
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        found.append((side, folder.name, [p.name for p in folder.iterdir()] if folder.exists() else []))
        folder.mkdir(exist_ok=True)
        (folder / "code").touch()
        return quickly_compiled(side, model, mode)

    monkeypatch.setattr(decode, "compiled", compiled)
    assert decode.main([*BENCHMARK, "--sides", "eager,gdnfuse", "--second", "--json", str(file)]) == 0
    eager, ours = json.loads(file.read_text())["results"][0]["sides"]
    assert "second_first_call_seconds" not in eager and ours["second_first_call_seconds"] > 0 and ours["ms"]
    assert found[1:] == [("gdnfuse", "caches_gdnfuse", []), ("gdnfuse", "caches_gdnfuse", ["code"])]
    assert found[0][0] == "eager" and found[0][2] == [] and "second process (s)" in capsys.readouterr().out


def test_decode_benchmark_starts_no_second_process_on_caches_of_one_that_failed(workers, tmp_path, monkeypatch, capsys):
    decode, file = importlib.import_module("decode"), tmp_path / "figures.json"

    def compiled(side, model, mode):
        sys.exit("It ran out of memory.")

    monkeypatch.setattr(decode, "compiled", compiled)
    assert decode.main([*BENCHMARK, "--sides", "gdnfuse", "--second", "--json", str(file)]) == 1
    (row,) = json.loads(file.read_text())["results"][0]["sides"]
    assert row == {"side": "gdnfuse", "failed": "It ran out of memory.", "second_failed": "The first process left no caches."}
    assert "No second process reported of tiny, gdnfuse: The first process left no caches." in capsys.readouterr().err


def test_decode_benchmark_ends_a_side_that_takes_too_long(monkeypatch, tmp_path, capsys):
    decode, workers = importlib.import_module("decode"), importlib.import_module("gdnfuse.bench.workers")
    given = []

    def spawn(program, side, model, argv, folder, say, timeout):
        given.append((side, timeout))
        return {"side": side, "failed": "no"}

    monkeypatch.setattr(workers, "spawn", spawn)
    assert decode.main([*BENCHMARK, "--sides", "eager", "--timeout", "7"]) == 1
    assert given == [("reference", 7.0)]


@pytest.mark.parametrize(("mode", "graphs"), [("reduce-overhead", True), ("default", False)])
def test_decode_benchmark_takes_the_best_of_inductor(mode, graphs, monkeypatch):
    decode, given = importlib.import_module("decode"), []
    monkeypatch.setattr(torch, "compile", lambda model, **how: given.append(how))
    decode.compiled("max-autotune", torch.nn.Identity(), mode)
    options = {"max_autotune": True, "coordinate_descent_tuning": True, "triton.cudagraphs": graphs}
    assert given == [{"options": options, "fullgraph": True}]


def test_prefill_benchmark_of_quantised_weights_and_activations(workers, tmp_path, monkeypatch, capsys):
    """One process for all sides, so a side's graphs are those after the last cleared."""
    prefill, file = importlib.import_module("prefill"), tmp_path / "figures.json"

    def quickly(side, model, activations):
        torch.compiler.reset()
        options = {"inner": "eager", **({"activations": activations} if activations else {})}
        return model if side == "eager" else torch.compile(model, backend="gdnfuse", options=options, fullgraph=True)

    monkeypatch.setattr(prefill, "compiled", quickly)
    monkeypatch.setattr(prefill, "PROMPTS", 1)
    monkeypatch.setattr(prefill, "SHORT", (70,))
    how = ["--dtype", "bfloat16", "--sides", "eager,gdnfuse", "--json", str(file)]
    errors = {}
    for given in (["--quantize", "fp8"], ["--quantize", "fp8", "--activations", "fp8"]):
        assert prefill.main([*PREFILL, *how, *given]) == 0
        (result,) = json.loads(file.read_text())["results"]
        eager, ours = result["sides"]
        assert result["quantize"] == "fp8" and ours["ms"]["70"] > 0 and eager["error"] == eager["eager_error"] > 0
        in_e4m3 = {what: count for what, count in ours["linears"].items() if "e4m3" in what}
        # Four of down and three of out have 128 columns; all others have 64.
        assert in_e4m3 == ({"reference inlined (activations in e4m3)": 7} if len(given) == 4 else {})
        errors[len(given)] = eager["error"], ours.get("off_unquantised")
    assert errors[4][0] > 1.2 * errors[2][0] and errors[4][1] > errors[2][0] and errors[2][1] is None
    assert "tiny, quantize fp8, activations fp8" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        prefill.main([*PREFILL, "--quantize", "int8", "--activations", "fp8"])
    assert "--activations needs --quantize fp8 or fp8-tensor, found int8" in capsys.readouterr().err


def test_prefill_benchmark_of_padded_batches_on_a_static_cache(workers, tmp_path, monkeypatch, capsys):
    prefill, file = importlib.import_module("prefill"), tmp_path / "figures.json"

    def quickly(side, model, activations):
        torch.compiler.reset()
        return model if side == "eager" else torch.compile(model, backend="gdnfuse", options={"inner": "eager"}, fullgraph=True)

    monkeypatch.setattr(prefill, "compiled", quickly)
    monkeypatch.setattr(prefill, "PROMPTS", 1)
    monkeypatch.setattr(prefill, "SHORT", (70,))
    monkeypatch.setattr(prefill.prompt_attention, "KERNEL", False)
    given = ["--batch", "2", "--cache", "static", "--padded", "--sides", "eager,gdnfuse,kernel", "--json", str(file)]
    assert prefill.main([*PREFILL, *given]) == 0
    (result,) = json.loads(file.read_text())["results"]
    assert (result["cache"], result["padded"]) == ("static", True)
    assert [side["attention"] for side in result["sides"]] == [{}, {}, {"prompt_attention (reference inlined)": 1}]
    assert "tiny, static cache, padded" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        prefill.main([*PREFILL, "--padded"])
    assert "--padded needs a --batch of at least 2, found 1" in capsys.readouterr().err


def test_decode_benchmark_refuses_a_wrong_side(workers, monkeypatch, capsys):
    decode = importlib.import_module("decode")
    monkeypatch.setattr(decode, "compiled", lambda side, model, mode: lambda *a, **k: _doubled(model(*a, **k)))
    assert decode.main([*BENCHMARK, "--sides", "eager"]) == 1
    assert "No speed reported" in capsys.readouterr().err


def _doubled(output):
    output.logits = 2 * output.logits
    return output


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_benchmarks_of_models_say_that_fla_is_missing(name, workers, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main_of(name)([*(BENCHMARK if name == "decode" else PREFILL), "--sides", "eager,fla", "--json", str(file)]) == 1
    eager, fla = json.loads(file.read_text())["results"][0]["sides"]
    assert eager["ms"] and fla == {"side": "fla", "failed": "flash-linear-attention is not installed."}
    assert "flash-linear-attention is not installed." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_benchmarks_of_models_report_that_the_reference_failed(name, workers, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(workers, "spawn", lambda program, side, *_: {"side": side, "failed": f"{side} ran out of memory."})
    file = tmp_path / "figures.json"
    assert main_of(name)(["--models", "tiny", "--sides", "eager,gdnfuse", "--json", str(file)]) == 1
    (result,) = json.loads(file.read_text())["results"]
    assert result["sides"] == [{"side": side, "failed": "reference ran out of memory."} for side in ("eager", "gdnfuse")]
    assert "reference ran out of memory." in capsys.readouterr().out


SCRIPT = """
import sys
from gdnfuse.bench.workers import answer, show_fla

def work():
    side, model, folder = sys.argv[-3:]
    show_fla(side)
    if side == "broken":
        raise ValueError("not so\\nand more")
    print("something else")
    return {"side": side, "argv": sys.argv[1:-4], "model": model, "fla": "fla" in sys.modules}

answer(work)
"""


def test_worker_answers_from_a_process_of_its_own(tmp_path, monkeypatch):
    workers, script = importlib.import_module("gdnfuse.bench.workers"), tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = lambda side: workers.spawn([str(script)], side, "tiny", ["--batch", "2"], str(tmp_path))  # noqa: E731
    assert run("eager") == {"side": "eager", "argv": ["--batch", "2"], "model": "tiny", "fla": True}
    broken = run("broken")
    assert "Traceback" in broken.pop("stderr")
    assert broken == {"side": "broken", "step": "", "failed": "ValueError: not so and more"}


def test_tokens_benchmark_times_both_sides_of_equal_tokens_only(tmp_path, monkeypatch):
    generate, file = importlib.import_module("tokens"), tmp_path / "tokens.json"
    how = ["--models", "tiny", "--dtype", "float32", "--device", "cpu", "--new", "3,5", "--repeats", "1"]
    assert generate.main([*how, "--json", str(file)]) == 0
    (result,) = json.loads(file.read_text())["results"]
    assert [row["side"] for row in result["sides"]] == ["late", "waited"] and all("ms" in row for row in result["sides"])
    right, sides = generate.answer, iter(range(9))
    monkeypatch.setattr(generate, "answer", lambda *args: right(*args) + next(sides))
    with pytest.raises(GdnfuseError, match="same tokens"):
        generate.main(how)


def test_decode_benchmark_widens_one_layer_after_another():
    decode = importlib.import_module("decode")
    model, wide = (decode.build("tiny", torch.bfloat16, "cpu") for _ in range(2))
    args, tokens = SimpleNamespace(prompt=4), torch.randint(0, 512, (4 + decode.CHECKED, 2, 1))
    with torch.no_grad():
        decode.widen(model)
        assert torch.equal(decode.logits(model, args, tokens), decode.logits(wide.float(), args, tokens))
    assert {p.dtype for p in model.get_decoder().layers.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_tokens_of_each_step_are_aligned(batch):
    decode, tokens = importlib.import_module("decode"), torch.arange(5 * batch).view(5, batch, 1)
    found = decode.aligned(tokens)
    assert torch.equal(found, tokens) and all(step.data_ptr() % 16 == 0 and step.is_contiguous() for step in found)


def test_weight_bytes_counts_what_a_step_reads():
    decode = importlib.import_module("decode")
    model = decode.build("tiny", torch.float32, "cpu")
    assert model.config.tie_word_embeddings
    assert decode.weight_bytes(model) == sum(4 * p.numel() for p in model.parameters())


def test_weight_bytes_counts_the_experts_that_a_step_chooses():
    decode = importlib.import_module("decode")
    model = zoo.moe(num_experts=4, num_experts_per_tok=1)
    experts = sum(4 * p.numel() for name, p in model.named_parameters() if ".experts." in name)
    rest = sum(4 * p.numel() for name, p in model.named_parameters() if ".experts." not in name and "embed" not in name)
    assert decode.weight_bytes(model) == rest + experts // 4
    assert decode.weight_bytes(model, batch=2) == rest + experts * 7 // 16


ALONE = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import together
together.SETTLED = 0.0
rate = together.rate(time.time)
together.turn()
start = time.time()
time.sleep(0.3)
json.dump([rate, start, time.time()], open(sys.argv[3], "w"))
"""


def test_benchmarks_that_run_together_are_timed_one_after_the_other(tmp_path, capfd):
    together = importlib.import_module("together")
    script, broken = tmp_path / "one.py", tmp_path / "broken.py"
    script.write_text(ALONE)
    broken.write_text("raise SystemExit(3)")  # the others do not wait for it
    files = [tmp_path / f"{i}.json" for i in range(3)]
    lines = [f"{one} {ROOT / 'benchmarks'} --json {file}" for one, file in zip((script, script, broken), files, strict=True)]
    assert together.main(lines) == 3 and together.quiet()
    (rate, start, end), (same, later, last) = sorted((json.loads(f.read_text()) for f in files[:2]), key=lambda one: one[1])
    assert rate == same and rate < start < end <= later < last
    assert together.main([str(script)]) == 2 and "--json FILE" in capfd.readouterr().err


@torch.no_grad()
def test_routing_that_is_held_is_not_changed_by_roundings():
    routing = importlib.import_module("routing")
    torch.manual_seed(0)
    model = zoo.moe(hidden_size=128, num_experts=64, num_experts_per_tok=4, vocab_size=256)
    routers = [m for m in model.modules() if hasattr(m, "top_k")]
    own = [m.weight.clone() for m in routers]
    ids = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(3))

    def choices(model):
        found = []
        hooks = [
            m.register_forward_hook(lambda _, args, out: found.append(out[-1].sort(-1)[0]))
            for m in model.modules()
            if hasattr(m, "top_k")
        ]
        model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return torch.stack(found)

    assert not torch.equal(choices(model), choices(copy.deepcopy(model).bfloat16()))  # why it is held
    routing.hold(model)
    exact = choices(model)
    assert torch.equal(exact, choices(copy.deepcopy(model).bfloat16()))
    assert len(exact.unique()) == 64  # tokens differ in what they choose
    routing.put_back(model)
    assert all(torch.equal(m.weight, w) for m, w in zip(routers, own, strict=True))


def test_unknown_side_is_refused(capsys):
    with pytest.raises(SystemExit):
        main_of("decode")(["--sides", "eager,jax"])
    assert "jax" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["chunk", "gemm", "mixer", "packing", "prompt"])
def test_benchmarks_of_kernels_need_a_device(name, monkeypatch, capsys):
    main = main_of(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([])
    assert "a CUDA device is needed" in capsys.readouterr().err


COMMANDS = [
    "chunk --checkpoints 100",
    "gemm --roles jax",
    "gemm --models jax",
    "gemm --rows jax",
    "gemm --rows 33",
    "decode --batch 0",
    "prefill --sides jax",
    "fp8 --shapes jax",
    "fp8 --formats jax",
    "fp8 --rows jax",
]
COMMANDS += ["experts --sides jax", "experts --rows 0", "experts --rows many"]
COMMANDS += [
    "mixer --sides jax",
    "mixer --batches jax",
    "mixer --state float16",
    "decode --steps 3",
    "prefix --prefix 100",
    "prefix --sides jax",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_benchmarks_name_a_bad_argument(command, capsys):
    name, option, given = command.split()
    with pytest.raises(SystemExit):
        main_of(name)([option, given])
    err = capsys.readouterr().err
    assert option in err.splitlines()[-1] or given in err.splitlines()[-1]


def test_gemm_benchmark_sweeps_configs_that_the_kernel_takes():
    gemm = importlib.import_module("gemm")
    for of in gemm.LINEARS:
        configs = list(gemm.configs(of))
        assert configs[0] == gemm.skinny_linear.config(of.role, of.columns)
        assert list(gemm.configs(of, sweep=False)) == configs[:1]
        assert len(configs) == len({*configs}) > 10, of
        assert all(n == 1 << n.bit_length() - 1 for config in configs for n in config[:3]), of
        assert any(per_sm for *_, per_sm in configs) and not all(per_sm for *_, per_sm in configs), of
        if of.role == "gate":
            assert all(of.columns % block == 0 and block % gemm.HEAD == 0 for _, block, *_ in configs)


@pytest.mark.parametrize("rows", [2, 16, 32])
def test_gemm_benchmark_sweeps_configs_of_several_rows(rows):
    gemm = importlib.import_module("gemm")
    for of in (linear.of_rows(rows) for linear in gemm.LINEARS):
        configs = list(gemm.configs(of))
        parts = 1 if of.role == "swiglu" else linear_configs.split(of.rows, of.columns, rows)
        assert configs[0] == gemm.chosen(of) and configs[0].parts == parts
        assert len(configs) == len({*configs}) > 10 and {c.early for c in configs} == {False, True}, of
        assert of.role in ("swiglu", "plain") and all(c.parts == 1 for c in configs if of.role == "swiglu")
        for c in configs:
            assert of.columns % (c.BK * c.parts) == 0
            assert (c.BM + max(8, rows)) * c.BK * 2 * c.stages <= 150 * 1024


@pytest.mark.parametrize("format", ["fp8_block128", "int8_channel", "int4_group32", "int4_group128"])
def test_gemm_benchmark_has_quantised_weights_as_they_are_stored(format, monkeypatch):
    gemm, bench = importlib.import_module("gemm"), importlib.import_module("gdnfuse.bench.configs")
    monkeypatch.setattr(bench, "on_a_ring", lambda: format == "fp8_block128")
    for of in (dataclasses.replace(linear, format=format) for linear in gemm.LINEARS if "head" not in linear.whose):
        quantised = torch.empty(of.rows - of.plain, of.columns, dtype=torch.bfloat16, device="meta")
        data, scale = formats.named(format).quantize(quantised)
        one = bench.one_of(of)
        assert (one.shape, one.dtype, of.scales) == (data.shape, data.dtype, tuple(scale.shape))
        assert of.size == data.nbytes + of.scale_dtype.itemsize * scale.numel() + 2 * of.plain * of.columns
        for rows in (1, 9):
            configs = list(gemm.configs(of.of_rows(rows)))
            few = 0 if format == "int4_group32" and rows > 1 else 5  # whose steps have but one size
            assert configs[0] == gemm.chosen(of.of_rows(rows)) and len(configs) == len({*configs}) > few, (of, rows)
            steps = [c.BK for c in configs if isinstance(c, gemm.FewRowsConfig)]
            assert all(step <= 32 for step in steps) or format != "int4_group32"


@pytest.mark.parametrize("rows", [2, 32])
def test_gemm_benchmark_sweeps_rings_where_there_are_some(rows, monkeypatch):
    gemm, bench = importlib.import_module("gemm"), importlib.import_module("gdnfuse.bench.configs")
    monkeypatch.setattr(bench, "on_a_ring", lambda: True)
    for of in (linear.of_rows(rows) for linear in gemm.LINEARS):
        configs = list(gemm.configs(of))
        assert configs[0] == gemm.chosen(of) and isinstance(configs[0], gemm.RingConfig) == ("head" not in of.whose), of
        found = [c for c in configs if isinstance(c, gemm.RingConfig)]
        assert len(configs) == len({*configs}) and (len(found) > 2 or "head" in of.whose), of
        assert any(isinstance(c, gemm.FewRowsConfig) for c in configs), of
        for tiles, live, stages, parts in found:
            steps, rest = divmod(of.columns, linear_configs.STEP * parts)
            assert rest == 0 and stages <= steps + 1 and live <= (32 if of.role == "swiglu" else 64)
            assert 2 * linear_configs.STEP * stages * (64 * tiles + max(8, rows)) <= 220 * 1024


@pytest.mark.parametrize("role", ["swiglu", "plain"])
def test_gemm_benchmark_adds_up_the_parts_of_several_rows(role, monkeypatch):
    gemm = importlib.import_module("gemm")
    of = gemm.Linear(role, "nobody", 48, 256).of_rows(3)
    configs = [gemm.FewRowsConfig(32, 64, 4, 2, parts, False) for parts in (1, 2, 4)]

    def kernel(config, x, weight, swiglu=False, overlap=False):
        """The reference, of which the last config loses a part."""
        parts = config.parts - (config == configs[-1])
        (y,) = gemm.exact(x, {"weight": weight, "swiglu": swiglu})
        return torch.stack([y / config.parts] * parts).float() if config.parts > 1 else y.bfloat16()

    monkeypatch.setattr(gemm.few_rows_linear, "launch_with", kernel)
    _stub_sweep(gemm, monkeypatch, configs)
    result = gemm.run(of, 2e12)
    assert result["limit_us"] == pytest.approx(2 * 48 * 256 / 2e6)
    assert result["rows"] == 3 and result["wrong"] == ["32×64×4×2×4×0"]
    assert list(result["configs_us"]) == ["32×64×4×2×1×0", "32×64×4×2×2×0"] and "nobody" in gemm.table([result], 2e12)


def _stub_sweep(gemm, monkeypatch, configs):
    """Let it run on the CPU, a figure being the number of calls."""
    for name, stub in {
        "DEVICE": "cpu", "COLD_BYTES": 1e5, "configs": lambda of, sweep: iter(configs),
        "microseconds": lambda function, x, sets: float(len([function(x, each) for each in sets])),
    }.items():  # fmt: skip
        monkeypatch.setattr(gemm, name, stub)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**30))
    torch.manual_seed(0)


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
    monkeypatch.setattr(gemm, "run_with", kernel)
    _stub_sweep(gemm, monkeypatch, configs)
    result = gemm.run(of, 2e12)
    wrong = 2 if role == "conv" else 1
    assert result["wrong"] == [gemm.label(c) for c in configs[:wrong]]
    assert result["configs_us"] == {gemm.label(c): float(result["copies"]) for c in configs[wrong:]} and result["copies"] > 1
    table = gemm.table([result], 2e12)
    assert f"{result['copies']:.2f}" in table and "2000 GB/s, a copy's rate here" in table


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_mixer_benchmark_reports_no_speed_of_a_wrong_side(factor, state, monkeypatch):
    mixer = importlib.import_module("mixer")
    op = SimpleNamespace(op=lambda *args: factor * mixer.mixer_decode.reference(*args))
    _stub_mixer(mixer, monkeypatch, {"mixer_decode": op})
    result = mixer.run_batch(1, ["mixer_decode"], 2e12, mixer.STATES[state])
    (row,) = result["sides"]
    assert ("us" in row) == (factor == 1.0) and (row["error"] > 0.05) == (factor != 1.0)
    assert ("refused: wrong" in mixer.table([result], 2e12)) == (factor != 1.0)
    assert result["mark_us"] == (4 if state == "float32" else None)
    assert result["limit_us"] == pytest.approx(2 * 32 * 128 * 128 * (4 if state == "float32" else 2) / 2e6)


def _stub_mixer(mixer, monkeypatch, implementations):
    for name, stub in {
        "DEVICE": "cpu", "COLD_BYTES": 1.0, "implementations": lambda: implementations,
        "microseconds": lambda call, sets: [float(len([call(each) for each in sets]))],
    }.items():  # fmt: skip
        monkeypatch.setattr(mixer, name, stub)


@pytest.mark.parametrize("overlap", [False, True])
def test_mixer_benchmark_of_the_rule_with_and_without_its_norm(overlap, monkeypatch):
    mixer, delta_rule = importlib.import_module("mixer"), pytest.importorskip("gdnfuse.kernels.delta_rule")
    given = []

    def rule(*args, **options):
        given.append(options)
        return mixer.packed_decode.reference(*args)

    def gated(qkv, z, a, b, A_log, dt_bias, state, norm_weight, scale, l2norm_eps, norm_eps, **options):
        o = rule(qkv, a, b, A_log, dt_bias, state, scale, l2norm_eps, **options)
        return mixer.gated_rms_norm.reference(o, z.unflatten(-1, o.shape[-2:]), norm_weight, norm_eps).flatten(-2)

    monkeypatch.setattr(delta_rule, "launch_gated", gated)
    _stub_mixer(mixer, monkeypatch, {"packed_decode": SimpleNamespace(launch=rule)})
    result = mixer.run_batch(2, ["packed_decode", "packed_decode_gated"], 2e12, torch.bfloat16, overlap)
    assert all("us" in row for row in result["sides"])
    assert given and all(options == ({"overlap": True} if overlap else {}) for options in given)


def test_mixer_benchmark_sweeps_what_the_kernel_then_reads(monkeypatch):
    """Of two configs the first gives a wrong result: only the other has a figure."""
    mixer, delta_rule = importlib.import_module("mixer"), pytest.importorskip("gdnfuse.kernels.delta_rule")
    monkeypatch.setattr(mixer, "SWEEP", {"packed_decode": ("delta_rule", "RULE_CONFIGS")})
    monkeypatch.setitem(importlib.import_module("gdnfuse.bench.configs").RULES, "delta_rule", [(16, 1), (64, 2)])

    def rule(*args, overlap):
        config = delta_rule._config_of_rule(1, args[5])
        return mixer.packed_decode.reference(*args) * (1.0 if config == (64, 2) else 1.1)

    _stub_mixer(mixer, monkeypatch, {"packed_decode": SimpleNamespace(launch=rule)})  # an op repeats its first config
    assert list(mixer.sweep_batch(1)["packed_decode"]["configs_us"]) == ["64×2"]


@pytest.fixture
def experts_benchmark(monkeypatch):
    """The benchmark of experts on a CPU, with a block of a few, and the dialect's ops in the kernels' place."""
    experts = importlib.import_module("experts")
    kernels, made = experts.implementations(), {}

    def operation(name):
        call = lambda *args, overlap, name=name: made.get(name, 1.0) * OPS[name].overload(*args)  # noqa: E731
        if name == "route":
            call = lambda *args, overlap: OPS["route"].overload(*args)  # noqa: E731
        return SimpleNamespace(op=call, launch=call, supports=kernels[name].supports)

    stubs = {name: operation(name) for name in ("route", "experts", "routed_experts")}
    for name, stub in {
        "DEVICE": "cpu", "implementations": lambda: stubs, "compile_all": lambda *_: None,
        "replayed": lambda call, sets, **_: [float(len([call(each) for each in sets]))],
    }.items():  # fmt: skip
        monkeypatch.setattr(experts, name, stub)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    config = experts.load_config(experts.MODEL)
    config.update({"hidden_size": 64, "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32})
    config.shared_expert_intermediate_size = 32
    with torch.no_grad():
        yield experts, [experts.block(config, seed) for seed in range(2)], made


def test_experts_benchmark_reports_no_speed_of_a_wrong_side(experts_benchmark):
    experts, blocks, made = experts_benchmark
    made["experts"] = 1.1
    results = [experts.run(blocks, N, ["gdnfuse", "grouped_mm"], 4e12, 6e14) for N in (1, 3, 80)]
    assert ["us" in r["sides"]["gdnfuse"] for r in results] == [True, False, False]
    assert all("us" in r["sides"]["grouped_mm"] for r in results)
    assert 2 <= results[1]["experts"] <= 6 and results[0]["experts"] == 2
    once = 2 * (16 * 64 + 3 * 32 * 64 + 64)
    assert results[0]["bytes_us"] == pytest.approx(1e6 * (once + 2 * 2 * 3 * 32 * 64) / 4e12)
    assert experts.table(results, 4e12).count("refused: wrong") == 2


def test_experts_benchmark_sweeps_each_launch_with_the_best_of_those_before(experts_benchmark, monkeypatch):
    experts, blocks, _ = experts_benchmark
    tried = []
    monkeypatch.setattr(experts, "configs", lambda launch, *sizes: [(7, 64, 1)] if launch in ("up", "down") else [])

    def replayed(call, sets, **_):
        found = experts.experts
        tried.append((found.config_of_up(64, torch.bfloat16)[0], found.config_of_down(2, 32, 32, torch.bfloat16)[0]))
        return [sum(tried[-1])]

    monkeypatch.setattr(experts, "replayed", replayed)
    up, down, *_ = experts.sweep(blocks, 1, 4e12)["launches"]
    (chosen_up, chosen_down), *_ = tried
    assert tried == [(chosen_up, chosen_down), (7, chosen_down), (chosen_up, chosen_down), (chosen_up, 7), *tried[-2:]]
    assert up["chosen_us"] == chosen_up + chosen_down and up["configs_us"]["7×64×1"] == 7 + chosen_down
    assert list(down["configs_us"].values()) == sorted(down["configs_us"].values())
    assert "7×64×1: " in experts.swept_table([{"rows": 1, "limit_us": 1.0, "launches": [up, down]}])


@pytest.mark.parametrize("launch", ["router", "up", "lines", "down", "up_rows", "down_rows", "grouped"])
def test_experts_benchmark_sweeps_configs_that_the_kernels_take(launch):
    experts = importlib.import_module("experts")
    sizes = 2048, 512, 9
    configs = list(experts.configs(launch, *sizes))
    assert experts.chosen(launch, *sizes, 4096, 256) in configs and len(configs) == len({*configs})
    assert launch == "lines" or len(configs) > 10


MACHINE = {"gpu": "Some GPU", "cpu": "x86_64", "cpu_threads": 2, "torch": "2.0", "transformers": "5.0"}
FIGURES = {
    "decode": (
        {"dtype": "bfloat16", "batch": 1},
        {"model": "tiny", "limit_ms": 1.0, "sides": [{"side": "eager", "ms": 2.0}, {"side": "fla", "failed": "It is missing."}]},
    ),
    "prefill": (
        {"dtype": "bfloat16", "batch": 1, "lengths": [64]},
        {"model": "tiny", "sides": [{"side": "eager", "ms": {"64": 3.0}}, {"side": "gdnfuse"}]},
    ),
    "chunk": ({}, {"batch": 1, "tokens": 64, "limit_us": 1.0, "sides": [{"side": "gdnfuse", "us": 2.0}]}),
    "mixer": ({}, {"batch": 1, "limit_us": 1.0, "mark_us": 4, "sides": [{"side": "fla", "us": 2.0}, {"side": "mixer_decode"}]}),
    "attention": ({}, {"batch": 1, "tokens": 8, "limit_us": 1.0, "sides": {"reference": {"us": 2.0}, "attention_decode": {}}}),
    "prefix": (
        {"dtype": "bfloat16", "batch": 1, "prefix": 64, "turn": 9, "turns": 1},
        {
            "model": "tiny",
            "sides": [{"side": "prefixes", "first_token": {"dynamic": {"ms": 2.0}}, "chat_ms": [1.0]}, {"side": "eager"}],
        },
    ),
}


def _write_figures(folder, names):
    for name in names:
        arguments, result = FIGURES[name]
        data = {"machine": MACHINE, "arguments": arguments, "results": [result]}
        (folder / f"{name}.json").write_text(json.dumps(data))


def test_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    _write_figures(tmp_path, FIGURES)
    assert main_of("plot")(["--results", str(tmp_path), "--out", str(tmp_path / "plots")]) == 0
    assert sorted(p.stem for p in (tmp_path / "plots").glob("*.png")) == sorted(FIGURES)
    assert not capsys.readouterr().err


def test_plots_of_the_results_there_are(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    _write_figures(tmp_path, ["chunk"])
    assert main_of("plot")(["--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert [p.name for p in tmp_path.glob("*.png")] == ["chunk.png"]
    assert "has no decode.json, so there is no plot of it." in capsys.readouterr().err


def test_plots_tell_where_they_were_measured():
    plot = importlib.import_module("plot")
    text = plot.caption({"machine": MACHINE}, ["bfloat16", "", "batch 1"])
    assert text == "Some GPU; bfloat16; batch 1\ntorch 2.0, transformers 5.0"


def test_plots_tell_at_which_rate_their_limits_are():
    plot = importlib.import_module("plot")
    assert plot.rate({"results": [{}, {}]}) == "4.3 TB/s"
    assert plot.rate({"results": [{}, {"bytes_per_second": 2.913e12}]}) == "2913 GB/s, measured with a copy"
    assert plot.rate({"bytes_per_second": 4.29e12, "results": [{}]}) == "4290 GB/s, measured with a copy"


def test_plots_need_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main_of("plot")(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "plot.py needs matplotlib, which is not installed: pip install 'gdnfuse[plot]'\n"


def test_linears_of_a_prompt_on_fp8_weights(tmp_path, monkeypatch, capsys):
    """On a CPU only whether results are right; one that is wrong has no figure, and the script fails."""
    fp8, file = importlib.import_module("fp8"), tmp_path / "fp8.json"
    how = ["--rows", "70", "--shapes", "small", "--formats", "fp8_block128,fp8_channel", "--device", "cpu", "--json", str(file)]
    assert fp8.main(how) == 0
    results = json.loads(file.read_text())["results"]
    assert [(r["format"], r["rows"], r["us"]) for r in results] == [("fp8_block128", 70, {}), ("fp8_channel", 70, {})]
    assert all(r["errors"]["quantize"] == 0 < r["errors"]["w8a8"] < fp8.TOLERANCE for r in results)
    right = fp8.product
    monkeypatch.setattr(fp8, "product", lambda *given: 1.01 * right(*given))
    assert fp8.main(how) == 1 and "small" in capsys.readouterr().out


def test_accuracy_of_formats(tmp_path, capsys):
    config = zoo.causal_lm(**zoo.FILLED).config
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    argv = [
        "--model",
        str(tmp_path / "config.json"),
        "--layers",
        "2",
        "--tokens",
        "40",
        "--formats",
        "int8_channel,int4_group32_zero,fp8_channel",
    ]
    assert main_of("accuracy")([*argv, "--json", str(tmp_path / "out.json")]) == 0
    int8, int4, fp8 = json.loads((tmp_path / "out.json").read_text())["results"]
    of_fp8 = fp8["errors"]
    assert of_fp8["gdnfuse_fp8"] == pytest.approx(of_fp8["w8a8"], rel=0.2) and of_fp8["gdnfuse_fp8"] > 3 * of_fp8["gdnfuse"]
    assert int8["errors"].keys() == {"gdnfuse", "dequantised", "w8a8"} and int4["errors"].keys() == {"gdnfuse", "dequantised"}
    assert all(0 < error < 0.2 for row in (int8, int4) for error in row["errors"].values())
