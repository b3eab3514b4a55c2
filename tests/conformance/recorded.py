"""What a peer of wire version 1 said, kept as bytes: such a peer can no longer be built here.

``wire_v1.json`` was written by the last build that spoke version 1 alone, from its own message
links, sender and receiver. ``KV`` are the values of the hand-overs that it holds, of 20 tokens
in a layout that ``LAYOUT`` describes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from baton.messaging.codec import encode
from baton.protocol.layout import KvLayout
from baton.protocol.messages import Message

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("wire_v1.json").read_text())
NUM_TOKENS = 20
LAYOUT = KvLayout.uniform(
    num_layers=3, num_kv_heads=1, head_dim=16, dtype="float32", model_digest="recorded"
)


def recorded_kv() -> NDArray[np.float32]:
    """``[layers, 2, tokens, kv_heads, head_dim]`` float32."""
    layer, part, token, _, dim = np.ogrid[:3, :2, :NUM_TOKENS, :1, :16]
    values: NDArray[np.float32] = (layer * 10_000 + part * 5_000 + token * 16 + dim).astype(
        np.float32
    )
    return values


def as_version_1_reads(message: Message, recorded: str) -> Any:
    """What a peer reads of ``message`` whose own message, of the same kind, is ``recorded``: of
    every struct those fields that it knows, in their order, and no others."""
    return _known(msgpack.unpackb(encode(message)), plain(recorded))


def _known(ours: Any, theirs: Any) -> Any:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return {key: _known(ours[key], theirs[key]) for key in theirs if key in ours}
    if not isinstance(ours, list) or not isinstance(theirs, list):
        return ours
    if all(isinstance(item, int) for item in ours):
        return ours  # Token ids are no struct.
    known = [_known(o, t) for o, t in zip(ours, theirs, strict=False)]
    return known if len(ours) >= len(theirs) else ours


def plain(recorded: str) -> Any:
    return msgpack.unpackb(bytes.fromhex(recorded))
