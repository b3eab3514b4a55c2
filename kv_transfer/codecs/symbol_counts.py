"""What ``entropy`` counts of a layer's symbols, in numpy and compiled.

symbols: uint8 ``[2 (K, V), tokens, channels]``; a channel is one place in one head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs.float_forms import U8
from kv_transfer.codecs.jit import kernel

Counts = NDArray[np.int64]


def sums_reference(symbols: U8, mask: int) -> Counts:
    """``[2, channels]``: the sum over tokens of ``symbol & mask``."""
    total: Counts = (symbols & mask).sum(axis=1, dtype=np.int64)
    return total


def counts_reference(symbols: U8, table_of: U8, num_tables: int) -> Counts:
    """``[num_tables, 256]``: how often each symbol occurs in the channels of each table.

    table_of: ``[2, channels]``.
    """
    counts = np.zeros((num_tables, 256), np.int64)
    np.add.at(counts, (np.broadcast_to(table_of[:, None], symbols.shape), symbols), 1)
    return counts


def sums(symbols: U8, mask: int) -> Counts:
    """As ``sums_reference``."""
    out = np.zeros((2, symbols.shape[2]), np.int64)
    _sums(symbols, np.uint8(mask), out)
    return out


def counts(symbols: U8, table_of: U8, num_tables: int) -> Counts:
    """As ``counts_reference``."""
    assert table_of.shape == (2, symbols.shape[2])
    assert int(table_of.max()) < num_tables
    out = np.zeros((num_tables, 256), np.int64)
    _counts(symbols, table_of, out)
    return out


@kernel
def _sums(symbols: Any, mask: Any, out: Any) -> None:
    narrow = np.zeros(symbols.shape[2], np.uint32)
    for run in range(2):
        for token in range(symbols.shape[1]):
            row = symbols[run, token]
            for channel in range(row.size):
                narrow[channel] += row[channel] & mask
            # 2**24 tokens of 255 fit 32 bits.
            if token & 0xFFFFFF == 0xFFFFFF or token == symbols.shape[1] - 1:
                for channel in range(row.size):
                    out[run, channel] += narrow[channel]
                    narrow[channel] = 0


@kernel
def _counts(symbols: Any, table_of: Any, out: Any) -> None:
    """Two sets of counters in turn: neighbours are often equal, and adding to what was just
    stored waits for the store."""
    num_tables = out.shape[0]
    each = np.zeros((2, num_tables * 256), np.int64)
    even, odd = each[0], each[1]
    for run in range(2):
        rows = table_of[run].astype(np.uint64) << np.uint64(8)
        for token in range(symbols.shape[1]):
            row = symbols[run, token]
            for pair in range(row.size // 2):
                channel = np.uint64(2 * pair)
                even[rows[channel] | np.uint64(row[channel])] += 1
                channel += np.uint64(1)
                odd[rows[channel] | np.uint64(row[channel])] += 1
            if row.size % 2:
                even[rows[row.size - 1] | np.uint64(row[row.size - 1])] += 1
    for place in range(num_tables * 256):
        out[place // 256, place % 256] = even[place] + odd[place]
