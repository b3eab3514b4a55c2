from __future__ import annotations

import math

import pytest

from baton.protocol.slo import RequestTimes, Slo, goodput_rps, percentile

SLO = Slo(ttft_ms=250.0, tpot_ms=100.0)


def test_the_formulas_on_numbers_worked_by_hand() -> None:
    times = RequestTimes(10.0, (10.25, 10.375, 10.5, 10.625))
    assert times.ttft_s == 0.25
    assert times.tpot_s == 0.125
    assert times.tbt_s == [0.125, 0.125, 0.125]


def test_tpot_is_the_mean_gap_behind_the_first_token() -> None:
    times = RequestTimes(0.0, (1.0, 1.5, 4.0))
    assert times.tpot_s == 1.5
    assert times.tbt_s == [0.5, 2.5]


def test_one_token_has_no_gap() -> None:
    times = RequestTimes(0.0, (0.125,))
    assert times.tpot_s is None
    assert times.tbt_s == []
    assert times.meets(SLO)


@pytest.mark.parametrize(
    ("times", "meets"),
    [
        (RequestTimes(0.0, (0.25, 0.3125)), True),
        (RequestTimes(0.0, (0.5, 0.5625)), False),
        (RequestTimes(0.0, (0.25, 0.375)), False),
        (RequestTimes(0.0, ()), False),
        (RequestTimes(0.0, (0.1, 0.15), ok=False), False),
    ],
)
def test_a_request_meets_its_limits_or_not(times: RequestTimes, meets: bool) -> None:
    assert times.meets(SLO) is meets


def test_goodput_counts_what_met_every_limit() -> None:
    good, late = RequestTimes(0.0, (0.25,)), RequestTimes(0.0, (0.5,))
    assert goodput_rps([good, late, good], SLO, 4.0) == 0.5


def test_percentiles_interpolate_between_closest_ranks() -> None:
    values = [40.0, 10.0, 20.0, 30.0]
    assert percentile(values, 0) == 10.0
    assert percentile(values, 50) == 25.0
    assert percentile(values, 90) == pytest.approx(37.0)
    assert percentile(values, 100) == 40.0
    assert percentile([7.0], 99) == 7.0
    assert math.isnan(percentile([], 50))
