"""What is said of versions that are tested, and of others."""

import pytest
import torch

import gdnfuse
from gdnfuse import versions


@pytest.mark.parametrize(("version", "warned"), [("5.16.1", True), ("4.57.0", True), ("5.17.0", False), ("none", False)])
def test_a_version_that_is_too_old_is_named_with_the_one_that_is_required(version, warned, monkeypatch):
    """The backend logs these sentences when it is loaded."""
    monkeypatch.setattr(versions, "version", lambda package: version if package == "transformers" else "2.13.0+cpu")
    sentences = versions.too_old()
    assert len(sentences) == warned
    assert all(s == f"transformers must be 5.17 or newer, found {version}: pip install 'transformers>=5.17'." for s in sentences)
    if warned:  # before any work: caches and configs of another version are not what it knows
        with pytest.raises(gdnfuse.GdnfuseError, match=f"found {version}"):
            gdnfuse.compile(torch.nn.Linear(2, 2))
