"""What the README and the pages of docs/ promise, read from their text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


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
