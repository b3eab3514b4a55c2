"""Message structs to MessagePack bytes and back, validated and size-capped. Never pickle."""

from __future__ import annotations

import msgpack
import msgspec

from baton.protocol.errors import WireError
from baton.protocol.messages import AnyMessage, Message

MAX_MESSAGE_BYTES = 16 * 2**20
_MAX_ITEMS = 1_100_000
_MAX_TEXT_BYTES = 64 * 2**10


def encode(message: Message) -> bytes:
    packed: bytes = msgpack.packb(msgspec.to_builtins(message), use_bin_type=True)
    assert len(packed) <= MAX_MESSAGE_BYTES, f"{type(message).__name__} of {len(packed)} bytes"
    return packed


def decode(data: bytes | memoryview) -> AnyMessage:
    """Raises WireError for anything that is not exactly one well-typed message."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"message of {len(data)} bytes; the cap is {MAX_MESSAGE_BYTES}")
    try:
        plain = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_array_len=_MAX_ITEMS,
            max_map_len=256,
            max_str_len=_MAX_TEXT_BYTES,
            max_bin_len=_MAX_TEXT_BYTES,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, msgpack.exceptions.UnpackException) as exc:
        raise WireError(f"not MessagePack: {exc or type(exc).__name__}") from exc
    except RecursionError as exc:
        raise WireError("MessagePack nested too deep") from exc
    try:
        message: AnyMessage = msgspec.convert(plain, AnyMessage)
    except (msgspec.ValidationError, RecursionError, OverflowError) as exc:
        raise WireError(f"not a message: {exc}") from exc
    return message
