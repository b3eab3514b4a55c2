"""Fills what ``rans.RansTables`` derives from frequencies; codecs that send tables do it often."""

from __future__ import annotations

from typing import Any

from kv_transfer.codecs.jit import kernel


@kernel
def fill(frequencies: Any, symbol_of: Any, spans: Any, coding: Any) -> None:
    """frequencies: ``[num_tables, alphabet]``, in range, each row adding up to 4,096. The others
    as in ``RansTables``, zeroed."""
    for table in range(frequencies.shape[0]):
        begin = 0
        for symbol in range(frequencies.shape[1]):
            freq = frequencies[table, symbol]
            symbol_of[table, begin : begin + freq] = symbol
            spans[table, symbol] = begin << 16 | freq
            begin += freq
        for symbol in range(spans.shape[1]):
            span = spans[table, symbol]
            divisor = max(span & 0xFFFF, 1)
            coding[table, symbol, 0] = ((1 << 44) + divisor - 1) // divisor
            coding[table, symbol, 1] = span
