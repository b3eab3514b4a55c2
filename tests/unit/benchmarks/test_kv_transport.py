"""The benchmark of KV transports says what it measured."""

from __future__ import annotations

from benchmarks.kv_transport import Rate, bars_of, said_of


def rate(way: str, frame_mib: int, lands: bool, gb_s: float) -> Rate:
    return Rate(way, frame_mib, lands, gb_s, 2 * gb_s, (gb_s, 2 * gb_s))


def test_bars_are_of_the_largest_frames_over_what_lands():
    rates = [
        rate(way, mib, lands, gb_s * mib)
        for mib in (1, 16)
        for way, lands, gb_s in (
            ("memcpy", True, 10.0),
            ("socket", True, 4.0),
            ("shared_memory", False, 8.0),
            ("shared_memory", True, 5.0),
            ("zeromq", False, 3.6),
            ("zeromq", True, 2.0),
        )
    ]
    assert [(b.way, b.over, b.lands, b.ratio) for b in bars_of(rates)] == [
        ("zeromq", "socket", False, 0.9),
        ("zeromq", "socket", True, 0.5),
        ("shared_memory", "memcpy", False, 0.8),
        ("shared_memory", "memcpy", True, 0.5),
    ]
    assert said_of(bars_of(rates)[1]).endswith("at least 0.8 missed")
