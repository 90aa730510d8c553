"""Every table of figures on a page is what its JSON gives (`make figures`), and every result file stands on a page."""

from __future__ import annotations

import importlib
import json
import re
import shutil

import pytest

from tests.pages import ROOT

RESULTS = ROOT / "benchmarks" / "results"
UNIT = re.compile(r"\d (?:ms|µs|s|tokens/s|GB/s|MiB|GiB)\b")


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("figures")


def asked(figures):
    """Every table of every page, as its mark asks for it."""
    return [(page, *found["ask"].split()) for page in figures.PAGES for found in figures.BLOCK.finditer(page.read_text())]


def test_pages_have_the_figures_of_their_files(figures, capsys):
    assert figures.main(["--check"]) == 0, capsys.readouterr().out
    assert len(asked(figures)) > 10


def test_figures_stand_in_no_table_but_those_that_are_written(figures):
    for page in (ROOT / "README.md", ROOT / "docs" / "performance.md"):
        rest = figures.BLOCK.sub("", page.read_text())
        assert not [line for line in rest.splitlines() if line.startswith("|") and UNIT.search(line)], page.name


def test_results_are_of_one_card_and_each_is_on_a_page(figures):
    text = "".join(page.read_text() for page in figures.PAGES)
    for file in RESULTS.glob("*.json"):
        assert file.name in text, file
        assert json.loads(file.read_text())["machine"]["gpu"] in ("NVIDIA H200", None), file
        assert not re.search(r"""["' =]/\w+/""", file.read_text()), f"{file} has a path of the machine that measured it"


def test_results_of_other_versions_say_how_to_measure_them_again(figures, tmp_path, capsys):
    machines = {"new": {"gdnfuse": figures.version("gdnfuse")}, "old": {"gdnfuse": "0.0.1"}, "unknown": {}}
    for name, machine in machines.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"command": f"measure {name}", "machine": machine}))
    assert figures.older(tmp_path) == ["measure old", "measure unknown"]
    assert figures.main(["--older"]) == 0 and len(capsys.readouterr().out.splitlines()) == len(figures.older(RESULTS) or [""])


def test_the_page_of_trust_has_the_figures_of_its_run_on_a_gpu():
    rows = json.loads((ROOT / "docs" / "trust_gpu.json").read_text())["rows"]
    passed, failed = (sum(row[name] for row in rows) for name in ("passed", "failed"))
    assert f"{passed} passed, {failed} failed" in (ROOT / "docs" / "trust.md").read_text()


def doubled(data):
    """Sizes are whole numbers, and stay."""
    if isinstance(data, dict):
        return {key: doubled(value) for key, value in data.items()}
    if isinstance(data, list):
        return [doubled(value) for value in data]
    return 2 * data if isinstance(data, float) else data


def test_each_table_follows_each_of_its_files(figures, tmp_path):
    """Other figures in a file are other figures in the table, and a file that is not there is a sentence."""
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
    for page, kind, *names in asked(figures):
        before = figures.rendered(kind, names, tmp_path, page)
        for name in names:
            file = tmp_path / name
            if not file.exists():
                assert before.startswith(f"Not measured on this version yet: {name}")
                continue
            kept = file.read_text()
            file.write_text(json.dumps(doubled(json.loads(kept))))
            assert figures.rendered(kind, names, tmp_path, page) != before, (page.name, kind, name)
            file.unlink()
            assert f"Not measured on this version yet: {name}" in figures.rendered(kind, names, tmp_path, page)
            file.write_text(kept)


SIDE = {"error": 0.0, "ms": 2.0, "us": 3.25}
NOT_YET = {
    "attention": (
        {"batch": 2, "tokens": 8, "limit_us": 1.0, "sides": {"reference": SIDE, "attention_decode": SIDE}},
        "| 2 × 8 | 3.2 µs | 3.2 µs | 1.0 µs |",
    ),
    "launch": (
        {"op": "experts", "kernels": 3, "launch_us": 9.0, "op_us": 5.0, "inductor_us": 4.0},
        "| `experts` | 3 | 9 µs | 5 µs | 4 µs |",
    ),
}


@pytest.mark.parametrize("kind", NOT_YET)
def test_tables_whose_files_are_not_there_yet(kind, figures, tmp_path):
    result, line = NOT_YET[kind]
    (tmp_path / "one.json").write_text(json.dumps({"machine": {"gpu": "Some GPU", "torch": "2.0"}, "results": [result]}))
    text = figures.rendered(kind, ["one.json"], tmp_path, ROOT / "README.md")
    measured = "Measured on Some GPU, torch 2.0, gdnfuse 0.1.0: [one.json](benchmarks/results/one.json).\n"
    assert line in text and text.endswith(measured)


def test_a_page_is_written_between_its_marks_and_nowhere_else(figures, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures: chunk chunk.json -->\nold\n<!-- end of figures -->\nbehind\n")
    for name, stub in {"PAGES": [page], "ROOT": tmp_path}.items():
        monkeypatch.setattr(figures, name, stub)
    assert figures.main(["--check"]) == 1 and "old" in page.read_text()
    assert capsys.readouterr().out == "page.md must have the figures of its JSON files, and has others. Run: make figures\n"
    assert figures.main(["--no-plots"]) == 0 and figures.main(["--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nbehind\n") and "| 1 × 2048 |" in text and "old" not in text
    page.write_text("<!-- figures: chunks chunk.json -->\n<!-- end of figures -->\n")
    with pytest.raises(SystemExit, match=r"must be one of results, .*\. page\.md asks for chunks\. Correct its comment\."):
        figures.main([])


def test_plots_that_pages_show_are_drawn(figures, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "plots").mkdir()
    shutil.copy(RESULTS / "chunk.json", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("![The rule](plots/chunk.png)\n")
    figures.draw([page], tmp_path)
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["chunk.png"]
