import numpy as np
import pytest

from baton.engine.philox import philox4x32, uniforms

# Known answers published with Random123 (philox4x32, 10 rounds).
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def column(words: list[int]) -> np.ndarray:
    return np.array(words, dtype=np.uint64)[:, None]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    assert philox4x32(column(counter), column(key))[:, 0].tolist() == words


def test_vectorised_over_keys_and_counters() -> None:
    counters = np.concatenate([column(c) for c, _, _ in KNOWN], axis=1)
    keys = np.concatenate([column(k) for _, k, _ in KNOWN], axis=1)
    expected = np.concatenate([column(w) for _, _, w in KNOWN], axis=1)
    assert np.array_equal(philox4x32(counters, keys), expected)


def test_uniforms_use_all_of_seed_and_position() -> None:
    seeds = [0, 1, 2**32, 2**63 - 1, 0, 0, 0]
    positions = [0, 0, 0, 0, 1, 2**32, 2**40]
    found = uniforms(seeds, positions)
    assert len(set(found.tolist())) == len(seeds)
    assert found[0] == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53


def test_uniforms_fill_the_interval() -> None:
    found = uniforms(np.full(200_000, 42), np.arange(200_000))
    assert found.min() >= 0
    assert found.max() < 1
    counts, _ = np.histogram(found, bins=100, range=(0, 1))
    chi_square = ((counts - 2_000) ** 2 / 2_000).sum()
    assert chi_square < 158.0  # 99 degrees of freedom: exceeded once in 7,000 keys
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.01
