from __future__ import annotations

import math

import pytest

from baton.protocol.slo import Slo
from benchmarks.cpu import CpuSnapshot, shares
from benchmarks.load_job import RequestRecord
from benchmarks.metrics import Segment, Summary, quantiles, ratio, summarise

SLO = Slo(ttft_ms=100, tpot_ms=20)


def record(
    arrival_s: float, *gaps_ms: float, error: str = "", is_measured: bool = True
) -> RequestRecord:
    """The first gap is TTFT."""
    times: list[float] = []
    for gap in gaps_ms:
        times.append((times[-1] if times else arrival_s) + gap / 1e3)
    return RequestRecord(
        arrival_s=arrival_s,
        sent_s=arrival_s + 0.001,
        is_measured=is_measured,
        token_times_s=tuple(times),
        error=error,
        hop_ms={"prefill": 2 * gaps_ms[0]} if gaps_ms else {},
    )


def segment(*records: RequestRecord, repeat: int = 0, name: str = "A") -> Segment:
    return Segment(name, 2.0, repeat, 1.0, 4.0, records, {"deployment": 0.5, "foreign": 0.1})


def summary(*segments: Segment) -> Summary:
    return summarise(segments, SLO)


def test_latencies_are_of_complete_measured_requests() -> None:
    found = summary(
        segment(
            record(1.0, 50, 30, 10),
            record(2.0, 70, 10, 10),
            record(2.0, 9_000, 1, error="deadline_exceeded"),
            record(0.5, 8_000, 1, is_measured=False),
        )
    )
    assert (found.num_requests, found.num_ok) == (3, 2)
    assert found.errors == {"deadline_exceeded": 1}
    assert found.ttft_ms.p50 == pytest.approx(60)
    assert found.tpot_ms.p50 == pytest.approx(15)
    assert found.tbt_ms.num == 4
    assert found.second_token_gap_ms.p50 == pytest.approx(20)
    assert found.hop_ms["prefill"].num == 3
    assert found.client_lag_ms.p99 == pytest.approx(1)


def test_goodput_counts_who_met_both_limits() -> None:
    good, slow_first, slow_rest = record(1.0, 90, 15), record(1.5, 110, 5), record(2.0, 50, 25)
    failed = record(2.5, 1, 1, error="unavailable")
    found = summary(
        segment(good, slow_first, slow_rest, failed), segment(good, good, good, repeat=1)
    )
    assert found.goodput_rps == pytest.approx(4 / 8)
    assert found.goodput_rps_of_repeats == pytest.approx((1 / 4, 3 / 4))
    assert found.attainment == pytest.approx(4 / 7)


def test_throughput_counts_tokens_inside_the_window_whoever_asked() -> None:
    warm = record(0.2, 500, 500, is_measured=False)  # tokens at 0.7 and 1.2 s
    late = record(4.9, 50, 100)  # tokens at 4.95 and 5.05 s
    assert summary(segment(warm, late)).output_tokens_per_s == pytest.approx(2 / 4)


def test_one_token_answers_have_no_tpot() -> None:
    found = summary(segment(record(1.0, 50)))
    assert (found.tpot_ms.num, found.tbt_ms.num) == (0, 0)
    assert math.isnan(found.tpot_ms.p50)
    assert found.goodput_rps == pytest.approx(1 / 4)


def test_nothing_arrived() -> None:
    found = summary(segment())
    assert found.num_requests == 0
    assert found.goodput_rps == 0
    assert math.isnan(found.attainment)


def test_ratio_divides_by_the_baseline() -> None:
    fast = summary(segment(record(1.0, 50, 10)))
    slow = summary(segment(record(1.0, 80, 40), name="B"))
    found = ratio(fast, slow)
    assert (found.deployment, found.baseline) == ("A", "B")
    assert found.ttft_p50 == pytest.approx(50 / 80)
    assert found.tbt_p99 == pytest.approx(10 / 40)
    assert math.isnan(found.goodput), "the baseline met nothing"


def test_quantiles() -> None:
    found = quantiles([float(v) for v in range(101)])
    assert (found.p50, found.p90, found.p99, found.num) == (50, 90, 99, 101)


def test_cpu_shares_leave_the_rest_to_others() -> None:
    before = CpuSnapshot(100.0, 40.0, {"deployment": 10.0, "client": 1.0})
    after = CpuSnapshot(120.0, 54.0, {"deployment": 18.0, "client": 2.0})
    assert shares(before, after) == pytest.approx(
        {"deployment": 0.4, "client": 0.05, "foreign": 0.25, "busy": 0.7}
    )
