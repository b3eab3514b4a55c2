"""Integers for groups of 64 tokens of a channel: the arithmetic of ``int8`` and ``int4``.

For a group with least value ``lo`` and greatest ``hi``:

    step = max((hi - lo) / levels, max(-lo, hi) / 2**14), up to the next bfloat16
    zero = round(lo / step)
    code = round(x / step) - zero, kept within 0..levels
    x'   = (code + zero) * step

Measured on baton-tiny, steps per channel and group leave half the error of steps per token and
head, for K and for V; the zero is an integer, so 32 bits describe a group. The second term keeps
zeros within 16 bits. A group below 2**-100 has step 0 and becomes 0. Division is one reciprocal,
rounded; products and sums are float32, one at a time. Round is half to even, by adding and taking
off 1.5 * 2**23.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs.float_forms import U8
from kv_transfer.codecs.float_values import F32, bits_of_float, float_of
from kv_transfer.codecs.jit import kernel, primitive

GROUP_TOKENS = 64
S, W = np.float32, np.uint32
_ROUND = S(1.5 * 2.0**23)
_NEARLY_ZERO = S(2.0**-100)
_LEAST_STEP = S(2.0**-14)

U16 = NDArray[np.uint16]
I16 = NDArray[np.int16]


def num_groups(num_tokens: int) -> int:
    return -(-num_tokens // GROUP_TOKENS)


def quantise_reference(x: F32, levels: int, steps: U16, zeros: I16, codes: U8) -> None:
    """x: ``[tokens, channels]``, tame. steps (bfloat16), zeros: ``[groups, channels]``.
    codes: ``[tokens, channels]``."""
    for group in range(len(steps)):
        rows = slice(group * GROUP_TOKENS, (group + 1) * GROUP_TOKENS)
        low, high = x[rows].min(axis=0), x[rows].max(axis=0)
        size = np.maximum(-low, high)
        wanted = np.maximum((high - low) * S(1 / levels), size * _LEAST_STEP)
        steps[group] = np.where(size < _NEARLY_ZERO, 0, (wanted.view(W) + W(0xFFFF)) >> W(16))
        step = (steps[group].astype(W) << W(16)).view(S)
        inverse = np.where(step > 0, S(1) / np.where(step > 0, step, S(1)), S(0))
        zero = (low * inverse + _ROUND) - _ROUND
        zeros[group] = zero
        code = ((x[rows] * inverse + _ROUND) - _ROUND) - zero
        codes[rows] = np.clip(code, S(0), S(levels))


def restore_reference(codes: U8, steps: U16, zeros: I16, x: F32) -> None:
    """Fills ``x``."""
    group_of = np.arange(len(x)) // GROUP_TOKENS
    step = (steps.astype(W) << W(16)).view(S)[group_of]
    with np.errstate(invalid="ignore", over="ignore"):
        x[:] = (codes.astype(np.int32) + zeros.astype(np.int32)[group_of]).astype(S) * step


def quantise(x: F32, levels: int, steps: U16, zeros: I16, codes: U8) -> None:
    """As ``quantise_reference``."""
    assert steps.shape == zeros.shape == (num_groups(len(x)), x.shape[1])
    assert codes.shape == x.shape
    _quantise(x, S(levels), S(1 / levels), steps, zeros, codes)


def restore(codes: U8, steps: U16, zeros: I16, x: F32) -> None:
    """As ``restore_reference``."""
    assert steps.shape == zeros.shape == (num_groups(len(x)), x.shape[1])
    assert codes.shape == x.shape
    _restore(codes, steps, zeros, x)


@primitive
def _limits(x: Any, begin: Any, end: Any, low: Any, high: Any) -> None:
    for channel in range(low.size):
        low[channel] = x[begin, channel]
        high[channel] = x[begin, channel]
    for token in range(begin + 1, end):
        row = x[token]
        for channel in range(low.size):
            value = row[channel]
            low[channel] = value if value < low[channel] else low[channel]
            high[channel] = value if value > high[channel] else high[channel]


@kernel
def _quantise(x: Any, levels: Any, share: Any, steps: Any, zeros: Any, codes: Any) -> None:
    low, high = np.empty(x.shape[1], np.float32), np.empty(x.shape[1], np.float32)
    inverse, zero = np.empty(x.shape[1], np.float32), np.empty(x.shape[1], np.float32)
    for group in range(steps.shape[0]):
        begin = group * 64
        end = min(begin + 64, x.shape[0])
        _limits(x, begin, end, low, high)
        for channel in range(low.size):
            size = max(-low[channel], high[channel])
            wanted = max((high[channel] - low[channel]) * share, size * S(2.0**-14))
            bits = (bits_of_float(wanted) + W(0xFFFF)) >> W(16)
            bits = bits if size >= S(2.0**-100) else W(0)
            steps[group, channel] = np.uint16(bits)
            inverse[channel] = S(1) / float_of(bits << W(16)) if bits > W(0) else S(0)
            zero[channel] = (low[channel] * inverse[channel] + S(12582912)) - S(12582912)
            zeros[group, channel] = np.int16(zero[channel])
        for token in range(begin, end):
            row, to = x[token], codes[token]
            for channel in range(low.size):
                code = (row[channel] * inverse[channel] + S(12582912)) - S(12582912)
                code = code - zero[channel]
                code = code if code > S(0) else S(0)
                code = code if code < levels else levels
                to[channel] = np.uint8(np.int32(code))


@kernel
def _restore(codes: Any, steps: Any, zeros: Any, x: Any) -> None:
    step, zero = np.empty(x.shape[1], np.float32), np.empty(x.shape[1], np.int32)
    for group in range(steps.shape[0]):
        for channel in range(step.size):
            step[channel] = float_of(W(steps[group, channel]) << W(16))
            zero[channel] = zeros[group, channel]
        for token in range(group * 64, min(group * 64 + 64, x.shape[0])):
            row, to = codes[token], x[token]
            for channel in range(step.size):
                to[channel] = S(np.int32(row[channel]) + zero[channel]) * step[channel]
