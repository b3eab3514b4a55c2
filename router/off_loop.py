"""Work on large answers leaves the event loop, so that other streams go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from router import limits

T = TypeVar("T")


async def build(make: Callable[[], T], num_logprobs: int) -> T:
    """What ``make`` returns; in a thread where it writes out many log-probabilities."""
    if num_logprobs <= limits.INLINE_LOGPROBS:
        return make()
    return await asyncio.to_thread(make)
