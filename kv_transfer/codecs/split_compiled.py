"""``split``'s codes compiled for one CPU core; the bytes are those of ``split_reference``.

Blocks of codes go through a loop without branches, which becomes vector instructions; only blocks
with an escape, which are few, go through a second one. The first takes slices, for a compiler may
assume arrays to be apart where it sees their bounds; and its values stay in 8 bits, for one wider
value makes every vector wider.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kv_transfer.codecs.float_forms import U8, FloatForm
from kv_transfer.codecs.float_forms_compiled import put_together, take_apart
from kv_transfer.codecs.jit import kernel

__all__ = ["pack", "put_together", "take_apart", "unpack"]

B = np.uint8
_BLOCK = 512


def pack(form: FloatForm, symbols: U8, begin: int, codes: U8, escapes: U8) -> int:
    """As ``split_reference.pack``."""
    assert codes.size == -(-symbols.size // form.group) * form.group_bytes
    assert escapes.size >= symbols.size
    kernel_ = _pack4 if form.group == 2 else _pack6
    return int(kernel_(symbols, B(begin), codes, escapes))


def unpack(form: FloatForm, codes: U8, escapes: U8, begin: int, symbols: U8) -> int:
    """As ``split_reference.unpack``."""
    assert codes.size == -(-symbols.size // form.group) * form.group_bytes
    kernel_ = _unpack4 if form.group == 2 else _unpack6
    return int(kernel_(codes, escapes, B(begin), symbols))


@kernel
def _pack4_block(low: Any, high: Any, begin: Any, codes: Any) -> Any:
    """Whether a code is 15."""
    carry = B(0)
    for j in range(codes.size):
        c = min(B(low[j] - begin), B(15))
        d = min(B(high[j] - begin), B(15))
        codes[j] = c | B(d << B(4))
        carry = B(carry | B(c + B(1)) | B(d + B(1)))
    return carry & B(16) != B(0)


@kernel
def _pack4(symbols: Any, begin: Any, codes: Any, escapes: Any) -> Any:
    half, pairs, num = codes.size, symbols.size // 2, 0
    if pairs < half:
        codes[pairs] = min(B(symbols[pairs] - begin), B(15))
    for at in range(0, half, _BLOCK):
        end = min(at + _BLOCK, half)
        to = min(end, pairs)
        low, high = symbols[at:to], symbols[at + half : to + half]
        if _pack4_block(low, high, begin, codes[at:to]) or to < end:
            for j in range(at, end):
                if codes[j] & B(15) == B(15):
                    escapes[num] = symbols[j]
                    num += 1
                if codes[j] >> B(4) == B(15):
                    escapes[num] = symbols[j + half]
                    num += 1
    return num


@kernel
def _unpack4_block(codes: Any, begin: Any, low: Any, high: Any) -> Any:
    """Whether a code is 15."""
    carry = B(0)
    for j in range(codes.size):
        c, d = B(codes[j] & B(15)), B(codes[j] >> B(4))
        low[j] = B(c + begin)
        high[j] = B(d + begin)
        carry = B(carry | B(c + B(1)) | B(d + B(1)))
    return carry & B(16) != B(0)


@kernel
def _unpack4(codes: Any, escapes: Any, begin: Any, symbols: Any) -> Any:
    half, pairs, num = codes.size, symbols.size // 2, 0
    if pairs < half:
        if codes[pairs] > B(15):
            return -1
        symbols[pairs] = B(codes[pairs] + begin)
    for at in range(0, half, _BLOCK):
        end = min(at + _BLOCK, half)
        to = min(end, pairs)
        low, high = symbols[at:to], symbols[at + half : to + half]
        if _unpack4_block(codes[at:to], begin, low, high) or to < end:
            for j in range(at, end):
                c, d = codes[j] & B(15), codes[j] >> B(4)
                needed = int(c == B(15)) + int(d == B(15))
                if num + needed > escapes.size:
                    return -1
                if c == B(15):
                    symbols[j] = escapes[num]
                    num += 1
                if d == B(15):
                    symbols[j + half] = escapes[num]
                    num += 1
    return num


@kernel
def _field6(symbol: Any, begin: Any) -> Any:
    code = min(B(B(B(symbol >> B(2)) & B(31)) - begin), B(7))
    return B(B((B(symbol >> B(5)) & B(4)) | (symbol & B(3))) << B(3)) | code


@kernel
def _symbol6(field: Any, exponent: Any) -> Any:
    beside = B(field >> B(3))
    return B(B((beside & B(4)) << B(5)) | B(exponent << B(2)) | (beside & B(3)))


@kernel
def _pack6_block(s0: Any, s1: Any, s2: Any, s3: Any, begin: Any, p: Any, q: Any, r: Any) -> None:
    for j in range(p.size):
        a, b = _field6(s0[j], begin), _field6(s1[j], begin)
        c, d = _field6(s2[j], begin), _field6(s3[j], begin)
        p[j] = B(a | B(b << B(6)))
        q[j] = B(B(b >> B(2)) | B(c << B(4)))
        r[j] = B(B(c >> B(4)) | B(d << B(2)))


@kernel
def _pack6(symbols: Any, begin: Any, codes: Any, escapes: Any) -> Any:
    n, width, num = symbols.size, codes.size // 3, 0
    full = max(0, n - 3 * width)
    p, q, r = codes[:width], codes[width : 2 * width], codes[2 * width :]
    _pack6_block(
        symbols[:full], symbols[width : width + full], symbols[2 * width : 2 * width + full],
        symbols[3 * width : 3 * width + full], begin, p[:full], q[:full], r[:full],
    )  # fmt: skip
    for j in range(full, width):
        fields = np.zeros(4, np.uint8)
        for part in range(4):
            if j + part * width < n:
                fields[part] = _field6(symbols[j + part * width], begin)
        a, b, c, d = fields
        p[j] = B(a | B(b << B(6)))
        q[j] = B(B(b >> B(2)) | B(c << B(4)))
        r[j] = B(B(c >> B(4)) | B(d << B(2)))
    for j in range(width):
        for at in range(j, n, width):
            exponent = B(B(symbols[at] >> B(2)) & B(31))
            if B(exponent - begin) >= B(7):
                escapes[num] = exponent
                num += 1
    return num


@kernel
def _unpack6(codes: Any, escapes: Any, begin: Any, symbols: Any) -> Any:
    n, width, num = symbols.size, codes.size // 3, 0
    fields = np.zeros(4, np.uint8)
    for j in range(width):
        p, q, r = codes[j], codes[j + width], codes[j + 2 * width]
        fields[0] = p & B(63)
        fields[1] = B(p >> B(6)) | B((q & B(15)) << B(2))
        fields[2] = B(q >> B(4)) | B((r & B(3)) << B(4))
        fields[3] = B(r >> B(2))
        for part in range(4):
            at, field = j + part * width, fields[part]
            if at >= n:
                if field != B(0):
                    return -1
                continue
            exponent = B((field & B(7)) + begin)
            if field & B(7) == B(7):
                if num == escapes.size:
                    return -1
                exponent = escapes[num] & B(31)
                num += 1
            symbols[at] = _symbol6(field, exponent)
    return num
