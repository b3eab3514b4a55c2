"""Two 4-bit codes in a byte: channel j low, channel ``j + ceil(channels / 2)`` high."""

from __future__ import annotations

from typing import Any

from kv_transfer.codecs.float_forms import U8
from kv_transfer.codecs.jit import kernel


def packed_width(channels: int) -> int:
    return -(-channels // 2)


@kernel
def pack_rows(codes: Any, packed: Any) -> None:
    """codes: ``[tokens, channels]``, each below 16. packed: ``[tokens, ceil(channels / 2)]``."""
    half = packed.shape[1]
    rest = codes.shape[1] - half
    for token in range(codes.shape[0]):
        row, to = codes[token], packed[token]
        for j in range(rest):
            to[j] = row[j] | row[j + half] << 4
        if rest < half:
            to[rest] = row[rest]


@kernel
def unpack_rows(packed: Any, codes: Any) -> None:
    """An odd number of channels leaves 4 bits of each row unread."""
    half = packed.shape[1]
    rest = codes.shape[1] - half
    for token in range(codes.shape[0]):
        row, to = packed[token], codes[token]
        for j in range(half):
            to[j] = row[j] & 15
        for j in range(rest):
            to[j + half] = row[j] >> 4


def pack_rows_reference(codes: U8, packed: U8) -> None:
    half = packed.shape[1]
    packed[:] = codes[:, :half]
    packed[:, : codes.shape[1] - half] |= codes[:, half:] << 4


def unpack_rows_reference(packed: U8, codes: U8) -> None:
    half = packed.shape[1]
    codes[:, :half] = packed & 15
    codes[:, half:] = packed[:, : codes.shape[1] - half] >> 4
