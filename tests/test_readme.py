"""The README does what it says: its Python runs, its commands and options exist, its links lead somewhere."""

from __future__ import annotations

import dataclasses
import re
import shlex

import pytest
import torch

import gdnfuse
from gdnfuse.cli import _parser
from gdnfuse.options import Options
from tests.pages import ROOT, blocks, redirect_hub

PAGE = ROOT / "README.md"
README = PAGE.read_text()
OPTIONS = (ROOT / "docs" / "options.md").read_text()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    redirect_hub(monkeypatch, tmp_path)


def test_the_example_runs(monkeypatch, hub, capsys):
    (block,) = blocks(PAGE, "python")
    # Inductor is tested elsewhere; here it would only be slow.
    init = Options.__init__
    monkeypatch.setattr(Options, "__init__", lambda self, **given: init(self, **{"inner": "eager", **given}))
    torch.compiler.reset()
    gdnfuse.clear_reports()
    here = block if torch.cuda.is_available() else block.replace('.to("cuda")', '.to("cpu")')
    exec(compile(here, "README.md", "exec"), {})
    assert "GDN layers fused" in capsys.readouterr().out
    assert len(gdnfuse.reports()) >= 2 and all(r.fused_layers == len(r.layers) > 0 for r in gdnfuse.reports())


def test_a_newcomer_reads_little_before_the_install_line_and_the_example():
    for mark, most in (("```console", 60), ("```python", 90)):
        assert len(re.findall(r"\w[\w'./-]*", README[: README.index(mark)])) <= most
    assert len(README.splitlines()) <= 120


def test_commands_parse():
    pages = [PAGE, *(ROOT / "docs").glob("*.md")]
    lines = [line for page in pages for block in blocks(page, "console") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    for command in commands:
        if command[0] == "gdnfuse":
            _parser().parse_args(command[1:])
        elif command[0] != "pip":
            assert command[0] == "make"
            assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_option_is_in_the_table():
    section = OPTIONS.split("## Options")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [f.name for f in dataclasses.fields(Options)]


def test_links_and_named_files_exist():
    for target in re.findall(r"\]\((\w[\w./-]*)\)", README) + re.findall(r"`((?:benchmarks|examples)/[\w.]+)`", README):
        assert (ROOT / target).exists(), target
