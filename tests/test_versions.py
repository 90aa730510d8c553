"""What is said of versions that are tested, and of others."""

import json

import pytest
import torch

import gdnfuse
from gdnfuse import versions
from gdnfuse.cli import main


@pytest.mark.parametrize(
    ("version", "so"),
    [("5.16.2", "Too old: "), ("5.17.0", "In use, tested"), ("5.24.1.dev0", "In use, tested"), ("6.0", "In use, newer")],
)
def test_doctor_knows_the_versions_it_was_tested_with(version, so, capsys, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda package: version)
    assert main(["doctor", "--json"]) == 0
    (row,) = [row for row in json.loads(capsys.readouterr().out) if row["what"] == "transformers"]
    assert row["found"] == version and row["so"].startswith(so)


@pytest.mark.parametrize(("version", "warned"), [("5.16.1", True), ("4.57.0", True), ("5.17.0", False), ("none", False)])
def test_a_version_that_is_too_old_is_named_with_the_one_that_is_required(version, warned, monkeypatch):
    """The backend logs these sentences when it is loaded."""
    monkeypatch.setattr(versions, "version", lambda package: version if package == "transformers" else "2.13.0+cpu")
    sentences = versions.too_old()
    assert len(sentences) == warned
    assert all(s == f"transformers 5.17 or newer is required, found {version}." for s in sentences)
    if warned:  # before any work: caches and configs of another version are not what it knows
        with pytest.raises(gdnfuse.GdnfuseError, match=f"found {version}"):
            gdnfuse.compile(torch.nn.Linear(2, 2))
