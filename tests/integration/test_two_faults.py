"""Every order of events of one hand-over with two faults in it: minutes where processors are busy,
so that the quick tests walk one fault alone (``tests/property/test_transfer_model.py``)."""

from __future__ import annotations

import pytest

from tests.property.test_transfer_model import World, walk


@pytest.mark.timeout(900)
def test_every_order_of_events_with_two_faults_comes_to_rest() -> None:
    num_states, num_at_rest = walk(World(num_faults=2, may_stop_short=False))
    print(f"\n{num_states} states, {num_at_rest} at rest")
    assert num_states > 50_000
    assert num_at_rest > 1
