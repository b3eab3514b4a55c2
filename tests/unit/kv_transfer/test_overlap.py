from __future__ import annotations

import pytest

from kv_transfer.overlap import PushRate, StepRate, exposed_s, layer_marks, parts_of


@pytest.mark.parametrize(
    ("compute_s", "link_s", "backlog_s", "parts"),
    [
        pytest.param(0.1, 0.1, 0.0, 6, id="a link as slow as the step"),
        pytest.param(0.1, 1.0, 0.0, 6, id="a slower one: its beginning is won"),
        pytest.param(0.1, 0.001, 0.0, 1, id="nothing to hide"),
        pytest.param(0.002, 0.0005, 0.0, 1, id="a short prompt"),
        pytest.param(0.1, 0.1, 5.0, 1, id="the link is busy until long after"),
    ],
)
def test_parts_pay_where_the_link_is_worth_hiding(
    compute_s: float, link_s: float, backlog_s: float, parts: int
) -> None:
    assert parts_of(6, compute_s, link_s, backlog_s=backlog_s, part_s=0.0006) == parts


def test_the_switch_point_grows_with_what_a_part_costs() -> None:
    """The fewest milliseconds on the link for which parts are taken."""
    switches = [
        next(ms for ms in range(1, 200) if parts_of(6, 0.2, ms / 1e3, part_s=cost) > 1)
        for cost in (0.0002, 0.001, 0.005)
    ]
    assert switches == sorted(set(switches))


def test_a_quarter_is_exposed_of_a_link_that_takes_as_long_as_the_step() -> None:
    whole = exposed_s(1, 0.1, 0.1, 0.0, 0.0)
    assert exposed_s(4, 0.1, 0.1, 0.0, 0.0) == pytest.approx(whole / 4)


def test_marks_cut_the_layers_evenly_and_leave_the_last_part_to_the_step() -> None:
    assert layer_marks(6, 1) == ()
    assert layer_marks(6, 2) == (3,)
    assert layer_marks(6, 4) == (1, 3, 4)
    assert layer_marks(6, 6) == (1, 2, 3, 4, 5)


def test_the_push_rate_is_of_the_time_that_anything_was_on_its_way() -> None:
    rate = PushRate()
    rate.pushed("a/0", 0, [100, 100], 1.0)
    rate.written("a/0", 1, 2.0)
    assert (rate.bytes_per_s, rate.backlog_s) == (100.0, 1.0)
    rate.written("a/0", 1, 2.5)
    rate.written("a/0", 2, 3.0)
    assert (rate.bytes_per_s, rate.backlog_s) == (100.0, 0.0)
    rate.pushed("a/0", 2, [300], 10.0)
    rate.written("a/0", 3, 11.0)
    assert rate.bytes_per_s == pytest.approx(160.0)
    rate.pushed("a/0", 3, [500], 12.0)
    rate.closed("a/0")
    rate.written("a/0", 4, 13.0)
    assert rate.backlog_s == 0.0


def test_the_step_rate_is_smooth() -> None:
    rate = StepRate()
    rate.ran(10, 1.0)
    assert rate.seconds_per_token == 0.1
    rate.ran(10, 2.0)
    assert rate.seconds_per_token == pytest.approx(0.13)
