"""What answers say about a link, and what they cannot."""

from __future__ import annotations

from random import Random

import pytest

from kv_transfer.link_estimate import Delivery, LinkEstimate

MB = 1_000_000


class Link:
    """One decoder behind a link; ``send`` gives the answer's time."""

    def __init__(self, bytes_per_s: float, latency_s: float = 5e-4) -> None:
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self._linked_at = self._decoded_at = 0.0

    def send(self, num_coded: int, sent_at: float, decode_s: float) -> float:
        self._linked_at = max(self._linked_at, sent_at) + num_coded / self.bytes_per_s
        self._decoded_at = max(self._decoded_at, self._linked_at) + decode_s
        return self._decoded_at + self.latency_s


def run(
    link: Link,
    estimate: LinkEstimate,
    sizes: list[int],
    *,
    gap_s: float = 0.0,
    decode_s: float = 0.0,
    now: float = 0.0,
    jitter_s: float = 0.0,
) -> float:
    random, heard_at = Random(1), now
    for size in sizes:
        at = link.send(size, now, decode_s) + random.random() * jitter_s
        heard_at = max(heard_at, at)
        estimate.delivered(Delivery(size, now, decode_s), heard_at)
        now += gap_s
    return heard_at


@pytest.mark.parametrize("bytes_per_s", [6.25e6, 125e6, 1.25e9])
@pytest.mark.parametrize("latency_s", [1e-4, 1e-2])
def test_a_busy_link_tells_its_rate(bytes_per_s: float, latency_s: float) -> None:
    estimate = LinkEstimate()
    run(Link(bytes_per_s, latency_s), estimate, [MB] * 12, jitter_s=1e-4)
    assert estimate.bytes_per_s(1e9, None) == pytest.approx(bytes_per_s, rel=0.2)


def test_small_frames_on_an_idle_link_do_not_say_that_it_is_slow() -> None:
    estimate = LinkEstimate()
    heard_at = run(Link(125e6), estimate, [MB] * 12)
    before = estimate.bytes_per_s(heard_at, None)
    run(Link(125e6), estimate, [8_000] * 50, gap_s=4e-3, decode_s=1e-3, now=1.0)
    assert estimate.bytes_per_s(2.0, None) > 0.8 * before


def test_a_slow_decoder_does_not_say_that_the_link_is_slow() -> None:
    estimate = LinkEstimate()
    heard_at = run(Link(1e9), estimate, [MB] * 12)
    run(Link(1e9), estimate, [100_000] * 30, decode_s=5e-3, now=heard_at + 0.1)
    assert estimate.bytes_per_s(10.0, None) > 5e8


def test_it_follows_a_link_down_and_up_within_a_few_answers() -> None:
    estimate = LinkEstimate()
    now = run(Link(125e6), estimate, [MB] * 12) + 0.01
    now = run(Link(6.25e6), estimate, [MB] * 3, now=now) + 0.01
    assert estimate.bytes_per_s(now, None) == pytest.approx(6.25e6, rel=0.3)
    now = run(Link(125e6), estimate, [MB // 4] * 6, now=now)
    assert estimate.bytes_per_s(now, None) == pytest.approx(125e6, rel=0.3)


def test_small_frames_find_out_that_the_link_has_become_fast() -> None:
    estimate = LinkEstimate()
    sizes = [MB, *[20_000] * 20]
    now = run(Link(6.25e6), estimate, sizes, gap_s=4e-3) + 0.1
    assert estimate.bytes_per_s(now, None) == pytest.approx(6.25e6, rel=0.3)
    now = run(Link(125e6), estimate, [20_000] * 10, gap_s=4e-3, now=now)
    assert estimate.bytes_per_s(now, None) > 25e6


def test_a_frame_that_does_not_arrive_counts_before_it_does() -> None:
    estimate = LinkEstimate()
    now = run(Link(125e6), estimate, [MB] * 12) + 0.1
    frame = Delivery(MB, now, 0.0)
    assert estimate.bytes_per_s(now + 0.005, frame) > 1e8
    assert estimate.bytes_per_s(now + 0.15, frame) < 2e7
    assert estimate.bytes_per_s(now + 0.15, None) > 1e8, "what it believes itself is as before"


def test_one_answer_raises_it_fourfold_at_most() -> None:
    estimate = LinkEstimate()
    now = run(Link(1e6), estimate, [MB] * 6) + 0.1
    before = estimate.bytes_per_s(now, None)
    run(Link(1e9), estimate, [MB], now=now)
    assert estimate.bytes_per_s(now, None) <= 4 * before


def test_before_any_answer_there_is_a_prior() -> None:
    estimate = LinkEstimate()
    assert not estimate.is_known
    assert estimate.bytes_per_s(5.0, Delivery(MB, 0.0, 0.0)) == 125e6
