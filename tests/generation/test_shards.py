"""Models that are shared out over ranks: each check of ranks.py, which two processes run together, is a test."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gdnfuse
from gdnfuse import models, versions
from gdnfuse.generation import links, shards
from tests.generation import ranks
from tests.models import zoo

ROOT = Path(__file__).parents[2]
TWO = [name for name in ranks.CHECKS if name not in ranks.SWEPT]


traceable = pytest.mark.skipif(
    bool(versions.older("transformers", shards.TRACEABLE)), reason="tensor parallel of this transformers is not traced"
)


def run(folder, count, names):
    """What each check said on each rank, by its name."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.generation.ranks", str(folder), *names]
    processes = []
    for rank in range(count):
        env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        with open(folder / f"{rank}.log", "w") as out:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out))
    try:
        for p in processes:
            p.wait(timeout=540)
    finally:
        for p in processes:
            p.kill()
    said = [json.loads(f.read_text()) if (f := folder / f"{rank}.json").exists() else {} for rank in range(count)]
    logs = "".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(count))
    return {name: [found.get(name, f"never came to it\n{logs}") for found in said] for name in names}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), 2, TWO)


@traceable
@pytest.mark.parametrize("name", TWO)
def test_on_two_ranks(two, name):
    assert two[name] == ["", ""], "\n".join(two[name])


@traceable
@pytest.mark.sweep
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("part", range(3))
def test_families(tmp_path, count, part):
    said = run(tmp_path, count, ranks.SWEPT[part::3])
    assert not any(text for texts in said.values() for text in texts), "\n".join(t for texts in said.values() for t in texts)


@pytest.mark.parametrize("way", ["heads", "as_loaded"])
def test_without_a_process_group_it_is_refused(way):
    model = zoo.causal_lm(**zoo.SMALL)
    with pytest.raises(gdnfuse.GdnfuseError, match=f"^tensor_parallel='{way}' needs .* found no process group: start a process"):
        gdnfuse.compile(model, tensor_parallel=way, inner="eager")
    assert model._compiled_call_impl is None


def test_transformers_whose_tensor_parallel_is_not_traced_are_refused(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda package: "5.21.1")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(gdnfuse.GdnfuseError, match="can trace: transformers must be 5.23 or newer, found 5.21.1: pip"):
            gdnfuse.compile(zoo.causal_lm(**zoo.SMALL), tensor_parallel="heads")
    finally:
        torch.distributed.destroy_process_group()


def test_the_way_of_small_sums_is_chosen_by_the_slowest_rank():
    sizes = len(links.SIZES)
    faster, slower = [(5.0, 9.0)] * sizes, [(5.0, 9.0)] * 3 + [(11.0, 9.0)] + [(5.0, 9.0)] * (sizes - 4)
    assert links.chosen([faster, faster]) == links.SIZES[-1] and links.chosen([faster, slower]) == links.SIZES[2]
    assert links.chosen([faster, [(9.0, 9.0)] * sizes]) == 0
    assert links.one_shot_bytes("cpu") == 0


def test_measuring_small_sums_needs_ranks():
    model = zoo.causal_lm(**zoo.SMALL)
    with pytest.raises(gdnfuse.GdnfuseError, match="^one_shot_bytes='measured' needs tensor_parallel, found None: "):
        gdnfuse.compile(model, one_shot_bytes="measured")
    with pytest.raises(Exception, match="one_shot_bytes='measured' needs gdnfuse.compile, which measures"):
        torch.compile(lambda x: x + 1, backend="gdnfuse", options={"one_shot_bytes": "measured"})(torch.ones(1))


def test_an_unknown_way_is_refused():
    with pytest.raises(gdnfuse.GdnfuseError, match="^tensor_parallel must be 'as_loaded' or 'heads' or None, found 'rows'.$"):
        gdnfuse.compile(zoo.causal_lm(**zoo.SMALL), tensor_parallel="rows")


def adapted(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["in_proj_z"], init_lora_weights=False)
    return peft.get_peft_model(model, config).base_model.model


def biased(model):
    linear = model.model.layers[0].linear_attn.in_proj_z
    linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))
    return model


def replaced(model):
    linear = model.model.layers[0].linear_attn.in_proj_z
    linear.forward = lambda x: x
    return model


PLAIN = "tensor_parallel='heads' cuts plain linears without bias, found"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (adapted, f"{PLAIN} Linear at .*in_proj_z: leave adapters"),
        (models.quantized, f"{PLAIN} FP8Linear at .*in_proj_qkv: leave"),
        (biased, f"{PLAIN} Linear with a bias at .*in_proj_z"),
        (replaced, f"{PLAIN} Linear with a forward of its own at .*in_proj_z"),
        (
            lambda model: model,
            "Key heads must be split evenly over ranks, found 2 in .*linear_attn and 3 ranks: use a number",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(change, sentence):
    model = change(zoo.causal_lm(**zoo.SMALL))
    with pytest.raises(gdnfuse.GdnfuseError, match=f"^{sentence}"):
        list(shards._mixers(model, 3 if sentence.startswith("Key") else 2))


def test_a_mixer_of_other_projections_is_refused():
    model = zoo.causal_lm(**zoo.SMALL)
    model.model.layers[0].linear_attn.extra_proj = torch.nn.Linear(2, 2)
    with pytest.raises(gdnfuse.GdnfuseError, match="must know the layout of a mixer.s projections, found Qwen3_5"):
        list(shards._mixers(model, 2))
