"""Typed messages between rank 0 and one other rank, over a pair of connected sockets.

A message is its length (4 bytes, little endian) and so many bytes of MessagePack. Both ends
are processes of one worker, yet lengths are capped and types are checked: a rank that has gone
wrong must not take the worker's memory with it.
"""

from __future__ import annotations

import socket
from typing import Any

import msgspec

from baton.protocol.errors import RankLost, WireError

MAX_MESSAGE_BYTES = 256 * 2**20
"""Twice the KV of the largest frame that a configuration allows, and room around it."""
_HEADER_BYTES = 4


class Channel:
    """Used by one thread. ``name`` says in errors who is at the other end."""

    def __init__(self, own: socket.socket, name: str) -> None:
        self._socket = own
        self._name = name

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: object, deadline_s: float | None) -> None:
        """Raises RankLost when the other end is gone or takes nothing within the deadline."""
        self.send_encoded(msgspec.msgpack.encode(message), deadline_s)

    def send_encoded(self, body: bytes, deadline_s: float | None) -> None:
        """As ``send``, of what was encoded once for several ranks."""
        if len(body) > MAX_MESSAGE_BYTES:
            raise WireError(f"a message of {len(body)} bytes; at most {MAX_MESSAGE_BYTES} allowed")
        try:
            self._socket.settimeout(deadline_s)
            self._socket.sendall(len(body).to_bytes(_HEADER_BYTES, "little") + body)
        except OSError as exc:
            raise self._lost(exc, deadline_s) from exc

    def receive(self, kind: Any, deadline_s: float | None) -> Any:
        """The next message, a ``kind``: a type or a union of types. None waits for ever.
        Raises RankLost, and WireError for a message that is too long or no ``kind``."""
        header = self._read(_HEADER_BYTES, deadline_s)
        num_bytes = int.from_bytes(header, "little")
        if num_bytes > MAX_MESSAGE_BYTES:
            raise WireError(
                f"{self._name} announces {num_bytes} bytes; {MAX_MESSAGE_BYTES} allowed"
            )
        body = self._read(num_bytes, deadline_s)
        try:
            return msgspec.msgpack.decode(body, type=kind)
        except msgspec.DecodeError as exc:
            raise WireError(f"{self._name} sent what does not decode: {exc}") from exc

    def close(self) -> None:
        self._socket.close()

    def _read(self, num_bytes: int, deadline_s: float | None) -> bytearray:
        body = bytearray(num_bytes)
        view, filled = memoryview(body), 0
        try:
            self._socket.settimeout(deadline_s)
            while filled < num_bytes:
                count = self._socket.recv_into(view[filled:])
                if count == 0:
                    raise RankLost(f"{self._name} has closed its end")
                filled += count
        except OSError as exc:
            raise self._lost(exc, deadline_s) from exc
        return body

    def _lost(self, exc: OSError, deadline_s: float | None) -> RankLost:
        if isinstance(exc, TimeoutError):
            return RankLost(f"{self._name} was silent for {deadline_s:g} s")
        return RankLost(f"{self._name} cannot be reached: {exc.strerror or exc}")


def pair(name: str) -> tuple[Channel, socket.socket]:
    """This process's end, and the socket for the process called ``name``."""
    own, other = socket.socketpair()
    return Channel(own, name), other
