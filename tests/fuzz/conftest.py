import sys
from pathlib import Path

import pytest

from gdnfuse.passes.lift import prompt_attention

# Calls of kernels (kernel_cases, interpreted) are imported by name, as beside them.
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))


@pytest.fixture(autouse=True)
def every_rule(monkeypatch):
    """Also those that are off until their kernels are measured."""
    monkeypatch.setattr(prompt_attention, "KERNEL", True)
