"""What a release says of itself: its version in one place, a changelog of one form, metadata that a registry takes."""

from __future__ import annotations

import re
import subprocess
import tomllib

import pytest

from tests import installed
from tests.pages import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_changelog_has_the_form_and_begins_with_this_version():
    versions = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    assert all(re.fullmatch(r"\[Unreleased\]|\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", v) for v in versions), versions
    assert re.findall(r"^## \[(\d[\d.]*)\]", CHANGELOG, re.MULTILINE)[0] == PROJECT["version"]
    groups = re.findall(r"^### (.*)$", CHANGELOG, re.MULTILINE)
    assert set(groups) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for text in re.split(r"^## .*\n", CHANGELOG, flags=re.MULTILINE)[1:]:
        assert text.lstrip().startswith("### "), "every line of a version is in a group"
        of_version = re.findall(r"^### (.*)$", text, re.MULTILINE)
        assert len(of_version) == len(set(of_version)), "a group of a version stands once"


def test_the_version_stands_in_one_place():
    found = subprocess.run(
        ["git", "grep", "-lF", PROJECT["version"], "--", "*.py", "*.toml"], cwd=ROOT, capture_output=True, text=True
    )
    if found.returncode > 1:
        pytest.skip("no git here")
    assert [file for file in found.stdout.split() if not file.startswith("tests/")] in (["pyproject.toml"], [])


def test_metadata_is_checked():
    good = (
        "Metadata-Version: 2.4\nName: gdnfuse\nVersion: {}\nRequires-Python: >=3.11\nLicense-Expression: Apache-2.0\n"
        "Description-Content-Type: text/markdown\n\n# gdnfuse\n"
    ).format(PROJECT["version"])
    installed.check_metadata(good.encode())
    for old, new in (
        ("Name: gdnfuse\n", ""),
        (f"Version: {PROJECT['version']}", "Version: new"),
        (f"Version: {PROJECT['version']}", "Version: 0.0.1"),
        (">=3.11", "3.11 and newer"),
        ("License-Expression: Apache-2.0", "License-Expression: Apache, mostly"),
        ("text/markdown", "text/x-rst"),
        ("\n\n# gdnfuse\n", "\n"),
    ):
        assert old in good
        with pytest.raises((ExceptionGroup, ValueError)):
            installed.check_metadata(good.replace(old, new).encode())
