"""The random runs of ``tests/property/test_handover.py``, several times as many."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.test_handover import HandoverMachine, long_run


class TestManyHandovers(HandoverMachine.TestCase):  # type: ignore[misc]
    settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=120, deadline=None)
def test_many_long_runs_with_few_faults_come_to_rest(seed: int) -> None:
    long_run(seed)
