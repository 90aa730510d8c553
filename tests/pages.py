"""What the README and the pages of docs/ promise, read from their text."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
REPORT, REFERENCE = ROOT / "docs" / "report.md", ROOT / "docs" / "reference.md"


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def documented(page: Path) -> dict[str, list[str]]:
    """The fields of each object of a page's JSON: a heading with where it stands, then a table with a field in each row."""
    sections = re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return {
        path: re.findall(r"^\| `(\w+)` \|", body, re.MULTILINE)
        for title, body in sections
        for path in re.findall(r"`([\w.\[\]]+)`", title)
    }


def fields(data: Any, path: str) -> dict[str, list[str]]:
    """Every object of JSON data by where it stands, with its fields in order; those of a list's objects together."""
    found: dict[str, list[str]] = {}
    if isinstance(data, dict) and not path.endswith(".marks"):
        found[path] = list(data)
        inner = [fields(value, f"{path}.{key}") for key, value in data.items()]
    else:
        inner = [fields(value, f"{path}[]") for value in data] if isinstance(data, list) else []
    for each in inner:
        for where, names in each.items():
            found[where] = list(dict.fromkeys([*found.get(where, ()), *names]))
    return found


def check_reference(data: dict[str, Any], name: str, absent: Collection[str] = ()) -> None:
    """Whether data has just the fields that docs/reference.md lists for it, and its graphs those of docs/report.md.

    Args:
        data: as printed.
        name: what the page calls it.
        absent: fields that the page lists, but not for this.
    """
    found = {p: n for p, n in fields(data, name).items() if not p.startswith(f"{name}.graphs[].")}
    wanted = {p: n for p, n in documented(REFERENCE).items() if p.partition(".")[0] == name}
    if "graphs" in data:
        wanted[f"{name}.graphs[]"] = [n for n in documented(REPORT)["document.graphs[]"] if n != "limit_seconds"]
    assert {p: set(n) for p, n in found.items()} == {p: set(n) - set(absent) for p, n in wanted.items()}
    assert f"`{data['schema']}`" in REFERENCE.read_text(encoding="utf-8")


def redirect_hub(monkeypatch: Any, folder: Path, **sizes: Any) -> None:
    """Let every name of a model on the hub load a folder with a small model of random weights, zoo.SMALL with other `sizes`."""
    import tokenizers
    import transformers

    from tests.models import zoo

    zoo.causal_lm(**zoo.SMALL | sizes).save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"The": 0, "delta": 1, "rule": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    for cls in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        load = cls.from_pretrained
        monkeypatch.setattr(cls, "from_pretrained", lambda name, load=load, **given: load(folder, **given))
