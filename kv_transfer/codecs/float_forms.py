"""How the lossless codecs cut a float: a symbol byte that says much of it, and body bytes.

    dtype       symbol                                   body planes
    bfloat16    exponent                                 sign and mantissa
    float16     high byte: sign, exponent, 2 of mantissa low byte
    float32     exponent                                 sign and 7 high bits of the mantissa,
                                                         then the middle and the low byte

A plane holds one byte of every element, in order of elements. Here in numpy;
``float_forms_compiled`` gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs.contract import Array

U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class FloatForm:
    """window: exponents that ``split`` codes by distance. group: elements whose codes share bytes.
    group_bytes: of those codes. body_bytes: of one element."""

    dtype: str
    num_exponents: int
    window: int
    group: int
    group_bytes: int
    body_bytes: int

    @property
    def last_window(self) -> int:
        """The highest begin that a window can have."""
        return self.num_exponents - self.window


FORMS = {
    "bfloat16": FloatForm("bfloat16", 256, window=15, group=2, group_bytes=1, body_bytes=1),
    "float16": FloatForm("float16", 32, window=7, group=4, group_bytes=3, body_bytes=1),
    "float32": FloatForm("float32", 256, window=15, group=2, group_bytes=1, body_bytes=3),
}


def bits_of(values: Array) -> NDArray[Any]:
    """The floats' bits, flat and without a copy: uint16 or uint32. Writes go to ``values``."""
    assert values.flags.c_contiguous
    return values.reshape(-1).view(np.uint32 if values.dtype.itemsize == 4 else np.uint16)


def take_apart(form: FloatForm, bits: Array, symbols: U8, body: U8) -> None:
    """Fills ``symbols`` ``[n]`` and ``body`` ``[body_bytes * n]`` from ``bits`` ``[n]``."""
    planes = body.reshape(form.body_bytes, bits.size)
    if form.dtype == "float16":
        symbols[:], planes[0] = bits >> 8, bits & 0xFF
        return
    top = bits >> 16 if form.dtype == "float32" else bits
    symbols[:], planes[0] = top >> 7 & 0xFF, top >> 8 & 0x80 | top & 0x7F
    if form.dtype == "float32":
        planes[1], planes[2] = bits >> 8 & 0xFF, bits & 0xFF


def put_together(form: FloatForm, symbols: U8, body: U8, bits: Array) -> None:
    """Fills ``bits``."""
    planes = body.reshape(form.body_bytes, bits.size).astype(bits.dtype)
    symbol = symbols.astype(bits.dtype)
    if form.dtype == "float16":
        bits[:] = symbol << 8 | planes[0]
        return
    bits[:] = (planes[0] & 0x80) << 8 | symbol << 7 | planes[0] & 0x7F
    if form.dtype == "float32":
        bits[:] = bits << 16 | planes[1] << 8 | planes[2]
