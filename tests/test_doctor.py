"""`gdnfuse doctor`: a line for each finding, and what to do about it."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
import transformers

from gdnfuse import compat, doctor, versions
from gdnfuse.cli import main


def rows():
    return {what: (found, effect, remedy) for what, found, effect, remedy in doctor.findings()}


def test_it_says_what_is_here_and_what_follows(capsys):
    assert main(["doctor", "--json"]) == 0
    found = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["torch"]["found"].startswith(torch.__version__) and found["transformers"]["found"] == transformers.__version__
    assert all(row["effect"].endswith(".") for row in found.values())
    if not torch.cuda.is_available():
        assert found["GPU"]["found"] == "none"
    assert found["private APIs"]["effect"] == "All were found." and not found["private APIs"]["remedy"]


def test_each_finding_is_a_line_and_what_to_do_stands_in_it(capsys, monkeypatch):
    quiet = [("torch", "2.13.0", "In use.", "")]
    monkeypatch.setattr(doctor, "findings", lambda: iter(quiet))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.startswith("ok     torch, 2.13.0. In use.\n\nNothing to do. Next: gdnfuse ")
    monkeypatch.setattr(doctor, "findings", lambda: iter([*quiet, ("triton", "none", "No kernels.", "Install it.")]))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "ok     torch, 2.13.0. In use.\nto do  triton, none. No kernels. Install it.\n\n1 to do.\n"


def test_what_is_switched_off_or_missing_has_a_remedy(monkeypatch):
    monkeypatch.setenv("GDNFUSE_DISABLE", "1")
    monkeypatch.setattr(compat.ENTRIES["holders"], "paths", ["torch._C:_nothing"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: "/nowhere")
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    find = importlib.util.find_spec
    here = {"fla": True, "triton": False}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: here.get(name) or None if name in here else find(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = rows()
    assert found["gdnfuse"][1:] == ("No graph is changed, because GDNFUSE_DISABLE is set.", "Unset GDNFUSE_DISABLE.")
    assert "Without torch._C._nothing weights are not packed." in found["private APIs"][1] and found["private APIs"][2]
    assert found["C compiler"][0] == found["Python.h"][0] == "none"
    assert all(found[what][2] for what in ("C compiler", "Python.h", "triton"))
    assert found["fla"][2].endswith("pip uninstall flash-linear-attention") and not found["causal_conv1d"][2]


@pytest.mark.parametrize(
    ("version", "effect", "remedy"),
    [
        ("5.16.2", "Too old: ", "Install a newer one: pip install 'transformers>=5.17'"),
        ("5.17.0", "In use, tested", ""),
        ("5.24.1.dev0", "In use, tested", ""),
        ("6.0", "In use, newer", "Compare results once: gdnfuse verify 0.8b"),
    ],
)
def test_versions(version, effect, remedy, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda package: version)
    found = rows()["transformers"]
    assert found[0] == version and found[1].startswith(effect) and found[2] == remedy


@pytest.mark.parametrize(
    ("there", "cuda", "remedy"), [(False, None, ""), (True, None, "Install a build"), (True, "13.0", "Check its driver")]
)
def test_a_gpu_that_torch_does_not_see(there, cuda, remedy, monkeypatch):
    monkeypatch.setattr(doctor.Path, "exists", lambda self: there)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    assert remedy in doctor._unseen_gpu() and bool(doctor._unseen_gpu()) == bool(remedy)


@pytest.mark.parametrize("capability", [0, 8, 9, 10])
def test_the_kernels_of_a_gpu_are_named(capability):
    assert ("overlap" in doctor.kernels_for(capability, True)) == (capability >= 9)
    assert "Triton" not in doctor.kernels_for(capability, False)
