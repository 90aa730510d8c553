"""Shared by all tests: a fresh compiler and an empty report list for each, and no accidental gradients."""

import functools
import gc
import logging
import os

os.environ["GDNFUSE_CACHE"] = os.path.join(os.path.dirname(__file__), "nowhere")  # what somebody tuned here changes no test
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a process that compiles beside this one first has to import torch

import pytest
import torch

import gdnfuse
from tests.frames import with_room

pytest.register_assert_rewrite("tests.pages")  # so that what it asserts is shown

gc.set_threshold(300_000, 10, 10)  # imports and tracing make objects fast, and keep most
# One worker per core already: threads of one worker that spin for those of another made toy models ten times slower.
torch.set_num_threads(1)

# pytest listens to every logger that does not propagate, and torch writes its structured trace once somebody listens. Nor does
# anybody read what Dynamo writes about each side effect of a call.
logging.getLogger("torch.__trace").handlers.clear()
logging.getLogger("torch.__trace").propagate = True
if hasattr(torch._dynamo.config, "side_effect_replay_policy"):
    torch._dynamo.config.side_effect_replay_policy = "silent"
# Behind each compilation torch collects garbage and, for its log, empties the processor's cache to time the guards.
if hasattr(torch._dynamo.config, "run_gc_after_compile"):
    torch._dynamo.config.run_gc_after_compile = False
torch._dynamo.guards.profile_guard_manager = lambda *args: 0.0


_runtest, _frozen = pytest.Function.runtest, functools.cache(gc.get_freeze_count)
pytest.Function.runtest = lambda test: with_room(_runtest, test)


def _recounted(change):
    """Whoever compiles asks whether anything is frozen. To count that is to walk through all of it, and only these change it."""

    def changed():
        change()
        _frozen.cache_clear()

    return changed


gc.get_freeze_count, gc.freeze, gc.unfreeze = _frozen, _recounted(gc.freeze), _recounted(gc.unfreeze)


def pytest_collection_finish():
    """Modules stay, so the collector need not walk through them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    gdnfuse.clear_reports()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def set_aside():
    """For tests that collect garbage themselves: a second at a time went into what torch has kept of all tests before.

    A compilation leaves some thousand objects that C++ holds (a symbolic size in a fake tensor, which Python cannot look into).
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def decode_report():
    """The report of a decode step after 8 tokens of a model of three layers in float32, for a GPU."""
    from gdnfuse import models
    from tests.models import zoo

    config = zoo.causal_lm().config
    (report,) = models.trace(models.meta_model(config, torch.float32), prompt=8, target="cuda")
    return report
