"""``float_forms`` compiled for one CPU core: loops that become vector instructions."""

from __future__ import annotations

from typing import Any

import numpy as np

from kv_transfer.codecs.contract import Array
from kv_transfer.codecs.float_forms import U8, FloatForm
from kv_transfer.codecs.jit import kernel

B, H, W = np.uint8, np.uint16, np.uint32


def take_apart(form: FloatForm, bits: Array, symbols: U8, body: U8) -> None:
    """As ``float_forms.take_apart``."""
    n = bits.size
    assert symbols.size == n
    assert body.size == n * form.body_bytes
    planes = [body[i * n : (i + 1) * n] for i in range(form.body_bytes)]
    _APART[form.dtype](bits, symbols, *planes)


def put_together(form: FloatForm, symbols: U8, body: U8, bits: Array) -> None:
    """As ``float_forms.put_together``."""
    n = bits.size
    assert symbols.size == n
    assert body.size == n * form.body_bytes
    planes = [body[i * n : (i + 1) * n] for i in range(form.body_bytes)]
    _TOGETHER[form.dtype](symbols, *planes, bits)


@kernel
def _apart_bfloat16(bits: Any, symbols: Any, body: Any) -> None:
    for i in range(bits.size):
        x = bits[i]
        symbols[i] = B(x >> H(7))
        body[i] = B((B(x >> H(8)) & B(0x80)) | (B(x) & B(0x7F)))


@kernel
def _apart_float16(bits: Any, symbols: Any, body: Any) -> None:
    for i in range(bits.size):
        symbols[i] = B(bits[i] >> H(8))
        body[i] = B(bits[i])


@kernel
def _apart_float32(bits: Any, symbols: Any, first: Any, middle: Any, last: Any) -> None:
    for i in range(bits.size):
        x = bits[i]
        symbols[i] = B(x >> W(23))
        first[i] = B((B(x >> W(24)) & B(0x80)) | (B(x >> W(16)) & B(0x7F)))
        middle[i] = B(x >> W(8))
        last[i] = B(x)


@kernel
def _together_bfloat16(symbols: Any, body: Any, bits: Any) -> None:
    for i in range(bits.size):
        rest = body[i]
        bits[i] = H(H(rest & B(0x80)) << H(8) | H(symbols[i]) << H(7) | H(rest & B(0x7F)))


@kernel
def _together_float16(symbols: Any, body: Any, bits: Any) -> None:
    for i in range(bits.size):
        bits[i] = H(H(symbols[i]) << H(8) | H(body[i]))


@kernel
def _together_float32(symbols: Any, first: Any, middle: Any, last: Any, bits: Any) -> None:
    for i in range(bits.size):
        top = W(first[i] & B(0x80)) << W(24) | W(first[i] & B(0x7F)) << W(16)
        bits[i] = W(top | W(symbols[i]) << W(23) | W(middle[i]) << W(8) | W(last[i]))


_APART: dict[str, Any] = {
    "bfloat16": _apart_bfloat16,
    "float16": _apart_float16,
    "float32": _apart_float32,
}
_TOGETHER: dict[str, Any] = {
    "bfloat16": _together_bfloat16,
    "float16": _together_float16,
    "float32": _together_float32,
}
