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


def sums_reference(symbols: U8) -> Counts:
    """``[2, channels]``: the sum over tokens."""
    total: Counts = symbols.sum(axis=1, dtype=np.int64)
    return total


def counts_reference(symbols: U8, table_of: U8, num_tables: int) -> Counts:
    """``[num_tables, 256]``: how often each symbol occurs in the channels of each table.

    table_of: ``[2, channels]``.
    """
    counts = np.zeros((num_tables, 256), np.int64)
    np.add.at(counts, (np.broadcast_to(table_of[:, None], symbols.shape), symbols), 1)
    return counts


def sums(symbols: U8) -> Counts:
    """As ``sums_reference``."""
    out = np.zeros((2, symbols.shape[2]), np.int64)
    _sums(symbols, out)
    return out


def counts(symbols: U8, table_of: U8, num_tables: int) -> Counts:
    """As ``counts_reference``."""
    assert table_of.shape == (2, symbols.shape[2])
    assert int(table_of.max()) < num_tables
    out = np.zeros((num_tables, 256), np.int64)
    _counts(symbols, table_of, out)
    return out


@kernel
def _sums(symbols: Any, out: Any) -> None:
    narrow = np.zeros(symbols.shape[2], np.uint32)
    for run in range(2):
        for token in range(symbols.shape[1]):
            row = symbols[run, token]
            for channel in range(row.size):
                narrow[channel] += row[channel]
            # 2**24 tokens of 255 fit 32 bits.
            if token & 0xFFFFFF == 0xFFFFFF or token == symbols.shape[1] - 1:
                for channel in range(row.size):
                    out[run, channel] += narrow[channel]
                    narrow[channel] = 0


@kernel
def _counts(symbols: Any, table_of: Any, out: Any) -> None:
    for run in range(2):
        tables = table_of[run]
        for token in range(symbols.shape[1]):
            row = symbols[run, token]
            for channel in range(row.size):
                out[tables[channel], row[channel]] += 1
