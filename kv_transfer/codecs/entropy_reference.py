"""What ``entropy`` is built from, in numpy."""

from __future__ import annotations

from kv_transfer.codecs.float_forms import U8, put_together, take_apart
from kv_transfer.codecs.rans import RansTables, encode_reference, normalise
from kv_transfer.codecs.rans import decode_reference as decode
from kv_transfer.codecs.symbol_counts import counts_reference as counts
from kv_transfer.codecs.symbol_counts import sums_reference as sums

__all__ = [
    "counts",
    "decode",
    "encode_into",
    "normalise",
    "put_together",
    "sums",
    "take_apart",
]


def encode_into(symbols: U8, index: U8, tables: RansTables, num_lanes: int, out: U8) -> int:
    """As ``rans_compiled.encode_into``."""
    coded = encode_reference(symbols, index, tables, num_lanes)
    out[: coded.size] = coded
    return coded.size
