"""What ``int8`` and ``int4`` are built from, compiled for one CPU core."""

from kv_transfer.codecs.float_values import narrow, widen
from kv_transfer.codecs.int_groups import quantise, restore
from kv_transfer.codecs.nibbles import pack_rows, unpack_rows

__all__ = ["narrow", "pack_rows", "quantise", "restore", "unpack_rows", "widen"]
