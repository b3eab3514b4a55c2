"""ZeroMQ socket options shared by every link, in one place."""

from __future__ import annotations

import zmq
import zmq.asyncio

from baton.messaging.codec import MAX_MESSAGE_BYTES
from baton.protocol.errors import ConfigError, WireError

MAX_PART_BYTES = 64 * 2**20
HEARTBEAT_INTERVAL_MS = 1_000
HEARTBEAT_TIMEOUT_MS = 5_000
RECONNECT_MS = 50
RECONNECT_MAX_MS = 1_000
HANDSHAKE_TIMEOUT_MS = 5_000


def configure(
    socket: zmq.asyncio.Socket, *, queue_frames: int = 0, max_part_bytes: int = MAX_MESSAGE_BYTES
) -> None:
    """``queue_frames`` is the high-water mark of both directions; 0 has no limit.

    Unlimited suits messages, whose number the request caps bound; KV bytes take a few
    frames, so that a slow reader is felt by the sender at once.
    """
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, queue_frames)
    socket.setsockopt(zmq.RCVHWM, queue_frames)
    socket.setsockopt(zmq.MAXMSGSIZE, max_part_bytes)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)


def connect(socket: zmq.asyncio.Socket, address: str) -> None:
    """Raises WireError for an address that ZeroMQ cannot read; reaching it comes later."""
    try:
        socket.connect(address)
    except zmq.ZMQError as exc:
        raise WireError(f"{address!r} is no address to connect to: {exc}") from exc


def bind(socket: zmq.asyncio.Socket, host: str, port: int = 0) -> str:
    """Bind and return the address that peers connect to. Raises ConfigError."""
    wanted = f"tcp://{host}:{port or '*'}"
    try:
        socket.bind(wanted)
    except zmq.ZMQError as exc:
        raise ConfigError(f"cannot bind {wanted}: {exc}; choose another host or port") from exc
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
