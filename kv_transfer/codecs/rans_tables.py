"""Frequency tables as bytes, for codecs that send theirs.

Each table: its first and last used symbol, then the frequencies of all symbols between: below 128
one byte; else the 7 low bits with the top bit set, and a byte with the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs.contract import CodecError
from kv_transfer.codecs.jit import kernel
from kv_transfer.codecs.rans import MAX_ALPHABET, U8


def write_tables(frequencies: NDArray[np.int64]) -> bytes:
    """frequencies: ``[num_tables, 256]``, each row with a symbol that is used."""
    out = np.empty(frequencies.shape[0] * (2 + 2 * MAX_ALPHABET), np.uint8)
    return out[: _write(frequencies, out)].tobytes()


def read_tables(data: U8, num_tables: int) -> NDArray[np.int64]:
    """``[num_tables, 256]`` from exactly these bytes; their sums are not checked here.

    Raises CodecError.
    """
    frequencies = np.zeros((num_tables, MAX_ALPHABET), np.int64)
    if _read(data, frequencies) != data.size:
        raise CodecError(f"{data.size} bytes are not {num_tables} tables of frequencies")
    return frequencies


@kernel
def _write(frequencies: Any, out: Any) -> Any:
    """Bytes written."""
    at = 0
    for row in frequencies:
        used = np.flatnonzero(row)
        first, last = used[0], used[-1]
        out[at], out[at + 1] = first, last
        at += 2
        for symbol in range(first, last + 1):
            value = row[symbol]
            if value >= 128:
                out[at] = value & 127 | 128
                out[at + 1] = value >> 7
                at += 2
            else:
                out[at] = value
                at += 1
    return at


@kernel
def _read(data: Any, frequencies: Any) -> Any:
    """Bytes read, or -1 where they end early."""
    at = 0
    for row in range(frequencies.shape[0]):
        if at + 2 > data.size:
            return -1
        first, last = np.int64(data[at]), np.int64(data[at + 1])
        at += 2
        for symbol in range(first, last + 1):
            if at == data.size:
                return -1
            value = np.int64(data[at])
            at += 1
            if value >= 128:
                if at == data.size:
                    return -1
                value = (value & 127) + (np.int64(data[at]) << 7)
                at += 1
            frequencies[row, symbol] = value
    return at
