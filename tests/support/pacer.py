"""A TCP forwarder that is as slow as a link: a token bucket for each direction, and latency.

In user space and threads, so that it works anywhere; it holds some 5 Gbit/s. Bytes wait here, not
in the kernel: what lies ahead of the bucket is at most ``QUEUE_S`` of the link.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator

BURST_S = 2e-3
"""What an idle link has saved up: none but what a thread that wakes late must make up for."""
QUEUE_S = 20e-3
MIN_CHUNK, MAX_CHUNK = 1_448, 262_144
SOCKET_BYTES = 262_144
POLL_S = 0.05


class Bucket:
    """Bytes that have passed by when: ``take`` says when the next ones will have."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._full_at = 0.0

    def take(self, num_bytes: int, now: float) -> float:
        self._full_at = max(self._full_at, now - BURST_S) + num_bytes / self.bytes_per_s
        return self._full_at


class Pacer:
    """``address`` forwards to ``target``, both ``host:port``. ``bytes_per_s`` may be set at any
    time; it holds for each direction, over all connections."""

    def __init__(self, target: str, bytes_per_s: float, latency_s: float = 0.0) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host.removeprefix("tcp://"), int(port))
        self._latency_s = latency_s
        self._buckets = (Bucket(bytes_per_s), Bucket(bytes_per_s))
        self._locks = (threading.Lock(), threading.Lock())
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_bytes = [0, 0]
        """Forwarded so far: to the target, and back."""
        self._is_closed = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    @property
    def bytes_per_s(self) -> float:
        return self._buckets[0].bytes_per_s

    @bytes_per_s.setter
    def bytes_per_s(self, value: float) -> None:
        for bucket in self._buckets:
            bucket.bytes_per_s = value

    def close(self) -> None:
        self._is_closed.set()
        for one in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join()
        for one in [self._listener, *self._sockets]:
            one.close()

    def _start(self, run: object, *args: object) -> None:
        assert callable(run)
        thread = threading.Thread(target=run, args=args, daemon=True, name="pacer")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._is_closed.is_set():
            if not select.select([self._listener], [], [], POLL_S)[0]:
                continue
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                continue
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
            self._sockets += [near, far]
            self._start(self._forward, near, far, 0)
            self._start(self._forward, far, near, 1)

    def _forward(self, source: socket.socket, sink: socket.socket, way: int) -> None:
        """Reads ahead as far as the latency asks for, and writes what is due."""
        due: deque[tuple[float, bytes]] = deque()
        is_open = True
        try:
            while is_open or due:
                now = time.monotonic()
                while due and due[0][0] <= now:
                    data = due.popleft()[1]
                    sink.sendall(data)
                    self.num_bytes[way] += len(data)
                    now = time.monotonic()
                ahead_s = due[-1][0] - now - self._latency_s if due else 0.0
                wait_s = min(due[0][0] - now, POLL_S) if due else POLL_S
                if not is_open or ahead_s > QUEUE_S or self._is_closed.is_set():
                    if self._is_closed.wait(max(0.0, wait_s)):
                        return
                    continue
                if select.select([source], [], [], max(0.0, wait_s))[0]:
                    rate = self._buckets[way].bytes_per_s
                    size = int(min(MAX_CHUNK, max(MIN_CHUNK, rate * BURST_S)))
                    data = source.recv(size)
                    is_open = bool(data)
                    if data:
                        with self._locks[way]:
                            at = self._buckets[way].take(len(data), time.monotonic())
                        due.append((at + self._latency_s, data))
        except OSError:
            pass  # Either side went away: so does the connection.
        finally:
            for one in (source, sink):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def paced(target: str, bytes_per_s: float, latency_s: float = 0.0) -> Iterator[Pacer]:
    pacer = Pacer(target, bytes_per_s, latency_s)
    try:
        yield pacer
    finally:
        pacer.close()
