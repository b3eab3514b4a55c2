"""Whether KV of one worker can go to another, by what both said of themselves. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from baton.protocol.layout import FITS, Fit, fit, why_not_unchanged
from router.members import Member


def kv_fit(prefill: Member, decode: Member) -> Fit:
    if prefill.layout is not None and decode.layout is not None:
        return fit(prefill.layout, decode.layout)
    if prefill.fingerprint == decode.fingerprint:
        return FITS
    return Fit(
        f"layout {prefill.fingerprint} at the prefill end, {decode.fingerprint} at the decode "
        "end: model folder, dtype or version differ"
    )


def goes_unchanged(prefill: Member, decode: Member) -> bool:
    """Cheap: asked of many pairs, at each placement."""
    if prefill.fingerprint != decode.fingerprint:
        return False
    return None in (prefill.layout, decode.layout) or prefill.layout == decode.layout


def why_none_fits(prefills: Sequence[Member], decodes: Sequence[Member]) -> str:
    """When KV of no one here can go to another, both of them at least one: the reason for the
    pair that comes nearest."""
    pairs = [(kv_fit(p, d), p, d) for p in prefills[:8] for d in decodes[:8]]
    found, prefill, decode = max(pairs, key=lambda pair: pair[0].is_cast)
    reason = found.reason
    if prefill.layout is not None and decode.layout is not None:
        reason = why_not_unchanged(prefill.layout, decode.layout)
    return (
        f"no prefill worker's KV layout fits a decode worker's: {prefill.worker_id} to "
        f"{decode.worker_id}: {reason}"
    )
