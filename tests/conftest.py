"""Shared by all tests: a fresh compiler and an empty report list for each, and no accidental gradients."""

import pytest
import torch

import gdnfuse


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    gdnfuse.clear_reports()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
