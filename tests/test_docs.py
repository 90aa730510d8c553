"""The pages of docs/ do what they say: their Python runs, in order, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import gdnfuse
from gdnfuse import backend
from tests.models import zoo

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run_in_order(page, monkeypatch):
    """With `model` and `prompt` as the pages say. Inductor is tested elsewhere; here it would only be slow."""
    monkeypatch.setattr(backend, "_inner", lambda gm, *_: gm.forward)
    torch.compiler.reset()
    gdnfuse.clear_reports()
    scope: dict[str, object] = {"model": zoo.causal_lm(), "prompt": zoo.prompt(1, 6)[0]}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), scope)
    assert gdnfuse.reports() and all(r.fused_layers == zoo.GDN_LAYERS for r in gdnfuse.reports())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
