"""Artifacts: a second process with the file of a first compiles nothing again, and a file that does not fit is one sentence."""

import contextlib
import importlib.metadata
import io
import json
import logging
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import gdnfuse
from gdnfuse import cache_keys, compat, kernels, versions
from gdnfuse.cli import main
from gdnfuse.dialect import OPS
from gdnfuse.errors import GdnfuseError
from gdnfuse.generation import artifacts
from tests.models import zoo

# Calls of torch's ops in place of C++, which takes a minute to compile and is in no artifacts.
SETTINGS = {"fallback_by_default": True}
ROOT = Path(__file__).parents[2]


def generated(model):
    return model.generate(zoo.prompt(1, 20)[0], max_new_tokens=4, do_sample=False, pad_token_id=0)[0].tolist()


SECOND = """
import json
import sys

import torch

torch.set_num_threads(1)

import gdnfuse
from tests.generation.test_artifacts import SETTINGS, generated
from tests.models import zoo

model = gdnfuse.compile(zoo.causal_lm(**zoo.SMALL), artifacts=sys.argv[1])
with torch._inductor.config.patch(SETTINGS):
    tokens = generated(model)
counters = {kind: dict(torch._dynamo.utils.counters[kind]) for kind in ("inductor", "aot_autograd")}
print(json.dumps({"tokens": tokens, "fused": [report.fused_layers for report in gdnfuse.reports()], **counters}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The file that the command line makes from a config, and the tokens of a model of that config, whose weights are others."""
    folder = tmp_path_factory.mktemp("artifacts")
    file, model = folder / "model.artifacts", zoo.causal_lm(**zoo.SMALL)
    wanted = generated(model)
    model.config.save_pretrained(folder)
    command = ["warmup", str(folder / "config.json"), "--save", str(file), "--dtype", "float32", "--device", "cpu", "--json"]
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(SETTINGS), contextlib.redirect_stdout(out):
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "first"))
        assert main(command) == 0
    said = json.loads(out.getvalue())
    assert said["graphs"] == {"prefill": 1, "decode": 1} and not said["unfused"]
    assert said["file"] == str(file) and said["saved"] == file.stat().st_size > 1000
    return file, wanted


def test_a_second_process_finds_all_graphs_in_the_file(saved, tmp_path):
    """Which are AOTAutograd's, that keep Inductor's in them. Here tests.conftest was the first to import torch, and not there."""
    file, wanted = saved
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SECOND, str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] == wanted and found["fused"] == [1, 1]
    assert found["aot_autograd"]["autograd_cache_hit"] == 2
    assert not {name for kind in ("inductor", "aot_autograd") for name in found[kind] if "miss" in name or "bypass" in name}


def test_a_reference_that_has_changed_is_compiled_again(monkeypatch):
    """Of inlined references AOTAutograd's key has the names, and from us a digest of what they do."""
    gm = torch.fx.symbolic_trace(lambda x: x)
    (x,) = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_after(x):
        gm.graph.call_function(OPS["l2norm"].reference, (x, 1e-6))

    def marked(**theirs):
        return cache_keys.cacheable(gm, {cache_keys.CACHEABLE: theirs})[cache_keys.CACHEABLE]

    name, before = "gdnfuse.dialect.l2norm.reference", marked()
    assert before[name] == versions.of_sources("dialect", "formats") and marked(theirs="1") == {"theirs": "1", **before}
    compat.like_a_parameter(gm, x)
    assert marked() != before and marked()[name] == before[name]
    monkeypatch.setattr(versions, "of_sources", lambda *folders: "changed")
    assert marked()[name] == "changed"


def test_keys_do_not_depend_on_who_imports_torch_first():
    """Pickle finds a memory format in the first module that has an attribute torch."""

    def found():
        """The strings of a memory format's pickle: the module and the name in it."""
        return [arg for _, arg, _ in pickletools.genops(pickle.dumps(torch.channels_last)) if isinstance(arg, str)]

    before = found()
    assert before[1] == "torch.channels_last"  # or torch has mended it, and cache_keys.alike can go
    with cache_keys.alike():
        assert found() == ["torch", "channels_last"]
        assert pickle.loads(pickle.dumps(torch.channels_last)) is torch.channels_last
    assert found() == before


