"""Philox4x32-10 (Salmon et al., 2011), vectorised over keys and counters.

A counter-based generator has no state to carry along: the draw of (seed, position) is the same
on every worker, in every batch, after every migration.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
"""Values below 2**32, held in 64 bits so that products do not wrap."""

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox4x32(counter: Words, key: Words) -> Words:
    """counter: ``[4, N]``, key: ``[2, N]``; returns ``[4, N]``. Every word is below 2**32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _32) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _32) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0 = (k0 + _WEYL[0]) & _LOW
        k1 = (k1 + _WEYL[1]) & _LOW
    return np.stack((c0, c1, c2, c3))


def uniforms(seeds: npt.ArrayLike, positions: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits per (seed, position): ``[N]``.

    seeds and positions: ``[N]`` integers from 0 to 2**63 - 1. The seed is the key, the
    position the low half of the counter; the high half stays 0 for uses to come.
    """
    seed = np.asarray(seeds, dtype=np.uint64)
    position = np.asarray(positions, dtype=np.uint64)
    zeros = np.zeros_like(position)
    key = np.stack((seed & _LOW, seed >> _32))
    counter = np.stack((position & _LOW, position >> _32, zeros, zeros))
    words = philox4x32(counter, key)
    high = (words[0] >> np.uint64(5)) << np.uint64(26)
    bits = high | (words[1] >> np.uint64(6))
    scaled: npt.NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return scaled
