"""The README does what it says: its Python runs, its commands and options exist, its links lead somewhere."""

from __future__ import annotations

import dataclasses
import re
import shlex

import gdnfuse
from gdnfuse.cli import _parser
from gdnfuse.options import Options
from tests.pages import ROOT, blocks

PAGE = ROOT / "README.md"
README = PAGE.read_text()


def test_python_blocks_run_in_order(monkeypatch):
    headline, *rest = blocks(PAGE, "python")
    assert "gdnfuse.compile(model)" in headline
    # Inductor is tested elsewhere; here it would only be slow.
    init = Options.__init__
    monkeypatch.setattr(Options, "__init__", lambda self, **given: init(self, **{"inner": "eager", **given}))
    gdnfuse.clear_reports()
    scope: dict[str, object] = {}
    for block in rest:
        exec(compile(block, "README.md", "exec"), scope)
    exec(compile(headline, "README.md", "exec"), scope)
    assert [r.fused_layers for r in gdnfuse.reports()] == [3] * len(gdnfuse.reports())
    assert len(gdnfuse.reports()) >= 2


def test_commands_parse():
    lines = [line for block in blocks(PAGE, "console") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    for command in commands:
        if command[0] == "gdnfuse":
            _parser().parse_args(command[1:])
        else:
            assert command[0] == "make"
            assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_option_is_in_the_table():
    section = README.split("## Options")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [f.name for f in dataclasses.fields(Options)]


def test_links_and_named_files_exist():
    for target in re.findall(r"\]\((\w[\w./-]*)\)", README) + re.findall(r"`((?:benchmarks|examples)/[\w.]+)`", README):
        assert (ROOT / target).exists(), target
