"""The pages of docs/ do what they say: their Python runs, in order, and their links lead somewhere."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

import gdnfuse
from gdnfuse import backend
from tests.models import zoo
from tests.pages import ROOT, blocks, redirect_hub
from tests.sweeps import some

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


WITH_PYTHON = [p for p in PAGES if blocks(p, "python")]
LIKE_THE_README = DOCS / "getting_started.md"  # whose block runs in tests/test_readme.py


@pytest.mark.parametrize("page", some(WITH_PYTHON, *(p for p in WITH_PYTHON if p != LIKE_THE_README)), ids=lambda p: p.name)
def test_python_blocks_run_in_order(page, monkeypatch, tmp_path):
    """With `model` and `prompt` as the pages say. Inductor is tested elsewhere; here it would only be slow."""
    monkeypatch.setattr(backend, "_inner", lambda gm, *_: gm.forward)
    monkeypatch.chdir(tmp_path)  # where a page writes files
    if "from_pretrained(" in "".join(blocks(page, "python")):
        redirect_hub(monkeypatch, tmp_path / "hub")
    torch.compiler.reset()
    gdnfuse.clear_reports()
    scope: dict[str, object] = {"gdnfuse": gdnfuse, "model": zoo.causal_lm(**zoo.SMALL), "prompt": zoo.prompt(1, 6)[0]}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), scope)
    assert all(r.fused_layers == 1 for r in gdnfuse.reports())
    assert gdnfuse.reports() or "compile(" not in "".join(blocks(page, "python"))


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_every_block_is_of_a_kind_that_some_test_runs(page):
    """`python` runs above, `console` in tests/test_readme.py and tests/installed.py. `text` is what a block prints."""
    fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0 and not any(fences[1::2]), "every block is closed"
    for kind in set(fences[::2]) - {"python", "console", "text"}:
        language, _, name = kind.partition(" ")
        assert language == "python" and name, f"```{kind}"
        tests = [f for f in (ROOT / "tests").rglob("*.py") if name in f.read_text() and f'"{page.name}"' in f.read_text()]
        assert [f for f in tests if "blocks(" in f.read_text() and f != Path(__file__)], f"no test runs ```{kind}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_plot_is_on_a_page_beside_its_figures():
    plots = list((ROOT / "benchmarks" / "results" / "plots").iterdir())
    text = "".join(page.read_text() for page in PAGES)
    assert plots
    for plot in plots:
        assert f"../benchmarks/results/plots/{plot.name})" in text and f"../benchmarks/results/{plot.stem}.json)" in text, plot


@pytest.mark.sweep
def test_pictures_are_drawn_from_the_graphs(tmp_path, monkeypatch):
    """The committed ones have the same operations after lowering; how transformers writes a layer differs by version."""
    monkeypatch.syspath_prepend(str(DOCS))
    importlib.import_module("draw").main(["--out", str(tmp_path)])
    for phase, ours in (("decode", ["in_proj_conv", "packed_decode", "fused_linear"]), ("prefill", ["causal_conv"])):
        last = [(page / f"{phase}.svg").read_text().split(">after lower: ")[1] for page in (tmp_path, DOCS)]
        assert last[0] == last[1] and all(f">{name}<" in last[0] for name in ours)


def test_the_table_of_trust_counts_what_ran(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    trust = importlib.import_module("trust")
    asked = {f for files in trust.ROWS.values() for f in files if f.startswith("tests/")}
    assert all((trust.ROOT / f).exists() for f in asked)
    sweeps = [f for f in (ROOT / "tests").rglob("test_*.py") if re.search(r"mark\.sweep|tests\.sweeps import", f.read_text())]
    names = [f.relative_to(ROOT) for f in sweeps if f != Path(__file__)]
    assert len(names) > 9 and not [n for n in names if not {str(n), str(n.parent)} & asked], (
        "a row must run what `make test` leaves out"
    )
    (tmp_path / "test_one.py").write_text("def test_first(): pass\ndef test_second(): pass\ndef test_wrong(): assert False\n")
    page = tmp_path / "trust.md"
    page.write_text(f"before\n{trust.START}old\n{trust.END}behind\n")
    monkeypatch.setattr(trust, "PAGE", page)
    for select, code, counts in (("first or second", 0, (2, 0)), ("second or wrong", 1, (1, 1)), ("absent", 1, (0, 0))):
        monkeypatch.setattr(trust, "ROWS", {"One": [str(tmp_path / "test_one.py"), "-k", select, "-p", "no:cacheprovider"]})
        assert trust.main(["--workers", "0", "--json", str(tmp_path / "trust.json")]) == code
        (row,) = json.loads((tmp_path / "trust.json").read_text())["rows"]
        assert (row["passed"], row["failed"]) == counts
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("behind\n") and "| One " in text and "old" not in text
