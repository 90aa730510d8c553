"""Kernels under Triton's interpreter on random shapes; test_shapes runs this file in a process with TRITON_INTERPRET set."""

import kernel_cases
import pytest
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from interpreted import TOLERANCE

from gdnfuse.errors import Refused
from gdnfuse.kernels import implementations
from tests.fuzz import shapes
from tests.fuzz.test_near_misses import ASKED

slow = settings(
    max_examples=max(3, ASKED // 20), deadline=None, derandomize=not ASKED, suppress_health_check=list(HealthCheck), database=None
)


@pytest.mark.parametrize("op", shapes.MAKE)
@slow
@given(st.data())
def test_random_shapes(op, data):
    """The reference's results, nothing written beside them, whatever surrounds the inputs."""
    case = data.draw(shapes.calls(op, 2**13, 2))
    note(str(case))
    kernel = implementations()[op]
    args, kwargs = case.call()
    try:
        kernel.supports(*args, **kwargs)
    except Refused:
        assume(False)
    kernel_cases.check(case, kernel.launch, tolerance=TOLERANCE)


@pytest.mark.parametrize("op", shapes.MAKE)
@slow
@given(st.data())
def test_odd_shapes_are_refused_or_right(op, data):
    case = data.draw(shapes.odd_calls(op))
    note(str(case))
    kernel = implementations()[op]
    args, kwargs = case.call()
    try:
        kernel.supports(*args, **kwargs)
    except Refused as e:
        assert e.reason.endswith(".") and len(e.reason.split()) > 4
        return
    kernel_cases.check(case, kernel.launch, tolerance=TOLERANCE)
