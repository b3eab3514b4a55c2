from __future__ import annotations

import pytest

from kv_transfer.codecs.contract import Quality
from kv_transfer.floors import allowed, floor_of, may_recompute, quality_class

CODECS = {
    "raw": Quality.EXACT,
    "split": Quality.EXACT,
    "int8": Quality.HIGH,
    "int4": Quality.MEDIUM,
    "kv4": Quality.LOW,
}


@pytest.mark.parametrize(
    ("floor", "names"),
    [
        ("exact", "raw split"),
        ("lossless", "raw split"),
        ("high", "raw split int8"),
        ("medium", "raw split int8 int4"),
        ("low", "raw split int8 int4 kv4"),
    ],
)
def test_a_floor_allows_what_is_not_below_it(floor: str, names: str) -> None:
    assert allowed(CODECS, floor_of(floor, "exact")) == tuple(names.split())


def test_who_names_no_floor_gets_the_default() -> None:
    assert floor_of("", "medium") is Quality.MEDIUM
    assert floor_of("exact", "medium") is Quality.EXACT


def test_a_floor_that_is_not_known_here_is_kept_by_exact_bits() -> None:
    assert floor_of("better than all", "low") is Quality.EXACT


def test_only_the_exact_floor_minds_kv_computed_again() -> None:
    assert not may_recompute(Quality.EXACT, is_deterministic=False)
    assert may_recompute(Quality.EXACT, is_deterministic=True)
    assert may_recompute(Quality.LOSSLESS, is_deterministic=False)


def test_kv_is_worth_as_much_as_the_worst_codec_that_it_came_through() -> None:
    assert quality_class([]) == quality_class([Quality.EXACT, Quality.EXACT]) == "exact"
    assert quality_class([Quality.EXACT, Quality.HIGH]) == "high"
    assert quality_class([Quality.LOW, Quality.HIGH]) == "low"
