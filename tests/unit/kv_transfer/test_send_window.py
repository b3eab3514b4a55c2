"""Credits: what is on its way is bounded, and nothing that is lost keeps the window shut."""

from __future__ import annotations

import pytest

from baton.protocol.messages import KvProgress
from kv_transfer.window import MAX_FRAMES, MIN_FRAMES, STALL_S, Window

FRAME = 1_000


def full() -> Window:
    window = Window(FRAME)
    for _ in range(MIN_FRAMES):
        assert window.has_room(FRAME, 0.0)
        window.sent("r/0", 1, FRAME, 0.0)
    assert not window.has_room(FRAME, 0.0)
    return window


def written(num_frames: int, *, epoch: int = 1, transfer: str = "r/0") -> KvProgress:
    return KvProgress(transfer, epoch, num_frames, num_frames * FRAME, 0.0)


def test_what_is_written_makes_room_and_saying_it_again_makes_no_more() -> None:
    window = full()
    assert window.progressed(written(1), 0.1) == FRAME
    assert window.progressed(written(1), 0.2) == 0
    assert window.num_in_flight == (MIN_FRAMES - 1) * FRAME
    assert window.progressed(written(99), 0.3) == (MIN_FRAMES - 1) * FRAME, "no more than was sent"
    assert window.num_in_flight == 0


@pytest.mark.parametrize("stranger", [written(1, epoch=2), written(1, transfer="r/1")])
def test_progress_of_other_epochs_and_transfers_makes_no_room(stranger: KvProgress) -> None:
    window = full()
    assert window.progressed(stranger, 0.1) == 0
    assert not window.has_room(FRAME, 0.1)


def test_a_window_in_which_nothing_moves_opens_by_itself() -> None:
    window = full()
    assert not window.has_room(FRAME, STALL_S)
    assert window.has_room(FRAME, STALL_S + 0.1)
    window.sent("r/0", 1, FRAME, STALL_S + 0.1)
    assert window.progressed(written(1), STALL_S + 0.2) == FRAME
    assert window.num_in_flight == 0


def test_frames_of_a_void_epoch_and_of_a_closed_transfer_are_not_counted() -> None:
    window = full()
    window.sent("r/0", 2, FRAME, 0.1)
    assert window.num_in_flight == FRAME
    window.sent("r/1", 1, FRAME, 0.1)
    window.closed("r/0")
    window.closed("r/0")
    assert window.num_in_flight == FRAME


def test_a_frame_larger_than_the_window_goes_alone() -> None:
    window = Window(FRAME)
    assert window.has_room(100 * FRAME, 0.0)
    window.sent("r/0", 1, 100 * FRAME, 0.0)
    assert not window.has_room(1, 0.0)


def test_the_window_follows_the_rate_between_its_bounds() -> None:
    window = full()
    window.progressed(written(MIN_FRAMES), 1e-6)
    assert window.limit == MAX_FRAMES * FRAME
    for count in range(1, 40):
        window.sent("r/1", 1, FRAME, float(count))
        window.progressed(written(count, transfer="r/1"), count + 0.9)
    assert window.limit == MIN_FRAMES * FRAME
