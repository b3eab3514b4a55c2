from __future__ import annotations

from itertools import pairwise
from statistics import fmean, median, pstdev

import msgspec
import pytest

from benchmarks.arrivals import Fixed, Lengths, Lognormal, Uniform, poisson, seeded


def test_poisson_has_the_rate_and_the_spread_of_an_exponential() -> None:
    times = poisson(50.0, 200.0, seeded(1, "arrivals"))
    gaps = [b - a for a, b in pairwise(times)]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < 200.0
    assert len(times) == pytest.approx(10_000, rel=0.05)
    assert fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    # Mean and standard deviation are equal for an exponential; 0 for a fixed pace.
    assert pstdev(gaps) == pytest.approx(fmean(gaps), rel=0.05)


def test_a_seed_is_repeatable_and_its_streams_are_apart() -> None:
    assert poisson(5.0, 9.0, seeded(1, "a", 2.0)) == poisson(5.0, 9.0, seeded(1, "a", 2.0))
    assert poisson(5.0, 9.0, seeded(1, "a", 2.0)) != poisson(5.0, 9.0, seeded(2, "a", 2.0))
    assert poisson(5.0, 9.0, seeded(1, "a", 2.0)) != poisson(5.0, 9.0, seeded(1, "b", 2.0))


def test_no_arrivals_in_no_time() -> None:
    assert poisson(1e-9, 1.0, seeded(1)) == []


def test_fixed_lengths() -> None:
    lengths = Fixed(tokens=7)
    assert {lengths.draw(seeded(i)) for i in range(20)} == {7}
    assert lengths.most == 7


def test_uniform_lengths_reach_both_ends() -> None:
    lengths = Uniform(min=3, max=6)
    random = seeded(1)
    assert {lengths.draw(random) for _ in range(500)} == {3, 4, 5, 6}
    assert lengths.most == 6


def test_lognormal_lengths_keep_their_median_and_their_edges() -> None:
    lengths = Lognormal(median=200.0, sigma=0.8, min=50, max=1_000)
    random = seeded(1)
    drawn = [lengths.draw(random) for _ in range(5_000)]
    assert median(drawn) == pytest.approx(200, rel=0.05)
    assert min(drawn) == 50
    assert max(drawn) == 1_000 == lengths.most
    # To the right of the median there is more room than to the left.
    assert fmean(drawn) > 1.15 * median(drawn)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"distribution": "fixed", "tokens": 4}, Fixed(tokens=4)),
        ({"distribution": "uniform", "min": 1, "max": 2}, Uniform(min=1, max=2)),
    ],
)
def test_the_distribution_key_chooses(table: dict[str, object], expected: Lengths) -> None:
    assert msgspec.convert(table, Lengths) == expected
