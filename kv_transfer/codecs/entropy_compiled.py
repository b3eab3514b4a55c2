"""What ``entropy`` is built from, compiled for one CPU core."""

from kv_transfer.codecs.float_forms_compiled import put_together, take_apart
from kv_transfer.codecs.rans_compiled import decode, encode_into, normalise
from kv_transfer.codecs.symbol_counts import counts, sums

__all__ = [
    "counts",
    "decode",
    "encode_into",
    "normalise",
    "put_together",
    "sums",
    "take_apart",
]
