"""The scheduler's indexes against full scans of everything they index."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.engine.running_set import RunningSet
from baton.engine.sequence import PRIORITY_ARRIVALS, Sequence
from baton.engine.wait_queue import WaitQueue
from baton.protocol.block_hash import BlockKey
from baton.protocol.sampling import SamplingParams

KEYS = tuple(BlockKey(bytes([n])) for n in range(3))
PICK = st.integers(0, 1_000)


class Indexes(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.queue = WaitQueue()
        self.running = RunningSet()
        self.waiting: list[Sequence] = []
        self.parked: dict[BlockKey, list[Sequence]] = {}
        self.seated: list[Sequence] = []
        self.num_arrived = 0

    @rule(
        priority=st.integers(-1, 2),
        num_tokens=st.integers(1, 9),
        gap=st.sampled_from([1, 1, 1, 8_191]),
    )
    def arrive(self, priority: int, num_tokens: int, gap: int) -> None:
        sampling = SamplingParams()
        sequence = Sequence(f"r{self.num_arrived}", (1,) * num_tokens, [], sampling, priority)
        sequence.arrived(self.num_arrived)
        # Gaps in the order of arrival bring ties between levels of priority.
        self.num_arrived += gap
        self.queue.push(sequence)
        self.waiting.append(sequence)

    @precondition(lambda self: self.waiting)
    @rule()
    def seat_the_first(self) -> None:
        sequence = self.queue.peek()
        assert sequence is not None
        self.queue.remove(sequence)
        self.waiting.remove(sequence)
        self.running.add(sequence)
        self.seated.append(sequence)

    @precondition(lambda self: self.waiting)
    @rule(key=st.sampled_from(KEYS))
    def park_the_first(self, key: BlockKey) -> None:
        sequence = self.queue.peek()
        assert sequence is not None
        self.queue.park(sequence, key)
        self.waiting.remove(sequence)
        self.parked.setdefault(key, []).append(sequence)

    @rule(key=st.sampled_from(KEYS))
    def wake(self, key: BlockKey) -> None:
        self.queue.wake(key)
        self.waiting += self.parked.pop(key, [])

    @precondition(lambda self: self.waiting or self.parked)
    @rule(pick=PICK)
    def drop(self, pick: int) -> None:
        places = [self.waiting, *self.parked.values()]
        place = places[pick % len(places)]
        if place:
            sequence = place.pop(pick % len(place))
            self.queue.remove(sequence)
        self.parked = {key: left for key, left in self.parked.items() if left}

    @precondition(lambda self: self.seated)
    @rule(pick=PICK, comes_back=st.booleans())
    def unseat(self, pick: int, comes_back: bool) -> None:
        sequence = self.seated.pop(pick % len(self.seated))
        self.running.remove(sequence)
        if comes_back:
            sequence.output_ids.append(5)
            self.queue.push(sequence)
            self.waiting.append(sequence)

    @precondition(lambda self: self.seated)
    @rule()
    def unseat_the_last(self) -> None:
        last = self.running.least_urgent
        assert last.urgency == max(s.urgency for s in self.seated)
        self.running.remove(last)
        self.seated.remove(last)

    @invariant()
    def equal_the_scan(self) -> None:
        parked = [s for beside in self.parked.values() for s in beside]
        everyone = self.waiting + parked
        queue, running = self.queue, self.running
        assert queue.check_integrity() == running.check_integrity() == []
        assert (len(queue), queue.num_parked) == (len(everyone), len(parked))
        assert queue.num_tokens == sum(s.num_tokens for s in everyone)
        assert queue.ids() == {s.seq_id for s in everyone}
        assert set(queue.parked_at()) == set(self.parked)
        first = queue.peek()
        assert (first is None) is (not self.waiting)
        assert first is None or first.urgency == min(s.urgency for s in self.waiting)
        assert len(running) == len(self.seated)
        assert [s.urgency for s in running] == sorted(s.urgency for s in self.seated)
        assert set(running) == set(self.seated)
        assert all(s in running and s not in queue for s in self.seated)
        assert all(s in queue and s not in running for s in everyone)
        assert len(queue._heap) <= 2 * len(self.waiting) + 64 + len(parked)


TestIndexes = Indexes.TestCase
TestIndexes.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_better_priority_passes_only_so_many_arrivals() -> None:
    """Otherwise a stream of urgent requests would keep a patient one out for ever."""
    queue = WaitQueue()
    patient = Sequence("patient", (1,), [], SamplingParams(), priority=1)
    patient.arrived(0)
    queue.push(patient)
    order = []
    for number in range(1, 2 * PRIORITY_ARRIVALS):
        urgent = Sequence(f"u{number}", (1,), [], SamplingParams(), priority=0)
        urgent.arrived(number)
        queue.push(urgent)
        first = queue.peek()
        assert first is not None
        queue.remove(first)
        order.append(first.seq_id)
        if first is patient:
            break
    assert order[-1] == "patient"
    assert len(order) <= PRIORITY_ARRIVALS + 1
    assert order[: PRIORITY_ARRIVALS - 1] == [f"u{n}" for n in range(1, PRIORITY_ARRIVALS)]
