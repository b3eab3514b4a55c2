"""What ``int8`` and ``int4`` are built from, in numpy."""

from kv_transfer.codecs.float_values import narrow_reference as narrow
from kv_transfer.codecs.float_values import widen_reference as widen
from kv_transfer.codecs.int_groups import quantise_reference as quantise
from kv_transfer.codecs.int_groups import restore_reference as restore
from kv_transfer.codecs.nibbles import pack_rows_reference as pack_rows
from kv_transfer.codecs.nibbles import unpack_rows_reference as unpack_rows

__all__ = ["narrow", "pack_rows", "quantise", "restore", "unpack_rows", "widen"]
