"""Rows of logits that are not finite: they cost their own sequence and no other."""

from __future__ import annotations

from torch import Tensor

from baton.protocol.errors import InternalError

NOT_FINITE = InternalError(
    "the logits are not finite: KV or weights are damaged, or the model overflows in this dtype "
    "(then set model.dtype to bfloat16 or float32)",
    retryable=True,
)
"""Why what comes of such a row means nothing. Nobody raises it."""


def zero_bad_rows(logits: Tensor) -> list[int]:
    """The rows of ``[R, V]`` that hold NaN or an infinity above all else; they become zeros, so
    that the steps behind can be taken for all rows alike."""
    # The largest logit of a row is NaN when any of them is, and infinite on overflow.
    bad: list[int] = (~logits.amax(dim=-1).isfinite()).nonzero()[:, 0].tolist()
    if bad:
        logits[bad] = 0
    return bad
