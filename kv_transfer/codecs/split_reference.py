"""``split``'s codes in numpy, for what they mean; ``split_compiled`` gives the same bytes."""

from __future__ import annotations

import numpy as np

from kv_transfer.codecs.contract import Array
from kv_transfer.codecs.float_forms import U8, FloatForm, put_together, take_apart

__all__ = ["pack", "put_together", "take_apart", "unpack"]


def pack(form: FloatForm, symbols: U8, begin: int, codes: U8, escapes: U8) -> int:
    """Fills ``codes``, and ``escapes`` from its front; returns how many escapes there are.

    symbols: ``[n]``. codes: ``group_bytes`` for each begun group. escapes: at least n long.
    """
    exponent = _exponent(form, symbols)
    distance = exponent - begin
    is_inside = (distance >= 0) & (distance < form.window)
    code = np.where(is_inside, distance, form.window).astype(np.uint8)
    if form.group == 2:
        low, high = _in_groups(code, 2)
        codes[:] = low | high << 4
    else:
        beside = (symbols >> 5 & 4 | symbols & 3) << 3
        a, b, c, d = _in_groups(beside | code, 4)
        codes[:] = np.concatenate([a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2])
    is_listed = _in_groups(~is_inside, form.group).T
    listed = _in_groups(exponent, form.group).T[is_listed]
    escapes[: listed.size] = listed
    return int(listed.size)


def unpack(form: FloatForm, codes: U8, escapes: U8, begin: int, symbols: U8) -> int:
    """Fills ``symbols``. Returns the number of escapes used; -1 where there are too few, or where
    codes of elements that do not exist are not 0."""
    if form.group == 2:
        fields = np.stack([codes & 15, codes >> 4])
    else:
        p, q, r = codes.reshape(3, -1)
        fields = np.stack([p & 63, p >> 6 | (q & 15) << 2, q >> 4 | (r & 3) << 4, r >> 2])
    exists = _in_groups(np.ones(symbols.size, bool), form.group)
    code = fields & form.window
    is_listed = ((code == form.window) & exists).T
    num_escapes = int(is_listed.sum())
    if fields[~exists].any() or num_escapes > escapes.size:
        return -1
    exponent = (code + np.uint8(begin)).T.copy()
    exponent[is_listed] = escapes[:num_escapes] & (form.num_exponents - 1)
    flat = exponent.T.reshape(-1)[: symbols.size]
    beside = fields.reshape(-1)[: symbols.size] >> 3
    symbols[:] = flat if form.group == 2 else (beside & 4) << 5 | flat << 2 | beside & 3
    return num_escapes


def _exponent(form: FloatForm, symbols: U8) -> Array:
    return (symbols >> 2 & 31 if form.dtype == "float16" else symbols).astype(np.int64)


def _in_groups(values: Array, group: int) -> Array:
    """``[group, ceil(n / group)]``; elements that do not exist are 0."""
    width = -(-values.size // group)
    padded = np.zeros(group * width, values.dtype)
    padded[: values.size] = values
    return padded.reshape(group, width)