def test_artifacts_of_something_else_are_one_warning(saved, caplog, monkeypatch):
    file, _ = saved
    model, taken = zoo.causal_lm(**zoo.SMALL, hidden_size=48).bfloat16(), []
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", taken.append)
    made = versions.version("gdnfuse")
    monkeypatch.setattr(
        versions, "version", lambda package: "99.0" if package == "gdnfuse" else importlib.metadata.version(package)
    )
    with caplog.at_level(logging.WARNING):
        assert not artifacts.load(artifacts.read(file), model)
    (said,) = [record.getMessage() for record in caplog.records]
    assert not taken and said.count(". ") == 0 and str(file) in said and said.endswith("gdnfuse.warmup(model, save=…).")
    for part in ("gdnfuse 99.0", f"gdnfuse {made}", "dtype bfloat16", "dtype float32", "config "):
        assert part in said
    assert "device" not in said and "torch" not in said


def test_a_file_that_is_not_whole_is_one_sentence_and_nothing_is_loaded(saved, tmp_path, monkeypatch):
    whole, model, loaded = saved[0].read_bytes(), zoo.causal_lm(**zoo.SMALL), []
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", loaded.append)
    damaged, foreign = tmp_path / "damaged", tmp_path / "foreign.zip"
    with zipfile.ZipFile(foreign, "w") as parts:
        parts.writestr(artifacts.ABOUT, json.dumps({"schema": "gdnfuse.artifacts/0"}))
    middle = len(whole) // 2
    cases = [whole[:middle], whole[:middle] + b"?" + whole[middle + 1 :], b"", b"text"]
    for content in cases:
        damaged.write_bytes(content)
        with pytest.raises(
            GdnfuseError, match=r"^artifacts must be .*damaged is damaged or another kind of file: write it again\.$"
        ):
            gdnfuse.compile(model, artifacts=damaged)
    for file, found in ((foreign, "has another schema"), (tmp_path / "none", "does not exist"), (tmp_path, "cannot be read")):
        with pytest.raises(GdnfuseError, match=rf"^artifacts must be [^.]*.*{found}[^.]*"):
            gdnfuse.compile(model, artifacts=file)
    assert not loaded and compat.compiled_call(model) is None


def test_what_cannot_be_written_is_said_before_any_work_and_leaves_the_file_as_it_was(saved, tmp_path, monkeypatch):
    model = gdnfuse.compile(zoo.causal_lm(**zoo.SMALL), inner="eager")
    with pytest.raises(GdnfuseError, match="is a folder"):
        gdnfuse.warmup(model, save=tmp_path)
    assert not gdnfuse.reports()
    file = tmp_path / "kept"
    file.write_text("before")
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    monkeypatch.setattr(kernels, "machine_codes", dict)
    with pytest.raises(GdnfuseError, match="found nothing from this process"):
        artifacts.save(model, file)
    monkeypatch.setattr(kernels, "machine_codes", lambda: {"key": {"name": None}})
    with pytest.raises(TypeError):
        artifacts.save(model, file)
    assert file.read_text() == "before" and [f.name for f in tmp_path.iterdir()] == ["kept"]


def test_machine_codes_of_our_kernels_are_in_the_file(saved, tmp_path, monkeypatch):
    """Compiled for a GPU that is not here, and found by Triton in an empty cache once the file is loaded."""
    import triton
    from triton.backends.compiler import GPUTarget

    from gdnfuse.kernels.add_rms_norm import add_rms_norm_kernel

    x, weight = torch.empty(2, 1, 64, device="meta"), torch.empty(64, device="meta")
    (spec,) = kernels.implementations()["add_rms_norm"].jit_kernels(x, x, weight, 1e-6, 1.0)

    def compiled():
        source = triton.compiler.ASTSource(spec.kernel, spec.signature, spec.constexprs, spec.attrs)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=spec.options)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "first"))
    code = compiled()
    monkeypatch.setattr(add_rms_norm_kernel, "device_caches", {0: ({"key": code}, None)})
    model, file = zoo.causal_lm(**zoo.SMALL), tmp_path / "file"
    artifacts.save(model, file)
    read = artifacts.read(file)
    assert read.kernels == {code.hash: {Path(p).name: Path(p).read_bytes() for p in code.metadata_group.values()}}

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "second"))
    assert artifacts.load(read, model)
    monkeypatch.setattr(triton.compiler.compiler, "make_backend", _no_stages(triton.compiler.compiler.make_backend))
    assert compiled().asm["cubin"] == code.asm["cubin"]


def _no_stages(make):
    """Backends of Triton's that compile nothing."""

    def backend(target):
        made = make(target)

        def add_stages(*args):
            raise AssertionError("compiled again")

        made.add_stages = add_stages
        return made

    return backend
