"""The form of docstrings: a line, then Args, Returns, Raises and Source, each where there is something to say."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap

import pytest

import gdnfuse
from tests.pages import ROOT

SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Source")
PAGES = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
# Functions of modules that are public as modules, as the pages write them.
NAMED = sorted(set(re.findall(r"\bgdnfuse\.((?:capture|models)\.[a-z]\w+)(?![\w.])", PAGES)))
OF_PAPERS = ("Callback", "Draft", "MTP", "PrefixStore", "PromptLookup", "RollbackCache", "speculative", "compile")


def found(name):
    module, _, attribute = f"gdnfuse.{name}".rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def public():
    """Every public function and class by name, then the methods that the classes define themselves."""
    for name in [*gdnfuse.__all__, *NAMED]:
        thing = found(name)
        if not inspect.ismodule(thing):
            yield name, thing
        for key, method in vars(thing).items() if inspect.isclass(thing) and not issubclass(thing, Exception) else ():
            method = method.fget if isinstance(method, property) else inspect.unwrap(method) if callable(method) else None
            if not key.startswith("_") and inspect.isfunction(method) and method.__module__.startswith("gdnfuse"):
                yield f"{name}.{key}", method


def sections(doc):
    """The text of each section, and before them that of the summary."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", doc, flags=re.MULTILINE)
    return parts[0], dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(section):
    """What each name of a section is said to be. One line may have several names."""
    told = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*|\n(?= *\n))*)", section, re.MULTILINE)
    return {name.strip("* "): text for names, text in told for name in names.split(", ")}


def parameters(thing):
    if dataclasses.is_dataclass(thing) and isinstance(thing, type):
        return [f.name for f in dataclasses.fields(thing) if f.init]
    return [name for name, p in inspect.signature(thing).parameters.items() if name != "self"]


THINGS = dict(public())


@pytest.mark.parametrize("name", THINGS)
def test_docstrings_have_the_form(name):
    thing = THINGS[name]
    doc = inspect.cleandoc(thing.__doc__ or "")
    first, _, rest = doc.partition("\n")
    assert first.endswith((".", ")")) and (not rest or rest.startswith("\n")), f"{name}: a summary of one line"
    _, told = sections(doc)
    assert list(told) == sorted(told, key=SECTIONS.index), f"{name}: sections in order"
    of_class = inspect.isclass(thing)
    if "." in name and not of_class and name not in NAMED and f".{name.rpartition('.')[2]}(" not in PAGES:
        return  # a method that no page calls: one line is enough
    if of_class and issubclass(thing, Exception):
        return
    wanted = [member.name for member in thing] if of_class and hasattr(thing, "__members__") else parameters(thing)
    explained = entries(told.get("Args", "")) | (entries(told.get("Attributes", "")) if of_class else {})
    assert set(wanted) <= set(explained), f"{name}: Args or Attributes of {sorted(set(wanted) - set(explained))}"
    for parameter, text in explained.items():
        if not of_class and "Tensor" in str(inspect.signature(thing).parameters[parameter].annotation).split(".")[-1:]:
            assert re.search(r"\[[\w, …]+\]", text), f"{name}: the shape of {parameter}"
    if not of_class:
        gives = inspect.signature(thing).return_annotation
        a_property = isinstance(inspect.getattr_static(found(name.split(".")[0]), name.split(".")[-1], None), property)
        assert a_property or (gives in (None, "None")) != ("Returns" in told), f"{name}: Returns"
    made = (
        [
            vars(thing)[key]
            for key in (("__post_init__",) if dataclasses.is_dataclass(thing) else ("__init__",))
            if key in vars(thing)
        ]
        if of_class
        else [thing]
    )
    if not made:
        return
    source = ast.parse(textwrap.dedent(inspect.getsource(made[0])))
    if any(isinstance(node, ast.Raise) and "GdnfuseError" in ast.unparse(node) for node in ast.walk(source)):
        assert "GdnfuseError" in told.get("Raises", ""), f"{name}: Raises"


@pytest.mark.parametrize("name", OF_PAPERS)
def test_what_is_of_a_paper_names_it(name):
    assert re.search(r"arXiv:\d{4}\.\d{5}|https://", sections(inspect.cleandoc(found(name).__doc__))[1]["Source"])


def test_help_shows_the_real_signature():
    told = inspect.signature(gdnfuse.compile).parameters
    assert {"model", "mode", "state_dtype", "prefixes", "speculate", "tensor_parallel"} <= set(told)
    assert all(callable(getattr(gdnfuse, name)) or name == "capture" for name in gdnfuse.__all__)
